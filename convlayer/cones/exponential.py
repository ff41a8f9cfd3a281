"""The exponential cone: a projection by one root of one variable, and its derivative in closed form."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from convlayer.cones.cone import Cone, Spectrum, finite_rows

TINY = 1e-100  # relative to |v|: a positive coordinate below this is rounded up to it, so that ratios and squares stay finite
NEAR = 1e-290  # the least distance of the root from its anchor
FAR = 2000.0  # the greatest: e^rho and e^-rho are then beyond anything v can balance
ITERATIONS = 60


class _Root(NamedTuple):
    """p = a (rho, 1, e^rho) and v - p = b (1, 1 - rho, -e^-rho); all (*batch,)."""

    a: Tensor
    b: Tensor
    rho: Tensor
    rise: Tensor  # a e^rho
    fall: Tensor  # b e^-rho


class _Case(NamedTuple):
    """Which formula holds where; all but v (*batch,), and exclusive."""

    v: Tensor  # (*batch, 3), divided by scale
    scale: Tensor
    inside: Tensor  # v in K
    polar: Tensor  # v in -K*, r > 0
    quadrant: Tensor  # r <= 0 and s <= 0


@dataclass(frozen=True)
class Exponential(Cone):
    """K = cl{(r, s, t) : s > 0, s exp(r/s) <= t}.

    Solution:    v in K: v.  v in -K*, that is r > 0 and r exp(s/r - 1) <= -t: 0.  r <= 0 and s <= 0: (r, 0, max(t, 0)).
                 Else p = a (rho, 1, e^rho) and v - p = b (1, 1 - rho, -e^-rho), which are orthogonal, with a, b > 0:
                 the first two coordinates give a and b as functions of rho, the third an equation for rho.
    Derivative:  eigenvectors p, v - p and their cross product, with eigenvalues 1, 0 and 1/(1 + |v - p| kappa), kappa
                 the curvature of the surface: with P = (rho, 1, e^rho) and N = (1, 1 - rho, -e^-rho) e^rho,
                 |v - p| kappa = (b |P|^2)/(a |N|^2).
    At a kink:   the surfaces of K and -K*, and the faces of r <= 0, s <= 0. Within `tolerance` of the first the
                 derivative is I, of the second the projection onto the nearest ray, of the quadrant
                 diag(1, 1[s >= -tolerance], 1[t >= -tolerance]).
    Source:      the parametrisation is Friberg's (2023); the equation is solved here in its logarithm, see `_root`.
    """

    name: ClassVar[str] = "exponential"
    size: ClassVar[int] = 3  # type: ignore[misc]

    def project(self, v: Tensor) -> Tensor:
        return self._solve(v)[0]

    def linearise(self, v: Tensor, tolerance: float = 0.0) -> tuple[Tensor, Spectrum]:
        p, root, case = self._solve(v)
        rho = root.rho
        e, one, large = torch.exp(-rho.abs()), torch.ones_like(rho), rho > 0
        c, k = torch.where(large, e, one), torch.where(large, one, e)  # 1 and e^rho, divided by the greater
        ray = torch.stack((rho * c, c, k), -1)
        normal = torch.stack((k, k * (1 - rho), -c), -1)
        ray_square, normal_square = ray.square().sum(-1, keepdim=True), normal.square().sum(-1, keepdim=True)
        free, bent = root.a * normal_square[..., 0], root.b * ray_square[..., 0]
        ray, normal = ray * ray_square.rsqrt(), normal * normal_square.rsqrt()
        basis = torch.stack((ray, normal, torch.linalg.cross(ray, normal)), -1)
        identity, first = _constants(v.dtype, v.device)
        inside, polar, quadrant = case.inside, case.polar, case.quadrant
        leading = ~polar
        if tolerance > 0:
            original = case.v * case.scale.unsqueeze(-1)
            inside = inside | (_gap(root) * case.scale <= tolerance)
            leading = leading | (_depth(_mirror(original)) <= tolerance) | inside
            quadrant = (original[..., :2] <= tolerance).all(-1) & ~inside
            corner = (original >= -tolerance) | first
        else:
            corner = (case.v >= 0) | first
        middle = torch.where(inside, one, free / (free + bent) * ~polar)
        values = torch.stack((leading.to(v.dtype), inside.to(v.dtype), middle), -1)
        values = torch.where(quadrant.unsqueeze(-1), corner.to(v.dtype), values)
        return p, Spectrum(values, torch.where(quadrant[..., None, None], identity, basis))

    def margin(self, v: Tensor) -> Tensor:
        p, root, case = self._solve(v)
        r, s, t = case.v.unbind(-1)
        corner = torch.hypot(r.clamp(min=0), s.clamp(min=0))
        curved = torch.minimum(torch.minimum(_gap(root), _length(root)), corner)
        quadrant = torch.minimum(torch.minimum(-r, -s), t.abs())
        margin = torch.where(case.quadrant, quadrant, curved)
        margin = torch.where(case.inside, _depth(case.v), margin)
        return torch.where(case.polar, _depth(_mirror(case.v)), margin) * case.scale + (p - p).sum(-1)

    def _solve(self, v: Tensor) -> tuple[Tensor, _Root, _Case]:
        safe, blot = finite_rows(v)
        scale = safe.abs().amax(-1)
        unit = safe / torch.where(scale > 0, scale, 1.0).unsqueeze(-1)
        r, s, t = unit.unbind(-1)
        quadrant = (r <= 0) & (s <= 0)
        inside = (s > 0) & (s * torch.exp(r / s) <= t)
        polar = (r > 0) & (r * torch.exp(s / r - 1) <= -t)
        root = _root(torch.where(quadrant, 1.0, r), torch.where(quadrant, 1.0, s), t, ~(quadrant | inside | polar))
        p = torch.stack((root.a * root.rho, root.a, root.rise), -1) * torch.where(polar, 0.0, scale).unsqueeze(-1)
        face = torch.stack((v[..., 0], torch.zeros_like(r), v[..., 2].clamp(min=0)), -1)
        p = torch.where(inside.unsqueeze(-1), v, torch.where(quadrant.unsqueeze(-1), face, p))
        return p + blot, root, _Case(unit, scale, inside, polar, quadrant)


def _root(r: Tensor, s: Tensor, t: Tensor, wanted: Tensor) -> _Root:
    """Solve a e^rho - b e^-rho = t for rho where `wanted`; elsewhere something finite.

    a = ((rho - 1) r + s)/D and b = (r - rho s)/D with D = rho^2 - rho + 1, both positive between 1 - s/r and r/s (an end
    is infinite where r or s is not positive). Either end may be so near that only the distance d from it is a number, so
    the unknown is d, measured from the nearer end, and the coefficient that vanishes there is d m/D to full accuracy:

        from r/s:      m = s,  n = r,  theta = t/s,   x = rho  = nu - d        own = b, other = a
        from 1 - s/r:  m = r,  n = s,  theta = -t/r,  x = -rho = nu - 1 - d    own = a, other = b

    and in both cases, with nu = n/m,   own = m d/D,  other = m (D0 - nu d)/D,  D0 = nu^2 - nu + 1, and the equation is
    (other e^x - own e^-x)/m = theta. As a quadratic in e^x it has one positive root, whose logarithm gives

        0 = x - asinh(theta/(2 g)) + log(other/own)/2,   g = sqrt(own other)/m,

    decreasing in d, without overflow, and either nearly linear in d or nearly linear in log d. One fixed-point step from
    d = 0 is D0 e^x (e^x - theta), a good start in both cases; Newton's method inside a bracket does the rest.
    """
    lower = torch.where(r > 0, r.clamp(min=TINY), r)
    upper = torch.where(s > 0, s.clamp(min=TINY), s)
    ratio, inverse = lower / upper, upper / lower
    middle = torch.exp((ratio + 1 - inverse) * 0.5)
    width = ratio + inverse - 1
    centre = (ratio + 1 - inverse) * 0.5
    below_middle = lower * middle - upper / middle > 2 * t * (centre * (centre - 1) + 1) / width
    from_upper = (upper > 0) & ((lower <= 0) | ~below_middle)

    m, n = torch.where(from_upper, upper, lower), torch.where(from_upper, lower, upper)
    theta, nu = torch.where(from_upper, t, -t) / m, n / m
    x0 = torch.where(from_upper, nu, nu - 1)
    d0 = nu * (nu - 1) + 1
    least = torch.full_like(d0, 1e-300)
    most = torch.where(nu > 0, d0 / (2 * nu), FAR).clamp(max=FAR)
    start = torch.exp(x0.clamp(max=100))
    start = (d0 * start * (start - theta)).clamp(min=NEAR, max=1e290)
    d = torch.where(start < 1, start, torch.minimum(1 + 0.5 * torch.log(start), most))
    positive, magnitude, theta_square = theta >= 0, theta.abs(), theta * theta
    settled = (x0.abs() + 1) * 1e-15
    idle = ~wanted | (d <= NEAR)
    for _ in range(ITERATIONS):
        y = nu - d
        quadratic = y * (y - 1) + 1
        rest = torch.addcmul(d0, nu, d, value=-1)
        own, other = d / quadratic, rest / quadratic
        wide = torch.sqrt(torch.addcmul(theta_square, own, other, value=4))
        c = (magnitude + wide) * 0.5
        value = x0 - d + torch.log(torch.where(positive, other / c, c / own))
        tau = theta / wide
        slope = ((tau + 1) * nu / rest + (1 - tau) / d) * 0.5 + 1 + tau * (1 - 2 * y) / quadratic
        least, most = torch.where(value > 0, d, least), torch.where(value > 0, most, d)
        step = value / slope
        new = d + step
        done = (step.abs() <= 1e-8 * d) | (value.abs() <= settled)
        trusted = ((new > least) & (new < most)) | done
        d = torch.where(idle, d, torch.where(trusted, new, torch.sqrt(least) * torch.sqrt(most)))
        idle = idle | done | (d <= NEAR)
        if bool(idle.all()):
            break
    y = nu - d
    quadratic = y * (y - 1) + 1
    own, other = d / quadratic, torch.addcmul(d0, nu, d, value=-1) / quadratic
    product = own * other
    c = (magnitude + torch.sqrt(torch.addcmul(theta_square, product, product.new_tensor(4.0)))) * 0.5
    own, other, larger, smaller = own * m, other * m, c * m, product / c * m
    same = from_upper == positive
    return _Root(
        a=torch.where(from_upper, other, own),
        b=torch.where(from_upper, own, other),
        rho=torch.where(from_upper, y, 1 - y),
        rise=torch.where(same, larger, smaller),
        fall=torch.where(same, smaller, larger),
    )


def _gap(root: _Root) -> Tensor:
    """|v - p| on the curved boundary."""
    return torch.hypot(root.b * torch.hypot(torch.ones_like(root.rho), 1 - root.rho), root.fall)


def _length(root: _Root) -> Tensor:
    """|p| on the curved boundary."""
    return torch.hypot(root.a * torch.hypot(torch.ones_like(root.rho), root.rho), root.rise)


def _depth(v: Tensor) -> Tensor:
    """How far v in K is from the surface of K, within a small factor: the least of the distances along the axes and of
    the first-order one of the concave function s log(t/s) - r."""
    r, s, t = v.unbind(-1)
    slope = torch.log(t / s)
    along_r = s * slope - r
    first_order = along_r * torch.rsqrt(1 + (slope - 1).square() + (s / t).square())
    along_t = t - s * torch.exp(r / s)
    return torch.minimum(torch.minimum(first_order, along_t), s).clamp(min=0)


def _mirror(v: Tensor) -> Tensor:
    """The linear map that takes -K* to K, with singular values between 0.6 and 1.7."""
    r, s, t = v.unbind(-1)
    return torch.stack((s - r, r, -t), -1)


@lru_cache(maxsize=16)
def _constants(dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """The identity, and the mask of the first coordinate."""
    return torch.eye(3, dtype=dtype, device=device), torch.tensor([True, False, False], device=device)

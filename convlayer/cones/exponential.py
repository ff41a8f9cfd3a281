"""The exponential cone: a projection by one root of one variable, and its derivative in closed
form."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from convlayer.cones.cone import Cone, Spectrum, bend, finite_rows, rotate, split
from convlayer.cones.interior import Interior, minimise, rest_of, unit_scale

# A positive r or s below this share of |v| is rounded up, so that ratios and their squares stay
# finite.
TINY = 1e-100
# The least distance of the root from its anchor.
NEAR = 1e-290
# The greatest: e^rho and e^-rho are then beyond anything v can balance.
FAR = 2000.0
# Steps of plain Newton, which nearly always suffice.
SWEEPS = 10
# Steps of Newton in a bracket, at most.
ITERATIONS = 60


class _Root(NamedTuple):
    """p = a (rho, 1, e^rho) and v - p = b (1, 1 - rho, -e^-rho); all (*batch,)."""

    a: Tensor
    b: Tensor
    rho: Tensor
    rise: Tensor  # a e^rho
    fall: Tensor  # b e^-rho


class _Frame(NamedTuple):
    """The eigenvectors of DPi where p is along P(rho), and what they are made of; (*batch,) but for
    the basis."""

    basis: Tensor  # (9, *batch), by rows: columns along p, along v - p, and their cross product
    c: Tensor  # 1 and
    k: Tensor  # e^rho, divided by the greater
    ray_square: Tensor  # |P|^2 and
    normal_square: Tensor  # |N|^2, divided by its square


class _Case(NamedTuple):
    """Which formula holds where; all (*batch,), and exclusive."""

    v: tuple[Tensor, Tensor, Tensor]  # r, s, t divided by scale
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
    Derivative:  eigenvectors p, v - p and their cross product, with eigenvalues 1, 0 and 1/(1 + |v
                 - p| kappa), kappa the curvature of the surface: with P = (rho, 1, e^rho) and N =
                 (1, 1 - rho, -e^-rho) e^rho, |v - p| kappa = (b |P|^2)/(a |N|^2).
    Curvature:   `bend`, with k = e^rho |P|^3/|N|^3 the geodesic curvature of the rays P/|P| on the
                 sphere, whose arc length grows by |N|/|P|^2 with rho, as P x P' = N, against the
                 third eigenvector.
    Smoothed:    the barrier is f = -log(s log(t/s) - r) - log s - log t, see `_Inside`.
    At a kink:   the surfaces of K and -K*, and the faces of r <= 0, s <= 0. Within `tolerance` of
                 the first the derivative is I, of the second the projection onto the nearest ray,
                 of the quadrant diag(1, 1[s >= -tolerance], 1[t >= -tolerance]).
    Source:      the parametrisation is Friberg's (2023); the equation is solved here in its
                 logarithm, see `_root`.
    """

    name: ClassVar[str] = "exponential"
    dims: ClassVar[str] = "exp"
    place: ClassVar[int] = 4
    two_branched: ClassVar[bool] = False
    size: ClassVar[int] = 3  # type: ignore[misc]

    def inside(self) -> Tensor:
        return torch.tensor([-1.0, 1.0, 1.0], dtype=torch.float64)

    @property
    def signed(self) -> Sequence[int]:
        """s and t."""
        return 1, 2

    @classmethod
    def read(cls, count: int) -> Sequence[Cone]:
        return [cls()] * count

    def project(self, v: Tensor) -> Tensor:
        return self._solve(v)[0]

    def linearise(self, v: Tensor, tolerance: float = 0.0) -> tuple[Tensor, Spectrum]:
        p, root, case = self._solve(v)
        frame = _frame(root.rho)
        basis = frame.basis
        inside, leading, quadrant, (r, s, t) = case.inside, ~case.polar, case.quadrant, v.unbind(-1)
        if tolerance > 0:
            inside = inside | (_gap(root) * case.scale <= tolerance)
            leading = leading | inside | (_depth(s - r, r, -t) <= tolerance)
            quadrant = (v[..., :2] <= tolerance).all(-1) & ~inside
        free, bent = root.a * frame.normal_square, root.b * frame.ray_square
        middle = (free / (free + bent)).masked_fill(case.polar, 0.0).masked_fill(inside, 1.0)
        middle = torch.where(quadrant, (t >= -tolerance).to(v.dtype), middle)
        flat = inside | (quadrant & (s >= -tolerance))
        values = torch.stack((leading.to(v.dtype), flat.to(v.dtype), middle), -1)
        axes = quadrant.to(v.dtype)
        basis = basis * (1 - axes)
        basis[::4] += axes  # the identity on the quadrant
        return p, Spectrum(values, basis.movedim(0, -1).contiguous().unflatten(-1, (3, 3)))

    def curvature(self, v: Tensor, h: Tensor, g: Tensor) -> Tensor:
        p, root, case = self._solve(v)
        rho, frame = root.rho, _frame(root.rho)
        c, k, ray_square, normal_square = frame.c, frame.k, frame.ray_square, frame.normal_square
        cc, kk = c * c, k * k
        free, bent = root.a * normal_square, root.b * ray_square
        total = (free + bent) * torch.where(case.scale > 0, case.scale, 1.0)
        free, bent = free / (free + bent), bent / (free + bent)
        radial = bent * normal_square * c * ray_square.rsqrt() / total
        normal = -free * ray_square * k * normal_square.rsqrt() / total
        growth = 3 * (rho * cc + kk) / ray_square + 1  # of log k, in rho
        growth = growth - 3 * kk * (1 - rho + rho * rho) / normal_square
        geodesic = free * bent * growth * (ray_square * normal_square).sqrt() / total
        flat = case.inside | case.polar | case.quadrant
        parts = (part.masked_fill(flat, 0.0).unsqueeze(-1) for part in (radial, normal, geodesic))
        basis = frame.basis.movedim(0, -1).unflatten(-1, (3, 3))
        return rotate(basis, bend(rotate(basis.mT, h), rotate(basis.mT, g), *parts)) + (p - p)

    def smooth(self, v: Tensor, kappa: Tensor) -> tuple[Tensor, Tensor, Spectrum]:
        safe, blot = finite_rows(v)
        scale = unit_scale(safe, kappa)
        now = minimise(_Inside.near(safe / scale, self.project(safe / scale)), safe / scale)
        return now.point * scale + blot, now.polar * scale + blot, Spectrum(*rest_of(now))

    def margin(self, v: Tensor, p: Tensor) -> Tensor:
        case, _, _, _ = self._case(v)
        r, s, t = case.v
        unit = p / case.scale.masked_fill(case.scale == 0, 1.0).unsqueeze(-1)
        corner = torch.hypot(r.clamp(min=0), s.clamp(min=0))
        away = (torch.stack(case.v, -1) - unit).norm(dim=-1)
        curved = torch.minimum(torch.minimum(away, unit.norm(dim=-1)), corner)
        quadrant = torch.minimum(torch.minimum(-r, -s), t.abs())
        margin = torch.where(case.quadrant, quadrant, curved)
        margin = torch.where(case.inside, _depth(r, s, t), margin)
        return torch.where(case.polar, _depth(s - r, r, -t), margin) * case.scale + (p - p).sum(-1)

    def _case(self, v: Tensor) -> tuple[_Case, list[Tensor], Tensor, Tensor]:
        """Which of the cases each v is, its finite coordinates, where it is in K or the quadrant,
        and NaN where it is not finite."""
        r, s, t = v.unbind(-1)
        blot = r * 0 + s * 0 + t * 0  # NaN where v is not finite
        bad = blot != 0
        rows = [row.masked_fill(bad, 0.0) for row in (r, s, t)]
        scale = torch.maximum(torch.maximum(rows[0].abs(), rows[1].abs()), rows[2].abs())
        safe = scale.masked_fill(scale == 0, 1.0)
        r, s, t = (row / safe for row in rows)
        quadrant = (r <= 0) & (s <= 0)
        inside = (s > 0) & (s * torch.exp(r / s) <= t)
        polar = (r > 0) & (r * torch.exp(s / r - 1) <= -t)
        return _Case((r, s, t), scale, inside, polar, quadrant), rows, quadrant | inside, blot

    def _solve(self, v: Tensor) -> tuple[Tensor, _Root, _Case]:
        case, rows, closed, blot = self._case(v)
        (r, s, t), scale, polar, quadrant = case.v, case.scale, case.polar, case.quadrant
        root = _root(
            r.masked_fill(quadrant, 1.0), s.masked_fill(quadrant, 1.0), t, ~(closed | polar)
        )
        size = scale.masked_fill(polar, 0.0)
        p_r = torch.where(closed, rows[0], root.a * root.rho * size)
        p_s = torch.where(closed, rows[1].clamp(min=0), root.a * size)
        p_t = torch.where(closed, rows[2].clamp(min=0), root.rise * size)
        p = torch.stack((p_r + blot, p_s + blot, p_t + blot), -1)
        return p, root, case


def _root(r: Tensor, s: Tensor, t: Tensor, wanted: Tensor) -> _Root:
    """Solve a e^rho - b e^-rho = t for rho where `wanted`; elsewhere something finite.

    a = ((rho - 1) r + s)/D and b = (r - rho s)/D with D = rho^2 - rho + 1, both positive between 1
    - s/r and r/s (an end is infinite where r or s is not positive). Either end may be so near that
    only the distance d from it is a number, so the unknown is d, from the nearer end, and the
    coefficient that vanishes there is d m/D, accurately:

        from r/s:      m = s,  n = r,  theta = t/s,   x = rho  = nu - d        own = b, other = a
        from 1 - s/r:  m = r,  n = s,  theta = -t/r,  x = -rho = nu - 1 - d    own = a, other = b

    and in both cases, with nu = n/m,  own = m d/D,  other = m (D0 - nu d)/D,  D0 = nu^2 - nu + 1, and the equation is
    (other e^x - own e^-x)/m = theta. As a quadratic in e^x it has one positive root, whose logarithm gives

        0 = x - asinh(theta/(2 g)) + log(other/own)/2,   g = sqrt(own other)/m,

    decreasing in d, without overflow, and nearly linear either in d or in log d. One fixed-point
    step from d = 0 is D0 e^x (e^x - theta), a good start in both cases; Newton's method inside a
    bracket does the rest.
    """
    lower = torch.where(r > 0, r.clamp(min=TINY), r)
    upper = torch.where(s > 0, s.clamp(min=TINY), s)
    ratio, inverse = lower / upper, upper / lower
    centre, width = (ratio - inverse + 1) * 0.5, ratio + inverse - 1  # of the interval
    middle = torch.exp(centre)
    below_middle = lower * middle - upper / middle > 2 * t * (centre * (centre - 1) + 1) / width
    from_upper = (upper > 0) & ((lower <= 0) | ~below_middle)

    m, n = torch.where(from_upper, upper, lower), torch.where(from_upper, lower, upper)
    theta, nu = torch.where(from_upper, t, -t) / m, n / m
    x0 = torch.where(from_upper, nu, nu - 1)
    d0 = nu * (nu - 1) + 1
    most = torch.where(nu > 0, d0 / (2 * nu), FAR).clamp(max=FAR)
    start = torch.exp(x0.clamp(max=100))
    start = (d0 * start * (start - theta)).clamp(min=NEAR, max=1e290)
    d = torch.where(start < 1, start, torch.minimum(1 + 0.5 * torch.log(start), most))
    positive, magnitude, theta_square = theta >= 0, theta.abs(), theta * theta

    def newton(d: Tensor) -> tuple[Tensor, Tensor]:
        """The equation at d, and Newton's step there."""
        y = nu - d
        quadratic = y * (y - 1) + 1
        rest = torch.addcmul(d0, nu, d, value=-1)
        own, other = d / quadratic, rest / quadratic
        wide = torch.sqrt(torch.addcmul(theta_square, own, other, value=4))
        c = (magnitude + wide) * 0.5
        value = x0 - d + torch.log(torch.where(positive, other / c, c / own))
        tau = theta / wide
        slope = ((tau + 1) * nu / rest + (1 - tau) / d) * 0.5 + 1 + tau * (1 - 2 * y) / quadratic
        return value, value / slope

    first, idle = d, ~wanted | (d <= NEAR)
    # the rounding of the equation
    settled = ((x0.abs() + d + 1) * 4e-15).masked_fill(idle, torch.inf)
    for sweep in range(SWEEPS):
        value, step = newton(d)
        d = torch.minimum(torch.maximum(d + step, d * 0.0625), most)
        if sweep > 2 and bool(((step.abs() <= 1e-7 * d) | (value.abs() <= settled)).all()):
            break
    else:
        d = _bracketed(newton, first, most, settled, idle)
    d = torch.where(idle, first, d)
    y = nu - d
    quadratic = y * (y - 1) + 1
    own, other = d / quadratic, torch.addcmul(d0, nu, d, value=-1) / quadratic
    product = own * other
    c = (magnitude + torch.sqrt(torch.add(theta_square, product, alpha=4))) * 0.5
    own, other, larger, smaller = own * m, other * m, c * m, product / c * m
    same = from_upper == positive
    return _Root(
        a=torch.where(from_upper, other, own),
        b=torch.where(from_upper, own, other),
        rho=torch.where(from_upper, y, 1 - y),
        rise=torch.where(same, larger, smaller),
        fall=torch.where(same, smaller, larger),
    )


def _frame(rho: Tensor) -> _Frame:
    e, one, large = torch.exp(-rho.abs()), torch.ones_like(rho), rho > 0
    c, k = torch.where(large, e, one), torch.where(large, one, e)
    cc, kk, fall = c * c, k * k, 1 - rho
    ray_square = torch.addcmul(kk, torch.addcmul(one, rho, rho), cc)
    normal_square = torch.addcmul(cc, torch.addcmul(one, fall, fall), kk)
    ray, normal = torch.rsqrt(ray_square), torch.rsqrt(normal_square)
    both, ray_c, normal_k = ray * normal, ray * c, normal * k
    columns = (
        (rho * ray_c, normal_k, -both * torch.addcmul(cc, kk, fall)),
        (ray_c, normal_k * fall, both * torch.addcmul(kk, rho, cc)),
        (k * ray, -c * normal, -both * e * torch.addcmul(one, rho, fall, value=-1)),
    )
    return _Frame(
        torch.stack([entry for row in columns for entry in row]), c, k, ray_square, normal_square
    )


class _Inside(Interior):
    """(rho s - psi, s, t) with rho = log(t/s): psi is how far above the surface it is, along r. f =
    -log psi - log s - log t.

    g = (-1, rho - 1, e^-rho) is the gradient of psi, along -N(rho), and -s h h' its second
    derivative, h = (0, 1/s, -1/t): f'' = (g/psi)(g/psi)' + (s/psi) h h' + diag(0, 1/s^2, 1/t^2).
    The frame is (N, N x P, P), and the axes where psi is larger than what it is a difference of.
    """

    def __init__(self, psi: Tensor, s: Tensor, t: Tensor) -> None:
        self.psi, self.s, self.t = psi, s, t
        rho, zero, one = torch.log(t / s), torch.zeros_like(s), torch.ones_like(s)
        surface = _frame(rho)
        ray, normal, across = surface.basis.unflatten(0, (3, 3)).unbind(1)  # (3, *batch) each
        deep = (psi > s * (1 + (rho - 1).abs())).unsqueeze(-1)
        axes = torch.eye(3, dtype=s.dtype, device=s.device)
        self.frame = torch.where(
            deep.unsqueeze(-1), axes, torch.stack((normal, across, ray), -1).movedim(0, -2)
        )
        bend = (
            normal[1] / s - normal[2] / t,
            (surface.ray_square / surface.normal_square).sqrt() / s,
        )
        self.g = torch.where(
            deep,
            torch.stack((-one, rho - 1, s / t), -1),
            torch.stack((-surface.normal_square.sqrt() / surface.k, zero, zero), -1),
        )
        self.h = torch.where(
            deep, torch.stack((zero, 1 / s, -1 / t), -1), torch.stack((*bend, zero), -1)
        )
        rows = (
            self.g / psi.unsqueeze(-1),
            self.h * (s / psi).sqrt().unsqueeze(-1),
            self.frame[..., 1, :] / s.unsqueeze(-1),
            self.frame[..., 2, :] / t.unsqueeze(-1),
        )
        self.factor = torch.stack(rows, -2)
        self.point = torch.stack((rho * s - psi, s, t), -1)
        self.polar = torch.stack((-1 / psi, (rho - 1) / psi + 1 / s, s / t / psi + 1 / t), -1)

    @classmethod
    def near(cls, v: Tensor, p: Tensor) -> _Inside:
        """Near p = Pi(v): s and t are raised by about what they gain, and psi is the best for
        them."""
        raised = p[..., 1:].clamp(min=0) + 1 / (1 + (p - v).norm(dim=-1, keepdim=True))
        s, t = raised.unbind(-1)
        return cls(split(s * torch.log(t / s) - v[..., 0], torch.ones_like(s))[0], s, t)

    def moved(self, c: Tensor, curved: Tensor) -> _Inside:
        step_s, step_t = rotate(self.frame, c)[..., 1:].unbind(-1)
        s, t = self.s + step_s, self.t + step_t
        turn = -(self.h * c).sum(-1) * self.s / s  # of t/s, relative
        excess = torch.where(curved, s * (turn - torch.log1p(turn)), 0.0)
        return _Inside(self.psi + (self.g * c).sum(-1) - excess, s, t)


def _bracketed(
    newton: Callable[[Tensor], tuple[Tensor, Tensor]],
    d: Tensor,
    most: Tensor,
    settled: Tensor,
    idle: Tensor,
) -> Tensor:
    """Newton's method where it stays inside a bracket, else bisection of log d."""
    least = torch.full_like(d, 1e-300)
    for _ in range(ITERATIONS):
        value, step = newton(d)
        least, most = torch.where(value > 0, d, least), torch.where(value > 0, most, d)
        new = d + step
        done = (step.abs() <= 1e-7 * d) | (value.abs() <= settled)
        trusted = ((new > least) & (new < most)) | done
        d = torch.where(idle, d, torch.where(trusted, new, torch.sqrt(least) * torch.sqrt(most)))
        idle = idle | done | (d <= NEAR)
        if bool(idle.all()):
            break
    return d


def _gap(root: _Root) -> Tensor:
    """|v - p| on the curved boundary."""
    return torch.hypot(root.b * torch.hypot(torch.ones_like(root.rho), 1 - root.rho), root.fall)


def _depth(r: Tensor, s: Tensor, t: Tensor) -> Tensor:
    """How far a point of K is from the surface of K, within a small factor: the least of two
    distances along axes and the first-order one of the concave function s log(t/s) - r. At (s - r,
    r, -t), a map with singular values between 0.6 and 1.7, it is that of a point of -K* from the
    surface of -K*."""
    slope = torch.log(t / s)
    along_r = s * slope - r
    first_order = along_r * torch.rsqrt(1 + (slope - 1).square() + (s / t).square())
    along_t = t - s * torch.exp(r / s)
    return torch.minimum(torch.minimum(first_order, along_t), s).clamp(min=0)

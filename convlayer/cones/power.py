"""The power cone: a projection by one root of one variable, and its derivative in closed form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from convlayer.cones.cone import Cone, Spectrum, bend, distinct, finite_rows, rotate, split
from convlayer.cones.interior import Interior, minimise, rest_of, unit_scale
from convlayer.memo import constants

# |z| below this share of |v| is 0.
FLAT = 1e-60
# The least distance of the root from its anchor, relative to |z|.
NEAR = 1e-160
# Steps of Newton's method in its bracket, at most.
ITERATIONS = 100


class _Root(NamedTuple):
    """p = (x, y, sign(z) w) and q = |z| - w; all (*batch,)."""

    x: Tensor
    y: Tensor
    w: Tensor
    q: Tensor


class _Frame(NamedTuple):
    """The eigenvectors of DPi where p is along (x, y, +-w), and what they are made of; (*batch,)
    but for the basis."""

    basis: Tensor  # (*batch, 3, 3): columns along p, along v - p, and their cross product
    point: tuple[Tensor, Tensor, Tensor]  # (x, y, w) of p, divided by the greater of x and y
    slope: Tensor  # x y/w, divided by it
    ray_square: Tensor  # |p|^2, divided by its square
    normal_square: Tensor  # |M|^2, divided by its square and by w^2


class _Case(NamedTuple):
    """Which formula holds where; all but v (*batch,), and exclusive."""

    v: Tensor  # (*batch, 3), divided by scale
    scale: Tensor
    inside: Tensor  # v in K
    polar: Tensor  # v in -K*
    flat: Tensor  # z = 0


@dataclass(frozen=True)
class Power(Cone):
    """K = {(x, y, z) : x, y >= 0, x^alpha y^beta >= |z|}, beta = 1 - alpha; one alpha for each of k
    stacked blocks.

    Shapes:      v (*batch, 3) for one alpha, (*batch, k, 3) for k of them.
    Solution:    v in K: v.  v in -K*, that is x, y <= 0 and (-x/alpha)^alpha (-y/beta)^beta >= |z|: 0.
                 z = 0: (max(x, 0), max(y, 0), 0).  Else, with w the height of the projection and q = |z| - w,
                 p_x (p_x - x) = alpha w q,  p_y (p_y - y) = beta w q,  and w solves p_x^alpha p_y^beta = w.
    Derivative:  eigenvectors p, v - p and their cross product, with eigenvalues 1, 0 and 1/(1 + |v - p| kappa), kappa
                 the curvature of the surface:  |v - p| kappa = alpha beta q w |p|^2 / |M|^2,
                 M = (alpha w p_y, beta w p_x, p_x p_y), which is p_x p_y times the gradient of the surface up to signs.
                 At z = 0 with x < 0 < y: diag(0, 1, c), c = 1, 0 or y/(y - 2x) as alpha is below, above or at 1/2.
    Curvature:   `bend`, with k = alpha beta p_x p_y w |p|^3/|M|^3 the geodesic curvature of the
                 rays p/|p| on the sphere, p/w = (e^(beta tau), e^(-alpha tau), +-1), whose arc
                 length grows by |M|/|p|^2 with tau, along the third eigenvector if z > 0. Taken as
                 0 at z = 0.
    Smoothed:    the barrier is f = -log(x^2alpha y^2beta - z^2) - beta log x - alpha log y, see
                 `_Inside`.
    At a kink:   the surfaces of K and -K*. Within `tolerance` of the first the derivative is I, of
                 the second the projection onto the nearest ray.
    Source:      the equation in w is Hien's (2015), solved here in its logarithm from the nearer
                 end, see `_root`.
    """

    alphas: tuple[float, ...]
    name: ClassVar[str] = "power"
    dims: ClassVar[str] = "p3d"
    place: ClassVar[int] = 5
    two_branched: ClassVar[bool] = False
    size: ClassVar[int] = 3  # type: ignore[misc]

    def __init__(self, alphas: float | Sequence[float]) -> None:
        chosen = (
            (float(alphas),)
            if isinstance(alphas, (int, float))
            else tuple(float(alpha) for alpha in alphas)
        )
        if not chosen or not all(0 < alpha < 1 for alpha in chosen):
            raise ValueError(
                f"A power cone was given alpha = {alphas}; expected numbers strictly between 0 and 1."
            )
        object.__setattr__(self, "alphas", chosen)

    def inside(self) -> Tensor:
        return torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64)

    @property
    def signed(self) -> Sequence[int]:
        """x and y."""
        return 0, 1

    @classmethod
    def read(cls, count: Sequence[float]) -> Sequence[Cone]:
        return [cls(alpha) for alpha in count]

    @classmethod
    def describe(cls, cones: Sequence[Cone]) -> str:
        return f"{len(cones)} power (alpha = {distinct(cone.parameter for cone in cones)})"

    def project(self, v: Tensor) -> Tensor:
        return self._solve(v)[0]

    def linearise(self, v: Tensor, tolerance: float = 0.0) -> tuple[Tensor, Spectrum]:
        p, root, case = self._solve(v)
        alpha, beta = self._exponents(v)
        sign = _sign(case.v)
        frame = _frame(root.x, root.y, root.w, sign, alpha, beta)
        middle = 1 / (
            1 + alpha * beta * (root.q / root.w) * (frame.ray_square / frame.normal_square)
        )
        inside, leading = case.inside, ~case.polar
        if tolerance > 0:
            inside = inside | ((case.v - _point(root, sign)).norm(dim=-1) * case.scale <= tolerance)
            leading = leading | inside | (self._polar_depth(case.v) * case.scale <= tolerance)
        middle = torch.where(inside, 1.0, middle * ~case.polar)
        values = torch.stack((leading.to(v.dtype), inside.to(v.dtype), middle), -1)
        values = torch.where(case.flat.unsqueeze(-1), self._flat_values(case, tolerance), values)
        identity = _identity(v.dtype, v.device)
        return p, Spectrum(values, torch.where(case.flat[..., None, None], identity, frame.basis))

    def curvature(self, v: Tensor, h: Tensor, g: Tensor) -> Tensor:
        p, root, case = self._solve(v)
        alpha, beta = self._exponents(v)
        sign = _sign(case.v)
        basis, (x, y, w), slope, ray_square, normal_square = _frame(
            root.x, root.y, root.w, sign, alpha, beta
        )
        xx, yy, ss = x * x, y * y, slope * slope
        free, bent = root.w * normal_square, alpha * beta * root.q * ray_square
        total = (free + bent) * torch.where(case.scale > 0, case.scale, 1.0)
        free, bent = free / (free + bent), bent / (free + bent)
        radial = bent * w * normal_square * ray_square.rsqrt() / total
        normal = -free * alpha * beta * ray_square * slope * normal_square.rsqrt() / total
        growth = 3 * (beta * xx - alpha * yy) / ray_square + (beta - alpha)  # of log k, in tau
        growth = growth - 3 * (beta**3 * xx - alpha**3 * yy + (beta - alpha) * ss) / normal_square
        geodesic = -sign * free * bent * growth * (ray_square * normal_square).sqrt() / total
        flat = case.inside | case.polar | case.flat
        parts = (torch.where(flat, 0.0, part).unsqueeze(-1) for part in (radial, normal, geodesic))
        return rotate(basis, bend(rotate(basis.mT, h), rotate(basis.mT, g), *parts)) + (p - p)

    def smooth(self, v: Tensor, kappa: Tensor) -> tuple[Tensor, Tensor, Spectrum]:
        safe, blot = finite_rows(v)
        scale, sign = unit_scale(safe, kappa), torch.ones_like(v)
        sign[..., 2] = _sign(safe)
        unit = safe * sign / scale
        now = minimise(_Inside.near(unit, self.project(unit), *self._exponents(v)), unit)
        values, basis = rest_of(now)
        p, r = (x * sign * scale + blot for x in (now.point, now.polar))
        return p, r, Spectrum(values, basis * sign.unsqueeze(-1))

    def margin(self, v: Tensor, p: Tensor) -> Tensor:
        case, _ = self._case(v)
        x, y, _ = case.v.unbind(-1)
        unit = p / torch.where(case.scale > 0, case.scale, 1.0).unsqueeze(-1)
        curved = torch.minimum((case.v - unit).norm(dim=-1), unit.norm(dim=-1))
        flat = torch.where(
            (x < 0) & (y < 0), self._polar_depth(case.v), torch.minimum(x.abs(), y.abs())
        )
        margin = torch.where(case.flat, flat, curved)
        margin = torch.where(case.inside, self._depth(case.v), margin)
        return torch.where(case.polar, self._polar_depth(case.v), margin) * case.scale

    @property
    def parameter(self) -> float | None:
        return self.alphas[0] if len(self.alphas) == 1 else None

    @property
    def group(self) -> object:
        return self.name

    @classmethod
    def merge(cls, cones: Sequence[Cone]) -> tuple[Cone, int]:
        alphas = [alpha for cone in cones if isinstance(cone, Power) for alpha in cone.alphas]
        return cls(alphas), len(alphas)

    def apart(self) -> Sequence[Cone]:
        return [Power(alpha) for alpha in self.alphas]

    def _exponents(self, v: Tensor) -> tuple[Tensor, Tensor]:
        return _exponents(self.alphas, v.dtype, v.device)

    def _case(self, v: Tensor) -> tuple[_Case, Tensor]:
        """Which of the cases each v is, and NaN where it is not finite."""
        safe, blot = finite_rows(v)
        alpha, beta = self._exponents(v)
        scale = safe.abs().amax(-1)
        unit = safe / torch.where(scale > 0, scale, 1.0).unsqueeze(-1)
        x, y, z = unit.unbind(-1)
        height = z.abs()
        inside = (x >= 0) & (y >= 0) & (x**alpha * y**beta >= height)
        polar = (
            (x <= 0) & (y <= 0) & ((-x / alpha) ** alpha * (-y / beta) ** beta >= height) & ~inside
        )
        flat = (height <= FLAT) & ~inside
        return _Case(unit, scale, inside, polar & ~flat, flat), blot

    def _solve(self, v: Tensor) -> tuple[Tensor, _Root, _Case]:
        case, blot = self._case(v)
        alpha, beta = self._exponents(v)
        x, y, z = case.v.unbind(-1)
        height, scale, inside, polar, flat = z.abs(), case.scale, case.inside, case.polar, case.flat
        wanted = ~(inside | polar | flat)
        stand_ins = (
            torch.where(wanted, x, 0.0),
            torch.where(wanted, y, 0.0),
            torch.where(wanted, height, 1.0),
        )
        root = _root(*stand_ins, alpha, beta, wanted)
        polar_root = _Root(alpha / -x, beta / -y, 1 / height, height)
        root = _Root(
            *(torch.where(polar & (x < 0) & (y < 0), b, a) for a, b in zip(root, polar_root))
        )
        p = _point(root, z.sign()) * torch.where(polar, 0.0, scale).unsqueeze(-1)
        face = torch.cat((v[..., :2].clamp(min=0), torch.zeros_like(v[..., 2:])), -1)
        p = torch.where(inside.unsqueeze(-1), v, torch.where(flat.unsqueeze(-1), face, p))
        return p + blot, root, case

    def _flat_values(self, case: _Case, tolerance: float) -> Tensor:
        alpha, beta = self._exponents(case.v)
        x, y, _ = (case.v * case.scale.unsqueeze(-1)).unbind(-1)
        free_x, free_y = x >= -tolerance, y >= -tolerance
        own = torch.where(free_x, beta, alpha)  # the exponent of the negative coordinate
        even = torch.maximum(x, y).clamp(min=0)
        even = even / (even - 2 * torch.minimum(x, y)).clamp(min=1e-300)
        crossing = torch.where(own < 0.5, 1.0, torch.where(own > 0.5, 0.0, even))
        height = torch.where(free_x & free_y, 1.0, torch.where(free_x | free_y, crossing, 0.0))
        return torch.stack((free_x.to(x.dtype), free_y.to(x.dtype), height), -1)

    def _depth(self, v: Tensor) -> Tensor:
        """How far v in K is from the surface of K, within a factor of sqrt 3: the least of the
        distances along the axes, since K is convex and so holds the octahedron they span."""
        alpha, beta = self._exponents(v)
        x, y, height = v[..., 0], v[..., 1], v[..., 2].abs()
        along_x = x - (height / y**beta) ** (1 / alpha)
        along_y = y - (height / x**alpha) ** (1 / beta)
        least = torch.minimum(torch.minimum(along_x, along_y), x**alpha * y**beta - height)
        return torch.where((x > 0) & (y > 0), least, 0.0).clamp(min=0)

    def _polar_depth(self, v: Tensor) -> Tensor:
        """How far v in -K* is from the surface of -K*, likewise: (-x/alpha, -y/beta, z) is then in
        K."""
        alpha, beta = self._exponents(v)
        x, y, height = -v[..., 0], -v[..., 1], v[..., 2].abs()
        along_x = x - alpha * (height / (y / beta) ** beta) ** (1 / alpha)
        along_y = y - beta * (height / (x / alpha) ** alpha) ** (1 / beta)
        least = torch.minimum(
            torch.minimum(along_x, along_y), (x / alpha) ** alpha * (y / beta) ** beta - height
        )
        return torch.where((x > 0) & (y > 0), least, 0.0).clamp(min=0)


def _root(
    x: Tensor, y: Tensor, height: Tensor, alpha: Tensor, beta: Tensor, wanted: Tensor
) -> _Root:
    """Solve  f = alpha log p_x + beta log p_y - log w = 0  for w in (0, height), where `wanted`.

    f falls from w = 0, where it is negative only on -K*, to w = height, where it is positive only
    on K. Either end may be so near that only the distance d from it is a number, so the unknown is
    d, from the nearer end. f is nearly linear in log d where it is infinite at that end, and else
    in d; Newton's method uses that, inside a bracket.
    """

    def surface(d: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """p_x and p_y, and d (df/dd) without the term of log w."""
        area = d * (height - d)
        wide_x, wide_y = torch.sqrt(x * x + 4 * alpha * area), torch.sqrt(y * y + 4 * beta * area)
        p_x = torch.where(x >= 0, (x + wide_x) * 0.5, 2 * alpha * area / (wide_x - x))
        p_y = torch.where(y >= 0, (y + wide_y) * 0.5, 2 * beta * area / (wide_y - y))
        growth = d * (height - 2 * d)
        return p_x, p_y, growth * (alpha * alpha / (p_x * wide_x) + beta * beta / (p_y * wide_y))

    half = height * 0.5
    p_x, p_y, _ = surface(half)
    # then the unknown is q, else w
    from_top = alpha * torch.log(p_x) + beta * torch.log(p_y) > torch.log(half)
    # f is finite at the anchor
    bounded = torch.where(from_top, (x > 0) & (y > 0), (x < 0) & (y < 0))

    # at a finite end:  |f(0)| = sum_i weight_i log((1 + sqrt(1 + 4 area/size_i))/2) - log(1 - d/height)
    width_x = torch.where(from_top, x, x / alpha).abs()
    width_y = torch.where(from_top, y, y / beta).abs()
    limit = (torch.log(height) - alpha * torch.log(width_x) - beta * torch.log(width_y)).clamp(
        min=0
    )
    start = -torch.expm1(-limit) * height
    for weight, u in ((alpha, x), (beta, y)):
        ratio = (limit / weight).clamp(max=300)
        start = torch.minimum(
            start, u * u / weight * torch.exp(ratio) * torch.expm1(ratio) / height
        )
    least = height * NEAR
    most = half
    d = torch.where(bounded, torch.minimum(start, half), half * 0.5).clamp(min=least)
    floor, idle = least * 2, ~wanted
    sign = torch.where(from_top, -1.0, 1.0)  # f falls in w and rises in q
    p_x, p_y, _ = surface(d)
    logs = (
        alpha * p_x.log().abs()
        + beta * p_y.log().abs()
        + torch.where(from_top, height, d).log().abs()
    )
    settled = 2e-15 * (1 + logs)  # the rounding of f
    for _ in range(ITERATIONS):
        p_x, p_y, growth = surface(d)
        rest = height - d
        value = (
            alpha * torch.log(p_x)
            + beta * torch.log(p_y)
            - torch.log(torch.where(from_top, rest, d))
        )
        value = value * sign
        slope = growth * sign - torch.where(from_top, d / rest, 1.0)  # of value, in log d: negative
        least, most = torch.where(value > 0, d, least), torch.where(value > 0, most, d)
        step = -value / slope
        new = torch.where(bounded, d + d * step, d * torch.exp(step.clamp(-400, 400)))
        noise = value.abs() <= settled
        # next to a finite end the slope vanishes with d
        new = torch.where(noise & ~(step.abs() <= 1e-3), d, new)
        done = (step.abs() <= 1e-8) | noise
        trusted = ((new > least) & (new < most)) | done
        d = torch.where(idle, d, torch.where(trusted, new, torch.sqrt(least) * torch.sqrt(most)))
        idle = idle | done | (d <= floor)
        if bool(idle.all()):
            break
    p_x, p_y, _ = surface(d)
    rest = height - d
    return _Root(p_x, p_y, torch.where(from_top, rest, d), torch.where(from_top, d, rest))


class _Inside(Interior):
    """(x, y, z) by its distances down and up, w - z and w + z, from the surface w = x^alpha y^beta.

    f = -log(w - z) - log(w + z) - beta log x - alpha log y. g = (alpha w/x, beta w/y, -1) is the
    gradient of w - z, along -M at (x, y, w), and -alpha beta w h h' the second derivative of w, h =
    (1/x, -1/y, 0): f'' is a sum of squares. The frame is (M, M x P, P) there.
    """

    def __init__(
        self, x: Tensor, y: Tensor, z: Tensor, down: Tensor, alpha: Tensor, beta: Tensor
    ) -> None:
        self.x, self.y, self.alpha, self.beta = x, y, alpha, beta
        self.w = w = _surface(x, y, alpha, beta)
        near = down < 0.5 * w  # of z and w - z, the larger is taken from the other
        self.z, self.down = torch.where(near, w - down, z), torch.where(near, down, w - z)
        up, zero, one = w + self.z, torch.zeros_like(w), torch.ones_like(w)
        surface = _frame(x, y, w, one, alpha, beta)
        ray, normal, across = surface.basis.unbind(-1)
        self.frame = torch.stack((normal, across, ray), -1)
        bend = (
            normal[..., 0] / x - normal[..., 1] / y,
            (surface.ray_square / surface.normal_square).sqrt() / w,
        )
        self.g = torch.stack((-surface.normal_square.sqrt() / surface.slope, zero, zero), -1)
        self.h = torch.stack((*bend, zero), -1)
        both = w * (1 / self.down + 1 / up)
        other = torch.stack((alpha * w / x, beta * w / y, one), -1)  # the gradient of w + z
        rows = (
            self.g / self.down.unsqueeze(-1),
            rotate(self.frame.mT, other) / up.unsqueeze(-1),
            self.h * (alpha * beta * both).sqrt().unsqueeze(-1),
            self.frame[..., 0, :] * (beta.sqrt() / x).unsqueeze(-1),
            self.frame[..., 1, :] * (alpha.sqrt() / y).unsqueeze(-1),
        )
        self.factor = torch.stack(rows, -2)
        self.point = torch.stack((x, y, self.z), -1)
        height = -2 * self.z / self.down / up
        self.polar = torch.stack(((alpha * both + beta) / x, (beta * both + alpha) / y, height), -1)

    @classmethod
    def near(cls, v: Tensor, p: Tensor, alpha: Tensor, beta: Tensor) -> _Inside:
        """Near p = Pi(v): x and y are raised by about what they gain, and w - z is about the best
        for them."""
        raised = p[..., :2].clamp(min=0) + 1 / (1 + (p - v).norm(dim=-1, keepdim=True))
        x, y = raised.unbind(-1)
        w = _surface(x, y, alpha, beta)
        down = torch.minimum(split(w - v[..., 2], torch.ones_like(w))[0], w)
        return cls(x, y, w - down, down, alpha, beta)

    def moved(self, c: Tensor, curved: Tensor) -> _Inside:
        step_x, step_y, step_z = rotate(self.frame, c).unbind(-1)
        x, y, beta = self.x + step_x, self.y + step_y, self.beta
        turn = -(self.h * c).sum(-1) * self.x / x  # of y/x, relative
        excess = self.w * x / self.x * (beta * turn - torch.expm1(beta * torch.log1p(turn)))
        excess = torch.where(curved, excess, 0.0)
        return _Inside(
            x, y, self.z + step_z, self.down + (self.g * c).sum(-1) - excess, self.alpha, beta
        )


def _surface(x: Tensor, y: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    return torch.exp(alpha * torch.log(x) + beta * torch.log(y))


def _frame(x: Tensor, y: Tensor, w: Tensor, sign: Tensor, alpha: Tensor, beta: Tensor) -> _Frame:
    large, slope = torch.maximum(x, y), torch.minimum(x, y) / w
    x, y, w = x / large, y / large, w / large
    ray, normal = (
        torch.stack((x, y, sign * w), -1),
        torch.stack((-alpha * y, -beta * x, sign * slope), -1),
    )
    ray_square, normal_square = ray.square().sum(-1), normal.square().sum(-1)
    ray, normal = (
        ray * ray_square.rsqrt().unsqueeze(-1),
        normal * normal_square.rsqrt().unsqueeze(-1),
    )
    basis = torch.stack((ray, normal, torch.linalg.cross(ray, normal)), -1)
    return _Frame(basis, (x, y, w), slope, ray_square, normal_square)


def _sign(v: Tensor) -> Tensor:
    return torch.where(v[..., 2] < 0, -1.0, 1.0)


def _point(root: _Root, sign: Tensor) -> Tensor:
    return torch.stack((root.x, root.y, sign * root.w), -1)


@constants
def _exponents(
    alphas: tuple[float, ...], dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """alpha and 1 - alpha, () for one block and (k,) for k."""
    alpha = torch.tensor(alphas if len(alphas) > 1 else alphas[0], dtype=dtype).to(device)
    return alpha, 1 - alpha


@constants
def _identity(dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.eye(3, dtype=dtype, device=device)

"""Scalings of the exponential and the power cone, which are not symmetric: no one point scales s to
y and their barriers' gradients too.

With the barrier f* of the dual cone, its gradient s' = f*'(y), and the conjugate gradient y' at s,
that is f*'(-y') = -s,

    H = s s' / s'y + ds ds' / ds'dy + t a a',     ds = s + mu s',  dy = y + mu y',  mu = s'y / 3,  a normal to y and y',

takes y to s and dy to ds; t makes it mu f*'' where that is free to be. At the central path ds and
dy vanish, and H is mu f*'' corrected to take y to s. Either way H^-1 = W^-1 W^-T of a few vectors
in closed form. The corrector is of third order,

    H dy + ds = -(s + sigma mu f*' - 1/2 f*'''[dy^a, (f*'')^-1 ds^a]),

and the longest step is searched for. Shapes: a vector of a cone is (3, B, count) here, its
coordinates apart.

Sources:  Tuncel (2001); Dahl and Andersen (2022); Goulart and Chen (2024); Serrano (2015) for the
          conjugate gradient.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from convlayer.cones import Block, Cone, Exponential, Power
from convlayer.memo import constants
from convlayer.solvers.scalings import ConeScaling, Kind

# Within this relative distance from the central path the direction of its offset is noise.
CENTRAL = 1.5e-8
# So much of a step is tried in turn, until it stays inside.
SHORTER = (1.0, 0.98, 0.95, 0.9, 0.85, 0.8, 0.72, 0.64, 0.55, 0.45, 0.35, 0.25, 0.15, 0.07, 0.02, 0.003)  # fmt: skip
# From a start within a factor of two, so many of Newton's steps give the conjugate gradient.
NEWTON = 5


class Barrier(ABC):
    """The barrier f* of a dual cone at y (3, B, count): of degree three, logarithmically
    homogeneous, self-concordant."""

    gradient: Tensor  # (3, B, count)

    @abstractmethod
    def solve(self, x: Tensor) -> Tensor:
        """(f*'')^-1 x, without a difference of large terms."""

    @abstractmethod
    def third(self, a: Tensor, b: Tensor) -> Tensor:
        """f*'''[a, b]"""


class ThreefoldKind(Kind):
    """`count` cones of three rows whose scaling is by barriers."""

    symmetric: ClassVar[bool] = False

    def __init__(self, count: int) -> None:
        super().__init__(count, 3, 3)

    def inside(self, v: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        raise NotImplementedError(
            "A cone that is not symmetric has no eigenvalues; start from `unit`."
        )

    def at(self, s: Tensor, y: Tensor) -> ConeScaling:
        return ThreefoldScaling(self, s.movedim(-1, 0).contiguous(), y.movedim(-1, 0).contiguous())

    @abstractmethod
    def barrier(self, y: Tensor) -> Barrier:
        """f* at y"""

    @abstractmethod
    def conjugate_gradient(self, s: Tensor) -> Tensor:
        """y' with f*'(-y') = -s: the gradient of the conjugate barrier at s."""

    @abstractmethod
    def primal_margin(self, s: Tensor) -> Tensor:
        """Positive inside the cone, and nowhere else; NaN outside, perhaps."""

    @abstractmethod
    def dual_margin(self, y: Tensor) -> Tensor:
        """The same for the dual cone."""


class ThreefoldScaling(ConeScaling):
    """W^-T has the rows  y / sqrt(s'y),  dy / sqrt(ds'dy),  b / sqrt(t),  b normal to s and ds with a'b = 1."""

    def __init__(self, kind: ThreefoldKind, s: Tensor, y: Tensor) -> None:
        self.kind, self.s, self.y = kind, s, y
        self.barrier = barrier = kind.barrier(y)
        gap = _inner(s, y)
        mu, shadow = gap / 3, kind.conjugate_gradient(s)
        dual_mu = _inner(barrier.gradient, shadow) / 3
        offset = torch.addcmul(y, mu, shadow)
        away = mu * dual_mu - 1  # ds'dy = 3 mu away
        normal, other = _cross(y, shadow), _cross(s, barrier.gradient)
        length = (_inner(normal, barrier.solve(normal)) / mu).sqrt() / _inner(normal, other).abs()
        # (3, 3, B, count)
        rows = torch.stack([y / gap.sqrt(), offset / (3 * mu * away).sqrt(), other * length])
        central = ~((away > CENTRAL) & torch.isfinite(length))
        if not s.is_cpu or bool(central.any()):
            rows = torch.where(central, _by_dual_hessian(barrier, s, y, gap, mu), rows)
        self.matrix = rows.movedim((0, 1), (-2, -1)).contiguous()  # (B, count, 3, 3) W^-T
        self.scaled = torch.stack([gap.sqrt(), torch.zeros_like(gap), torch.zeros_like(gap)], -1)

    def weigh(self, x: Tensor) -> Tensor:
        return _apply(self.inverse().unsqueeze(1), x)

    def inverse(self) -> Tensor:
        if not hasattr(self, "_inverse"):
            self._inverse = self.matrix.mT @ self.matrix
        return self._inverse

    def reduce(self, x: Tensor) -> Tensor:
        return _apply(self.matrix.mT.unsqueeze(1), x)

    def enlarge(self, x: Tensor) -> Tensor:
        return _apply(self.matrix, x)

    def correction(
        self, d_s: Tensor, d_y: Tensor, ds: Tensor | None, dy: Tensor | None, sigma_mu: Tensor
    ) -> Tensor:
        if ds is None or dy is None:
            raise ValueError(
                "The third-order correction wants the predictor's step as it is, not scaled."
            )
        a, b = dy.movedim(-1, 0), self.barrier.solve(ds.movedim(-1, 0))
        shift = torch.addcmul(
            self.barrier.third(a, b) * -0.5, sigma_mu.squeeze(2), self.barrier.gradient
        )
        shift = torch.where(torch.isfinite(shift), shift, 0.0)
        return _apply(self.matrix.mT, shift.movedim(0, -1))

    def worst(self, d_s: Tensor, d_y: Tensor) -> None:
        return None

    def shorten(self, length: Tensor, ds: Tensor, dy: Tensor) -> Tensor:
        tried = length * _shorter(length.dtype, length.device)[:, None, None]  # (K, B, 1)
        s = torch.addcmul(self.s.unsqueeze(1), tried, ds.movedim(-1, 0).unsqueeze(1))
        y = torch.addcmul(self.y.unsqueeze(1), tried, dy.movedim(-1, 0).unsqueeze(1))
        good = (self.kind.primal_margin(s) > 0) & (self.kind.dual_margin(y) > 0)
        good = good.all(-1)  # (K, B)
        first = good.to(torch.uint8).argmax(0)
        chosen = tried.squeeze(2).gather(0, first.unsqueeze(0)).squeeze(0)
        return torch.where(good.any(0), chosen, 0.0).unsqueeze(1)


def _by_dual_hessian(barrier: Barrier, s: Tensor, y: Tensor, gap: Tensor, mu: Tensor) -> Tensor:
    """The rows of W^-T for  H^-1 = y y' / s'y + (I - y s'/s'y) (f*'')^-1 (I - s y'/s'y) / mu,  the secant update of mu f*''."""
    identity = torch.eye(3, dtype=s.dtype, device=s.device)[:, :, None, None]
    left = identity - s.unsqueeze(1) * (y / gap).unsqueeze(0)  # columns x: (3, 3, B, count)
    columns = [barrier.solve(left[:, k]) for k in range(3)]
    inner = torch.stack([x - y * (_inner(s, x) / gap) for x in columns], 1) / mu
    inner = (inner + inner.transpose(0, 1)) / 2
    rows = [y / gap.sqrt()]
    for _ in range(2):  # Cholesky's method with pivots, of a matrix of rank two
        diagonal = torch.stack([inner[k, k] for k in range(3)])
        pivot = diagonal.argmax(0)
        column = torch.gather(inner, 0, pivot.expand(1, 3, *pivot.shape)).squeeze(0)
        row = column / diagonal.amax(0).clamp(min=1e-300).sqrt()
        rows.append(row)
        inner = inner - row.unsqueeze(0) * row.unsqueeze(1)
    return torch.stack(rows)


class ExponentialKind(ThreefoldKind):
    """K = cl{(r, s, t) : s > 0, s e^(r/s) <= t}; f* = -log psi - log(-u) - log w, psi = v - u + u
    log(-u/w)."""

    cone: ClassVar[type[Cone]] = Exponential

    @classmethod
    def of(cls, blocks: Sequence[Block]) -> ExponentialKind:
        return cls(len(blocks))

    def unit(self, like: Tensor) -> Tensor:
        point = torch.tensor(
            [-1.051383945322714, 0.556409619469370, 1.258967884768947], dtype=like.dtype
        )
        return point.to(like.device).expand(self.count, 3)

    def barrier(self, y: Tensor) -> Barrier:
        return ExponentialBarrier(y)

    def conjugate_gradient(self, s: Tensor) -> Tensor:
        """With 1 + d the Wright omega function, d + log(1 + d) = log(t/s) - r/s: positive, and
        small near the boundary."""
        r, s, t = s.unbind()
        ratio = r / s
        depth = torch.log(t / s) - ratio
        d = depth - torch.log1p(depth / 2)
        for _ in range(NEWTON):
            d = torch.addcmul(d, 1 + d, depth - torch.log1p(d)) / (2 + d)
        first = 1 / (d * s)
        return torch.stack([first, torch.addcmul(-2 / s, first, 1 - ratio), -(1 + d) / (d * t)])

    def primal_margin(self, s: Tensor) -> Tensor:
        r, s, t = s.unbind()
        return torch.minimum(s, s * torch.log(t / s) - r)

    def dual_margin(self, y: Tensor) -> Tensor:
        u, v, w = y.unbind()
        return torch.minimum(-u, v - u + u * torch.log(-u / w))


class ExponentialBarrier(Barrier):
    """In p = a_u / u, q = a_w / w the second derivative of psi is u (p - q)^2."""

    def __init__(self, y: Tensor) -> None:
        u, v, w = y.unbind()
        self.u, self.w = u, w
        self.ratio = u / w
        self.log = torch.log(-self.ratio)
        self.psi = v - u + u * self.log
        self.over = 1 / self.psi
        self.gradient = torch.stack(
            [-self.log * self.over - 1 / u, -self.over, (u * self.over - 1) / w]
        )

    def value(self) -> Tensor:
        return -(self.psi.log() + (-self.u).log() + self.w.log())

    def solve(self, x: Tensor) -> Tensor:
        """v first: what is left of f*'' is I + (p - q)^2 (-u / psi)."""
        x_u, x_v, x_w = x.unbind()
        p = self.u * (x_u - self.log * x_v)
        q = self.w * torch.addcmul(x_w, self.ratio, x_v)
        share = (p - q) * (-self.u) / (self.psi - 2 * self.u)
        d_u, d_w = self.u * (p - share), self.w * (q + share)
        return torch.stack([d_u, self.psi.square() * x_v - self.log * d_u + self.ratio * d_w, d_w])

    def third(self, a: Tensor, b: Tensor) -> Tensor:
        (a_u, a_v, a_w), (b_u, b_v, b_w) = a.unbind(), b.unbind()
        u, w, ratio, log, over = self.u, self.w, self.ratio, self.log, self.over
        p_a, q_a, p_b, q_b = a_u / u, a_w / w, b_u / u, b_w / w
        r_a, r_b = (p_a - q_a) * over, (p_b - q_b) * over
        g_a, g_b = (log * a_u + a_v - ratio * a_w) * over, (log * b_u + b_v - ratio * b_w) * over
        along = u * r_a * r_b * self.psi - 2 * g_a * g_b  # times the gradient of psi, over psi
        bent = r_a * g_b + r_b * g_a
        pp, qq = p_a * p_b, q_a * q_b
        along = along * over
        first = (pp - qq) * over + bent + along * log - 2 * pp / u
        last = -ratio * ((p_a * q_b + q_a * p_b - 2 * qq) * over + bent + along) - 2 * qq / w
        return torch.stack([first, along, last])


class PowerKind(ThreefoldKind):
    """K = {(x, y, z) : x^a y^b >= |z|}, b = 1 - a; f* = -log psi - b log x - a log y, psi =
    (x/a)^2a (y/b)^2b - z^2."""

    cone: ClassVar[type[Cone]] = Power

    @classmethod
    def of(cls, blocks: Sequence[Block]) -> PowerKind:
        return cls([float(block.parameter or 0) for block in blocks])

    def __init__(self, alphas: Sequence[float]) -> None:
        super().__init__(len(alphas))
        self.alphas = tuple(alphas)

    def weights(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """(a, b), (count,) each."""
        return _weights(self.alphas, like.dtype, like.device)

    def unit(self, like: Tensor) -> Tensor:
        a, b = self.weights(like)
        return torch.stack([(1 + a).sqrt(), (1 + b).sqrt(), torch.zeros_like(a)], -1)

    def barrier(self, y: Tensor) -> Barrier:
        return PowerBarrier(y, *self.weights(y))

    def conjugate_gradient(self, s: Tensor) -> Tensor:
        """With t = y'_3 z,  2a log(t + (1+a)/a) + 2b log(t + (1+b)/b) - log(t (t + 2)) = log(x^2a y^2b / z^2): convex in log t,
        which is solved for; t is near 4 / expm1 of the right-hand side at both ends.
        """
        a, b = self.weights(s)
        x, y, z = s.unbind()
        log_phi = 2 * (a * torch.log(x) + b * torch.log(y))
        height = z.abs().clamp(min=1e-120 * torch.exp(log_phi / 2))
        depth = (log_phi - 2 * torch.log(height)).clamp(min=1e-300, max=600.0)
        at_a, at_b = (1 + a) / a, (1 + b) / b
        t = 4 / torch.expm1(depth)
        for _ in range(NEWTON):
            left, right = t + at_a, t + at_b
            value = (
                2 * (a * torch.log(left) + b * torch.log(right)) - torch.log(t * (t + 2)) - depth
            )
            slope = 2 * t * (a / left + b / right) - (2 * t + 2) / (t + 2)
            t = t * torch.exp((-value / slope).clamp(-3.0, 3.0))
        return torch.stack([-(a * t + 1 + a) / x, -(b * t + 1 + b) / y, z.sign() * t / height])

    def primal_margin(self, s: Tensor) -> Tensor:
        a, b = self.weights(s)
        x, y, z = s.unbind()
        return torch.minimum(
            torch.minimum(x, y), torch.exp(a * torch.log(x) + b * torch.log(y)) - z.abs()
        )

    def dual_margin(self, y: Tensor) -> Tensor:
        a, b = self.weights(y)
        return self.primal_margin(
            y / torch.stack([a, b, torch.ones_like(a)]).view(3, *[1] * (y.ndim - 2), -1)
        )


class PowerBarrier(Barrier):
    """In p = d_1 / x, q = d_2 / y the derivatives of phi = (x/a)^2a (y/b)^2b are phi times
    polynomials; r = phi / psi."""

    def __init__(self, point: Tensor, a: Tensor, b: Tensor) -> None:
        self.a, self.b = a, b
        self.x, self.y, self.z = x, y, z = point.unbind()
        root = torch.exp(a * torch.log(x / a) + b * torch.log(y / b))
        self.phi = root.square()
        self.psi = (root - z) * (root + z)
        self.over = 1 / self.psi
        self.r = r = self.phi * self.over
        self.gradient = torch.stack([-(2 * a * r + b) / x, -(2 * b * r + a) / y, 2 * z * self.over])

    def value(self) -> Tensor:
        return -(self.psi.log() + self.b * self.x.log() + self.a * self.y.log())

    def solve(self, x: Tensor) -> Tensor:
        """z first: what is left of f*'' is diag(2ar + b, 2br + a) - c (2a, 2b)(2a, 2b)', c = r (r -
        1)/(2r - 1)."""
        a, b, r, z, phi, psi = self.a, self.b, self.r, self.z, self.phi, self.psi
        x1, x2, x3 = x.unbind()
        both = 2 * phi - psi
        carried = 2 * z * phi / both * x3
        p, q = torch.addcmul(a * carried, self.x, x1), torch.addcmul(b * carried, self.y, x2)
        first, last, product = 2 * a * r + b, 2 * b * r + a, a * b
        total = (p * a / first + q * b / last) * 2
        # c / (1 - c (2a, 2b) D^-1 (2a, 2b)'), whose denominator tends to 0 near the boundary,
        # expanded
        factor = (
            r
            * (z.square() * self.over)
            * first
            * last
            / (8 * product * r.square() + (2 - 6 * product) * r - product)
        )
        total = 2 * total * factor
        p, q = torch.addcmul(p, a, total) / first, torch.addcmul(q, b, total) / last
        third = (x3 * psi.square() / 2 + 2 * z * phi * (a * p + b * q)) / both
        return torch.stack([self.x * p, self.y * q, third])

    def third(self, a: Tensor, b: Tensor) -> Tensor:
        (a1, a2, a3), (b1, b2, b3) = a.unbind(), b.unbind()
        left, right, r, over = 2 * self.a, 2 * self.b, self.r, self.over
        p_a, q_a, p_b, q_b = a1 / self.x, a2 / self.y, b1 / self.x, b2 / self.y
        l_a, l_b = left * p_a + right * q_a, left * p_b + right * q_b
        pp, qq = p_a * p_b, q_a * q_b
        second = l_a * l_b - left * pp - right * qq  # of phi, over phi
        # of psi, over psi
        g_a, g_b = (
            r * l_a - 2 * self.z * a3 * over,
            r * l_b - 2 * self.z * b3 * over,
        )
        along = r * second - 2 * a3 * b3 * over - 2 * g_a * g_b
        first = (
            left
            * r
            * (
                (l_a - p_a) * g_b
                + (l_b - p_b) * g_a
                + along
                - (second - l_a * p_b - l_b * p_a + 2 * pp)
            )
            - 2 * self.b * pp
        )
        last = (
            right
            * r
            * (
                (l_a - q_a) * g_b
                + (l_b - q_b) * g_a
                + along
                - (second - l_a * q_b - l_b * q_a + 2 * qq)
            )
            - 2 * self.a * qq
        )
        height = -2 * over * (a3 * g_b + b3 * g_a + self.z * along)
        return torch.stack([first / self.x, last / self.y, height])


def _apply(columns: Tensor, x: Tensor) -> Tensor:
    """x' columns, (..., 3, 3) and (..., 3): term by term, since batched products of so small
    matrices cost more."""
    found = torch.addcmul(x[..., :1] * columns[..., 0, :], x[..., 1:2], columns[..., 1, :])
    return found.addcmul_(x[..., 2:], columns[..., 2, :])


def _inner(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(0)


def _cross(a: Tensor, b: Tensor) -> Tensor:
    return torch.linalg.cross(a, b, dim=0)


@constants
def _shorter(dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(SHORTER, dtype=dtype).to(device)


@constants
def _weights(
    alphas: tuple[float, ...], dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    a = torch.tensor(alphas, dtype=dtype).to(device)
    return a, 1 - a

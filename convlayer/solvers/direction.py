"""A step of the interior point: where it starts, where it goes, and how far.

Mehrotra's predictor and corrector, by one LU of K a step; K is assembled in place. Equations and
letters are those of `interior_point`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from convlayer.autodiff.threads import one_thread
from convlayer.solvers.forms import EmbeddingResidual, Form, dot
from convlayer.solvers.product import Cones, ScaledPoint, Weight

# A slack above this no longer counts for the starting point's size.
LARGE = 1e3


@dataclass(frozen=True)
class _Shifts:
    """What is added to K's diagonal against singularity. It is proximal: it slows the last digits
    down, and moves no solution."""

    # In the orthant alone it is so small.
    orthant: float = 1e-10
    # With cones H^-1 is not diagonal, and blurs the rest of K: it is at least so much,
    cones: float = 1e-8
    # and at least this share of K's largest entry, since LU sees nothing of what is smaller.
    blur: float = 1e-16
    # The starting point is to be of moderate size.
    start: float = 1e-4


@dataclass(frozen=True)
class _Lengths:
    """How far a step goes."""

    # It goes at most this share of the way to the boundary.
    nearest: float = 0.99
    # After a step shorter than this, where cones are not symmetric,
    jammed: float = 0.1
    # sigma is at least so much, which brings the next one back to the central path.
    centring: float = 0.5


SHIFTS, LENGTHS = _Shifts(), _Lengths()


@dataclass(frozen=True, eq=False)
class _Place:
    """A point with its scaling H, and K factored there.

    The first `cone_rows` lie in the cones of the form; in the others, the orthant, H^-1 is y / s.
    """

    form: Form
    y: Tensor  # (B, l)
    s: Tensor  # (B, l)
    tau: Tensor  # (B, 1)
    kappa: Tensor  # (B, 1)
    orthant_y: Tensor  # (B, .) y of the orthant, then tau
    orthant_s: Tensor  # (B, .) s of the orthant, then kappa
    product: Tensor  # (B, l + 1) Y S
    point: ScaledPoint | None  # of the cones
    weight: Weight  # H^-1
    lu: Tensor
    pivots: Tensor
    shift: float | Tensor  # of K's diagonal

    @classmethod
    def of(cls, form: Form, Y: Tensor, S: Tensor, K: Tensor) -> _Place:
        l, g = form.b.shape[1], form.cones.rows
        (y, tau), (s, kappa) = Y.split_with_sizes((l, 1), 1), S.split_with_sizes((l, 1), 1)
        orthant_y, orthant_s = (Y[:, g:], S[:, g:]) if g else (Y, S)
        point = form.cones.at(s[:, :g], y[:, :g]) if g else None
        weight = Weight(orthant_y[:, :-1] / orthant_s[:, :-1], point)
        factor = _factorise(form, weight, K, SHIFTS.cones if g else SHIFTS.orthant)
        return cls(form, y, s, tau, kappa, orthant_y, orthant_s, Y * S, point, weight, *factor)

    @property
    def cone_rows(self) -> int:
        return self.form.cones.rows

    def of_orthant(self, values: Tensor) -> Tensor:
        return values[:, self.cone_rows :] if self.cone_rows else values

    def reduced(self, a: Tensor, r_s: Tensor, ky: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(v, y, h) by K, each (B, k, .), of

            base v + A'y = a
            A v + r_s    = h = H (y + ky)

        ky = H^-1 ks is not left to H^-1, which may be of size 1 / mu while ky is of size one.
        """
        right = a + self.form.At_times(ky - self.weight(r_s))
        v = torch.linalg.lu_solve(self.lu, self.pivots, right.mT).mT
        h = self.form.A_times(v) + r_s
        return v, self.weight(h) - ky, h


@dataclass(frozen=True, eq=False)
class _Ray:
    """How v and y follow tau:  base v' + A'y' + c = 0,  A v' - b = H y'  (a slack follows by -H y').

    v and y are along themselves, divided by tau, and a turn, which is small near a solution:
    nothing cancels. Where no solution is to be expected (v, y) / tau is what cancels: the turn is
    the whole.
    """

    v: Tensor  # (B, N) v'
    y: Tensor  # (B, l) y'
    orthant_y: Tensor  # (B, .)
    h: Tensor | None  # (B, cone_rows) H y' in the cones
    scaled_h: Tensor | None  # (B, cone_rows) W^-T H y' = W y'
    bend: Tensor  # (B, N) the derivative of x'Px / tau along v', with the shift of K as curvature
    pivot: Tensor  # (B, 1) the Schur complement of tau
    common: Tensor  # (B, 1) what r leaves of tau's equation

    @staticmethod
    def sides(
        at: _Place, r: EmbeddingResidual, lost: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """1 / tau, or zero where a solution is not expected; (a, r_s, ky) of the turn."""
        lead = at.tau.reciprocal()
        if lost is not None:
            lead = lead.masked_fill(lost, 0.0)
        a, r_s, ky = r.v * lead, r.s * lead, at.y * (2 * lead)
        if lost is not None:
            a = torch.where(lost, at.form.c, a)
            r_s = torch.where(lost, -at.form.b, r_s)
        return lead, a, r_s, ky

    @classmethod
    def of(
        cls,
        at: _Place,
        r: EmbeddingResidual,
        v: Tensor,
        lead: Tensor,
        *,
        turn: Tensor,  # (B, N) of v
        turn_y: Tensor,  # (B, l)
        turn_h: Tensor,  # (B, l) H (turn_y + 2 y lead)
        scaled_turn_h: Tensor | None,
    ) -> _Ray:
        form, n, g = at.form, at.form.n, at.cone_rows
        along_v, along_y = torch.addcmul(turn, lead, v), torch.addcmul(turn_y, lead, at.y)
        mirrored = along_v
        if form.c.shape[1] > n:
            mirrored = torch.cat([along_v[:, :n], -along_v[:, n:]], 1)
        orthant_y = along_y[:, g:]
        # pivot = kappa / tau + |y'|_H^2 + |v' - v / tau|_P^2, and K's shift, as the ray's equations
        # hold with it. It is positive, whatever rounding says.
        least = at.kappa / at.tau
        in_orthant = (orthant_y.square() / at.weight.w).sum(1, keepdim=True)
        pivot = least + in_orthant + at.shift * dot(along_v, turn)
        bend = (along_v + turn) * at.shift
        if form.curved:
            off = (along_v - v / at.tau)[:, :n]
            P_off = form.P_times(off)
            pivot = pivot + dot(P_off, off)
            bend[:, :n].add_(P_off, alpha=2)
        h = scaled_h = None
        if at.point is not None and scaled_turn_h is not None:
            # W y' = W^-T H y': products with H lose no digits where W is taken apart, however large
            # H^-1 is.
            scaled_h = torch.addcmul(scaled_turn_h, lead, at.point.scaled, value=-1)
            h = torch.addcmul(turn_h[:, :g], lead, at.s[:, :g], value=-1)
            pivot = pivot + dot(scaled_h, scaled_h)
        pivot = torch.maximum(pivot, least)
        # q'v + b'y by the ray's equations: of terms as small as the residuals.
        common = r.tau - dot(mirrored, r.v) + dot(along_y, r.s)
        return cls(along_v, along_y, orthant_y, h, scaled_h, bend, pivot, common)


class _Step(NamedTuple):
    """A change of the point. In the cones also in scaled terms, d_s = W^-T ds and d_y = W dy."""

    d_tau: Tensor  # (B, 1)
    dy: Tensor  # (B, l + 1) of y and tau
    orthant_ds: Tensor  # (B, .) of the orthant's s and kappa
    scaled_ds: Tensor | None  # (B, cone_rows)
    scaled_dy: Tensor | None
    worst: Tensor  # (B, 1) -1 / (longest step), but for cones that are not symmetric


def _step(
    at: _Place,
    ray: _Ray,
    v: Tensor,  # (B, N) v, y, h of `reduced`: the step while tau stays
    y: Tensor,
    h: Tensor,
    scaled_h: Tensor | None,  # W^-T h in the cones
    common: Tensor,  # (B, 1) what is to be taken away of tau's equation
    target: Tensor,  # (B, .) Y S in the orthant and tau, with what the corrector adds
    pull: Tensor | None = None,  # (B, .) what it adds, over y
    correction: Tensor | None = None,  # (B, cone_rows) and in the cones, scaled
) -> _Step:
    """tau's change, by the equation that is left for it, and the others by the ray.

    pivot dtau = common - target_tau / tau + y''(s + pull - 2h) - bend'v        in the orthant
                 - (W y')'(2 W^-T h - lambda - correction)                      in the cones

    dY = y + dtau y',   dS = -(target / Y + S / Y dY)
    d_s = -(W^-T h + dtau W y'),   d_y = -(lambda + correction + d_s)
    """
    g, slack = at.cone_rows, at.orthant_s[:, :-1]
    right = common
    if at.point is not None and scaled_h is not None and ray.scaled_h is not None:
        left = 2 * scaled_h - at.point.scaled
        right = right - dot(ray.scaled_h, left if correction is None else left - correction)
    rest = torch.sub(slack if pull is None else slack + pull, h[:, g:], alpha=2)
    right = right - target[:, -1:] / at.tau + dot(ray.orthant_y, rest) - dot(ray.bend, v)
    d_tau = right / ray.pivot

    dY = torch.cat([torch.addcmul(y, d_tau, ray.y), d_tau], 1)
    relative_Y = at.of_orthant(dY) / at.orthant_y
    relative_S = -(target / at.of_orthant(at.product) + relative_Y)
    dS = relative_S * at.orthant_s
    worst = torch.minimum(relative_S, relative_Y).amin(1, keepdim=True)
    if at.point is None or scaled_h is None or ray.scaled_h is None:
        return _Step(d_tau, dY, dS, None, None, worst)

    aim = at.point.scaled if correction is None else at.point.scaled + correction
    d_s = -torch.addcmul(scaled_h, d_tau, ray.scaled_h)
    d_y = -(aim + d_s)
    return _Step(d_tau, dY, dS, d_s, d_y, at.point.worst(d_s, d_y, worst))


def _change_of_s(ray: _Ray, h: Tensor, d_tau: Tensor) -> Tensor:
    """(B, cone_rows) ds = -H (y + dtau y') as it is, not scaled."""
    assert ray.h is not None
    return -torch.addcmul(h[:, : ray.h.shape[1]], d_tau, ray.h)


def direction(
    form: Form,
    r: EmbeddingResidual,
    v: Tensor,
    Y: Tensor,
    S: Tensor,
    K: Tensor,
    before: Tensor,  # (B, 1) the length of the last step
    lost: Tensor | None,  # (B, 1) where no solution is to be expected
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dv, dY, dS, length of the step): Newton's equations, for 1 - sigma of the residuals,

        base dv + A'dy + c dtau                    = -(1 - sigma) r_v
        A dv + ds - b dtau                         = -(1 - sigma) r_s
        d(q'v + b'y + x'Px / tau) + dkappa         = -(1 - sigma) r_tau
        H dy + ds                                  = -(s + H push)
        tau dkappa + kappa dtau                    = -(tau kappa + more)

    with sigma = push = more = 0 to predict.
    """
    g, symmetric = form.cones.rows, form.cones.symmetric
    at = _Place.of(form, Y, S, K)
    point = at.point

    # What follows tau, and the predictor while tau stays: by one call of the factor.
    lead, *turning = _Ray.sides(at, r, lost)
    a, r_s, ky = (torch.stack(pair, 1) for pair in zip((r.v, r.s, at.y), turning, strict=True))
    v1, y1, h1 = at.reduced(a.neg_(), r_s, ky)
    scaled_h, scaled_turn_h = (None, None)
    if point is not None:
        scaled_h, scaled_turn_h = point.reduce(h1[..., :g]).unbind(1)
    ray = _Ray.of(
        at,
        r,
        v,
        lead,
        turn=v1[:, 1],
        turn_y=y1[:, 1],
        turn_h=h1[:, 1],
        scaled_turn_h=scaled_turn_h,
    )

    # Predictor:  H dy + ds = -s,  Y dS + S dY = -Y S.
    product = at.of_orthant(at.product)
    ahead = _step(at, ray, v1[:, 0], y1[:, 0], h1[:, 0], scaled_h, ray.common, product)
    length = ahead.worst.neg().clamp(min=1).reciprocal()
    ds = None
    if point is not None and not symmetric:
        ds = _change_of_s(ray, h1[:, 0], ahead.d_tau)
        length = point.shorten(length.clamp(max=LENGTHS.nearest), ds, ahead.dy[:, :g])

    # Centring:  sigma = (1 - length)^3,  mu = (s'y + tau kappa) / degree.
    sigma = (1 - length) ** 3
    if not symmetric:
        jammed = before < LENGTHS.jammed
        sigma = torch.where(jammed, sigma.clamp(min=LENGTHS.centring), sigma)
    mu = at.product.sum(1, keepdim=True) / form.degree
    keep, sigma_mu = 1 - sigma, sigma * mu

    # Corrector, with what the predictor left out:  in the orthant  more = dY dS - sigma mu,
    # push = more / s;  in the cones  push = W^-1 correction, of lambda \ (d_s o d_y - sigma mu e).
    more = torch.addcmul(-sigma_mu, at.of_orthant(ahead.dy), ahead.orthant_ds)
    pull = more[:, :-1] / at.orthant_y[:, :-1]
    push, correction = pull * at.weight.w, None
    if point is not None and ahead.scaled_ds is not None and ahead.scaled_dy is not None:
        scaled = (ahead.scaled_ds, ahead.scaled_dy)
        correction = point.correction(*scaled, ds, ahead.dy[:, :g], sigma_mu)
        push = torch.cat([point.enlarge(correction), push], 1)
    sides = ((sigma - 1) * r.v, keep * r.s, at.y + push)
    found = at.reduced(*(side.unsqueeze(1) for side in sides))
    v1, y1, h = (part.squeeze(1) for part in found)
    if point is not None:
        scaled_h = point.reduce(h[:, None, :g]).squeeze(1)
    target = product + more
    step = _step(at, ray, v1, y1, h, scaled_h, keep * ray.common, target, pull, correction)

    # The step, and how much of it stays inside.
    dv = torch.addcmul(v1, step.d_tau, ray.v)
    dS = step.orthant_ds
    length = LENGTHS.nearest * step.worst.neg().clamp(min=LENGTHS.nearest).reciprocal()
    if point is not None:
        ds = _change_of_s(ray, h, step.d_tau)
        dS = torch.cat([ds, dS], 1)
        if not symmetric:
            length = point.shorten(length.clamp(max=LENGTHS.nearest), ds, step.dy[:, :g])
    return _unless_broken(step.worst, dv, step.dy, dS, length)


def _unless_broken(
    worst: Tensor, dv: Tensor, dY: Tensor, dS: Tensor, length: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Zero where a row is not finite: what is not anywhere in it is not so in its longest step."""
    if dv.is_cpu and math.isfinite(worst.sum().item()):
        return dv, dY, dS, length
    total = worst + length + dv.sum(1, keepdim=True) + dS.sum(1, keepdim=True)
    broken = ~torch.isfinite(total)
    dv, dY, dS, length = (torch.where(broken, 0.0, part) for part in (dv, dY, dS, length))
    return dv, dY, dS, length


def _factorise(
    form: Form, weight: Weight, K: Tensor, least: float
) -> tuple[Tensor, Tensor, float | Tensor]:
    """LU of K (B, N, N), made quasidefinite by a shift of at least `least`, and the shift, a number
    or (B, 1).

    In K's own memory: fresh pages cost more than the arithmetic.
    """
    shift = _assemble(form, weight, K, least)
    # K is symmetric, and its transpose in the column order that LAPACK wants.
    lu = K.mT
    pivots, info = (
        torch.empty(shape, dtype=torch.int32, device=K.device)
        for shape in (lu.shape[:2], lu.shape[:1])
    )
    torch.linalg.lu_factor_ex(lu, out=(lu, pivots, info))
    if lu.is_cpu and pivots.numel() and int(pivots.min()) < 1:  # see `lu_factor`
        _assemble(form, weight, K, least)
        with one_thread():
            torch.linalg.lu_factor_ex(lu, out=(lu, pivots, info))
    return lu, pivots, shift


def _assemble(form: Form, weight: Weight, K: Tensor, least: float) -> float | Tensor:
    """Fills K and returns the shift of its diagonal."""
    K.copy_(form.base)
    form.add_weighted(K, weight)
    diagonal = K.diagonal(dim1=1, dim2=2)
    shift = (
        (SHIFTS.blur * diagonal.amax(1, keepdim=True)).clamp(min=least)
        if form.cones.rows
        else least
    )
    if form.n == K.shape[1]:
        diagonal += shift
    else:
        diagonal[:, : form.n] += shift
        diagonal[:, form.n :] -= shift
    return shift


def starting_point(form: Form, K: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The point with H = I, y + s = 0, both shifted inside; with cones that are not symmetric, the
    central point of each cone."""
    one = form.b.new_ones(len(form.b), 1)
    if not form.cones.symmetric:
        centre = torch.cat(
            [form.cones.unit(form.b), torch.ones_like(form.b[:, form.cones.rows :]), one], 1
        )
        return torch.zeros_like(form.c), centre, centre.clone()
    point = form.cones.at_unit(form.b) if form.cones.rows else None
    lu, pivots, _ = _factorise(
        form, Weight(torch.ones_like(form.b[:, form.cones.rows :]), point), K, SHIFTS.start
    )
    right = form.At_times(form.b.unsqueeze(1)).squeeze(1) - form.c
    v = torch.linalg.lu_solve(lu, pivots, right.unsqueeze(2)).squeeze(2)
    y = form.A_times(v.unsqueeze(1)).squeeze(1) - form.b
    return (
        v,
        torch.cat([_inside(y, form.cones), one], 1),
        torch.cat([_inside(-y, form.cones), one], 1),
    )


def _inside(v: Tensor, cones: Cones) -> Tensor:
    """Every eigenvalue of v at least their typical size, at least 1; what is as good as infinite
    does not count."""
    if not v.shape[1]:
        return v
    if not cones.rows:
        return torch.maximum(v, _floor(v))
    values, back = cones.inside(v)
    return back(torch.maximum(values, _floor(values)))


def _floor(values: Tensor) -> Tensor:
    return values.clamp(0.0, LARGE).mean(1, keepdim=True).clamp(min=1.0)

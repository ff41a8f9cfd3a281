"""The KKT residual map, zero exactly at solutions, and the scaling in which it is measured.

With z = (x, v), v = y - s, y = Pi_K*(v), s = Pi_K(-v):

    F(z) = [ Px + q + A'y ;  Ax + s - b ]

y and s lie in their cones and are complementary by construction, so |F| alone certifies a solution.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from convlayer.conic.program import Data, Operators, Program, take_rows

# An inequality's right-hand side beyond this, A having size one, is no bound.
INFINITE = 1e15
# The bound that takes its place, in units where x is of size one.
BEYOND = 1e8
# An entry of x, s or y beyond this, in units where they are of size one, is measured as this.
FARTHEST = 1e3
# The rounding of a sum, relative to its terms.
ROUNDING = 2e-16
# Units of logarithms within this factor of one are left as they are.
MILD = 1e2
# Columns of the row-normalised matrix within this factor of each other need no scaling.
BALANCED = 1e3
# Steps of Ruiz's iteration.
EQUILIBRATIONS = 20
# A right-hand side below this share of the largest counts as zero where a typical one is sought.
PRESENT = 1e-14


class Range(NamedTuple):
    """Within what a size is taken for what it is."""

    least: float
    most: float


# The size of x, and of y, that units are set by: without quadratic costs, a smaller x is noise.
SIZES = Range(1e-2, 1e8)
# The size of x by the objective alone, q / P.
BY_COSTS = Range(1e-6, 1.0)
# The size of x, and of y, beside the right-hand side and the costs that the residual is relative
# to.
BESIDE = Range(1e-6, 1.0)


class Faint(NamedTuple):
    """The share of the largest terms for which an entry's own count at least."""

    within: float  # of those of its own part of the program
    apart: float  # of all, or of one, where that is larger


# Where rounding is to count for nothing.
WORKING = Faint(1e-3, 1e-6)
# Where a point is judged, as strictly as rounding allows.
JUDGING = Faint(1e-6, 1e-8)


@dataclass(frozen=True, eq=False)
class Shear:
    """Units of the t of cones (r, 1, t), t >= exp(r): with t' = k t,  r' = r + a,  a = log k,  which is linear in the cone's rows."""

    first: Tensor  # (k,) the rows of r
    a: Tensor  # (B or 1, k)

    def rows(self, index: Tensor) -> Shear:
        return Shear(self.first, take_rows(self.a, index))

    def slack(self, s: Tensor, sign: float) -> Tensor:
        """r + a times the second row; taken off again with sign -1."""
        return s.index_add(1, self.first, sign * self.a * s[:, self.first + 1])

    def dual(self, y: Tensor, sign: float) -> Tensor:
        """What keeps y's: the second row less a times the first; put back with sign -1."""
        return y.index_add(1, self.first + 1, -sign * self.a * y[:, self.first])


@dataclass(frozen=True, eq=False)
class Scaling:
    """A change of units, row by row of the batch: x' = rho x / c, s' = rho e s, y' = tau y / e, so
    A' = e A c."""

    c: Tensor | None  # (B or 1, n) one for each column of A, None for ones
    # (B or 1, m) one for each row of A; equal within a cone that is not elementwise, or sheared
    e: Tensor
    rho: Tensor  # (B, 1)
    tau: Tensor  # (B, 1)
    # (B, m) inequalities whose right-hand side was as good as infinite, and was cut
    unbounded: Tensor | None
    shear: Shear | None = None

    def rows(self, index: Tensor) -> Scaling:
        return Scaling(
            None if self.c is None else take_rows(self.c, index),
            take_rows(self.e, index),
            self.rho[index],
            self.tau[index],
            None if self.unbounded is None else self.unbounded[index],
            None if self.shear is None else self.shear.rows(index),
        )

    def enter(self, x: Tensor, s: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, s, y = (
            (x if self.c is None else x / self.c) * self.rho,
            s * (self.rho * self.e),
            y * (self.tau / self.e),
        )
        return (
            (x, s, y)
            if self.shear is None
            else (x, self.shear.slack(s, 1.0), self.shear.dual(y, 1.0))
        )

    def leave(self, x: Tensor, s: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.shear is not None:
            s, y = self.shear.slack(s, -1.0), self.shear.dual(y, -1.0)
        return (
            (x if self.c is None else x * self.c) / self.rho,
            s / (self.rho * self.e),
            y * (self.e / self.tau),
        )

    def to_same(
        self, other: Scaling, x: Tensor, s: Tensor, y: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """From these units into others that differ in rho and tau alone."""
        rho, tau = other.rho / self.rho, other.tau / self.tau
        return x * rho, s * rho, y * tau

    def enter_cotangents(self, x_bar: Tensor, y_bar: Tensor) -> tuple[Tensor, Tensor]:
        y_bar = y_bar * (self.e / self.tau)
        return (x_bar if self.c is None else x_bar * self.c) / self.rho, (
            y_bar if self.shear is None else self.shear.slack(y_bar, 1.0)
        )

    def leave_adjoint(self, w: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        """The adjoint (w, u) of `pull_back` in the original units."""
        u = u if self.shear is None else self.shear.dual(u, -1.0)
        return self.tau * (w if self.c is None else w * self.c), self.rho * self.e * u


def normalise(data: Data) -> tuple[Data, Scaling]:
    """Units in which rows of A, the objective and the right-hand side have size one, so that every
    tolerance is relative."""
    natural = _units_of_logarithms(data)
    if natural is not None:
        c, e, shear = natural
        data = _in_units(data, c, e)
        data = replace(
            data,
            b=shear.slack(data.b.expand(len(shear.a), -1) if len(data.b) == 1 else data.b, 1.0),
        )
        inner, scaling = _normalised(data)
        return inner, replace(
            scaling, c=c if scaling.c is None else c * scaling.c, e=e * scaling.e, shear=shear
        )
    return _normalised(data)


def _normalised(data: Data) -> tuple[Data, Scaling]:
    batch = data.batch
    # A' = e A c
    c, e = _equilibrate(data)
    scaled = _in_units(data, c, e)

    # Right-hand sides that are as good as infinite count for nothing.
    unbounded = None
    b = scaled.b.abs()
    top = _greatest(b)
    if top.numel() and top.max().item() >= INFINITE:
        beyond = (scaled.b >= INFINITE) & data.program.on(b.device)["inequalities"]
        unbounded = beyond if bool(beyond.any()) else None
    if unbounded is not None:
        b = torch.where(unbounded, 0.0, b)
        top = _greatest(b)

    # rho b, and tau (q, P / rho), of size one
    rho = _reciprocal_of_typical(b, top)
    q, P = scaled.largest_costs
    if not (top.numel() and top.min().item() > 0):
        # Without a right-hand side the size of x is set by the objective: x ~ q / P.
        by_costs = torch.where((P > 0) & (q > 0), P / q.clamp(min=torch.finfo(q.dtype).tiny), 1.0)
        rho = torch.where(top > 0, rho, by_costs)
    tau = _reciprocal(torch.maximum(q, P / rho))
    if unbounded is not None:
        # The row in units of its bound, so that it brings no large number, nor its rounding, beside
        # those of the others.
        units = torch.where(unbounded, 1 / BEYOND, 1.0)
        e, b = e * units, torch.where(unbounded, 1 / rho, scaled.b)
        scaled = replace(scaled, A=_times_rows(data, scaled.A, units), b=b)
    scaling = Scaling(c, e, rho.expand(batch, 1), tau.expand(batch, 1), unbounded)
    return rescale(scaled, scaling.rho, scaling.tau), scaling


def _in_units(data: Data, c: Tensor | None, e: Tensor) -> Data:
    scaled = replace(data, A=_times_rows(data, data.A, e), b=data.b * e)
    if c is None:
        return scaled
    P = _times_columns(data, _times_rows_of_P(data, data.P, c), c, "P")
    return replace(scaled, A=_times_columns(data, scaled.A, c, "A"), q=data.q * c, P=P)


def _units_of_logarithms(data: Data) -> tuple[Tensor, Tensor, Shear] | None:
    """Units of the variables under a logarithm in which their costs are like those of the
    logarithms; None: they are as it is.

    |S x|^2 - b'log x with S of 1e6 has x of 1e-6; no scale of its rows tells, as log is of no
    scale.
    """
    logs = data.program.logarithms
    if logs is None:
        return None
    first, group, seen, valued = (part.to(data.q.device) for part in logs)
    curvature, slope = _column_sizes(data, data.P.abs(), "P"), data.q.abs()
    batch = max(len(curvature), len(slope))
    value = torch.where(valued, slope, 0.0)
    value = value.amax(1, keepdim=True)
    value = torch.where(value > 0, value, 1.0)
    cost = torch.maximum((curvature / value).sqrt(), slope / value).expand(batch, -1)
    index = group.expand(batch, -1)
    cost = (
        cost.new_zeros(batch, data.program.n)
        .scatter_reduce_(1, index, cost, "amax")
        .gather(1, index)
    )
    c = torch.where(seen & (cost > 0), 1 / cost, 1.0)
    if not bool(((c > MILD) | (c < 1 / MILD)).any()):
        return None
    rows = _largest_of_rows(data, _times_columns(data, data.A.abs(), c, "A"))[:, first + 2]
    k = _reciprocal(rows)
    e = torch.ones(len(k), data.program.m, dtype=k.dtype, device=k.device)
    e[:, first + 2] = k
    return c, e, Shear(first, k.log())


def _largest_of_rows(data: Data, A: Tensor) -> Tensor:
    """(B or 1, m) the largest entry of each row of |A|."""
    if data.dense:
        return A.amax(2)
    rows = data.program.on(A.device)["A_rows"].expand(len(A), -1)
    return A.new_zeros(len(A), data.program.m).scatter_reduce_(1, rows, A, "amax")


def _equilibrate(data: Data) -> tuple[Tensor | None, Tensor]:
    """Column and row scales (c, e): rows of size one and, where columns differ much, Ruiz's
    iteration on both.

    A column is measured by its constraints, and by P, relative to its largest entry, only where
    that is more: an auxiliary variable t == Ax - b with a small coefficient is then brought to the
    size of Ax, whatever its weight in the objective, and a variable that all but leaves its
    constraints is not blown up until its costs are all that is seen.
    """
    A, elementwise = data.A.abs(), data.program.on(data.A.device)["elementwise"]
    sizes = _row_sizes(data, A)
    e = _reciprocal(sizes)
    # A row with one entry, a bound, takes any scale: it says nothing about its column's. To
    # rounding its sum is its largest entry.
    bounds = (_row_sums(data, A) <= sizes) & elementwise
    columns = _column_sizes(data, _times_rows(data, A, e.masked_fill(bounds, 0.0)), "A")
    if _are_balanced(columns):
        return None, e
    joint = _times_rows(data, A, (~bounds).to(A.dtype))
    P = data.P.abs()
    P = P * _reciprocal(largest(P.flatten(1))).view(-1, *[1] * (P.ndim - 1))
    c, e = A.new_ones(max(len(A), len(P)), data.program.n), A.new_ones(len(A), data.program.m)
    for _ in range(EQUILIBRATIONS):
        now = _times_columns(data, _times_rows(data, joint, e), c, "A")
        columns = _column_sizes(data, now, "A")
        alone = _column_sizes(data, _times_columns(data, _times_rows_of_P(data, P, c), c, "P"), "P")
        e = e * _reciprocal(_row_sizes(data, now)).sqrt()
        c = c * _reciprocal(torch.maximum(columns, alone)).sqrt()
    return c, e * _reciprocal(
        _row_sizes(data, _times_columns(data, _times_rows(data, A, e), c, "A"))
    )


def _times_rows(data: Data, A: Tensor, e: Tensor) -> Tensor:
    return (
        A * e.unsqueeze(2)
        if data.dense
        else A * e.index_select(1, data.program.on(A.device)["A_rows"])
    )


def _times_rows_of_P(data: Data, P: Tensor, c: Tensor) -> Tensor:
    return (
        P * c.unsqueeze(2)
        if data.dense
        else P * c.index_select(1, data.program.on(P.device)["P_rows"])
    )


def _times_columns(data: Data, matrix: Tensor, c: Tensor, name: str) -> Tensor:
    index = data.program.on(matrix.device)
    return matrix * (c.unsqueeze(1) if data.dense else c.index_select(1, index[f"{name}_cols"]))


def _row_sizes(data: Data, A: Tensor) -> Tensor:
    """(B or 1, m) the largest entry of each row of |A|, the same within a cone that is not
    elementwise."""
    program = data.program
    if not data.dense:
        index = program.on(A.device)
        sizes = A.new_zeros(len(A), program.m).scatter_reduce_(
            1, index["A_groups"].expand(len(A), -1), A, "amax"
        )
        return sizes if program.is_elementwise else sizes.index_select(1, index["scale_group"])
    sizes = A.amax(2) if A.numel() else A.new_zeros(A.shape[:2])
    if program.is_elementwise:
        return sizes
    group = program.on(A.device)["scale_group"].expand(len(A), -1)
    return torch.zeros_like(sizes).scatter_reduce_(1, group, sizes, "amax").gather(1, group)


def _row_sums(data: Data, A: Tensor) -> Tensor:
    """(B or 1, m) the sum of each row of |A|."""
    if data.dense:
        return A.sum(2)
    return A.new_zeros(len(A), data.program.m).index_add_(1, data.program.on(A.device)["A_rows"], A)


def _are_balanced(columns: Tensor) -> bool:
    """Whether the sizes of columns, (B or 1, n), are within BALANCED of each other in every row of
    the batch, empty ones apart."""
    if not columns.numel():
        return True
    least, most = (end.item() for end in torch.aminmax(columns))
    if least > 0 and most <= BALANCED * least:  # over all rows, as nearly always
        return True
    filled = torch.where(columns > 0, columns, torch.inf)
    return bool((_greatest(columns) <= BALANCED * filled.amin(1, keepdim=True)).all())


def _column_sizes(data: Data, matrix: Tensor, name: str) -> Tensor:
    """(B or 1, n) the largest entry of each column of |A|, or of |P|."""
    program = data.program
    if data.dense:
        return matrix.amax(1) if matrix.numel() else matrix.new_zeros(len(matrix), program.n)
    largest = matrix.new_zeros(len(matrix), program.n)
    for index in ("A_cols",) if name == "A" else ("P_rows", "P_cols"):
        largest.scatter_reduce_(
            1, program.on(matrix.device)[index].expand(len(matrix), -1), matrix, "amax"
        )
    return largest


def rescale(data: Data, rho: Tensor, tau: Tensor) -> Data:
    """x' = rho x, y' = tau y: the same program in other units."""
    P, curvature = data.P, tau / rho
    if len(data.program.P_rows):
        P = P * curvature.view(-1, *[1] * (P.ndim - 1))
    scaled = replace(data, P=P, q=data.q * tau, b=data.b * rho)
    # Rounding is monotone: to the last bit what would be found there.
    vars(scaled)["largest_costs"] = data.largest_costs[0] * tau, data.largest_costs[1] * curvature
    return scaled


def recentre(
    data: Data, scaling: Scaling, x: Tensor, y: Tensor, seen: Tensor | None = None
) -> tuple[Data, Scaling]:
    """Units in which a point found in `data`'s units has |x| and |y| near one: there v = y - s
    tells active from inactive best.

    seen: (n,) the variables by whose size that of x is told, all by default: an auxiliary one may
          be free to be as large as it likes.

    Where x or y is all but zero, the right-hand side or the objective sets the unit, so that noise
    does not become of size one; where it is absurdly large, it stays so.
    """
    q, P = data.largest_costs
    felt = x if seen is None or not bool(seen.any()) else x * seen
    size, natural = largest(felt).clamp(*SIZES), q
    if len(data.program.P_rows):
        # What x would be by the objective alone, if that is less than the right-hand side's 1.
        by_costs = (q / P.clamp(min=torch.finfo(P.dtype).tiny)).clamp(*BY_COSTS)
        least = torch.where((q > 0) & (P > 0), by_costs, SIZES.least)
        size = torch.maximum(largest(felt).clamp(max=SIZES.most), least)
        natural = torch.maximum(q, P * size)
    rho = size.reciprocal()
    # Without costs y = 0 is a multiplier, and its noise is not to become of size one.
    natural = torch.where(natural > 0, natural, 1.0)
    tau = torch.maximum(largest(y).clamp(max=SIZES.most), natural).reciprocal()
    return rescale(data, rho, tau), replace(scaling, rho=scaling.rho * rho, tau=scaling.tau * tau)


class Sizes(NamedTuple):
    """What each entry of F is measured against: the sizes of the terms that it is the sum of."""

    dual: Tensor  # (B, n)
    primal: Tensor  # (B, m)

    def rows(self, index: Tensor) -> Sizes:
        return Sizes(self.dual[index], self.primal[index])


def term_sizes(operators: Operators, x: Tensor, s: Tensor, y: Tensor, faint: Faint) -> Sizes:
    """|q| + |P||x| + |A|'|y|  and  |b| + |A||x| + |s|, entry by entry, the same within a cone that is not elementwise.

    A large cost or bound hides no other row's error so. An entry counts for at least a share,
    `faint`, of the largest one of its part of the program, whose rounding it may hold. In
    `recentre`'s units x and y are of size one: an iterate that is larger is far off any scale of
    the problem, and gains nothing by it.
    """
    program, absolute = operators.data.program, operators.absolute
    x, s, y = (part.abs().clamp(max=FARTHEST) for part in (x, s, y))
    # |q| + |A|'|y|,  to which |P||x| comes below,  and |b| + |A||x| + |s|
    q, b = operators.right_sizes
    dual, primal = q + absolute.At(y), b + absolute.A(x) + s
    if not program.is_elementwise:
        primal = in_groups(primal, program.on(x.device)["scale_group"], program.m)
    least = largest_of_part(primal, "part_of_y", program)
    primal = primal + _floor(least, faint)
    least = largest_of_part(dual, "part_of_x", program)
    if len(program.P_rows):
        dual = dual + absolute.P(x)
        # An x that is zero beside others of size one is so to their rounding.
        least = torch.maximum(
            least, operators.data.largest_costs[1] * largest_of_part(x, "part_of_x", program)
        )
    return Sizes(dual + _floor(least, faint), primal)


def _floor(least: Tensor, faint: Faint) -> Tensor:
    """What an entry counts for at least; `least` (B, k) as `largest_of_part` gives it."""
    if least.shape[1] == 1:  # one part is all
        return (faint.within * least).clamp(min=faint.apart)
    return torch.maximum(faint.within * least, faint.apart * _greatest(least).clamp(min=1.0))


def largest_of_part(sizes: Tensor, part: str, program: Program) -> Tensor:
    """The largest in each entry's own part of the program, (B, k), or (B, 1) where it has one
    part."""
    if program.parts[2] <= 1:
        return _greatest(sizes)
    return in_groups(sizes, program.on(sizes.device)[part], program.parts[2])


def in_groups(sizes: Tensor, group: Tensor, count: int) -> Tensor:
    """(B, k) the largest of each entry's group."""
    index = group.expand(len(sizes), -1)
    return (
        sizes.new_zeros(len(sizes), count).scatter_reduce_(1, index, sizes, "amax").gather(1, index)
    )


def rounding(operators: Operators, s: Tensor, y: Tensor, sizes: Sizes) -> Sizes:
    """How large the rounding in each entry of F is: that of its terms, and of y and s, which hold
    v's own in a curved cone.

    Away from the boundary of its cone one of them is v, and the other exactly zero.
    """
    program = operators.data.program
    if program.is_elementwise:
        return Sizes(*(ROUNDING * part for part in sizes))
    index = program.on(s.device)
    left, right = (in_groups(part.abs(), index["scale_group"], program.m) for part in (s, y))
    edge = torch.where(
        index["elementwise"] | (left == 0) | (right == 0), 0.0, torch.maximum(left, right)
    )
    return Sizes(
        ROUNDING * (sizes.dual + operators.absolute.At(edge)), ROUNDING * (sizes.primal + edge)
    )


def residual(
    operators: Operators, x: Tensor, s: Tensor, y: Tensor, sizes: Sizes | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(F1 (B, n), F2 (B, m), relative size (B,)).

    Without sizes each entry is measured against its right-hand side and the size of x or y (A
    having entries of size one).
    """
    data = operators.data
    # F = (Px + q + A'y, Ax + s - b)
    F1, F2 = operators.P(x) + data.q + operators.At(y), operators.A(x) + s - data.b
    if sizes is None:
        q, b = operators.right_sizes
        sizes = Sizes(q + largest(y).clamp(*BESIDE), b + largest(x).clamp(*BESIDE))
    return F1, F2, relative_size(F1, F2, sizes)


def relative_size(F1: Tensor, F2: Tensor, sizes: Sizes) -> Tensor:
    """(B,) the largest entry relative to its size."""
    relative = torch.cat([F1 / sizes.dual, F2 / sizes.primal], 1)
    return relative.abs().amax(1) if relative.shape[1] else relative.new_zeros(len(relative))


def largest(values: Tensor) -> Tensor:
    """(B, k) -> (B, 1), zero where k is zero."""
    return (
        values.abs().amax(1, keepdim=True) if values.shape[1] else values.new_zeros(len(values), 1)
    )


def _greatest(sizes: Tensor) -> Tensor:
    """`largest` of what is not negative."""
    return sizes.amax(1, keepdim=True) if sizes.shape[1] else sizes.new_zeros(len(sizes), 1)


def _reciprocal_of_typical(sizes: Tensor, largest: Tensor) -> Tensor:
    """(B, k), (B, 1) -> (B, 1), one over the geometric mean of the entries that are not zero; where
    all are, anything."""
    present = sizes > PRESENT * largest
    total = torch.where(present, sizes, 1.0).log().sum(1, keepdim=True)
    return (total / present.sum(1, keepdim=True)).neg().exp()


def _reciprocal(values: Tensor) -> Tensor:
    """One over what is positive, one for the rest."""
    return torch.where(values > 0, values, 1.0).reciprocal()

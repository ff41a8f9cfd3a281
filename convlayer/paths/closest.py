"""The closest feasible problem: what an infeasible row's answer is if its constraints give way by
as little as they must.

Every constraint of the user's is relaxed by a shift, all else (the variables' declared signs and
bounds, and what canonicalisation adds) stays as it is. With S the rows of the cone program that
belong to those constraints, two programs in a row:

    t*  = argmin over t    of  1/2 |t|^2         subject to   Ax + t + s = b for some x and some s in K,  t = 0 outside S
    x*  = argmin over x    of  1/2 x'Px + q'x    subject to   Ax + t* + s = b,  s in K

The first one's multipliers are y = -t* on S, and s'y = 0 for all that is feasible in the second. So
where y is not zero, s lies on a face of its cone, and there the second program, which has no
interior, is written without a cone:

    nonnegative                      s = 0
    second order, y inside           s = 0
    second order, y on the boundary  s = beta r,  beta >= 0,   r = (1, -y_1 / |y_1|)  for  y = (y_0, y_1)

With `few`, the first one is instead the linear program (in place of |t|^2 / 2)

    t*  = argmin over t    of  w'|t|            w from 1 + TIE in the first row of S to 1 in the last

which moves few constraints rather than all a little, as a least one-norm does: between rows that
would do as well (x <= a and x >= b with a < b) the weights choose the later one, so that t* is
unique but by accident. Its multipliers are on the faces in the same way.

Solution:    t* is unique; x* as unique as the user's objective makes it.
             With `few`, t* is unique but by accident; where it is not, the row is flagged.
Derivative:  the composition of both solutions' own; the faces' equations stay consistent wherever
             the data go, though they are dependent.
Multipliers: on a face they are not unique, not even bounded: y plus any multiple of the first
             program's. They are NaN.
Source:      Bambade, Schramm, Taylor and Carpentier (2024); faces as in Borwein and Wolkowicz
             (1981).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import chain

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from convlayer.autodiff.derivative import known
from convlayer.cones import Cone, Nonnegative, Product, SecondOrder, Zero
from convlayer.conic.certificates import CERTIFICATE, infeasible
from convlayer.conic.kkt import Visible
from convlayer.conic.program import Data, Program, take_rows
from convlayer.declaration.canonical import Canonical
from convlayer.declaration.canonicalise import canonicalise
from convlayer.declaration.declaration import Declaration
from convlayer.declaration.maps import ONE, AffineMap, ParameterEntries, Recovery
from convlayer.declaration.reductions import CanonicalisationError
from convlayer.declaration.spelling import short
from convlayer.memo import once_for_each
from convlayer.paths.cone_call import ConeFound, ConeRequest
from convlayer.paths.cone_derivative import ConeDerivative
from convlayer.paths.cone_solution import solve
from convlayer.paths.evaluation import evaluate
from convlayer.paths.gradients import Exact
from convlayer.paths.verdict import Verdict
from convlayer.solution import Status
from convlayer.solvers import SOLVERS

# what a row's slack is left with: its cone, nothing but zero, or a ray of it
FREE, POINT, RAY = (
    0,
    1,
    2,
)
PRECISION = 1e-6  # relative, of faces that a first program has found
ACTIVE = 1e-9  # share of the largest multiplier above which one counts as not zero
NONE = 1e-12  # share of the largest shift up to which one is none
TIE = 0.01  # by which weights of the shifts differ, from the first row to the last
CONES = ("zero", "nonnegative", "second_order")


def applies(canonical: Canonical) -> str | None:
    """None, or why there is no closest feasible problem here."""
    if canonical.gp:
        return "the problem is log-log convex"
    other = sorted({block.name for block in canonical.program.cones.blocks} - set(CONES))
    return f"its cone program has {', '.join(other)} cones" if other else None


@dataclass(frozen=True, eq=False)
class Closest:
    """The answers for R rows; x, y, value and shift are differentiable in the entries in every
    mode, to second order."""

    x: Tensor  # (R, n); as y, value and shift it means nothing in rows that failed
    y: Tensor  # (R, m) NaN on faces
    value: Tensor  # (R,) of the cone program
    shift: Tensor  # (R, m) t*
    verdict: Verdict  # the worse of the two programs'
    # entries -> (x, y, value, shift), in any transform
    outputs_at: Callable[[Sequence[Tensor]], tuple[Tensor, ...]]

    @property
    def status(self) -> Tensor:
        """(R,)"""
        return self.verdict.status


def closest(
    relaxation: Relaxation,
    entries: Sequence[Tensor],
    tolerance: float,
    few: bool = False,
    least: float | None = None,
) -> Closest:
    """Both programs for R infeasible rows.

    least:   relative size of a shift from which on it is told from none, the tolerance by default.
    few:     the shift of least (weighted) one-norm, not of least two-norm.
    entries: of each parameter, (R, size) or shared (1, size), as its ParameterEntries reads them; R
             = 1 without parameters.
    Status:  INFEASIBLE if what may not give way is infeasible; UNBOUNDED if the second program is;
             NOT_CONVERGED if one of them was not solved, or if the shift is zero to the tolerance,
             and the row so not known to be infeasible.
    """
    plain = [part.detach() for part in entries]
    first = _solved(relaxation.first_few if few else relaxation.first, plain, tolerance)
    program = relaxation.canonical.program
    multipliers, shift = relaxation.read(first.x, first.y, few)
    settled = _rounding(first.derivative.operators.data.b[:, : program.m], shift)
    shift, pattern = shift + settled, _pattern(program, multipliers)
    own, _ = evaluate(relaxation.canonical, plain, False, shift.new_zeros(()))
    doubted = ~_certified(
        first, own, multipliers, pattern, shift, tolerance if least is None else least
    )
    lost = ~first.verdict.failed & doubted
    status = first.verdict.status.masked_fill(lost, int(Status.NOT_CONVERGED))
    verdict = replace(first.verdict, status=status)
    going = torch.nonzero(~verdict.failed).flatten()
    patterns, which = torch.unique(pattern[going], dim=0, return_inverse=True)
    groups = []
    for k, one in enumerate(patterns):
        rows, faces = going[which == k], _Faces(relaxation, one)
        part = [take_rows(values, rows) for values in plain]
        second = _solved(
            faces.stage, faces.entries(part, multipliers[rows], shift[rows]), tolerance
        )
        verdict = verdict.put(rows, verdict.take(rows).with_next(second.verdict))
        groups.append((rows, faces, second.derivative))
    outputs_at = partial(_outputs_at, relaxation, few, first.derivative, settled, groups)
    x, y, value, shift = outputs_at(entries)
    return Closest(x, y, value, shift, verdict, outputs_at)


def _rounding(b: Tensor, t: Tensor) -> Tensor:
    """(R, m) what t lacks of b where they differ by rounding: of right-hand sides b - t that are
    rounding alone dependent equations would be inconsistent in any units."""
    return torch.where((t != 0) & ((b - t).abs() <= NONE * b.abs()), b - t, 0.0)


def _outputs_at(
    relaxation: Relaxation,
    few: bool,
    first: ConeDerivative,
    settled: Tensor,
    groups: list[tuple[Tensor, _Faces, ConeDerivative]],
    entries: Sequence[Tensor],
) -> tuple[Tensor, ...]:
    """Both solutions, one after the other, as functions of the entries."""
    t_and_x, y, _ = _known(first, entries)
    multipliers, shift = relaxation.read(t_and_x, y, few)
    shift = shift + settled
    n, m = relaxation.canonical.program.n, relaxation.canonical.program.m
    found = [multipliers.new_zeros(len(multipliers), size) for size in (n, m, 1)]
    for rows, faces, second in groups:
        part = faces.entries(
            [take_rows(values, rows) for values in entries], multipliers[rows], shift[rows]
        )
        x, y, value = _known(second, part)
        parts = x[:, :n], y[:, :m].masked_fill(faces.pattern != FREE, torch.nan), value.unsqueeze(1)
        found = [whole.index_copy(0, rows, some) for whole, some in zip(found, parts, strict=True)]
    x, y, value = found
    return x, y, value.squeeze(1), shift


def _known(solved: ConeDerivative, entries: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return known(solved.solution, lambda: solved, entries)


def _solved(stage: _Stage, entries: Sequence[Tensor], tolerance: float) -> ConeFound:
    """One of the programs, solved, with its derivative."""
    rows = max((len(part) for part in entries), default=1)
    request = ConeRequest(
        canonical=stage,
        attempts=SOLVERS["clarabel"].attempts(tolerance, {}),
        tolerance=tolerance,
        executor=None,
        elimination=None,
        core=None,
        device=torch.device("cpu"),
        bad=torch.zeros(rows, dtype=torch.bool),
        start=None,
        differentiable=True,
        judged=True,
        selected=False,
        parameters_precision=PRECISION,
        gradient=Exact(),
        tell=lambda *_: None,
    )
    return solve(request, entries)


def _certified(
    first: ConeFound,
    own: Data,
    multipliers: Tensor,
    pattern: Tensor,
    shift: Tensor,
    tolerance: float,
) -> Tensor:
    """(R,) whether y proves that there is no feasible point near x, and so that the shift is
    neither zero nor only approached.

    A'y = 0 and -b'y = |t|^2 > 0, or w'|t|, exclude every x; as computed, those with x'A'y well
    below that. own: the program's data.
    """
    operators, (x, s, y) = first.derivative.operators, first.point
    m, n = pattern.shape[1], own.program.n
    b, s, gain = operators.data.b[:, :m], s[:, :m], -(operators.data.b * y).sum(1)
    # Of the equations on faces alone: the right-hand side of a bound that is none may be anything.
    sizes = torch.where(pattern != FREE, torch.maximum(b.abs(), (b - shift - s).abs()), 0.0)
    drift = (operators.At(y) * x)[:, :n].abs().sum(1)
    sure = drift <= CERTIFICATE * gain
    # Beside a small shift that is rounding; y is then to prove as much without it. The direction of
    # a ray would be as rough as y.
    left = torch.nonzero(~sure & (pattern != RAY).all(1)).flatten()
    if len(left):
        sure[left] = infeasible(own.rows(left).widen(len(left)), multipliers[left], tolerance)
    return (shift.abs() > tolerance * sizes.amax(1, keepdim=True)).any(1) & sure


def _pattern(program: Program, y: Tensor) -> Tensor:
    """(R, m) what is left of each row's cone where the multipliers are y."""
    least = ACTIVE * y.abs().amax(1, keepdim=True) if y.shape[1] else y.new_zeros(len(y), 1)
    pattern = torch.where(y.abs() > least, POINT, FREE)
    for block in program.cones.blocks:
        if block.name == "second_order":
            rows = slice(block.start, block.start + block.size)
            head, tail = y[:, block.start], y[:, rows][:, 1:].norm(dim=1)
            kind = torch.where(head - tail <= ACTIVE * head, RAY, POINT)
            pattern[:, rows] = torch.where(head > least.squeeze(1), kind, FREE).unsqueeze(1)
    return pattern


@dataclass(frozen=True, eq=False)
class _Stage(Canonical):
    """One of the two programs, as a function of entries that are given as they are."""

    # (m,) rows that stay solvable together wherever the data go: that their multipliers are not
    # unique does no harm.
    consistent: Tensor

    @classmethod
    def of(
        cls,
        program: Program,
        matrices: dict[str, sp.csr_array],
        sizes: Sequence[int],
        variables: Sequence[Recovery],
        consistent: Tensor,
    ) -> _Stage:
        moving = {
            name: np.unique(matrices[name][:, ONE + 1 :].tocoo().row).astype(np.int64)
            for name in ("P", "A")
        }
        return cls(
            program=program,
            maps={
                name: AffineMap(matrix, sizes, moving.get(name))
                for name, matrix in matrices.items()
            },
            moving=moving,
            parameters=[ParameterEntries((size,), symmetric=False, log=False) for size in sizes],
            variables=list(variables),
            sign=1.0,
            gp=False,
            sizes={},
            matrices=matrices,
            stuffed=[],
            consistent=consistent,
        )

    @cached_property
    def visible(self) -> Visible:
        x, y = super().visible
        return Visible(x, y & ~self.consistent)


@dataclass(frozen=True, eq=False)
class Relaxation:
    """A problem whose constraints may give way."""

    canonical: Canonical
    constraints: list[list[Recovery]]  # of each constraint its dual variables
    names: list[str]  # and how it is spelt

    @classmethod
    def of(cls, declared: Declaration) -> Relaxation:
        """Canonicalises once more, for the rows of every constraint, if there are any."""
        constraints, canonical = declared.problem.constraints, declared.canonical
        duals = [dual for constraint in constraints for dual in constraint.dual_variables]
        names = [f"constraint {k}, `{short(c)}`" for k, c in enumerate(constraints)]
        if not duals:
            return cls(canonical, [[] for _ in constraints], names)
        twin = canonicalise(declared.problem, declared.parameters, duals)
        mine, other = canonical.program, twin.program
        if mine.cones != other.cones or not np.array_equal(mine.A_rows, other.A_rows):
            raise CanonicalisationError(
                "CVXPY made two cone programs of one problem; this version is not supported."
            )
        if any(r.coefficient is not None and not bool(r.coefficient.all()) for r in twin.variables):
            raise CanonicalisationError(
                "CVXPY leaves out rows of a constraint; this version is not supported."
            )
        recoveries = iter(twin.variables)
        own = [[next(recoveries) for _ in constraint.dual_variables] for constraint in constraints]
        return cls(canonical, own, names)

    @cached_property
    def soft(self) -> Tensor:
        """(m,) the rows that belong to the user's constraints."""
        soft = torch.zeros(self.canonical.program.m, dtype=torch.bool)
        for recovery in chain.from_iterable(self.constraints):
            soft[recovery.position] = True
        return soft

    def by_constraint(self, shift: Tensor) -> list[Tensor | tuple[Tensor, ...] | None]:
        """t (R, m) -> for each of problem.constraints the user's own shift, (R, *its shape).

        It holds as  lhs <= rhs + shift,  or  lhs == rhs + shift;  a cone constraint with shifts added to its arguments, one for each.
        None: the constraint has no dual variable, and so no rows.
        """
        found: list[Tensor | tuple[Tensor, ...] | None] = []
        for recoveries in self.constraints:
            # y'(Ax - b) = dual'(lhs - rhs) whatever x: a dual variable's coefficient divides where
            # the shift is taken back.
            parts = tuple(
                (
                    0.0
                    - (
                        shift[:, r.position]
                        if r.coefficient is None
                        else shift[:, r.position] / r.coefficient
                    )
                ).reshape(len(shift), *r.shape)
                for r in recoveries
            )
            found.append(parts[0] if len(parts) == 1 else parts or None)
        return found

    @property
    def sizes(self) -> list[int]:
        """Of the parameters."""
        return [math.prod(parameter.shape) for parameter in self.canonical.parameters]

    @cached_property
    def first(self) -> _Stage:
        """The least shift: the variables are x and t's rows S."""
        program, matrices = self.canonical.program, self.canonical.matrices
        n, m, width = program.n, program.m, matrices["b"].shape[1]
        rows = np.flatnonzero(self.soft.numpy())
        t, ones = n + np.arange(len(rows)), _constants(np.ones(len(rows)), width)
        relaxed = Program(
            n + len(t),
            m,
            program.cones,
            P_rows=t,
            P_cols=t,
            A_rows=np.concatenate([program.A_rows, rows]),
            A_cols=np.concatenate([program.A_cols, t]),
        )
        maps = {
            "P": ones,
            "q": sp.csr_array((n + len(t), width)),
            "A": sp.csr_array(sp.vstack([matrices["A"], ones])),
            "b": matrices["b"],
            "d": sp.csr_array((1, width)),
        }
        return _Stage.of(relaxed, maps, self.sizes, [], torch.zeros(m, dtype=torch.bool))

    @cached_property
    def first_few(self) -> _Stage:
        """The same for the least one-norm, with t = v - u: the variables are x, u (on S) and v (on
        rows of S that may be shifted both ways)."""
        program, matrices = self.canonical.program, self.canonical.matrices
        n, m, width = program.n, program.m, matrices["b"].shape[1]
        down, up = (
            np.flatnonzero(self.soft.numpy()),
            np.flatnonzero((self.soft & self._both_ways).numpy()),
        )
        on, k = np.concatenate([down, up]), len(down) + len(up)
        weights = np.zeros(m)
        weights[down] = np.linspace(1 + TIE, 1.0, len(down))
        columns, own = n + np.arange(k), m + np.arange(k)
        A_rows = np.concatenate([program.A_rows, on, own])
        A_cols = np.concatenate([program.A_cols, columns, columns])
        order = np.lexsort((A_rows, A_cols))
        none = np.zeros(0, dtype=np.int64)
        relaxed = Program(
            n + k,
            m + k,
            Product([*program.cones.cones, Nonnegative(k)]),
            P_rows=none,
            P_cols=none,
            A_rows=A_rows[order],
            A_cols=A_cols[order],
        )
        signs = np.concatenate([-np.ones(len(down)), np.ones(len(up))])
        blank, added = (
            sp.csr_array((k, width)),
            _constants(np.concatenate([signs, -np.ones(k)]), width),
        )
        maps = {
            "P": sp.csr_array((0, width)),
            "q": sp.csr_array(
                sp.vstack([sp.csr_array((n, width)), _constants(weights[on], width)])
            ),
            "A": sp.csr_array(sp.vstack([matrices["A"], added]))[order],
            "b": sp.csr_array(sp.vstack([matrices["b"], blank])),
            "d": sp.csr_array((1, width)),
        }
        read = [Recovery((k,), False, torch.from_numpy(columns), None, False)]
        return _Stage.of(relaxed, maps, self.sizes, read, torch.zeros(m + k, dtype=torch.bool))

    @cached_property
    def _both_ways(self) -> Tensor:
        """(m,) rows whose shifts may have either sign: equations, and all of a second-order cone
        but its head."""
        rows = torch.ones(self.canonical.program.m, dtype=torch.bool)
        for block in self.canonical.program.cones.blocks:
            last = block.start + (
                block.size
                if block.name == "nonnegative"
                else 1
                if block.name == "second_order"
                else 0
            )
            rows[block.start : last] = False
        return rows

    def read(self, x: Tensor, y: Tensor, few: bool) -> tuple[Tensor, Tensor]:
        """The first program's multipliers and shifts t, (R, m) each, from its solution."""
        n, m = self.canonical.program.n, self.canonical.program.m
        if not few:
            return y, torch.where(self.soft, -y, 0.0)
        down, up = (
            torch.nonzero(self.soft).flatten(),
            torch.nonzero(self.soft & self._both_ways).flatten(),
        )
        u, v = x[:, n : n + len(down)], x[:, n + len(down) :]
        zero = x.new_zeros(len(x), m)
        t = zero.index_copy(1, up, v) - zero.index_copy(1, down, u)
        # Where nothing moves it is rounding that would: of a right-hand side of zeros it would make
        # an inconsistent one.
        least = NONE * t.detach().abs().amax(1, keepdim=True) if m else 0.0
        return y[:, :m], torch.where(t.detach().abs() > least, t, 0.0)


@once_for_each
def relaxed(declared: Declaration) -> Relaxation:
    """The relaxation of a declaration, worked out once."""
    return Relaxation.of(declared)


class _Faces:
    """The second program, of rows that lie on the same faces: beside the parameters' its entries
    are -t, and the rays."""

    def __init__(self, relaxation: Relaxation, pattern: Tensor) -> None:
        self.pattern = pattern
        canonical, program = relaxation.canonical, relaxation.canonical.program
        n, m = program.n, program.m
        cones: list[Cone] = []
        self.rays: list[slice] = []
        zero = torch.zeros(m, dtype=torch.bool)
        for block in program.cones.blocks:
            rows = slice(block.start, block.start + block.size)
            if block.name == "second_order" and pattern[block.start] == FREE:
                cones.append(SecondOrder(block.size))
            elif block.name == "nonnegative":
                cones += [
                    Nonnegative(1) if kind == FREE else Zero(1) for kind in pattern[rows].tolist()
                ]
            else:
                cones.append(Zero(block.size))
            zero[rows] = block.name == "zero"
            if pattern[block.start] == RAY:
                self.rays.append(rows)
        k = len(self.rays)
        on_ray = np.concatenate(
            [np.zeros(0, dtype=np.int64), *(np.arange(r.start, r.stop) for r in self.rays)]
        )
        ray_of = np.repeat(np.arange(k), [r.stop - r.start for r in self.rays])
        ends = np.arange(k)
        # After x stand the betas: their columns hold the rays, and -1 in rows of their own, -beta +
        # s = 0, s >= 0.
        A_rows = np.concatenate([program.A_rows, on_ray, m + ends])
        A_cols = np.concatenate([program.A_cols, n + ray_of, n + ends])
        order = np.lexsort((A_rows, A_cols))
        faced = Program(
            n + k,
            m + k,
            Product([*cones, Nonnegative(k)]),
            P_rows=program.P_rows,
            P_cols=program.P_cols,
            A_rows=A_rows[order],
            A_cols=A_cols[order],
        )
        width = canonical.matrices["b"].shape[1]
        wider = [m] if not k else [m, len(on_ray)]
        maps = {name: _widened(matrix, sum(wider)) for name, matrix in canonical.matrices.items()}
        total = width + sum(wider)
        directions = _selection(np.arange(len(on_ray)), width + m, total)
        maps["A"] = sp.csr_array(
            sp.vstack([maps["A"], directions, _constants(-np.ones(k), total)])
        )[order]
        soft = sp.diags_array(relaxation.soft.numpy().astype(float))
        shifts = sp.csr_array(soft @ _selection(np.arange(m), width, total))
        blank = sp.csr_array((k, total))
        maps["b"] = sp.csr_array(sp.vstack([maps["b"] + shifts, blank]))
        maps["q"] = sp.csr_array(sp.vstack([maps["q"], blank]))
        read = torch.zeros(m, dtype=torch.bool)
        for recovery in canonical.variables:
            if recovery.dual:
                read[recovery.position] = True
        consistent = (pattern != FREE) | (zero & ~read)
        consistent = torch.cat([consistent, consistent.new_zeros(k)])
        self.stage = _Stage.of(
            faced, maps, [*relaxation.sizes, *wider], canonical.variables, consistent
        )

    def entries(self, entries: Sequence[Tensor], y: Tensor, t: Tensor) -> list[Tensor]:
        """The parameters' entries, the first program's multipliers and its shifts (R, m) -> the
        second program's entries."""
        if not self.rays:
            return [*entries, -t]
        tails = [y[:, rows][:, 1:] for rows in self.rays]
        rays = [
            part
            for tail in tails
            for part in (torch.ones_like(y[:, :1]), -tail / tail.norm(dim=1, keepdim=True))
        ]
        return [*entries, -t, torch.cat(rays, 1)]


def _constants(values: np.ndarray, width: int) -> sp.csr_array:
    """The map to these numbers, whatever the parameters."""
    size = len(values)
    return sp.csr_array((values, (np.arange(size), np.full(size, ONE))), shape=(size, width))


def _selection(rows: np.ndarray, start: int, width: int) -> sp.csr_array:
    """The map to as many inputs, from `start`."""
    return sp.csr_array((np.ones(len(rows)), (rows, start + rows)), shape=(len(rows), width))


def _widened(matrix: sp.csr_array, columns: int) -> sp.csr_array:
    """With inputs that it does not read."""
    return sp.csr_array(
        (matrix.data, matrix.indices, matrix.indptr),
        shape=(matrix.shape[0], matrix.shape[1] + columns),
    )

"""CVXPY problem -> Program: the affine map from parameters to (P, q, A, b), the cones, and the way back.

CVXPY canonicalises; what is read here is its parametrised cone program, kept sparse and split by parameter:

    (P, q, A, b, d) = constant + sum over parameters of map_p @ theta_p,

with theta_p the parameter's entries as CVXPY reduces them (upper triangle of a symmetric one, logarithm in a log-log convex
program). Variables and dual variables are gathered from (x, y) with one coefficient an entry. Both maps are read off CVXPY by
probing its own reductions, and checked against CVXPY on random data whenever a layer is built.
"""

from __future__ import annotations

import math
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import cvxpy as cp
import numpy as np
import scipy.sparse as sp
import torch
from cvxpy.atoms.atom import Atom
from cvxpy.atoms.elementwise.power import Power
from cvxpy.atoms.pnorm import Pnorm
from cvxpy.constraints import PowConeND
from cvxpy.problems.problem_form import make_problem_form
from cvxpy.reductions.canonicalization import Canonicalization
from cvxpy.reductions.cvx_attr2constr import CvxAttr2Constr, lower_value
from cvxpy.reductions.dgp2dcp.dgp2dcp import Dgp2Dcp
from cvxpy.reductions.solvers.conic_solvers.clarabel_conif import CLARABEL
from cvxpy.reductions.solvers.solver_inverse_data import SolverInverseData
from cvxpy.reductions.solvers.solving_chain import _build_solving_chain
from cvxpy.utilities import scopes
from torch import Tensor

from convlayer.cones import Product
from convlayer.conic.bounds import NO_BOUND, Bounds, implied
from convlayer.conic.consistency import Dependence
from convlayer.conic.elimination import Elimination
from convlayer.conic.kkt import Visible, dense_seconds, system_seconds
from convlayer.conic.linear_map import LinearMap
from convlayer.conic.program import Program
from convlayer.declaration.diagnose import (
    ProblemError,
    check_arguments,
    check_attributes,
    check_convexity,
)
from convlayer.declaration.domain import is_symmetric
from convlayer.declaration.graph import Contents, arguments_first
from convlayer.declaration.spelling import short
from convlayer.notices import quiet_cvxpy
from convlayer.solvers import SOLVERS, Solver

EVEN = (Power, cp.quad_over_lin, cp.huber)  # atoms that may square an absolute value or a norm


class CanonicalisationError(RuntimeError):
    """The installed CVXPY canonicalises in a way that our map does not reproduce."""


class _StandardForm(CLARABEL):
    """The cone program we ask CVXPY for: quadratic objective, all six cones, psd by its upper triangle, values not applied."""

    SUPPORTED_CONSTRAINTS = [cone for cone in CLARABEL.SUPPORTED_CONSTRAINTS if cone is not PowConeND]

    def apply(self, problem):
        problem, data, inverse_data = self._prepare_data_and_inv_data(problem)
        inverse_data[cp.settings.OFFSET] = 0.0
        return data, inverse_data


@dataclass(frozen=True, eq=False)
class ParameterEntries:
    """How a user's parameter is read: row-major, a symmetric one from both triangles alike, in a log-log program by its logarithm."""

    shape: tuple[int, ...]
    symmetric: bool
    log: bool

    def read(self, value: Tensor) -> Tensor:
        """(B, *shape) -> (B, size)."""
        if self.symmetric:
            value = (value + value.mT) / 2
        flat = value.flatten(1) if value.ndim > 1 else value.unsqueeze(1)
        return flat.log() if self.log else flat

    def pull_back(self, bar: Tensor, value: Tensor) -> Tensor:
        """The cotangent of `read`, (B, size) -> (B, *shape). Through a logarithm nothing comes of nothing, be the value what it may."""
        bar = bar.reshape(value.shape)
        if self.log:
            bar = torch.where(bar == 0, 0.0, bar / value)
        return (bar + bar.mT) / 2 if self.symmetric else bar


ZERO, ONE = 0, 1  # the inputs of an AffineMap before the parameters' own


class AffineMap:
    """From the parameters' entries to one of P, q, A, b, d, and back."""

    def __init__(self, matrix: sp.csr_array, sizes: Sequence[int], moving: np.ndarray | None) -> None:
        """matrix (values, 2 + all parameter entries); sizes of the parameters; moving: the outputs of which cotangents come back."""
        self._matrix, self._moving = matrix, moving
        self._starts = starts = np.cumsum([ONE + 1, *sizes])
        used = np.zeros(matrix.shape[1], dtype=bool)
        used[matrix.indices] = True
        self.parameters = [k for k in range(len(sizes)) if used[starts[k] : starts[k + 1]].any()]

    @cached_property
    def forward(self) -> LinearMap:
        """Of the constants and the entries of the parameters that it reads."""
        matrix, starts = self._matrix, self._starts
        if len(self.parameters) < len(starts) - 1:
            kept = np.zeros(matrix.shape[1], dtype=bool)
            kept[: ONE + 1] = True
            for k in self.parameters:
                kept[starts[k] : starts[k + 1]] = True
            place = np.cumsum(kept) - 1
            shape = matrix.shape[0], int(kept.sum())
            matrix = sp.csr_array((matrix.data, place[matrix.indices], matrix.indptr), shape=shape)
        return LinearMap(matrix, blank=ZERO)

    @cached_property
    def back(self) -> dict[int, LinearMap]:
        """For each parameter that it reads, from the outputs' cotangents to the parameter's."""
        starts, outputs = self._starts, self._matrix if self._moving is None else self._matrix[self._moving]
        columns = sp.csc_array(outputs)
        return {k: LinearMap(sp.csr_array(columns[:, starts[k] : starts[k + 1]].T)) for k in self.parameters}

    def __call__(self, entries: Sequence[Tensor], like: Tensor) -> Tensor:
        """Entries (B or 1, size) of every parameter -> (B or 1, values): shared where all that it reads is."""
        mine = [entries[k] for k in self.parameters]
        run = self.forward.run
        if run is not None and len(mine) == 1 and run.start > ONE:
            return mine[0][:, run.start - ONE - 1 : run.stop - ONE - 1]
        return self._applied(_constants(like.device, like.dtype), mine)

    def linear(self, directions: Sequence[Tensor], like: Tensor) -> Tensor:
        """The same of directions: without the constant part."""
        return self._applied(like.new_zeros(1, 2), [directions[k] for k in self.parameters])

    def _applied(self, head: Tensor, mine: Sequence[Tensor]) -> Tensor:
        batch = max((len(part) for part in mine), default=1)
        if any(len(part) == 0 for part in mine):
            batch = 0
        return self.forward(torch.cat([part.expand(batch, -1) for part in (head, *mine)], 1))


@cache
def _constants(device: torch.device, dtype: torch.dtype) -> Tensor:
    """(1, 2) the inputs of an AffineMap before the parameters' own."""
    return torch.tensor([[0.0, 1.0]], dtype=dtype).to(device)


@dataclass(frozen=True, eq=False)
class Recovery:
    """From (x, y) to one of the user's variables: value = coefficient * (x, y)[position], then exp in a log-log program."""

    shape: tuple[int, ...]
    dual: bool
    position: Tensor  # (size,) row-major order of the user's variable
    coefficient: Tensor | None  # (size,), None where all are one
    exp: bool

    def _on(self, device: torch.device) -> tuple[Tensor | slice, Tensor | None]:
        """Where the entries stand, as a slice if they stand in order, and their coefficients, on a device."""
        if device not in self._places:
            first, size = int(self.position[0]) if len(self.position) else 0, len(self.position)
            in_order = bool((self.position == torch.arange(first, first + size)).all())
            position = slice(first, first + size) if in_order else self.position.to(device)
            self._places[device] = position, None if self.coefficient is None else self.coefficient.to(device)
        return self._places[device]

    @cached_property
    def _places(self) -> dict[torch.device, tuple[Tensor | slice, Tensor | None]]:
        return {}

    def value(self, x: Tensor, y: Tensor) -> Tensor:
        """(B, n), (B, m) -> (B, *shape)."""
        source = y if self.dual else x
        position, coefficient = self._on(source.device)
        flat = source[:, position]
        if coefficient is not None:
            flat = flat * coefficient
        value = flat.reshape(len(x), *self.shape)
        return value.exp() if self.exp else value


@dataclass(frozen=True, eq=False)
class Canonical:
    """A problem, canonicalised once."""

    program: Program
    maps: dict[str, AffineMap]  # for each of P, q, A, b, d
    moving: dict[str, np.ndarray]  # for P and A: positions of the entries that depend on a parameter
    parameters: list[ParameterEntries]
    variables: list[Recovery]
    sign: float  # -1 where the user maximises
    gp: bool
    sizes: dict[str, int]  # the problem as the user wrote it, for explain()
    _matrices: dict[str, sp.csr_array]  # of the maps, with all their columns

    @cached_property
    def dense_maps(self) -> dict[str, AffineMap]:
        """The maps to whole matrices P and A in place of their stored entries, back from all entries of their cotangents."""
        program, sizes = self.program, [math.prod(p.shape) for p in self.parameters]
        n, m = program.n, program.m
        P, A = self._matrices["P"], self._matrices["A"]
        row = _row_of_each(P)
        i, j = program.P_rows[row], program.P_cols[row]
        below = i != j
        # Below the diagonal a symmetric parameter is read below its own, so that P is the parameter as it lies in memory.
        column = np.concatenate([P.indices, self._mirrored[P.indices[below]]])
        place = np.concatenate([i * n + j, (j * n + i)[below]])
        whole_P = sp.csr_array((np.concatenate([P.data, P.data[below]]), (place, column)), shape=(n * n, P.shape[1]))
        row = _row_of_each(A)
        place = program.A_rows[row] * n + program.A_cols[row]
        whole_A = sp.csr_array((A.data, (place, A.indices)), shape=(m * n, A.shape[1]))
        return {"P": AffineMap(whole_P, sizes, None), "A": AffineMap(whole_A, sizes, None)}

    @property
    def _mirrored(self) -> np.ndarray:
        """The inputs of the maps, with each entry of a symmetric parameter in the place of its mirror image."""
        order, start = np.arange(self._matrices["P"].shape[1]), ONE + 1
        for parameter in self.parameters:
            size = math.prod(parameter.shape)
            if parameter.symmetric:
                order[start : start + size] = order[start : start + size].reshape(parameter.shape).T.ravel()
            start += size
        return order

    @cached_property
    def visible(self) -> Visible:
        """What some output reads or some parameter moves, and the multipliers of curved cones: how x moves along one depends on them."""
        x, y = torch.zeros(self.program.n, dtype=torch.bool), torch.zeros(self.program.m, dtype=torch.bool)
        for recovery in self.variables:
            (y if recovery.dual else x)[recovery.position] = True
        for name, seen in (("q", x), ("b", y)):
            matrix = self._matrices[name]
            seen[torch.from_numpy(_row_of_each(matrix)[matrix.indices > ONE])] = True
        index = self.program.indices
        x[index["A_cols"][self.moving["A"]]] = True
        y[index["A_rows"][self.moving["A"]]] = True
        x[index["P_rows"][self.moving["P"]]] = True
        x[index["P_cols"][self.moving["P"]]] = True
        return Visible(x, y | self.program.cones.curved)

    @cached_property
    def constant(self) -> Tensor:
        """(m,) equalities whose coefficients no parameter moves."""
        rows = self.program.equalities.clone()
        rows[self.program.indices["A_rows"][self.moving["A"]]] = False
        return rows

    @cached_property
    def directions(self) -> list[dict[str, Tensor]]:
        """How P, q, A, b, d change in a random direction of each parameter, (1, values) each."""
        generator, like = torch.Generator().manual_seed(0), torch.zeros((), dtype=torch.float64)
        still = [torch.zeros(1, math.prod(parameter.shape), dtype=torch.float64) for parameter in self.parameters]
        found = []
        for k, parameter in enumerate(self.parameters):
            change = torch.randn(1, *parameter.shape, dtype=torch.float64, generator=generator)
            moved = ((change + change.mT) / 2 if parameter.symmetric else change).reshape(1, -1)
            entries = [*still[:k], moved, *still[k + 1 :]]
            found.append({name: mapping.linear(entries, like) for name, mapping in self.maps.items()})
        return found

    @cached_property
    def reading(self) -> tuple[Tensor, Tensor]:
        """Random cotangents of x (1, n) and y (1, m), through the outputs."""
        generator = torch.Generator().manual_seed(1)
        x, y = (torch.zeros(1, size, dtype=torch.float64) for size in (self.program.n, self.program.m))
        for recovery in self.variables:
            weights = torch.randn(1, len(recovery.position), dtype=torch.float64, generator=generator)
            if recovery.coefficient is not None:
                weights = weights * recovery.coefficient
            (y if recovery.dual else x).index_add_(1, recovery.position, weights)
        return x, y

    @cached_property
    def bounds(self) -> Bounds | None:
        """Of single variables that an output reads."""
        shown = np.zeros(self.program.n, dtype=bool)
        for recovery in self.variables:
            if not recovery.dual:
                shown[recovery.position.numpy()] = True
        return Bounds.of(self.program, *self._constants, shown)

    @cached_property
    def implied(self) -> Tensor | None:
        """Inequalities that a cone implies, whose multipliers are nobody's."""
        matrix = self._matrices["b"]
        b = matrix[:, [ONE]].toarray()[:, 0]
        b[_row_of_each(matrix)[matrix.indices > ONE]] = np.nan
        return implied(self.program, *self._constants, b, self.visible.y.numpy())

    @cached_property
    def limits(self) -> list[np.ndarray]:
        """For each parameter its entries (size,) that are right-hand sides of inequalities alone, where infinity has a meaning.

        Not in a log-log convex program, whose limits are logarithms within exponentials.
        """
        alone = np.ones(self._matrices["b"].shape[1], dtype=bool)
        inequalities = self.program.inequalities.numpy()
        for name, matrix in self._matrices.items():
            elsewhere = matrix[~inequalities] if name == "b" else matrix
            alone[np.unique(elsewhere.indices)] = False
        starts = np.cumsum([ONE + 1, *(math.prod(p.shape) for p in self.parameters)])
        return [alone[lo:hi] & (not self.gp) for lo, hi in pairwise(starts)]

    @cached_property
    def costs(self) -> list[int]:
        """The parameters that enter the linear costs and nothing else."""
        read = {name: set(mapping.parameters) for name, mapping in self.maps.items()}
        return sorted(read["q"] - read["P"] - read["A"] - read["b"])

    @cached_property
    def elimination(self) -> Elimination | None:
        """Of auxiliary variables, if that makes the program cheaper to solve and to differentiate."""
        return Elimination.of(self.program, *self._constants, self.visible, _row_seconds)

    @cached_property
    def dependence(self) -> Dependence | None:
        """Of equalities on each other, whatever the parameters."""
        return Dependence.of(self.program, *self._constants)

    @cached_property
    def _constants(self) -> tuple[np.ndarray, np.ndarray]:
        """(nnz(A),) which entries of A no parameter moves, and their values."""
        fixed, values = np.ones(len(self.program.A_rows), dtype=bool), np.zeros(len(self.program.A_rows))
        fixed[self.moving["A"]] = False
        matrix = self._matrices["A"]
        constant = matrix.indices == ONE
        values[_row_of_each(matrix)[constant]] = matrix.data[constant]
        return fixed, values

    def sizes_of_b(self, entries: Sequence[Tensor]) -> Tensor:
        """(B or 1, m) of the numbers whose sum is b: their rounding is b's own."""
        batch = max((len(part) for part in entries), default=1)
        ones = torch.ones(batch, 1, dtype=torch.float64)
        head = torch.cat([torch.zeros_like(ones), ones], 1)
        parts = [head, *(part.detach().abs().cpu().expand(batch, -1) for part in entries)]
        return torch.from_numpy(np.ascontiguousarray((abs(self._matrices["b"]) @ torch.cat(parts, 1).numpy().T).T))

    def objective(self, value: Tensor) -> Tensor:
        """The user's objective from the cone program's."""
        return self.sign * value if not self.gp else (self.sign * value).exp()


def _row_seconds(program: Program, dense: bool) -> float:
    """Of solving a row by the cheaper of the solvers that go row by row, its polish and its adjoint, `dense` or as is cheaper."""
    system = dense_seconds(program) if dense else system_seconds(program)
    solvers = (solver for solver in SOLVERS.values() if isinstance(solver, Solver))
    return min(solver.row_seconds(program) for solver in solvers) + 2 * system


def _not_canonicalised(error: Exception) -> ProblemError:
    """What CVXPY could not turn into cones, in the user's terms: the innermost atom that it was at when the error was raised."""
    atoms = []
    for frame, _ in traceback.walk_tb(error.__traceback__):
        atom = frame.f_locals.get("expr")
        if isinstance(atom, Atom) and frame.f_code.co_name.startswith("canonicalize"):
            atoms.append(atom)
    if isinstance(error, NotImplementedError):
        reason = "it has an atom inside another that takes no such argument"
    else:
        reason = f"its own code fails with {type(error).__name__}: {error}".rstrip(".")
    if not atoms:
        return ProblemError(f"CVXPY cannot canonicalise this problem: {reason}.")
    return ProblemError(f"CVXPY cannot canonicalise `{short(atoms[-1])}`: {reason}. Write it with other atoms.")


def canonicalise(
    problem: cp.Problem,
    parameters: Sequence[cp.Parameter],
    variables: Sequence[cp.Variable],
    *,
    gp: bool = False,
    checked: tuple[dict[int, Any], cp.Problem] | None = None,
) -> Canonical:
    """Canonicalise `problem` once and for all values of its parameters; `checked`: what `check` has returned for it.

    Errors: ValueError or TypeError naming the argument or the sub-expression at fault, and the remedy;
    CanonicalisationError if this CVXPY's cone program is not the one our map gives.
    """
    with quiet_cvxpy(), _as_deep_as_it_goes():
        owners, copy = checked or check(problem, parameters, variables, gp)
        copy = cp.Problem(copy.objective, copy.constraints)
        try:
            chain = _build_solving_chain(
                copy, _StandardForm(), make_problem_form(copy, gp, False), gp, enforce_dpp=True
            )
            data, inverse = chain.apply(copy)
        except RecursionError:
            raise
        except Exception as error:
            raise _not_canonicalised(error) from error
    inverse[-1] = SolverInverseData(inverse[-1], chain.solver, {})
    cone_program = data[cp.settings.PARAM_PROB]
    if (
        getattr(cone_program, "dir_cones", None)
        or cone_program.lower_bounds is not None
        or cone_program.upper_bounds is not None
    ):
        raise CanonicalisationError(
            "CVXPY left bounds or cones outside the constraint matrix; this version is not supported."
        )

    program, tensors = _tensors(cone_program)
    moving = {name: _moving_rows(tensors[name]) for name in ("P", "A")}
    reductions = list(zip(chain.reductions, inverse, strict=True))
    entries, matrices = _parameter_maps(parameters, reductions, cone_program, tensors)
    sizes = [p.size for p in parameters]
    canonical = Canonical(
        program=program,
        moving=moving,
        maps={name: AffineMap(matrix, sizes, moving.get(name)) for name, matrix in matrices.items()},
        parameters=entries,
        variables=_recoveries(variables, owners, reductions, cone_program, gp),
        sign=-1.0 if isinstance(problem.objective, cp.Maximize) else 1.0,
        gp=gp,
        sizes={
            "variables": sum(v.size for v in problem.variables()),
            "parameters": sum(p.size for p in parameters),
            "constraints": sum(int(np.prod(c.shape)) for c in problem.constraints),
        },
        _matrices=matrices,
    )
    _self_check(canonical, cone_program, parameters, reductions)
    return canonical


def check(
    problem: cp.Problem, parameters: Sequence[cp.Parameter], variables: Sequence[cp.Variable], gp: bool
) -> tuple[dict[int, Any], cp.Problem]:
    """Refuse what cannot be a layer. Returns (dual variable id -> its constraint, the problem as it will be canonicalised)."""
    with _as_deep_as_it_goes():
        owners = check_arguments(problem, parameters, variables)
        check_attributes(problem)
        copy = problem if gp else _without_parametrised_arguments(problem)
        check_convexity(copy, gp)
        return owners, copy if gp else _without_hidden_kinks(copy)


@contextmanager
def _as_deep_as_it_goes() -> Iterator[None]:
    """CVXPY walks expressions by recursion."""
    try:
        yield
    except RecursionError:
        raise ProblemError(
            "An expression of the problem has more operations within each other than CVXPY can follow (Python's recursion limit is "
            f"{sys.getrecursionlimit()}). Give what is computed step by step a variable of its own, as in x[t + 1] == A @ x[t] + B @ u[t], "
            "or raise the limit by sys.setrecursionlimit."
        ) from None


def _without_parametrised_arguments(problem: cp.Problem) -> cp.Problem:
    """The problem with y in place of x - p in each quad_form(x - p, K) of the objective, K constant, and y == x - p.

    (x - p)'K(x - p) is DPP, but its constant is quadratic in p; with y the objective stays quadratic and affine in p.
    """
    contents, expression = Contents(), problem.objective.expr

    def replaced(part: Any) -> bool:
        return (
            isinstance(part, cp.QuadForm)
            and contents.parameters(part.args[0])
            and not contents.parameters(part.args[1])
        )

    equalities: list[cp.Constraint] = []

    def given(part: Any, arguments: list[Any]) -> Any:
        if not replaced(part):
            return None
        y = cp.Variable(part.args[0].shape)
        equalities.append(y == part.args[0])
        return part.copy([y, part.args[1]])

    new = _rewritten([expression], given)
    if id(expression) not in new:
        return problem
    return cp.Problem(type(problem.objective)(new[id(expression)]), [*problem.constraints, *equalities])


def _rewritten(roots: Sequence[Any], rule: Callable[[Any, list[Any]], Any]) -> dict[int, Any]:
    """By id, what stands in the place of each part that a rule replaces, or that holds one that it does.

    rule: a part that is not affine, and its arguments as they now are -> what it becomes, None if it stays as it is.
    """
    new: dict[int, Any] = {}
    for part in arguments_first(roots, lambda part: not _is_affine(part)):
        inner = [new.get(id(argument), argument) for argument in part.args]
        changed = rule(part, inner)
        if changed is None and any(now is not before for now, before in zip(inner, part.args, strict=True)):
            changed = part.copy(inner)
        if changed is not None:
            new[id(part)] = changed
    return new


def _is_affine(part: Any) -> bool:
    with scopes.dpp_scope():
        return part.is_affine()


def _without_hidden_kinks(problem: cp.Problem) -> cp.Problem:
    """The problem with f(z) in place of f(|z|), f an even power, a sum of squares or a Huber function, and z'z in place of |z|^2.

    CVXPY writes them as f(t), t >= |z|, which has a kink at z = 0 where f(|z|) has none.
    """
    objective = problem.objective.expr
    arguments = [argument for constraint in problem.constraints for argument in constraint.args]
    new = _rewritten([objective, *arguments], _even)
    if not new:
        return problem
    constraints = [
        constraint.copy([new.get(id(argument), argument) for argument in constraint.args])
        if any(id(argument) in new for argument in constraint.args)
        else constraint
        for constraint in problem.constraints
    ]
    return cp.Problem(type(problem.objective)(new.get(id(objective), objective)), constraints)


def _even(expression: Any, arguments: list[Any]) -> Any:
    """The expression without the absolute value or the norm that it squares; None: it squares none."""
    if not isinstance(expression, EVEN):
        return None
    square = isinstance(expression, cp.quad_over_lin)
    if isinstance(expression, Power):
        exponent = expression.p.value if isinstance(expression.p, cp.Expression) else expression.p
        if exponent is None or exponent % 2 or exponent <= 0:
            return None
        square = exponent == 2
    inner, *rest = arguments
    if isinstance(inner, cp.abs):
        return expression.copy([inner.args[0], *rest])
    if square and isinstance(inner, Pnorm) and inner.p == 2 and inner.axis is None and not inner.keepdims:
        return (
            cp.sum_squares(inner.args[0]) if isinstance(expression, Power) else expression.copy([inner.args[0], *rest])
        )
    return None


def _tensors(cone_program) -> tuple[Program, dict[str, sp.csr_array]]:
    """CVXPY's tensors: for each of P, q, A, b, d a row for each stored value, a column for each parameter entry and one for the constant."""
    n, m = cone_program.x.size, int(cone_program.constr_size)
    columns = cone_program.q.shape[1]

    A = sp.coo_array(cone_program.A)
    row, col = A.row.astype(np.int64), A.col
    i, j = (row % m, row // m) if m else (row, row)
    in_A = (j < n) & (A.data != 0)
    A_key, A_position = np.unique(j[in_A] * max(m, 1) + i[in_A], return_inverse=True)
    A_cols, A_rows = np.divmod(A_key, max(m, 1))
    # CVXPY's tensor holds the expression inside the cone: s = -(A x) + b in our sign.
    A_part = sp.csr_array((-A.data[in_A], (A_position, col[in_A])), shape=(len(A_key), columns))
    b_part = sp.csr_array((A.data[j == n], (i[j == n], col[j == n])), shape=(m, columns))

    if cone_program.P is None:
        P_rows = P_cols = np.zeros(0, dtype=np.int64)
        P_part = sp.csr_array((0, columns))
    else:
        P = sp.coo_array(cone_program.P)
        i, j = P.row.astype(np.int64) % n, P.row.astype(np.int64) // n
        upper, lower = np.minimum(i, j), np.maximum(i, j)
        P_key, P_position = np.unique(lower * n + upper, return_inverse=True)
        P_cols, P_rows = np.divmod(P_key, n)
        P_part = sp.csr_array((np.where(i == j, 1.0, 0.5) * P.data, (P_position, P.col)), shape=(len(P_key), columns))

    q = sp.csr_array(cone_program.q)
    tensors = {"P": P_part, "q": q[:n], "A": A_part, "b": b_part, "d": q[n:]}
    for tensor in tensors.values():
        tensor.sum_duplicates()
        tensor.eliminate_zeros()
    in_b, dims = tensors["b"], cone_program.cone_dims
    row = np.repeat(np.arange(m), np.diff(in_b.indptr))
    inequality = (row >= dims.zero) & (row < dims.zero + dims.nonneg)
    infinite = np.isinf(in_b.data) & inequality & (in_b.indices == columns - 1)
    in_b.data[infinite] = np.sign(in_b.data[infinite]) * NO_BOUND
    if not all(np.isfinite(tensor.data).all() for tensor in tensors.values()):
        raise ProblemError(
            "A constant of the problem holds NaN or infinity. Infinity means `no bound` on the large side of an inequality, as in "
            "x <= np.inf, and nothing elsewhere."
        )

    cones = Product.from_dims(
        zero=dims.zero,
        nonnegative=dims.nonneg,
        second_order=tuple(dims.soc),
        psd=tuple(dims.psd),
        exponential=dims.exp,
        power=tuple(float(a) for a in dims.p3d),
    )
    if cones.size != m or dims.pnd:
        raise CanonicalisationError(
            f"CVXPY's cones have {cones.size} rows and its matrix {m}; this version is not supported."
        )
    return Program(n, m, cones, P_rows, P_cols, A_rows, A_cols), tensors


def _parameter_maps(
    parameters, reductions, cone_program, tensors
) -> tuple[list[ParameterEntries], dict[str, sp.csr_array]]:
    """How each parameter is read, and for each of P, q, A, b, d the matrix (values, 2 + all entries) of its map."""
    final = _final_parameters(parameters, reductions)
    entries, first = [], ONE + 1
    target = np.full(
        cone_program.total_param_size + 1, ONE
    )  # of each of CVXPY's columns, of which the last is the constant
    for parameter, (canonical, reduced) in zip(parameters, final, strict=True):
        if canonical is not parameter and parameter.id in cone_program.param_id_to_col:
            raise ValueError(
                f"Parameter `{parameter.name()}` stands both as a factor and as an exponent of the log-log convex program; "
                "use two parameters and pass the same tensor twice."
            )
        entries.append(
            ParameterEntries(tuple(parameter.shape), is_symmetric(parameter), log=canonical is not parameter)
        )
        if reduced.id in cone_program.param_id_to_col:
            read = _positions(canonical, reduced)
            start = cone_program.param_id_to_col[reduced.id]
            target[start : start + len(read)] = first + read
        first += parameter.size
    return entries, {name: _relabelled(tensor, target, first) for name, tensor in tensors.items()}


def _relabelled(tensor: sp.csr_array, target: np.ndarray, width: int) -> sp.csr_array:
    """With each column in the place of its target; no two have the same."""
    matrix = sp.csr_array((tensor.data, target[tensor.indices], tensor.indptr), shape=(tensor.shape[0], width))
    matrix.sort_indices()
    return matrix


def _positions(canonical: cp.Parameter, reduced: cp.Parameter) -> np.ndarray:
    """The row-major positions in a parameter of the entries that stand in the cone program, in CVXPY's order."""
    positions = np.arange(canonical.size).reshape(canonical.shape)
    read = positions if reduced is canonical else np.asarray(lower_value(canonical, positions))
    return read.flatten(order="F").astype(np.int64)


def _row_of_each(matrix: sp.csr_array) -> np.ndarray:
    """The row of each stored entry."""
    return np.repeat(np.arange(matrix.shape[0]), np.diff(matrix.indptr))


def _moving_rows(tensor: sp.csr_array) -> np.ndarray:
    """The values that some parameter moves: entries before the last column."""
    moving = np.zeros(tensor.shape[0], dtype=bool)
    moving[_row_of_each(tensor)[tensor.indices < tensor.shape[1] - 1]] = True
    return np.flatnonzero(moving)


def _final_parameters(parameters, reductions) -> list[tuple[cp.Parameter, cp.Parameter]]:
    """For each parameter: (it or its logarithm, the reduced one that stands in the cone program)."""
    logs: dict = {}
    lowered: dict = {}
    for reduction, _ in reductions:
        if isinstance(reduction, Dgp2Dcp):
            logs = reduction.canon_methods._parameters
        elif isinstance(reduction, CvxAttr2Constr):
            lowered.update({p.id: q for p, q in reduction._parameters.items()})
    canonical = [logs.get(p, p) for p in parameters]
    return [(p, lowered.get(p.id, p)) for p in canonical]


def _invert_primal(x: np.ndarray, reductions, cone_program) -> dict[int, np.ndarray]:
    """The user's variables (their logarithms in a log-log program) from x, by CVXPY's own reductions, without projecting."""
    values = cone_program.split_solution(x)
    for reduction, _ in reversed(reductions):
        if isinstance(reduction, Dgp2Dcp):
            origin = {new.id: old.id for old, new in reduction.canon_methods._variables.items()}
            values = {origin.get(key, key): value for key, value in values.items()}
        else:
            values = reduction.var_forward(values)
    return {key: value.toarray() if sp.issparse(value) else np.asarray(value) for key, value in values.items()}


def _invert_dual(y: np.ndarray, constraint, reductions, cone_program) -> list[np.ndarray]:
    """The dual variables of one of the user's constraints from y, by CVXPY's own reductions."""
    solution = SimpleNamespace(
        status="Solved", x=np.zeros(cone_program.x.size), z=y, obj_val=0.0, solve_time=0.0, iterations=0
    )
    for reduction, inverse in reversed(reductions):
        if isinstance(reduction, Dgp2Dcp):
            solution = Canonicalization.invert(reduction, solution, inverse)
        else:
            solution = reduction.invert(solution, inverse)
    if constraint.id not in solution.dual_vars:
        raise ValueError(f"CVXPY gives no dual variable for constraint `{short(constraint)}`.")
    before = [dual.value for dual in constraint.dual_variables]
    constraint.save_dual_value(solution.dual_vars[constraint.id])
    values = [
        np.asarray(dual.value.toarray() if sp.issparse(dual.value) else dual.value)
        for dual in constraint.dual_variables
    ]
    for dual, value in zip(constraint.dual_variables, before, strict=True):
        dual.save_value(value)
    return values


def _recoveries(variables, owners, reductions, cone_program, gp) -> list[Recovery]:
    """Of each variable, by CVXPY's own inverse: a few evaluations of it, which give all variables at once."""
    inverted: dict[Any, tuple[np.ndarray, list]] = {}  # by the constraint whose multipliers they are; None: of x
    found = []
    for variable in variables:
        owner = owners.get(variable.id)
        key = None if owner is None else owner.id
        if key not in inverted:
            size = cone_program.x.size if owner is None else int(cone_program.constr_size)
            probe = np.random.default_rng(0).standard_normal(size)
            points = [np.arange(1, size + 1, dtype=float), np.arange(1, size + 1, dtype=float) ** 2, probe]
            inverted[key] = probe, [_inverted(point, owner, reductions, cone_program) for point in points]
        found.append(_recovery(variable, owner is not None, gp, *inverted[key]))
    return found


def _inverted(point: np.ndarray, owner, reductions, cone_program) -> dict[int, np.ndarray]:
    """By id, the variables from x; with an owner its dual variables from y."""
    if owner is None:
        return _invert_primal(point, reductions, cone_program)
    values = _invert_dual(point, owner, reductions, cone_program)
    return {dual.id: value for dual, value in zip(owner.dual_variables, values, strict=True)}


def _recovery(variable, dual: bool, gp: bool, probe: np.ndarray, inverted: list[dict[int, np.ndarray]]) -> Recovery:
    """From the variable's values at i + 1, at its square, and at a random probe: two tell the map, the third checks it."""
    first, second, third = (
        np.asarray(values[variable.id].reshape(variable.shape), dtype=float).ravel() for values in inverted
    )
    position, coefficient = _gathered(first, second, len(probe))
    expected = coefficient * (probe[position] if len(probe) else 0.0)
    if not (np.abs(third - expected) <= 1e-12 + 1e-9 * np.abs(expected)).all():
        raise CanonicalisationError(f"The map to variable `{variable.name()}` does not reproduce CVXPY's.")
    exact = bool(np.all(coefficient == 1.0))
    return Recovery(
        tuple(variable.shape),
        dual,
        torch.from_numpy(position),
        None if exact else torch.from_numpy(coefficient),
        gp and not dual,
    )


def _gathered(first: np.ndarray, second: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Read off a map that gathers entries and scales each: (positions, coefficients) from two evaluations.

    With input i + 1 an output is c (i + 1), with (i + 1)^2 it is c (i + 1)^2: their ratio tells the position.
    """
    used = first != 0
    position = np.zeros(len(first), dtype=np.int64)
    position[used] = np.rint(second[used] / first[used]).astype(np.int64) - 1
    if used.any() and not (position.min() >= 0 and position.max() < size):
        raise CanonicalisationError("CVXPY recovers a variable by more than a gather; this version is not supported.")
    return position, np.where(used, first / (position + 1), 0.0)


def _self_check(canonical: Canonical, cone_program, parameters, reductions) -> None:
    """Compare our map with CVXPY's own matrices at random parameter entries."""
    random = np.random.default_rng(0)
    theta = random.standard_normal(cone_program.total_param_size + 1)
    theta[-1] = 1.0
    values = {
        p.id: theta[cone_program.param_id_to_col[p.id] :][: p.size].reshape(p.shape, order="F")
        for p in cone_program.parameters
    }
    quadratic = cone_program.P is not None
    applied = cone_program.apply_parameters(values, quad_obj=quadratic)
    P, q, d, A, b = applied if quadratic else (None, *applied)

    final = _final_parameters(parameters, reductions)
    stacked = [np.array([0.0, 1.0])]
    for parameter, reduced in final:
        whole = np.zeros(parameter.size)
        if reduced.id in values:
            whole[_positions(parameter, reduced)] = np.asarray(values[reduced.id]).flatten(order="F")
        stacked.append(whole)
    ours = {name: matrix @ np.concatenate(stacked) for name, matrix in canonical._matrices.items()}
    program = canonical.program
    A = sp.coo_array(A)
    checks = [
        (_apart(ours["A"], (program.A_rows, program.A_cols), -A.data, (A.row, A.col), program.m), "A"),
        (np.abs(ours["q"] - q).max(initial=0.0), "q"),
        (np.abs(ours["d"] - d).max(initial=0.0), "offset"),
    ]
    if program.m:
        checks.append((np.abs(ours["b"] - np.where(np.isinf(b), np.sign(b) * NO_BOUND, b)).max(), "b"))
    if quadratic:
        P = sp.coo_array(P)
        upper = np.minimum(P.row, P.col), np.maximum(P.row, P.col)
        halved = np.where(P.row == P.col, 1.0, 0.5) * P.data  # an entry and its mirror image make the symmetric part
        checks.append((_apart(ours["P"], (program.P_rows, program.P_cols), halved, upper, program.n), "P"))
    scale = 1.0 + max(np.abs(part).max(initial=0.0) for part in (A.data, q, b[np.isfinite(b)]))
    for difference, name in checks:
        if not difference <= 1e-10 * scale:
            raise CanonicalisationError(
                f"Our {name} differs from the one of CVXPY {cp.__version__}; this version is not supported."
            )


def _apart(
    ours: np.ndarray,
    places: tuple[np.ndarray, np.ndarray],
    theirs: np.ndarray,
    their_places: tuple[np.ndarray, np.ndarray],
    rows: int,
) -> float:
    """The largest entry of the difference of two matrices, each given by values and (rows, columns)."""
    places, their_places = ((row.astype(np.int64), column.astype(np.int64)) for row, column in (places, their_places))
    key = np.concatenate([row + max(rows, 1) * column for row, column in (places, their_places)])
    _, entry = np.unique(key, return_inverse=True)
    return float(np.abs(np.bincount(entry, np.concatenate([ours, -theirs]))).max(initial=0.0))

"""Leading (or trailing) eigenspace, as the relaxation over 0 <= Z <= I with a given trace."""

from __future__ import annotations

import cvxpy as cp
import numpy as np
import torch
from torch import Tensor

from convlayer.declaration.affine import NONE, Table
from convlayer.declaration.normal_form import NormalForm
from convlayer.kernels.answer import Answer, answered
from convlayer.kernels.leading_eigenspace import leading_eigenspace
from convlayer.structures.reading import (
    Placement,
    equalities,
    in_cone,
    is_whole_parameter,
    linear_cost,
    no_cones,
    one_value,
    only,
    require,
    rows_binding,
    words,
)
from convlayer.structures.structure import (
    Cost,
    DeclaredProblem,
    Dual,
    Match,
    Structure,
    Wanted,
    normal,
)


class LeadingEigenspace(Structure):
    """maximise <X, Z> subject to tr Z = k u, 0 <= Z <= u I; for k = 1 the upper bound may be left
    out."""

    name = "leading_eigenspace"
    refines = "cone_program"

    def declare(self) -> DeclaredProblem:
        X, Z = cp.Parameter((5, 5), symmetric=True), cp.Variable((5, 5), symmetric=True)
        rules = [cp.trace(Z) == 2, Z >> 0, np.eye(5) - Z >> 0]
        return cp.Problem(cp.Maximize(cp.trace(X @ Z)), rules), [X], [Z]

    def sample(self, batch: tuple[int, ...], generator: torch.Generator) -> tuple[Tensor, ...]:
        X = normal(generator, *batch, 5, 5)
        return ((X + X.mT) / 2,)

    def near_misses(self) -> dict[str, DeclaredProblem]:
        X, Z, Y = (
            cp.Parameter((5, 5), symmetric=True),
            cp.Variable((5, 5), symmetric=True),
            cp.Variable((5, 5)),
        )
        gain, unit, psd = cp.trace(X @ Z), cp.trace(Z) == 1, Z >> 0
        problems = {
            "at most": (gain, [cp.trace(Z) <= 1, psd], Z),
            "a diagonal": (gain, [cp.diag(Z) == 1, psd], Z),
            "one more constraint": (gain, [unit, psd, Z[0, 0] >= 0.1], Z),
            "a weighted trace": (gain, [cp.trace(np.diag([1.0, 2, 1, 1, 1]) @ Z) == 1, psd], Z),
            "a trace that is no whole multiple of the bound": (
                gain,
                [cp.trace(Z) == 2.5, psd, np.eye(5) - Z >> 0],
                Z,
            ),
            "an unequal bound": (
                gain,
                [cp.trace(Z) == 2, psd, np.diag([1.0, 2, 1, 1, 1]) - Z >> 0],
                Z,
            ),
            "not symmetric": (cp.trace(X @ Y), [cp.trace(Y) == 1, Y >> 0], Y),
            "shifted": (gain, [unit, Z - 0.01 * np.eye(5) >> 0], Z),
            "a square beside": (gain - cp.sum_squares(Z), [unit, psd], Z),
            "no cone": (gain - cp.sum_squares(Z), [unit], Z),
            "a block": (cp.trace(X @ Z), [cp.trace(Z) == 1, Z[:4, :4] >> 0], Z),
        }
        return {
            k: (cp.Problem(cp.Maximize(f), rules), [X], [v])
            for k, (f, rules, v) in problems.items()
        }

    def gap(self, answer: Answer) -> Tensor:
        """Between the eigenvalues on either side of the cut, relative to the largest; zero where
        the kernel finds them tied."""
        # Of slack = edge I - matrix, or its negative, the eigenvalues beyond the cut are positive.
        _, edge, slack = answer.outputs
        eigenvalues = torch.linalg.eigvalsh(slack)
        size = (edge - eigenvalues).abs().amax(1)
        rounding = (4 * torch.finfo(torch.float64).eps * eigenvalues.shape[1] * size).unsqueeze(1)
        gap = torch.where(eigenvalues > rounding, eigenvalues, torch.inf).amin(1) / size.clamp(
            min=1e-300
        )
        return gap if answer.degenerate is None else gap.masked_fill(answer.degenerate, 0.0)

    def match(self, form: NormalForm) -> Match:
        # Is it this problem, with every coefficient?
        only(form, tied=True)
        no_cones(form, "zero", "psd")
        require(
            len(form.variables) == 1 and len(form.tied) == 1,
            "its variable is not one symmetric matrix",
        )
        n = form.variables[0].shape[0]
        diagonal = np.arange(n) * (n + 1)
        trace, scale, total = _trace(form, diagonal)
        lower, bound = _cones(form, n, diagonal)
        k = 1 if bound is None else _multiple(total, bound)
        require(k <= n, "the trace exceeds what the bound allows")
        cost = linear_cost(form)
        placement = Placement(Placement.of(form).position, (n, n))
        # Minimising <C, Z>: of C as it stands the trailing eigenspace, or of -C the leading one,
        # whichever is the Parameter itself.
        leading = bool(len(cost.coefficient)) and cost.coefficient[0] < 0
        unit = total if bound is None else bound
        fixed = bool((unit.parameter == NONE).all())
        require(not fixed or unit.coefficient.sum() > 0, "the trace is not positive")
        plain = fixed and float(unit.coefficient.sum()) == 1.0

        # The kernel, bound to the parameters once the structure is chosen.
        def build(wanted: Wanted):
            X = placement.binding(form, cost.scaled(-1.0) if leading else cost)
            size = rows_binding(form, unit)

            def run(values, like, at=None):
                matrix = X(values, like)
                answer = answered(at, lambda matrix: leading_eigenspace(matrix, k, leading), matrix)
                if plain and not wanted.duals:
                    return answer
                Z, edge = answer.outputs
                if not plain:
                    scale = size(values, like)
                    answer = answer.unsettled(scale[:, 0] < 0)
                    Z = Z * scale[..., None]
                if not wanted.duals:
                    return answer.with_outputs(Z)
                sign = 1.0 if leading else -1.0
                identity = torch.eye(n, dtype=Z.dtype, device=Z.device)
                slack = sign * (edge[:, None, None] * identity - (matrix + matrix.mT) / 2)
                return answer.with_outputs(Z, sign * edge[:, None], slack)

            return run

        # Where the multipliers stand in its answer.
        duals = {}
        if bound is None:
            duals[trace] = Dual(1, np.zeros(1, dtype=np.int64), np.full(1, 1.0 / scale))
            # Of two cones that say the same, neither's multiplier is unique.
            if len(lower) == 1:
                ((cone, factor),) = lower.items()
                duals[cone] = Dual(2, placement.position, np.full(n * n, 1.0 / factor))
        what = "leading" if leading else "trailing"
        return Match(
            words(form, matrix=cost, trace=total) + f"; the {what} {k} of {n}",
            build,
            placement.position,
            Cost(flops=11.0 * n**3 + (8.0 * n**2 if k == 1 else 8.0 * n**3), bytes=80.0 * n**2),
            duals=duals,
            symmetrises=is_whole_parameter(form, cost, n),
        )


def _trace(form: NormalForm, diagonal: np.ndarray) -> tuple[int, float, Table]:
    """(the constraint, its coefficient, the trace)."""
    count = sum(constraint.table.size for _, constraint in in_cone(form, "zero"))
    require(count == 1, "it has more equalities than a trace" if count else "it has no trace")
    (row,) = equalities(form)
    require(np.array_equal(np.sort(row.variable), diagonal), "its equality is not a trace")
    require(bool((row.coefficient == row.coefficient[0]).all()), "its trace is weighted")
    scale = float(row.coefficient[0])
    return row.constraint, scale, row.offset.scaled(-1.0 / scale).normal


def _cones(form: NormalForm, n: int, diagonal: np.ndarray) -> tuple[dict[int, float], Table | None]:
    """(by constraint the factor c of each c Z >= 0, the bound u of Z <= u I or None)."""
    entries = np.arange(n * n)
    mirrored = entries.reshape(n, n).T.ravel()
    lower: dict[int, float] = {}
    bound: Table | None = None
    for k, constraint in in_cone(form, "psd"):
        reason = f"`{constraint.text}` is not a bound on the whole matrix"
        table = constraint.table
        require(table.size == n * n, reason)
        moving, offset = table.linear().normal, table.offset().normal
        require(np.array_equal(moving.row, entries), reason)
        require(
            np.array_equal(moving.variable, entries) or np.array_equal(moving.variable, mirrored),
            reason,
        )
        require(bool((moving.parameter == NONE).all()), reason)
        factor = float(moving.coefficient[0])
        require(bool((moving.coefficient == factor).all()), reason)
        if factor > 0:
            require(not len(offset.row), reason)
            lower[k] = factor
            continue
        require(bound is None, "it has two upper bounds")
        on_diagonal = (offset.row % (n + 1) == 0) & (offset.row < n * n)
        require(bool(on_diagonal.all()), reason)
        rows = Table(
            n, offset.row // (n + 1), offset.variable, offset.parameter, offset.coefficient
        )
        bound = one_value(rows, n, reason).scaled(-1.0 / factor)
    require(bool(lower), "its matrix is not positive semidefinite")
    return lower, bound


def _multiple(total: Table, bound: Table) -> int:
    """k with total = k bound, whatever the parameters."""
    reason = "the trace is not a whole multiple of the upper bound"
    total, bound = total.normal, bound.normal
    require(
        len(total.row) == len(bound.row) and np.array_equal(total.parameter, bound.parameter),
        reason,
    )
    ratio = total.coefficient / bound.coefficient
    require(
        len(ratio) > 0
        and np.allclose(ratio, np.rint(ratio[0]), rtol=1e-12, atol=0.0)
        and ratio[0] > 0.5,
        reason,
    )
    return int(np.rint(ratio[0]))

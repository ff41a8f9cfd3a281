"""Entropic optimal transport between two marginals."""

from __future__ import annotations

from dataclasses import dataclass

import cvxpy as cp
import numpy as np
import torch
from torch import Tensor

from convlayer.declaration.affine import NONE, stack
from convlayer.declaration.atoms.entropy import Entropy
from convlayer.declaration.normal_form import NormalForm
from convlayer.kernels.answer import answered
from convlayer.kernels.entropic_optimal_transport import entropic_optimal_transport
from convlayer.solution import Cause
from convlayer.structures.reading import (
    Equality,
    Placement,
    equalities,
    in_cone,
    linear_cost,
    no_cones,
    one_value,
    only,
    plain_entropy,
    require,
    rows_binding,
    signs,
    words,
    zero_duals,
)
from convlayer.structures.structure import (
    Cost,
    DeclaredProblem,
    Dual,
    Match,
    Structure,
    Wanted,
    uniform,
)


class EntropicOptimalTransport(Structure):
    """minimise <M, P> - eps sum entr(P) subject to P 1 = r, P'1 = c, P >= 0."""

    name = "entropic_optimal_transport"
    cause = Cause.ILL_CONDITIONED
    refines = "cone_program"

    def declare(self) -> DeclaredProblem:
        M, r, c = cp.Parameter((4, 3)), cp.Parameter(4, nonneg=True), cp.Parameter(3, nonneg=True)
        eps, P = cp.Parameter(nonneg=True), cp.Variable((4, 3))
        objective = cp.Minimize(cp.sum(cp.multiply(M, P)) - eps * cp.sum(cp.entr(P)))
        rules = [cp.sum(P, axis=1) == r, cp.sum(P, axis=0) == c, P >= 0]
        return cp.Problem(objective, rules), [M, r, c, eps], [P]

    def sample(self, batch: tuple[int, ...], generator: torch.Generator) -> tuple[Tensor, ...]:
        M, r, c = (
            uniform(generator, low, 1, *batch, *shape)
            for low, shape in ((0, (4, 3)), (0.5, (4,)), (0.5, (3,)))
        )
        r, c = r / r.sum(-1, keepdim=True), c / c.sum(-1, keepdim=True)
        return M, r, c, uniform(generator, 0.1, 0.5, *batch)

    def near_misses(self) -> dict[str, DeclaredProblem]:
        M, r, c = cp.Parameter((4, 3)), cp.Parameter(4, nonneg=True), cp.Parameter(3, nonneg=True)
        P, W = cp.Variable((4, 3)), cp.Parameter((4, 3), nonneg=True)
        cost, entropy = cp.sum(cp.multiply(M, P)), 0.1 * cp.sum(cp.entr(P))
        rows, columns = cp.sum(P, axis=1) == r, cp.sum(P, axis=0) == c
        problems = {
            "one marginal": (cost - entropy, [rows], [M, r]),
            "a cap": (cost - entropy, [rows, columns, P <= 0.3], [M, r, c]),
            "an inequality": (cost - entropy, [cp.sum(P, axis=1) <= r, columns], [M, r, c]),
            "unequal temperatures": (
                cost - cp.sum(cp.multiply(W, cp.entr(P))),
                [rows, columns],
                [M, W, r, c],
            ),
            "a forbidden pair": (cost - entropy, [rows, columns, P[0, 0] == 0], [M, r, c]),
            "weighted rows": (cost - entropy, [P @ np.array([1.0, 2, 1]) == r, columns], [M, r, c]),
            "no entropy": (cost, [rows, columns, P >= 0], [M, r, c]),
            "a square instead": (cost + cp.sum_squares(P), [rows, columns, P >= 0], [M, r, c]),
            "a missing column": (cost - entropy, [rows, cp.sum(P, axis=0)[1:] == c[1:]], [M, r, c]),
            "a third marginal": (
                cost - entropy,
                [rows, columns, P[0, 0] + P[1, 1] + P[2, 2] == 0.3],
                [M, r, c],
            ),
        }
        return {
            k: (cp.Problem(cp.Minimize(f), rules), leaves, [P])
            for k, (f, rules, leaves) in problems.items()
        }

    def match(self, form: NormalForm) -> Match:
        # Is it this problem, with every coefficient?
        only(form, Entropy)
        no_cones(form, "zero", "nonnegative")
        plain_entropy(form)
        temperature = one_value(
            form.of(Entropy).weight, form.n, "the entropies have unequal weights"
        )
        grid = _grid(form)
        sign_rows = signs(form)
        placement = Placement(grid.position, (len(grid.rows), len(grid.columns)))
        cost = linear_cost(form)
        first, second = (
            stack([row.offset.scaled(-1.0 / row.coefficient[0]) for row in side])
            for side in (grid.rows, grid.columns)
        )

        # The kernel, bound to the parameters once the structure is chosen.
        def build(wanted: Wanted):
            M = placement.binding(form, cost)
            r, c, eps = (
                rows_binding(form, first),
                rows_binding(form, second),
                rows_binding(form, temperature),
            )

            def run(values, like, at=None):
                inputs = M(values, like), r(values, like), c(values, like), eps(values, like)[:, 0]
                answer = answered(at, entropic_optimal_transport, *inputs)
                # Its multipliers are known up to a constant moved from one marginal to the other:
                # those of least norm.
                return answer.flagged() if wanted.duals else answer

            return run

        m, n = placement.shape
        small = min(m, n)
        return Match(
            words(form, cost=cost, rows=first, columns=second, epsilon=temperature),
            build,
            placement.position,
            Cost(
                flops=60.0 * 20 * m * n + 8 * (small**3 / 3 + m * n * small),
                bytes=60.0 * 16 * m * n,
            ),
            duals={**zero_duals(sign_rows), **_duals(form, grid)},
        )


@dataclass(frozen=True, eq=False)
class _Grid:
    """Two families of sums, each entry of x in one of either."""

    rows: list[Equality]
    columns: list[Equality]
    position: np.ndarray  # (n,) row-major place of each entry of x in the plan


def _grid(form: NormalForm) -> _Grid:
    entries = sum(int((c.table.variable != NONE).sum()) for _, c in in_cone(form, "zero"))
    require(entries == 2 * form.n, "not every entry is in two marginals")
    sums = equalities(form)
    require(len(sums) >= 2, "it has no two marginals")
    for row in sums:
        require(bool((row.coefficient == row.coefficient[0]).all()), "a marginal is a weighted sum")
        require(
            len(np.unique(row.variable)) == len(row.variable), "a marginal counts an entry twice"
        )
    member = np.concatenate([row.variable for row in sums])
    which = np.repeat(np.arange(len(sums)), [len(row.variable) for row in sums])
    require(
        bool((np.bincount(member, minlength=form.n) == 2).all()),
        "not every entry is in two marginals",
    )
    pair = which[np.argsort(member, kind="stable")].reshape(form.n, 2)
    # The sums that meet the first one are of the other family; the rest are of its own.
    other = np.zeros(len(sums), dtype=bool)
    other[pair[(pair == 0).any(1)].ravel()] = True
    other[0] = False
    reason = "its sums are not the rows and columns of one table"
    require(bool((other[pair].sum(1) == 1).all()), reason)
    families = np.flatnonzero(~other), np.flatnonzero(other)
    require(len(families[0]) * len(families[1]) == form.n, reason)
    of_row = np.where(other[pair[:, 0]], pair[:, 1], pair[:, 0])
    of_column = np.where(other[pair[:, 0]], pair[:, 0], pair[:, 1])
    rank = np.zeros(len(sums), dtype=np.int64)
    for family in families:
        rank[family] = np.arange(len(family))
    i, j = rank[of_row], rank[of_column]
    require(len(np.unique(i * len(families[1]) + j)) == form.n, reason)
    # Rows are what runs along the first axis of a matrix variable: no copy is then needed.
    shape = (len(families[0]), len(families[1]))
    if (
        len(form.variables) == 1
        and form.variables[0].shape == shape[::-1]
        and not np.array_equal(i, np.arange(form.n) % shape[0])
    ):
        families, i, j = families[::-1], j, i
    rows, columns = ([sums[k] for k in family] for family in families)
    return _Grid(rows, columns, i * len(columns) + j)


def _duals(form: NormalForm, grid: _Grid) -> dict[int, Dual]:
    """The potentials are the negative multipliers of the sums: eps (1 + log P) + M - f - g = 0."""
    duals: dict[int, Dual] = {}
    for k, constraint in enumerate(form.constraints):
        if constraint.cone != "zero":
            continue
        mine: list[tuple[int, int, int, float]] = []
        for output, side in ((1, grid.rows), (2, grid.columns)):
            mine += [
                (row.row, output, place, row.coefficient[0])
                for place, row in enumerate(side)
                if row.constraint == k
            ]
        outputs = {output for _, output, _, _ in mine}
        if len(outputs) == 1:
            mine.sort()
            place, scale = np.array([p for _, _, p, _ in mine]), np.array([s for *_, s in mine])
            duals[k] = Dual(outputs.pop(), place, -1.0 / scale)
    return duals

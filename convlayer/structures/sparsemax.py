"""Sparsemax: Euclidean projection onto a simplex."""

from __future__ import annotations

from functools import partial

import cvxpy as cp
import numpy as np
import torch
from torch import Tensor

from convlayer.declaration.atoms.square import Square
from convlayer.declaration.normal_form import NormalForm
from convlayer.kernels.answer import answered
from convlayer.kernels.sparsemax import sparsemax
from convlayer.solution import Cause
from convlayer.structures.reading import (
    Placement,
    no_cones,
    one_value,
    only,
    over,
    require,
    rows_binding,
    separable,
    signs,
    simplex,
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
    uniform,
)


class Sparsemax(Structure):
    """minimise |x - y|^2 subject to sum_i x_i = r, x >= 0; with a common weight, and a linear term,
    the same."""

    name = "sparsemax"
    cause = Cause.ONE_SIDED
    refines = "quadratic_program"

    def declare(self) -> DeclaredProblem:
        y, r, x = cp.Parameter(6), cp.Parameter(nonneg=True), cp.Variable(6)
        return cp.Problem(cp.Minimize(cp.sum_squares(x - y)), [cp.sum(x) == r, x >= 0]), [y, r], [x]

    def sample(self, batch: tuple[int, ...], generator: torch.Generator) -> tuple[Tensor, ...]:
        return normal(generator, *batch, 6), uniform(generator, 0.5, 2, *batch)

    def near_misses(self) -> dict[str, DeclaredProblem]:
        y, x, weight = cp.Parameter(6), cp.Variable(6), np.arange(1.0, 7.0)
        distance, one = cp.sum_squares(x - y), cp.sum(x) == 1
        problems = {
            "a cap": (distance, [one, x >= 0, x <= 0.5], [y]),
            "unequal weights": (weight @ cp.square(x - y), [one, x >= 0], [y]),
            "one sign missing": (distance, [one, x[1:] >= 0], [y]),
            "no signs": (distance, [one], [y]),
            "no sum": (distance, [x >= 0], [y]),
            "at most": (distance, [cp.sum(x) <= 1, x >= 0], [y]),
            "a weighted sum": (distance, [np.arange(1, 7) @ x == 1, x >= 0], [y]),
            "a lower bound": (distance, [one, x >= 0.01], [y]),
            "coupled squares": (distance + cp.square(x[0] + x[1]), [one, x >= 0], [y]),
            "the l1 norm beside": (distance + cp.norm1(x - y), [one, x >= 0], [y]),
            "the norm itself": (cp.norm(x - y), [one, x >= 0], [y]),
        }
        return {
            k: (cp.Problem(cp.Minimize(f), rules), leaves, [x])
            for k, (f, rules, leaves) in problems.items()
        }

    def match(self, form: NormalForm) -> Match:
        # Is it this problem, with every coefficient?
        only(form, Square)
        no_cones(form, "zero", "nonnegative")
        parts = separable(form)
        curvature = one_value(parts.curvature, form.n, "the squares have unequal weights")
        total = simplex(form)
        sign_rows = signs(form)
        require(bool(sign_rows.nonnegative.all()), "not every variable is nonnegative")
        placement = Placement.of(form)

        # The kernel, bound to the parameters once the structure is chosen.
        def build(wanted: Wanted):
            point = over(
                form, curvature, partial(placement.binding, form), parts.slope.scaled(-1.0)
            )
            h, r = rows_binding(form, curvature), rows_binding(form, total.right)

            def run(values, like, at=None):
                y, flat = point(values, like)
                answer = answered(at, sparsemax, y, r(values, like)[:, 0]).unsettled(flat)
                if not wanted.duals:
                    return answer
                x, tau = answer.outputs
                weight = h(values, like)
                return answer.with_outputs(
                    x, weight * tau[:, None], weight * (x - y + tau[:, None])
                )

            return run

        # Where the multipliers stand in its answer.
        duals = {
            total.constraint: Dual(1, np.zeros(1, dtype=np.int64), np.full(1, 1.0 / total.scale))
        }
        if not sign_rows.repeated:
            duals |= {
                k: Dual(2, placement.position[v], 1.0 / c) for k, (v, c) in sign_rows.rows.items()
            }
        return Match(
            words(form, point=[parts.slope, curvature], total=total.right),
            build,
            placement.position,
            Cost(flops=30.0 * form.n, bytes=96.0 * form.n),
            duals=duals,
        )

"""Softmax: a linear objective with entropy over a simplex."""

from __future__ import annotations

import cvxpy as cp
import numpy as np
import torch
from torch import Tensor

from convlayer.declaration.atoms.entropy import Entropy
from convlayer.declaration.normal_form import NormalForm
from convlayer.kernels.answer import answered
from convlayer.kernels.softmax import softmax
from convlayer.solution import Cause
from convlayer.structures.reading import (
    Placement,
    is_one,
    linear_cost,
    no_cones,
    one_value,
    only,
    plain_entropy,
    rows_binding,
    signs,
    simplex,
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
    normal,
    uniform,
)


class Softmax(Structure):
    """maximise theta'y + tau sum_i entr(y_i) subject to sum_i y_i = r, y >= 0."""

    name = "softmax"
    cause = Cause.ONE_SIDED
    refines = "cone_program"

    def declare(self) -> DeclaredProblem:
        theta, tau, r, y = (
            cp.Parameter(6),
            cp.Parameter(nonneg=True),
            cp.Parameter(nonneg=True),
            cp.Variable(6),
        )
        objective = cp.Maximize(theta @ y + tau * cp.sum(cp.entr(y)))
        return cp.Problem(objective, [cp.sum(y) == r, y >= 0]), [theta, tau, r], [y]

    def sample(self, batch: tuple[int, ...], generator: torch.Generator) -> tuple[Tensor, ...]:
        theta = normal(generator, *batch, 6)
        return theta, uniform(generator, 0.5, 2, *batch), uniform(generator, 0.5, 2, *batch)

    def near_misses(self) -> dict[str, DeclaredProblem]:
        theta, tau, y = cp.Parameter(6), cp.Parameter(nonneg=True), cp.Variable(6)
        scale, entropy, one = cp.Parameter(6, nonneg=True), tau * cp.sum(cp.entr(y)), cp.sum(y) == 1
        problems = {
            "a cap": (theta @ y + entropy, [one, y <= 0.5], [theta, tau]),
            "unequal temperatures": (theta @ y + scale @ cp.entr(y), [one], [theta, scale]),
            "a weighted sum": (theta @ y + entropy, [np.arange(1, 7) @ y == 1], [theta, tau]),
            "at most": (theta @ y + entropy, [cp.sum(y) <= 1], [theta, tau]),
            "part of the sum": (theta @ y + entropy, [cp.sum(y[:5]) == 1], [theta, tau]),
            "two sums": (theta @ y + entropy, [one, cp.sum(y[:3]) == 0.5], [theta, tau]),
            "a square beside": (theta @ y + entropy - cp.sum_squares(y), [one], [theta, tau]),
            "one entry without entropy": (
                theta @ y + tau * cp.sum(cp.entr(y[1:])),
                [one, y >= 0],
                [theta, tau],
            ),
            "a shifted entropy": (
                theta @ y + tau * cp.sum(cp.entr(y + 1)),
                [one, y >= 0],
                [theta, tau],
            ),
        }
        return {
            k: (cp.Problem(cp.Maximize(f), rules), leaves, [y])
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
        total = simplex(form)
        sign_rows = signs(form)
        placement = Placement.of(form)
        scores = linear_cost(form).scaled(-1.0)

        # The kernel, bound to the parameters once the structure is chosen.
        def build(wanted: Wanted):
            theta = placement.binding(form, scores)
            tau, r = (
                None if is_one(table) else rows_binding(form, table)
                for table in (temperature, total.right)
            )

            def run(values, like, at=None):
                return answered(
                    at,
                    lambda *inputs: softmax(*inputs, wanted.duals),
                    theta(values, like),
                    None if tau is None else tau(values, like)[:, 0],
                    None if r is None else r(values, like)[:, 0],
                )

            return run

        # Where the multipliers stand in its answer.
        multiplier = Dual(1, np.zeros(1, dtype=np.int64), np.full(1, 1.0 / total.scale))
        return Match(
            words(form, scores=scores, temperature=temperature, total=total.right),
            build,
            placement.position,
            Cost(flops=40.0 * form.n, bytes=64.0 * form.n),
            duals={total.constraint: multiplier, **zero_duals(sign_rows)},
        )

"""Total-variation denoising on a line."""

from __future__ import annotations

from functools import partial

import cvxpy as cp
import numpy as np
import torch
from torch import Tensor

from convlayer.declaration.affine import NONE, Table
from convlayer.declaration.atoms.absolute import Absolute
from convlayer.declaration.atoms.square import Square
from convlayer.declaration.normal_form import NormalForm
from convlayer.kernels.answer import answered
from convlayer.kernels.total_variation import total_variation
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
    words,
)
from convlayer.structures.structure import (
    Cost,
    DeclaredProblem,
    Match,
    Structure,
    Wanted,
    normal,
    uniform,
)


class TotalVariation(Structure):
    """minimise 1/2 |u - x|^2 + lam sum_i |u_{i+1} - u_i|, the entries of u in any order along the
    line."""

    name = "total_variation"
    cause = Cause.ONE_SIDED
    refines = "quadratic_program"

    def declare(self) -> DeclaredProblem:
        x, lam, u = cp.Parameter(12), cp.Parameter(nonneg=True), cp.Variable(12)
        return cp.Problem(cp.Minimize(cp.sum_squares(u - x) / 2 + lam * cp.tv(u))), [x, lam], [u]

    def sample(self, batch: tuple[int, ...], generator: torch.Generator) -> tuple[Tensor, ...]:
        return normal(generator, *batch, 12), uniform(generator, 0.2, 0.6, *batch)

    def near_misses(self) -> dict[str, DeclaredProblem]:
        x, lam, u, w = (
            cp.Parameter(12),
            cp.Parameter(nonneg=True),
            cp.Variable(12),
            cp.Parameter(11, nonneg=True),
        )
        weight, fit, steps = np.arange(1.0, 13.0), cp.sum_squares(u - x), cp.diff(u)
        problems = {
            "a second difference": (fit + lam * cp.norm1(cp.diff(u, 2)), [], [x, lam]),
            "a ring": (fit + lam * (cp.tv(u) + cp.abs(u[0] - u[11])), [], [x, lam]),
            "unequal steps": (fit + w @ cp.abs(steps), [], [x, w]),
            "unequal weights": (weight @ cp.square(u - x) + lam * cp.tv(u), [], [x, lam]),
            "a missing step": (fit + lam * cp.norm1(steps[1:]), [], [x, lam]),
            "a step twice": (fit + lam * (cp.tv(u) + cp.abs(u[1] - u[0])), [], [x, lam]),
            "a star": (fit + lam * cp.norm1(u[1:] - u[0]), [], [x, lam]),
            "a loop and a line": (
                fit + lam * (cp.norm1(steps[:2]) + cp.abs(u[0] - u[2]) + cp.norm1(steps[3:])),
                [],
                [x, lam],
            ),
            "a sign": (fit + lam * cp.tv(u), [u >= 0], [x, lam]),
            "the l1 norm beside": (fit + lam * cp.tv(u) + cp.norm1(u), [], [x, lam]),
            "a shifted step": (fit + lam * cp.norm1(steps - 1), [], [x, lam]),
            "squared steps": (fit + lam * cp.sum_squares(steps), [], [x, lam]),
            "a two-dimensional image": (
                cp.sum_squares(cp.reshape(u, (3, 4), order="C") - 1)
                + lam * cp.tv(cp.reshape(u, (3, 4), order="C"))
                + x @ u,
                [],
                [x, lam],
            ),
        }
        return {
            k: (cp.Problem(cp.Minimize(f), rules), leaves, [u])
            for k, (f, rules, leaves) in problems.items()
        }

    def match(self, form: NormalForm) -> Match:
        # Is it this problem, with every coefficient?
        only(form, Square, Absolute)
        no_cones(form)
        parts = separable(form)
        curvature = one_value(parts.curvature, form.n, "the squares have unequal weights")
        order = _line(form)
        step = one_value(_steps(form), form.n - 1, "the steps have unequal weights")
        placement = Placement.along(order)

        # The kernel, bound to the parameters once the structure is chosen.
        def build(wanted: Wanted):
            point = over(
                form, curvature, partial(placement.binding, form), parts.slope.scaled(-1.0)
            )
            lam = over(form, curvature, partial(rows_binding, form), step)

            def run(values, like, at=None):
                (x, flat), (weight, _) = point(values, like), lam(values, like)
                return answered(at, total_variation, x, weight[:, 0]).unsettled(flat)

            return run

        return Match(
            words(form, signal=[parts.slope, curvature], weight=step),
            build,
            placement.position,
            Cost(flops=400.0 * form.n, bytes=1600.0 * form.n),
        )


def _pairs(form: NormalForm) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(first, second, size of the coefficients) of each row |c (x_i - x_j)|."""
    absolutes = form.of(Absolute)
    argument = absolutes.argument.normal
    reason = "an absolute value is not of a difference of two variables"
    require(absolutes.size > 0, "its objective has no absolute value")
    require(not (argument.variable == NONE).any(), "an absolute value is of a shifted difference")
    require(bool((np.bincount(argument.row, minlength=argument.size) == 2).all()), reason)
    require(bool((argument.parameter == NONE).all()), reason)
    first, second = argument.variable.reshape(-1, 2).T
    one, other = argument.coefficient.reshape(-1, 2).T
    require(np.allclose(one, -other, rtol=1e-14, atol=0.0), reason)
    return first, second, np.abs(one)


def _steps(form: NormalForm) -> Table:
    """The weight of each step with the size of its coefficients."""
    return form.of(Absolute).weight.scaled(_pairs(form)[2])


def _line(form: NormalForm) -> np.ndarray:
    """The variables in their order along the line: the steps must join them to a path."""
    first, second, _ = _pairs(form)
    reason = "the steps do not join the variables to one line"
    require(len(first) == form.n - 1, reason)
    neighbours = np.full((form.n, 2), NONE, dtype=np.int64)
    degree = np.zeros(form.n, dtype=np.int64)
    np.add.at(degree, np.concatenate([first, second]), 1)
    require(int(degree.max()) <= 2, reason)
    ends = np.concatenate([first, second])
    others = np.concatenate([second, first])
    sorting = np.argsort(ends, kind="stable")
    slot = np.arange(len(ends)) - np.searchsorted(ends[sorting], ends[sorting])
    neighbours[ends[sorting], slot] = others[sorting]
    consecutive = np.arange(form.n)
    if (
        np.array_equal(np.minimum(first, second), consecutive[:-1])
        and (np.abs(first - second) == 1).all()
    ):
        return consecutive
    here, before, order = (
        int(np.flatnonzero(degree <= 1)[0]) if (degree <= 1).any() else NONE,
        NONE,
        [],
    )
    require(here != NONE, reason)
    while here != NONE:
        order.append(here)
        one, other = neighbours[here].tolist()
        here, before = (one if one != before else other), here
        if len(order) > form.n:
            break
    require(len(order) == form.n, reason)
    return np.array(order, dtype=np.int64)

"""Quadratic and linear programs: whatever has only zero and nonnegative cones."""

from __future__ import annotations

import cvxpy as cp
import numpy as np
import torch
from torch import Tensor

from convlayer.declaration.normal_form import NormalForm
from convlayer.structures.reading import require
from convlayer.structures.structure import DeclaredProblem, Match, Structure, normal, uniform


class QuadraticProgram(Structure):
    """minimise 1/2 x'Px + q'x subject to Ax = b, Gx <= h; with it lasso, huber, l1, CVaR, control,
    linear programs.

    It has no kernel of its own: it is the cone program, by the cheapest solver at each batch.
    """

    name = "quadratic_program"
    refines = "cone_program"

    def declare(self) -> DeclaredProblem:
        P, q, G, h = (
            cp.Parameter((4, 4), PSD=True),
            cp.Parameter(4),
            cp.Parameter((6, 4)),
            cp.Parameter(6),
        )
        A, b, x = cp.Parameter((2, 4)), cp.Parameter(2), cp.Variable(4)
        objective = cp.Minimize(cp.quad_form(x, P) / 2 + q @ x)
        return cp.Problem(objective, [A @ x == b, G @ x <= h]), [P, q, G, h, A, b], [x]

    def sample(self, batch: tuple[int, ...], generator: torch.Generator) -> tuple[Tensor, ...]:
        L, inside = normal(generator, *batch, 4, 4), normal(generator, *batch, 4)
        G, A = normal(generator, *batch, 6, 4), normal(generator, *batch, 2, 4)
        h = (G @ inside.unsqueeze(-1)).squeeze(-1) + uniform(generator, 0.05, 1, *batch, 6)
        P = torch.eye(4, dtype=torch.float64) + L @ L.mT / 4
        return P, normal(generator, *batch, 4), G, h, A, (A @ inside.unsqueeze(-1)).squeeze(-1)

    def near_misses(self) -> dict[str, DeclaredProblem]:
        q, x, X = cp.Parameter(4), cp.Variable(4), cp.Variable((2, 2), PSD=True)
        problems = {
            "a norm": (cp.norm(x - q), [x >= 0], x),
            "a norm bound": (cp.sum_squares(x - q), [cp.norm(x) <= 1], x),
            "entropy": (q @ x - cp.sum(cp.entr(x)), [cp.sum(x) == 1], x),
            "a semidefinite variable": (cp.sum_squares(cp.vec(X, order="F") - q), [], X),
            "a quadratic constraint": (q @ x, [cp.sum_squares(x) <= 1], x),
            "a fourth power": (cp.sum(cp.power(x - q, 4)), [x >= 0], x),
            "an exponential": (cp.sum(cp.exp(x)) + cp.sum_squares(x - q), [x >= 0], x),
        }
        return {
            k: (cp.Problem(cp.Minimize(f), rules), [q], [v])
            for k, (f, rules, v) in problems.items()
        }

    def match(self, form: NormalForm) -> Match:
        require(form.not_quadratic is None, form.not_quadratic or "")
        return Match("the whole cone program", None, np.arange(form.n), None)

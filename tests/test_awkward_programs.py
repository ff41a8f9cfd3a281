"""Quadratic and linear programs as they come: redundant, degenerate, fixed, badly scaled. Solved as
Clarabel at its tightest solves them."""

import warnings

import cvxpy as cp
import numpy as np
import pytest
import torch

from convlayer import AccuracyWarning, ConvexLayer, GradientWarning, Status

n = 6


def problems():
    """name -> (objective, constraints) of x and the parameter q."""
    r = np.random.default_rng(0)
    G, A = r.standard_normal((9, n)), r.standard_normal((2, n))
    inside = r.standard_normal(n)
    h, b = G @ inside + 0.3, A @ inside
    L = r.standard_normal((3, n))
    low_rank = L.T @ L
    rules = {
        "redundant equalities": lambda x: [
            A @ x == b,
            A[:1] @ x + A[1:] @ x == b[:1] + b[1:],
            G @ x <= h,
        ],
        "the same inequality thrice": lambda x: [
            G @ x <= h,
            G[:1] @ x <= h[:1],
            2 * G[:1] @ x <= 2 * h[:1],
        ],
        "no inequalities": lambda x: [A @ x == b],
        "nothing at all": lambda x: [],
        "fixed variables": lambda x: [
            x[:2] == inside[:2],
            x[2] >= inside[2],
            x[2] <= inside[2],
            G @ x <= h,
        ],
        "bounds far apart in scale": lambda x: [
            x >= -np.logspace(-6, 6, n),
            x <= np.logspace(6, -6, n),
        ],
        "bounds as good as infinite": lambda x: [
            x >= -1e20,
            x <= np.where(np.arange(n) % 2, 1e20, 1.0),
            G @ x <= h,
        ],
        "a point": lambda x: [x >= inside, x <= inside],
        "rows of many scales": lambda x: [
            np.logspace(-6, 6, 9) @ cp.diag(G @ x - h) <= 0,
            cp.multiply(np.logspace(-6, 6, 9), G @ x - h) <= 0,
        ],
    }
    q = cp.Parameter(n, name="q")
    terms = {
        "definite": lambda x: cp.sum_squares(x) / 2 + q @ x,
        "semidefinite": lambda x: cp.quad_form(x, low_rank) / 2 + q @ low_rank @ x,
        "least squares": lambda x: cp.sum_squares(L @ x - q[:3]) + 1e-3 * cp.sum_squares(x),
        "absolute": lambda x: cp.norm1(x - q),
        "linear": lambda x: q @ x,
    }
    for rule, constraints in rules.items():
        for term, objective in terms.items():
            if (rule, term) in {("no inequalities", "linear"), ("nothing at all", "linear")}:
                continue  # unbounded
            x = cp.Variable(n, name="x")
            bounded = (
                [*constraints(x), x >= -1e3, x <= 1e3]
                if term == "linear" and "bounds" not in rule
                else constraints(x)
            )
            yield f"{term}, {rule}", cp.Problem(cp.Minimize(objective(x)), bounded), q, x


PROBLEMS = list(problems())


def reference(problem):
    """(status, value) by Clarabel, then by two others where it gives up."""
    tight = {"tol_gap_abs": 1e-11, "tol_gap_rel": 1e-11, "tol_feas": 1e-11}
    for solver, options in (
        (cp.CLARABEL, tight),
        (cp.CLARABEL, {}),
        (cp.OSQP, {"eps_abs": 1e-9, "eps_rel": 1e-9, "max_iter": 200_000}),
    ):
        try:
            problem.solve(solver=solver, **options)
        except cp.SolverError:
            continue
        if problem.status in (cp.OPTIMAL, cp.INFEASIBLE, cp.UNBOUNDED):
            return problem.status, problem.value
    return None, None


@pytest.mark.parametrize("k", range(len(PROBLEMS)), ids=[name for name, *_ in PROBLEMS])
def test_the_optimum_is_that_of_a_second_solver_or_the_row_says_so(k):
    name, problem, q, x = PROBLEMS[k]
    layer = ConvexLayer(problem, [q], [x], structure="generic", on_failure="keep")
    values = torch.from_numpy(np.random.default_rng(k).standard_normal((4, n)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AccuracyWarning)
        warnings.simplefilter("ignore", GradientWarning)
        solution = layer.solve(values)
    references = []
    for row in values:
        q.value = row.numpy()
        references.append(reference(problem))
    for row, (status, value) in enumerate(references):
        mine = Status(int(solution.status[row]))
        if mine is Status.SOLVED and status == cp.OPTIMAL:
            assert float(solution.objective[row]) == pytest.approx(value, rel=1e-6, abs=1e-6), name
            assert float(solution.residual[row]) <= 1e-8
        if status == cp.INFEASIBLE:
            assert mine is not Status.SOLVED
        if status == cp.UNBOUNDED:
            assert mine is not Status.SOLVED
    # An unbounded linear program between bounds as good as infinite is the one that may go
    # unsolved.
    if "as good as infinite" not in name:
        assert (solution.status == Status.SOLVED).all(), [
            Status(s).name for s in solution.status.tolist()
        ]

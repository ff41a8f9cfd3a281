"""A row without a solution says why: no feasible point however small the gap, no bound below, or an
infimum that is not attained."""

import cvxpy as cp
import numpy as np
import pytest
import torch

from convlayer import ConvexLayer, Status

D = torch.float64
GAPS = (1e-1, 1e-3, 1e-5, 1e-6)


def _box():
    x, g = cp.Variable(2), cp.Parameter()
    return (
        cp.Minimize(cp.sum_squares(x)),
        [x >= np.array([1.0, 0.0]), x[0] <= 1 - g, x[1] <= 1],
        g,
        x,
    )


def _budget():
    x, g = cp.Variable(5), cp.Parameter()
    return cp.Minimize(cp.sum(x)), [x >= 0.3, cp.sum(x) <= 1.5 - g], g, x


def _floors_and_a_total():
    x, g = cp.Variable(2), cp.Parameter()
    return cp.Minimize(cp.sum_squares(x - 1)), [cp.sum(x) == 1, x >= 0.5 + g], g, x


def _norm():
    x, g = cp.Variable(2), cp.Parameter()
    return cp.Minimize(cp.sum_squares(x - 1)), [cp.norm1(x) <= 1 - g, x >= 0.5], g, x


def _ball():
    x, g = cp.Variable(3), cp.Parameter()
    return cp.Minimize(x[1]), [cp.norm(x) <= 1, cp.sum(x) >= np.sqrt(3) + g], g, x


def _correlation():
    X, g = cp.Variable((2, 2), symmetric=True), cp.Parameter()
    return cp.Minimize(cp.sum_squares(X)), [X >> 0, cp.diag(X) == 1, X[0, 1] >= 1 + g], g, X


def _exponential():
    x, g = cp.Variable(), cp.Parameter()
    return cp.Minimize(x**2), [cp.exp(x) <= 1, x >= g], g, x


def _costs_that_fall_for_ever():
    x, t, g = cp.Variable(3), cp.Variable(), cp.Parameter()
    return cp.Minimize(cp.sum_squares(x) - t), [x >= 1, cp.sum(x) <= 3 - g], g, x


KINDS = (_box, _budget, _floors_and_a_total, _norm, _ball, _correlation, _exponential)


@pytest.mark.parametrize("solver", [None, "clarabel", "interior_point"])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__[1:])
def test_infeasible_by_little_is_infeasible_and_feasible_by_little_is_not(kind, solver):
    objective, constraints, g, x = kind()
    layer = ConvexLayer(
        cp.Problem(objective, constraints), [g], [x], solver=solver, on_failure="keep"
    )
    status = layer.solve(torch.tensor([*GAPS, *(-gap for gap in GAPS)], dtype=D)).status.tolist()
    assert status == [Status.INFEASIBLE] * len(GAPS) + [Status.SOLVED] * len(GAPS)


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e8])
def test_whatever_the_units_of_the_bounds(scale):
    objective, constraints, low, x = cp.Minimize(0), [], cp.Parameter(), cp.Variable(2)
    objective = cp.Minimize(cp.sum_squares(x))
    constraints = [x >= low, x <= 0]
    layer = ConvexLayer(cp.Problem(objective, constraints), [low], [x], on_failure="keep")
    assert layer.solve(torch.tensor(scale, dtype=D)).status.item() == Status.INFEASIBLE


@pytest.mark.parametrize("structure", ["auto", "generic"])
def test_a_direction_of_descent_without_a_feasible_point_is_infeasible(structure):
    objective, constraints, g, x = _costs_that_fall_for_ever()
    layer = ConvexLayer(
        cp.Problem(objective, constraints), [g], [x], on_failure="keep", structure=structure
    )
    status = layer.solve(torch.tensor([2.0, -1.0], dtype=D)).status.tolist()
    assert status == [Status.INFEASIBLE, Status.UNBOUNDED]


def test_so_is_one_of_a_geometric_program():
    price, side, area = cp.Variable(2, pos=True), cp.Variable(2, pos=True), cp.Parameter(pos=True)
    rules = [side[0] * side[1] <= 50, side[0] * side[1] >= area]
    layer = ConvexLayer(
        cp.Problem(cp.Minimize(cp.sum(price)), rules), [area], [side], gp=True, on_failure="keep"
    )
    # With a feasible point the prices may tend to zero.
    assert layer.solve(torch.tensor([200.0, 20.0], dtype=D)).status.tolist() == [
        Status.INFEASIBLE,
        Status.UNATTAINED,
    ]


@pytest.mark.parametrize(
    "made",
    [
        lambda x, g: (g * cp.exp(-x[0]) + x[1] ** 2, []),
        lambda x, g: (g * cp.inv_pos(x[0]) + x[1] ** 2, []),
        lambda x, g: (g * cp.logistic(-x[0]) + x[1] ** 2, []),
        lambda x, g: (x[0], [cp.SOC(x[0] + x[1], cp.hstack([x[0] - x[1], 2 * g]))]),
        lambda x, g: (cp.quad_over_lin(g, x[0]) + x[1] ** 2, []),
    ],
    ids=("exponential", "reciprocal", "logistic", "hyperbola", "quadratic over linear"),
)
def test_an_infimum_that_is_not_attained_has_a_status_and_a_remedy_that_works(made):
    x, g = cp.Variable(2), cp.Parameter(pos=True)
    objective, constraints = made(x, g)
    values = torch.tensor([0.1, 1.0, 30.0], dtype=D)
    problem = cp.Problem(cp.Minimize(objective), constraints)
    layer = ConvexLayer(problem, [g], [x], on_failure="keep")
    assert layer.solve(values).status.tolist() == [Status.UNATTAINED] * 3
    assert "regularise" in Status.UNATTAINED.advice
    assert (
        ConvexLayer(problem, [g], [x], regularise=1e-3).solve(values).status.tolist()
        == [Status.SOLVED] * 3
    )


def test_a_small_curvature_is_none_the_less_one():
    """log-sum-exp of large numbers with a small square has a solution, wherever it lies."""
    g = np.random.default_rng(1)
    x, A, b = cp.Variable(6), cp.Parameter((10, 6)), cp.Parameter(10)
    problem = cp.Problem(cp.Minimize(cp.log_sum_exp(A @ x + b) + 0.01 * cp.sum_squares(x)))
    layer = ConvexLayer(problem, [A, b], [x], on_failure="keep")
    rows = (
        torch.from_numpy(g.normal(size=(6, 10, 6)) * 1e5),
        torch.from_numpy(g.normal(size=(6, 10))),
    )
    assert not set(layer.solve(*rows).status.tolist()) & {
        Status.UNBOUNDED,
        Status.UNATTAINED,
        Status.INFEASIBLE,
    }


def test_a_proof_is_worth_more_than_a_point_that_is_not_quite_a_solution():
    """The row's neighbours keep what they have."""
    objective, constraints, g, x = _floors_and_a_total()
    layer = ConvexLayer(cp.Problem(objective, constraints), [g], [x], on_failure="nan")
    t = torch.tensor([1e-4, -1e-4, 1e-6], dtype=D, requires_grad=True)
    solution = layer.solve(t)
    assert solution.status.tolist() == [Status.INFEASIBLE, Status.SOLVED, Status.INFEASIBLE]
    assert not solution.degenerate[[0, 2]].any()
    (grad,) = torch.autograd.grad(solution.variables[0][1].sum(), t)
    assert grad[[0, 2]].tolist() == [0.0, 0.0]


@pytest.mark.filterwarnings("ignore::convlayer.AccuracyWarning")
def test_a_small_cost_is_none_the_less_one():
    """A plan with entropy has a solution however small its weight: the feasible set is bounded."""
    Z, M = cp.Variable((3, 3)), cp.Parameter((3, 3))
    rules = [cp.sum(Z, axis=0) == np.ones(3) / 3, cp.sum(Z, axis=1) == np.ones(3) / 3]
    problem = cp.Problem(cp.Minimize(cp.sum(cp.multiply(M, Z)) - 1e-10 * cp.sum(cp.entr(Z))), rules)
    layer = ConvexLayer(problem, [M], [Z], structure="generic", on_failure="keep")
    status = layer.solve(
        torch.rand(6, 3, 3, dtype=D, generator=torch.Generator().manual_seed(0))
    ).status.tolist()
    assert not set(status) & {Status.UNATTAINED, Status.UNBOUNDED, Status.INFEASIBLE}

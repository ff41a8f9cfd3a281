"""Units: a problem in other units has the same solution in them, and large numbers beside a small
problem do not hide it."""

import cvxpy as cp
import numpy as np
import pytest
import torch

from convlayer import ConvexLayer, Status

D = torch.float64


def _risk_budgets():
    x, S, b = cp.Variable(4), cp.Parameter((4, 4)), cp.Parameter(4, nonneg=True)
    rule = x <= 100.0
    return cp.Problem(cp.Minimize(cp.sum_squares(S @ x) - b @ cp.log(x)), [rule]), [S, b], [x]


def _precision_matrix():
    X, P, b = (
        cp.Variable((3, 3), symmetric=True),
        cp.Parameter((3, 3), symmetric=True),
        cp.Parameter(1, nonneg=True),
    )
    return cp.Problem(cp.Minimize(cp.trace(P @ X) - cp.sum(b) * cp.log_det(X))), [P, b], [X]


def _proportional_fairness():
    x, P, b = cp.Variable(4), cp.Parameter(4, nonneg=True), cp.Parameter(4, nonneg=True)
    return cp.Problem(cp.Minimize(P @ x - b @ cp.log(x))), [P, b], [x]


def _values(parameters, rows=4):
    g = np.random.default_rng(3)
    first = g.normal(size=(rows, *parameters[0].shape))
    if parameters[0].attributes["symmetric"]:
        first = first @ first.transpose(0, 2, 1) + 0.3 * np.eye(3)
    if parameters[0].attributes["nonneg"]:
        first = np.abs(first) + 0.1
    return [
        torch.from_numpy(part)
        for part in (first, np.abs(g.normal(size=(rows, *parameters[1].shape))) + 0.2)
    ]


@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1e4, 1e6])
@pytest.mark.parametrize(
    "made", [_risk_budgets, _precision_matrix, _proportional_fairness], ids=lambda f: f.__name__[1:]
)
def test_logarithms_have_no_unit(made, scale):
    """Costs times a number: the solution is that over it, and so is the derivative in the other
    parameter."""
    problem, parameters, variables = made()
    if problem.constraints and scale < 1:
        pytest.skip("the bound would be reached")
    layer = ConvexLayer(problem, parameters, variables)
    first, second = _values(parameters)

    def solved(factor):
        leaf = second.clone().requires_grad_()
        solution = layer.solve(first * factor, leaf)
        weights = torch.randn(
            solution.variables[0].shape, dtype=D, generator=torch.Generator().manual_seed(0)
        )
        (bar,) = torch.autograd.grad((weights * solution.variables[0]).sum(), leaf)
        return solution, bar

    (base, bar), (other, other_bar) = solved(1.0), solved(scale)
    assert other.status.tolist() == [Status.SOLVED] * len(first)
    torch.testing.assert_close(other.variables[0] * scale, base.variables[0], rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(other_bar * scale, bar, rtol=1e-6, atol=1e-8)


def test_multipliers_beside_logarithms_in_other_units():
    """Of sum(x) == r with costs of 1e6, against the stationarity of the Lagrangian in closed
    form."""
    x, P, b, r = cp.Variable(3), cp.Parameter(3), cp.Parameter(3, nonneg=True), cp.Parameter()
    rule = cp.sum(x) == r
    problem = cp.Problem(cp.Minimize(P @ x - b @ cp.log(x)), [rule])
    layer = ConvexLayer(problem, [P, b, r], [x, rule.dual_variables[0]], structure="generic")
    P_t, b_t = torch.tensor([1e6, 2e6, 3e6], dtype=D), torch.tensor([1.0, 2.0, 0.5], dtype=D)
    found, multiplier = layer(P_t, b_t, torch.tensor(3e-6, dtype=D))
    torch.testing.assert_close(
        P_t - b_t / found + multiplier, torch.zeros(3, dtype=D), rtol=0, atol=1e-3
    )


@pytest.mark.parametrize("big", [1e4, 1e8, 1e11])
def test_a_large_bound_beside_does_not_hide_a_small_problem(big):
    """min p'x - h, h <= M, |x| <= 1 in parts that do not touch: x = -p/|p|."""
    x, h, p, M = cp.Variable(2), cp.Variable(), cp.Parameter(2), cp.Parameter()
    layer = ConvexLayer(
        cp.Problem(cp.Minimize(p @ x - h), [h <= M, cp.norm(x) <= 1]), [p, M], [x], on_failure="nan"
    )
    rows = torch.randn(20, 2, dtype=D, generator=torch.Generator().manual_seed(0))
    solution = layer.solve(rows, torch.tensor(big, dtype=D))
    off = (solution.variables[0] + rows / rows.norm(dim=1, keepdim=True)).abs().amax(1)
    assert not ((solution.status == Status.SOLVED) & ~(off < 1e-6)).any()


@pytest.mark.parametrize("big", [1e5, 1e7, 1e9])
def test_an_exact_penalty_is_right_or_not_called_solved(big):
    x, p, s = cp.Variable(3), cp.Parameter(3), cp.Variable(3, nonneg=True)
    cost = cp.norm(x - p) + 0.3 * cp.norm(x + 1)
    hard = ConvexLayer(cp.Problem(cp.Minimize(cost), [x <= 1]), [p], [x])
    soft = ConvexLayer(
        cp.Problem(cp.Minimize(cost + big * cp.sum(s)), [x <= 1 + s]), [p], [x], on_failure="nan"
    )
    rows = torch.randn(12, 3, dtype=D, generator=torch.Generator().manual_seed(1))
    solution = soft.solve(rows)
    off = (solution.variables[0] - hard(rows)[0]).abs().amax(1)
    assert not ((solution.status == Status.SOLVED) & ~(off < 1e-5)).any()


@pytest.mark.parametrize("bound", [1e4, 1e7, 1e12])
def test_a_bound_that_is_never_reached_changes_nothing(bound):
    A, x, p = np.random.default_rng(0).standard_normal((6, 3)), cp.Variable(3), cp.Parameter(3)
    cost = cp.sum_squares(A @ x - 1) + cp.sum(cp.pos(x - p))
    rows = torch.randn(6, 3, dtype=D, generator=torch.Generator().manual_seed(2))
    free = ConvexLayer(cp.Problem(cp.Minimize(cost)), [p], [x])(rows)[0]
    solution = ConvexLayer(
        cp.Problem(cp.Minimize(cost), [cp.sum_squares(x) <= bound]), [p], [x]
    ).solve(rows)
    assert solution.status.tolist() == [Status.SOLVED] * 6
    torch.testing.assert_close(solution.variables[0], free, rtol=0, atol=1e-8)


def test_numbers_that_overflow_are_not_solved():
    x, p = cp.Variable(2), cp.Parameter(2)
    layer = ConvexLayer(
        cp.Problem(cp.Minimize(cp.sum_squares(x - p)), [x <= 1]), [p], [x], on_failure="nan"
    )
    status = layer.solve(torch.tensor([[1e200, -1e200], [2.0, -1.0]], dtype=D)).status.tolist()
    assert status[0] >= Status.INFEASIBLE
    assert status[1] == Status.SOLVED


@pytest.mark.parametrize("rho", [-3.0, -20.0])
def test_an_exponential_far_below_its_unit_is_right_or_says_so(rho):
    x, p = cp.Variable(), cp.Parameter()
    layer = ConvexLayer(cp.Problem(cp.Minimize(x), [cp.log(x) >= p]), [p], [x], on_failure="nan")
    solution = layer.solve(torch.tensor(rho, dtype=D))
    wrong = abs(float(solution.variables[0]) / np.exp(rho) - 1) > 1e-2
    assert not wrong or solution.status.item() > 0 or bool(solution.degenerate)


@pytest.mark.parametrize("near_zero", [2.4041923918648543e-06, -1e-9, 1e-12])
def test_a_coefficient_that_is_all_but_zero_hides_no_other_cost(near_zero):
    """|x - 1|^2 + the larger of 0.6 q_1 x_1 and others: its variable leaves the constraints, its
    costs do not become all that is seen."""
    x, q = cp.Variable(3), cp.Parameter(3)
    problem = cp.Problem(
        cp.Minimize(
            cp.sum_squares(x - 1) + 0.3 * cp.dotsort(cp.multiply(q, x), np.array([2.0, 1.0, 0.0]))
        )
    )
    value = np.array([-0.9999972390082525, 1.0000094991159816, near_zero])
    ours = ConvexLayer(problem, [q], [x], structure="generic").solve(torch.from_numpy(value))
    q.value = value
    problem.solve(solver=cp.CLARABEL)
    assert np.allclose(ours.variables[0].numpy(), x.value, atol=1e-5)

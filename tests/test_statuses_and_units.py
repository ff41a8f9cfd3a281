"""Infinite bounds, contradictions by rounding and second derivatives, in whatever units the user
has."""

import cvxpy as cp
import numpy as np
import pytest
import torch

from convlayer import ConvexLayer, Status

D = torch.float64


def _falling(kind):
    x, c, u, lo = cp.Variable(2), cp.Parameter(2), cp.Parameter(2), cp.Parameter(2)
    more = {
        "linear": 0.0,
        "square": cp.square(x[0]),
        "norm": 0.1 * cp.norm(x),
        "exponential": cp.exp(x[0]),
    }[kind]
    return cp.Problem(cp.Minimize(c @ x + more), [x <= u, x >= lo]), [c, u, lo], [x]


@pytest.mark.parametrize("kind", ["linear", "square", "norm", "exponential"])
def test_a_direction_along_infinite_bounds_is_seen(kind):
    layer = ConvexLayer(*_falling(kind), on_failure="keep")
    costs = torch.tensor([[1.0, -1.0], [1.0, -1.0], [1.0, 1.0], [1.0, -1.0]], dtype=D)
    upper = torch.tensor(
        [[1.0, torch.inf], [1.0, 1.0], [torch.inf, torch.inf], [torch.inf, torch.inf]], dtype=D
    )
    lower = torch.tensor([[0.0, 0.0], [0.0, 0.0], [0.0, -torch.inf], [0.0, torch.inf]], dtype=D)
    wanted = [Status.UNBOUNDED, Status.SOLVED, Status.UNBOUNDED, Status.INFEASIBLE]
    assert layer.solve(costs, upper, lower).status.tolist() == wanted
    for k, status in enumerate(wanted):
        assert layer.solve(costs[k], upper[k], lower[k]).status.item() == status


def test_an_infimum_along_an_infinite_bound_is_not_attained():
    x, lo = cp.Variable(2), cp.Parameter(2)
    layer = ConvexLayer(
        cp.Problem(cp.Minimize(cp.sum(cp.exp(x))), [x >= lo]), [lo], [x], on_failure="keep"
    )
    solution = layer.solve(
        torch.tensor([[0.0, 0.0], [-torch.inf, 0.0], [-torch.inf, -torch.inf]], dtype=D)
    )
    assert solution.status.tolist() == [Status.SOLVED, Status.UNATTAINED, Status.UNATTAINED]


@pytest.mark.parametrize("gap", [1e-8, 5e-9])
@pytest.mark.parametrize("equal", [False, True])
def test_a_total_that_is_short_by_rounding_is_met(gap, equal):
    x, total, lo = cp.Variable(3), cp.Parameter(), cp.Parameter(3)
    budget = cp.sum(x) == total if equal else cp.sum(x) <= total
    layer = ConvexLayer(cp.Problem(cp.Minimize(x[0] + x[1]), [x >= lo, budget]), [total, lo], [x])
    least = torch.tensor([0.3, 0.5, 0.2], dtype=D)
    solution = layer.solve(torch.tensor(1 - gap, dtype=D), least)
    assert solution.status.item() == Status.SOLVED
    torch.testing.assert_close(solution.variables[0], least, rtol=0, atol=2 * gap)


@pytest.mark.parametrize("unit", [1.0, 1e4, 1e8, 1e-6])
def test_second_derivatives_do_not_know_units(unit):
    """X = P^-1, whose derivatives torch has too."""
    X, P = cp.Variable((3, 3), PSD=True), cp.Parameter((3, 3), PSD=True)
    layer = ConvexLayer(cp.Problem(cp.Minimize(cp.trace(P @ X) - cp.log_det(X))), [P], [X])
    rng = np.random.default_rng(0)
    M, W, V = (torch.tensor(rng.standard_normal(shape)) for shape in ((3, 5), (3, 3), (3, 3)))

    def hessian(inverse):
        point = (M @ M.mT).requires_grad_()
        (gradient,) = torch.autograd.grad((W * inverse(point)).sum(), point, create_graph=True)
        (product,) = torch.autograd.grad((gradient * (V + V.mT)).sum(), point)
        return product + product.mT

    wanted = hessian(torch.linalg.inv)
    found = hessian(lambda point: unit * layer(unit * point)[0])
    assert (found - wanted).abs().max() <= 1e-10 * wanted.abs().max()
    point, direction = M @ M.mT, V + V.mT

    def moved(point):
        return torch.func.jvp(lambda p: unit * layer(unit * p)[0], (point,), (direction,))[1]

    inverse = torch.linalg.inv(point)
    exact = 2 * inverse @ direction @ inverse @ direction @ inverse
    assert (
        torch.func.jvp(moved, (point,), (direction,))[1] - exact
    ).abs().max() <= 1e-10 * exact.abs().max()


def test_an_infimum_that_is_attained_is_not_called_otherwise_however_bad_the_units():
    """tr(PX) - log det X is least at P^-1; P of condition 3e8."""
    X, P = cp.Variable((2, 2), PSD=True), cp.Parameter((2, 2), PSD=True)
    layer = ConvexLayer(
        cp.Problem(cp.Minimize(cp.trace(P @ X) - cp.log_det(X))), [P], [X], on_failure="keep"
    )
    given = torch.tensor([[2.20459146e-04, -2.01974450], [-2.01974450, 4.10915914e04]], dtype=D)
    assert layer.solve(given).status.item() in (
        Status.SOLVED,
        Status.INACCURATE,
        Status.NOT_CONVERGED,
    )

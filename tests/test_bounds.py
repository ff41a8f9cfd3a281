"""Bounds that the user stated hold to the last bit; infinite ones are none; and equalities may give
every variable."""

from __future__ import annotations

import cvxpy as cp
import numpy as np
import pytest
import torch

from convlayer import ConvexLayer, ParameterError, ProblemError, Status

N = 6
INF = np.inf


def spread(rows: int, *shape: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(rows, *shape)))


def covariance() -> np.ndarray:
    S = np.random.default_rng(1).normal(size=(N, N))
    return S @ S.T / N + 0.1 * np.eye(N)


LOW, HIGH = np.array([-INF, 0.0, 0.1, 0.0, -0.3, 0.0]), np.array([0.3, 0.9, 0.35, 0.3, 0.5, 0.3])
STATED = {
    "constraint": (lambda x: [x >= 0], {}, 0.0, INF),
    "declared": (lambda x: [], {"nonneg": True}, 0.0, INF),
    "bounds": (lambda x: [], {"bounds": [0, 1]}, 0.0, 1.0),
    "bounds by entry": (lambda x: [], {"bounds": [LOW, HIGH]}, LOW, HIGH),
    "both sides": (lambda x: [x <= HIGH, -x <= 0.05, 3 * x <= 0.9], {}, -0.05, HIGH),
}
COSTS = {
    "quadratic": lambda x, q: cp.quad_form(x, covariance()) - q @ x,
    "linear": lambda x, q: q @ x,
    "norm": lambda x, q: cp.norm(covariance() @ x) - 0.3 * q @ x,
}


def portfolio(cost: str, stated: str, **options) -> ConvexLayer:
    rules, attributes, _, _ = STATED[stated]
    x, q = cp.Variable(N, **attributes), cp.Parameter(N)
    return ConvexLayer(
        cp.Problem(cp.Minimize(COSTS[cost](x, q)), [cp.sum(x) == 1, *rules(x)]), [q], [x], **options
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("stated", STATED)
@pytest.mark.parametrize("cost", COSTS)
def test_stated_bounds_hold_exactly(cost, stated, dtype):
    _, _, low, high = STATED[stated]
    (x,) = portfolio(cost, stated)(spread(40, N).to(dtype))
    low, high = (torch.as_tensor(bound, dtype=dtype).expand(N) for bound in (low, high))
    assert (x >= low).all()
    assert (x <= high).all()


def test_bounds_of_a_parameter_hold_exactly():
    x, q, lo = cp.Variable(N), cp.Parameter(N), cp.Parameter(N)
    layer = ConvexLayer(
        cp.Problem(cp.Minimize(COSTS["quadratic"](x, q)), [cp.sum(x) == 1, x >= lo]), [q, lo], [x]
    )
    least = spread(40, N, seed=2).abs() / 40
    assert (layer(spread(40, N), least)[0] >= least).all()


def test_a_solution_on_its_bound_keeps_its_derivative():
    layer = portfolio("quadratic", "constraint")
    q = spread(2, N).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda q: layer(q)[0], q, check_forward_ad=True, rtol=1e-5, atol=1e-6
    )
    lo = torch.full((N,), 0.05, dtype=torch.float64, requires_grad=True)
    x, p = cp.Variable(N), cp.Parameter(N)
    floor = cp.Parameter(N)
    bounded = ConvexLayer(
        cp.Problem(cp.Minimize(COSTS["linear"](x, p)), [cp.sum(x) == 1, x >= floor]),
        [p, floor],
        [x],
    )
    jacobian = torch.autograd.functional.jacobian(lambda lo: bounded(q[0].detach(), lo)[0], lo)
    # Of a linear program: one entry takes what the others leave.
    free = int(q[0].argmin())
    wanted = torch.eye(N, dtype=torch.float64)
    wanted[free] = -1.0
    wanted[free, free] = 0.0
    torch.testing.assert_close(jacobian, wanted, rtol=0, atol=1e-9)


MASKED = torch.tensor([True, False, True, True, False, True])
MASKS = {
    "upper": lambda x, u: [x <= u],
    "lower": lambda x, u: [-u <= x],
    "combination": lambda x, u: [2 * x + 1 <= 3 * u],
    "rows": lambda x, u: [(np.eye(N) + np.eye(N, k=1)) @ x <= u],
}
SMOOTH = {
    "quadratic": lambda x, q: cp.sum_squares(x - q),
    "norm": lambda x, q: cp.norm(x - q) + 0.1 * cp.sum_squares(x),
    "exponential": lambda x, q: cp.sum(cp.exp(x) - cp.multiply(q, x)) + cp.sum_squares(x - q),
}


def kept(rule, rows):
    """The constraint without the rows that are not kept."""
    return rule.args[0][rows] <= rule.args[1][rows]


@pytest.mark.parametrize("cost", SMOOTH)
@pytest.mark.parametrize("mask", MASKS)
def test_an_infinite_limit_is_the_problem_without_its_row(mask, cost):
    x, q, u = cp.Variable(N), cp.Parameter(N), cp.Parameter(N)
    (rule,) = MASKS[mask](x, u)
    objective = cp.Minimize(SMOOTH[cost](x, q))
    masked = ConvexLayer(cp.Problem(objective, [rule]), [q, u], [x, rule.dual_variables[0]])
    fewer = kept(rule, MASKED.numpy())
    plain = ConvexLayer(cp.Problem(objective, [fewer]), [q, u], [x, fewer.dual_variables[0]])
    bars = spread(2, N, seed=5), spread(2, N, seed=6)
    found = []
    for layer, infinite in ((masked, True), (plain, False)):
        values = spread(2, N, seed=3).requires_grad_(), spread(2, N, seed=4).abs() / 3
        values = (
            values[0],
            (values[1].masked_fill(~MASKED, INF) if infinite else values[1]).requires_grad_(),
        )
        solution = layer.solve(*values)
        assert (solution.status == Status.SOLVED).all()
        y, dual = solution.variables
        if infinite:
            assert not dual[:, ~MASKED].any()
            dual = dual[:, MASKED]
        loss = (bars[0] * y).sum() + (bars[1][:, MASKED] * dual).sum()
        found.append((y, dual, *torch.autograd.grad(loss, values)))
    assert not found[0][3][:, ~MASKED].any()
    for mine, wanted in zip(*found, strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("solver", ["clarabel", "daqp", "interior_point", "scs"])
def test_infinite_limits_with_every_solver(solver):
    x, q, u = cp.Variable(3), cp.Parameter(3), cp.Parameter(3)
    layer = ConvexLayer(
        cp.Problem(cp.Minimize(cp.sum_squares(x - q)), [x <= u]), [q, u], [x], solver=solver
    )
    value = torch.tensor([3.0, -1.0, 1.5], dtype=torch.float64)
    limits = torch.tensor([[1.0, INF, 2.0], [INF] * 3, [2.0, 0.0, 1.0]], dtype=torch.float64)
    torch.testing.assert_close(
        layer(value, limits)[0], torch.minimum(value, limits), rtol=0, atol=1e-9
    )


def test_infinite_constants():
    value = torch.tensor([3.0, -1.0, 1.5], dtype=torch.float64)
    x, q = cp.Variable(3), cp.Parameter(3)
    some, every, none = np.array([1.0, INF, 2.0]), np.full(3, INF), np.array([1.0, -INF, 2.0])
    objective = cp.Minimize(cp.sum_squares(x - q))
    assert torch.allclose(ConvexLayer(cp.Problem(objective, [x <= some]), [q], [x])(value)[0], value.clamp(max=torch.from_numpy(some)))  # fmt: skip
    unlimited = ConvexLayer(cp.Problem(objective, [x <= every]), [q], [x])
    assert unlimited.structure == "least_squares"
    assert torch.allclose(unlimited(value)[0], value)
    impossible = ConvexLayer(cp.Problem(objective, [x <= none]), [q], [x], on_failure="nan")
    assert impossible.solve(value).status == Status.INFEASIBLE
    with pytest.raises(ProblemError, match="no bound"):
        ConvexLayer(cp.Problem(objective, [x[0] == INF, x <= 1]), [q], [x], structure="generic")


def test_infinity_means_something_in_a_limit_alone():
    x, q, u = cp.Variable(3), cp.Parameter(3, name="q"), cp.Parameter(3, name="u")
    layer = ConvexLayer(cp.Problem(cp.Minimize(cp.sum_squares(x - q)), [x <= u]), [q, u], [x])
    good, infinite = torch.ones(3, dtype=torch.float64), torch.full((3,), INF, dtype=torch.float64)
    with pytest.raises(ParameterError, match="`q` holds infinity"):
        layer(infinite, good)
    with pytest.raises(ParameterError, match="`u` holds NaN"):
        layer(good, good * torch.nan)
    limits = torch.stack([infinite, -infinite, good])
    assert layer.with_options(on_failure="nan").solve(good, limits).status.tolist() == [
        0,
        Status.INFEASIBLE,
        0,
    ]


PINNED = {
    "feasibility": (lambda v: 0, lambda v, p: [v == p], 1.0),
    "linear": (cp.sum, lambda v, p: [2 * v == p], 0.5),
    "quadratic": (cp.sum_squares, lambda v, p: [v == p], 1.0),
    "with a bound": (cp.sum, lambda v, p: [v == p, v <= 10], 1.0),
}


@pytest.mark.parametrize("shape", [(), (3,), (2, 2)], ids=str)
@pytest.mark.parametrize("structure", ["auto", "generic"])
@pytest.mark.parametrize("name", PINNED)
def test_equalities_may_give_every_variable(name, structure, shape):
    objective, rules, factor = PINNED[name]
    v, p = cp.Variable(shape), cp.Parameter(shape)
    layer = ConvexLayer(
        cp.Problem(cp.Minimize(objective(v)), rules(v, p)), [p], [v], structure=structure
    )
    value = spread(2, *shape).requires_grad_()
    bar = spread(2, *shape, seed=1)
    (found,) = layer(value)
    torch.testing.assert_close(found, factor * value, rtol=0, atol=1e-12)
    torch.testing.assert_close(
        torch.autograd.grad(found, value, bar)[0], factor * bar, rtol=0, atol=1e-12
    )

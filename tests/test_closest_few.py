"""on_failure="closest_few": the total of the shifts is the least there is, and few constraints bear
it. Against CVXPY and differences."""

from __future__ import annotations

import copy
import pickle

import cvxpy as cp
import numpy as np
import pytest
import torch

from convlayer import ConvexLayer, ProblemError, SolverError
from convlayer.paths.closest import TIE

x, cost, cap = cp.Variable(5, name="x"), cp.Parameter(5, name="cost"), cp.Parameter(5, name="cap")
low, high = cp.Parameter(5, name="low"), cp.Parameter(5, name="high")
G = np.random.default_rng(0).standard_normal((8, 5))
h = cp.Parameter(8, name="h")


def portfolio():
    constraints = [cp.sum(x) == 1, x <= cap, x >= 0, x <= 10]
    return (
        cp.Problem(cp.Minimize(cp.sum_squares(x) + cost @ x), constraints),
        [cost, cap],
        lambda r: [r.normal(size=5), r.uniform(0.02, 0.15, 5)],
    )


def interval():
    return (
        cp.Problem(cp.Minimize(cp.sum_squares(x)), [x <= high, x >= low]),
        [high, low],
        lambda r: [r.normal(size=5), 1 + r.normal(size=5)],
    )


def rows():
    problem = cp.Problem(
        cp.Minimize(cp.sum_squares(x - cost)), [G @ x <= h, -G[:3] @ x <= -h[:3] - 1]
    )
    return problem, [cost, h], lambda r: [r.normal(size=5), r.normal(size=8)]


def ball():
    problem = cp.Problem(
        cp.Minimize(cp.sum_squares(x - cost)), [cp.norm(x) <= 1, x[0] >= low[0], x[1] == high[1]]
    )
    return (
        problem,
        [cost, low, high],
        lambda r: [r.normal(size=5), np.full(5, 2.0), r.normal(size=5)],
    )


CASES = [portfolio, interval, rows, ball]


def tensors(values, grad=False):
    return [torch.tensor(value, dtype=torch.float64, requires_grad=grad) for value in values]


def total(shifts) -> float:
    return float(sum(part.abs().sum() for part in shifts))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("seed", range(2))
def test_the_total_is_the_least_and_fewer_entries_move(case, seed):
    problem, parameters, sample = case()
    values = sample(np.random.default_rng(seed))
    few, all_ = (
        ConvexLayer(problem, parameters, [x], on_failure=how).solve(*tensors(values))
        for how in ("closest_few", "closest")
    )
    for parameter, value in zip(parameters, values, strict=True):
        parameter.value = value
    slack = [cp.Variable(c.shape) for c in problem.constraints]
    held = [
        c.args[0] == c.args[1] + s
        if isinstance(c, cp.constraints.Equality)
        else c.args[0] <= c.args[1] + s
        for c, s in zip(problem.constraints, slack, strict=True)
    ]
    least = cp.Problem(cp.Minimize(sum(cp.norm1(cp.vec(s, order="C")) for s in slack)), held).solve(
        solver=cp.CLARABEL
    )
    assert least - 1e-6 <= total(few.shift) <= (1 + TIE) * least + 1e-6
    moved = [sum(int((part.abs() > 1e-7).sum()) for part in one.shift) for one in (few, all_)]
    assert moved[0] < moved[1] or moved[0] == 1
    # The answer solves the problem with its constraints shifted so.
    for s, shift in zip(slack, few.shift, strict=True):
        s.save_value(shift.numpy() + 1e-9 * (s.shape != ()))
    shifted = [
        c.args[0] == c.args[1] + s.value
        if isinstance(c, cp.constraints.Equality)
        else c.args[0] <= c.args[1] + s.value + 1e-9
        for c, s in zip(problem.constraints, slack, strict=True)
    ]
    best = cp.Problem(problem.objective, shifted).solve(solver=cp.SCS, eps=1e-9, max_iters=100_000)
    assert abs(float(few.objective) - best) <= 1e-4 * max(1.0, abs(best))


@pytest.mark.parametrize("case", CASES)
def test_the_derivative_is_that_of_differences(case):
    problem, parameters, sample = case()
    layer = ConvexLayer(problem, parameters, [x], on_failure="closest_few")
    rng = np.random.default_rng(5)
    values = sample(rng)
    leaves = tensors(values, grad=True)
    solution = layer.solve(*leaves)
    assert not bool(solution.degenerate)
    weight, directions = (
        torch.tensor(rng.standard_normal(5)),
        [rng.standard_normal(np.shape(v)) for v in values],
    )
    bars = torch.autograd.grad(weight @ solution.variables[0], leaves, allow_unused=True)
    mine = sum(
        float((b * torch.tensor(d)).sum())
        for b, d in zip(bars, directions, strict=True)
        if b is not None
    )

    def at(step: float) -> float:
        return float(
            weight
            @ layer(*tensors([v + step * d for v, d in zip(values, directions, strict=True)]))[0]
        )

    theirs = (8 * (at(1e-4) - at(-1e-4)) - (at(2e-4) - at(-2e-4))) / 1.2e-3
    assert abs(mine - theirs) <= 1e-6 * max(1.0, abs(theirs))


def test_between_constraints_that_would_do_as_well_the_later_one_moves():
    problem, parameters, _ = interval()
    solution = ConvexLayer(problem, parameters, [x], on_failure="closest_few").solve(
        *tensors([np.zeros(5), np.arange(1.0, 6.0)])
    )
    torch.testing.assert_close(solution.shift[0], torch.zeros(5, dtype=torch.float64))
    torch.testing.assert_close(solution.shift[1], torch.arange(1.0, 6.0, dtype=torch.float64))
    torch.testing.assert_close(solution.variables[0], torch.zeros(5, dtype=torch.float64))


@pytest.mark.parametrize("how", ["closest", "closest_few"])
def test_shifts_are_told_by_name(how):
    problem, parameters, _ = portfolio()
    layer = ConvexLayer(problem, parameters, [x], on_failure=how)
    values = tensors([np.zeros(5), np.stack([np.full(5, 1.0), np.linspace(0.05, 0.15, 5)])])
    shifts = layer.solve(*values).shift
    assert list(shifts.names) == [
        f"constraint {k}, `{text}`"
        for k, text in enumerate(["sum(x) == 1", "x <= cap", "x >= 0", "x <= 10"])
    ]
    assert shifts[1].shape == (2, 5)
    assert not shifts[1][0].any()
    expected = {
        "closest": ["constraint 0, `sum(x) == 1`", "constraint 1, `x <= cap`"],
        "closest_few": ["constraint 1, `x <= cap`"],
    }[how]
    assert list(shifts.moved) == expected
    assert all(name in str(shifts) and name in repr(shifts) for name in expected)
    assert any(
        "row 1: infeasible" in note and expected[-1] in note for note in layer.solve(*values).notes
    )
    for other in (copy.deepcopy(shifts), pickle.loads(pickle.dumps(shifts))):
        assert other.names == shifts.names
        assert len(other) == 4
    assert layer.solve(values[0], values[1][0]).shift is None


def test_what_may_not_give_way_and_what_cannot():
    z, d = cp.Variable(2, nonneg=True, name="z"), cp.Parameter(name="d")
    bounded = cp.Variable(2, bounds=[0, 1], name="bounded")
    stuck = ConvexLayer(
        cp.Problem(cp.Minimize(cp.sum(z)), [cp.sum(z) == d]), [d], [z], on_failure="closest_few"
    )
    shift = stuck.solve(torch.tensor(-1.0, dtype=torch.float64)).shift
    assert float(shift[0]) == pytest.approx(1.0)
    with pytest.raises(ProblemError, match="closest_few"):
        ConvexLayer(
            cp.Problem(cp.Minimize(cp.sum(z)), [cp.log(z[0]) >= d]),
            [d],
            [z],
            on_failure="closest_few",
        )
    unbounded = cp.Problem(cp.Minimize(-cp.sum(bounded) - cp.sum(z)), [cp.sum(bounded) >= d])
    with pytest.raises(SolverError):
        ConvexLayer(unbounded, [d], [z], on_failure="closest_few")(
            torch.tensor(5.0, dtype=torch.float64)
        )

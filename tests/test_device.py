"""What runs on the parameters' device never leaves it: shown on a pretended one, and where there is
CUDA on that."""

import warnings

import cvxpy as cp
import pytest
import torch
from cases import CASES, close
from far import DEVICE, Far, far_device, send

from convlayer import ConvexLayer, GradientWarning, Status

every_case = pytest.mark.parametrize("name", CASES)


def run(layer, inputs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GradientWarning)
        solution = layer.solve(*inputs)
        total = sum(v.sum() for v in solution.variables) + solution.objective.sum()
        return solution, torch.autograd.grad(total, inputs, allow_unused=True)


@every_case
def test_the_cone_program_is_solved_and_differentiated_on_the_device(name):
    case = CASES[name]
    layer, tensors = case.layer(), case.sample(3, seed=0)
    here, bars = run(layer, [t.clone().requires_grad_() for t in tensors])
    with far_device():
        there, far_bars = run(layer, [send(t, requires_grad=True) for t in tensors])
        assert all(v.device == DEVICE for v in (*there.variables, there.objective, *far_bars))
    assert torch.equal(there.status, here.status)
    assert (there.status == Status.SOLVED).all()
    for a, b in zip(there.variables, here.variables, strict=True):
        assert close(a.inner if isinstance(a, Far) else a, b, 1e-7)
    size = max(float(bar.norm()) for bar in bars)
    for a, b in zip(far_bars, bars, strict=True):
        assert float((a.inner - b).norm()) <= 1e-6 * size


def test_rows_that_fail_there_are_told_and_rows_for_the_host_come_back():
    """One row infeasible, one NaN, one weakly active: the first attempt is made there, what it
    leaves open on the host."""
    a, h, x = cp.Parameter(3, name="a"), cp.Parameter(name="h"), cp.Variable(3, name="x")
    problem = cp.Problem(
        cp.Minimize(cp.sum_squares(x - a)), [cp.sum(x) <= h, cp.norm(x) <= 2, x >= 0]
    )
    layer = ConvexLayer(problem, [a, h], [x], on_failure="nan")
    points = torch.tensor(
        [[1.0, 2.0, 3.0], [1.0, 1.0, 1.0], [1.0, 1.0, 1.0], [0.1, 0.2, 0.3]], dtype=torch.float64
    )
    heights = torch.tensor([1.0, -1.0, torch.nan, 0.6], dtype=torch.float64)
    here, bars = run_used(layer, [points.requires_grad_(), heights.requires_grad_()])
    with far_device():
        there, far_bars = run_used(layer, [send(points, True), send(heights, True)])
    assert here.status.tolist() == [
        Status.SOLVED,
        Status.INFEASIBLE,
        Status.BAD_INPUT,
        Status.SOLVED,
    ]
    assert torch.equal(there.status, here.status)
    assert torch.equal(there.degenerate, here.degenerate)
    for far, near in zip((there.variables[0], *far_bars), (here.variables[0], *bars), strict=True):
        torch.testing.assert_close(far.inner, near.detach(), equal_nan=True, rtol=1e-6, atol=1e-7)


def run_used(layer, inputs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GradientWarning)
        solution = layer.solve(*inputs)
        return solution, torch.autograd.grad(
            (solution.variables[0][0] + solution.variables[0][3]).sum(), inputs
        )


def test_a_warm_start_works_there():
    case = CASES["norm_ball"]
    layer, tensors = case.layer(), case.sample(3, seed=0)
    with far_device():
        inputs = [send(t) for t in tensors]
        cold, warm = (layer.solve(*inputs, ids=[0, 1, 2]) for _ in range(2))
    assert (cold.iterations > 0).all()
    assert (warm.iterations == 0).all()
    assert close(warm.variables[0].inner, cold.variables[0].inner, 1e-9)


cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")


@cuda
@every_case
def test_the_cone_program_on_cuda_agrees_with_the_host(name):
    case = CASES[name]
    layer, tensors = case.layer(), case.sample(3, seed=0)
    here, bars = run(layer, [t.clone().requires_grad_() for t in tensors])
    there, cuda_bars = run(layer, [t.cuda().requires_grad_() for t in tensors])
    assert torch.equal(there.status, here.status)
    for a, b in zip(there.variables, here.variables, strict=True):
        assert a.is_cuda
        assert close(a.cpu(), b, 1e-7)
    size = max(float(bar.norm()) for bar in bars)
    for a, b in zip(cuda_bars, bars, strict=True):
        assert float((a.cpu() - b).norm()) <= 1e-6 * size

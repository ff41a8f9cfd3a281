"""What runs on the parameters' device never leaves it: shown on a pretended one, and where there is CUDA on that."""

import warnings

import pytest
import torch
from cases import CASES, close
from far import DEVICE, Far, far_device, send

from convlayer import GradientWarning, Status

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

"""A warm start gives the same answer in fewer iterations, row by row, whatever has become of the
batch in between."""

import copy
import pickle

import pytest
import torch
from cases import CASES, close

from convlayer import ConvexLayer, Status
from convlayer.paths.starts import Starts
from convlayer.structures import STRUCTURES

every_case = pytest.mark.parametrize("name", CASES)


def moved(tensors, other, share):
    """The parameters moved a share of the way to others: their domains are convex."""
    return [(1 - share) * a + share * b for a, b in zip(tensors, other, strict=True)]


@every_case
def test_from_its_own_solution_a_row_needs_no_iteration_and_keeps_its_answer(name):
    layer, tensors = CASES[name].layer(), CASES[name].sample(3, seed=0)
    cold = layer.solve(*tensors, ids=torch.tensor([7, 8, 9]))
    warm = layer.solve(*tensors, ids=torch.tensor([7, 8, 9]))
    assert torch.equal(warm.status, cold.status)
    settled = ~cold.degenerate
    assert (warm.iterations[settled] <= 2).all()
    for a, b in zip(warm.variables, cold.variables, strict=True):
        assert close(a[settled], b[settled], 1e-8)


@every_case
def test_after_a_step_of_training_the_answer_is_that_of_a_cold_start(name):
    case = CASES[name]
    layer, tensors = case.layer(), case.sample(4, seed=0)
    ids = torch.arange(4)
    layer.solve(*tensors, ids=ids)
    inputs = [t.clone().requires_grad_() for t in moved(tensors, case.sample(4, seed=1), 0.01)]
    warm, cold = layer.solve(*inputs, ids=ids), layer.solve(*inputs)
    assert torch.equal(warm.status, cold.status)
    good = ~(warm.degenerate | cold.degenerate)
    for a, b in zip(
        [*warm.variables, warm.objective], [*cold.variables, cold.objective], strict=True
    ):
        assert close(a[good], b[good], 1e-8)
    if bool(good.all()):
        bars = [
            torch.autograd.grad(sum(v.sum() for v in s.variables), inputs, allow_unused=True)
            for s in (warm, cold)
        ]
        for a, b in zip(*bars, strict=True):
            assert float((a - b).norm()) <= 1e-6 * max(
                1e-3, max(float(bar.norm()) for bar in bars[1])
            )


def test_iterations_fall_by_more_than_a_third_on_a_training_run():
    saved = total = 0
    for name in (
        "quadratic_program",
        "lasso",
        "norm_ball",
        "entropy",
        "nearest_correlation",
        "logistic_regression",
    ):
        case = CASES[name]
        layer, tensors, other = case.layer(), case.sample(4, seed=0), case.sample(4, seed=1)
        for step in range(5):
            now = moved(tensors, other, 0.02 * step)
            warm, cold = layer.solve(*now, ids=range(4)), layer.solve(*now)
            if step:
                saved += int((cold.iterations - warm.iterations).sum())
                total += int(cold.iterations.sum())
    assert saved > total / 3


def test_samples_are_told_by_their_ids_in_any_batch():
    case = CASES["norm_ball"]
    layer, tensors = case.layer(), case.sample(6, seed=0)
    layer.solve(*(t[:4] for t in tensors), ids=["a", "b", "c", "d"])
    order = torch.tensor([3, 5, 0])
    mixed = layer.solve(*(t[order] for t in tensors), ids=["d", "new", "a"])
    assert (mixed.iterations[[0, 2]] == 0).all()
    assert mixed.iterations[1] > 0
    cold = layer.solve(*(t[order] for t in tensors))
    assert close(mixed.variables[0], cold.variables[0], 1e-9)


def test_a_failed_row_leaves_no_start_and_a_bad_start_does_no_harm():
    case = CASES["norm_ball"]
    layer, tensors = case.layer(on_failure="nan"), case.sample(2, seed=0)
    broken = [t.clone() for t in tensors]
    broken[0][0] = torch.nan
    layer.solve(*broken, ids=[0, 1])
    again = layer.solve(*tensors, ids=[0, 1])
    assert again.iterations[0] > 0
    assert again.iterations[1] == 0
    swapped = layer.solve(*(t.flip(0) * 100 for t in tensors), ids=[0, 1])
    assert (swapped.status == Status.SOLVED).all()


def test_a_layer_forgets_when_told_and_its_copies_know_nothing():
    case = CASES["norm_ball"]
    layer, tensors = case.layer(), case.sample(2, seed=0)
    layer.solve(*tensors, ids=[0, 1])
    assert len(layer._starts) == 2
    for other in (
        copy.copy(layer),
        copy.deepcopy(layer),
        pickle.loads(pickle.dumps(layer)),
        layer.with_options(on_failure="nan"),
    ):
        assert len(other._starts) == 0 or other._starts is layer._starts
    layer.forget()
    assert (layer.solve(*tensors, ids=[0, 1]).iterations > 0).all()


def test_the_oldest_samples_go_first_when_there_is_no_room(monkeypatch):
    monkeypatch.setattr("convlayer.paths.starts.BYTES", 8 * 3 * 4)
    starts = Starts()
    point = tuple(torch.arange(4.0, dtype=torch.float64)[:, None] + k for k in range(3))
    starts.put([0, 1, 2, 3], point, torch.ones(4, dtype=torch.bool))
    starts.put([0], tuple(part[:1] + 10 for part in point), torch.ones(1, dtype=torch.bool))
    starts.put([4], tuple(part[:1] + 20 for part in point), torch.ones(1, dtype=torch.bool))
    x, s, y = starts.get([0, 1, 2, 4], (1, 1, 1))
    assert x.flatten().tolist()[0] == 10.0
    assert x[1].isnan()
    assert x[2] == 2.0
    assert (x[3], s[3], y[3]) == (20.0, 21.0, 22.0)


@pytest.mark.parametrize("name", STRUCTURES)
def test_a_kernel_takes_ids_and_needs_none(name):
    structure = STRUCTURES[name]
    layer = ConvexLayer(*structure.declare())
    tensors = structure.sample((2,), torch.Generator().manual_seed(0))
    (plain, *_), (named, *_) = layer(*tensors), layer(*tensors, ids=[0, 1])
    assert torch.equal(plain, named)

"""Small work runs on one thread, in the calling thread only; batched LU is right on any number of
threads."""

import subprocess
import sys
import threading
import warnings
from contextlib import contextmanager

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from convlayer import ConvexLayer, problems
from convlayer.autodiff.threads import _libraries, few_threads, lu_factor, one_thread
from convlayer.core.interface import core
from convlayer.structures import STRUCTURES


def test_one_thread_holds_inside_and_in_the_calling_thread_only():
    before, seen = torch.get_num_threads(), []
    with one_thread():
        assert torch.get_num_threads() == 1
        other = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
        other.start()
        other.join()
    assert torch.get_num_threads() == before
    assert seen == [before]


def test_lu_with_wrong_pivots_is_done_again(monkeypatch):
    original, calls = torch.linalg.lu_factor_ex, []

    def wrong_at_first(K):
        lu, pivots, info = original(K)
        calls.append(torch.get_num_threads())
        return (lu, pivots * 0, info) if len(calls) == 1 else (lu, pivots, info)

    monkeypatch.setattr(torch.linalg, "lu_factor_ex", wrong_at_first)
    K = torch.randn(3, 5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    lu, pivots = lu_factor(K)
    P, L, U = torch.lu_unpack(lu, pivots)
    assert len(calls) == 2
    assert calls[1] == 1
    assert torch.allclose(P @ L @ U, K)


def test_a_process_of_several_threads_solves_growing_systems():
    """Where the thread setting is made anew between calls, batched LU of such sizes has come out
    wrong."""
    code = """
import torch
from convlayer import problems
for n in (16, 20, 24):
    (X,) = problems.leading_eigenvector.sample(16, 0, n)
    layer = problems.leading_eigenvector.layer(n, structure="generic")
    for _ in range(2):
        layer(X.requires_grad_())[0].sum().backward()
print("right", torch.get_num_threads())
"""
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert run.stdout.startswith("right"), run.stderr[-2000:]


def test_a_layer_leaves_the_number_of_threads_alone():
    before = torch.get_num_threads()
    for structure in ("auto", "generic"):
        layer = problems.ridge.layer(6, 3, structure=structure)
        inputs = [t.requires_grad_() for t in problems.ridge.sample(4, 0, 6, 3)]
        layer(*inputs)[0].sum().backward()
        assert torch.get_num_threads() == before


# Threads asked for
# -----------------------------------------------------------------------------------------------------------


class Asked(TorchDispatchMode):
    """Operations that compute, and for how many threads each could ask."""

    def __init__(self):
        super().__init__()
        self.several, self.count = [], 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if not (operation.is_view or operation.name() in WITHOUT_WORK):
            self.count += 1
            if torch.get_num_threads() > 1:
                self.several.append(operation.name())
        return operation(*args, **(kwargs or {}))


WITHOUT_WORK = {
    "aten::detach",
    "aten::alias",
    "aten::empty.memory_format",
    "aten::empty_like",
    "aten::lift_fresh",
    "aten::_reshape_alias",
}


@contextmanager
def two_threads():
    """Whatever the environment says."""
    before = [library.get_num_threads() for library in _libraries()]
    torch.get_num_threads()
    for library in _libraries():
        library.set_num_threads(2)
    try:
        yield
    finally:
        for library, count in zip(_libraries(), before, strict=True):
            library.set_num_threads(count)


LAYERS = {
    **{
        name: lambda name=name: (ConvexLayer(*STRUCTURES[name].declare()), STRUCTURES[name].sample)
        for name in STRUCTURES
    },
    "a symmetric parameter": lambda: (problems.leading_eigenvector.layer(6), None),
    "cone_program": lambda: (problems.nearest_correlation.layer(4, structure="generic"), None),
}


def inputs_of(name, batch):
    layer, sample = LAYERS[name]()
    if sample is not None:
        tensors = sample((batch,), torch.Generator().manual_seed(0))
    elif name == "cone_program":
        tensors = problems.nearest_correlation.sample(batch, 0, 4)
    else:
        tensors = problems.leading_eigenvector.sample(batch, 0, 6)
    return layer, [tensor.detach().requires_grad_() for tensor in tensors]


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("solve", [False, True])
def test_small_work_asks_for_one_thread_forward_backward_and_in_second_derivatives(name, solve):
    """The solvers' own threads are others; a pool's are not watched here."""
    layer, inputs = inputs_of(name, 8)

    def outputs():
        if not solve:
            return list(layer(*inputs))
        solution = layer.solve(*inputs)
        return [*solution.variables, solution.objective]

    with warnings.catch_warnings(), two_threads():
        warnings.simplefilter("ignore")
        bars = [torch.ones_like(output) for output in outputs()]
        for work in ("forward", "backward", "second"):
            asked = Asked()
            found = outputs() if work != "forward" else None
            if work == "second":
                firsts = torch.autograd.grad(found, inputs, bars, create_graph=True)
                seconds = [torch.ones_like(first) for first in firsts]
            with asked:
                if work == "forward":
                    outputs()
                elif work == "backward":
                    torch.autograd.grad(found, inputs, bars)
                else:
                    torch.autograd.grad(firsts, inputs, seconds)
            short = layer._choice.kernel is None and core() is not None  # it asks torch nothing
            assert asked.count > 0 or short
            assert not asked.several, f"{work}: {sorted(set(asked.several))}"
        assert torch.get_num_threads() == 2


@pytest.mark.parametrize("mode", ["jacfwd", "jacrev", "hessian"])
def test_transforms_ask_for_one_thread(mode):
    layer, (A, b) = (
        problems.least_squares.layer(6, 3),
        (t[0] for t in problems.least_squares.sample(1, 0, 6, 3)[:2]),
    )
    with two_threads(), Asked() as asked:
        getattr(torch.func, mode)(lambda b: layer(A, b)[0].sum())(b)
    assert not {
        name
        for name in asked.several
        if "lu" in name or "cholesky" in name or "qr" in name or "solve" in name
    }


def test_large_work_may_ask_for_more():
    with two_threads():
        with few_threads(1e6):
            assert torch.get_num_threads() == 1
        with few_threads(1e9):
            assert torch.get_num_threads() == 2

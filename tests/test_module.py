"""The layer as a torch module: copies, hooks, options, threads, forks, memory, compiled models."""

import copy
import gc
import os
import pickle
import threading
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from cases import CASES

from convlayer import ConvexLayer, GradientWarning
from convlayer.kkt import DenseSystem, SparseSystem
from convlayer.solvers.solver import default_executor


@pytest.fixture
def case():
    return CASES["lasso"]


def outputs(layer: ConvexLayer, tensors) -> list[torch.Tensor]:
    return list(layer(*tensors))


def test_copies_and_pickles_give_the_same_answers(case):
    tensors = case.sample(3)
    for options in ({}, {"executor": ThreadPoolExecutor(1)}):
        layer = case.layer(**options)
        expected = outputs(layer, tensors)
        for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), layer.with_options()):
            assert all(torch.equal(a, b) for a, b in zip(outputs(other, tensors), expected, strict=True))


def test_options_of_a_sibling_are_added_to_the_layers(case):
    layer = case.layer(solver_args={"max_iter": 7, "tolerance": 1e-9})
    sibling = layer.with_options(solver_args={"tolerance": 1e-10}, on_failure="nan")
    assert (sibling._options, sibling._tolerance, sibling.on_failure) == ({"max_iter": 7}, 1e-10, "nan")
    assert (layer._options, layer._tolerance, layer.on_failure) == ({"max_iter": 7}, 1e-9, "raise")
    other = layer.with_options(solver="scs")
    assert (other._options, other._tolerance) == ({}, 1e-9)
    with pytest.raises(TypeError, match="nonsense"):
        layer.with_options(solver_args={"nonsense": 1})


def test_hooks_of_a_sibling_are_its_own(case):
    layer, seen = case.layer(), []
    layer.with_options(on_failure="nan").register_forward_hook(lambda *_: seen.append(1))
    layer(*case.sample(2))
    assert not seen


def test_a_call_keeps_nothing_alive(case):
    for name in ("lasso", "quadratic_program", "entropy"):
        layer, tensors = CASES[name].layer(), [t.requires_grad_() for t in CASES[name].sample(4)]
        alive: list[weakref.ref] = []
        for kind in (DenseSystem, SparseSystem):
            original = kind.__init__

            def recorded(self, *arguments, original=original, alive=alive):
                original(self, *arguments)
                alive.append(weakref.ref(self))

            kind.__init__ = recorded
            try:
                gc.disable()
                layer.solve(*tensors).variables[0].sum().backward()
                layer.solve(*tensors)
            finally:
                gc.enable()
                kind.__init__ = original
        assert alive
        assert all(reference() is None for reference in alive)


def test_the_number_of_torch_threads_is_left_as_it_was(case):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        layer, tensors, seen = case.layer(), case.sample(4), []

        def work():
            for _ in range(5):
                layer(*tensors)
            seen.append(torch.get_num_threads())

        threads = [threading.Thread(target=work) for _ in range(4)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        assert seen == [2] * 4
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform does not fork")
def test_a_forked_child_solves(case):
    layer, tensors = case.layer(), case.sample(8)
    layer(*tensors)
    assert default_executor.cache_info().currsize == 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking beside threads: the point of the test
        child = os.fork()
    if not child:
        try:
            layer(*tensors)
            os._exit(0)
        except BaseException:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0


def test_a_compiled_model_agrees(case):
    layer, tensors = case.layer(), case.sample(4)

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, *values):
            return 2 * self.layer(*(1.0 * v for v in values))[0]

    model = Model()
    compiled = torch.compile(model, backend="eager")
    assert torch.equal(compiled(*tensors), model(*tensors))


def test_a_warning_points_at_the_users_line():
    import cvxpy as cp

    a, x = cp.Parameter(2, name="a"), cp.Variable(2, name="x")
    layer = ConvexLayer(cp.Problem(cp.Minimize(cp.sum_squares(x - a)), [x >= 0]), [a], [x])
    value = torch.zeros(2, 3, 2, dtype=torch.float64)
    value[0, 1] = value[1, 2] = 1.0
    with pytest.warns(GradientWarning, match=r"\(1, 1\)") as caught:
        layer(value.requires_grad_())[0].sum().backward()
    assert caught[0].filename == __file__

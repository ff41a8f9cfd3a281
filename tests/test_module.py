"""The layer as a torch module: copies, hooks, options, threads, forks, memory, compiled models."""

import copy
import gc
import os
import pickle
import subprocess
import sys
import threading
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from cases import CASES

from convlayer import ConvexLayer, GradientWarning
from convlayer.conic.kkt import DenseSystem, SparseSystem
from convlayer.core import maps, rows
from convlayer.solvers.dealing import default_executor


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
        for other in (
            copy.deepcopy(layer),
            pickle.loads(pickle.dumps(layer)),
            layer.with_options(),
        ):
            assert all(
                torch.equal(a, b) for a, b in zip(outputs(other, tensors), expected, strict=True)
            )


def test_options_of_a_sibling_are_added_to_the_layers(case):
    layer = case.layer(solver_args={"max_iter": 7, "tolerance": 1e-9})
    sibling = layer.with_options(solver_args={"tolerance": 1e-10}, on_failure="nan")
    assert (
        sibling._settings.solving.options,
        sibling._settings.solving.tolerance,
        sibling.on_failure,
    ) == ({"max_iter": 7}, 1e-10, "nan")
    assert (
        layer._settings.solving.options,
        layer._settings.solving.tolerance,
        layer.on_failure,
    ) == ({"max_iter": 7}, 1e-9, "raise")
    other = layer.with_options(solver="scs")
    assert (other._settings.solving.options, other._settings.solving.tolerance) == ({}, 1e-9)
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
        for kind in (DenseSystem, SparseSystem, rows.Solved, maps.Called):
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
    default_executor()
    with warnings.catch_warnings():
        # of forking beside threads: the point of the test
        warnings.simplefilter("ignore", DeprecationWarning)
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


# Saved, shared, and run elsewhere
# ----------------------------------------------------------------------------------------------


def test_a_pickle_holds_the_declaration_and_not_what_is_made_from_it(case):
    for structure in ("auto", "generic"):
        layer = case.layer(structure=structure, solver_args={"tolerance": 1e-9}, on_failure="nan")
        assert len(pickle.dumps(layer)) < 20_000
        other = pickle.loads(pickle.dumps(layer))
        assert other._declared._canonical is None
        assert (other.structure, other._settings.solving.tolerance, other.on_failure) == (
            layer.structure,
            1e-9,
            "nan",
        )


def test_a_pickle_is_the_same_layer_in_another_process(tmp_path):
    """Where CVXPY has numbered other variables already."""
    saved = []
    for name in ("lasso", "every_cone", "posynomial", "ridge", "transport"):
        layer, tensors = CASES[name].layer(), CASES[name].sample(3)
        saved.append((layer, tensors, outputs(layer, tensors)))
    torch.save(saved, tmp_path / "layers.pt")
    code = (
        "import sys, torch, cvxpy as cp\n"
        "[cp.Variable() for _ in range(7)]\n"
        "for layer, tensors, expected in torch.load(sys.argv[1], weights_only=False):\n"
        "    assert all(torch.equal(a, b) for a, b in zip(layer(*tensors), expected, strict=True))\n"
    )
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, str(tmp_path / "layers.pt")],
        check=True,
        timeout=120,
    )


def test_a_model_with_a_layer_is_saved_loaded_moved_and_shared(case, tmp_path):
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scale, self.layer = (
                torch.nn.Parameter(torch.tensor(2.0, dtype=torch.float64)),
                case.layer(),
            )

        def forward(self, *values):
            return self.layer(*(self.scale * v for v in values))[0]

    model, tensors = Model(), case.sample(3)
    assert list(model.state_dict()) == ["scale"]
    torch.save(model.state_dict(), tmp_path / "state.pt")
    other = Model()
    other.load_state_dict(torch.load(tmp_path / "state.pt"))
    copied = copy.deepcopy(model)
    assert copied.layer is not model.layer
    assert copied.scale is not model.scale
    for same in (other, copied, model.share_memory(), model.to("cpu").eval()):
        assert torch.equal(same(*tensors), model(*tensors))


def test_a_subclass_with_parameters_is_copied_with_them(case):
    class Weighted(ConvexLayer):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            self.weight = torch.nn.Parameter(torch.ones(2))

    declared = case.layer()._declared
    layer = Weighted(declared.problem, declared.parameters, declared.variables)
    copied = copy.deepcopy(layer)
    with torch.no_grad():
        copied.weight += 1
    assert torch.equal(layer.weight, torch.ones(2))
    assert [name for name, _ in copied.named_parameters()] == ["weight"]


class Solved(torch.utils.data.Dataset):
    """Samples that are solutions, made by the workers of a loader."""

    def __init__(self, layer, tensors):
        self.layer, self.tensors = layer, tensors

    def __len__(self):
        return len(self.tensors[0])

    def __getitem__(self, k):
        return self.layer(*(t[k] for t in self.tensors))[0]


@pytest.mark.parametrize("context", ["fork", pytest.param("spawn", marks=pytest.mark.long)])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_loaders_workers_solve(case, context):
    if context not in torch.multiprocessing.get_all_start_methods():
        pytest.skip(f"this platform does not {context}")
    layer, tensors = case.layer(), case.sample(4)
    (expected,) = layer(*tensors)
    loader = torch.utils.data.DataLoader(
        Solved(layer, tensors), batch_size=2, num_workers=2, multiprocessing_context=context
    )
    assert torch.allclose(torch.cat(list(loader)), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("structure", ["auto", "generic"])
def test_the_same_input_gives_the_same_bits_from_any_thread(structure):
    for name in ("lasso", "every_cone", "ridge", "transport"):
        layer, tensors = (
            CASES[name].layer(structure=structure),
            [t.requires_grad_() for t in CASES[name].sample(4)],
        )

        def call(layer=layer, tensors=tensors):
            found = layer(*tensors)
            return [*found, *torch.autograd.grad(sum(o.square().sum() for o in found), tensors)]

        expected = call()
        with ThreadPoolExecutor(4) as pool:
            for found in pool.map(lambda _, call=call: call(), range(8)):
                assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))

"""Inside torch.compile: a model compiled whole is the eager model, bit for bit, and holds nothing
that the eager one does not."""

import copy
import gc
import pickle
import sys
import threading

import cvxpy as cp
import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from cases import CASES, leaves, relative
from structures import SPELLINGS
from test_structures import layer_of, sample
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import grad, jvp, vmap

from convlayer import ConvexLayer, ParameterError, SolverError
from convlayer.autodiff import compiled
from convlayer.structures import STRUCTURES

# polyhedral, curved, and log-log convex with variables read through exp
GENERIC = (
    "lasso",
    "every_cone",
    "posynomial",
)


class Model(torch.nn.Module):
    """A layer between two functions."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, *tensors):
        return [output.sin() * 2 for output in self.layer(*(1.0 * t for t in tensors))]


def whole(model, backend="aot_eager"):
    return torch.compile(model, fullgraph=True, backend=backend)


def values_and_gradients(model, tensors):
    inputs = leaves(tensors)
    outputs = model(*inputs)
    loss = sum(o.square().sum() for o in outputs)
    return [*(o.detach() for o in outputs), *torch.autograd.grad(loss, inputs)]


def the_same(model, other, tensors) -> bool:
    pairs = zip(
        values_and_gradients(model, tensors), values_and_gradients(other, tensors), strict=True
    )
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.fixture(autouse=True)
def fresh():
    """No graph of another test's, and nothing kept when a test is done."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    gc.collect()
    assert not compiled._kept


@pytest.fixture
def model():
    return Model(CASES["lasso"].layer())


@pytest.fixture
def tensors():
    return CASES["lasso"].sample(3)


@pytest.mark.dear
@pytest.mark.parametrize("name", [*GENERIC, *STRUCTURES])
def test_a_compiled_model_is_the_eager_one_bit_for_bit_at_every_batch_size_from_a_graph_or_two(
    name,
):
    generic = name in GENERIC
    layer = CASES[name].layer() if generic else layer_of(name)
    model, backend = Model(layer), CompileCounterWithBackend("aot_eager")
    twin = whole(model, backend)
    for batch in (2, 3, 5, 7):
        assert the_same(
            twin, model, CASES[name].sample(batch) if generic else sample(name, (batch,))
        )
    assert backend.frame_count <= 2


@pytest.mark.dear
@pytest.mark.parametrize("spelling", [s for s in SPELLINGS if "multipliers" in s.name], ids=str)
def test_multipliers_come_out_of_a_compiled_model_too(spelling):
    model = Model(spelling.layer())
    assert the_same(whole(model), model, spelling.sample((2,), 3))


def test_shared_parameters_and_two_batch_dimensions(model):
    A, b, lam = CASES["lasso"].sample()
    many = (
        b
        + torch.randn(2, 3, *b.shape, generator=torch.Generator().manual_seed(0), dtype=b.dtype)
        / 100
    )
    assert the_same(whole(model), model, (A, many, lam))


@pytest.mark.long
def test_a_model_compiled_by_inductor_agrees(model, tensors):
    try:
        torch.compile(lambda x: x.sin() + 1, backend="inductor")(torch.ones(4))
    except Exception as error:
        pytest.skip(
            f"inductor does not work here, with or without the layer: {type(error).__name__}"
        )
    found, expected = (values_and_gradients(m, tensors) for m in (whole(model, "inductor"), model))
    assert all(relative(a, b) < 1e-12 for a, b in zip(found, expected, strict=True))


# What is kept for backward
# ------------------------------------------------------------------------------------------------


def test_the_factor_is_freed_with_the_graph_whether_backward_is_called_or_not(model, tensors):
    twin = whole(model)
    for backward in (True, False):
        outputs = twin(*leaves(tensors))
        assert len(compiled._kept) == 1
        if backward:
            sum(o.sum() for o in outputs).backward()
        del outputs
        gc.collect()
        assert not compiled._kept


def test_nothing_is_kept_where_no_gradient_is_asked_for(model, tensors):
    twin = whole(model)
    model.eval()
    with torch.no_grad():
        outputs = twin(*leaves(tensors))
        assert not compiled._kept
        assert all(torch.equal(a, b) for a, b in zip(outputs, model(*tensors), strict=True))
    outputs = twin(*tensors)
    assert not compiled._kept
    assert not any(o.requires_grad for o in outputs)
    with torch.inference_mode():
        assert all(torch.equal(a, b) for a, b in zip(twin(*tensors), outputs, strict=True))
    assert not compiled._kept


def test_a_backward_without_its_factor_solves_again(model, tensors):
    inputs = leaves(tensors)
    outputs = whole(model)(*inputs)
    compiled._kept.clear()
    found = torch.autograd.grad(sum(o.square().sum() for o in outputs), inputs)
    expected = values_and_gradients(model, tensors)[len(outputs) :]
    assert all(relative(a, b) < 1e-12 for a, b in zip(found, expected, strict=True))


def test_a_second_backward_through_a_graph_that_is_retained(model, tensors):
    inputs = leaves(tensors)
    loss = sum(o.square().sum() for o in whole(model)(*inputs))
    first = torch.autograd.grad(loss, inputs, retain_graph=True)
    assert all(
        torch.equal(a, b) for a, b in zip(first, torch.autograd.grad(loss, inputs), strict=True)
    )


def test_only_the_parameters_that_ask_get_a_gradient(model, tensors):
    A, b, lam = tensors
    (b,) = leaves([b])
    loss, other = (sum(o.square().sum() for o in m(A, b, lam)) for m in (whole(model), model))
    assert torch.equal(torch.autograd.grad(loss, b)[0], torch.autograd.grad(other, b)[0])


# Models
# -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))],
    ids=["copied", "pickled"],
)
def test_a_model_that_was_copied_is_compiled_and_outlives_the_other(copied, tensors):
    model = Model(CASES["lasso"].layer())
    expected = values_and_gradients(model, tensors)
    other = copied(model)
    twin = whole(other)
    del model
    gc.collect()
    assert all(
        torch.equal(a, b)
        for a, b in zip(values_and_gradients(twin, tensors), expected, strict=True)
    )


def test_two_layers_in_one_model(tensors):
    first, second = CASES["lasso"].layer(), layer_of("sparsemax")

    class Two(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = first, second

        def forward(self, A, b, lam):
            (x,) = self.first(A, b, lam)
            points = torch.cat([x, x.square()], -1)[..., :6]
            return *self.second(points, lam), *self.second(points / 2, 1 + lam)

    model = Two()
    assert the_same(whole(model), model, tensors)


def test_a_layer_trains_in_a_compiled_model():
    A, b, _ = CASES["lasso"].sample(4)

    class Learned(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = CASES["lasso"].layer()
            self.log = torch.nn.Parameter(torch.zeros((), dtype=torch.float64))

        def forward(self, A, b):
            return self.layer(A, b, self.log.exp())[0].square().sum()

    ends = []
    for prepare in (whole, lambda m: m):
        model = Learned()
        step, optimiser = prepare(model), torch.optim.SGD(model.parameters(), lr=0.05)
        for _ in range(3):
            optimiser.zero_grad()
            step(A, b).backward()
            optimiser.step()
        ends.append(model.log.detach())
    assert torch.equal(*ends)
    assert float(ends[0]) != 0.0


# Errors
# -----------------------------------------------------------------------------------------------------------------


def test_a_row_that_failed_raises_out_of_the_compiled_model():
    low, x = cp.Parameter(2), cp.Variable(2)
    problem = cp.Problem(cp.Minimize(cp.norm(x - 2) + cp.sum_squares(x)), [x >= low, x <= 1])
    twin = whole(Model(ConvexLayer(problem, [low], [x])))
    good = torch.zeros(2, 2, dtype=torch.float64)
    twin(good)
    with pytest.raises(SolverError, match="row 1: INFEASIBLE"):
        twin(torch.tensor([[0.0, 0.0], [2.0, 2.0]], dtype=torch.float64))
    with pytest.raises(ParameterError, match="row 0: BAD_INPUT"):
        twin(torch.tensor([[torch.nan, 0.0], [0.0, 0.0]], dtype=torch.float64))
    twin(good)


def test_a_row_that_failed_is_nan_and_leaves_the_others_untouched(tensors):
    A, b, lam = (t.clone() for t in tensors)
    b[1] = torch.nan
    model = Model(CASES["lasso"].layer(on_failure="nan"))
    found, expected = (values_and_gradients(m, (A, b, lam)) for m in (whole(model), model))
    assert all(
        torch.equal(a.nan_to_num(7.0), e.nan_to_num(7.0))
        for a, e in zip(found, expected, strict=True)
    )
    assert bool(found[0][1].isnan().all())


def test_tensors_of_a_wrong_shape_kind_or_device_are_told_as_they_are_eagerly(model, tensors):
    A, b, lam = tensors
    for args in (
        (A, b[:, :-1], lam),
        (A, b.long(), lam),
        (A, b.to("meta"), lam),
        (A, b[:2], lam),
        (A, b),
    ):
        with pytest.raises((ValueError, TypeError)) as told:
            model.layer(*args)
        with pytest.raises(Exception) as error:  # noqa: PT011 - the compiler wraps it in one of its own
            whole(model.layer)(*args)
        torch._dynamo.reset()
        assert str(told.value).splitlines()[0] in str(error.value)


def test_batches_that_do_not_agree_are_told_of_symbolic_sizes_too(model, tensors):
    A, b, lam = tensors
    with pytest.raises(RuntimeError, match="The batch dimensions do not agree: `A`"):
        torch.compile(model.layer, fullgraph=True, backend="aot_eager", dynamic=True)(A, b[:2], lam)


def test_what_is_no_tensor_is_refused(model, tensors):
    for options in ({"solver_args": {"tolerance": 1e-6}}, {"ids": [0, 1, 2]}):
        with pytest.raises(Exception, match=r"takes tensors alone") as error:
            whole(lambda *args, options=options: model.layer(*args, **options))(*tensors)
        assert "TypeError" in f"{type(error.value).__name__} {error.value}"


def test_a_second_derivative_through_a_compiled_model_is_an_error_and_never_zero(model, tensors):
    inputs = leaves(tensors)
    loss = sum(o.square().sum() for o in whole(model)(*inputs))
    with pytest.raises(RuntimeError, match="does not currently support double backward"):
        sum(
            g.square().sum() for g in torch.autograd.grad(loss, inputs, create_graph=True)
        ).backward()


def test_the_operator_alone_refuses_a_second_derivative(model, tensors):
    inputs = leaves(tensors)
    outputs = compiled.outputs(inputs, None, model.layer._front.graph_name)
    first = torch.autograd.grad(sum(o.square().sum() for o in outputs), inputs, create_graph=True)
    with pytest.raises(RuntimeError, match=r"convlayer\.adjoint"):
        torch.autograd.grad(sum(g.square().sum() for g in first), inputs)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_forward_mode_through_a_compiled_model_is_an_error_and_never_zero(model, tensors, backend):
    twin = whole(model, backend)
    with pytest.raises(RuntimeError, match="no forward mode"):
        whole(lambda *args: jvp(lambda *at: model(*at)[0], args, args)[1], backend)(*tensors)
    for _ in range(2):
        with forward_ad.dual_level(), pytest.raises(RuntimeError, match="no forward mode"):
            twin(*(forward_ad.make_dual(t, t) for t in tensors))
        twin(*tensors)  # compiled now, and called with dual tensors again


@pytest.mark.parametrize("transform", [vmap, grad])
def test_other_transforms_inside_a_compiled_function_are_an_error_and_never_wrong(
    model, tensors, transform
):
    with pytest.raises(RuntimeError, match="convlayer"):
        whole(transform(lambda *args: model(*args)[0].square().sum()))(*tensors)


# Warm starts
# ------------------------------------------------------------------------------------------------------------


def test_ids_are_taken_as_a_tensor_and_start_where_their_samples_ended():
    layer, other = (CASES["every_cone"].layer(solver="scs") for _ in range(2))
    tensors, ids = CASES["every_cone"].sample(3), torch.tensor([4, 2, 9])
    twin = whole(lambda ids, *args: layer(*args, ids=ids))
    twin(ids, *tensors)
    assert list(layer._starts._slots) == [4, 2, 9]
    found = twin(ids, *(t + 1e-3 for t in tensors))
    other(*tensors, ids=ids)
    expected = other(*(t + 1e-3 for t in tensors), ids=ids)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("structure", ["auto", "generic"])
def test_solve_in_a_compiled_function_is_left_out_of_its_graph(structure):
    x, p = cp.Variable(3), cp.Parameter(3)
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x - p)), [x >= 0, cp.sum(x) <= 1])
    layer = ConvexLayer(problem, [p], [x], structure=structure)
    theta = torch.tensor([[2.0, 1.7, 0.4]], dtype=torch.float64, requires_grad=True)
    plain = layer.solve(2 * theta).variables[0]
    compiled = torch.compile(lambda value: layer.solve(2 * value).variables[0], backend="eager")(
        theta
    )
    assert torch.equal(compiled, plain)
    bar = torch.tensor([[1.0, 2.0, 3.0]], dtype=torch.float64)
    found, wanted = (torch.autograd.grad(answer, theta, bar)[0] for answer in (compiled, plain))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)


class Named:
    """As much of a layer as has a name in graphs."""

    class _front:  # noqa: N801  # as a layer has it
        graph_name = "one of many"


def test_a_graph_looks_for_its_layer_while_other_threads_build_theirs():
    # So many that another thread comes in while they are looked through.
    alive = [Named() for _ in range(3000)]
    numbers = [compiled.registered(layer) for layer in alive]
    looked = threading.Event()

    def build():
        built = []
        while not looked.is_set():
            built.append(Named())
            numbers.append(compiled.registered(built[-1]))

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    builder = threading.Thread(target=build)
    try:
        builder.start()
        for _ in range(40):
            with pytest.raises(RuntimeError, match="declaration of none"):
                compiled._layer("of none")
    finally:
        looked.set()
        builder.join()
        sys.setswitchinterval(interval)
    assert len(set(numbers)) == len(numbers) > len(alive)
    assert compiled._layer(Named._front.graph_name)._front.graph_name == Named._front.graph_name

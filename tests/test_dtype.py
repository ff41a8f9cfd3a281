"""The answer has the dtype of the question, and is computed in float64 or to the same accuracy,
whatever stands around it."""

import copy
import io
import pickle

import cvxpy as cp
import pytest
import torch
from cases import CASES, close, leaves, outputs_of, weights

from convlayer import ConvexLayer
from convlayer.core.interface import core
from convlayer.structures import STRUCTURES

SMALL = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}
some_cases = pytest.mark.parametrize(
    "case",
    [
        CASES[name]
        for name in (
            "quadratic_program",
            "transport",
            "norm_ball",
            "nearest_correlation",
            "entropy",
            "raw_power",
            "posynomial",
            "every_cone",
        )
    ],
    ids=str,
)


@some_cases
@pytest.mark.parametrize("dtype", [torch.float64, *SMALL])
def test_values_and_gradients_have_the_parameters_dtype_to_its_precision(case, dtype):
    """Against float64 at the same, rounded, parameters."""
    rounded = [t.to(dtype) for t in case.sample(2, seed=0)]
    layer = case.layer(validate=dtype in (torch.float64, torch.float32))
    inputs, exact = leaves(rounded), leaves([t.double() for t in rounded])
    outputs, references = outputs_of(layer, inputs), outputs_of(layer, exact)
    assert all(o.dtype == dtype for o in outputs)
    cotangents = [
        w.expand_as(o).to(dtype) for w, o in zip(weights(outputs, 1), outputs, strict=True)
    ]
    bars = torch.autograd.grad(outputs, inputs, cotangents)
    references_bar = torch.autograd.grad(references, exact, [w.double() for w in cotangents])
    tolerance = SMALL.get(dtype, 1e-12)
    for got, reference in zip(outputs, references, strict=True):
        assert close(got.double(), reference.detach(), tolerance)
    size = max(float(bar.norm()) for bar in references_bar)
    for got, reference in zip(bars, references_bar, strict=True):
        assert got.dtype == dtype
        assert float((got.double() - reference).norm()) <= tolerance * size


def test_mixed_dtypes_promote():
    case = CASES["lasso"]
    tensors = list(case.sample(2, seed=0))
    kinds = [torch.float32, torch.float64, torch.float16]
    inputs = leaves([t.to(kind) for t, kind in zip(tensors, kinds, strict=True)])
    (x,) = case.shared(*inputs)
    assert x.dtype == torch.float64
    bars = torch.autograd.grad(x.sum(), inputs)
    assert [bar.dtype for bar in bars] == kinds
    (x,) = case.shared(tensors[0].bfloat16(), tensors[1].half(), tensors[2].half())
    assert x.dtype == torch.promote_types(torch.bfloat16, torch.float16)


def test_status_and_residual_keep_their_own_dtypes():
    solution = CASES["lasso"].shared.solve(*(t.float() for t in CASES["lasso"].sample(2)))
    assert solution.status.dtype == torch.int64
    assert solution.residual.dtype == torch.float64
    assert solution.objective.dtype == torch.float32
    assert (solution.residual < 1e-11).all()


@some_cases
def test_autocast_around_the_layer_changes_nothing(case):
    tensors = [t.float() for t in case.sample(2, seed=0)]

    def run(enabled):
        inputs = leaves(tensors)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            outputs = outputs_of(case.shared, inputs)
            total = sum(
                (w.expand_as(o).float() * o).sum()
                for w, o in zip(weights(outputs, 1), outputs, strict=True)
            )
        return outputs, torch.autograd.grad(total, inputs)

    (plain, plain_bars), (cast, cast_bars) = run(False), run(True)
    assert all(torch.equal(a, b) for a, b in zip(plain, cast, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(plain_bars, cast_bars, strict=True))


@pytest.mark.parametrize("name", STRUCTURES)
def test_autocast_and_a_scaled_loss_reach_a_structure_as_they_should(name):
    """float32 parameters under autocast to bfloat16: the layer computes as without, and the
    gradient carries the scaler's factor."""
    structure = STRUCTURES[name]
    layer = ConvexLayer(*structure.declare())
    sample = structure.sample((3,), torch.Generator().manual_seed(0))
    plain, scaled = ([t.float().requires_grad_() for t in sample] for _ in range(2))
    expected = layer(*plain)[0]
    expected.square().sum().backward()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = layer(*scaled)[0]
    assert torch.equal(found, expected)
    scaler.scale(found.square().sum()).backward()
    for a, b in zip(scaled, plain, strict=True):
        assert torch.allclose(
            a.grad / 2.0**16, b.grad, rtol=1e-5, atol=1e-6 * float(b.grad.abs().max())
        )


def test_parameters_under_no_grad_and_inference_mode():
    case = CASES["quadratic_program"]
    inputs = leaves(case.sample(2))
    with torch.no_grad():
        assert not case.shared(*inputs)[0].requires_grad
    expected = case.shared(*inputs)[0]
    assert expected.requires_grad
    with torch.inference_mode():
        assert close(case.shared(*inputs)[0].clone(), expected.detach(), 1e-12)


def test_only_what_needs_a_gradient_gets_one():
    case = CASES["quadratic_program"]
    tensors = [t.clone() for t in case.sample(2, seed=1)]
    full = leaves(tensors)
    cotangents = weights(outputs_of(case.shared, full))
    expected = torch.autograd.grad(outputs_of(case.shared, full), full, cotangents)
    for k in range(len(tensors)):
        one = [t.clone().requires_grad_(i == k) for i, t in enumerate(tensors)]
        (bar,) = torch.autograd.grad(outputs_of(case.shared, one), one[k], cotangents)
        assert close(bar, expected[k], 1e-10)


def test_tensors_that_are_not_contiguous_or_are_expanded():
    case = CASES["matrix_shapes"]
    tensors = case.sample(3, seed=0)
    views = [t.mT.contiguous().mT if t.ndim == 3 else t for t in tensors]
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            outputs_of(case.shared, views), outputs_of(case.shared, tensors), strict=True
        )
    )
    strided = [torch.stack([t, t], -1)[..., 0] for t in tensors]
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            outputs_of(case.shared, strided), outputs_of(case.shared, tensors), strict=True
        )
    )


# Second order, forward mode, vmap: exact or an error, never zeros
# -------------------------------------------------------


def test_functional_jacobian_is_the_gradient_of_each_entry():
    case = CASES["quadratic_program"]
    tensors = case.sample(seed=0)
    jacobian = torch.autograd.functional.jacobian(
        lambda q: case.shared(tensors[0], q, *tensors[2:])[0], tensors[1]
    )
    for i in range(4):
        leaf = tensors[1].clone().requires_grad_()
        (bar,) = torch.autograd.grad(case.shared(tensors[0], leaf, *tensors[2:])[0][i], leaf)
        assert close(jacobian[i], bar, 1e-10)


def test_backward_twice_needs_retain_graph_and_gives_the_same():
    case = CASES["every_cone"]
    inputs = leaves(case.sample(seed=0))
    outputs = outputs_of(case.shared, inputs)
    cotangents = weights(outputs)
    first = torch.autograd.grad(outputs, inputs, cotangents, retain_graph=True)
    second = torch.autograd.grad(outputs, inputs, cotangents)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(outputs, inputs, cotangents)


def test_a_parameter_changed_in_place_between_forward_and_backward_is_noticed():
    case = CASES["quadratic_program"]
    tensors = case.sample(2, seed=0)
    inputs = leaves(tensors)
    copies = [t * 1.0 for t in inputs]
    outputs = outputs_of(case.shared, copies)
    cotangents = weights(outputs)
    torch.autograd.grad(outputs, inputs, cotangents, retain_graph=True)
    with torch.no_grad():
        for t in copies:
            t.mul_(3.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(outputs, inputs, cotangents)


def changed_in_place(which):
    """The gradient of the optimal value, which uses x, before and after outputs are overwritten."""
    case = CASES["lasso"]
    inputs = leaves(case.sample(2, seed=0))
    solution = case.layer().solve(*inputs)
    before = torch.autograd.grad(solution.objective.sum(), inputs, retain_graph=True)
    with torch.no_grad():
        for part in (
            (solution.variables[0], *solution.iterate) if which == "all" else [solution.iterate[0]]
        ):
            part.zero_()
    return before, torch.autograd.grad(solution.objective.sum(), inputs)


@pytest.mark.without_core
@pytest.mark.parametrize("which", ["all", "iterate"])
def test_an_output_changed_in_place_is_noticed(which):
    """A user who overwrites x must not be able to corrupt a derivative unnoticed,"""
    with pytest.raises(RuntimeError, match="output of the layer was changed in place"):
        changed_in_place(which)


@pytest.mark.skipif(core() is None, reason="no compiled core was built")
@pytest.mark.parametrize("which", ["all", "iterate"])
def test_an_output_changed_in_place_is_not_what_the_core_differentiates(which):
    before, after = changed_in_place(which)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("way", ["short", pytest.param("long", marks=pytest.mark.without_core)])
@pytest.mark.parametrize("structure", ["auto", "generic"])
def test_a_default_device_of_the_users_is_not_where_the_layer_works(structure, way):
    """Tensors that a layer makes for itself lie where its parameters do."""
    case = CASES["quadratic_program" if structure == "generic" else "lasso"]
    inputs = leaves(case.sample(2, seed=0))
    expected = case.layer(structure=structure)(*inputs)
    bars = torch.autograd.grad(sum(out.square().sum() for out in expected), inputs)
    torch.set_default_device("meta")  # a device that cannot compute
    try:
        layer = case.layer(structure=structure)
        outputs = layer(*inputs)
        total = sum(out.square().sum() for out in outputs)
        firsts = torch.autograd.grad(total, inputs, create_graph=True)
        seconds = torch.autograd.grad(sum(bar.sum() for bar in firsts), inputs)
        solution = layer.solve(*inputs)
        assert "Path" in layer.explain()
        mapped = torch.func.vmap(lambda *t: layer(*t)[0])(*inputs)
    finally:
        torch.set_default_device(None)
    assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))
    assert all(torch.allclose(a, b) for a, b in zip(firsts, bars, strict=True))
    assert all(torch.isfinite(second).all() for second in seconds)
    assert solution.status.tolist() == [0, 0]
    assert torch.allclose(mapped, expected[0])


# Modules
# ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("duplicate", ["deepcopy", "pickle", "torch.save"])
def test_a_copy_of_a_layer_solves_alike(duplicate):
    case = CASES["every_cone"]
    layer = case.layer(on_failure="nan", solver_args={"tolerance": 1e-9})
    if duplicate == "deepcopy":
        twin = copy.deepcopy(layer)
    elif duplicate == "pickle":
        twin = pickle.loads(pickle.dumps(layer))
    else:
        buffer = io.BytesIO()
        torch.save(layer, buffer)
        buffer.seek(0)
        twin = torch.load(buffer, weights_only=False)
    tensors = case.sample(2, seed=0)
    assert all(
        torch.equal(a, b)
        for a, b in zip(outputs_of(layer, tensors), outputs_of(twin, tensors), strict=True)
    )
    assert repr(layer) == repr(twin)
    assert twin.on_failure == "nan"


def test_a_layer_is_a_module_without_parameters_inside_others():
    case = CASES["lasso"]
    layer = case.layer()
    model = torch.nn.ModuleDict({"layer": layer})
    assert not list(model.parameters())
    assert not model.state_dict()
    model.float().eval().train()
    assert close(layer(*case.sample(2))[0], case.shared(*case.sample(2))[0], 1e-12)
    assert "lasso" not in repr(layer)
    assert "A(6, 4)" in repr(layer)


def test_a_tensor_without_dimensions_does_not_decide_the_dtype():
    x, p, lam = (
        cp.Variable(3, name="x"),
        cp.Parameter(3, name="p"),
        cp.Parameter(nonneg=True, name="lam"),
    )
    layer = ConvexLayer(
        cp.Problem(cp.Minimize(cp.sum_squares(x - p) + lam * cp.norm1(x))), [p, lam], [x]
    )
    single, double = torch.ones(3), torch.tensor(0.5, dtype=torch.float64)
    assert layer(single, double)[0].dtype == torch.result_type(single, double) == torch.float32
    assert layer(single.double(), double.float())[0].dtype == torch.float64
    assert layer(single, double.expand(4))[0].dtype == torch.float64

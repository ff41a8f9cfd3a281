"""A call: what is given and by what name, one output where one is asked for, and words about what
arrives from outside."""

import contextlib
import copy
import pickle
import warnings

import cvxpy as cp
import numpy as np
import pytest
import torch
from cases import CASES
from test_structures import layer_of, sample

from convlayer import Cause, ConvexLayer, GradientWarning, ProblemError
from convlayer.compat import CvxpyLayer
from convlayer.structures import STRUCTURES


def declared(kind=ConvexLayer, **options):
    """x = clip(price - fee, 0, 5): every parameter's effect is known."""
    price, fee, x = (
        cp.Parameter(3, name="price"),
        cp.Parameter(name="fee"),
        cp.Variable(3, name="x"),
    )
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x - price + fee)), [x >= 0, x <= 5])
    return kind(problem, [price, fee], [x], **options), price, fee


def clipped(price, fee):
    return (price - fee).clamp(0, 5)


def close(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=1e-7)


PRICE = torch.tensor([[1.2, 3.0, -2.0], [4.0, 9.0, 0.7]], dtype=torch.float64)
FEE = torch.tensor([0.5, 0.25], dtype=torch.float64)


# By position, name, object
# -------------------------------------------------------------------------------------------------


def test_parameters_by_position_by_name_and_by_object_are_the_same():
    layer, price, fee = declared()
    ways = [
        layer(PRICE, FEE),
        layer(PRICE, fee=FEE),
        layer(fee=FEE, price=PRICE),
        layer({fee: FEE, price: PRICE}),
        layer({"fee": FEE, price: PRICE}),
        layer({price: PRICE}, fee=FEE),
        layer.solve(fee=FEE, price=PRICE).variables,
    ]
    for (found,) in ways:
        close(found, clipped(PRICE, FEE[:, None]))
    assert layer.verify(price=PRICE, fee=FEE).agrees
    assert layer.check({price: PRICE, fee: FEE}).status.tolist() == [0, 0]


def test_names_reach_a_compiled_model_and_a_transform():
    layer, _, _ = declared()
    whole = torch.compile(
        lambda p, f: layer(fee=f, price=p)[0], fullgraph=True, backend="aot_eager"
    )
    close(whole(PRICE, FEE), clipped(PRICE, FEE[:, None]))
    close(
        torch.func.vmap(lambda p, f: layer(fee=f, price=p)[0])(PRICE, FEE),
        clipped(PRICE, FEE[:, None]),
    )


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda layer, price, fee: layer(PRICE), "takes 2 tensors (`price`, `fee`); got 1"),
        (lambda layer, price, fee: layer(price=PRICE), "was not given `fee`"),
        (lambda layer, price, fee: layer(PRICE, price=PRICE), "`price` was given twice"),
        (
            lambda layer, price, fee: layer({price: PRICE, "price": PRICE}),
            "`price` was given twice",
        ),
        (
            lambda layer, price, fee: layer(PRICE, fees=FEE),
            "no parameter or option `fees`; its parameters are `price`, `fee`",
        ),
        (
            lambda layer, price, fee: layer({cp.Parameter(3): PRICE, fee: FEE}),
            "is no Parameter of the layer, which has `price`, `fee`",
        ),
    ],
)
def test_what_is_missing_twice_or_unknown_is_named(call, words):
    with pytest.raises((TypeError, ValueError)) as told:
        call(*declared())
    assert words in str(told.value)


def test_a_name_that_two_parameters_have_is_refused_and_their_objects_are_not():
    p, q, x = cp.Parameter(2, name="p"), cp.Parameter(2, name="p"), cp.Variable(2)
    layer = ConvexLayer(cp.Problem(cp.Minimize(cp.sum_squares(x - p - 2 * q))), [p, q], [x])
    one, two = torch.ones(2, dtype=torch.float64), torch.full((2,), 2.0, dtype=torch.float64)
    with pytest.raises(TypeError, match="2 parameters are called `p`"):
        layer(p=one)
    close(layer({q: two, p: one})[0], one + 2 * two)


# Numbers, arrays, sparse tensors
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("fee", [0.5, 1, np.float32(0.5), np.float64(0.5), np.int64(1)])
def test_a_number_for_a_scalar_parameter_has_no_dtype_of_its_own(dtype, fee):
    layer, _, _ = declared()
    price = PRICE.to(dtype, copy=True).requires_grad_()
    (found,) = layer(price, fee)
    assert found.dtype == dtype
    torch.testing.assert_close(found, clipped(price, float(fee)), rtol=0, atol=1e-5)
    assert torch.autograd.grad(found.sum(), price)[0].dtype == dtype


def test_arrays_are_taken_with_their_dtype_and_are_not_changed():
    layer, _, _ = declared()
    array = PRICE.numpy().astype(np.float32)[:, ::-1]
    array.setflags(write=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (found,) = layer(array, 0.5)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, clipped(PRICE.flip(1), 0.5).float(), rtol=0, atol=1e-5)


def test_numbers_reach_a_compiled_model():
    layer, _, _ = declared()
    close(
        torch.compile(lambda p: layer(p, 0.5)[0], fullgraph=True, backend="aot_eager")(PRICE),
        clipped(PRICE, 0.5),
    )


@pytest.mark.parametrize(("price", "fee", "words"), [
    (PRICE.to_sparse(), FEE, "`price` was given a sparse tensor; expected a dense one: write price.to_dense()"),
    (PRICE.int(), FEE, "write price.double()"),
    (PRICE.numpy().astype(int), FEE, "an array of int64; expected a torch.Tensor: write torch.as_tensor(price.astype(float))"),
    (2.0, FEE, "`price` of shape (3,) was given the number 2.0; write torch.full((3,), 2.0)"),
    (None, FEE, "`price` was given None; expected a torch.Tensor"),
    (PRICE.tolist(), FEE, "a list; expected a torch.Tensor: write torch.as_tensor(value)"),
    (PRICE, 2**53 + 1, "`fee` of shape () was given the number"),
    (PRICE, True, "`fee` was given a bool"),
])  # fmt: skip
def test_what_would_lose_something_is_refused_with_what_to_write(price, fee, words):
    with pytest.raises(TypeError) as told:
        declared()[0](price, fee)
    assert words in str(told.value)


# A scalar as a column
# --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [(1,), (4,), (2, 3), (3, 3)])
def test_a_column_of_scalars_beside_a_batch_is_refused_and_not_multiplied_out(batch):
    layer, _, _ = declared()
    price, fee = (
        torch.ones(*batch, 3, dtype=torch.float64),
        torch.zeros(*batch, 1, dtype=torch.float64),
    )
    with pytest.raises(ValueError, match=r"`fee` is a scalar .* Write fee\.squeeze\(-1\)"):
        layer(price, fee)
    assert layer(price, fee.squeeze(-1))[0].shape == (*batch, 3)


@pytest.mark.parametrize(
    ("price", "fee", "batch"),
    [
        ((2, 1, 3), (2, 4), (2, 4)),
        ((4, 1, 3), (1, 5), (4, 5)),
        ((5, 3), (4, 1), (4, 5)),
        ((3,), (4, 1), (4, 1)),
        ((4, 1, 3), (4, 1), (4, 1)),
    ],
)
def test_batches_that_were_made_to_broadcast_do(price, fee, batch):
    layer, _, _ = declared()
    (found,) = layer(torch.ones(price, dtype=torch.float64), torch.zeros(fee, dtype=torch.float64))
    assert found.shape == (*batch, 3)


def test_the_drop_in_refuses_a_column_as_the_incumbent_does():
    layer, _, _ = declared(CvxpyLayer)
    with pytest.raises(
        ValueError, match=r"Invalid parameter dimensionality for parameter 1(.|\n)*squeeze\(-1\)"
    ):
        layer(PRICE, FEE[:, None])


# One output, siblings
# ---------------------------------------------------------------------------------------------------------


def test_a_single_output_stands_in_a_sequence():
    y, x = cp.Parameter(3), cp.Variable(3)
    layer = ConvexLayer(
        cp.Problem(cp.Minimize(cp.sum_squares(x - y)), [x >= 0]), [y], [x], squeeze=True
    )
    model = torch.nn.Sequential(
        torch.nn.Linear(4, 3).double(), layer, torch.nn.Linear(3, 1).double()
    )
    inputs = PRICE.repeat(1, 2)[:, :4]
    expected = model[2](model[0](inputs).relu())
    for same in (
        model,
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.compile(model, fullgraph=True, backend="aot_eager"),
    ):
        close(same(inputs), expected)
    assert len(layer.solve(inputs[:, :3]).variables) == 1
    with pytest.raises(ValueError, match="squeeze=True is for one variable; 2 are returned"):
        ConvexLayer(cp.Problem(cp.Minimize(cp.sum_squares(x - y))), [y], [x, x], squeeze=True)


def test_a_sibling_with_another_gradient_or_structure_shares_the_cone_program_and_leaves_the_layer_as_it_was():
    c, x = cp.Parameter(3), cp.Variable(3)
    layer = ConvexLayer(
        cp.Problem(cp.Minimize(c @ x), [cp.sum(x) == 1, x >= 0]), [c], [x], structure="generic"
    )
    costs = torch.tensor([1.0, 1.1, 1.5], dtype=torch.float64, requires_grad=True)

    def slope(layer):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.autograd.grad(layer(costs)[0][1], costs)[0]

    made_new = ConvexLayer(
        layer._declared.problem, [c], [x], gradient="lpgd", gradient_args={"tau": 0.5}
    )
    sibling = layer.with_options(gradient="lpgd", gradient_args={"tau": 0.5})
    assert sibling._canonical is layer._canonical
    close(slope(sibling), slope(made_new))
    close(
        slope(sibling.with_options(gradient_args={"tau": 0.2})),
        slope(layer.with_options(gradient="lpgd", gradient_args={"tau": 0.2})),
    )
    for exact in (layer, sibling.with_options(gradient="exact")):
        close(slope(exact), torch.zeros_like(costs))
    assert layer.with_options(structure="auto").structure == "quadratic_program"
    assert (
        layer.with_options(structure="quadratic_program")
        .with_options(structure="generic")
        .structure
        == "cone_program"
    )
    with pytest.raises(ProblemError, match="softmax"):
        layer.with_options(structure="softmax")
    with pytest.raises(ValueError, match="must be one of 'exact'"):
        layer.with_options(gradient="best")
    with pytest.raises(ValueError, match="runs a kernel"):
        layer_of("sparsemax").with_options(structure="sparsemax", gradient="smoothed")


# What arrives from the loss
# ----------------------------------------------------------------------------------------------------


def leaves(tensors):
    return [t.clone().requires_grad_() for t in tensors]


@contextlib.contextmanager
def said():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield caught


PATHS = {name: (lambda name=name: (layer_of(name), sample(name, (3,)))) for name in STRUCTURES} | {
    name: (lambda name=name: (CASES[name].layer(structure="generic"), CASES[name].sample(3)))
    for name in ("lasso", "every_cone", "transport")
}


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("path", PATHS)
def test_what_is_not_finite_in_the_loss_is_named_as_that_and_stays_in_its_row(path, value):
    layer, tensors = PATHS[path]()
    inputs = leaves(tensors)
    outputs = layer(*inputs)
    bars = [torch.ones_like(output) for output in outputs]
    bars[0][(1,) + (0,) * (outputs[0].ndim - 1)] = value
    with said() as caught:
        found = torch.autograd.grad(outputs, inputs, bars, retain_graph=True)
    assert [w.message.cause for w in caught] == [Cause.LOSS]
    assert "Row 1: not finite: a NaN or infinity arrived" in str(caught[0].message)
    for gradient, tensor in zip(found, tensors, strict=True):
        if tensor.shape[0] == 3:
            assert torch.isfinite(gradient.reshape(3, -1)).all(1).tolist() == [True, False, True]
    with said() as caught:
        torch.autograd.grad(outputs, inputs, [torch.ones_like(output) for output in outputs])
    assert not caught


@pytest.mark.parametrize("gradient", ["smoothed", "lpgd"])
def test_so_it_is_with_other_gradients_and_through_a_compiled_model(gradient):
    layer, tensors = CASES["lasso"].layer(gradient=gradient), CASES["lasso"].sample(3)
    for call in (layer, torch.compile(layer.with_options(), fullgraph=True, backend="aot_eager")):
        inputs = leaves(tensors)
        (output,) = call(*inputs)
        with said() as caught:
            (output / torch.tensor([1.0, 0.0, 1.0], dtype=output.dtype)[:, None]).sum().backward()
        assert [w.message.cause for w in caught] == [Cause.LOSS]
        for tensor in inputs:
            assert torch.isfinite(tensor.grad.reshape(3, -1)).all(1).tolist() == [True, False, True]


def test_a_failed_rows_own_nan_is_not_blamed_on_the_loss():
    x, low = cp.Variable(2), cp.Parameter(2)
    layer = ConvexLayer(
        cp.Problem(cp.Minimize(cp.sum_squares(x)), [x >= low, x <= 1]), [low], [x], on_failure="nan"
    )
    lows = torch.tensor([[0.5, 0.2], [2.0, 0.0]], dtype=torch.float64, requires_grad=True)
    with said() as caught:
        layer(lows)[0].square().sum().backward()
    assert not caught
    assert torch.isfinite(lows.grad).all(1).tolist() == [True, False]


def test_the_mask_of_solved_rows_trains_where_some_fail():
    """x = low where low <= 1; the others are infeasible. A shared weight learns from the rows that
    there are."""
    x, low = cp.Variable(2), cp.Parameter(2)
    layer = ConvexLayer(
        cp.Problem(cp.Minimize(cp.sum_squares(x)), [x >= low, x <= 1]), [low], [x], on_failure="nan"
    )
    inputs = torch.tensor([[0.5, 0.2], [2.0, 0.1], [0.9, 0.4]], dtype=torch.float64)
    weight = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    solution = layer.solve(weight * inputs)
    (found,), solved = solution.variables, solution.solved
    assert solved.tolist() == [True, False, True]
    (slope,) = torch.autograd.grad(found[solved].square().mean(), weight, retain_graph=True)
    close(slope, 2 * inputs[[0, 2]].square().mean())
    (poisoned,) = torch.autograd.grad(
        torch.where(solved[:, None], found.square(), 0.0).sum(), weight
    )
    assert bool(poisoned.isnan())


# Warnings
# -------------------------------------------------------------------------------------------------------------------------


class Wrapped(torch.nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.inner = torch.nn.Sequential(layer)

    def forward(self, *tensors):
        return self.inner(*tensors)


def kinked(**options):
    x, y = cp.Variable(2), cp.Parameter(2)
    return ConvexLayer(
        cp.Problem(cp.Minimize(cp.sum_squares(x - y)), [x >= 0]),
        [y],
        [x],
        squeeze=True,
        structure="generic",
        **options,
    )


def compiled(layer):
    return torch.compile(layer, fullgraph=True, backend="aot_eager")


@pytest.mark.parametrize(
    "model",
    [lambda layer: layer, Wrapped, compiled, lambda layer: compiled(Wrapped(layer))],
    ids=["layer", "model", "compiled", "compiled model"],
)
def test_a_warning_points_at_the_line_that_called_whatever_is_between(model):
    at_kink = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    with pytest.warns(GradientWarning) as caught:
        model(kinked())(at_kink).sum().backward()
    assert {w.filename for w in caught} == {__file__}


def test_a_warning_of_the_drop_ins_options_points_at_the_line_too():
    with said() as caught:
        layer, _, _ = declared(
            CvxpyLayer, canon_backend="SCIPY", solver_args={"use_indirect": True}
        )
        layer(PRICE, FEE)
        torch.nn.ModuleList([layer])[0](PRICE, FEE, solver_args={"n_jobs_backward": 1})
    assert len(caught) == 3
    assert {w.filename for w in caught} == {__file__}


def cube():
    x, p = cp.Variable((2, 3, 2)), cp.Parameter((2, 3, 2))
    return (
        cp.Problem(cp.Minimize(cp.sum_squares(x - p)), [x >= 0.1, cp.sum(x, axis=(0, 2)) <= 1]),
        [p],
        [x],
    )


def written_out():
    x, p = cp.Variable(40), cp.Parameter(40)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the user's own problem CVXPY says that it is long
        return (
            cp.Problem(
                cp.Minimize(
                    sum(cp.square(x[k] - p[k]) for k in range(40))
                    + sum(0.01 * x[k % 40] for k in range(2500))
                )
            ),
            [p],
            [x],
        )


@pytest.mark.parametrize(
    "options",
    [{}, {"structure": "generic"}, {"regularise": 0.1}],
    ids=["auto", "generic", "regularised"],
)
def test_cvxpys_words_about_itself_do_not_leak(options):
    problem, parameters, variables = cube()
    tensor = torch.full((2, 3, 2), 0.11, dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer = ConvexLayer(problem, parameters, variables, **options)
        layer(tensor)
        layer.verify(tensor)
        layer.check(tensor)
        layer.explain()
        pickle.loads(pickle.dumps(layer))(tensor)
        problem, parameters, variables = cube()
        bounded = cp.Problem(problem.objective, [*problem.constraints, variables[0] >= 1])
        ConvexLayer(bounded, parameters, variables, on_failure="closest", **options)(tensor)


def test_nor_do_they_where_a_problem_is_written_out():
    problem, parameters, variables = written_out()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer = ConvexLayer(problem, parameters, variables, structure="generic")
        pickle.dumps(layer.with_options(on_failure="nan"))

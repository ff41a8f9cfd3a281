"""A batch equals a loop, whatever its dimensions, whatever is shared, wherever its rows run."""

from concurrent.futures import Executor, Future, ThreadPoolExecutor

import cvxpy as cp
import pytest
import torch
from cases import CASES, close, leaves, outputs_of, relative, weights

from convlayer import ConvexLayer, Status

every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
some_cases = pytest.mark.parametrize(
    "case",
    [
        CASES[name]
        for name in (
            "quadratic_program",
            "raw_second_order",
            "nearest_correlation",
            "entropy",
            "raw_power",
            "posynomial",
            "every_cone",
        )
    ],
    ids=str,
)


def per_row(case, tensors, batch, **options):
    """Outputs and gradients of sum over rows of the same random functional."""
    inputs = leaves(tensors)
    layer = case.layer(**options) if options else case.shared
    outputs = outputs_of(layer, inputs)
    cotangents = [
        w.expand_as(o) for w, o in zip(weights(outputs, len(batch)), outputs, strict=True)
    ]
    return outputs, torch.autograd.grad(outputs, inputs, cotangents)


@every_case
def test_a_batch_equals_a_loop_in_value_and_gradient(case):
    tensors = case.sample(5, seed=1)
    outputs, gradients = per_row(case, tensors, (5,))
    for row in range(5):
        alone, alone_gradients = per_row(case, [t[row] for t in tensors], ())
        for whole, one in zip(outputs, alone, strict=True):
            assert whole[row].shape == one.shape
            assert close(whole[row], one, 1e-9)
        size = max(float(g.norm()) for g in alone_gradients)
        for whole, one in zip(gradients, alone_gradients, strict=True):
            assert float((whole[row] - one).norm()) <= 1e-8 * size


@every_case
def test_a_shared_parameters_gradient_is_the_sum_over_rows(case):
    """Every parameter in turn is shared, the others are batched."""
    tensors = case.sample(4, seed=2)
    for shared in range(len(tensors)):
        inputs = [t[0] if k == shared else t for k, t in enumerate(tensors)]
        expanded = [t[0].expand_as(t) if k == shared else t for k, t in enumerate(tensors)]
        if len(tensors) == 1:
            inputs, expanded = [tensors[0][:1]], [tensors[0][:1]]
        outputs, gradients = per_row(case, inputs, (4,) if len(tensors) > 1 else (1,))
        full_outputs, full_gradients = per_row(case, expanded, (4,) if len(tensors) > 1 else (1,))
        for a, b in zip(outputs, full_outputs, strict=True):
            assert close(a, b, 1e-9)
        size = max(float(g.norm()) for g in full_gradients)
        for k, (a, b) in enumerate(zip(gradients, full_gradients, strict=True)):
            expected = b.sum(0) if k == shared and len(tensors) > 1 else b
            assert a.shape == expected.shape
            assert float((a - expected).norm()) <= 1e-8 * size


@some_cases
def test_all_parameters_shared_equals_one_row(case):
    tensors = case.sample(seed=3)
    outputs, gradients = per_row(case, tensors, ())
    again, one = per_row(case, [t.unsqueeze(0) for t in tensors], (1,))
    for a, b in zip(outputs, again, strict=True):
        assert b.shape == (1, *a.shape), "a batch of one stays a batch of one"
        assert close(b[0], a, 1e-9)
    for a, b in zip(gradients, one, strict=True):
        assert relative(b[0], a) < 1e-8


@some_cases
def test_any_number_of_batch_dimensions(case):
    tensors = case.sample((2, 1, 3), seed=4)
    outputs, gradients = per_row(case, tensors, (2, 1, 3))
    flat, flat_gradients = per_row(case, [t.flatten(0, 2) for t in tensors], (6,))
    for a, b in zip(outputs, flat, strict=True):
        assert a.shape == (2, 1, 3, *b.shape[1:])
        assert close(a.flatten(0, 2), b, 1e-9)
    for a, b in zip(gradients, flat_gradients, strict=True):
        assert relative(a.flatten(0, 2), b) < 1e-8


def least_squares(**options):
    A, b, x = cp.Parameter((4, 2), name="A"), cp.Parameter(4, name="b"), cp.Variable(2, name="x")
    return ConvexLayer(
        cp.Problem(cp.Minimize(cp.sum_squares(A @ x - b)), [x >= -0.1]), [A, b], [x], **options
    )


def test_batch_dimensions_broadcast_against_each_other():
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(3, 1, 4, 2, generator=generator, dtype=torch.float64, requires_grad=True)
    b = torch.randn(5, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    layer = least_squares()
    (x,) = layer(A, b)
    assert x.shape == (3, 5, 2)
    w = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    A_bar, b_bar = torch.autograd.grad(x, (A, b), w)
    A_full, b_full = (
        t.detach().expand(3, 5, *t.shape[-k:]).clone().requires_grad_() for t, k in ((A, 2), (b, 1))
    )
    (x_full,) = layer(A_full, b_full)
    assert close(x, x_full, 1e-9)
    A_expected, b_expected = torch.autograd.grad(x_full, (A_full, b_full), w)
    assert relative(A_bar, A_expected.sum(1, keepdim=True)) < 1e-8
    assert relative(b_bar, b_expected.sum(0)) < 1e-8


@every_case
def test_an_empty_batch_gives_empty_outputs_and_gradients(case):
    for batch in ((0,), (2, 0)):
        inputs = leaves(case.sample(batch))
        solution = case.shared.solve(*inputs)
        alone = case.shared.solve(*case.sample())
        for output, one in zip(
            [*solution.variables, solution.objective],
            [*alone.variables, alone.objective],
            strict=True,
        ):
            assert output.shape == (*batch, *one.shape)
        assert (
            solution.status.shape == solution.iterations.shape == solution.residual.shape == batch
        )
        total = sum(o.sum() for o in solution.variables) + solution.objective.sum()
        gradients = torch.autograd.grad(total, inputs, allow_unused=True)
        assert all(g is None or g.shape == t.shape for g, t in zip(gradients, inputs, strict=True))


def test_an_empty_batch_beside_a_shared_parameter_gives_it_a_gradient_of_zero():
    A = torch.ones(4, 2, dtype=torch.float64, requires_grad=True)
    b = torch.ones(0, 4, dtype=torch.float64, requires_grad=True)
    (x,) = least_squares()(A, b)
    assert x.shape == (0, 2)
    x.sum().backward()
    assert torch.equal(A.grad, torch.zeros(4, 2, dtype=torch.float64))


def test_a_batch_of_one_beside_larger_and_empty_ones_broadcasts():
    layer, draw = least_squares(), torch.Generator().manual_seed(1)
    A = torch.randn(1, 4, 2, generator=draw, dtype=torch.float64, requires_grad=True)
    b = torch.randn(3, 4, generator=draw, dtype=torch.float64)
    (x,) = layer(A, b)
    assert x.shape == (3, 2)
    x.sum().backward()
    assert A.grad.shape == A.shape
    assert layer(A, b[:0])[0].shape == (0, 2)


def test_a_problem_without_parameters_is_solved_once_and_has_no_gradient():
    x = cp.Variable(3, name="x")
    layer = ConvexLayer(cp.Problem(cp.Minimize(cp.sum_squares(x - 1)), [cp.sum(x) == 1]), [], [x])
    solution = layer.solve()
    assert solution.variables[0].shape == (3,)
    assert not solution.variables[0].requires_grad
    assert solution.variables[0].dtype == torch.get_default_dtype()
    assert close(solution.variables[0], torch.full((3,), 1 / 3), 1e-7)
    assert solution.status.shape == ()


class Counting(Executor):
    """An executor of the user's own: it need only submit and map."""

    def __init__(self):
        self.tasks = 0

    def submit(self, function, /, *arguments, **named):
        self.tasks += 1
        future: Future = Future()
        future.set_result(function(*arguments, **named))
        return future


@some_cases
@pytest.mark.without_core
def test_a_users_executor_gives_the_same_answers(case):
    tensors = case.sample(6, seed=5)
    outputs, gradients = per_row(case, tensors, (6,))
    counting = Counting()
    with ThreadPoolExecutor(3) as threads:
        for executor in (threads, counting):
            again, again_gradients = per_row(case, tensors, (6,), executor=executor)
            assert all(close(a, b, 1e-9) for a, b in zip(again, outputs, strict=True))
            assert all(
                relative(a, b) < 1e-8 for a, b in zip(again_gradients, gradients, strict=True)
            )
    assert counting.tasks > 0


@every_case
def test_the_same_call_gives_the_same_bits(case):
    tensors = case.sample(3, seed=7)
    first, first_gradients = per_row(case, tensors, (3,))
    second, second_gradients = per_row(case, tensors, (3,))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(first_gradients, second_gradients, strict=True))


@some_cases
def test_a_layer_built_again_gives_the_same_bits(case):
    tensors = case.sample(3, seed=7)
    first, first_gradients = per_row(case, tensors, (3,))
    second, second_gradients = per_row(case, tensors, (3,), validate=True)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(first_gradients, second_gradients, strict=True))


def test_a_layer_is_reentrant_and_writes_nothing_to_itself():
    """Two forwards before either backward, and calls from several threads at once."""
    case = CASES["quadratic_program"]
    layer = case.layer()
    before = {key: id(value) for key, value in vars(layer).items()}
    samples = [case.sample(3, seed=k) for k in range(6)]
    expected = [outputs_of(case.shared, sample) for sample in samples]
    a, b = leaves(samples[0]), leaves(samples[1])
    x_a, x_b = outputs_of(layer, a), outputs_of(layer, b)
    cotangents = weights(x_a, 0)
    b_bar = torch.autograd.grad(x_b, b, cotangents)
    a_bar = torch.autograd.grad(x_a, a, cotangents)
    for inputs, bars in ((a, a_bar), (b, b_bar)):
        fresh = leaves(inputs)
        for got, again in zip(
            bars, torch.autograd.grad(outputs_of(layer, fresh), fresh, cotangents), strict=True
        ):
            assert torch.equal(got, again)
    with ThreadPoolExecutor(3) as threads:
        for got, reference in zip(
            threads.map(lambda sample: outputs_of(layer, sample), samples), expected, strict=True
        ):
            assert all(torch.equal(g, r) for g, r in zip(got, reference, strict=True))
    assert {key: id(value) for key, value in vars(layer).items()} == before


@every_case
def test_every_sample_of_the_registry_is_solved_and_not_degenerate(case):
    solution = case.shared.solve(*case.sample(8, seed=8))
    assert (solution.status == Status.SOLVED).all()
    assert not solution.degenerate.any()

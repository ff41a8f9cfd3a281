"""Laws of `Answer.local` of the closed forms: the oracles are the kernels' own gradients and their
differences."""

from functools import partial

import pytest
import torch
from kernels import close, differences
from structures import SPELLINGS
from torch.autograd import grad
from torch.func import jvp, vjp

from convlayer.declaration.normal_form import normal_form
from convlayer.kernels.leading_eigenspace import leading_eigenspace
from convlayer.kernels.softmax import softmax
from convlayer.kernels.sparsemax import sparsemax
from convlayer.kernels.total_variation import total_variation
from convlayer.solution import Status
from convlayer.structures import STRUCTURES, Wanted

D = torch.float64
NAMES = ("softmax", "sparsemax", "total_variation", "leading_eigenspace")


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=D)


def positive(*shape, seed=1):
    return 0.5 + torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=D)


def with_eigenvalues(*rows):
    Q = torch.linalg.qr(draw(len(rows), len(rows[0]), len(rows[0]), seed=9))[0]
    return Q * torch.tensor(rows, dtype=D).unsqueeze(-2) @ Q.mT


class Of:
    """A kernel, or a structure's way into one: its answer, and the outputs said again."""

    def __init__(self, kernel):
        self.answer, self.again = kernel, lambda at, *inputs: at.again(*inputs).outputs

    @classmethod
    def spelling(cls, spelling):
        problem, parameters, _ = spelling.declare()
        run = STRUCTURES[spelling.structure].match(normal_form(problem, parameters)).build(Wanted())
        of = cls(lambda *inputs: run(list(inputs), inputs[0]))
        of.again = lambda at, *inputs: run(list(inputs), inputs[0], at).outputs
        return of


def leading(k, largest=True):
    return Of(partial(leading_eigenspace, k=k, largest=largest))


KERNELS = {
    "softmax": (Of(softmax), (draw(3, 5), positive(3), positive(3, seed=2))),
    "softmax, shared scores": (Of(softmax), (draw(1, 5), positive(3), positive(1, seed=2))),
    "softmax without a multiplier": (
        Of(partial(softmax, multiplier=False)),
        (draw(3, 5), positive(1)),
    ),
    "softmax as torch has it": (Of(softmax), (draw(3, 5),)),
    "sparsemax": (Of(sparsemax), (draw(3, 6), positive(3))),
    "sparsemax, shared": (Of(sparsemax), (draw(1, 6), positive(3))),
    "total variation": (Of(total_variation), (draw(3, 9), positive(3) / 2)),
    "total variation, shared signal": (Of(total_variation), (draw(1, 9), positive(3) / 2)),
    "total variation, shared weight": (Of(total_variation), (draw(3, 9), positive(1) / 2)),
    "leading vector": (leading(1), (draw(2, 5, 5),)),
    "leading two": (leading(2), (draw(2, 5, 5),)),
    "trailing two": (leading(2, False), (draw(2, 5, 5),)),
    "all but one": (leading(4), (draw(2, 5, 5),)),
    "all": (leading(3), (draw(2, 3, 3),)),
    "one by one": (leading(1), (draw(2, 1, 1),)),
}

SMOOTH = KERNELS | {
    str(s): (Of.spelling(s), tuple(s.sample((2,), seed=3)))
    for s in SPELLINGS
    if s.structure in NAMES
}

KINKS = {
    "softmax of radius zero": (
        Of(partial(softmax, multiplier=False)),
        (draw(2, 4), positive(2), torch.tensor([1, 0.0], dtype=D)),
    ),
    "sparsemax with a tie": (
        Of(sparsemax),
        (
            torch.tensor([[1, 0, -3], [1, 0.5, -3], [0.3, 0.3, -0.2], [1, 4e-16, -3]], dtype=D),
            torch.ones(4, dtype=D),
        ),
    ),
    "sparsemax of radius zero": (Of(sparsemax), (draw(2, 4), torch.tensor([1, 0.0], dtype=D))),
    "total variation with a tie": (
        Of(total_variation),
        (
            torch.tensor([[1, 0, 1, 0], [2, 1, -1, 5.0], [0, 0, 3, 3.0]], dtype=D),
            torch.tensor([0.5, 1, 0.5], dtype=D),
        ),
    ),
    "total variation of weight zero": (
        Of(total_variation),
        (
            torch.tensor([[1, 1, 2, 0.5], [1, 1, 2, 2], [3, 1, 2, 0]], dtype=D),
            torch.tensor([0.3, 0, 0.2], dtype=D),
        ),
    ),
    "a tie at the cut": (
        leading(2),
        (with_eigenvalues([4, 2, 2, 1, 0], [5, 3, 2, 1, 0], [2, 2, 2, 1, 0], [4, 3, 3, 3, 3]),),
    ),
    "a tie at the trailing cut": (
        leading(3, False),
        (with_eigenvalues([4, 2, 2, 1, 0], [5, 2, 2, 2, 0], [5, 4, 3, 2, 1]),),
    ),
    "a repeated eigenvalue": (
        leading(3),
        (with_eigenvalues([4, 2, 2, 1, 0], [3, 3, 3, 1, 0], [5, 4, 3, 2, 1]),),
    ),
}

every = pytest.mark.parametrize("name", [*SMOOTH, *KINKS])
smooth = pytest.mark.parametrize("name", SMOOTH)


def leaves(inputs):
    return [a.clone().requires_grad_() for a in inputs]


def answer_of(case, inputs):
    return case.answer(*leaves(inputs))


def said(case, at):
    """A smooth functional of the outputs: linear ones get a second derivative of its own."""

    def value(*inputs):
        return functional(case.again(at, *inputs))

    return value


def functional(outputs):
    total = 0
    for k, y in enumerate(outputs):
        v, c = (draw(*y.shape, seed=10 * k + i).to(y.dtype) for i in (5, 6))
        total = total + (v * y).sum() + (c * y * y).sum() / 2
    return total


def own_gradient(case, *inputs):
    """By the kernel's own backward."""
    points = leaves(inputs)
    return grad(functional(case.answer(*points).outputs), points)


def directions(inputs, seed=20):
    return tuple(draw(*a.shape, seed=seed + k).to(a.dtype) for k, a in enumerate(inputs))


def inner(a, b):
    return sum((x * y).sum() for x, y in zip(a, b, strict=True))


def close_all(a, b, tol):
    """Each to a tolerance relative to the largest of all: an input may have no influence."""
    scale = max(y.abs().max() for y in b)
    for x, y in zip(a, b, strict=True):
        assert x.shape == y.shape
        assert (x - y).abs().max() <= tol * scale


def second(f, inputs, w):
    """The second derivative along w, by reverse over reverse."""
    points = leaves(inputs)
    return grad(inner(grad(f(*points), points, create_graph=True), w), points)


@every
def test_it_says_the_solution(name):
    case, inputs = (SMOOTH | KINKS)[name]
    answer = answer_of(case, inputs)
    for again, output in zip(case.again(answer, *inputs), answer.outputs, strict=True):
        assert again.shape == output.shape
        assert again.dtype == output.dtype
        assert torch.equal(again.isinf(), output.isinf())
        assert (again - output)[output.isfinite()].abs().max() <= 1e-15 * (
            1 + output[output.isfinite()].abs().max()
        )


@every
def test_its_first_derivative_is_the_kernels_own_in_both_modes(name):
    case, inputs = (SMOOTH | KINKS)[name]
    value = said(case, answer_of(case, inputs))
    own = own_gradient(case, *inputs)
    points = leaves(inputs)
    close_all(grad(value(*points), points), own, 1e-10)
    for seed in (30, 40):
        w = directions(inputs, seed)
        scale = inner(own, own).sqrt() * inner(w, w).sqrt()
        assert abs(jvp(value, inputs, w)[1] - inner(own, w)) <= 1e-10 * scale


@smooth
def test_its_second_derivative_is_differences_of_the_kernels_gradient(name):
    case, inputs = SMOOTH[name]
    w = directions(inputs)
    ours = second(said(case, answer_of(case, inputs)), inputs, w)
    theirs = [
        differences(lambda *a: inner(own_gradient(case, *a), w), inputs, k, 3e-4)
        for k in range(len(inputs))
    ]
    close_all(ours, theirs, 1e-6)


@smooth
def test_the_modes_agree_on_the_second_derivative(name):
    case, inputs = SMOOTH[name]
    value, w, u = said(case, answer_of(case, inputs)), directions(inputs), directions(inputs, 50)

    def slope(*a):
        return jvp(value, a, w)[1]

    reverse = second(value, inputs, w)
    close_all(vjp(slope, *inputs)[1](torch.ones((), dtype=D)), reverse, 1e-10)
    close_all(
        jvp(lambda *a: vjp(value, *a)[1](torch.ones((), dtype=D)), inputs, w)[1], reverse, 1e-10
    )
    scale = inner(reverse, reverse).sqrt() * inner(u, u).sqrt()
    assert abs(jvp(slope, inputs, u)[1] - inner(reverse, u)) <= 1e-10 * scale


@pytest.mark.parametrize(
    "name", [name for name in KINKS if "cut" not in name and "eigenvalue" not in name]
)
def test_at_a_kink_the_second_derivative_is_that_of_the_piece(name):
    case, inputs = KINKS[name]
    w = directions(inputs)
    for ours in second(said(case, answer_of(case, inputs)), inputs, w):
        assert ours.isfinite().all()


@pytest.mark.parametrize("name", [name for name in KINKS if "cut" in name or "eigenvalue" in name])
def test_where_eigenvalues_are_tied_the_second_derivative_is_nan_and_only_there(name):
    case, (X,) = KINKS[name]
    w, at = directions((X,)), answer_of(case, (X,))
    (ours,) = second(said(case, at), (X,), w)
    unique = [
        row for row in range(len(X)) if answer_of(case, (X[row : row + 1],)).degenerate is None
    ]
    simple = [row for row in unique if (torch.linalg.eigvalsh(X[row]).diff() > 0.5).all()]
    assert simple
    assert ours.isnan().flatten(1).all(1).tolist() == [row not in simple for row in range(len(X))]
    assert jvp(lambda a: jvp(said(case, at), (a,), w)[1], (X,), w)[1].isnan()

    def of_projector(outputs):
        return (draw(*X.shape, seed=5) * outputs[0]).sum()

    (of_Z,) = second(lambda a: of_projector(case.again(at, a)), (X,), w)
    assert of_Z.isnan().flatten(1).any(1).tolist() == [row not in unique for row in range(len(X))]

    def slope(a):
        leaf = a.clone().requires_grad_()
        return (w[0] * grad(of_projector(case.answer(leaf).outputs), leaf)[0])[unique].sum()

    close(of_Z[unique], differences(slope, [X], 0, 3e-4)[unique], 1e-6)


@pytest.mark.parametrize("name", KERNELS)
def test_an_answer_of_one_row_serves_inputs_expanded_to_many(name):
    case, inputs = KERNELS[name]
    one = [a[:1] for a in inputs]
    at = answer_of(case, one)
    many = [a.repeat(4, *[1] * (a.ndim - 1)) for a in one]
    for some in (many, [many[0], *one[1:]], [one[0], *many[1:]]):
        value, w = said(case, at), directions(some)
        for again, output in zip(case.again(at, *some), at.outputs, strict=True):
            assert (again - output).abs().max() <= 1e-15 * (1 + output.abs().max())
        points = leaves(some)
        close_all(grad(value(*points), points), own_gradient(case, *some), 1e-10)
        close_all(second(value, some, w), second(said(case, answer_of(case, some)), some, w), 1e-10)


BAD = torch.tensor([0.7, -1.0, 0.4], dtype=D)


@pytest.mark.parametrize(
    ("kernel", "inputs"),
    [
        (softmax, (draw(3, 4), BAD, positive(3))),
        (softmax, (draw(3, 4), positive(3), BAD)),
        (softmax, (draw(3, 4), BAD * 0, positive(3))),
        (sparsemax, (draw(3, 4), BAD)),
        (total_variation, (draw(3, 6), BAD)),
        (total_variation, (draw(1, 6), BAD)),
    ],
)
def test_a_failed_row_is_finite_and_leaves_the_others_untouched(kernel, inputs):
    case = Of(kernel)
    at = answer_of(case, inputs)
    good = at.status < Status.INFEASIBLE
    points, w = leaves(inputs), directions(inputs)
    outputs = case.again(at, *points)
    for again, output in zip(outputs, at.outputs, strict=True):
        assert again.isfinite().all()
        assert torch.allclose(again, output, rtol=1e-15, atol=1e-15)
    first = grad(functional([y[good] for y in outputs]), points, create_graph=True)
    close_all(
        first, grad(functional([y[good] for y in case.answer(*points).outputs]), points), 1e-10
    )
    twice = grad(inner(first, w), points)
    assert all(a.isfinite().all() for a in twice)
    assert jvp(lambda *a: jvp(said(case, at), a, w)[1], inputs, w)[1].isfinite()


@pytest.mark.parametrize("name", KERNELS)
def test_float32_agrees_with_float64(name):
    case, inputs = KERNELS[name]
    small = tuple(a.float() for a in inputs)
    inputs = tuple(a.double() for a in small)
    at, w = answer_of(case, small), directions(small)
    assert all(again.dtype == torch.float32 for again in case.again(at, *small))
    exact = second(said(case, answer_of(case, inputs)), inputs, directions(small))
    close_all([a.double() for a in second(said(case, at), small, w)], exact, 2e-5)


@pytest.mark.parametrize("name", KERNELS)
def test_nothing_is_kept_where_nothing_is_to_be_differentiated(name):
    case, inputs = KERNELS[name]
    assert case.answer(*inputs).local is None
    with torch.no_grad():
        assert answer_of(case, inputs).local is None


@pytest.mark.parametrize("gap", [1.0, 20.0, 200.0, 700.0, 5000.0])
def test_near_a_vertex_softmax_keeps_relative_accuracy(gap):
    theta = torch.tensor([[0.5, 0.5 + gap]], dtype=D)
    at = answer_of(Of(softmax), (theta,))

    def largest(theta):
        return at.again(theta).outputs[0][0, 1]

    p, q = (torch.special.expit(torch.tensor(s * gap, dtype=D)) for s in (1, -1))
    d = torch.tensor([[-1.0, 1.0]], dtype=D)
    point = theta.clone().requires_grad_()
    (first,) = grad(largest(point), point, create_graph=True)
    assert torch.allclose(first, p * q * d, rtol=1e-12, atol=0)
    twice = grad((first * d).sum(), point)[0]
    assert torch.allclose(twice, p * q * (q - p) * 2 * d, rtol=1e-12, atol=0)


@pytest.mark.parametrize("tau", [1e-3, 1e-300])
def test_entries_of_a_softmax_that_vanish_have_derivatives_of_zero(tau):
    case, inputs = (
        Of(partial(softmax, multiplier=False)),
        (1e10 * draw(1, 4), torch.tensor([tau], dtype=D)),
    )
    value, w = said(case, answer_of(case, inputs)), directions(inputs)
    assert all((a == 0).all() for a in second(value, inputs, w))
    assert jvp(lambda *a: jvp(value, a, w)[1], inputs, w)[1] == 0

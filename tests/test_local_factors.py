"""Laws of `Answer.local` where a kernel's own factor makes it: the solution again, twice
differentiable in torch's own operations.

The oracle of a first derivative is the kernel's backward, that of a second central differences of
it, of order four. A case says its inputs as a function of parameters that move freely: masses stay
equal, and what is singular keeps its rank.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from structures import SPELLINGS
from torch import Tensor
from torch.func import jvp, vjp

import convlayer.kernels.entropic_optimal_transport as transport
from convlayer.declaration.normal_form import normal_form
from convlayer.kernels.answer import Answer
from convlayer.kernels.entropic_optimal_transport import entropic_optimal_transport
from convlayer.kernels.equality_constrained_qp import equality_constrained_qp
from convlayer.kernels.least_squares import least_squares
from convlayer.solution import Status
from convlayer.structures import STRUCTURES, Wanted


@dataclass(frozen=True)
class Case:
    kernel: Callable[..., Answer]
    parameters: tuple[Tensor, ...]
    inputs: Callable[..., tuple[Tensor | None, ...]] = field(default=lambda *given: given)
    accuracy: float = 1e-10  # of a first derivative, relative
    step: float = 1e-4  # of the differences
    rounds: bool = True  # its inputs in float32 are of the same rank

    def __call__(self, *parameters: Tensor) -> tuple[Tensor, ...]:
        return self.kernel(*self.inputs(*parameters)).outputs

    def solved(self) -> Answer:
        return self.kernel(*self.inputs(*(t.clone().requires_grad_() for t in self.parameters)))

    def local(self) -> Callable[..., tuple[Tensor, ...]]:
        answer = self.solved()
        return lambda *parameters: answer.again(*self.inputs(*parameters)).outputs


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(
        *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + 7 * sum(shape))
    )


def positive(*shape: int, seed: int = 0) -> Tensor:
    return 0.5 + torch.rand(
        *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + 7 * sum(shape))
    )


def gram(L: Tensor) -> Tensor:
    return L @ L.mT


def skewed(P: Tensor) -> Tensor:
    """The same quadratic form by a matrix that is not symmetric."""
    return P + torch.triu(P, 1) - torch.triu(P, 1).mT


def some_rows(
    special: Tensor, regular: Tensor, rows: tuple[bool, ...] = (True, False, True)
) -> Tensor:
    return torch.where(torch.tensor(rows).view(-1, *[1] * (special.dim() - 1)), special, regular)


def masses(M: Tensor, r: Tensor, c: Tensor, eps: Tensor) -> tuple[Tensor, ...]:
    return M, r, c * (r.sum(1, True) / c.sum(1, True)), eps


FORBIDDEN = torch.tensor([[0, 0, 1, 1, 1], [0, 1, 1, 1, 1], [1, 1, 0, 0, 0]], dtype=torch.bool)
NEARLY_ONE = torch.ones(4, 4, dtype=torch.float64) + 1e-5 * normal(4, 4)
COMPONENTS = torch.tensor([[0, 0, 1, 1, 1], [0, 0, 1, 1, 1], [1, 1, 0, 0, 0]], dtype=torch.bool)


def one_forbidden(M, r, c, eps):
    return masses(M.masked_fill(FORBIDDEN & COMPONENTS.logical_not(), torch.inf), r, c, eps)


def two_components(M, r, c, eps):
    first = c[:, :2] * (r[:, :2].sum(1, True) / c[:, :2].sum(1, True))
    second = c[:, 2:] * (r[:, 2:].sum(1, True) / c[:, 2:].sum(1, True))
    return M.masked_fill(COMPONENTS, torch.inf), r, torch.cat((first, second), 1), eps


def a_zero_marginal(M, r, c, eps):
    r = r * torch.tensor([1.0, 0.0, 1.0])
    return masses(M, r, c * torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0]), eps)


def draw_transport(m: int, n: int, batch: int = 3, width: float = 1.0) -> tuple[Tensor, ...]:
    return (
        width * normal(batch, m, n),
        positive(batch, m),
        positive(batch, n),
        positive(batch, seed=2),
    )


CASES = {
    "least squares, tall": Case(
        least_squares, (normal(3, 7, 4), normal(3, 7, 2), positive(3, 7), positive(3, 4))
    ),
    "least squares, plain": Case(
        least_squares, (normal(3, 7, 4), normal(3, 7, 1)), lambda A, b: (A, b, None, None)
    ),
    "least squares, shared matrix": Case(
        least_squares, (normal(1, 7, 4), normal(3, 7, 2), positive(1, 7), positive(1, 4))
    ),
    "least squares, shared right side": Case(
        least_squares, (normal(3, 7, 4), normal(1, 7, 2), positive(1, 7), positive(3, 4))
    ),
    "least squares, shared ridge": Case(
        least_squares, (normal(1, 7, 4), normal(1, 7, 2), positive(3, 7), positive(1, 4))
    ),
    "least squares, wide": Case(
        least_squares, (normal(3, 4, 7), normal(3, 4, 2)), lambda A, b: (A, b, None, None)
    ),
    "least squares, wide, shared": Case(
        least_squares, (normal(1, 4, 7), normal(3, 4, 2)), lambda A, b: (A, b, None, None)
    ),
    "least squares, wide with a ridge": Case(
        least_squares, (normal(3, 4, 7), normal(3, 4, 2), positive(3, 4), positive(3, 7))
    ),
    "least squares, ridge on some": Case(
        least_squares,
        (normal(3, 4, 7), normal(3, 4, 2), positive(3, 4), positive(3, 7)),
        lambda A, b, w, ridge: (A, b, w, ridge * (torch.arange(7) < 5)),
    ),
    "least squares, dependent columns": Case(
        least_squares,
        (normal(3, 7, 2), normal(3, 2, 4), normal(3, 7, 4), normal(3, 7, 2), positive(3, 7)),
        lambda F, G, A, b, w: (some_rows(F @ G, A), b, w, None),
        rounds=False,
    ),
    "least squares, dependent rows, shared": Case(
        least_squares,
        (normal(1, 4, 2), normal(1, 2, 7), normal(3, 4, 2), positive(1, 4)),
        lambda F, G, b, w: (F @ G, b, w, None),
        rounds=False,
    ),
    "least squares, ill-conditioned": Case(
        least_squares,
        (normal(3, 7, 4), normal(3, 7, 2)),
        lambda A, b: (A @ NEARLY_ONE, b, None, None),
        accuracy=1e-8,
        step=1e-3,
        rounds=False,
    ),
    "qp": Case(
        equality_constrained_qp,
        (normal(3, 5, 6), normal(3, 5), normal(3, 2, 5), normal(3, 2)),
        lambda L, q, A, b: (skewed(gram(L)), q, A, b),
    ),
    "qp, no constraint": Case(
        equality_constrained_qp,
        (normal(3, 5, 6), normal(3, 5)),
        lambda L, q: (gram(L), q, q.new_empty(3, 0, 5), q.new_empty(3, 0)),
    ),
    "qp, shared matrices": Case(
        equality_constrained_qp,
        (normal(1, 5, 6), normal(3, 5), normal(1, 2, 5), normal(1, 2)),
        lambda L, q, A, b: (gram(L), q, A, b),
    ),
    "qp, shared P": Case(
        equality_constrained_qp,
        (normal(1, 5, 6), normal(1, 5), normal(3, 2, 5), normal(3, 2)),
        lambda L, q, A, b: (gram(L), q, A, b),
    ),
    "qp, singular P": Case(
        equality_constrained_qp,
        (normal(3, 5, 3), normal(3, 5, 6), normal(3, 5), normal(3, 2, 5), normal(3, 2)),
        lambda L, R, q, A, b: (some_rows(gram(L), gram(R)), q, A, b),
        step=1e-5,
    ),
    "qp, repeated constraint": Case(
        equality_constrained_qp,
        (normal(3, 5, 6), normal(3, 5), normal(3, 2, 5), normal(3, 2), normal(3, 3, 2)),
        lambda L, q, A, b, F: (gram(L), q, F @ A, (F @ b.unsqueeze(2)).squeeze(2)),
        rounds=False,
    ),
    "qp, flat": Case(
        equality_constrained_qp,
        (
            normal(3, 5, 2),
            normal(3, 5, 6),
            normal(3, 2),
            normal(3, 2),
            normal(3, 2, 5),
            normal(3, 2),
        ),
        lambda L, R, s, t, A, b: (
            some_rows(gram(L), gram(R)),
            (L @ s.unsqueeze(2) + A.mT @ t.unsqueeze(2)).squeeze(2),
            A,
            b,
        ),
        rounds=False,
    ),
    "qp, flat, shared": Case(
        equality_constrained_qp,
        (normal(1, 5, 2), normal(3, 2), normal(3, 2), normal(1, 2, 5), normal(3, 2)),
        lambda L, s, t, A, b: (
            gram(L),
            (s.unsqueeze(1) @ L.mT + t.unsqueeze(1) @ A).squeeze(1),
            A,
            b,
        ),
        rounds=False,
    ),
    "transport": Case(entropic_optimal_transport, draw_transport(3, 5), masses),
    "transport, flipped": Case(entropic_optimal_transport, draw_transport(5, 3), masses),
    "transport, shared": Case(
        entropic_optimal_transport,
        (normal(1, 3, 5), positive(1, 3), positive(1, 5), positive(3, seed=2)),
        masses,
    ),
    "transport, cold": Case(
        entropic_optimal_transport, draw_transport(4, 4, width=8.0), masses, step=1e-5
    ),
    "transport, forbidden pairs": Case(
        entropic_optimal_transport, draw_transport(3, 5), one_forbidden
    ),
    "transport, two components": Case(
        entropic_optimal_transport, draw_transport(3, 5), two_components
    ),
    "transport, zero marginals": Case(
        entropic_optimal_transport, draw_transport(3, 5), a_zero_marginal
    ),
}


@pytest.fixture(params=CASES, ids=lambda name: name.replace(", ", "-").replace(" ", "_"))
def case(request) -> Case:
    return CASES[request.param]


def close(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...], tolerance: float) -> None:
    """Equal to a tolerance relative to each one's largest entry, or a thousandth of the largest of
    all."""
    largest = max(float(t.detach().abs().max()) for t in theirs if t.numel())
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape
        assert a.isfinite().all()
        if a.numel():
            assert float((a - b).detach().abs().max()) <= tolerance * max(
                float(b.detach().abs().max()), 1e-3 * largest
            )


def along(tensors: tuple[Tensor, ...], seed: int) -> tuple[Tensor, ...]:
    return tuple(normal(*t.shape, seed=seed + k).to(t.dtype) for k, t in enumerate(tensors))


def inner(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> Tensor:
    return torch.stack([(s * t).sum() for s, t in zip(a, b, strict=True)]).sum()


def gradient(
    f: Callable[..., tuple[Tensor, ...]], parameters: tuple[Tensor, ...], bars: tuple[Tensor, ...]
):
    leaves = tuple(t.detach().clone().requires_grad_() for t in parameters)
    return torch.autograd.grad(inner(bars, f(*leaves)), leaves)


def curvature(f: Callable[..., tuple[Tensor, ...]], parameters, bars, steps) -> tuple[Tensor, ...]:
    """The second derivative of <bars, f>, along `steps` once, by reverse over reverse."""
    leaves = tuple(t.detach().clone().requires_grad_() for t in parameters)
    first = torch.autograd.grad(inner(bars, f(*leaves)), leaves, create_graph=True)
    return torch.autograd.grad(inner(steps, first), leaves)


def test_the_values_are_the_solution(case):
    again, outputs = case.local()(*case.parameters), case.solved().outputs
    close(again, outputs, 1e-2 * case.accuracy)
    assert all((a[b == 0] == 0).all() for a, b in zip(again, outputs, strict=True))


def test_the_vjp_is_the_kernels_own_and_the_transpose_of_the_jvp(case):
    local, bars, steps = case.local(), along(case(*case.parameters), 5), along(case.parameters, 9)
    theirs = gradient(case, case.parameters, bars)
    close(vjp(local, *case.parameters)[1](bars), theirs, case.accuracy)
    _, moved = jvp(local, case.parameters, steps)
    terms = sum(float((a * b).sum().abs()) for a, b in zip(theirs, steps, strict=True))
    assert abs(inner(bars, moved) - inner(theirs, steps)) <= case.accuracy * terms


def test_second_derivatives_are_differences_of_the_kernels_own_backward(case):
    bars, steps, h = along(case(*case.parameters), 5), along(case.parameters, 9), case.step

    def at(t: float) -> tuple[Tensor, ...]:
        return gradient(
            case, tuple(p + t * s for p, s in zip(case.parameters, steps, strict=True)), bars
        )

    sides = zip(at(2 * h), at(h), at(-h), at(-2 * h), strict=True)
    slopes = tuple(
        (8 * (near - back) - far + further) / (12 * h) for far, near, back, further in sides
    )
    close(curvature(case.local(), case.parameters, bars, steps), slopes, 1e-6)


def test_every_order_of_modes_gives_the_same_second_derivative(case):
    local, bars, steps = case.local(), along(case(*case.parameters), 5), along(case.parameters, 9)
    twice = curvature(local, case.parameters, bars, steps)

    def moved(*parameters: Tensor) -> tuple[Tensor, ...]:
        return jvp(local, parameters, steps)[1]

    close(vjp(moved, *case.parameters)[1](bars), twice, 10 * case.accuracy)
    _, forward = jvp(lambda *parameters: vjp(local, *parameters)[1](bars), case.parameters, steps)
    close(forward, twice, 10 * case.accuracy)
    _, bent = jvp(moved, case.parameters, steps)
    terms = sum(float((a * b).sum().abs()) for a, b in zip(twice, steps, strict=True))
    assert abs(inner(bars, bent) - inner(twice, steps)) <= 10 * case.accuracy * terms


def test_the_hessian_of_torch_func(case):
    local, bars, step = (
        case.local(),
        along(case(*case.parameters), 5),
        along(case.parameters[:1], 9)[0],
    )

    def of_one(first: Tensor) -> Tensor:
        return inner(bars, local(first, *case.parameters[1:]))

    zeros = tuple(torch.zeros_like(t) for t in case.parameters[1:])
    expected = curvature(local, case.parameters, bars, (step, *zeros))[0]
    product = (
        torch.func.hessian(of_one)(case.parameters[0]).flatten(step.dim()) @ step.flatten()
    ).view_as(step)
    close((product,), (expected,), 10 * case.accuracy)


def test_what_is_shared_may_come_expanded(case):
    answer = case.solved()
    bars, steps = along(answer.outputs, 5), along(case.parameters, 9)

    def whole(*parameters: Tensor) -> tuple[Tensor, ...]:
        inputs = case.inputs(*parameters)
        return answer.again(
            *(None if t is None else t.expand(len(bars[0]), *t.shape[1:]) for t in inputs)
        ).outputs

    close(whole(*case.parameters), answer.outputs, case.accuracy)
    close(
        gradient(whole, case.parameters, bars), gradient(case, case.parameters, bars), case.accuracy
    )
    apart, together = (curvature(f, case.parameters, bars, steps) for f in (whole, case.local()))
    close(apart, together, 10 * case.accuracy)


def test_float32_agrees_with_float64_to_its_precision(case):
    if not case.rounds:
        pytest.skip("rounding changes the rank")
    single = tuple(t.float() for t in case.parameters)
    rounded = Case(
        lambda *given: case.kernel(*(None if t is None else t.float() for t in given)),
        single,
        case.inputs,
    )
    answer = rounded.solved()

    def local(*parameters: Tensor) -> tuple[Tensor, ...]:
        return answer.again(
            *(None if t is None else t.float() for t in case.inputs(*parameters))
        ).outputs

    bars, steps = along(answer.outputs, 5), along(single, 9)
    assert all(t.dtype == torch.float32 for t in local(*single))
    close(local(*single), answer.outputs, 1e-6)
    close(gradient(local, single, bars), gradient(rounded, single, bars), 1e-4)
    double = (tuple(t.double() for t in group) for group in (bars, steps))
    exact = tuple(t.float() for t in curvature(case.local(), case.parameters, *double))
    close(curvature(local, single, bars, steps), exact, 1e-3)


INFINITE = torch.tensor(torch.inf, dtype=torch.float64)
FAILING = {
    "a negative weight": (
        least_squares,
        (normal(3, 7, 4), normal(3, 7, 2), torch.cat((positive(2, 7), -positive(1, 7))), None),
    ),
    "a negative ridge": (
        least_squares,
        (normal(3, 4, 7), normal(3, 4, 2), None, torch.cat((positive(2, 7), -positive(1, 7)))),
    ),
    "a negative weight, shared": (
        least_squares,
        (normal(1, 7, 4), normal(3, 7, 2), -positive(1, 7), None),
    ),
    "infeasible and unbounded": (
        equality_constrained_qp,
        (
            gram(normal(3, 4, 4)) * torch.tensor([1.0, 1.0, -1.0]).view(3, 1, 1),
            normal(3, 4),
            torch.stack((normal(2, 4), torch.ones(2, 4).double(), normal(2, 4, seed=1))),
            normal(3, 2),
        ),
    ),
    "infeasible, shared": (
        equality_constrained_qp,
        (
            gram(normal(1, 4, 4)),
            normal(3, 4),
            torch.ones(1, 2, 4).double(),
            torch.tensor([[1.0, 1], [1, 2], [3, 3]]).double(),
        ),
    ),
    "eps that is not positive": (
        entropic_optimal_transport,
        (
            normal(3, 2, 3),
            torch.ones(3, 2).double() / 2,
            torch.ones(3, 3).double() / 3,
            torch.tensor([1.0, 0.0, -1.0]).double(),
        ),
    ),
    "masses that differ, and nowhere to go": (
        entropic_optimal_transport,
        (
            torch.stack((normal(2, 3), normal(2, 3), INFINITE.expand(2, 3))),
            torch.ones(3, 2).double() / 2,
            torch.tensor([1.0, 2.0, 1.0]).double().view(3, 1).expand(3, 3) / 3,
            torch.ones(1).double(),
        ),
    ),
}


@pytest.mark.parametrize("name", FAILING)
def test_rows_that_failed_are_finite_and_leave_the_others_untouched(name):
    kernel, data = FAILING[name]
    present = [k for k, t in enumerate(data) if t is not None]

    def placed(moved: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
        return tuple(moved[present.index(k)] if k in present else None for k in range(len(data)))

    case = Case(kernel, tuple(data[k] for k in present), lambda *moved: placed(moved))
    answer = case.solved()
    failed = answer.status >= Status.INFEASIBLE
    assert failed.any()
    size = len(failed)
    bars, steps = along(answer.outputs, 5), along(case.parameters, 9)
    bars = tuple(bar.masked_fill(failed.view(-1, *[1] * (bar.dim() - 1)), 0.0) for bar in bars)
    again, moved = jvp(case.local(), case.parameters, steps)
    first, second = (
        gradient(case.local(), case.parameters, bars),
        curvature(case.local(), case.parameters, bars, steps),
    )
    assert all(t.isfinite().all() for t in (*again, *moved, *first, *second))
    for a, output in zip(again, answer.outputs, strict=True):
        assert torch.allclose(a, output, rtol=1e-12, atol=1e-14)
    for i in torch.nonzero(~failed).flatten().tolist():
        one, mine = (
            tuple(t[i : i + 1] if len(t) == size else t for t in case.parameters),
            slice(i, i + 1),
        )
        alone = Case(kernel, one, case.inputs)
        step = tuple(t[mine] if len(t) == size else t for t in steps)
        theirs = curvature(alone.local(), one, tuple(t[mine] for t in bars), step)
        own = [k for k, t in enumerate(case.parameters) if len(t) == size]
        close(tuple(second[k][mine] for k in own), tuple(theirs[k] for k in own), 1e-9)


def test_the_second_derivative_at_a_zero_marginal_is_the_limit_from_the_right():
    M, r, c, eps = draw_transport(3, 5)
    r[:, 1], c[:, 2] = 0.0, 0.0
    case, h = Case(entropic_optimal_transport, (M, r, c, eps), masses), 1e-4
    # the potentials there tend to -inf
    bars = tuple(bar * (k == 0) for k, bar in enumerate(along(case(M, r, c, eps), 5)))
    steps = tuple(t.abs() if k in (1, 2) else t for k, t in enumerate(along(case.parameters, 9)))
    ahead = [
        gradient(
            case, tuple(p + k * h * s for p, s in zip(case.parameters, steps, strict=True)), bars
        )
        for k in range(5)
    ]
    slopes = tuple(
        (-25 * a + 48 * b - 36 * c + 16 * d - 3 * e) / (12 * h)
        for a, b, c, d, e in zip(*ahead, strict=True)
    )
    close(curvature(case.local(), case.parameters, bars, steps), slopes, 1e-6)


@pytest.mark.parametrize(
    "name",
    ["transport", "transport, flipped", "transport, forbidden pairs", "transport, two components"],
)
def test_conjugate_gradients_agree_with_the_factor(name, monkeypatch):
    case = CASES[name]
    bars, steps = along(case(*case.parameters), 5), along(case.parameters, 9)
    dense = case.local()
    monkeypatch.setattr(transport, "DENSE", 0)
    free = case.local()
    close(gradient(free, case.parameters, bars), gradient(dense, case.parameters, bars), 1e-9)
    close(
        curvature(free, case.parameters, bars, steps),
        curvature(dense, case.parameters, bars, steps),
        1e-8,
    )


@pytest.mark.parametrize(
    "kernel", [least_squares, equality_constrained_qp, entropic_optimal_transport]
)
def test_there_is_none_where_nothing_is_to_be_differentiated_and_an_empty_batch_has_one(kernel):
    case = next(case for case in CASES.values() if case.kernel is kernel)
    assert kernel(*case.inputs(*case.parameters)).local is None
    with torch.no_grad():
        assert case.solved().local is None
    empty = Case(kernel, tuple(t[:0] for t in case.parameters), case.inputs)
    bars = along(empty.solved().outputs, 5)
    second = curvature(empty.local(), empty.parameters, bars, along(empty.parameters, 9))
    assert [t.shape for t in second] == [t.shape for t in empty.parameters]


OURS = ("least_squares", "equality_constrained_qp", "entropic_optimal_transport")


@pytest.mark.parametrize("spelling", [s for s in SPELLINGS if s.structure in OURS], ids=repr)
def test_a_structure_says_its_answer_again(spelling):
    problem, parameters, _ = spelling.declare()
    run = STRUCTURES[spelling.structure].match(normal_form(problem, parameters)).build(Wanted())
    leaves = [t.requires_grad_() for t in spelling.sample((2,), seed=3)]
    at = run(leaves, leaves[0])
    again = run(leaves, leaves[0], at)
    bars = along(at.outputs, 5)
    close(again.outputs, at.outputs, 1e-12)
    theirs = torch.autograd.grad(inner(bars, at.outputs), leaves, allow_unused=True)
    ours = torch.autograd.grad(inner(bars, again.outputs), leaves, allow_unused=True)
    close(
        *(
            tuple(
                torch.zeros_like(x) if t is None else t for t, x in zip(found, leaves, strict=True)
            )
            for found in (ours, theirs)
        ),
        1e-9,
    )
    assert again.status is at.status

"""The short way of a call says what the long way says: outputs, what is known of rows, gradients,
warnings, refusals."""

import gc
import resource
import threading
import warnings
from collections import Counter

import cvxpy as cp
import numpy as np
import pytest
import torch
from cases import CASES

from convlayer import ConvexLayer, ParameterError, SolverError
from convlayer.core.interface import core
from convlayer.paths.short import KEPT, Answered, ShortWay
from convlayer.structures import STRUCTURES

D = torch.float64
pytestmark = pytest.mark.skipif(core() is None, reason="no compiled core was built")


def weighted(outputs):
    """A loss with a weight of its own for every entry."""
    total = 0.0
    for k, out in enumerate(outputs):
        weight = torch.linspace(-1, 2 + k, out.numel(), dtype=out.dtype).reshape(out.shape)
        total = total + (out * weight).sum()
    return total


def told(layer, tensors, everything, loss=weighted):
    """All that a call and its backward say."""
    inputs = [t.detach().clone().requires_grad_() for t in tensors]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if everything:
            solution = layer.solve(*inputs)
            outputs = [*solution.variables, solution.objective]
            table = [solution.status, solution.degenerate, solution.margin, *solution.iterate]
        else:
            outputs, table = list(layer(*inputs)), []
        bars = torch.autograd.grad(loss(outputs), inputs, allow_unused=True)
        if everything:
            table[1] = solution.degenerate
    return outputs, table, bars, Counter(str(w.message) for w in caught)


def both_ways(layer, tensors, everything, monkeypatch, loss=weighted, precision=1e-9):
    copy = layer.with_options()
    mine = told(copy, tensors, everything, loss)
    assert taken(copy), "the short way was not taken"
    with monkeypatch.context() as patch:
        patch.setattr(ShortWay, "__call__", lambda *_: None)
        theirs = told(layer.with_options(), tensors, everything, loss)
    for group, others in zip(mine[:3], theirs[:3], strict=True):
        for a, b in zip(group, others, strict=True):
            assert a.dtype == b.dtype
            assert a.shape == b.shape
            a, b = a.double(), b.double()
            assert torch.equal(torch.isnan(a), torch.isnan(b))
            size = 1 + float(b.nan_to_num(0.0, 0.0, 0.0).abs().max())
            assert torch.allclose(a, b, rtol=0, atol=precision * size, equal_nan=True)
    assert mine[3] == theirs[3]
    return mine


def taken(layer):
    return layer._short is not None and any(
        arranged is not None for arranged in layer._short._arrangements.values()
    )


def generic(case, **options):
    return case.layer(structure="generic", **options)


def served():
    """The cases that the core serves."""
    return [name for name, case in CASES.items() if generic(case)._declared.maps is not None]


@pytest.mark.parametrize("name", served())
@pytest.mark.parametrize("everything", [False, True])
def test_both_ways_say_the_same(name, everything, monkeypatch):
    case = CASES[name]
    both_ways(generic(case), case.sample(3, seed=4), everything, monkeypatch, precision=1e-8)


@pytest.mark.parametrize("name", served()[::2])
def test_of_one_instance_and_of_parameters_that_are_shared(name, monkeypatch):
    case = CASES[name]
    alone = [t[0] for t in case.sample(1, seed=6)]
    both_ways(generic(case), alone, True, monkeypatch, precision=1e-8)
    for k, one in enumerate(alone):
        mixed = [*alone]
        mixed[k] = torch.stack([one] * 3)
        both_ways(generic(case), mixed, False, monkeypatch, precision=1e-8)


def projection(**options):
    """Onto a box and a ball, whose radii need not be given for each row."""
    x, p, r = cp.Variable(4, name="x"), cp.Parameter(4, name="p"), cp.Parameter(name="r")
    w = cp.Parameter(4, nonneg=True, name="w")
    problem = cp.Problem(
        cp.Minimize(cp.sum_squares(x - p) + w @ cp.abs(x)), [cp.norm(x) <= r, x <= 1]
    )
    return ConvexLayer(problem, [p, r, w], [x], **options)


def points(*batch, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*batch, 4, dtype=D, generator=generator)


W = torch.tensor([0.1, 0.2, 0.3, 0.05], dtype=D)


@pytest.mark.parametrize(
    "shapes", [((2, 3), (3,)), ((2, 3), (2, 1)), ((1, 3), (1,)), ((3,), (1, 3)), ((2, 1), (1, 3))]
)
def test_batch_dimensions_broadcast(shapes, monkeypatch):
    first, second = shapes
    radius = 0.5 + torch.rand(*second, dtype=D, generator=torch.Generator().manual_seed(1))
    both_ways(projection(), [points(*first), radius, W], True, monkeypatch)


@pytest.mark.parametrize("dtypes", [(torch.float32,) * 3, (torch.float32, D, torch.float32)])
def test_float32_and_mixtures_of_both(dtypes, monkeypatch):
    tensors = [points(5), torch.tensor(0.7, dtype=D), W]
    cast = [t.to(dtype) for t, dtype in zip(tensors, dtypes, strict=True)]
    precision = 1e-9 if D in dtypes else 1e-6
    both_ways(projection(), cast, True, monkeypatch, precision=precision)


def test_tensors_that_do_not_lie_one_after_the_other(monkeypatch):
    layer = projection()
    inputs = points(4, 5).movedim(-1, 0)[:, ::2].mT  # a view of a view
    assert not inputs.movedim(0, -1).is_contiguous()
    radius = torch.rand(3, 10, dtype=D, generator=torch.Generator().manual_seed(2))[:, 1::4] + 0.3
    tensors = [points(3, 6)[:, ::2], radius, W.flip(0).expand(3, 3, 4)]
    both_ways(layer, tensors, False, monkeypatch)
    negated = torch.complex(points(3), points(3, seed=1)).conj().imag
    assert negated.is_neg()
    x = layer(negated, torch.tensor(0.7, dtype=D), W)[0]
    assert torch.allclose(x, layer(negated.clone(), torch.tensor(0.7, dtype=D), W)[0], atol=1e-13)


@pytest.mark.parametrize(
    "loss",
    [
        lambda outputs: outputs[0].sum(),  # cotangents that all lie in one place
        lambda outputs: outputs[0][1].sum(),  # rows that nobody uses
        lambda outputs: outputs[0].mT.flip(0).square().sum(),
        lambda outputs: 0.0 * outputs[0].sum(),
        lambda outputs: (outputs[0][0] * torch.nan).sum() + outputs[0][2].sum(),
        lambda outputs: (outputs[0][0] * torch.inf).sum() + outputs[0][2].sum(),
    ],
    ids=["expanded", "one row", "transposed", "zero", "nan", "infinite"],
)
@pytest.mark.parametrize("shared", [False, True])
def test_any_cotangent(loss, shared, monkeypatch):
    radius = torch.tensor(0.7, dtype=D) if shared else torch.full((3,), 0.7, dtype=D)
    both_ways(projection(), [points(3), radius, W], False, monkeypatch, loss)


def vertex(**options):
    c, b, x = cp.Parameter(3, name="c"), cp.Parameter(name="b"), cp.Variable(3, name="x")
    problem = cp.Problem(cp.Minimize(c @ x), [x >= 0, cp.sum(x) <= b, -cp.sum(x) <= -b / 2])
    return ConvexLayer(problem, [c, b], [x], structure="generic", **options)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("everything", [False, True])
def test_a_gradient_that_is_zero_everywhere_is_told_of(shared, everything, monkeypatch):
    c = torch.tensor([1.0, 2.0, 3.0], dtype=D)
    costs = c if shared else torch.stack([c, c.flip(0)])
    b = torch.tensor([1.0, 2.0], dtype=D)

    def loss(outputs):
        return weighted(outputs[:1])

    said = both_ways(vertex(), [costs, b], everything, monkeypatch, loss)[3]
    assert any("stays at its vertex" in message for message in said)


def test_an_infinite_bound_is_none(monkeypatch):
    low, high, p = (cp.Parameter(3, name=name) for name in ("low", "high", "p"))
    x = cp.Variable(3)
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x - p)), [low <= x, x <= high, cp.sum(x) == 1])
    layer = ConvexLayer(problem, [low, high, p], [x], structure="generic")
    ends = [-torch.inf, 0.0, -1.0], [0.5, torch.inf, 0.1]
    tensors = [torch.tensor([end] * 2, dtype=D) for end in ends]
    tensors.append(torch.tensor([[1.0, 2.0, 0.3], [0.0, -2.0, 0.9]], dtype=D))
    x, _, bars, _ = both_ways(layer, tensors, False, monkeypatch)
    finite = [t.clamp(-1e3, 1e3) for t in tensors]
    assert torch.allclose(x[0], layer(*finite)[0], atol=1e-12)
    assert all(torch.isfinite(bar).all() for bar in bars)


def transport(**options):
    """Equalities that depend on each other: rows and columns have the same sum."""
    plan, C = cp.Variable((3, 4)), cp.Parameter((3, 4), name="C")
    a, b = cp.Parameter(3, name="a"), cp.Parameter(4, name="b")
    rules = [cp.sum(plan, 1) == a, cp.sum(plan, 0) == b, plan >= 0]
    objective = cp.Minimize(cp.sum(cp.multiply(C, plan)) + 0.1 * cp.sum_squares(plan))
    return ConvexLayer(cp.Problem(objective, rules), [C, a, b], [plan], **options)


def marginals(seed=3):
    generator = torch.Generator().manual_seed(seed)
    C, a, b = (torch.rand(2, *n, dtype=D, generator=generator) + 0.1 for n in ((3, 4), (3,), (4,)))
    return [C, a, b * (a.sum(1) / b.sum(1)).unsqueeze(1)]


def test_equalities_that_depend_on_each_other(monkeypatch):
    both_ways(transport(structure="generic"), marginals(), True, monkeypatch)
    C, a, b = marginals()
    with pytest.raises(SolverError, match=r"row 1: INFEASIBLE"):
        transport(structure="generic")(C, a, torch.stack([b[0], 1.01 * b[1]]))
    layer = transport(structure="generic")
    near = torch.stack([b[0], (1 + 1e-11) * b[1]])  # rounding, and more than the core takes
    solution = layer.solve(C, a, near)
    assert solution.statuses.tolist() == ["SOLVED", "SOLVED"]
    assert "row 1" in str(solution.notes)


DOMAINS = {
    "nonneg": ({"nonneg": True}, [1.0, -1.0]),
    "pos": ({"pos": True}, [1.0, 0.0]),
    "nonpos": ({"nonpos": True}, [-1.0, 1.0]),
    "neg": ({"neg": True}, [-1.0, 0.0]),
    "bounds": ({"bounds": [0, 2]}, [1.0, 3.0]),
}


@pytest.mark.parametrize("name", DOMAINS)
@pytest.mark.parametrize("shared", [False, True])
def test_what_is_outside_its_domain_is_refused(name, shared):
    options, (inside, outside) = DOMAINS[name]
    a, p, x = cp.Parameter(2, name="a", **options), cp.Parameter(2), cp.Variable(2)
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x - p)), [x + a <= 1])
    layer = ConvexLayer(problem, [a, p], [x], structure="generic")
    p = torch.zeros(3, 2, dtype=D)
    good = torch.full((2,), inside, dtype=D)
    bad = torch.tensor([inside, outside], dtype=D)
    rows = [good, bad] if shared else [good.expand(3, 2), torch.stack([good, bad, good])]
    assert torch.isfinite(layer(rows[0], p)[0]).all()
    assert taken(layer)
    with pytest.raises(ParameterError, match="`a` was declared"):
        layer(rows[1], p)
    assert torch.isfinite(layer.with_options(validate=False)(rows[1], p)[0]).all()


MATRICES = {
    "PSD": ({"PSD": True}, [[2.0, 0.5], [0.5, 1.0]], [[1.0, 2.0], [2.0, 1.0]]),
    "not symmetric": ({"PSD": True}, [[2.0, 0.5], [0.5, 1.0]], [[2.0, 0.5], [0.4, 1.0]]),
    "nearly symmetric": ({"PSD": True}, [[2.0, 0.5], [0.5 + 1e-13, 1.0]], None),
    "singular": ({"PSD": True}, [[1.0, 1.0], [1.0, 1.0]], None),
}


@pytest.mark.parametrize("name", MATRICES)
def test_matrices_outside_their_domain_are_refused(name, monkeypatch):
    options, good, bad = MATRICES[name]
    P, q, x = cp.Parameter((2, 2), name="P", **options), cp.Parameter(2), cp.Variable(2)
    objective = cp.quad_form(x, P) + q @ x + 0.1 * cp.sum_squares(x)
    layer = ConvexLayer(cp.Problem(cp.Minimize(objective), [x <= 1]), [P, q], [x])
    q = torch.tensor([0.3, -1.0], dtype=D)
    both_ways(layer, [torch.tensor(good, dtype=D), q], True, monkeypatch)
    if bad is not None:
        with pytest.raises(ParameterError, match="`P` was declared"):
            layer(torch.tensor(bad, dtype=D), q)


def test_rows_that_the_core_does_not_settle_go_the_long_way_and_they_alone():
    """An infeasible one and one at a kink, between rows that are plainly solved."""
    x, p, r = cp.Variable(2), cp.Parameter(2, name="p"), cp.Parameter(name="r")
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x - p)), [x >= 0, cp.sum(x) <= r])
    layer = ConvexLayer(problem, [p, r], [x], structure="generic", on_failure="nan")
    p = torch.tensor([[1.2, 1.0], [1.0, 1.0], [0.0, 1.0], [3.0, -1.0]], dtype=D)
    r = torch.tensor([1.0, -1.0, 5.0, 0.5], dtype=D)
    inputs = [p.clone().requires_grad_(), r.clone().requires_grad_()]
    solution = layer.solve(*inputs)
    loss = solution.variables[0][solution.solved].square().sum()
    with pytest.warns(UserWarning, match="weakly active"):
        bars = torch.autograd.grad(loss, inputs)
    assert solution.statuses.tolist() == ["SOLVED", "INFEASIBLE", "SOLVED", "SOLVED"]
    assert solution.degenerate.tolist() == [False, False, True, False]
    called = layer(p, r)[0]
    for k in (0, 3):
        one = [p[k].clone().requires_grad_(), r[k].clone().requires_grad_()]
        alone = layer(*one)[0]
        assert torch.equal(alone, called[k])
        assert torch.allclose(alone, solution.variables[0][k], atol=1e-13)
        grads = torch.autograd.grad(alone.square().sum(), one)
        assert all(
            torch.allclose(whole[k], part, rtol=1e-12)
            for whole, part in zip(bars, grads, strict=True)
        )


def test_a_row_has_the_same_bits_and_gradient_whatever_the_batch_and_the_threads():
    layer, tensors = projection(), [points(70), torch.tensor(0.7, dtype=D), W]
    inputs = [t.requires_grad_() for t in tensors]
    whole = layer(*inputs)[0]
    bars = torch.autograd.grad(whole.square().sum(), inputs)
    for k in (0, 33, 69):
        one = tensors[0][k].detach().requires_grad_()
        alone = layer(one, *tensors[1:])[0]
        assert torch.equal(alone, whole[k])
        (bar,) = torch.autograd.grad(alone.square().sum(), [one])
        assert torch.equal(bar, bars[0][k])
    found = []
    arranged = next(iter(layer._short._arrangements.values()))
    for threads in (1, 2, 3):
        arranged.calls._template.options.threads = threads
        arranged.calls._adjoint_threads = threads
        x = layer(*inputs)[0]
        found.append([x, *torch.autograd.grad(x.square().sum(), inputs)])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize(
    "name", ["quadratic_program", "lasso", "entropy", "posynomial", "a smaller program"]
)
def test_second_derivatives_and_transforms_go_on_from_what_the_core_found(name):
    if name in CASES:
        layer, tensors = generic(CASES[name]), [t[0] for t in CASES[name].sample(1, seed=2)]
    else:
        layer, tensors = projection(), [points(), torch.tensor(0.7, dtype=D), W]
        assert layer._declared.lean_maps.whole is not None

    def loss(*inputs):
        return weighted(layer(*inputs))

    inputs = [t.clone().requires_grad_() for t in tensors]
    bars = torch.autograd.grad(loss(*inputs), inputs, create_graph=True)
    assert taken(layer)
    directions = [torch.ones_like(t) for t in tensors]
    along = sum((bar * d).sum() for bar, d in zip(bars, directions, strict=True))
    seconds = torch.autograd.grad(along, inputs, allow_unused=True)
    _, forward = torch.func.jvp(
        torch.func.grad(loss, tuple(range(len(tensors)))), tuple(tensors), tuple(directions)
    )
    for second, other in zip(seconds, forward, strict=True):
        assert torch.allclose(second, other, atol=1e-6 * float(1 + other.abs().max()))


def test_a_second_backward_needs_the_graph():
    layer, p = projection(), points(2).requires_grad_()
    x = layer(p, torch.tensor(0.7, dtype=D), W)[0]
    (first,) = torch.autograd.grad(x.sum(), [p], retain_graph=True)
    assert torch.equal(torch.autograd.grad(x.sum(), [p])[0], first)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(x.sum(), [p])


def test_calls_of_several_threads_do_not_meet():
    layer, expected, found = projection(), {}, {}
    radius = torch.tensor(0.7, dtype=D)

    def work(k, into):
        for _ in range(20):
            p = points(3 + k % 3, seed=k).requires_grad_()
            x = layer(p, radius, W)[0]
            into[k] = x, torch.autograd.grad(x.square().sum(), [p])[0]

    for k in range(8):
        work(k, expected)
    threads = [threading.Thread(target=work, args=(k, found)) for k in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for k, (x, bar) in expected.items():
        assert torch.equal(found[k][0], x)
        assert torch.equal(found[k][1], bar)


def test_nothing_grows_with_the_number_of_calls():
    layer, radius = projection(), torch.tensor(0.7, dtype=D)

    def work(calls):
        for k in range(calls):
            p = points(1 + k % 5, seed=k % 7).requires_grad_()
            layer(p, radius, W)[0].sum().backward()

    work(300)
    gc.collect()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    gc.disable()
    try:
        work(4000)  # a call that left anything to the collector would leave 4,000 of them
    finally:
        gc.enable()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 4000  # kB
    for k in range(KEPT + 10):
        layer(points(k + 1), radius, W)
    assert len(layer._short._arrangements) <= KEPT


LEAN = {
    "a copy": lambda x, p, q: cp.sum_squares(x[1:]) + q @ x + cp.square(x[0]),
    "with an offset": lambda x, p, q: cp.sum_squares(x - p) + q @ x,
    "a constant offset": lambda x, p, q: cp.sum_squares(2 * x - 1) + q @ x,
    "differences": lambda x, p, q: cp.sum_squares(cp.diff(x)) + cp.sum_squares(x - p),
    "squares": lambda x, p, q: cp.sum(cp.square(x - 0.3)) + 2 * cp.square(x[0] + x[2]),
    "a parameter for a weight": lambda x, p, q: cp.sum_squares(cp.multiply(q, x)) + p @ x,
    "many": lambda x, p, q: cp.sum_squares(np.ones((2, 5)) @ x - 1) + cp.sum_squares(x - p),
}


@pytest.mark.parametrize("name", LEAN)
def test_a_program_without_what_quadratic_terms_add_has_the_same_solution(name, monkeypatch):
    x, p, q = cp.Variable(5), cp.Parameter(5, name="p"), cp.Parameter(5, name="q")
    limits = [x >= -0.4, cp.sum(x) == 0.3, x[0] - x[1] <= 0.2]
    layer = ConvexLayer(
        cp.Problem(cp.Minimize(LEAN[name](x, p, q) + 0.1 * (p + q) @ x), limits),
        [p, q],
        [x, limits[0].dual_variables[0], limits[1].dual_variables[0]],
        structure="generic",
    )
    declared = layer._declared
    smaller = declared.lean_maps.plan.n < declared.maps.plan.n
    assert smaller == (name not in ("a parameter for a weight",))
    generator = torch.Generator().manual_seed(5)
    tensors = [0.5 + torch.rand(3, 5, dtype=D, generator=generator) for _ in range(2)]
    both_ways(layer, tensors, False, monkeypatch)
    # The whole of what was found leads on: the derivative with a row that is not settled beside.
    tied = [t.clone() for t in tensors]
    inputs = [t.clone().requires_grad_() for t in tied]
    _, forward = torch.func.jvp(
        lambda *t: layer(*t)[0], tuple(tied), tuple(torch.ones_like(t) for t in tied)
    )
    out = layer(*inputs)[0]
    weight = torch.randn(out.shape, dtype=D, generator=generator)
    bars = torch.autograd.grad((out * weight).sum(), inputs, allow_unused=True)
    along = sum(bar.sum() for bar in bars if bar is not None)
    assert torch.allclose(along, (forward * weight).sum(), rtol=1e-9, atol=1e-10)


COMPILED = [name for name in STRUCTURES if STRUCTURES[name].compiled]


@pytest.mark.parametrize("name", COMPILED)
def test_a_small_batch_of_a_structure_is_the_cores_and_says_what_the_kernel_says(name):
    structure = STRUCTURES[name]
    problem, parameters, variables = structure.declare()
    layer = ConvexLayer(problem, parameters, variables)
    kernel = layer.with_options(structure=name)
    assert layer.structure == name
    assert "the compiled core, by their estimates" in layer.explain()
    assert "the kernel, by their estimates" in layer.explain(4096)
    for batch in ((), (3,)):
        tensors = structure.sample(batch, torch.Generator().manual_seed(1))
        mine, theirs = (told(one, tensors, False) for one in (layer, kernel))
        for group, others in zip(mine[:3], theirs[:3], strict=True):
            for a, b in zip(group, others, strict=True):
                assert torch.allclose(a, b, atol=1e-9 * (1 + float(b.abs().max())))
    assert taken(layer)
    assert kernel._short is None
    many = structure.sample((4096,), torch.Generator().manual_seed(1))
    layer(*many)
    assert None in layer._short._arrangements.values()  # there the kernel is faster


def test_a_degenerate_row_of_a_structure_is_the_kernels():
    A, b, x = cp.Parameter((3, 2), name="A"), cp.Parameter(3), cp.Variable(2)
    layer = ConvexLayer(cp.Problem(cp.Minimize(cp.sum_squares(A @ x - b))), [A, b], [x])
    assert layer.structure == "least_squares"
    square = torch.tensor([[1.0, 2.0], [2.0, 4.0], [0.0, 0.0]], dtype=D)
    right = torch.tensor([1.0, 2.0, 3.0], dtype=D)
    expected = torch.linalg.pinv(square) @ right  # of least norm
    assert torch.allclose(layer(square, right)[0], expected, atol=1e-12)


def test_what_is_not_plain_goes_the_long_way():
    layer, radius = projection(), torch.tensor(0.7, dtype=D)
    p = points(3)
    expected = layer(p, radius, W)[0]
    half = layer(p.bfloat16(), radius.bfloat16(), W.bfloat16())[0]
    assert half.dtype is torch.bfloat16
    assert torch.allclose(half.double(), expected, atol=0.1)
    assert layer(p[:0], radius, W)[0].shape == (0, 4)
    with pytest.raises(TypeError, match=r"to_dense\(\)"):
        layer(p.to_sparse(), radius, W)
    with pytest.raises(ValueError, match="was given a tensor of shape"):
        layer(p[:, :3], radius, W)
    with pytest.raises(TypeError, match="expected floating point"):
        layer(p.long(), radius, W)
    mapped = torch.func.vmap(lambda one: layer(one, radius, W)[0])(p)
    assert torch.allclose(mapped, expected, atol=1e-12)


def test_options_set_on_a_layer_hold_at_the_next_call():
    layer = projection()
    layer(points(2), torch.tensor(0.7, dtype=D), W)
    with pytest.raises(ParameterError):
        layer(points(2), torch.tensor(0.7, dtype=D), -W)
    layer.on_failure = "nan"
    x = layer(points(2), torch.tensor([0.7, -1.0], dtype=D), W)[0]
    assert torch.isnan(x).any(1).tolist() == [False, True]


def test_the_exit_holds_no_graph():
    """What a call leaves by holds its outputs apart from their graph, or neither would be freed."""
    p = points(2).requires_grad_()
    x = projection()(p, torch.tensor(0.7, dtype=D), W)[0]
    way_out = x.grad_fn.way_out
    assert isinstance(way_out, Answered)
    assert all(output.grad_fn is None for output in way_out.outputs)
    assert np.array_equal(way_out.outputs[0].numpy(), x.detach().numpy())

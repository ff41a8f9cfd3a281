"""Laws of the sparsemax kernel; the oracle sorts, in extended precision."""

import numpy as np
import pytest
import torch
from kernels import close, differences

from convlayer.kernels.sparsemax import sparsemax
from convlayer.solution import Status

D = torch.float64


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=D)


def radius(*shape, seed=1):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=D) + 0.5


def reference(y, r):
    y = np.asarray(y, dtype=np.longdouble)
    r = np.broadcast_to(np.asarray(r, dtype=np.longdouble), len(y))
    top = y.max(-1, keepdims=True)
    ranked = np.sort(y - top, axis=-1)[:, ::-1]
    t = ((ranked.cumsum(-1) - r[:, None]) / np.arange(1, y.shape[1] + 1)).max(-1, keepdims=True)
    return np.maximum((y - top) - t, 0), (top + t)[:, 0]


def loss(y, r, C, c):
    x, tau = sparsemax(y, r).outputs
    return (C * x).sum() + (c * tau).sum()


def gradients(args, C, c):
    leaves = [a.clone().requires_grad_() for a in args]
    return torch.autograd.grad(loss(*leaves, C, c), leaves)


FAMILIES = {
    "normal": lambda b, n: draw(b, n),
    "wide": lambda b, n: 10 * draw(b, n),
    "narrow": lambda b, n: 0.01 * draw(b, n),
    "flat": lambda b, n: 1e-8 * draw(b, n),
    "heavy": lambda b, n: draw(b, n) / draw(b, n, seed=9),
    "near one": lambda b, n: -(draw(b, n).abs() ** 4),
    "geometric": lambda b, n: -torch.logspace(0, -12, n, dtype=D).expand(b, n),
    "growing": lambda b, n: -torch.logspace(-12, 3, n, dtype=D).expand(b, n),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("b", "n"), [(3, 1), (4, 7), (2, 100), (40, 65), (30, 1003), (2, 20000)])
def test_value(family, b, n):
    y, r = FAMILIES[family](b, n), radius(b)
    x, tau = sparsemax(y, r).outputs
    exact, threshold = reference(y, r)
    assert np.abs(x.numpy() - exact).max() <= 1e-14
    assert np.abs(tau.numpy() - threshold).max() <= 1e-14 * (1 + y.abs().max())
    assert (x.sum(-1) - r).abs().max() <= 2e-15
    assert (x >= 0).all()


@pytest.mark.parametrize("scale", [1e-300, 1e-100, 1e-8, 1e8, 1e100, 1e300])
@pytest.mark.parametrize("n", [5, 3000])
def test_scaling_both_inputs_scales_the_solution(scale, n):
    y, r = draw(3, n), radius(3)
    x, _ = sparsemax(scale * y, scale * r).outputs
    close(x / scale, sparsemax(y, r).outputs[0], 1e-14)


@pytest.mark.parametrize("mass", [1e-300, 1e-30, 1e-12, 1e-4, 1e4, 1e12, 1e300])
@pytest.mark.parametrize("n", [5, 3000])
def test_any_radius(mass, n):
    y, r = draw(2, n), torch.tensor([mass], dtype=D)
    x, _ = sparsemax(y, r).outputs
    assert np.abs(x.numpy() - reference(y, r)[0]).max() <= 1e-14 * mass
    assert (x.sum(-1) - mass).abs().max() <= 1e-14 * mass


@pytest.mark.parametrize("offset", [1e8, -1e8, 1e15])
@pytest.mark.parametrize("n", [6, 3000])
def test_an_offset_costs_only_the_rounding_of_the_input(offset, n):
    y, r = offset + draw(3, n), radius(3)
    x, _ = sparsemax(y, r).outputs
    assert np.abs(x.numpy() - reference(y, r)[0]).max() <= 1e-14
    assert (x.sum(-1) - r).abs().max() <= 2e-15


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_sum_is_exact_where_many_small_entries_meet_a_large_threshold(dtype):
    y = torch.full((2, 1000), -0.9, dtype=dtype)
    y[:, 3] = 0
    y[1] += 100 * draw(1000).to(dtype).clamp(max=0)
    x, _ = sparsemax(y, torch.ones(1, dtype=dtype)).outputs
    assert (x.double().sum(-1) - 1).abs().max() <= 2 * torch.finfo(dtype).eps


def test_extremes():
    huge = torch.tensor([[1.7e308, -1.7e308, 0.0], [-1.7e308, -1.7e308, -1.7e308]], dtype=D)
    x, tau = sparsemax(huge, torch.ones(1, dtype=D)).outputs
    assert torch.allclose(x, torch.tensor([[1.0, 0, 0], [1 / 3] * 3], dtype=D))
    assert tau.isfinite().all()
    assert torch.equal(sparsemax(draw(3, 1), radius(3)).outputs[0][:, 0], radius(3))
    tiny = sparsemax(draw(2, 4), torch.tensor([5e-324, 1e-310], dtype=D)).outputs[0]
    assert (tiny.sum(-1) >= 0).all()
    assert tiny.isfinite().all()


@pytest.mark.parametrize(("b", "m", "n"), [(3, 3, 5), (1, 3, 5), (3, 1, 5), (1, 1, 5), (3, 3, 1)])
def test_gradients_are_differences_and_a_shared_input_sums_over_rows(b, m, n):
    args = draw(b, n), radius(m)
    C, c = draw(max(b, m), n, seed=3), draw(max(b, m), seed=4)
    for k, ours in enumerate(gradients(args, C, c)):
        theirs = differences(lambda *a: loss(*a, C, c), args, k, 1e-5)  # exact on a linear piece
        assert ours.shape == theirs.shape
        assert (ours - theirs).abs().max() <= 1e-8


@pytest.mark.parametrize(("b", "m"), [(1, 40), (40, 1)])
def test_sharing_at_a_size_that_is_not_sorted(b, m):
    args, C, c = (draw(b, 200), radius(m)), draw(40, 200, seed=3), draw(40, seed=4)
    shared = gradients(args, C, c)
    rows = gradients([a.expand(40, *a.shape[1:]) for a in args], C, c)
    for k, (s, g) in enumerate(zip(shared, rows, strict=True)):
        close(s, g.sum(0, keepdim=True) if len(args[k]) == 1 else g, 1e-13)


@pytest.mark.parametrize("n", [6, 1000])
def test_batch_equals_loop(n):
    args, C, c = (draw(6, n), radius(6)), draw(6, n, seed=3), draw(6, seed=4)
    whole, x = gradients(args, C, c), sparsemax(*args).outputs[0]
    for i in range(6):
        one = [a[i : i + 1] for a in args]
        close(x[i : i + 1], sparsemax(*one).outputs[0], 1e-14)
        for a, b in zip(whole, gradients(one, C[i : i + 1], c[i : i + 1]), strict=True):
            close(a[i : i + 1], b, 1e-13)


@pytest.mark.parametrize("n", [6, 1000])
def test_float32_agrees_with_float64(n):
    args, C, c = (draw(9, n).float(), radius(9).float()), draw(9, n, seed=3), draw(9, seed=4)
    double = [a.double() for a in args]
    assert (sparsemax(*args).outputs[0].double() - sparsemax(*double).outputs[0]).abs().max() < 1e-6
    for a, b in zip(gradients(args, C.float(), c.float()), gradients(double, C, c), strict=True):
        assert a.dtype == torch.float32
        close(a.double(), b, 1e-6)


@pytest.mark.parametrize("repeat", [1, 400])
def test_a_tie_at_the_threshold_is_outside_the_support_and_flagged(repeat):
    y = torch.tensor(
        [
            [1.0, 0.0, -3.0, -4, -5, -6],
            [1.0, 0.5, -3.0, -4, -5, -6],
            [0.3, 0.3, -0.2, -0.2, -5, -6],
        ],
        dtype=D,
    )
    y = y.repeat(repeat, 1)
    leaf, r = y.clone().requires_grad_(), torch.ones(1, dtype=D)
    answer = sparsemax(leaf, r)
    x = answer.outputs[0]
    expected = torch.tensor([[1.0, 0, 0], [0.75, 0.25, 0], [0.5, 0.5, 0]], dtype=D).repeat(
        repeat, 1
    )
    assert (x[:, :3] - expected).abs().max() < 1e-15
    assert answer.degenerate.tolist() == [True, False, True] * repeat
    assert (answer.status == Status.SOLVED).all()
    v = draw(len(y), 6)
    (g,) = torch.autograd.grad((v * x).sum(), leaf)
    assert (g[0] == 0).all()  # S = {0}
    half = (v[:, 0] - v[:, 1]) / 2
    close(g[1:3, :2], torch.stack([half, -half], -1)[1:3], 1e-14)
    assert (g[:, 2:] == 0).all()


def test_equal_entries_have_equal_shares():
    for n in (3, 5000):
        answer = sparsemax(torch.full((1, n), 0.1, dtype=D), torch.ones(1, dtype=D))
        assert (answer.outputs[0] * n - 1).abs().max() < 1e-14
        assert answer.degenerate is None


def test_a_radius_of_zero_and_a_negative_one():
    y, r = (
        draw(4, 5).requires_grad_(),
        torch.tensor([1.0, 0.0, -1.0, 2.0], dtype=D, requires_grad=True),
    )
    answer = sparsemax(y, r)
    x, tau = answer.outputs
    assert answer.status.tolist() == [
        Status.SOLVED,
        Status.SOLVED,
        Status.INFEASIBLE,
        Status.SOLVED,
    ]
    assert answer.degenerate.tolist() == [False, True, False, False]
    assert (x[1:3] == 0).all()
    assert tau[1] == y[1].max()
    assert tau[2] == 0
    C = draw(4, 5, seed=3)
    by_y, by_r = torch.autograd.grad(
        (C * x).sum() + tau[[0, 1, 3]].sum(), [y, r], retain_graph=True
    )
    assert (by_y[1:3] == 0).all()
    assert (by_r[1:3] == 0).all()
    good = gradients((y.detach()[[0, 3]], r.detach()[[0, 3]]), C[[0, 3]], torch.ones(2, dtype=D))
    close(by_y[[0, 3]], good[0], 1e-14)
    close(by_r[[0, 3]], good[1], 1e-14)


def test_a_nan_cotangent_stays_in_its_row():
    y, r = draw(3, 4).requires_grad_(), torch.tensor([1.0, -1.0, 5.0], dtype=D, requires_grad=True)
    v, w = draw(3, 4, seed=5), draw(3, seed=6)
    clean = torch.autograd.grad(sparsemax(y, r).outputs[:2], [y, r], (v, w))
    v[1:], w[1:] = torch.nan, torch.nan
    for g, e in zip(
        torch.autograd.grad(sparsemax(y, r).outputs[:2], [y, r], (v, w)), clean, strict=True
    ):
        assert g[1:].isnan().all()
        assert torch.equal(g[0], e[0])


def test_an_infinite_cotangent_outside_the_support_does_nothing():
    y = torch.tensor([[2.0, 1.5, 0.0]], dtype=D, requires_grad=True)
    x = sparsemax(y, torch.ones(1, dtype=D)).outputs[0]
    (g,) = torch.autograd.grad(x.sqrt().sum(), y)
    assert g.isfinite().all()


@pytest.mark.parametrize("sizes", [(0, 0), (0, 1), (1, 0)])
@pytest.mark.parametrize("n", [1, 3, 5000])
def test_an_empty_batch(sizes, n):
    y, r = draw(sizes[0], n).requires_grad_(), radius(sizes[1]).requires_grad_()
    x, tau = sparsemax(y, r).outputs
    assert x.shape == (0, n)
    assert tau.shape == (0,)
    for a, g in zip((y, r), torch.autograd.grad(x.sum() + tau.sum(), [y, r]), strict=True):
        assert g.shape == a.shape
        assert (g == 0).all()


def test_a_second_derivative_raises():
    y = draw(1, 3).requires_grad_()
    x = sparsemax(y, torch.ones(1, dtype=D)).outputs[0]
    (g,) = torch.autograd.grad((x * x).sum(), y, create_graph=True)
    with pytest.raises(RuntimeError, match="twice"):
        g.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_many_entries_within_rounding_of_the_threshold_keep_their_share(dtype):
    y = -torch.ones(2, 2000, dtype=dtype)
    y[:, 0] = 0
    y[0, 1:] += 6 * torch.finfo(dtype).eps
    leaf = y.clone().requires_grad_()
    answer = sparsemax(leaf, torch.ones(1, dtype=dtype))
    x = answer.outputs[0]
    assert answer.degenerate.all()
    exact, _ = reference(y, np.ones(2))
    assert np.abs(x.detach().numpy() - exact).max() <= 2 * torch.finfo(dtype).eps
    assert (x.double().sum(-1) - 1).abs().max() <= 2 * torch.finfo(dtype).eps
    assert (torch.autograd.grad((x * x).sum(), leaf)[0] == 0).all()


@pytest.mark.parametrize("n", [65, 71, 1003])
def test_the_largest_entry_outside_every_block(n):
    y = draw(40, n) - 1e4
    y[:, -1] = 0
    x = sparsemax(y, radius(1)).outputs[0]
    assert (x[:, :-1] == 0).all()
    assert (x[:, -1] == radius(1)).all()

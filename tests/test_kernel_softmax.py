"""Laws of the softmax kernel; the oracle is NumPy in extended precision."""

import numpy as np
import pytest
import torch
from kernels import close, differences

from convlayer.kernels.softmax import softmax
from convlayer.solution import Status

D = torch.float64


def draw(*shape, seed=0, positive=False):
    g = torch.Generator().manual_seed(seed)
    return (
        torch.rand(*shape, generator=g, dtype=D) + 0.5
        if positive
        else torch.randn(*shape, generator=g, dtype=D)
    )


def reference(theta, tau, r):
    theta, tau, r = (np.asarray(a, dtype=np.longdouble) for a in (theta, tau[:, None], r[:, None]))
    z = (theta - theta.max(-1, keepdims=True)) / tau
    y = r * np.exp(z) / np.exp(z).sum(-1, keepdims=True)
    nu = tau * (np.log(np.exp(z).sum(-1, keepdims=True)) - np.log(r) - 1) + theta.max(
        -1, keepdims=True
    )
    return y, nu[:, 0]


def loss(theta, tau, r, C, c):
    y, nu = softmax(theta, tau, r).outputs
    return (C * y).sum() + (c * nu).sum()


def gradients(args, C, c):
    leaves = [a.clone().requires_grad_() for a in args]
    return torch.autograd.grad(loss(*leaves, C, c), leaves)


@pytest.mark.parametrize(("b", "n"), [(4, 7), (1, 1), (3, 1), (1, 300)])
def test_value(b, n):
    theta, tau, r = draw(b, n), draw(b, seed=1, positive=True), draw(b, seed=2, positive=True)
    answer = softmax(theta, tau, r)
    for ours, theirs in zip(answer.outputs, reference(theta, tau, r), strict=True):
        assert np.allclose(ours.numpy(), theirs.astype(float), rtol=1e-13, atol=1e-13)
    assert answer.status is None
    assert answer.degenerate is None


@pytest.mark.parametrize("tau", [1e-8, 1e-3, 0.1, 1.0, 1e8])
@pytest.mark.parametrize("offset", [0.0, 1e8, -1e8])
def test_tiny_entries_have_relative_accuracy(tau, offset):
    theta = offset + torch.linspace(0, 680, 60, dtype=D)[None] * tau
    y = softmax(theta, torch.tensor([tau], dtype=D), torch.ones(1, dtype=D)).outputs[0].numpy()
    exact, _ = reference(theta.numpy(), np.array([tau]), np.ones(1))
    assert exact.min() < 1e-290 or abs(offset) > 0
    held = exact > 1e-300
    assert np.abs(y - exact)[held].max() <= 1e-10 * 1
    assert (np.abs(y / exact - 1)[held]).max() <= 1e-10


def test_the_multiplier_makes_the_solution_stationary():
    theta, tau, r = draw(5, 6), draw(5, seed=1, positive=True), draw(5, seed=2, positive=True)
    y, nu = softmax(theta, tau, r).outputs
    assert (theta - tau[:, None] * (1 + y.log()) - nu[:, None]).abs().max() < 1e-13
    assert (y.sum(-1) - r).abs().max() < 1e-14


@pytest.mark.parametrize(
    "sizes", [(3, 3, 3), (1, 3, 3), (3, 1, 1), (1, 1, 3), (1, 3, 1), (3, 1, 3), (1, 1, 1)]
)
def test_gradients_are_differences_and_a_shared_input_sums_over_rows(sizes):
    args = (
        draw(sizes[0], 5),
        draw(sizes[1], seed=1, positive=True),
        draw(sizes[2], seed=2, positive=True),
    )
    C, c = draw(max(sizes), 5, seed=3), draw(max(sizes), seed=4)
    for k, ours in enumerate(gradients(args, C, c)):
        close(ours, differences(lambda *a: loss(*a, C, c), args, k, 2e-3), 1e-8)


def test_gradients_near_a_vertex_have_relative_accuracy():
    gap, v = np.longdouble(40), np.array([3.0, -1.0, 2.0])
    theta = torch.tensor([[float(gap), 0.0, 1.0]], dtype=D, requires_grad=True)
    tau = torch.ones(1, dtype=D, requires_grad=True)
    y, _ = softmax(theta, tau, torch.ones(1, dtype=D)).outputs
    ours, by_tau = torch.autograd.grad((y * torch.tensor(v)).sum(), [theta, tau])
    e = np.exp(np.array([0, -gap, 1 - gap], dtype=np.longdouble))
    p = e / e.sum()
    exact = np.array([-(p[1] * (v[1] - v[0]) + p[2] * (v[2] - v[0])), *(p[1:] * (v[1:] - v[0]))])
    assert np.abs(ours.numpy()[0] / exact - 1).max() < 1e-10
    assert abs(by_tau.item() / -float(exact @ np.array([0, -gap, 1 - gap])) - 1) < 1e-10


def test_batch_equals_loop():
    args, C, c = (
        (draw(4, 6), draw(4, seed=1, positive=True), draw(4, seed=2, positive=True)),
        draw(4, 6, seed=3),
        draw(4),
    )
    whole = gradients(args, C, c)
    for i in range(4):
        row = gradients([a[i : i + 1] for a in args], C[i : i + 1], c[i : i + 1])
        for a, b in zip(whole, row, strict=True):
            close(a[i : i + 1], b, 1e-13)


def test_float32_agrees_with_float64():
    args, C, c = (
        (draw(4, 6), draw(4, seed=1, positive=True), draw(4, seed=2, positive=True)),
        draw(4, 6, seed=3),
        draw(4),
    )
    single = [a.float() for a in args]
    assert all(o.dtype == torch.float32 for o in softmax(*single).outputs)
    for a, b in zip(gradients(single, C.float(), c.float()), gradients(args, C, c), strict=True):
        assert a.dtype == torch.float32
        close(a.double(), b, 1e-5)


def test_a_radius_of_zero_has_the_softmax_as_derivative():
    theta, tau = draw(2, 4), torch.ones(2, dtype=D)
    r = torch.tensor([0.0, 2.0], dtype=D, requires_grad=True)
    answer = softmax(theta, tau, r)
    y, nu = answer.outputs
    assert answer.degenerate.tolist() == [True, False]
    assert answer.status.tolist() == [Status.SOLVED] * 2
    assert (y[0] == 0).all()
    assert nu[0] == torch.inf
    (by_r,) = torch.autograd.grad((y * theta).sum() + nu[1], r, retain_graph=True)
    p = torch.softmax(theta, -1)
    close(by_r, (p * theta).sum(-1) - torch.tensor([0.0, 0.5], dtype=D), 1e-14)
    assert torch.autograd.grad(nu.sum(), r)[0][0] == 0


@pytest.mark.parametrize("sizes", [(4, 4, 4), (1, 4, 4), (4, 4, 1)])
def test_bad_rows_are_zero_and_leave_the_others_untouched(sizes):
    theta, r = draw(sizes[0], 5), draw(sizes[2], seed=2, positive=True)
    tau = torch.tensor([0.7, 0.0, -1.0, 1.3], dtype=D)
    if sizes[2] == 4:
        r[3] = -1.0
    bad = torch.tensor([False, True, True, sizes[2] == 4])
    args = [a.requires_grad_() for a in (theta, tau, r)]
    answer = softmax(*args)
    y, nu = answer.outputs
    assert ((answer.status == Status.BAD_INPUT) == bad).all()
    assert (y[bad] == 0).all()
    assert (nu[bad] == 0).all()
    C = draw(4, 5, seed=3) * ~bad[:, None]
    grads = torch.autograd.grad((C * y).sum() + nu[~bad].sum(), args)
    good = [a.detach()[~bad] if len(a) == 4 else a.detach() for a in args]
    for g, e in zip(
        grads, gradients(good, C[~bad], torch.ones(int((~bad).sum()), dtype=D)), strict=True
    ):
        assert (g[bad] == 0).all() if len(g) == 4 else True
        close(g[~bad] if len(g) == 4 else g, e, 1e-13)


def test_a_nan_cotangent_stays_in_its_row():
    args = [
        a.requires_grad_() for a in (draw(3, 4), draw(3, positive=True), draw(3, positive=True))
    ]
    v, w = draw(3, 4, seed=5), draw(3, seed=6)
    clean = torch.autograd.grad(softmax(*args).outputs, args, (v, w))
    v[1], w[1] = torch.nan, torch.nan
    for g, e in zip(torch.autograd.grad(softmax(*args).outputs, args, (v, w)), clean, strict=True):
        assert g[1].isnan().all()
        assert torch.equal(g[[0, 2]], e[[0, 2]])


@pytest.mark.parametrize("scale", [1e-300, 1e-8, 1e8, 1e150, 1.7e308])
def test_nothing_overflows(scale):
    theta = scale * torch.tensor([[1.0, -1.0, 0.5], [1.0, 1.0, 1.0]], dtype=D)
    for tau in (5e-324, 1e-8, 1e8, 1e300):
        args = [
            a.requires_grad_()
            for a in (theta.clone(), torch.tensor([tau], dtype=D), torch.ones(1, dtype=D))
        ]
        y, nu = softmax(*args).outputs
        assert y.isfinite().all()
        assert nu.isfinite().all()
        assert ((y.sum(-1) - 1).abs() < 1e-14).all()
        if tau > 1e-300:
            assert all(not g.isnan().any() for g in torch.autograd.grad((y * y).sum(), args))


def test_only_the_multiplier():
    args = [
        a.requires_grad_() for a in (draw(2, 4), draw(2, positive=True), draw(2, positive=True))
    ]
    by_theta, _, by_r = torch.autograd.grad(softmax(*args).outputs[1].sum(), args)
    close(by_theta, torch.softmax(args[0] / args[1][:, None], -1).detach(), 1e-14)
    close(by_r, (-args[1] / args[2]).detach(), 1e-14)


@pytest.mark.parametrize("sizes", [(0, 0, 0), (0, 1, 1), (1, 0, 1), (1, 1, 0)])
def test_an_empty_batch(sizes):
    args = [
        a.requires_grad_()
        for a in (draw(sizes[0], 3), draw(sizes[1], positive=True), draw(sizes[2], positive=True))
    ]
    y, nu = softmax(*args).outputs
    assert y.shape == (0, 3)
    assert nu.shape == (0,)
    for a, g in zip(args, torch.autograd.grad(y.sum() + nu.sum(), args), strict=True):
        assert g.shape == a.shape
        assert (g == 0).all()


def test_a_second_derivative_raises():
    theta = draw(1, 3).requires_grad_()
    y = softmax(theta, torch.ones(1, dtype=D), torch.ones(1, dtype=D)).outputs[0]
    (g,) = torch.autograd.grad((y * y).sum(), theta, create_graph=True)
    with pytest.raises(RuntimeError, match="twice"):
        g.sum().backward()

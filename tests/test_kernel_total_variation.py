"""The kernel for total variation agrees with exact rational arithmetic, and its gradients with
differences."""

from collections import deque
from fractions import Fraction

import numpy as np
import pytest
import torch

from convlayer.kernels import total_variation as module
from convlayer.kernels.total_variation import total_variation
from convlayer.solution import Status

F64 = torch.float64


def rational(x, lam):
    """Johnson's dynamic program (2013) in exact rational arithmetic: the derivative of the value of
    the first k elements, as a function of u_k, is piecewise linear and is clipped to +-lam before
    the next element is added."""
    n, lam, x = len(x), Fraction(float(lam)), [Fraction(float(v)) for v in x]
    if n == 1 or lam == 0:
        return x
    low, high = [x[0] - lam], [x[0] + lam]
    kinks = deque([(low[0], Fraction(1), lam - x[0]), (high[0], Fraction(-1), x[0] + lam)])
    for v in x[1:-1]:
        a, b = Fraction(1), -v - lam
        while kinks and a * kinks[0][0] + b < -lam:
            _, da, db = kinks.popleft()
            a, b = a + da, b + db
        low.append((-lam - b) / a)
        kinks.appendleft((low[-1], a, b + lam))
        a, b = Fraction(1), -v + lam
        while kinks and a * kinks[-1][0] + b > lam:
            _, da, db = kinks.pop()
            a, b = a - da, b - db
        high.append((lam - b) / a)
        kinks.append((high[-1], -a, -b + lam))
    a, b = Fraction(1), -x[-1] - lam
    while kinks and a * kinks[0][0] + b < 0:
        _, da, db = kinks.popleft()
        a, b = a + da, b + db
    u = [-b / a]
    for l, h in zip(reversed(low), reversed(high)):
        u.append(min(max(u[-1], l), h))
    return u[::-1]


def signal(kind, n, rng):
    x = rng.standard_normal(n)
    return {
        "noise": x,
        "walk": x.cumsum(),
        "integers": rng.integers(-2, 3, n).astype(float),
        "plateaus": np.repeat(x, 5)[:n],
        "ramp": np.arange(n) * 1.0 + 0 * x,
        "saw": np.where(np.arange(n) % 2, 1.0, -1.0),
        "geometric": 2.0 ** np.clip(3 * (np.arange(n) - n // 2), -300, 300),
        "offset": x + 1e6,
        "tiny": 1e-8 * x,
        "large": 1e8 * x,
        "zeros": 0 * x,
        "scales": x * 10.0 ** rng.integers(-8, 9, n),
    }[kind]


KINDS = ["noise", "walk", "integers", "plateaus", "ramp", "saw"]
KINDS += ["geometric", "offset", "tiny", "large", "zeros", "scales"]


def solve(x, lam):
    x, lam = torch.as_tensor(x, dtype=F64), torch.as_tensor(lam, dtype=F64)
    return total_variation(x.reshape(-1, x.shape[-1]), lam.reshape(-1))


def error(u, exact, x):
    scale = max(float(np.abs(x).max()), 1e-300)
    return max(abs(Fraction(float(a)) - b) for a, b in zip(u, exact)) / Fraction(scale)


@pytest.mark.parametrize("kind", KINDS)
def test_the_solution_is_that_of_exact_arithmetic(kind):
    rng = np.random.default_rng(KINDS.index(kind))
    for n in (1, 2, 3, 5, 17, 70):
        x = signal(kind, n, rng)
        size = np.abs(x).mean()
        lams = [0.0, 0.5, 1.0] + [
            size * c for c in (1e-14, 1e-9, 1e-3, 0.1, 0.25, 0.5, 1.0, 3.7, 1e3, 1e12)
        ]
        answer = solve(np.tile(x, (len(lams), 1)), lams)
        assert (answer.status == Status.SOLVED).all()
        assert (answer.residual < 1e-13).all()
        for lam, u in zip(lams, answer.outputs[0]):
            assert error(u.tolist(), rational(x, lam), x) < 5e-15


def test_a_long_signal_loses_no_digits():
    rng = np.random.default_rng(3)
    n = 20_000
    # running sums of 1e7
    x = np.concatenate([1e3 + rng.standard_normal(n // 2), rng.standard_normal(n // 2)])
    for lam in (1e-6, 0.7, 40.0):
        u = solve(x, lam).outputs[0][0].numpy()
        ends = np.flatnonzero(np.diff(u)) + 1
        sign = np.concatenate([[0], np.sign(u[ends] - u[ends - 1]), [0]])
        bounds = np.concatenate([[0], ends, [n]])
        # the conditions of optimality, with the dual of each segment summed on its own in extended
        # precision
        for k in range(len(bounds) - 1):
            part = x[bounds[k] : bounds[k + 1]].astype(np.longdouble)
            mean = (part.sum() + lam * (sign[k + 1] - sign[k])) / len(part)
            assert abs(mean - u[bounds[k]]) < 1e-12  # 1e-15 of |x|
            dual = -lam * sign[k] + (part - mean).cumsum()
            assert np.abs(dual).max() <= lam * (1 + 1e-9)


def difference(f, h):
    """Five-point difference of f at 0."""
    return (8 * (f(h) - f(-h)) - (f(2 * h) - f(-2 * h))) / (12 * h)


def grads(x, lam, u_bar):
    x, lam = x.clone().requires_grad_(), lam.clone().requires_grad_()
    (u,) = total_variation(x, lam).outputs
    return torch.autograd.grad(u, (x, lam), u_bar.to(u.dtype))


@pytest.mark.parametrize("kind", ["noise", "walk", "large", "tiny"])
@pytest.mark.parametrize("ratio", [0.03, 0.6, 4.0])
def test_the_gradient_is_that_of_differences(kind, ratio):
    rng = np.random.default_rng(5)
    x = torch.tensor(np.stack([signal(kind, 30, rng) for _ in range(3)]))
    size = x.abs().mean()
    lam = ratio * size * torch.tensor([1.0, 1.3, 0.8], dtype=F64)
    assert not total_variation(x, lam).degenerate.any()
    v = torch.tensor(rng.standard_normal(x.shape))
    x_bar, lam_bar = grads(x, lam, v)
    for _ in range(3):
        dx, dlam = torch.tensor(rng.standard_normal(x.shape)), torch.tensor(rng.standard_normal(3))

        def along(t, dx=dx, dlam=dlam):
            return (v * total_variation(x + t * dx, lam + t * dlam).outputs[0]).sum(1)

        # u is piecewise linear: exact while no knot moves
        expected = difference(along, 1e-4 * size)
        found = (x_bar * dx).sum(1) + lam_bar * dlam
        assert (found - expected).abs().max() < 1e-8 * expected.abs().max()


def test_at_zero_the_map_is_the_identity_and_equal_neighbours_are_flagged():
    x = torch.tensor([[1.0, 1.0, 2.0, 5.0], [1.0, 3.0, 2.0, 5.0]], dtype=F64)
    lam = torch.zeros(2, dtype=F64)
    answer = total_variation(x, lam)
    assert torch.equal(answer.outputs[0], x)
    assert answer.degenerate.tolist() == [True, False]
    v = torch.tensor([[1.0, -2.0, 0.5, 3.0], [1.0, -2.0, 0.5, 3.0]], dtype=F64)
    x_bar, lam_bar = grads(x, lam, v)
    assert torch.equal(x_bar, v)
    h = 1e-3
    right = ((total_variation(x, lam + h).outputs[0] - x) * v).sum(1) / h
    torch.testing.assert_close(lam_bar, right, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("lam", [3.0, 1e300])
def test_beyond_the_last_knot_it_is_the_mean(lam):
    x = torch.tensor([[1.0, 2.0, 4.0, 1.0]], dtype=F64)
    answer = solve(x, lam)
    assert torch.equal(answer.outputs[0], torch.full((1, 4), 2.0, dtype=F64))
    assert not answer.degenerate.any()
    x_bar, lam_bar = grads(
        x, torch.tensor([lam], dtype=F64), torch.tensor([[1.0, 0, 0, 0]], dtype=F64)
    )
    assert torch.equal(x_bar, torch.full((1, 4), 0.25, dtype=F64))
    assert lam_bar.item() == 0


def test_one_element_is_left_alone():
    x = torch.tensor([[3.0], [0.1]], dtype=F64)
    answer = solve(x, [0.0, 2.0])
    assert torch.equal(answer.outputs[0], x)
    assert not answer.degenerate.any()


def test_ties_are_flagged_and_generic_rows_are_not():
    x = torch.tensor(
        [[1.0, -1.0, 1.0, -1.0], [0.0, 0.0, 1.0, 1.0], [0.3, 1.7, 0.2, 2.9], [2.0, 2.0, 2.0, 2.0]],
        dtype=F64,
    )
    #                 |z| reaches lam at 1, 3      flat at lam: the mean     generic              z = 0 < lam
    lam = torch.tensor([1.0, 1.0, 0.3, 0.5], dtype=F64)
    answer = total_variation(x, lam)
    assert answer.degenerate.tolist() == [True, True, False, False]
    torch.testing.assert_close(answer.outputs[0][1], torch.full((4,), 0.5, dtype=F64))


def test_the_derivative_at_a_tie_is_that_without_the_knot():
    x, lam = torch.tensor([[0.0, 0.0, 1.0, 1.0]], dtype=F64), torch.tensor([1.0], dtype=F64)
    x_bar, lam_bar = grads(x, lam, torch.tensor([[1.0, 0, 0, 0]], dtype=F64))
    assert torch.equal(x_bar, torch.full((1, 4), 0.25, dtype=F64))
    assert lam_bar.item() == 0


def test_the_middle_of_three_equal_heights_is_no_knot():
    # z = 0.5, 0.5, 0.5
    x, lam = (
        torch.tensor([[1.0, 0.0, 0.0, -1.0]], dtype=F64),
        torch.tensor([0.5], dtype=F64),
    )
    answer = total_variation(x, lam)
    assert torch.equal(answer.outputs[0], torch.tensor([[0.5, 0, 0, -0.5]], dtype=F64))
    assert answer.degenerate.all()
    x_bar, lam_bar = grads(x, lam, torch.tensor([[0, 1.0, 0, 0]], dtype=F64))
    assert torch.equal(x_bar, torch.tensor([[0, 0.5, 0.5, 0]], dtype=F64))
    assert lam_bar.item() == 0


def test_a_step_of_one_rounding_is_flagged():
    assert solve(
        [[1.0, 1.0 + 2.0**-52], [1.0, 1.0 + 2.0**-46]], [1e-18, 1e-18]
    ).degenerate.tolist() == [True, False]


def test_equal_values_of_two_segments_do_not_merge_them():
    """u takes the same value left and right of a spike; the segments stay apart in the
    derivative."""
    x, lam = torch.tensor([[0.0, 0.0, 5.0, 0.0, 0.0]], dtype=F64), torch.tensor([0.5], dtype=F64)
    x_bar, lam_bar = grads(x, lam, torch.tensor([[1.0, 0, 0, 0, 0]], dtype=F64))
    assert torch.equal(x_bar, torch.tensor([[0.5, 0.5, 0, 0, 0]], dtype=F64))
    assert lam_bar.item() == 0.5


def test_a_step_of_one_part_in_ten_billion_is_a_knot():
    x, lam = (
        torch.tensor([[1.0, 1.0, 1.0 + 1e-10, 1.0 + 1e-10]], dtype=F64),
        torch.tensor([1e-12], dtype=F64),
    )
    x_bar, _ = grads(x, lam, torch.tensor([[1.0, 0, 0, 0]], dtype=F64))
    assert torch.equal(x_bar, torch.tensor([[0.5, 0.5, 0, 0]], dtype=F64))


def test_a_batch_equals_a_loop_and_rows_of_other_scales_leave_no_trace():
    rng = np.random.default_rng(8)
    x = torch.tensor(np.stack([signal(kind, 90, rng) for kind in KINDS]))
    lam = x.abs().mean(1) * 0.4
    v = torch.tensor(rng.standard_normal(x.shape))
    whole, (x_bar, lam_bar) = total_variation(x, lam), grads(x, lam, v)
    for i in range(len(x)):
        alone, (dx, dlam) = (
            total_variation(x[i : i + 1], lam[i : i + 1]),
            grads(x[i : i + 1], lam[i : i + 1], v[i : i + 1]),
        )
        assert torch.equal(whole.outputs[0][i], alone.outputs[0][0])
        assert whole.degenerate[i] == alone.degenerate[0]
        assert torch.equal(x_bar[i], dx[0])
        assert torch.equal(lam_bar[i], dlam[0])


@pytest.mark.parametrize("shared", ["x", "lam", "both"])
def test_a_shared_input_has_the_sum_of_the_rows_gradients(shared):
    rng = np.random.default_rng(9)
    x, lam = torch.tensor(rng.standard_normal((4, 25))), torch.tensor(rng.uniform(0.1, 1, 4))
    x = x[:1] if shared != "lam" else x
    lam = lam[:1] if shared != "x" else lam
    rows = 1 if shared == "both" else 4
    v = torch.tensor(rng.standard_normal((rows, 25)))
    x_bar, lam_bar = grads(x, lam, v)
    full_x, full_lam = grads(x.expand(rows, 25), lam.expand(rows), v)
    assert x_bar.shape == x.shape
    assert lam_bar.shape == lam.shape
    torch.testing.assert_close(x_bar, full_x.sum_to_size(x.shape), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(lam_bar, full_lam.sum_to_size(lam.shape), rtol=1e-13, atol=1e-13)


def test_a_negative_weight_fails_alone():
    rng = np.random.default_rng(10)
    x, v = torch.tensor(rng.standard_normal((3, 12))), torch.tensor(rng.standard_normal((3, 12)))
    lam = torch.tensor([0.3, -0.1, 0.5], dtype=F64)
    answer, good = total_variation(x, lam), [0, 2]
    assert answer.status.tolist() == [Status.SOLVED, Status.BAD_INPUT, Status.SOLVED]
    assert not answer.outputs[0][1].any()
    assert torch.equal(answer.outputs[0][good], total_variation(x[good], lam[good]).outputs[0])
    x_bar, lam_bar = grads(x, lam, v)
    assert not x_bar[1].any()
    assert lam_bar[1] == 0
    x_ref, lam_ref = grads(x[good], lam[good], v[good])
    assert torch.equal(x_bar[good], x_ref)
    assert torch.equal(lam_bar[good], lam_ref)


def test_a_cotangent_of_nan_stays_in_its_row():
    rng = np.random.default_rng(11)
    x, v = torch.tensor(rng.standard_normal((3, 12))), torch.tensor(rng.standard_normal((3, 12)))
    v[1] = torch.nan
    for middle in (0.4, 0.0, -1.0):
        lam = torch.tensor([0.3, middle, 0.5], dtype=F64)
        x_bar, lam_bar = grads(x, lam, v)
        assert x_bar[1].isnan().all()
        assert lam_bar[1].isnan()
        assert x_bar[[0, 2]].isfinite().all()
        assert lam_bar[[0, 2]].isfinite().all()


@pytest.mark.parametrize("size", [1e-310, 1e-300, 1e-8, 1e8, 1e300, 1.7e308])
def test_the_solution_scales_with_the_data(size):
    rng = np.random.default_rng(12)
    x, lam = torch.tensor(rng.uniform(-1, 1, (2, 50))), torch.tensor([0.3, 1.0], dtype=F64)
    u = total_variation(x, lam).outputs[0]
    scaled = total_variation(x * size, lam * size)
    tolerance = 1e-13 if size > 1e-305 else 1e-10  # subnormal numbers hold fewer digits
    assert ((scaled.outputs[0] / size - u).abs() < tolerance).all()
    assert scaled.residual.isfinite().all()


def test_float32_agrees_with_float64_to_its_precision():
    rng = np.random.default_rng(13)
    x, lam, v = (
        rng.standard_normal((3, 40)),
        np.array([0.2, 0.7, 2.0]),
        rng.standard_normal((3, 40)),
    )
    x, lam, v = (torch.tensor(a, dtype=torch.float32) for a in (x, lam, v))
    u, exact = (
        total_variation(x, lam).outputs[0],
        total_variation(x.double(), lam.double()).outputs[0],
    )
    assert u.dtype == torch.float32
    torch.testing.assert_close(u.double(), exact, rtol=1e-6, atol=1e-6)
    for a, b in zip(grads(x, lam, v), grads(x.double(), lam.double(), v.double())):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a.double(), b, rtol=1e-6, atol=1e-6)


def test_no_rows():
    x, lam = (
        torch.zeros(0, 7, dtype=F64, requires_grad=True),
        torch.zeros(0, dtype=F64, requires_grad=True),
    )
    answer = total_variation(x, lam)
    assert answer.outputs[0].shape == (0, 7)
    assert (
        answer.status.shape
        == answer.iterations.shape
        == answer.residual.shape
        == answer.degenerate.shape
        == (0,)
    )
    answer.outputs[0].sum().backward()
    assert x.grad.shape == (0, 7)


def test_only_what_is_asked_for_is_differentiated():
    x, lam = (
        torch.randn(2, 9, dtype=F64, generator=torch.Generator().manual_seed(0)),
        torch.tensor([0.2], dtype=F64),
    )
    assert not total_variation(x, lam).outputs[0].requires_grad
    total_variation(x.requires_grad_(), lam).outputs[0].sum().backward()
    assert lam.grad is None
    torch.testing.assert_close(x.grad, torch.ones_like(x), rtol=1e-13, atol=0)


def test_a_second_derivative_is_refused():
    x = torch.tensor([[1.0, 3.0, 2.0]], dtype=F64, requires_grad=True)
    (g,) = torch.autograd.grad(
        total_variation(x, torch.tensor([0.1], dtype=F64)).outputs[0].square().sum(),
        x,
        create_graph=True,
    )
    with pytest.raises(RuntimeError, match="twice"):
        g.sum().backward()


def test_windows_of_all_lengths_place_true_knots_only():
    """Long enough for the windows of 16 and 256; the dual conditions hold whatever the share of
    knots."""
    rng = np.random.default_rng(14)
    x = torch.tensor(
        np.stack([signal(k, 1200, rng) for k in ("noise", "walk", "integers", "plateaus", "saw")])
    )
    for lam in (1e-3, 0.2, 1.0, 30.0, 1e4):
        answer = total_variation(x, torch.full((5,), lam, dtype=F64))
        u = answer.outputs[0].numpy().astype(np.longdouble)
        dual, step = (x.numpy() - u).cumsum(1), np.diff(u, axis=1)
        tolerance = 1e-13 * (lam + np.abs(x.numpy()).sum(1, keepdims=True))
        assert (np.abs(dual) <= lam + tolerance).all()
        gap = lam * np.abs(step) + dual[:, :-1] * step  # zero where z = -lam sign(step)
        assert (gap <= tolerance * np.abs(step) + 1e-18).all()


def test_false_knots_are_removed_or_reported(monkeypatch):
    def everywhere(x, lam, knot, anchor):
        knot[:, 1:-1] = True
        anchor[:, 1:-1] = lam

    rng = np.random.default_rng(15)
    x, lam = torch.tensor(rng.standard_normal((3, 60))), torch.tensor([0.2, 0.7, 3.0], dtype=F64)
    u = total_variation(x, lam).outputs[0]
    monkeypatch.setattr(module, "_certain_knots", everywhere)
    answer = total_variation(x, lam)
    assert (answer.status == Status.SOLVED).all()
    torch.testing.assert_close(answer.outputs[0], u, rtol=1e-13, atol=1e-13)
    monkeypatch.setattr(module, "REPAIRS", 0)
    answer = total_variation(x, lam)
    assert (answer.status == Status.INACCURATE).all()
    assert (answer.residual > 1e-3).all()

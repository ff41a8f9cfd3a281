"""Laws of least squares: NumPy's pseudo-inverse for the value, five-point differences of the kernel
itself for gradients."""

import numpy as np
import pytest
import torch

import convlayer.kernels.least_squares as module
from convlayer.kernels.least_squares import least_squares
from convlayer.solution import Status

NAMES = "A", "b", "w", "ridge"


def draw(m, n, k=1, batch=(3, 3, 3, 3), seed=0, weights=True, ridge=True):
    rng = np.random.default_rng(seed)
    parts = [
        rng.standard_normal((batch[0], m, n)),
        rng.standard_normal((batch[1], m, k)),
        rng.uniform(0.5, 2.0, (batch[2], m)) if weights else None,
        rng.uniform(0.5, 2.0, (batch[3], n)) if ridge else None,
    ]
    parts[0] += 3.0 * np.eye(m, n) * (m == n)  # a random square matrix would be ill-conditioned
    return [None if part is None else torch.from_numpy(part) for part in parts]


def stacked(A, b, w, ridge, i):
    """S and c of row i, with x = S^+ c."""
    A, b, w, ridge = (
        None if t is None else t[i if len(t) > 1 else 0].detach().double().numpy()
        for t in (A, b, w, ridge)
    )
    root = np.ones(len(A)) if w is None else np.sqrt(w)
    bottom = np.zeros((0, A.shape[1])) if ridge is None else np.diag(np.sqrt(ridge))
    return np.vstack([root[:, None] * A, bottom]), np.vstack(
        [root[:, None] * b, np.zeros((len(bottom), b.shape[1]))]
    )


def oracle(data, rcond=1e-12):
    """Minimum-norm solutions by NumPy's SVD, columns equilibrated, the null space taken out in x's
    own units."""
    batch = max(len(t) for t in data if t is not None)
    rows = []
    for i in range(batch):
        S, c = stacked(*data, i)
        size = np.linalg.norm(S, axis=0)
        size[size == 0] = 1.0
        _, values, Vt = np.linalg.svd(
            np.vstack([S / size, np.zeros((S.shape[1], S.shape[1]))]), full_matrices=False
        )
        null = np.linalg.qr((Vt[values <= rcond * values[0]] / size).T)[0]
        x = np.linalg.lstsq(S / size, c, rcond=rcond)[0] / size[:, None]
        rows.append(x - null @ (null.T @ x))
    return np.array(rows)


def close(ours, theirs, tolerance):
    ours, theirs = np.asarray(ours.detach() if torch.is_tensor(ours) else ours), np.asarray(theirs)
    assert ours.shape == theirs.shape
    assert np.isfinite(ours).all()
    assert np.abs(ours - theirs).max(initial=0.0) <= tolerance * max(
        np.abs(theirs).max(initial=0.0), 1e-300
    )


def gradients(data, x_bar, solve=least_squares):
    leaves = [None if t is None else t.clone().requires_grad_() for t in data]
    answer = solve(*leaves)
    given = [t for t in leaves if t is not None]
    found = iter(torch.autograd.grad(answer.outputs[0], given, x_bar))
    return answer, [None if t is None else next(found) for t in leaves]


def seeded_like(x, seed=1):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(x.shape))


def agrees_with_differences(data, moves=None, tolerance=1e-8, step=1e-3):
    """Each gradient along random directions, scaled like the data, in units of its own size (or
    x's, where it vanishes)."""
    x_bar = seeded_like(least_squares(*data).outputs[0])
    answer, found = gradients(data, x_bar)
    unit = float((answer.outputs[0] * x_bar).abs().sum())
    for j in range(4):
        if data[j] is None or (moves is not None and j not in moves):
            continue
        for seed in range(3):
            direction = seeded_like(data[j], 10 + seed) * data[j].abs()

            def at(t, j=j, direction=direction):
                moved = list(data)
                moved[j] = data[j] + t * direction
                return float((least_squares(*moved).outputs[0] * x_bar).sum())

            slope = (8 * (at(step) - at(-step)) - (at(2 * step) - at(-2 * step))) / (12 * step)
            size = max(float((found[j] * direction).abs().sum()), 1e-2 * unit)
            assert abs(float((found[j] * direction).sum()) - slope) <= tolerance * size, NAMES[j]


SHAPES = [
    (7, 4, 1),
    (7, 4, 3),
    (5, 5, 1),
    (4, 7, 1),
    (4, 7, 2),
    (1, 1, 1),
    (6, 1, 2),
    (1, 6, 2),
    (30, 20, 1),
]


@pytest.mark.parametrize("given", [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_solution_and_gradients(m, n, k, given):
    data = draw(m, n, k, weights=given[0], ridge=given[1])
    answer = least_squares(*data)
    close(answer.outputs[0], oracle(data), 1e-10)
    assert (answer.status == Status.SOLVED).all()
    assert (answer.residual < 1e-13).all()
    assert (answer.degenerate == (m < n and not given[1])).all()
    agrees_with_differences(data)


@pytest.mark.parametrize(
    "shared", [(i, j, p, q) for i in (1, 3) for j in (1, 3) for p in (1, 3) for q in (1, 3)]
)
@pytest.mark.parametrize("shape", [(6, 4, 2), (4, 6, 2)])
@pytest.mark.parametrize("ridge", [True, False])
def test_the_gradient_of_what_is_shared_is_the_sum_over_rows(shape, shared, ridge):
    data = draw(*shape, batch=shared, ridge=ridge)
    batch = max(len(t) for t in data if t is not None)
    whole = [None if t is None else t.expand(batch, *t.shape[1:]).contiguous() for t in data]
    x_bar = seeded_like(torch.empty(batch, shape[1], shape[2]))
    answer, found = gradients(data, x_bar)
    apart, each = gradients(whole, x_bar)
    close(answer.outputs[0], apart.outputs[0].detach(), 1e-13)
    for t, bar, rows in zip(data, found, each, strict=True):
        if t is not None:
            summed = rows.sum(0, keepdim=True) if len(t) == 1 else rows
            assert float((bar - summed).abs().max()) <= 1e-12 * max(float(rows.abs().max()), 1e-3)


@pytest.mark.parametrize("shape", [(6, 4, 2), (4, 6, 2)])
def test_a_batch_equals_a_loop(shape):
    data = draw(*shape, batch=(4, 4, 4, 4), ridge=shape[0] > shape[1])
    data[0][1, :, 2] = data[0][1, :, 0]  # ties, zeros and bad scales among regular rows
    data[0][2] *= 1e-8
    data[2][3, :] = 0.0
    x_bar = seeded_like(torch.empty(4, shape[1], shape[2]))
    answer, found = gradients(data, x_bar)
    for i in range(4):
        row, bars = gradients([None if t is None else t[i : i + 1] for t in data], x_bar[i : i + 1])
        close(answer.outputs[0][i : i + 1], row.outputs[0].detach(), 1e-12)
        assert answer.degenerate[i] == row.degenerate[0]
        for bar, bar_row in zip(found, bars, strict=True):
            if bar is not None:
                assert float((bar[i : i + 1] - bar_row).abs().max()) <= 1e-11 * max(
                    float(bar_row.abs().max()), 1e-12
                )


@pytest.mark.parametrize("shape", [(9, 4, 2), (4, 9, 1)])
def test_float32_agrees_with_float64_to_its_precision(shape):
    data = [None if t is None else t.float() for t in draw(*shape, ridge=shape[0] > shape[1])]
    double = [None if t is None else t.double() for t in data]
    x_bar = seeded_like(torch.empty(3, shape[1], shape[2])).float()
    answer, found = gradients(data, x_bar)
    exact, bars = gradients(double, x_bar.double())
    assert answer.outputs[0].dtype == torch.float32
    close(answer.outputs[0].double(), exact.outputs[0].detach(), 1e-6)
    for bar, bar_double in zip(found, bars, strict=True):
        if bar is not None:
            assert bar.dtype == torch.float32
            assert float((bar.double() - bar_double).abs().max()) <= 1e-6 * max(
                float(bar_double.abs().max()), 1.0
            )


@pytest.mark.parametrize("condition", [1e2, 1e4, 1e5, 1e6, 1e8])
def test_ill_conditioned_rows_are_as_accurate_as_a_backward_stable_method(condition):
    rng, m, n = np.random.default_rng(3), 12, 6
    U, V = (
        np.linalg.qr(rng.standard_normal((m, n)))[0],
        np.linalg.qr(rng.standard_normal((n, n)))[0],
    )
    A = U * np.logspace(0, -np.log10(condition), n) @ V.T
    x = rng.standard_normal((n, 1))
    b = A @ x
    r = rng.standard_normal((m, 1))
    b = b + 1e-2 * (r - U @ (U.T @ r)) / condition
    data = [torch.from_numpy(A[None]), torch.from_numpy(b[None]), None, None]
    eps, x_bar = np.finfo(float).eps, rng.standard_normal((n, 1))
    answer, (A_bar, b_bar, _, _) = gradients(data, torch.from_numpy(x_bar[None]))
    close(answer.outputs[0][0], x, 50 * eps * condition)
    assert answer.residual[0] < 1e-13
    assert not answer.degenerate[0]
    pinv = V * np.logspace(0, np.log10(condition), n) @ U.T
    close(b_bar[0], pinv.T @ x_bar, 100 * eps * condition)
    z, r = pinv @ (pinv.T @ x_bar), b - A @ x
    close(A_bar[0], r @ z.T - (pinv.T @ x_bar) @ x.T, 300 * eps * condition)


@pytest.mark.parametrize("scale", [1e-8, 1e8])
@pytest.mark.parametrize("shape", [(8, 5, 1), (5, 8, 1)])
def test_units_of_the_matrix_do_not_matter(shape, scale):
    A, b, _, _ = draw(*shape, weights=False, ridge=False)
    x_bar = seeded_like(torch.empty(3, shape[1], 1))
    one, bars = gradients([A, b, None, None], x_bar)
    other, bars_other = gradients([scale * A, b, None, None], x_bar * scale)
    close(scale * other.outputs[0], one.outputs[0].detach(), 1e-12)
    close(scale * bars_other[0], bars[0], 1e-11)
    close(bars_other[1], bars[1], 1e-11)
    assert (other.residual < 1e-13).all()


def test_columns_of_all_scales():
    A, _, _, _ = draw(10, 6, weights=False, ridge=False)
    scales = torch.logspace(-6, 6, 6, dtype=torch.float64)
    x = seeded_like(torch.empty(3, 6, 1)) / scales[:, None]
    x_bar = seeded_like(x) * scales[:, None]
    data = [A * scales, A * scales @ x, None, None]
    answer, (_, b_bar, _, _) = gradients(data, x_bar)
    close(answer.outputs[0] * scales[:, None], x * scales[:, None], 1e-12)
    _, (_, plain, _, _) = gradients([A, data[1], None, None], x_bar / scales[:, None])
    close(b_bar, plain, 1e-12)
    agrees_with_differences(data)


def test_weights_of_all_scales():
    data = draw(10, 4, 2, ridge=False)
    data[2] = torch.logspace(-8, 8, 10, dtype=torch.float64).expand(3, -1).contiguous()
    exact = []
    for i in range(
        3
        # exact normal equations in rational arithmetic would take long: rows sorted for a row-wise
        # stable QR
    ):
        S, c = stacked(*data, i)
        order = np.argsort(-np.abs(S).max(1))
        Q, R = np.linalg.qr(S[order])
        exact.append(np.linalg.solve(R, Q.T @ c[order]))
    close(least_squares(*data).outputs[0], np.array(exact), 1e-10)
    agrees_with_differences(data)


@pytest.mark.parametrize("ridge", [1e-12, 1e-6, 1e12])
@pytest.mark.parametrize("shape", [(8, 5, 1), (5, 8, 1)])
def test_a_tiny_or_huge_ridge(shape, ridge):
    data = draw(*shape, weights=False)
    data[3] = torch.full_like(data[3], ridge)
    A, b = data[0].numpy(), data[1].numpy()
    U, s, Vt = np.linalg.svd(A, full_matrices=False)
    exact = Vt.swapaxes(1, 2) @ ((s / (s**2 + ridge))[..., None] * (U.swapaxes(1, 2) @ b))
    answer = least_squares(*data)
    close(answer.outputs[0], exact, 1e-10)
    assert not answer.degenerate.any()
    x_bar = seeded_like(torch.empty(3, shape[1], 1))
    _, (A_bar, b_bar, _, ridge_bar) = gradients(data, x_bar)
    z = solve_shifted(data[0], ridge, x_bar)
    x = torch.from_numpy(exact)
    coefficients = U.swapaxes(1, 2) @ b
    outside = (b - U @ coefficients) * (shape[0] > shape[1])
    r = torch.from_numpy(outside + U @ ((ridge / (s**2 + ridge))[..., None] * coefficients))
    Az = torch.from_numpy(U * (s / (s**2 + ridge))[:, None]) @ torch.from_numpy(Vt) @ x_bar
    close(b_bar, Az, 1e-10)
    close(ridge_bar, -(z * x).sum(2), 1e-10)
    close(A_bar, r @ z.mT - Az @ x.mT, 1e-10)


def solve_shifted(A, ridge, v):
    """(A'A + ridge)^-1 v by the eigenvectors that A has, and the rest."""
    _, s, Vt = torch.linalg.svd(A, full_matrices=True)
    values = torch.zeros(A.shape[0], A.shape[2], dtype=A.dtype)
    values[:, : s.shape[1]] = s**2
    return Vt.mT @ ((Vt @ v) / (values + ridge).unsqueeze(2))


def deficient(kind):
    A, b, w, _ = draw(9, 5, 2, ridge=False)
    if kind == "duplicate column":
        A[:, :, 3] = A[:, :, 1]
    elif kind == "dependent column":
        A[:, :, 4] = A[:, :, 0] - 2 * A[:, :, 1]
    elif kind == "zero column":
        A[:, :, 2] = 0.0
    elif kind == "zero matrix":
        A = torch.zeros_like(A)
    elif kind == "rank one":
        A = A[:, :, :1] * A[:, :1, :]
    elif kind == "zero weights":
        w[:, 3:] = 0.0
    elif kind == "duplicate row, wide":
        A, b = A.mT.contiguous(), b[:, :5]
        A[:, 4] = A[:, 0]
        w = w[:, :5]
    elif kind == "zero weight, wide":
        A, b, w = A.mT.contiguous(), b[:, :5], w[:, :5].clone()
        w[:, 1] = 0.0
    elif kind == "no rows":
        A, b, w = A[:, :0], b[:, :0], w[:, :0]
    elif kind == "scales and duplicate columns":
        A[:, :, 3] = A[:, :, 1]
        A = A * torch.logspace(-3, 3, 5, dtype=torch.float64)
    return [A, b, w, None]


KINDS = [
    "duplicate column",
    "dependent column",
    "zero column",
    "zero matrix",
    "rank one",
    "zero weights",
    "duplicate row, wide",
    "zero weight, wide",
    "no rows",
    "scales and duplicate columns",
]


@pytest.mark.parametrize("kind", KINDS)
def test_rank_deficient_rows_take_the_minimum_norm_solution_and_are_flagged(kind):
    data = deficient(kind)
    answer = least_squares(*data)
    close(answer.outputs[0], oracle(data), 1e-9 if "scales" in kind else 1e-10)
    assert answer.degenerate.all()
    assert (answer.status == Status.SOLVED).all()
    _, bars = gradients(data, seeded_like(answer.outputs[0]))
    assert all(torch.isfinite(bar).all() for bar in bars if bar is not None)
    moves = [1] if kind in ("dependent column", "zero matrix", "rank one", "no rows") else [1, 2]
    agrees_with_differences(data, moves=moves)


@pytest.mark.parametrize("shape", [(8, 5), (5, 8), (6, 6)])
def test_the_gradient_at_constant_rank(shape):
    """A = F G' of rank 3, moved through F and G."""
    rng = np.random.default_rng(5)
    F, G = (torch.from_numpy(rng.standard_normal((2, size, 3))) for size in shape)
    b, w = (
        torch.from_numpy(rng.standard_normal((2, shape[0], 2))),
        torch.from_numpy(rng.uniform(0.5, 2, (2, shape[0]))),
    )
    x_bar = torch.from_numpy(rng.standard_normal((2, shape[1], 2)))
    leaves = [t.clone().requires_grad_() for t in (F, G, w)]
    found = torch.autograd.grad(
        least_squares(leaves[0] @ leaves[1].mT, b, leaves[2], None).outputs[0], leaves, x_bar
    )
    for j, bar in enumerate(found):
        direction, step = torch.from_numpy(rng.standard_normal(bar.shape)), 1e-3

        def at(t, j=j, direction=direction):
            moved = [F, G, w]
            moved[j] = moved[j] + t * direction
            return float(
                (least_squares(moved[0] @ moved[1].mT, b, moved[2], None).outputs[0] * x_bar).sum()
            )

        slope = (8 * (at(step) - at(-step)) - (at(2 * step) - at(-2 * step))) / (12 * step)
        assert abs(float((bar * direction).sum()) - slope) <= 1e-8 * float(
            (bar * direction).abs().sum()
        )


def test_negative_weights_and_ridges_are_bad_input_for_their_row_alone():
    data = draw(6, 4, batch=(4, 4, 4, 4))
    clean, bars_clean = gradients(data, seeded_like(torch.empty(4, 4, 1)))
    data[2][1, 2], data[3][2, 0] = -1.0, -1e-3
    answer, bars = gradients(data, seeded_like(torch.empty(4, 4, 1)))
    assert answer.status.tolist() == [
        Status.SOLVED,
        Status.BAD_INPUT,
        Status.BAD_INPUT,
        Status.SOLVED,
    ]
    assert (answer.outputs[0][1:3] == 0).all()
    keep = [0, 3]
    close(answer.outputs[0][keep], clean.outputs[0][keep].detach(), 1e-13)
    for bar, bar_clean in zip(bars, bars_clean, strict=True):
        close(bar[keep], bar_clean[keep], 1e-12)
        assert (bar[1:3] == 0).all()


@pytest.mark.parametrize("shape", [(6, 4), (4, 6)])
def test_a_cotangent_of_nan_stays_in_its_row(shape):
    data = draw(*shape, ridge=False)
    data[0][2, :, 1] = data[0][2, :, 0]
    x_bar = seeded_like(torch.empty(3, shape[1], 1))
    _, clean = gradients(data, x_bar)
    x_bar[1] = torch.nan
    _, bars = gradients(data, x_bar)
    for bar, bar_clean in zip(bars, clean, strict=True):
        if bar is not None:
            assert bar[1].isnan().all()
            assert torch.equal(bar[[0, 2]], bar_clean[[0, 2]])


@pytest.mark.parametrize("shape", [(6, 4, 2), (4, 6, 2)])
@pytest.mark.parametrize("batch", [(0, 0, 0, 0), (1, 0, 1, 1), (0, 1, 0, 1), (1, 0, 0, 1)])
def test_an_empty_batch(shape, batch):
    data = draw(*shape, batch=batch)
    answer, bars = gradients(data, torch.zeros(0, shape[1], shape[2], dtype=torch.float64))
    assert answer.outputs[0].shape == (0, shape[1], shape[2])
    assert answer.status.shape == answer.residual.shape == answer.degenerate.shape == (0,)
    assert all(bar.shape == t.shape and (bar == 0).all() for bar, t in zip(bars, data, strict=True))


@pytest.mark.parametrize("size", [1e-150, 1e150])
def test_numbers_whose_squares_overflow_or_vanish(size):
    A, b, _, _ = draw(6, 3, weights=False, ridge=False)
    for other in (1.0, size):
        answer, bars = gradients(
            [A * size, b * other, None, None], seeded_like(torch.empty(3, 3, 1))
        )
        close(answer.outputs[0] * size / other, least_squares(A, b).outputs[0], 1e-12)
        assert torch.isfinite(bars[1]).all()


def test_a_large_gram_matrix_is_made_in_blocks(monkeypatch):
    data = draw(12, 11)
    whole = least_squares(*data).outputs[0]
    monkeypatch.setattr(module, "GRAM_BLOCK", 4)
    close(least_squares(*data).outputs[0], whole, 1e-13)


def test_a_second_derivative_raises():
    data = draw(5, 3)
    A = data[0].requires_grad_()
    x_bar = torch.ones(3, 3, 1, dtype=torch.float64, requires_grad=True)
    (bar,) = torch.autograd.grad(
        least_squares(A, *data[1:]).outputs[0], A, x_bar, create_graph=True
    )
    with pytest.raises(RuntimeError, match="twice"):
        bar.sum().backward()


def test_each_gradient_alone_is_what_it_is_with_the_others():
    for shape in [(6, 4), (4, 6)]:
        data = draw(*shape, ridge=shape == (6, 4))
        x_bar = seeded_like(torch.empty(3, shape[1], 1))
        _, together = gradients(data, x_bar)
        for j, t in enumerate(data):
            if t is not None:
                leaves = [
                    u if u is None else u.clone().requires_grad_(i == j) for i, u in enumerate(data)
                ]
                assert torch.equal(
                    torch.autograd.grad(least_squares(*leaves).outputs[0], leaves[j], x_bar)[0],
                    together[j],
                )

"""Laws of the equality-constrained quadratic program: dense KKT solves for the value, five-point
differences for gradients."""

import numpy as np
import pytest
import torch

from convlayer.kernels.equality_constrained_qp import equality_constrained_qp
from convlayer.solution import Status

NAMES = "P", "q", "A", "b"


def draw(n, p, batch=(3, 3, 3, 3), seed=0, kind="definite"):
    """An asymmetric P, definite or only so on the null space of A."""
    rng = np.random.default_rng(seed)
    F, A = rng.standard_normal((batch[0], n, n)), rng.standard_normal((batch[2], p, n))
    A += 3.0 * np.eye(p, n) * (p == n)  # a random square matrix would be ill-conditioned
    P = F @ F.swapaxes(1, 2) / n + np.eye(n)
    if kind != "definite":
        V = np.linalg.svd(A, full_matrices=True)[2].swapaxes(1, 2)
        curvature = np.where(
            np.arange(n) < p, {"on the null space": 0.0, "elsewhere negative": -0.5}[kind], 1.0
        )
        P = V * curvature @ V.swapaxes(1, 2)
    skew = rng.standard_normal((n, n))
    parts = (
        P + skew - skew.T,
        rng.standard_normal((batch[1], n)),
        A,
        rng.standard_normal((batch[3], p)),
    )
    return [torch.from_numpy(np.ascontiguousarray(part)) for part in parts]


def kkt(data, i):
    P, q, A, b = (t[i if len(t) > 1 else 0].detach().double().numpy() for t in data)
    K = np.block([[(P + P.T) / 2, A.T], [A, np.zeros((len(b), len(b)))]])
    return K, np.concatenate([-q, b])


def oracle(data, rcond=None):
    """(x, nu) of every row: the KKT system solved by LU and refined in extended precision, or by
    its pseudo-inverse."""
    rows = []
    for i in range(max(len(t) for t in data)):
        K, h = kkt(data, i)
        inverse = (
            np.linalg.inv(K) if rcond is None else np.linalg.pinv(K, rcond=rcond, hermitian=True)
        )
        z = inverse @ h
        for _ in range(3):
            z = z + inverse @ (h.astype(np.longdouble) - K.astype(np.longdouble) @ z).astype(float)
        rows.append(z)
    n = data[1].shape[1]
    return np.array(rows)[:, :n], np.array(rows)[:, n:]


def close(ours, theirs, tolerance, unit=0.0):
    ours, theirs = (
        np.asarray(t.detach()) if torch.is_tensor(t) else np.asarray(t) for t in (ours, theirs)
    )
    assert ours.shape == theirs.shape
    assert np.isfinite(ours).all()
    assert np.abs(ours - theirs).max(initial=0.0) <= tolerance * max(
        np.abs(theirs).max(initial=0.0), unit, 1e-300
    )


def cotangents(batch, n, p, seed=1):
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.standard_normal((batch, n))), torch.from_numpy(
        rng.standard_normal((batch, p))
    )


def gradients(data, bars):
    leaves = [t.clone().requires_grad_() for t in data]
    answer = equality_constrained_qp(*leaves)
    return answer, torch.autograd.grad(answer.outputs, leaves, bars)


def slope_of(function, step=1e-3):
    return (8 * (function(step) - function(-step)) - (function(2 * step) - function(-2 * step))) / (
        12 * step
    )


def agrees_with_differences(data, moves=range(4), tolerance=1e-8):
    """Each gradient along random directions, in units of its own size (or of the outputs, where it
    vanishes)."""
    batch, n, p = max(len(t) for t in data), data[1].shape[1], data[3].shape[1]
    bars = cotangents(batch, n, p)
    answer, found = gradients(data, bars)
    unit = sum(
        float((out * bar).abs().sum()) for out, bar in zip(answer.outputs, bars, strict=True)
    )
    for j in moves:
        for seed in range(2):
            direction = (
                torch.from_numpy(np.random.default_rng(10 + seed).standard_normal(data[j].shape))
                * 0.3
            )

            def at(t, j=j, direction=direction):
                outputs = equality_constrained_qp(
                    *[d + t * direction if i == j else d for i, d in enumerate(data)]
                ).outputs
                return sum(float((out * bar).sum()) for out, bar in zip(outputs, bars, strict=True))

            size = max(float((found[j] * direction).abs().sum()), 1e-2 * unit)
            assert abs(float((found[j] * direction).sum()) - slope_of(at)) <= tolerance * size, (
                NAMES[j]
            )
    close(found[0], found[0].mT, 1e-15)


SHAPES = [(6, 2), (6, 0), (1, 0), (1, 1), (4, 4), (7, 6), (20, 8)]


@pytest.mark.parametrize("kind", ["definite", "on the null space", "elsewhere negative"])
@pytest.mark.parametrize(("n", "p"), SHAPES)
def test_solution_and_gradients(n, p, kind):
    data = draw(n, p, kind=kind, seed=3)
    answer = equality_constrained_qp(*data)
    for ours, theirs in zip(answer.outputs, oracle(data), strict=True):
        close(ours, theirs, 1e-10)
    assert (answer.status == Status.SOLVED).all()
    assert (answer.residual < 1e-13).all()
    assert not answer.degenerate.any()
    agrees_with_differences(data)


@pytest.mark.parametrize(
    "shared", [(i, j, k, m) for i in (1, 3) for j in (1, 3) for k in (1, 3) for m in (1, 3)]
)
@pytest.mark.parametrize("kind", ["definite", "singular"])
def test_the_gradient_of_what_is_shared_is_the_sum_over_rows(shared, kind):
    data = draw(5, 2, batch=shared)
    if kind == "singular":  # P of rank one and a repeated constraint
        data[0] = torch.ones_like(data[0])
        data[1] = data[1].mean(1, keepdim=True).expand(-1, 5).contiguous()
        data[2], data[3] = (
            data[2][:, :1].expand(-1, 2, -1).contiguous(),
            data[3][:, :1].expand(-1, 2).contiguous(),
        )
    batch = max(shared)
    whole = [t.expand(batch, *t.shape[1:]).contiguous() for t in data]
    bars = cotangents(batch, 5, 2)
    answer, found = gradients(data, bars)
    apart, each = gradients(whole, bars)
    for ours, theirs in zip(answer.outputs, apart.outputs, strict=True):
        close(ours, theirs, 1e-12, unit=1.0)
    assert torch.equal(answer.status, apart.status)
    assert torch.equal(answer.degenerate, apart.degenerate)
    assert answer.degenerate.all() == (kind == "singular")
    for t, bar, rows in zip(data, found, each, strict=True):
        close(bar, rows.sum(0, keepdim=True) if len(t) == 1 else rows, 1e-11, unit=1e-3)


def mixed():
    """Eight rows: definite, by the null space, redundant, singular, inconsistent, unbounded twice,
    badly scaled."""
    data = draw(5, 3, batch=(8, 8, 8, 8))
    other = draw(5, 3, batch=(8, 8, 8, 8), kind="elsewhere negative")
    for j in range(4):
        data[j][1] = other[j][1]
    for row in (2, 4):
        data[2][row, 2] = data[2][row, 0] + data[2][row, 1]
        data[3][row, 2] = data[3][row, 0] + data[3][row, 1] + (row == 4)
    data[0][3] = 0.0
    data[1][3] = data[2][3].T @ torch.ones(3, dtype=torch.float64)
    data[0][5] = 0.0
    data[0][6] -= 10.0 * torch.eye(5, dtype=torch.float64)
    scales = torch.logspace(-4, 4, 5, dtype=torch.float64)
    data[0][7], data[2][7] = data[0][7] * scales * scales[:, None], data[2][7] * scales * 1e5
    statuses = [Status.SOLVED] * 4 + [
        Status.INFEASIBLE,
        Status.UNBOUNDED,
        Status.UNBOUNDED,
        Status.SOLVED,
    ]
    return data, statuses, [False, False, True, True, False, False, False, False]


def test_a_batch_equals_a_loop_whatever_its_rows():
    data, statuses, degenerate = mixed()
    bars = cotangents(8, 5, 3)
    answer, found = gradients(data, bars)
    assert answer.status.tolist() == statuses
    assert answer.degenerate.tolist() == degenerate
    for i in range(8):
        row, alone = gradients([t[i : i + 1] for t in data], [bar[i : i + 1] for bar in bars])
        assert row.status[0] == statuses[i]
        for ours, theirs in zip((*answer.outputs, *found), (*row.outputs, *alone), strict=True):
            close(ours[i : i + 1], theirs, 1e-9 if i == 7 else 1e-11)


def test_a_row_without_a_solution_is_zero_with_zero_gradient():
    data, statuses, _ = mixed()
    answer, found = gradients(data, cotangents(8, 5, 3))
    for i, status in enumerate(statuses):
        if status.failed:
            assert all((t[i] == 0).all() for t in (*answer.outputs, *found))


def test_a_cotangent_of_nan_stays_in_its_row():
    data, _, _ = mixed()
    bars = cotangents(8, 5, 3)
    _, clean = gradients(data, bars)
    for row in range(8):
        bars = cotangents(8, 5, 3)
        bars[0][row] = torch.nan
        _, found = gradients(data, bars)
        rest = [i for i in range(8) if i != row]
        assert found[1][row].isnan().all()
        for bar, bar_clean in zip(found, clean, strict=True):
            assert torch.equal(bar[rest], bar_clean[rest])


@pytest.mark.parametrize("redundant", ["repeated", "combined", "zero", "more rows than columns"])
def test_redundant_consistent_rows_are_legal(redundant):
    P, q, A, b = draw(5, 3)
    if redundant == "more rows than columns":
        A, b = draw(5, 5)[2:]
    extra = {"repeated": A[:, :1], "combined": A[:, :1] - 3 * A[:, 1:2], "zero": 0 * A[:, :1]}.get(
        redundant, 2 * A[:, 1:3]
    )
    b_extra = {
        "repeated": b[:, :1],
        "combined": b[:, :1] - 3 * b[:, 1:2],
        "zero": 0 * b[:, :1],
    }.get(redundant, 2 * b[:, 1:3])
    data = [P, q, torch.cat((A, extra), 1), torch.cat((b, b_extra), 1)]
    answer = equality_constrained_qp(*data)
    close(answer.outputs[0], oracle([P, q, A, b])[0], 1e-10)
    close(answer.outputs[1], oracle(data, rcond=1e-12)[1], 1e-10)
    assert (answer.status == Status.SOLVED).all()
    assert answer.degenerate.all()
    bars = cotangents(3, 5, data[3].shape[1])
    agrees_with_differences(data, moves=[0, 1])
    # moving the rows of A and b together is a regular problem's derivative in x
    bars = (
        bars[0],
        torch.zeros_like(bars[1]),
    )
    if redundant == "repeated":
        _, found = gradients(data, bars)
        _, plain = gradients([P, q, A, b], (bars[0], torch.zeros_like(b)))
        close(found[3][:, 0] + found[3][:, 3], plain[3][:, 0], 1e-10)
        close(found[2][:, 0] + found[2][:, 3], plain[2][:, 0], 1e-10)


def test_the_gradient_at_constant_rank():
    """P = F F' of rank two, A = G C of rank two with four rows, q and b in their ranges, moved
    through the factors."""
    rng = np.random.default_rng(7)
    shapes = (2, 6, 2), (2, 4, 2), (2, 2, 6), (2, 2, 1), (2, 2, 1)
    factors = [torch.from_numpy(rng.standard_normal(shape)) for shape in shapes]
    bars = cotangents(2, 6, 4)

    def outputs(F, G, C, u, v):
        q = (F @ u + C.mT @ v).squeeze(2)
        return equality_constrained_qp(F @ F.mT, q, G @ C, (G @ u).squeeze(2))

    leaves = [t.clone().requires_grad_() for t in factors]
    answer = outputs(*leaves)
    assert answer.degenerate.all()
    assert (answer.status == Status.SOLVED).all()
    data = [
        factors[0] @ factors[0].mT,
        (factors[0] @ factors[3] + factors[2].mT @ factors[4]).squeeze(2),
        factors[1] @ factors[2],
        (factors[1] @ factors[3]).squeeze(2),
    ]
    for ours, theirs in zip(answer.outputs, oracle(data, rcond=1e-12), strict=True):
        close(ours, theirs, 1e-10)
    found = torch.autograd.grad(answer.outputs, leaves, bars)
    for j, bar in enumerate(found):
        direction = 0.3 * torch.from_numpy(rng.standard_normal(bar.shape))

        def at(t, j=j, direction=direction):
            moved = [f + t * direction if i == j else f for i, f in enumerate(factors)]
            return sum(
                float((out * bar).sum())
                for out, bar in zip(outputs(*moved).outputs, bars, strict=True)
            )

        assert abs(float((bar * direction).sum()) - slope_of(at, 3e-4)) <= 1e-8 * float(
            (bar * direction).abs().sum()
        )


@pytest.mark.parametrize("shared", [False, True])
def test_infeasible_and_unbounded(shared):
    """One matrix for all: the verdict is each right-hand side's own."""
    P = torch.diag(torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64))[None]
    A = torch.tensor([[1.0, 0.0, 0.0], [2.0, 0.0, 0.0]], dtype=torch.float64)[None]
    q = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [1.0, 1.0, 1e-3]], dtype=torch.float64)
    b = torch.tensor([[1.0, 2.0], [1.0, 2.001], [1.0, 2.0]], dtype=torch.float64)
    if not shared:
        P, A = P.expand(3, -1, -1).contiguous(), A.expand(3, -1, -1).contiguous()
    answer = equality_constrained_qp(P, q, A, b)
    assert answer.status.tolist() == [Status.SOLVED, Status.INFEASIBLE, Status.UNBOUNDED]
    close(answer.outputs[0][0], np.array([1.0, -1.0, 0.0]), 1e-14)
    close(answer.outputs[1][0], np.array([-0.4, -0.8]), 1e-14)
    assert answer.degenerate.tolist() == [True, False, False]
    assert answer.residual[1:].isnan().all()


def test_a_contradiction_in_a_row_of_zeros_is_seen_beside_large_numbers():
    A = torch.tensor([[[1.0, 0.0], [0.0, 0.0]]], dtype=torch.float64)
    b = torch.tensor([[1e6, 1e-2]], dtype=torch.float64)
    P, q = torch.eye(2, dtype=torch.float64)[None], torch.zeros(1, 2, dtype=torch.float64)
    assert equality_constrained_qp(P, q, A, b).status.tolist() == [Status.INFEASIBLE]


@pytest.mark.parametrize("scale", [1e-8, 1e8])
@pytest.mark.parametrize("which", ["P and q", "A and b", "variables", "rows"])
@pytest.mark.parametrize("kind", ["definite", "on the null space", "elsewhere negative"])
def test_units_do_not_matter(kind, which, scale):
    P, q, A, b = draw(6, 3, kind=kind)
    one, bars_one = gradients([P, q, A, b], cotangents(3, 6, 3))
    x_unit, nu_unit = torch.ones(6, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    if which == "P and q":
        P, q, nu_unit = P * scale, q * scale, nu_unit * scale
    elif which == "A and b":
        A, b, nu_unit = A * scale, b * scale, nu_unit / scale
    elif which == "variables":  # x = D x'
        D = torch.logspace(0, np.log10(scale) / 2, 6, dtype=torch.float64)
        P, q, A, x_unit = P * D * D[:, None], q * D, A * D, 1 / D
    else:
        D = torch.logspace(0, np.log10(scale), 3, dtype=torch.float64)
        A, b, nu_unit = A * D[:, None], b * D, 1 / D
    bars = [bar / unit for bar, unit in zip(cotangents(3, 6, 3), (x_unit, nu_unit), strict=True)]
    answer, found = gradients([P, q, A, b], bars)
    close(answer.outputs[0] / x_unit, one.outputs[0], 1e-10)
    close(answer.outputs[1] / nu_unit, one.outputs[1], 1e-10)
    assert (answer.residual < 1e-13).all()
    assert (answer.status == Status.SOLVED).all()
    q_unit = nu_unit[0] if which == "P and q" else 1 / x_unit
    close(found[1] * q_unit, bars_one[1], 1e-10)


@pytest.mark.parametrize("condition", [1e2, 1e4, 1e6, 1e8])
def test_ill_conditioned_hessians(condition):
    rng, n, p = np.random.default_rng(4), 8, 3
    V = np.linalg.qr(rng.standard_normal((n, n)))[0]
    P, A = V * np.logspace(0, -np.log10(condition), n) @ V.T, rng.standard_normal((p, n))
    data = [
        torch.from_numpy(t[None]) for t in (P, rng.standard_normal(n), A, rng.standard_normal(p))
    ]
    answer = equality_constrained_qp(*data)
    for ours, theirs in zip(answer.outputs, oracle(data), strict=True):
        close(ours, theirs, 1e-15 * condition + 1e-12)
    assert answer.residual[0] < 1e-13
    assert answer.status[0] == Status.SOLVED
    if condition <= 1e4:
        agrees_with_differences([data[0], data[1], data[2], data[3]], moves=[1, 3])


def test_a_flat_direction_beside_a_faint_curvature_is_not_taken_for_a_way_down():
    """Curvatures 0 and 1e-10 of the largest in equilibrated units: their eigenvectors mix."""
    rng = np.random.default_rng(8)
    for _ in range(20):
        F, A, x = (
            rng.standard_normal((1, 4, 2)) * 1e-4,
            1e2 * np.round(rng.standard_normal((1, 1, 4))),
            rng.standard_normal(4),
        )
        A[:, :, 0] = 0.0
        P = F @ F.swapaxes(1, 2)
        data = [torch.from_numpy(t) for t in (P, -P @ x, A, A @ x)]
        answer = equality_constrained_qp(*data)
        assert answer.status.tolist() == [Status.SOLVED]
        gradient = P[0] @ (answer.outputs[0][0].numpy() - x) + A[0].T @ answer.outputs[1][0].numpy()
        assert np.abs(gradient).max() <= 1e-12 * np.abs(P).max()


def test_a_linear_program_with_one_point():
    A, b = draw(4, 4)[2:]
    q = draw(4, 4)[1]
    answer = equality_constrained_qp(torch.zeros(3, 4, 4, dtype=torch.float64), q, A, b)
    close(answer.outputs[0], torch.linalg.solve(A, b), 1e-12)
    close(answer.outputs[1], torch.linalg.solve(A.mT, -q), 1e-12)
    assert not answer.degenerate.any()


@pytest.mark.parametrize("kind", ["definite", "on the null space"])
def test_float32_agrees_with_float64_to_its_precision(kind):
    data = [t.float() for t in draw(5, 2, kind=kind)]
    bars = cotangents(3, 5, 2)
    answer, found = gradients(data, [bar.float() for bar in bars])
    exact, found_exact = gradients(
        [t.double() for t in data], [bar.float().double() for bar in bars]
    )
    for ours, theirs in zip((*answer.outputs, *found), (*exact.outputs, *found_exact), strict=True):
        assert ours.dtype == torch.float32
        close(ours.double(), theirs, 2e-6)


def test_float32_rounding_makes_no_problem_unbounded_or_infeasible():
    rng = np.random.default_rng(6)
    F, A, x = (
        torch.from_numpy(rng.standard_normal(s)).float() for s in ((4, 6, 2), (4, 2, 6), (4, 6, 1))
    )
    A = torch.cat((A, A[:, :1] + A[:, 1:]), 1)
    answer = equality_constrained_qp(F @ F.mT, (F @ F.mT @ x).squeeze(2), A, (A @ x).squeeze(2))
    assert (answer.status == Status.SOLVED).all()
    assert answer.degenerate.all()


@pytest.mark.parametrize(
    "batch", [(0, 0, 0, 0), (1, 0, 1, 0), (1, 0, 1, 1), (0, 1, 1, 1), (1, 1, 0, 0)]
)
@pytest.mark.parametrize("p", [0, 2])
def test_an_empty_batch(batch, p):
    data = draw(4, p, batch=batch)
    answer, found = gradients(data, cotangents(0, 4, p))
    assert [out.shape for out in answer.outputs] == [(0, 4), (0, p)]
    assert answer.status.shape == answer.residual.shape == answer.degenerate.shape == (0,)
    assert all(
        bar.shape == t.shape and (bar == 0).all() for bar, t in zip(found, data, strict=True)
    )


def test_a_second_derivative_raises():
    data = [t.requires_grad_() for t in draw(4, 2)]
    bars = [bar.requires_grad_() for bar in cotangents(3, 4, 2)]
    found = torch.autograd.grad(
        equality_constrained_qp(*data).outputs, data, bars, create_graph=True
    )
    with pytest.raises(RuntimeError, match="twice"):
        sum(bar.sum() for bar in found).backward()


def test_each_gradient_alone_is_what_it_is_with_the_others():
    data, _, _ = mixed()
    bars = cotangents(8, 5, 3)
    _, together = gradients(data, bars)
    for j in range(4):
        leaves = [t.clone().requires_grad_(i == j) for i, t in enumerate(data)]
        assert torch.equal(
            torch.autograd.grad(equality_constrained_qp(*leaves).outputs, leaves[j], bars)[0],
            together[j],
        )


def test_one_output_alone_has_a_gradient():
    data = [t.requires_grad_() for t in draw(4, 2)]
    x, nu = equality_constrained_qp(*data).outputs
    both = torch.autograd.grad(x.sum() + nu.sum(), data, retain_graph=True)
    apart = zip(
        torch.autograd.grad(x.sum(), data, retain_graph=True),
        torch.autograd.grad(nu.sum(), data),
        strict=True,
    )
    for whole, (first, second) in zip(both, apart, strict=True):
        close(first + second, whole, 1e-12)

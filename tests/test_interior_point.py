"""The batched interior point solves linear and quadratic programs as others do, and proves what has
no solution."""

import numpy as np
import pytest
import torch
from scipy.optimize import linprog

from convlayer.cones import Nonnegative, Product, Zero
from convlayer.conic.program import Data, Operators, Program
from convlayer.conic.residual import normalise
from convlayer.solution import Status
from convlayer.solvers.clarabel import Clarabel
from convlayer.solvers.dealing import solve_batch
from convlayer.solvers.interior_point import InteriorPoint
from convlayer.solvers.solver import Iterate, Task

SIZES = [
    (1, 0, 1),
    (4, 0, 0),
    (5, 2, 0),
    (6, 0, 9),
    (10, 3, 5),
    (10, 3, 20),
    (12, 0, 6),
    (8, 3, 40),
]
KINDS = ["definite", "semidefinite", "linear"]


def program_of(n, cones):
    m = sum(cone.size for cone in cones)
    rows, columns = np.triu_indices(n)
    order = np.lexsort((rows, columns))
    A_columns, A_rows = (
        np.divmod(np.arange(n * m), m) if m else (np.zeros(0, int), np.zeros(0, int))
    )
    return Program(n, m, Product(cones), rows[order], columns[order], A_rows, A_columns)


def data_of(P, q, A, b, p, cones=None):
    """Dense matrices, the first p rows equalities, as Data."""
    m, n = A.shape[-2:]
    cones = cones or [cone(size) for cone, size in ((Zero, p), (Nonnegative, m - p)) if size]
    program = program_of(n, cones)
    return Data(
        program, P[:, program.P_rows, program.P_cols], q, A[:, program.A_rows, program.A_cols], b
    )


def task_of(data, tolerance=1e-8, **options):
    rows = data.batch
    vectors = (part.expand(rows, -1).contiguous().numpy() for part in (data.q, data.b))
    q, b = vectors
    return Task(data.program, data.P.numpy(), q, data.A.numpy(), b, tolerance, options)


def solve(data, tolerance=1e-8, **options):
    points = InteriorPoint().solve_data(data, tolerance, options)
    rows = zip(
        *(part.numpy() for part in (points.x, points.s, points.y)),
        points.status.tolist(),
        points.iterations.tolist(),
        strict=True,
    )
    return [Iterate(x, s, y, Status(status), count) for x, s, y, status, count in rows]


def stacked(iterates):
    return [
        torch.tensor(np.array([getattr(iterate, name) for iterate in iterates])) for name in "xsy"
    ]


def normal(generator, *shape):
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def planted(kind, n, p, l, batch=6, seed=0, few=False):
    """Programs with a known solution: (P, q, A, b), (x, s, y). Rows are active as a coin says, or
    so few that y is unique."""
    g = torch.Generator().manual_seed(seed)
    L = normal(g, batch, n, {"definite": n, "semidefinite": max(1, n // 3), "linear": 1}[kind])
    P = (L @ L.mT + (kind == "definite") * 0.1 * torch.eye(n, dtype=torch.float64)) * (
        kind != "linear"
    )
    A, x = normal(g, batch, p + l, n), normal(g, batch, n)
    coin = torch.rand(batch, l, generator=g)
    active = coin.argsort(1).argsort(1) < (n - p) // 2 if few else coin < 0.5
    s = torch.cat(
        [torch.zeros(batch, p), torch.where(active, 0.0, normal(g, batch, l).abs() + 0.1)], 1
    )
    y = torch.cat(
        [normal(g, batch, p), torch.where(active, normal(g, batch, l).abs() + 0.1, 0.0)], 1
    )
    q = -(P @ x.unsqueeze(2) + A.mT @ y.unsqueeze(2)).squeeze(2)
    b = (A @ x.unsqueeze(2)).squeeze(2) + s
    return (P, q, A, b), (x, s, y)


def objective(data, x):
    return (x * (Operators(data, dense=True).P(x) / 2 + data.q)).sum(1)


def optimal(data, iterates, tolerance):
    """Every row is solved: KKT residuals, cones and gap to the tolerance, relative to the size of
    the terms."""
    assert [iterate.status for iterate in iterates] == [Status.SOLVED] * data.batch
    x, s, y = stacked(iterates)
    operators, rows = Operators(data, dense=True), data.program.inequalities
    size = 1 + x.abs().amax(1) + (y.abs().amax(1) if y.shape[1] else 0)
    for error in (operators.P(x) + data.q + operators.At(y), operators.A(x) + s - data.b):
        assert error.numel() == 0 or float((error.abs().amax(1) / size).max()) <= tolerance
    assert (s[:, rows] > 0).all()
    assert (y[:, rows] > 0).all()
    assert (s[:, ~rows] == 0).all()
    gap = (s * y).sum(1) / (1 + objective(data, x).abs())
    assert float(gap.max()) <= tolerance


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_planted_optimum_is_found(kind, size):
    parts, (x, _, _) = planted(kind, *size)
    data = data_of(*parts, size[1])
    iterates = solve(data)
    optimal(data, iterates, 3e-8)
    found = stacked(iterates)[0]
    reference = objective(data, x)
    assert float(((objective(data, found) - reference) / (1 + reference.abs())).abs().max()) <= 1e-6
    if kind == "definite":
        assert float((found - x).abs().max()) <= 1e-3  # a gap of 1e-8 leaves its square root


@pytest.mark.parametrize("size", [(6, 0, 9), (10, 3, 20), (8, 3, 40)], ids=str)
def test_active_rows_are_told_from_inactive_ones(size):
    parts, (_, s, y) = planted("definite", *size, seed=3, few=True)
    _, found_s, found_y = stacked(solve(data_of(*parts, size[1])))
    p = size[1]
    assert ((found_y > found_s)[:, p:] == (y > s)[:, p:]).all()
    assert float((found_y - y).abs().max()) <= 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_clarabel_agrees_on_badly_scaled_programs_once_normalised(kind):
    (P, q, A, b), _ = planted(kind, 10, 3, 20, seed=1)
    g = torch.Generator().manual_seed(7)
    D, R = 10 ** normal(g, 6, 10).clamp(-2, 2).mul(1.5), 10 ** normal(g, 6, 23).mul(2)
    data = data_of(P * D[:, None] * D[:, :, None], q * D, A * D[:, None] * R[:, :, None], b * R, 3)
    scaled, _ = normalise(data)
    iterates = solve(scaled)
    optimal(scaled, iterates, 1e-6)
    reference = objective(scaled, solve_batch(Clarabel(), 1e-10, {}, scaled, None, None).x)
    assert (
        float(
            ((objective(scaled, stacked(iterates)[0]) - reference) / (1 + reference.abs()))
            .abs()
            .max()
        )
        <= 1e-6
    )


def test_linprog_agrees_on_linear_programs_with_bounds_of_many_scales():
    g = torch.Generator().manual_seed(2)
    n, l, batch = 8, 12, 5
    A, q = normal(g, batch, l, n), normal(g, batch, n)
    inside, width = normal(g, batch, n), 10 ** normal(g, batch, n).mul(2)
    b = (A @ inside.unsqueeze(2)).squeeze(2) + normal(g, batch, l).abs()
    eye = torch.eye(n, dtype=torch.float64).expand(batch, -1, -1)
    data = data_of(
        torch.zeros(1, n, n, dtype=torch.float64),
        q,
        torch.cat([A, eye, -eye], 1),
        torch.cat([b, inside + width, width - inside], 1),
        0,
    )
    values = objective(data, stacked(solve(data))[0])
    for row in range(batch):
        bounds = torch.stack([inside - width, inside + width], 2)[row].numpy()
        reference = linprog(q[row].numpy(), A[row].numpy(), b[row].numpy(), bounds=bounds)
        assert float(values[row]) == pytest.approx(reference.fun, rel=1e-6, abs=1e-6)


def test_projection_onto_a_box_is_clamping():
    g = torch.Generator().manual_seed(4)
    n, target = 5, normal(g, 7, 5).mul(2)
    eye = torch.eye(n, dtype=torch.float64)
    data = data_of(
        eye[None],
        -target,
        torch.cat([eye, -eye])[None],
        torch.ones(1, 2 * n, dtype=torch.float64),
        0,
    )
    x, _, y = stacked(solve(data))
    assert float((x - target.clamp(-1, 1)).abs().max()) <= 1e-4
    assert float((y[:, :n] - y[:, n:] - (target - target.clamp(-1, 1))).abs().max()) <= 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_duplicated_rows_and_redundant_equalities_do_no_harm(kind):
    (P, q, A, b), _ = planted(kind, 10, 3, 20, seed=5)
    A = torch.cat([A[:, :3], 2 * A[:, :3], A[:, 3:], A[:, 3:]], 1)
    b = torch.cat([b[:, :3], 2 * b[:, :3], b[:, 3:], b[:, 3:]], 1)
    data = data_of(P, q, A, b, 6)
    optimal(data, solve(data), 1e-7)


def infeasible(kind, n, p, l, seed=0):
    """A'y = 0 and b'y < 0 for a planted y."""
    (P, q, A, b), _ = planted(kind, n, p, l, seed=seed)
    g = torch.Generator().manual_seed(seed + 1)
    y = torch.cat([normal(g, 6, p), normal(g, 6, l).abs() + 0.1], 1)
    A[:, -1] = -(A[:, :-1] * y[:, :-1, None]).sum(1) / y[:, -1:]
    b[:, -1] -= ((b * y).sum(1) + 1) / y[:, -1]
    return P, q, A, b


def unbounded(kind, n, p, l, seed=0):
    """Pd = 0, q'd < 0 and Ad <= 0, zero in the equalities, for a planted d."""
    (P, q, A, b), (x, s, _) = planted(kind, n, p, l, seed=seed)
    d = normal(torch.Generator().manual_seed(seed + 1), 6, n)
    d /= d.norm(dim=1, keepdim=True)
    flat = torch.eye(n, dtype=torch.float64) - d[:, :, None] * d[:, None]
    P = flat @ P @ flat
    slope = (A * d[:, None]).sum(2)
    slope[:, p:] *= 2 * (slope[:, p:] > 0)
    A = A - slope[:, :, None] * d[:, None]
    b = (A * x[:, None]).sum(2) + s
    return P, q - d * ((q * d).sum(1, keepdim=True) + 1), A, b


@pytest.mark.parametrize(
    ("kind", "size"),
    [(k, s) for k in KINDS for s in [(6, 0, 9), (10, 3, 20), (10, 0, 11)]],
    ids=str,
)
def test_an_infeasible_row_comes_with_its_certificate(kind, size):
    P, q, A, b = infeasible(kind, *size)
    iterates = solve(data_of(P, q, A, b, size[1]))
    assert {iterate.status for iterate in iterates} == {Status.INFEASIBLE}
    assert max(iterate.iterations for iterate in iterates) <= 20
    y = stacked(iterates)[2]
    gain = -(b * y).sum(1)
    assert (gain > 0).all()
    assert (
        (A.mT @ y.unsqueeze(2)).abs().sum((1, 2)) * b.abs().sum(1).clamp(min=1) <= 1e-4 * gain
    ).all()
    assert (y[:, size[1] :] >= 0).all()


@pytest.mark.parametrize(
    ("kind", "size"),
    [(k, s) for k in KINDS[1:] for s in [(6, 0, 9), (10, 3, 20), (10, 3, 5), (6, 2, 0)]],
    ids=str,
)
def test_an_unbounded_row_comes_with_its_ray(kind, size):
    P, q, A, b = unbounded(kind, *size)
    iterates = solve(data_of(P, q, A, b, size[1]))
    assert {iterate.status for iterate in iterates} == {Status.UNBOUNDED}
    x = stacked(iterates)[0]
    gain, Ax = -(q * x).sum(1), (A @ x.unsqueeze(2)).squeeze(2)
    Ax[:, size[1] :].clamp_(min=0)
    assert (gain > 0).all()
    assert (torch.cat([(P @ x.unsqueeze(2)).squeeze(2), Ax], 1).abs().amax(1) <= 1e-4 * gain).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_of_zeros_cannot_be_negative(kind):
    (P, q, A, b), _ = planted(kind, 8, 0, 10)
    A[:, 3], b[:, 3] = 0, -1
    assert {iterate.status for iterate in solve(data_of(P, q, A, b, 0))} == {Status.INFEASIBLE}


def test_contradictory_equalities_are_infeasible():
    eye = torch.eye(2, dtype=torch.float64)[None]
    A = torch.tensor([[[1.0, 1.0], [1.0, 1.0]]], dtype=torch.float64)
    b = torch.tensor([[1.0, 2.0]], dtype=torch.float64)
    for P in (eye, 0 * eye):
        assert (
            solve(data_of(P, torch.zeros(1, 2, dtype=torch.float64), A, b, 2))[0].status
            == Status.INFEASIBLE
        )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(6, 0, 9), (10, 3, 20), (10, 3, 5)], ids=str)
def test_a_batch_equals_a_loop_whatever_its_other_rows_are(kind, size):
    good, _ = planted(kind, *size)
    bad = (
        infeasible(kind, *size),
        unbounded("linear" if kind == "linear" else "semidefinite", *size),
    )
    hard = [part.clone() for part in good]
    hard[2] *= 1e150  # overflows
    mixed = [torch.stack(rows, 1).flatten(0, 1) for rows in zip(good, *bad, hard, strict=True)]
    data = data_of(*mixed, size[1])
    together = solve(data)
    for row in range(0, len(mixed[0]), 4):
        alone = solve(data.rows(torch.tensor([row, row])))[0]
        assert together[row].status == alone.status == Status.SOLVED
        assert together[row].iterations == alone.iterations
        for name in "xsy":
            np.testing.assert_allclose(
                getattr(together[row], name), getattr(alone, name), rtol=1e-5, atol=1e-7
            )
    assert all(np.isfinite(iterate.x).all() for iterate in together)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(6, 0, 9), (10, 3, 5), (8, 3, 40)], ids=str)
@pytest.mark.parametrize("shared", ["P", "A", "PA"])
def test_shared_matrices_give_what_copies_give(kind, size, shared):
    (P, q, A, b), (x, s, y) = planted(kind, *size)
    if "P" in shared:
        P = P[:1]
    if "A" in shared:
        A = A[:1]
    q = -(P @ x.unsqueeze(2) + A.mT @ y.unsqueeze(2)).squeeze(2)
    b = (A @ x.unsqueeze(2)).squeeze(2) + s
    one = solve(data_of(P, q, A, b, size[1]))
    copies = solve(data_of(P.expand(6, -1, -1), q, A.expand(6, -1, -1), b, size[1]))
    optimal(data_of(P, q, A, b, size[1]), one, 1e-7)
    for a, c in zip(one, copies, strict=True):
        assert (a.status, a.iterations) == (c.status, c.iterations)
        assert kind != "definite" or np.abs(a.x - c.x).max() <= 1e-6


def test_rows_in_any_order_and_blocks_in_any_order():
    (P, q, A, b), (_, _, y) = planted("definite", 6, 3, 9, few=True)
    order = torch.tensor([3, 4, 0, 5, 6, 7, 8, 1, 2, 9, 10, 11])
    cones = [Nonnegative(2), Zero(1), Nonnegative(4), Zero(2), Nonnegative(3)]
    data = data_of(P, q, A[:, order], b[:, order], 3, cones)
    iterates = solve(data)
    optimal(data, iterates, 1e-7)
    assert float((stacked(iterates)[2] - y[:, order]).abs().max()) <= 1e-3


def test_a_finer_tolerance_is_reached():
    for kind in KINDS:
        parts, _ = planted(kind, 10, 3, 20, seed=6)
        data = data_of(*parts, 3)
        optimal(data, solve(data, 1e-11), 1e-10)


def test_an_empty_batch_and_few_iterations():
    parts, _ = planted("definite", 4, 1, 5)
    data = data_of(*parts, 1)
    assert solve(data.rows(torch.zeros(0, dtype=torch.int64))) == []
    early = solve(data, max_iter=2)
    assert {iterate.status for iterate in early} == {Status.NOT_CONVERGED}
    assert {iterate.iterations for iterate in early} == {2}
    assert all(np.isfinite(iterate.x).all() for iterate in early)


def test_options_it_does_not_have_are_refused():
    solver, linear = InteriorPoint(), program_of(3, [Zero(1), Nonnegative(3)])
    solver.check(linear, {"max_iter": 10})
    with pytest.raises(TypeError, match="no option `eps`"):
        solver.check(linear, {"eps": 1})
    for wrong in (0, 2.5, True):
        with pytest.raises(TypeError, match="max_iter"):
            solver.check(linear, {"max_iter": wrong})

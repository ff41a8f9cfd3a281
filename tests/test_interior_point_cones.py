"""The batched interior point on programs with curved cones: optima, certificates, and the scalings
and barriers behind them."""

import numpy as np
import pytest
import torch
from test_interior_point import program_of, task_of

from convlayer.cones import Exponential, Nonnegative, Power, Product, Psd, SecondOrder, Zero
from convlayer.conic.program import Data, Operators
from convlayer.conic.residual import normalise
from convlayer.solution import Status
from convlayer.solvers.barriers import ExponentialKind, PowerKind
from convlayer.solvers.clarabel import Clarabel
from convlayer.solvers.interior_point import InteriorPoint, solve_data
from convlayer.solvers.scalings import PsdKind, SecondOrderKind

CONES = {
    "second_order": [SecondOrder(4), SecondOrder(4), SecondOrder(2)],
    "small_second_order": [SecondOrder(1), SecondOrder(2), SecondOrder(3)],
    "psd": [Psd(3), Psd(3)],
    "small_psd": [Psd(1), Psd(2), Psd(4)],
    "exponential": [Exponential()] * 3,
    "power": [Power(0.5), Power(0.2), Power(0.9)],
    "extreme_power": [Power(0.01), Power(0.99)],
    "zero_and_curved": [Zero(2), SecondOrder(3), Psd(2)],
    "mix": [
        Zero(1),
        Nonnegative(3),
        SecondOrder(3),
        Psd(3),
        SecondOrder(5),
        Exponential(),
        Exponential(),
        Power(0.3),
    ],
    "mix_in_no_order": [
        Power(0.6),
        Psd(2),
        Nonnegative(2),
        Exponential(),
        Zero(2),
        SecondOrder(3),
        Nonnegative(1),
        Psd(2),
    ],
}
KINDS = ["definite", "semidefinite", "linear"]
SYMMETRIC = ["second_order", "small_second_order", "psd", "small_psd", "zero_and_curved"]
BATCH = 5


def normal(generator, *shape):
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def data_of(cones, P, q, A, b):
    program = program_of(q.shape[1], cones)
    return Data(
        program, P[:, program.P_rows, program.P_cols], q, A[:, program.A_rows, program.A_cols], b
    )


def planted(kind, cones, seed=0, batch=BATCH, surplus=0):
    """Programs with a known solution: the projections of random points onto the cone and its polar
    are complementary."""
    g = torch.Generator().manual_seed(seed)
    product = Product(cones)
    m = product.size
    n = max(sum(cone.size for cone in cones if cone.name == "zero"), (2 * m) // 3) + surplus
    v = normal(g, batch, m)
    s = product.project(v)
    y = s - v
    L = normal(g, batch, n, {"definite": n, "semidefinite": max(1, n // 3), "linear": 1}[kind])
    P = (L @ L.mT + (kind == "definite") * 0.1 * torch.eye(n, dtype=torch.float64)) * (
        kind != "linear"
    )
    A, x = normal(g, batch, m, n), normal(g, batch, n)
    q = -(P @ x.unsqueeze(2) + A.mT @ y.unsqueeze(2)).squeeze(2)
    b = (A @ x.unsqueeze(2)).squeeze(2) + s
    return (P, q, A, b), (x, s, y)


def error(data, x, s, y):
    """(B,) KKT residual, distances to the cones and gap, relative to the point."""
    operators, cones = Operators(data, dense=True), data.program.cones
    parts = [operators.P(x) + data.q + operators.At(y), operators.A(x) + s - data.b]
    parts += [cones.project(s) - s, cones.project_dual(y) - y, (s * y).sum(1, keepdim=True)]
    return torch.cat(parts, 1).abs().amax(1) / (1 + torch.cat([x, s, y], 1).abs().amax(1))


def objective(data, x):
    return (x * (Operators(data, dense=True).P(x) / 2 + data.q)).sum(1)


def agree(data, x, reference, tolerance):
    value, wanted = objective(data, x), objective(data, reference)
    assert float(((value - wanted) / (1 + wanted.abs())).abs().max()) <= tolerance


@pytest.mark.parametrize("name", CONES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_planted_optimum_is_found(kind, name):
    parts, (x, _, _) = planted(kind, CONES[name])
    data = data_of(CONES[name], *parts)
    answer = solve_data(data, 1e-8)
    assert (answer.status == Status.SOLVED).all()
    assert float(error(data, answer.x, answer.s, answer.y).max()) <= 3e-7
    assert int(answer.iterations.max()) <= 25
    agree(data, answer.x, x, 1e-6)
    if kind == "definite":
        assert float((answer.x - x).abs().max()) <= 2e-3  # a gap of 1e-8 leaves its square root


@pytest.mark.parametrize("name", CONES)
@pytest.mark.parametrize("kind", KINDS)
def test_clarabel_agrees_on_normalised_programs(kind, name):
    """At 1e-8: there no row of 9,600 stalls. At 1e-9 one in two hundred does under a cost that is
    linear, and which one is rounding's choice: moved by 1e-15, or under other vector instructions,
    it is another. Newton's matrix is then 1e13 times as large as its least eigenvalue, and a step's
    equations are met to 1e-9."""
    parts, _ = planted(kind, CONES[name], seed=1)
    scaled, _ = normalise(data_of(CONES[name], *parts))
    answer = solve_data(scaled, 1e-8)
    others = Clarabel().solve(task_of(scaled, 1e-10))
    assert (answer.status == Status.SOLVED).all()
    # At 1e-10 Clarabel gives up on one power cone or another, which one and how many by the last
    # digit, and says so; the planted optimum is asked for above.
    told = torch.tensor([other.status == Status.SOLVED for other in others])
    assert told.any()
    agree(
        scaled.rows(told.nonzero().flatten()),
        answer.x[told],
        torch.tensor(np.array([other.x for other in others]))[told],
        1e-7,
    )


@pytest.mark.parametrize("name", CONES)
def test_a_finer_tolerance_is_reached(name):
    """Where the objective is strongly convex, no row of 3,200 stalls above it."""
    parts, _ = planted("definite", CONES[name], seed=2)
    data = data_of(CONES[name], *parts)
    answer = solve_data(data, 1e-9)
    assert (answer.status == Status.SOLVED).all()
    assert float(error(data, answer.x, answer.s, answer.y).max()) <= 3e-8


@pytest.mark.parametrize("name", CONES)
@pytest.mark.parametrize("end", ["s", "y", "both"])
def test_solutions_at_the_cones_apex(name, end):
    """s = 0 with y inside, y = 0 with s inside, or both zero: no strict complementarity."""
    product = Product(CONES[name])
    (P, _, A, _), (x, _, _) = planted("definite", CONES[name], seed=3)
    g = torch.Generator().manual_seed(3)
    inside = sum(product.project(normal(g, BATCH, product.size)) for _ in range(8))
    dual = sum(product.project_dual(normal(g, BATCH, product.size)) for _ in range(8))
    s, y = inside * (end == "y"), dual * (end == "s")
    q = -(P @ x.unsqueeze(2) + A.mT @ y.unsqueeze(2)).squeeze(2)
    b = (A @ x.unsqueeze(2)).squeeze(2) + s
    data = data_of(CONES[name], P, q, A, b)
    answer = solve_data(data, 1e-8)
    assert (answer.status == Status.SOLVED).all()
    assert float((answer.x - x).abs().max()) <= (5e-3 if end == "both" else 1e-4)


@pytest.mark.parametrize("name", CONES)
@pytest.mark.parametrize("kind", KINDS)
def test_an_infeasible_row_comes_with_its_certificate(kind, name):
    """A'y = 0 and b'y < 0 for a planted y in K*, with more columns than rows of A can close."""
    (P, q, A, b), _ = planted(kind, CONES[name], seed=4)
    # a ray of its own would be as good an answer
    P = P + 0.1 * torch.eye(q.shape[1], dtype=torch.float64)
    product = Product(CONES[name])
    g = torch.Generator().manual_seed(5)
    # inside K*: infeasible by far
    y = sum(product.project_dual(normal(g, BATCH, product.size)) for _ in range(8))
    square = (y * y).sum(1, keepdim=True)
    A = A - y[:, :, None] * ((A.mT @ y.unsqueeze(2)).mT / square.unsqueeze(2))
    b = b - y * (((b * y).sum(1, keepdim=True) + 1) / square)
    scaled, _ = normalise(data_of(CONES[name], P, q, A, b))
    answer = solve_data(scaled, 1e-8)
    assert (answer.status == Status.INFEASIBLE).all()
    y = answer.y
    gain = -(scaled.b * y).sum(1)
    assert (gain > 0).all()
    combined = Operators(scaled, dense=True).At(y).abs().sum(1)
    assert (combined * scaled.b.abs().sum(1).clamp(min=1) <= 1e-4 * gain).all()
    assert float((product.project_dual(y) - y).abs().max()) <= 1e-12 * float(y.abs().max())


@pytest.mark.parametrize("name", CONES)
@pytest.mark.parametrize("kind", KINDS[1:])
def test_an_unbounded_row_comes_with_its_ray(kind, name):
    """Pd = 0, q'd < 0 and -Ad in K for a planted d."""
    (P, q, A, b), (x, s, _) = planted(kind, CONES[name], seed=6, surplus=2)
    product, g = Product(CONES[name]), torch.Generator().manual_seed(7)
    d = normal(g, *x.shape)
    d /= d.norm(dim=1, keepdim=True)
    flat = torch.eye(x.shape[1], dtype=torch.float64) - d[:, :, None] * d[:, None]
    P = flat @ P @ flat
    slack = product.project(normal(g, BATCH, product.size))
    A = A - ((A @ d.unsqueeze(2)).squeeze(2) + slack)[:, :, None] * d[:, None]
    b = (A @ x.unsqueeze(2)).squeeze(2) + s
    q = q - d * ((q * d).sum(1, keepdim=True) + 1)
    answer = solve_data(data_of(CONES[name], P, q, A, b), 1e-8)
    assert (answer.status == Status.UNBOUNDED).all()
    x = answer.x
    gain, ray = -(q * x).sum(1), -(A @ x.unsqueeze(2)).squeeze(2)
    assert (gain > 0).all()
    errors = torch.cat([(P @ x.unsqueeze(2)).squeeze(2), ray - product.project(ray)], 1)
    assert (errors.abs().amax(1) <= 1e-4 * gain).all()


@pytest.mark.parametrize("name", CONES)
def test_a_batch_equals_a_loop_and_a_row_of_nan_fails_alone(name):
    parts, _ = planted("semidefinite", CONES[name], seed=8)
    data = data_of(CONES[name], *parts)
    broken = [part.clone() for part in (data.P, data.q, data.A, data.b)]
    broken[1][2, 0] = torch.nan
    broken[2][3] *= 1e150
    together = solve_data(Data(data.program, *broken), 1e-8)
    for row in (0, 1, 4):
        alone = solve_data(data.rows(torch.tensor([row, row])), 1e-8)
        assert together.status[row] == alone.status[0] == Status.SOLVED
        assert together.iterations[row] == alone.iterations[0]
        for part in ("x", "s", "y"):
            assert (
                float((getattr(together, part)[row] - getattr(alone, part)[0]).abs().max()) <= 1e-5
            )
    assert together.status[2] == Status.NOT_CONVERGED
    assert torch.isfinite(together.x[3]).all()


@pytest.mark.parametrize(
    "name", ["second_order", "psd", "exponential", "power", "mix", "mix_in_no_order"]
)
@pytest.mark.parametrize("shared", ["P", "A", "PA", "Pq", "Ab"])
def test_shared_data_give_what_copies_give(name, shared):
    (P, q, A, b), _ = planted("definite", CONES[name], seed=9)
    P, q, A, b = (
        part[:1] if key in shared else part
        for key, part in (("P", P), ("q", q), ("A", A), ("b", b))
    )
    s = Product(CONES[name]).project(normal(torch.Generator().manual_seed(9), 1, A.shape[1]))
    b = (
        b
        if "b" not in shared
        else s + (A[:1] @ torch.ones(A.shape[2], 1, dtype=A.dtype)).squeeze(2)
    )
    one = solve_data(data_of(CONES[name], P, q, A, b), 1e-8)
    copies = solve_data(
        data_of(CONES[name], *(p.expand(BATCH, *p.shape[1:]) for p in (P, q, A, b))), 1e-8
    )
    assert (one.status == copies.status).all()
    solved = one.status == Status.SOLVED
    assert solved.any()
    assert float((one.x - copies.x)[solved].abs().max()) <= 1e-5


def test_programs_without_rows_of_the_batch_or_of_A():
    parts, _ = planted("definite", CONES["mix"])
    data = data_of(CONES["mix"], *parts)
    empty = solve_data(data.rows(torch.zeros(0, dtype=torch.int64)), 1e-8)
    assert [len(part) for part in (empty.x, empty.s, empty.y, empty.status, empty.iterations)] == [
        0
    ] * 5
    (P, q, _, _), _ = planted("definite", CONES["psd"])
    free = solve_data(data_of([], P, q, P[:, :0], q[:, :0]), 1e-8)
    assert (free.status == Status.SOLVED).all()
    assert float((free.x + torch.linalg.solve(P, q)).abs().max()) <= 1e-5


def test_the_solver_is_its_function_with_options():
    parts, _ = planted("definite", CONES["mix_in_no_order"])
    data = data_of(CONES["mix_in_no_order"], *parts)
    answer, points = (
        solve_data(data, 1e-8),
        InteriorPoint().solve_data(data, 1e-8, {"max_iter": 30}),
    )
    assert torch.equal(points.x, answer.x)


def points_inside(kind, cone, count, seed=0, depth=1.0):
    """(s, y), (4, count, size): off the boundary and off the central path by several orders of
    magnitude."""
    g = torch.Generator().manual_seed(seed)
    v = normal(g, 4, count, cone.size)
    s = cone.project(v)
    unit = kind.unit(v)
    offset = 10 ** (-4 * torch.rand(4, count, 1, generator=g, dtype=torch.float64)) * depth
    return s + offset * unit, s - v + offset * unit


SCALINGS = {
    "second_order_2": (SecondOrderKind(3, 2), SecondOrder(2)),
    "second_order_5": (SecondOrderKind(3, 5), SecondOrder(5)),
    "psd_2": (PsdKind(3, 2), Psd(2)),
    "psd_4": (PsdKind(3, 4), Psd(4)),
    "exponential": (ExponentialKind(3), Exponential()),
    "power": (PowerKind([0.4] * 3), Power(0.4)),
    "extreme_power": (PowerKind([0.02] * 3), Power(0.02)),
}


@pytest.mark.parametrize("name", SCALINGS)
def test_a_scaling_takes_y_to_s(name):
    kind, cone = SCALINGS[name]
    s, y = points_inside(kind, cone, 3)
    scaling = kind.at(s, y)
    scaled = scaling.reduce(s.unsqueeze(1)).squeeze(1)
    assert float((scaled - scaling.scaled).abs().max()) <= 1e-9
    assert float((scaling.weigh(s.unsqueeze(1)).squeeze(1) - y).abs().max()) <= 1e-9 * float(
        y.abs().max()
    )
    assert float((scaling.enlarge(scaled) - y).abs().max()) <= 1e-9 * float(y.abs().max())
    x = normal(torch.Generator().manual_seed(1), *s.shape)
    weighed = scaling.weigh(x.unsqueeze(1)).squeeze(1)
    size = float(weighed.abs().max())
    assert (
        float(((scaling.inverse() @ x.unsqueeze(-1)).squeeze(-1) - weighed).abs().max())
        <= 1e-9 * size
    )
    again = scaling.enlarge(scaling.reduce(x.unsqueeze(1)).squeeze(1))
    assert float((again - weighed).abs().max()) <= 1e-9 * size
    assert (torch.linalg.eigvalsh(scaling.inverse()) > 0).all()


@pytest.mark.parametrize("name", ["second_order_2", "second_order_5", "psd_2", "psd_4"])
def test_the_longest_step_ends_on_the_boundary(name):
    kind, cone = SCALINGS[name]
    s, y = points_inside(kind, cone, 3)
    scaling = kind.at(s, y)
    g = torch.Generator().manual_seed(2)
    d_s, d_y = normal(g, *s.shape), normal(g, *s.shape)
    longest = -1 / scaling.worst(d_s, d_y)
    least = [kind.inside(scaling.scaled + longest.unsqueeze(2) * d)[0].amin(1) for d in (d_s, d_y)]
    assert float(torch.minimum(*least).abs().max()) <= 1e-10


@pytest.mark.parametrize("name", ["exponential", "power", "extreme_power"])
def test_near_the_central_path_the_scaling_is_the_dual_hessian(name):
    kind, cone = SCALINGS[name]
    _, y = points_inside(kind, cone, 3)
    point = y.movedim(-1, 0)
    barrier = kind.barrier(point)
    s = -0.7 * barrier.gradient
    scaling = kind.at(s.movedim(0, -1), y)
    x = normal(torch.Generator().manual_seed(3), 3, 4, 3)
    wanted = barrier.solve(x).movedim(0, -1) / 0.7
    found = scaling.weigh(x.movedim(0, -1).unsqueeze(1)).squeeze(1)
    assert float((found - wanted).abs().max()) <= 1e-6 * float(wanted.abs().max())


@pytest.mark.parametrize("name", ["exponential", "power", "extreme_power"])
def test_barrier_derivatives_are_autograd_s(name):
    kind, cone = SCALINGS[name]
    _, points = points_inside(kind, cone, 3, depth=10.0)
    g = torch.Generator().manual_seed(4)
    for point in points.flatten(0, 1):
        one = ExponentialKind(1) if name == "exponential" else PowerKind(kind.alphas[:1])

        def value(y, one=one):
            return one.barrier(y.view(3, 1, 1)).value().squeeze()

        barrier = one.barrier(point.view(3, 1, 1))
        gradient = torch.autograd.functional.jacobian(value, point)
        hessian = torch.autograd.functional.hessian(value, point)
        a, b = normal(g, 3), normal(g, 3)
        third = torch.autograd.functional.jacobian(
            lambda y, a=a, value=value: (
                torch.autograd.functional.hessian(value, y, create_graph=True) @ a
            ),
            point,
        )
        pairs = [
            (barrier.gradient, gradient),
            (barrier.solve((hessian @ a).view(3, 1, 1)), a),
            (barrier.third(a.view(3, 1, 1), b.view(3, 1, 1)), third @ b),
        ]
        for found, wanted in pairs:
            assert float((found.flatten() - wanted).abs().max()) <= 1e-7 * float(wanted.abs().max())
        assert float((point * gradient).sum()) == pytest.approx(-3, abs=1e-9)


@pytest.mark.parametrize("alpha", [None, 0.5, 0.05, 0.95])
def test_the_conjugate_gradient_inverts_the_dual_gradient(alpha):
    kind, cone = (
        (ExponentialKind(3), Exponential())
        if alpha is None
        else (PowerKind([alpha] * 3), Power(alpha))
    )
    s, _ = points_inside(kind, cone, 3, seed=5)
    s = s.movedim(-1, 0)
    back = -kind.barrier(-kind.conjugate_gradient(s)).gradient
    assert float(((back - s).abs().amax(0) / s.abs().amax(0)).max()) <= 1e-10
    assert (kind.dual_margin(-kind.conjugate_gradient(s)) > 0).all()


@pytest.mark.parametrize("name", ["exponential", "power", "extreme_power"])
def test_a_shortened_step_stays_inside(name):
    kind, cone = SCALINGS[name]
    s, y = points_inside(kind, cone, 3)
    g = torch.Generator().manual_seed(6)
    ds, dy = normal(g, *s.shape), normal(g, *s.shape)
    length = kind.at(s, y).shorten(torch.ones(4, 1, dtype=torch.float64), ds, dy)
    s, y = (part + length.unsqueeze(2) * step for part, step in ((s, ds), (y, dy)))
    assert (kind.primal_margin(s.movedim(-1, 0)) > 0).all()
    assert (kind.dual_margin(y.movedim(-1, 0)) > 0).all()


def test_entropy_with_tiny_entries_has_softmax_for_its_solution():
    """minimise c'x + sum x log x over the simplex, for costs far apart."""
    n, g = 6, torch.Generator().manual_seed(10)
    c = normal(g, 4, n) * 8
    rows, columns = 3 * n + 1, 2 * n
    A, b = (
        torch.zeros(1, rows, columns, dtype=torch.float64),
        torch.zeros(1, rows, dtype=torch.float64),
    )
    A[0, 0, :n], b[0, 0] = 1, 1
    for k in range(n):  # (-t, x, 1) in K:  t >= x log x
        A[0, 1 + 3 * k, n + k], A[0, 2 + 3 * k, k], b[0, 3 + 3 * k] = 1, -1, 1
    q = torch.cat([c, torch.ones_like(c)], 1)
    data = data_of(
        [Zero(1), *[Exponential()] * n],
        torch.zeros(1, columns, columns, dtype=torch.float64),
        q,
        A,
        b,
    )
    answer = solve_data(data, 1e-8)
    assert (answer.status == Status.SOLVED).all()
    assert float((answer.x[:, :n] - torch.softmax(-c, 1)).abs().max()) <= 1e-4


def test_how_a_row_ends_is_not_roundings_choice():
    """At the tolerance of a layer, whatever the last digit of the data: linear costs over every
    product of cones."""
    g = torch.Generator().manual_seed(11)
    for name, cones in CONES.items():
        parts, _ = planted("linear", cones, seed=13)
        noisy = [part.repeat(20, *[1] * (part.dim() - 1)) for part in parts]
        noisy = [part * (1 + 1e-15 * normal(g, *part.shape)) for part in noisy]
        scaled, _ = normalise(data_of(cones, *noisy))
        assert (solve_data(scaled, 1e-8).status == Status.SOLVED).all(), name

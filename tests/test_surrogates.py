"""Surrogate gradients are what their definitions say, by closed forms, differences of CVXPY's
optimal values and enumeration."""

import math
from dataclasses import replace
from typing import NamedTuple

import cvxpy as cp
import numpy as np
import pytest
import torch
from oracles import qp_adjoint

from convlayer.cones import Nonnegative, Product, SecondOrder, Zero
from convlayer.conic.adjoint import pull_back
from convlayer.conic.program import Data, Program
from convlayer.paths import surrogates
from convlayer.paths.surrogates import blackbox, lpgd, perturbed
from convlayer.solution import Status
from convlayer.solvers import SOLVERS
from convlayer.solvers.dealing import solve_batch


def solve(data):
    points = solve_batch(SOLVERS["clarabel"], 1e-11, {}, data, None, None)
    return points.x, points.y, points.status >= Status.INFEASIBLE


def unreachable(data):
    raise AssertionError("nothing was to be solved")


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def data_of(P, q, A, b, cones, entries=None):
    """Matrices (B or 1, ., .) as Data: A's pattern is full, P's the given upper entries, or where P
    is not zero."""
    m, n = A.shape[-2:]
    entries = torch.triu((P != 0).any(0)) if entries is None else entries
    P_cols, P_rows = torch.nonzero(entries.mT, as_tuple=True)
    A_cols, A_rows = np.divmod(np.arange(n * m), m)
    program = Program(n, m, Product(cones), P_rows.numpy(), P_cols.numpy(), A_rows, A_cols)
    return Data(program, P[:, P_rows, P_cols], q, A[:, A_rows, A_cols], b)


def simplex(q):
    """minimise q'x over the simplex."""
    n = q.shape[1]
    A = torch.cat([torch.ones(1, n), -torch.eye(n)]).double().unsqueeze(0)
    b = torch.cat([torch.ones(1, 1), torch.zeros(1, n)], 1).double()
    return data_of(torch.zeros(1, n, n).double(), q, A, b, [Zero(1), Nonnegative(n)])


def quadratic(batch=3, n=5, m=9, seed=0):
    """Quadratic programs with a planted, strictly complementary solution, some rows active: (P, q,
    G, h), (x, y)."""
    L, G, x = (
        normal(batch, n, n, seed=seed),
        normal(batch, m, n, seed=seed + 1),
        normal(batch, n, seed=seed + 2),
    )
    P = L @ L.mT / n + 0.3 * torch.eye(n)
    y, s = (normal(batch, m, seed=seed + k).abs() + 0.3 for k in (3, 4))
    active = torch.arange(m) < n // 2
    y, s = torch.where(active, y, 0.0), torch.where(active, 0.0, s)
    q = -(P @ x.unsqueeze(2) + G.mT @ y.unsqueeze(2)).squeeze(2)
    return (P, q, G, (G @ x.unsqueeze(2)).squeeze(2) + s), (x, y)


class Bars(NamedTuple):
    """Cotangents of each row's stored entries; an off-diagonal entry of P stands for two."""

    P: torch.Tensor | None
    q: torch.Tensor
    A: torch.Tensor | None
    b: torch.Tensor | None


def bars_of(data, *arguments, **options):
    """What lpgd's secant makes of every entry."""
    secant, program = lpgd(data, *arguments, **options), data.program
    P_bar, A_bar = (
        pull_back(name, program, torch.arange(len(rows)), *secant)
        for name, rows in (("P", program.P_rows), ("A", program.A_rows))
    )
    return Bars(P_bar, -secant.w, A_bar, secant.u)


def close(got, expected, tolerance):
    """In units of the derivative."""
    return float((got - expected).norm()) <= tolerance * float(expected.norm())


@pytest.mark.parametrize("rho", [math.inf, 0.7])
@pytest.mark.parametrize("dense", [False, True])
def test_for_small_tau_lpgd_is_the_adjoint_by_the_active_set_of_the_augmented_program(rho, dense):
    """A quadratic program's solution is affine while its active set stays: there is no error of
    tau^2 to wait for."""
    (P, q, G, h), (x, y) = quadratic()
    x_bar, y_bar = normal(*x.shape, seed=8), normal(*y.shape, seed=9)
    data = data_of(P, q, G, h, [Nonnegative(y.shape[1])])
    bars = bars_of(data.to_dense() if dense else data, x, y, x_bar, y_bar, solve, tau=1e-3, rho=rho)
    i, j = data.program.P_rows, data.program.P_cols
    for k in range(len(x)):
        curved = (P[k] + torch.eye(len(x[k])) / rho).numpy()
        rest = [part[k].numpy() for part in (q, G, h, x, y, x_bar, y_bar)]
        P_bar, q_bar, G_bar, h_bar = (torch.from_numpy(part) for part in qp_adjoint(curved, *rest))
        assert close(bars.P[k], P_bar[i, j] * torch.from_numpy(np.where(i == j, 1.0, 2.0)), 1e-6)
        assert close(bars.q[k], q_bar, 1e-6)
        assert close(bars.A[k], G_bar[data.program.A_rows, data.program.A_cols], 1e-6)
        assert close(bars.b[k], h_bar, 1e-6)


def test_lpgd_tends_to_the_derivative_as_tau_squared_over_a_ball():
    """minimise q'x subject to |x| <= 1:  x = -q/|q|,  dx = -(I - xx') dq / |q|."""
    q, x_bar = normal(4, 3, seed=1), normal(4, 3, seed=2)
    A = torch.cat([torch.zeros(1, 3), -torch.eye(3)]).double().unsqueeze(0)
    data = data_of(torch.zeros(1, 3, 3).double(), q, A, tensor([1, 0, 0, 0]), [SecondOrder(4)])
    norm = q.norm(dim=1, keepdim=True)
    x, y = -q / norm, torch.cat([norm, q], 1)
    exact = -(x_bar - x * (x * x_bar).sum(1, keepdim=True)) / norm
    errors = []
    for tau in (0.04, 0.02, 0.01):
        got = bars_of(data, x, y, x_bar, torch.zeros(4, 4).double(), solve, tau).q
        t = tau * q.abs().amax(1, keepdim=True) / x_bar.abs().amax(1, keepdim=True)
        up, low = q + t * x_bar, q - t * x_bar
        assert close(
            got,
            (low / low.norm(dim=1, keepdim=True) - up / up.norm(dim=1, keepdim=True)) / (2 * t),
            1e-6,
        )
        errors.append(float((got - exact).norm()))
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.05)
    assert errors[1] / errors[2] == pytest.approx(4, rel=0.05)


def optimal_value(P, q, A, b, x_0, curvature):
    x = cp.Variable(len(q))
    L = np.linalg.cholesky(P + 1e-30 * np.eye(len(q))) if P.any() else np.zeros_like(P)
    objective = cp.sum_squares(L.T @ x) / 2 + q @ x + curvature / 2 * cp.sum_squares(x - x_0)
    tight = dict.fromkeys(("tol_gap_abs", "tol_gap_rel", "tol_feas"), 1e-12)
    return cp.Problem(cp.Minimize(objective), [A @ x <= b]).solve(solver=cp.CLARABEL, **tight)


@pytest.mark.dear
@pytest.mark.parametrize("rho", [math.inf, 0.5])
@pytest.mark.parametrize("kind", ["quadratic", "diagonal in part", "linear"])
def test_lpgd_is_the_gradient_of_the_average_envelope_by_differences_of_optimal_values(kind, rho):
    """(V(q + t x_bar, b - t y_bar) - V(q - t x_bar, b + t y_bar)) / 2t, t large enough for the
    active set to change."""
    n, tau = 3, 3.0
    A = torch.cat([torch.eye(n), -torch.eye(n), normal(1, n, seed=3)]).double()
    b, q = normal(2 * n + 1, seed=4).abs() + 0.5, normal(n, seed=5)
    L = normal(n, n, seed=6)
    P = {
        "quadratic": L @ L.mT,
        "diagonal in part": torch.diag(tensor(1.3, 0, 0.4)),
        "linear": torch.zeros(n, n),
    }[kind]
    data = data_of(P.double()[None], q[None], A[None], b[None], [Nonnegative(len(b))])
    x, y, _ = solve(data)
    x_bar, y_bar = normal(1, n, seed=7), 0.2 * normal(1, len(b), seed=8)
    bars = bars_of(data, x, y, x_bar, y_bar, solve, tau, rho)
    q_size = max(float(q.abs().max()), float((P.double() @ x[0]).abs().max()))
    b_size = max(float(b.abs().max()), float((A @ x[0]).abs().max()))
    t = tau / max(float(x_bar.abs().max()) / q_size, float(y_bar.abs().max()) / b_size)

    def envelope(P, q, A, b):
        ends = (
            optimal_value(
                P,
                q + k * t * x_bar[0].numpy(),
                A,
                b - k * t * y_bar[0].numpy(),
                x[0].numpy(),
                1 / rho,
            )
            for k in (1, -1)
        )
        up, low = ends
        return (up - low) / (2 * t)

    parts = [part.double().numpy() for part in (P, q, A, b)]
    program = data.program
    places = [
        list(zip(program.P_rows, program.P_cols)),
        range(n),
        list(zip(program.A_rows, program.A_cols)),
        range(len(b)),
    ]
    h = 1e-4
    for which, (bar, entries) in enumerate(zip(bars, places)):
        differences = []
        for entry in entries:
            values = []
            for sign in (h, -h):
                moved = [part.copy() for part in parts]
                for place in {entry, entry[::-1]} if which == 0 else {entry}:
                    moved[which][place] += sign
                values.append(envelope(*moved))
            differences.append((values[0] - values[1]) / (2 * h))
        assert np.abs(bar[0].numpy() - differences).max(initial=0.0) <= 1e-4 * np.abs(
            differences
        ).max(initial=1.0)
    assert not close(bars.q, bars_of(data, x, y, x_bar, y_bar, solve, 1e-3, rho).q, 0.1), (
        "no active set changed"
    )


def test_perturbed_is_the_derivative_of_the_normal_distribution_function_on_the_simplex():
    """n = 2:  E x_1 = Phi((q_2 - q_1) / r),  r = s sqrt(2) where both costs move and s where one does."""
    rows, q = 400, tensor(0.5, 1.0)
    data = simplex(q.expand(rows, 2))
    sigma, x_bar = 0.6, tensor(2.0, -1.0).expand(rows, 2)
    for moving, r in (([True, True], sigma * 1.0 * math.sqrt(2)), ([True, False], sigma * 0.5)):
        got = perturbed(data, x_bar, solve, sigma, samples=24, seed=0, moving=torch.tensor(moving))
        density = math.exp(-0.5 * (0.5 / r) ** 2) / math.sqrt(2 * math.pi) / r
        expected = -3.0 * density * tensor(1, -1) * torch.tensor(moving)
        error = got.std(0) / math.sqrt(rows)
        assert ((got.mean(0) - expected).abs() <= 4 * error).all()
        assert float(error.max()) <= 0.05 * float(expected.abs().max())
        assert (got[:, ~torch.tensor(moving)] == 0).all()


def test_the_noise_is_that_of_the_seed_and_of_each_row_its_own():
    data, x_bar, moving = (
        simplex(normal(1, 4, seed=0).expand(3, 4)),
        tensor(1, 0, -1, 2).expand(3, 4),
        torch.ones(4) > 0,
    )
    first, again, other = (
        perturbed(data, x_bar, solve, 1.0, 8, seed, moving) for seed in (5, 5, 6)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first[0], first[1])
    partly = perturbed(data, x_bar * tensor(0, 1, 0)[:, None], solve, 1.0, 8, 5, moving)
    assert close(partly[1], first[1], 1e-7)
    assert (partly[[0, 2]] == 0).all()


def test_blackbox_is_the_gradient_of_the_interpolated_loss_by_enumeration_of_vertices():
    q, x_bar = normal(6, 4, seed=1).abs() + 0.2, normal(6, 4, seed=2)
    data, moving = simplex(q), torch.tensor([True, True, True, False])
    x = torch.eye(4).double()[q.argmin(1)]
    got = blackbox(data, x, x_bar, solve, 1.5, moving)
    t = 1.5 * q[:, :3].abs().amax(1) / x_bar.abs().amax(1)

    def interpolation(q):
        return ((q + t[:, None] * x_bar).amin(1) - q.amin(1)) / t

    h = 1e-6
    differences = torch.stack(
        [(interpolation(q + h * e) - interpolation(q - h * e)) / (2 * h) for e in torch.eye(4)], 1
    )
    assert close(got, differences, 1e-6)
    assert int((differences != 0).any(1).sum()) >= 3


def surrogate_gradients(data, x, y, x_bar, solve=solve):
    moving = torch.ones(x.shape[1], dtype=torch.bool)
    return {
        "lpgd": bars_of(data, x, y, x_bar, torch.zeros_like(y), solve, 1.5),
        "lpgd with rho": bars_of(data, x, y, x_bar, torch.zeros_like(y), solve, 1.5, rho=2.0),
        "blackbox": Bars(None, blackbox(data, x, x_bar, solve, 1.5, moving), None, None),
        "perturbed": Bars(None, perturbed(data, x_bar, solve, 0.7, 32, 0, moving), None, None),
    }


def linear():
    q = tensor([0.4, 0.5, 0.9, 1.0], [0.5, 1.0, 0.6, 0.7])
    data = simplex(q)
    return data, *solve(data)[:2], tensor([1.0, -1.0, 0.5, 0.2], [2.0, 1.0, -1.0, 0.3])


def test_at_a_vertex_where_the_derivative_is_zero_a_surrogate_descends():
    data, x, y, x_bar = linear()
    nearby = solve(replace(data, q=data.q + 1e-3 * normal(2, 4)))[0]
    assert float((nearby - x).abs().max()) < 1e-6
    for name, bars in surrogate_gradients(data, x, y, x_bar).items():
        step = bars.q / bars.q.abs().amax(1, keepdim=True)
        moved = solve(replace(data, q=data.q - step))[0]
        assert ((x_bar * moved).sum(1) < (x_bar * x).sum(1) - 0.1).all(), name


@pytest.mark.parametrize("scale", [2.0**-30, 2.0**30])  # powers of two: nothing rounds otherwise
def test_a_scaled_loss_scales_the_gradient_exactly(scale):
    data, x, y, x_bar = linear()
    plain, scaled = (surrogate_gradients(data, x, y, k * x_bar) for k in (1, scale))
    for name, bars in plain.items():
        for a, b in zip(bars, scaled[name]):
            assert (a is None and b is None) or torch.equal(scale * a, b), name


def test_the_perturbation_is_relative_to_the_programs_units():
    """Costs times c and lengths times d: the cotangent of q has the units of x over q."""
    (P, q, G, h), (x, y) = quadratic()
    x_bar, y_bar, c, d = normal(*x.shape, seed=8), normal(*y.shape, seed=9), 100.0, 0.1
    plain = bars_of(data_of(P, q, G, h, [Nonnegative(9)]), x, y, x_bar, y_bar, solve, 0.5)
    other = data_of(P * c / d**2, q * c / d, G, h * d, [Nonnegative(9)])
    scaled = bars_of(other, x * d, y * c / d, x_bar / d, y_bar * d / c, solve, 0.5)
    assert close(scaled.q, plain.q * d / c, 1e-6)
    assert close(scaled.b, plain.b / d, 1e-6)


def test_a_zero_cotangent_gives_zero_and_solves_nothing():
    data, x, y, x_bar = linear()
    for bars in surrogate_gradients(data, x, y, 0 * x_bar, unreachable).values():
        assert all(part is None or not part.any() for part in bars)


def step_of(data, x, y, x_bar, y_bar, tau):
    """The t with which lpgd perturbs q and b."""
    seen = []
    bars_of(data, x, y, x_bar, y_bar, lambda data: (seen.append(data), *solve(data))[1:], tau)
    first = seen[0].rows(torch.arange(len(x)))
    change = torch.cat([first.q - data.q, first.b - data.b], 1)
    return float(change.abs().max() / torch.cat([x_bar, y_bar], 1).abs().max())


def test_where_objective_and_solution_vanish_units_are_ones():
    """minimise |x|^2 / 2: nothing but P has a size, and the solution is only zero to rounding."""
    P, none = 2 * torch.eye(2).double()[None], torch.zeros(1, 0).double()
    data = data_of(P, torch.zeros(1, 2).double(), torch.zeros(1, 0, 2).double(), none, [])
    assert step_of(
        data, tensor([1e-17, 0.0]), none, tensor([4.0, -1.0]), none, 0.1
    ) == pytest.approx(0.1 * 2 / 4)


def test_a_bound_at_infinity_is_no_unit():
    """minimise |x|^2 / 2 - x subject to x <= 1e20, x <= 0.5."""
    data = data_of(
        torch.ones(1, 1, 1).double(),
        tensor([-1.0]),
        tensor([1], [1])[None],
        tensor([1e20, 0.5]),
        [Nonnegative(2)],
    )
    got = step_of(data, tensor([0.5]), tensor([0, 0.5]), tensor([0.0]), tensor([0.0, 2.0]), 0.1)
    assert got == pytest.approx(0.1 * 0.5 / 2)


def test_pieces_and_shared_values_change_nothing(monkeypatch):
    data, x, y, x_bar = linear()
    expected = surrogate_gradients(data, x, y, x_bar)
    own = Data(
        data.program,
        *(part.expand(2, -1).contiguous() for part in (data.P, data.q, data.A, data.b)),
    )
    monkeypatch.setattr(surrogates, "AT_ONCE", 1)
    for other in (data, own, own.to_dense()):
        for name, bars in surrogate_gradients(other, x, y, x_bar).items():
            for got, reference in zip(bars, expected[name]):
                assert (got is None and reference is None) or close(got, reference, 1e-6), name


def test_lpgd_with_one_side_unsolved_is_the_other_sides_envelope_and_leaves_other_rows_alone():
    """minimise x^2/2 - 2.5x subject to 0 <= x <= b:  b = 1 - 2 is infeasible, at b = 1 + 2 the bound lets go."""
    P, A = torch.ones(1, 1, 1).double(), tensor([1], [-1])[None]
    data = data_of(P, tensor([-2.5], [-2.5]), A, tensor([1.0, 0.0], [2.0, 0.0]), [Nonnegative(2)])
    x, y = tensor([1.0], [2.0]), tensor([1.5, 0.0], [0.5, 0.0])
    x_bar, y_bar = tensor([0.0], [1.0]), tensor([1.0, 0.0], [0.0, 0.0])
    bars = bars_of(data, x, y, x_bar, y_bar, solve, 2.0)
    assert bars.q[0].tolist() == pytest.approx([(1 - 2.5) / 2], rel=1e-6)
    assert bars.b[0].tolist() == pytest.approx([-(1.5 - 0) / 2, 0], rel=1e-6, abs=1e-6)
    alone = bars_of(data.rows(torch.tensor([1])), x[1:], y[1:], x_bar[1:], y_bar[1:], solve, 2.0)
    for part, reference in zip(bars, alone):
        assert close(part[1], reference[0], 1e-6)


def test_a_row_that_cannot_be_solved_is_nan_and_leaves_other_rows_alone():
    """minimise q x subject to x >= 0: unbounded as soon as the cost is negative."""
    data = data_of(
        torch.zeros(1, 1, 1).double(),
        tensor([1], [1]),
        tensor([-1])[None],
        tensor([0]),
        [Nonnegative(1)],
    )
    x, moving = torch.zeros(2, 1).double(), torch.tensor([True])
    q_bar = blackbox(data, x, tensor([-1], [1]), solve, 2.0, moving)
    assert torch.isnan(q_bar[0]).all()
    assert float(q_bar[1].abs()) < 1e-6
    q_bar = perturbed(data, tensor([1], [0]), solve, 10.0, 8, 0, moving)
    assert torch.isnan(q_bar[0]).all()
    assert float(q_bar[1]) == 0
    both = bars_of(
        data,
        x,
        tensor([1], [1]),
        tensor([1], [0]),
        x,
        lambda data: (*solve(data)[:2], data.q[:, 0] > -9),
        0.5,
    )
    for part in (both.q, both.A, both.b):
        assert torch.isnan(part[0]).all()
        assert (part[1] == 0).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda data, x, y, every: bars_of(data, x, y, x, y, unreachable, 0.0), "tau is 0.0"),
        (
            lambda data, x, y, every: bars_of(data, x, y, x, y, unreachable, 1.0, rho=-1.0),
            "rho is -1.0",
        ),
        (
            lambda data, x, y, every: blackbox(data, x, x, unreachable, math.inf, every),
            "lam is inf",
        ),
        (
            lambda data, x, y, every: perturbed(data, x, unreachable, math.nan, 8, 0, every),
            "sigma is nan",
        ),
        (
            lambda data, x, y, every: perturbed(data, x, unreachable, 1.0, 7, 0, every),
            "samples is 7",
        ),
        (
            lambda data, x, y, every: perturbed(data, x, unreachable, 1.0, 8, 0, every),
            "objective is quadratic",
        ),
        (lambda data, x, y, every: blackbox(data, x, x, unreachable, 1.0, every), "Use `lpgd`"),
    ],
)
def test_what_has_no_meaning_is_refused(call, message):
    (P, q, G, h), (x, y) = quadratic()
    with pytest.raises(ValueError, match=message):
        call(data_of(P, q, G, h, [Nonnegative(9)]), x, y, torch.ones(5, dtype=torch.bool))

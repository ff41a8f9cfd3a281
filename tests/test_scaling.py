"""Units: data in other units give the answer in other units, to 1e-8, and nothing is called SOLVED
that is wrong."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import cvxpy as cp
import pytest
import torch
from cases import leaves, relative
from torch import Tensor

from convlayer import AccuracyWarning, ConvexLayer, Status

FACTORS = (1e-9, 1e-6, 1e-3, 1e3, 1e6, 1e9)


@dataclass(frozen=True, eq=False)
class Scaled:
    """A problem whose units of x, of the cost and of each row can be changed.

    `change(values, x, cost, rows)` gives the data in units in which x is x times as large, the
    objective `cost` times and each constraint row `rows` times; x then comes out times x,
    multipliers times cost / rows.
    """

    declare: Callable[[], tuple]
    sample: Callable[[torch.Generator], list[Tensor]]
    change: Callable
    rows: int  # of constraints whose scale is free


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def definite(generator: torch.Generator, n: int) -> Tensor:
    W = normal(generator, n, n)
    return torch.eye(n, dtype=torch.float64) + W @ W.mT / n


def quadratic_program():
    P, q = cp.Parameter((4, 4), PSD=True, name="P"), cp.Parameter(4, name="q")
    G, h = cp.Parameter((5, 4), name="G"), cp.Parameter(5, name="h")
    A, b, x = cp.Parameter((1, 4), name="A"), cp.Parameter(1, name="b"), cp.Variable(4, name="x")
    below, equal = G @ x <= h, A @ x == b
    problem = cp.Problem(cp.Minimize(0.5 * cp.quad_form(x, P) + q @ x), [below, equal])
    return problem, [P, q, G, h, A, b], x, [below.dual_variables[0], equal.dual_variables[0]]


def sample_quadratic_program(g):
    inside, G, A = normal(g, 4, 1), normal(g, 5, 4), normal(g, 1, 4)
    h = (G @ inside).squeeze(-1) + 0.1 + torch.rand(5, generator=g, dtype=torch.float64)
    return [definite(g, 4), 3 * normal(g, 4), G, h, A, (A @ inside).squeeze(-1)]


def change_quadratic_program(values, x, cost, rows):
    P, q, G, h, A, b = values
    r, e = rows[:5], rows[5:]
    P = cost * P / (x.unsqueeze(1) * x.unsqueeze(0)) if x.ndim else cost * P / x**2
    return [P, cost * q / x, r.unsqueeze(1) * G / x, r * h, e.unsqueeze(1) * A / x, e * b]


def linear_program():
    c, G, h = cp.Parameter(3, name="c"), cp.Parameter((7, 3), name="G"), cp.Parameter(7, name="h")
    x = cp.Variable(3, name="x")
    below = G @ x <= h
    return cp.Problem(cp.Minimize(c @ x), [below]), [c, G, h], x, [below.dual_variables[0]]


def sample_linear_program(g):
    G = torch.cat([normal(g, 4, 3), torch.eye(3, dtype=torch.float64)])
    G[:3] = -G[:3].abs()
    return [
        -G.mT @ torch.rand(7, generator=g, dtype=torch.float64),
        G,
        0.5 + torch.rand(7, generator=g, dtype=torch.float64),
    ]


def change_linear_program(values, x, cost, rows):
    c, G, h = values
    return [cost * c / x, rows.unsqueeze(1) * G / x, rows * h]


def ball():
    c, A, b, r = (
        cp.Parameter(4, name="c"),
        cp.Parameter((3, 4), name="A"),
        cp.Parameter(3, name="b"),
        cp.Parameter(name="r"),
    )
    w, x = cp.Parameter(nonneg=True, name="w"), cp.Variable(4, name="x")
    cone = cp.SOC(r, A @ x - b)
    return (
        cp.Problem(cp.Minimize(c @ x + w * cp.sum_squares(x)), [cone]),
        [c, A, b, r, w],
        x,
        [cone.dual_variables[0], cone.dual_variables[1]],
    )


def sample_ball(g):
    return [
        5 * normal(g, 4),
        normal(g, 3, 4),
        0.1 * normal(g, 3),
        torch.tensor(0.5, dtype=torch.float64),
        torch.tensor(0.8, dtype=torch.float64),
    ]


def change_ball(values, x, cost, rows):
    c, A, b, r, w = values
    return [cost * c / x, rows[0] * A / x, rows[0] * b, rows[0] * r, cost * w / x**2]


def semidefinite():
    C, D, X = (
        cp.Parameter((3, 3), symmetric=True, name="C"),
        cp.Parameter((3, 3), symmetric=True, name="D"),
        cp.Variable((3, 3), symmetric=True, name="X"),
    )
    t, w = cp.Parameter(name="t"), cp.Parameter(nonneg=True, name="w")
    above, trace = X >> D, cp.trace(X) == t
    return (
        cp.Problem(cp.Minimize(cp.trace(C @ X) + w * cp.sum_squares(X)), [above, trace]),
        [C, D, t, w],
        X,
        [above.dual_variables[0], trace.dual_variables[0]],
    )


def sample_semidefinite(g):
    C, D = normal(g, 3, 3), normal(g, 3, 3)
    C, D = (C + C.mT) / 2, 0.2 * (D + D.mT)
    return [C, D, D.trace() + 1, torch.tensor(0.3, dtype=torch.float64)]


def change_semidefinite(values, x, cost, rows):
    C, D, t, w = values
    return [cost * C / x, x * D, x * t, cost * w / x**2]


PROBLEMS = {
    "quadratic_program": Scaled(
        quadratic_program, sample_quadratic_program, change_quadratic_program, 6
    ),
    "linear_program": Scaled(linear_program, sample_linear_program, change_linear_program, 7),
    "ball": Scaled(ball, sample_ball, change_ball, 1),
    "semidefinite": Scaled(semidefinite, sample_semidefinite, change_semidefinite, 0),
}
every_problem = pytest.mark.parametrize("name", PROBLEMS)
ONE = torch.tensor(1.0, dtype=torch.float64)


def solve(name: str, x=ONE, cost=1.0, rows=None, seed: int = 0):
    """(status, x in the first units, gradient of a functional of it, multipliers) with the data in
    the units given."""
    scaled = PROBLEMS[name]
    problem, parameters, variable, duals = scaled.declare()
    layer = ConvexLayer(problem, parameters, [variable, *duals], on_failure="keep")
    generator = torch.Generator().manual_seed(seed)
    values = leaves(scaled.sample(generator))
    rows = torch.ones(scaled.rows, dtype=torch.float64) if rows is None else rows
    changed = scaled.change(values, x, cost, rows)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        solution = layer.solve(*changed)
        found = solution.variables[0] / x
        functional = (found * normal(generator, *found.shape)).sum() + solution.objective / cost
        bars = torch.autograd.grad(functional, values, retain_graph=True)
    return solution, found.detach(), bars


def agree(name: str, required: bool = True, seed: int = 0, **units) -> None:
    _, expected, bars_expected = solve(name, seed=seed)
    solution, found, bars = solve(name, seed=seed, **units)
    status = Status(int(solution.status))
    assert status == Status.SOLVED or not required, (
        f"{status.name}, residual {float(solution.residual):.1e}"
    )
    if status == Status.SOLVED:
        assert relative(found, expected) < 1e-8
        size = [
            float(b.norm() * v.norm())
            for b, v in zip(bars_expected, values_of(name, seed), strict=True)
        ]
        for bar, reference, value in zip(bars, bars_expected, values_of(name, seed), strict=True):
            error = float((bar - reference).norm() * value.norm())
            assert error <= 1e-7 * max(size) or bool(solution.degenerate), (
                "a wrong gradient that is not flagged"
            )


def values_of(name: str, seed: int) -> list[Tensor]:
    return PROBLEMS[name].sample(torch.Generator().manual_seed(seed))


@every_problem
@pytest.mark.parametrize("factor", FACTORS)
def test_units_of_the_cost(name, factor):
    agree(name, cost=factor)


@every_problem
@pytest.mark.parametrize("factor", FACTORS)
def test_units_of_x(name, factor):
    agree(name, x=torch.tensor(factor, dtype=torch.float64))


@every_problem
@pytest.mark.parametrize("factor", FACTORS)
def test_units_of_all_rows(name, factor):
    agree(name, rows=torch.full((PROBLEMS[name].rows,), factor, dtype=torch.float64))


@pytest.mark.dear
@pytest.mark.parametrize("name", ["quadratic_program", "linear_program"])
@pytest.mark.parametrize("factor", FACTORS)
def test_units_of_one_row_after_another(name, factor):
    for row in range(PROBLEMS[name].rows):
        rows = torch.ones(PROBLEMS[name].rows, dtype=torch.float64)
        rows[row] = factor
        agree(name, rows=rows)


@pytest.mark.dear
@pytest.mark.parametrize("name", ["quadratic_program", "linear_program"])
@pytest.mark.parametrize("factor", FACTORS)
def test_units_of_one_variable_after_another(name, factor):
    """SOLVED and wrong is never allowed; SOLVED is required up to a million."""
    n = 4 if name == "quadratic_program" else 3
    for k in range(n):
        x = torch.ones(n, dtype=torch.float64)
        x[k] = factor
        agree(name, required=1e-6 <= factor <= 1e6, x=x)


@every_problem
@pytest.mark.parametrize("seed", range(4))
def test_mixed_units(name, seed):
    generator = torch.Generator().manual_seed(100 + seed)

    def powers(*shape, span):
        return 10.0 ** (
            span * (2 * torch.rand(*shape, generator=generator, dtype=torch.float64) - 1)
        )

    for span, required in ((2.0, True), (9.0, False)):
        units = {
            "cost": float(powers(1, span=span)),
            "rows": powers(PROBLEMS[name].rows, span=span),
        }
        x = (
            powers(4 if name == "quadratic_program" else 3, span=span)
            if name in ("quadratic_program", "linear_program")
            else powers(1, span=span)[0]
        )
        agree(name, required=required, seed=seed, x=x, **units)


# Bounds that are as good as none
# ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bound", [1e3, 1e5, 1e7, 1e9, 1e12, 1e16, 1e20])
@pytest.mark.parametrize("quadratic", [True, False])
def test_a_huge_bound_changes_nothing(bound, quadratic):
    generator = torch.Generator().manual_seed(0)
    A, b = normal(generator, 6, 3), normal(generator, 6)
    upper, a, x = cp.Parameter(3, name="upper"), cp.Parameter(6, name="a"), cp.Variable(3, name="x")
    misfit = A.numpy() @ x - a
    objective = cp.Minimize(cp.sum_squares(misfit) if quadratic else cp.norm1(misfit))
    layer = ConvexLayer(cp.Problem(objective, [x <= upper, x >= -upper]), [upper, a], [x])
    free = ConvexLayer(cp.Problem(objective), [a], [x])
    limits, inputs, plain = (
        torch.full((3,), bound, dtype=torch.float64).requires_grad_(),
        b.clone().requires_grad_(),
        b.clone().requires_grad_(),
    )
    w = normal(generator, 3)
    (got,) = layer(limits, inputs)
    (expected,) = free(plain)
    assert relative(got.detach(), expected.detach()) < 1e-8
    upper_bar, a_bar = torch.autograd.grad(got, (limits, inputs), w)
    assert relative(a_bar, torch.autograd.grad(expected, plain, w)[0]) < 1e-7
    assert float(upper_bar.abs().max()) == 0.0


@pytest.mark.parametrize("bound", [1e3, 1e7, 1e9, 1e12])
def test_a_huge_bound_that_is_active_is_obeyed_or_flagged(bound):
    c, upper, x = cp.Parameter(2, name="c"), cp.Parameter(2, name="upper"), cp.Variable(2, name="x")
    layer = ConvexLayer(
        cp.Problem(cp.Minimize(c @ x), [x <= upper, x >= 0]), [c, upper], [x], on_failure="keep"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AccuracyWarning)
        solution = layer.solve(
            torch.tensor([-1.0, 1.0], dtype=torch.float64),
            torch.tensor([bound, 1.0], dtype=torch.float64),
        )
    if int(solution.status) == Status.SOLVED:
        assert float(solution.variables[0][0]) == pytest.approx(bound, rel=1e-8)
        assert abs(float(solution.variables[0][1])) <= 1e-8 * bound


@pytest.mark.parametrize("small", [1e-3, 1e-5, 1e-7, 1e-9, 1e-11])
def test_one_small_entry_of_the_data_beside_ones(small):
    """The nonnegative part of a vector, with an entry near zero."""
    for values in ([small, 1.0], [small, -1.0], [-small, 1.0], [small, 1.0, 2.0, -1.0]):
        value = torch.tensor(values, dtype=torch.float64)
        a, x = cp.Parameter(len(values), name="a"), cp.Variable(len(values), name="x")
        layer = ConvexLayer(cp.Problem(cp.Minimize(cp.sum_squares(x - a)), [x >= 0]), [a], [x])
        expected = value.clamp(min=0)
        assert float((layer(value)[0] - expected).norm()) <= 1e-8 * float(
            expected.norm()
        ) + 1e-14 * float(value.norm())


# Conditioning
# -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("condition", [1.0, 1e2, 1e4, 1e6, 1e8, 1e10])
@pytest.mark.parametrize("tail", [0.0, 1.0])
def test_conditioned_least_squares_is_that_of_a_pseudo_inverse(condition, tail):
    """x = (A'A + tail)^-1 A'b in many digits' reach: error at most rounding times the condition of
    A'A."""
    generator = torch.Generator().manual_seed(1)
    U, V = (torch.linalg.qr(normal(generator, 5, 5)).Q for _ in range(2))
    A = (
        U
        * torch.logspace(
            0, -torch.log10(torch.tensor(condition)).item() / 2, 5, dtype=torch.float64
        )
        @ V.mT
    )
    b = normal(generator, 5)
    A_p, b_p, x = (
        cp.Parameter((5, 5), name="A"),
        cp.Parameter(5, name="b"),
        cp.Variable(5, name="x"),
    )
    layer = ConvexLayer(
        cp.Problem(cp.Minimize(cp.sum_squares(A_p @ x - b_p) + tail * cp.sum_squares(x))),
        [A_p, b_p],
        [x],
    )
    inputs = leaves([A, b])
    (got,) = layer(*inputs)
    w = normal(generator, 5)
    bars = torch.autograd.grad(got, inputs, w)
    exact = leaves([A, b])
    stacked = torch.cat([exact[0], tail**0.5 * torch.eye(5, dtype=torch.float64)])
    reference = torch.linalg.qr(stacked)
    expected = torch.linalg.solve_triangular(
        reference.R,
        (reference.Q.mT @ torch.cat([exact[1], torch.zeros(5, dtype=torch.float64)])).unsqueeze(1),
        upper=True,
    ).squeeze(1)
    expected_bars = torch.autograd.grad(expected, exact, w)
    reach = 1e-9 if tail else max(1e-9, 1e-14 * condition)
    assert relative(got.detach(), expected.detach()) < reach
    for bar, reference_bar in zip(bars, expected_bars, strict=True):
        assert relative(bar, reference_bar) < max(1e-7, reach)


@pytest.mark.parametrize("price", [1e-12, 1e-10, 1e-8, 1e-6, 1e-3, 1e3, 1e6, 1e9])
def test_a_logarithmic_barrier_at_any_price(price):
    """min p x - log x has x = 1/p: right to 1e-7, or to rounding of the 1 that stands beside x in
    the cone, or not called SOLVED."""
    p, x = cp.Parameter(name="p"), cp.Variable(name="x")
    layer = ConvexLayer(cp.Problem(cp.Minimize(p * x - cp.log(x))), [p], [x], on_failure="keep")
    leaf = torch.tensor(price, dtype=torch.float64, requires_grad=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        solution = layer.solve(leaf)
        (bar,) = torch.autograd.grad(solution.variables[0], leaf)
    if int(solution.status) == Status.SOLVED:
        rounding = 1e-15 * price
        assert float(solution.variables[0].detach()) * price == pytest.approx(
            1.0, rel=max(1e-7, rounding)
        )
        assert float(bar) * price**2 == pytest.approx(-1.0, rel=max(1e-6, 10 * rounding)) or bool(
            solution.degenerate
        )

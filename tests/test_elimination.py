"""Variables that an equality defines are taken out and put back, and nobody can tell."""

import warnings

import cvxpy as cp
import numpy as np
import pytest
import torch
from cases import CASES, close

from convlayer import AccuracyWarning, ConvexLayer, Status
from convlayer.cones import Nonnegative, Product, Zero
from convlayer.conic.elimination import Elimination
from convlayer.conic.kkt import Visible
from convlayer.conic.program import Data, Operators, Program
from convlayer.paths.evaluation import evaluate

ELIMINATED = [
    name for name, case in CASES.items() if case.shared._canonical.elimination is not None
]


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


def test_something_is_eliminated_at_all():
    assert {"lasso", "nonnegative_least_squares"} <= set(ELIMINATED)


@pytest.mark.parametrize("name", ELIMINATED)
def test_a_point_goes_in_and_comes_back_and_its_residual_with_it(name):
    """At any x of what is left, and any multipliers there: the residual before is that after, and
    zero where variables went."""
    case = CASES[name]
    canonical = case.shared._canonical
    elimination, program = canonical.elimination, canonical.program
    entries = [p.read(t) for p, t in zip(canonical.parameters, case.sample(2, seed=0), strict=True)]
    data, _ = evaluate(canonical, entries, False, torch.zeros((), dtype=torch.float64))
    data = data.widen(2)
    eliminated = elimination.enter(data)
    small = elimination.program
    x, s, y = normal(2, small.n), normal(2, small.m, seed=1), normal(2, small.m, seed=2)
    whole_x, whole_s, whole_y = eliminated.leave(x, s, y)
    for back, given in zip(
        eliminated.enter_point(whole_x, whole_s, whole_y), (x, s, y), strict=True
    ):
        assert torch.equal(back, given)
    before, after = Operators(data), Operators(eliminated.data)
    F1, F2 = before.P(whole_x) + data.q + before.At(whole_y), before.A(whole_x) + whole_s - data.b
    G1 = after.P(x) + eliminated.data.q + after.At(y)
    G2 = after.A(x) + s - eliminated.data.b
    assert F1[:, elimination.t].abs().max() <= 1e-12
    assert F2[:, elimination.r].abs().max() <= 1e-12
    assert close(F1[:, elimination.x], G1, 1e-12)
    assert close(F2[:, elimination.rows], G2, 1e-12)
    assert (small.n, small.m) == (program.n - len(elimination.t), program.m - len(elimination.r))


@pytest.mark.parametrize("condition", [1e0, 1e3, 1e5, 1e7])
def test_a_matrix_whose_square_is_too_ill_conditioned_is_not_squared(condition):
    """Nonnegative least squares with an interior solution: the oracle is the orthogonal
    factorisation."""
    generator = np.random.default_rng(0)
    U, _ = np.linalg.qr(generator.standard_normal((12, 6)))
    V, _ = np.linalg.qr(generator.standard_normal((6, 6)))
    F = U * np.geomspace(1, 1 / condition, 6) @ V.T
    x_true = np.abs(generator.standard_normal(6)) + 1
    g = F @ x_true + 1e-3 * (np.eye(12) - U @ U.T) @ generator.standard_normal(12)
    x, A, b = cp.Variable(6), cp.Parameter((12, 6)), cp.Parameter(12)
    layer = ConvexLayer(
        cp.Problem(cp.Minimize(cp.sum_squares(A @ x - b)), [x >= 0]), [A, b], [x], on_failure="keep"
    )
    assert layer._canonical.elimination is not None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AccuracyWarning)
        solution = layer.solve(torch.from_numpy(F), torch.from_numpy(g))
    error = float((solution.variables[0] - torch.from_numpy(x_true)).abs().max())
    if condition <= 1e5:
        assert int(solution.status) == Status.SOLVED
    if int(solution.status) == Status.SOLVED:
        assert error <= 1e-6
    if condition <= 1e3:
        assert solution.notes == ()


def test_both_spellings_of_a_quadratic_agree():
    L, P, q, G, h = (
        cp.Parameter((5, 5)),
        cp.Parameter((5, 5), PSD=True),
        cp.Parameter(5),
        cp.Parameter((7, 5)),
        cp.Parameter(7),
    )
    x = cp.Variable(5)
    rules = [G @ x <= h]
    by_factor = ConvexLayer(
        cp.Problem(cp.Minimize(cp.sum_squares(L @ x) / 2 + q @ x), rules), [L, q, G, h], [x]
    )
    by_matrix = ConvexLayer(
        cp.Problem(cp.Minimize(cp.quad_form(x, P) / 2 + q @ x), rules), [P, q, G, h], [x]
    )
    factor = (normal(4, 5, 5) + 3 * torch.eye(5, dtype=torch.float64)).requires_grad_()
    rest = [normal(4, 5, seed=1), normal(4, 7, 5, seed=2), normal(4, 7, seed=3).abs() + 0.1]
    (a,), (b,) = by_factor(factor, *rest), by_matrix(factor.mT @ factor, *rest)
    assert close(a, b, 1e-9)
    weights = normal(4, 5, seed=4)
    (a_bar,), (b_bar,) = (torch.autograd.grad(out, factor, weights) for out in (a, b))
    assert close(a_bar, b_bar, 1e-8)


@pytest.mark.parametrize(
    "order", [[Nonnegative(1), Zero(1)], [Zero(1), Nonnegative(1)]], ids=["last", "first"]
)
def test_the_equality_may_stand_anywhere_among_the_rows(order):
    """minimise x^2/2 + t^2 subject to t == x - 3, x >= 1:  x = 2, t = -1."""
    cones = Product(order)
    equal, bound = (int(cones.rows_of(kind).nonzero()) for kind in (Zero, Nonnegative))
    # t - x = -3 and -x + s = -1, by columns
    rows, columns = np.array([*sorted([equal, bound]), equal]), np.array([0, 0, 1])
    values = np.array([-1.0, -1.0, 1.0])
    program = Program(
        2, 2, cones, P_rows=np.arange(2), P_cols=np.arange(2), A_rows=rows, A_cols=columns
    )
    b = torch.zeros(1, 2, dtype=torch.float64)
    b[0, equal], b[0, bound] = -3.0, -1.0
    data = Data(
        program,
        tensor([[1.0, 2.0]]),
        tensor([[0.0, 0.0]]),
        torch.from_numpy(values).unsqueeze(0),
        b,
    )
    seen = Visible(torch.ones(2, dtype=torch.bool), torch.ones(2, dtype=torch.bool))
    elimination = Elimination.of(
        program, np.ones(3, dtype=bool), values, seen, lambda _, dense: 0.0 if dense else 1.0
    )
    assert (elimination.t.tolist(), elimination.r.tolist()) == ([1], [equal])
    assert elimination.program.cones == Product([Nonnegative(1)])
    inner = elimination.enter(data)
    assert (inner.data.P.item(), inner.data.q.item()) == (3.0, -6.0)
    x, s, y = inner.leave(tensor([[2.0]]), tensor([[1.0]]), tensor([[0.0]]))
    operators = Operators(data)
    assert x.tolist() == [[2.0, -1.0]]
    assert torch.equal(operators.A(x) + s, b)
    assert torch.equal(
        operators.P(x) + data.q + operators.At(y), torch.zeros(1, 2, dtype=torch.float64)
    )

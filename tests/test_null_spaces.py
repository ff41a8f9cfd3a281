"""Many null vectors of the KKT matrix: what is visible of them is told without a basis, by the same
laws as where they are few."""

import warnings

import cvxpy as cp
import numpy as np
import pytest
import torch
from cases import close, leaves
from test_degenerate import run, tensor

import convlayer.conic.kkt_base
import convlayer.paths.attempts
import convlayer.paths.cone_solution
import convlayer.paths.pieces
from convlayer import ConvexLayer, GradientWarning, Status
from convlayer.conic.kkt import DenseSystem, SparseSystem

MANY = 24  # more than are found one by one
either_system = pytest.mark.parametrize("dense", [True, False])


@pytest.fixture(autouse=True)
def system(request, monkeypatch):
    """The kind of system that is asked for; and that it did work without a basis."""
    dense, looked = request.node.callspec.params["dense"], []
    for module in (convlayer.paths.attempts, convlayer.paths.cone_solution):
        monkeypatch.setattr(module, "prefers_dense", lambda program: dense)
    monkeypatch.setattr(
        convlayer.declaration.canonical.Canonical, "elimination", property(lambda self: None)
    )
    original = convlayer.conic.kkt_base.KKTSystem._look_beyond

    def look(self, rows):
        looked.append(type(self))
        return original(self, rows)

    monkeypatch.setattr(convlayer.conic.kkt_base.KKTSystem, "_look_beyond", look)
    yield
    assert (DenseSystem if dense else SparseSystem) in looked, "the case is too easy"


@either_system
def test_repeated_constraints_are_harmless_where_no_one_looks_at_them(dense):
    a, x = cp.Parameter(MANY, name="a"), cp.Variable(MANY, name="x")
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x - a)), [x >= 0, x >= 0, 3 * x >= 0])
    signs = np.where(np.arange(MANY) < MANY - 2, -1.0, 1.0)
    _, (bar,), flagged = run(problem, [a], [x], tensor(signs), solver="clarabel")
    assert not flagged
    assert close(bar, tensor((signs > 0).astype(float)), 1e-9)


@either_system
def test_repeated_constraints_are_flagged_where_a_multiplier_is_an_output(dense):
    a, x = cp.Parameter(MANY, name="a"), cp.Variable(MANY, name="x")
    first = x >= 0
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x - a)), [first, x >= 0])
    assert run(
        problem, [a], [x, first.dual_variables[0]], tensor(-np.ones(MANY)), solver="clarabel"
    )[2]


@either_system
def test_redundant_equalities_that_parameters_move_are_flagged_and_differentiated_by_least_norm(
    dense,
):
    """x_k == b_k and 2 x_k == c_k: along (db, dc) = t (1, 2), which keeps the problem feasible, the
    derivative is that of x."""
    b, c, x = (
        kind(MANY, name=name)
        for kind, name in ((cp.Parameter, "b"), (cp.Parameter, "c"), (cp.Variable, "x"))
    )
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x)), [x == b, 2 * x == c])
    value = np.random.default_rng(0).standard_normal(MANY)
    _, (b_bar, c_bar), flagged = run(
        problem, [b, c], [x], tensor(value), tensor(2 * value), solver="clarabel"
    )
    assert flagged
    assert close(b_bar + 2 * c_bar, torch.ones(MANY, dtype=torch.float64), 1e-8)


@either_system
def test_underdetermined_least_squares_is_the_pseudo_inverse_and_flagged(dense):
    A = np.random.default_rng(0).standard_normal((3, 3 + MANY))
    b, x = cp.Parameter(3, name="b"), cp.Variable(3 + MANY, name="x")
    w = tensor(np.random.default_rng(1).standard_normal(3 + MANY))
    problem = cp.Problem(cp.Minimize(cp.sum_squares(A @ x - b)))
    _, (bar,), flagged = run(
        problem, [b], [x], tensor(1.0, 2.0, -1.0), cotangents=[w], solver="clarabel"
    )
    assert flagged
    assert close(bar, torch.from_numpy(np.linalg.pinv(A)).mT @ w, 1e-7)


@either_system
def test_rows_with_many_and_with_no_null_vectors_are_told_apart_in_one_batch(dense):
    """Pairs that share an amount at equal costs, in the second row alone: a face of solutions
    there."""
    c, h, x = (
        cp.Parameter((2, MANY), name="c"),
        cp.Parameter(MANY, name="h"),
        cp.Variable((2, MANY), name="x"),
    )
    problem = cp.Problem(cp.Minimize(cp.sum(cp.multiply(c, x))), [cp.sum(x, axis=0) == h, x >= 0])
    layer = ConvexLayer(problem, [c, h], [x], structure="generic", solver="clarabel")
    costs = np.random.default_rng(0).uniform(1, 2, (2, MANY))
    inputs = leaves(
        [tensor(np.stack([costs, 0 * costs + 1])), torch.ones(2, MANY, dtype=torch.float64)]
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GradientWarning)
        solution = layer.solve(*inputs)
        (bar,) = torch.autograd.grad(solution.variables[0].sum(), inputs[1:])
    assert (solution.status == Status.SOLVED).all()
    assert solution.degenerate.tolist() == [False, True]
    assert close(bar, torch.ones(2, MANY, dtype=torch.float64), 1e-7)

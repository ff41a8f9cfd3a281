"""Dense and sparse factorisation, with products by matrix and by index, give the same answers,
singular systems included."""

import warnings

import cvxpy as cp
import numpy as np
import pytest
import scipy.sparse as sp
import torch
from cases import CASES, close, leaves, weights

import convlayer.conic.polish
import convlayer.paths.attempts
import convlayer.paths.cone_solution
import convlayer.paths.pieces
from convlayer import ConvexLayer, GradientWarning, Status
from convlayer.conic.kkt import DenseSystem, SparseSystem
from convlayer.declaration.canonical import Canonical

every_case = pytest.mark.parametrize("name", CASES)


def force(monkeypatch, kind):
    """Dense or sparse whatever is cheaper, without eliminating a variable; "by rows" is dense, but
    each row stands alone."""
    made = []
    original = convlayer.conic.polish.factorise

    def factorise(operators, *arguments):
        made.append(original(operators, *arguments))
        return made[-1]

    monkeypatch.setattr(convlayer.conic.polish, "factorise", factorise)
    if kind == "as it comes":
        return made
    monkeypatch.setattr(Canonical, "elimination", property(lambda self: None))
    for module in (convlayer.paths.attempts, convlayer.paths.cone_solution):
        monkeypatch.setattr(module, "prefers_dense", lambda program: kind != "sparse")
    if kind == "by rows":
        monkeypatch.setattr(convlayer.paths.cone_solution, "WHOLE_ENTRIES", 0)
        monkeypatch.setattr(convlayer.paths.pieces, "DENSE_ENTRIES", 1)
    return made


def run(layer, tensors):
    inputs = leaves(tensors)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GradientWarning)
        solution = layer.solve(*inputs)
        outputs = [*solution.variables, solution.objective]
        cotangents = [w.expand_as(o) for w, o in zip(weights(outputs, 1), outputs, strict=True)]
        return solution, outputs, torch.autograd.grad(outputs, inputs, cotangents)


def compare(
    layer, tensors, monkeypatch, kinds=("dense", "sparse", "by rows", "as it comes"), tolerance=1e-9
):
    found = {}
    for kind in kinds:
        with monkeypatch.context() as patch:
            made = force(patch, kind)
            found[kind] = run(layer, tensors)
            if kind != "as it comes":
                assert {type(system) for system in made} == {
                    SparseSystem if kind == "sparse" else DenseSystem
                }
    _, outputs, bars = found[kinds[0]]
    size = max(float(bar.norm()) for bar in bars)
    for kind in kinds[1:]:
        solution, others, other_bars = found[kind]
        assert torch.equal(solution.status, found[kinds[0]][0].status)
        assert torch.equal(solution.degenerate, found[kinds[0]][0].degenerate), (
            f"dense and {kind} flag different rows"
        )
        for a, b in zip(others, outputs, strict=True):
            assert close(a, b, tolerance)
        for a, b in zip(other_bars, bars, strict=True):
            assert float((a - b).norm()) <= 100 * tolerance * max(size, 1e-300)
    return found


@every_case
def test_dense_and_sparse_and_row_by_row_agree(name, monkeypatch):
    found = compare(CASES[name].shared, CASES[name].sample(3, seed=0), monkeypatch)
    assert (found["dense"][0].status == Status.SOLVED).all()


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


def singular_problems():
    a, b, c = cp.Parameter(3, name="a"), cp.Parameter(name="b"), cp.Parameter(name="c")
    x, z = cp.Variable(3, name="x"), cp.Variable(2, name="z")
    first = cp.sum(x) == 1
    yield (
        "redundant equalities",
        cp.Problem(cp.Minimize(cp.sum_squares(x - a)), [first, 2 * cp.sum(x) == 2]),
        [a],
        [x],
        [tensor(0.1, 0.2, 0.9)],
    )
    yield (
        "redundant equalities and their dual",
        cp.Problem(cp.Minimize(cp.sum_squares(x - a)), [first, 2 * cp.sum(x) == 2]),
        [a],
        [x, first.dual_variables[0]],
        [tensor(0.1, 0.2, 0.9)],
    )
    yield (
        "redundant equalities with parameters",
        cp.Problem(cp.Minimize(cp.sum_squares(x - a)), [cp.sum(x) == b, 2 * cp.sum(x) == c]),
        [a, b, c],
        [x],
        [tensor(0.1, 0.2, 0.9), torch.tensor(1.0).double(), torch.tensor(2.0).double()],
    )
    yield (
        "free variable",
        cp.Problem(cp.Minimize(cp.sum_squares(x - a)), [z >= 0, z <= 1]),
        [a],
        [x, z],
        [tensor(0.1, 0.2, 0.9)],
    )
    yield (
        "free auxiliary",
        cp.Problem(cp.Minimize(cp.sum_squares(x - a)), [cp.norm(x) <= 5]),
        [a],
        [x],
        [tensor(0.1, 0.2, 0.9)],
    )
    A = np.random.default_rng(0).standard_normal((2, 3))
    d = cp.Parameter(2, name="d")
    yield (
        "underdetermined",
        cp.Problem(cp.Minimize(cp.sum_squares(A @ x - d))),
        [d],
        [x],
        [tensor(1.0, 2.0)],
    )
    yield (
        "duplicate inequality",
        cp.Problem(cp.Minimize(cp.sum_squares(x - a)), [x >= 0, 2 * x >= 0]),
        [a],
        [x],
        [tensor(-0.1, 0.2, 0.9)],
    )


SINGULAR = list(singular_problems())


@pytest.mark.parametrize("k", range(len(SINGULAR)), ids=[name for name, *_ in SINGULAR])
def test_singular_systems_are_solved_and_flagged_alike(k, monkeypatch):
    _, problem, parameters, outputs, values = SINGULAR[k]
    layer = ConvexLayer(problem, parameters, outputs, solver="clarabel")
    # Where the solution is not unique, another program has another one.
    compare(
        layer,
        [v[None] for v in values],
        monkeypatch,
        kinds=("dense", "sparse", "by rows"),
        tolerance=1e-8,
    )


def test_a_batch_with_active_sets_of_different_sizes(monkeypatch):
    a, x = cp.Parameter(5, name="a"), cp.Variable(5, name="x")
    below = x <= 1
    layer = ConvexLayer(
        cp.Problem(cp.Minimize(cp.sum_squares(x - a)), [x >= 0, below, cp.sum(x) == 2]),
        [a],
        [x, below.dual_variables[0]],
    )
    generator = torch.Generator().manual_seed(0)
    scale = torch.tensor([0.01, 0.3, 1.0, 3.0, 10.0], dtype=torch.float64)[:, None]
    values = scale * torch.randn(5, 5, generator=generator, dtype=torch.float64)
    # some multipliers are not unique
    compare(layer, [values], monkeypatch, kinds=("dense", "sparse", "by rows"))


def test_shared_matrices_and_batched_vectors(monkeypatch):
    P, q, x = (
        cp.Parameter((4, 4), PSD=True, name="P"),
        cp.Parameter(4, name="q"),
        cp.Variable(4, name="x"),
    )
    layer = ConvexLayer(
        cp.Problem(cp.Minimize(cp.quad_form(x, P) + q @ x), [x >= -0.2, cp.sum(x) == 1]),
        [P, q],
        [x],
    )
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(4, 4, generator=generator, dtype=torch.float64)
    shared = W @ W.mT + torch.eye(4, dtype=torch.float64)
    inputs = shared, torch.randn(6, 4, generator=generator, dtype=torch.float64)
    found = compare(layer, inputs, monkeypatch)
    full = run(layer, [shared.expand(6, 4, 4), inputs[1]])
    assert close(found["sparse"][2][0], full[2][0].sum(0), 1e-8)


@pytest.mark.parametrize("n", [60, 200])
def test_larger_and_sparser_programs_agree(n, monkeypatch):
    """A chain: banded, where the sparse factor is the natural one."""
    y, lam, x = (
        cp.Parameter(n, name="y"),
        cp.Parameter(nonneg=True, name="lam"),
        cp.Variable(n, name="x"),
    )
    layer = ConvexLayer(
        cp.Problem(
            cp.Minimize(cp.sum_squares(x - y) + lam * cp.sum_squares(cp.diff(x))),
            [x >= -0.5, x <= 1],
        ),
        [y, lam],
        [x],
    )
    generator = torch.Generator().manual_seed(0)
    compare(
        layer,
        [
            torch.randn(2, n, generator=generator, dtype=torch.float64),
            torch.tensor([0.5, 5.0], dtype=torch.float64),
        ],
        monkeypatch,
    )


def test_larger_cones_agree(monkeypatch):
    """Bases of psd and second-order blocks, rotated on both sides."""
    C, v, X, u = (
        cp.Parameter((7, 7), symmetric=True, name="C"),
        cp.Parameter(12, name="v"),
        cp.Variable((7, 7), symmetric=True, name="X"),
        cp.Variable(12, name="u"),
    )
    problem = cp.Problem(
        cp.Minimize(cp.sum_squares(X - C) + cp.sum_squares(u - v) + cp.norm(u) + cp.norm(u[:5])),
        [X >> 0, cp.trace(X) == 1 + u[0], cp.norm(u[3:9]) <= 0.5],
    )
    generator = torch.Generator().manual_seed(0)
    S = torch.randn(3, 7, 7, generator=generator, dtype=torch.float64)
    compare(
        ConvexLayer(problem, [C, v], [X, u]),
        [(S + S.mT) / 2, torch.randn(3, 12, generator=generator, dtype=torch.float64)],
        monkeypatch,
    )


def test_a_sparse_program_whose_small_eigenvalues_stall_refinement_is_solved():
    """Entries down to 1e-5 beside ones: some eigenvalues of the KKT matrix lie below the shift of
    its factorisation."""
    n = 2500
    A = sp.random_array((n, n), density=3 / n, random_state=0, format="csr")
    x, q, d = cp.Variable(n, name="x"), cp.Parameter(n, name="q"), cp.Parameter(n, name="d")
    problem = cp.Problem(
        cp.Minimize(cp.sum_squares(x) / 2 + q @ x), [cp.multiply(d, A @ x) <= 1, x >= -1]
    )
    layer, random = ConvexLayer(problem, [q, d], [x]), np.random.default_rng(0)
    solution = layer.solve(
        torch.from_numpy(random.standard_normal(n)), torch.from_numpy(random.uniform(0.5, 1.5, n))
    )
    assert int(solution.status) == Status.SOLVED
    assert float(solution.residual) < 1e-12


def test_a_batch_takes_no_more_refinement_than_its_rows(monkeypatch):
    """A row that is done gains for ever, a number and its rounding in turn: it must not keep the
    others going."""
    steps, x, u = 20, cp.Variable((21, 2)), cp.Variable(20)
    start, goal = cp.Parameter(2), cp.Parameter(2)
    A, b = np.array([[1.0, 0.1], [0.0, 1.0]]), np.array([0.005, 0.1])
    moves = [x[t + 1] == A @ x[t] + b * u[t] for t in range(steps)]
    cost = cp.sum([cp.sum_squares(x[t] - goal) for t in range(steps + 1)]) + 0.1 * cp.sum_squares(u)
    problem = cp.Problem(cp.Minimize(cost), [x[0] == start, *moves, cp.abs(u) <= 1])
    layer = ConvexLayer(problem, parameters=[start, goal], variables=[u], structure="generic")
    generator = torch.Generator().manual_seed(0)
    starts, goals = (
        scale * torch.randn(8, 2, generator=generator, dtype=torch.float64) for scale in (2.0, 0.3)
    )
    counts, solve = [], SparseSystem._back_substitute
    monkeypatch.setattr(
        SparseSystem, "_back_substitute", lambda self, right: counts.append(1) or solve(self, right)
    )

    def taken(*parameters: torch.Tensor) -> int:
        parameters = [p.clone().requires_grad_() for p in parameters]
        (value,) = layer(*parameters)
        counts.clear()
        value.square().sum().backward()
        return len(counts)

    alone = [taken(starts[k], goals[k]) for k in range(8)]
    assert min(alone) > 1  # the adjoint's solves are refined
    assert taken(starts, goals) <= max(alone) + 1

"""Equalities that depend on each other: agreement to the parameters' rounding is agreement, and
more than that is infeasible."""

import warnings

import cvxpy as cp
import numpy as np
import pytest
import torch

from convlayer import ConvexLayer, SolverError, Status

N, ROWS = 5, 24


def _transport(square: float = 0.0):
    Z, M = cp.Variable((N, N)), cp.Parameter((N, N))
    r, c = cp.Parameter(N), cp.Parameter(N)
    cost = cp.sum(cp.multiply(M, Z)) + square * cp.sum_squares(Z)
    return (
        cp.Problem(cp.Minimize(cost), [cp.sum(Z, axis=1) == r, cp.sum(Z, axis=0) == c, Z >= 0]),
        [M, r, c],
        [Z],
    )


def _marginals(dtype):
    g = torch.Generator().manual_seed(0)
    parts = (
        torch.rand(ROWS, N, N, generator=g),
        torch.randn(ROWS, N, generator=g),
        torch.randn(ROWS, N, generator=g),
    )
    return parts[0].to(dtype), *(torch.softmax(part.to(dtype), -1) for part in parts[1:])


@pytest.mark.parametrize("square", [0.0, 0.1], ids=("linear", "quadratic"))
@pytest.mark.parametrize("solver", [None, "clarabel", "interior_point", "daqp"])
def test_marginals_that_differ_by_the_rounding_of_single_precision_are_marginals(solver, square):
    problem, parameters, variables = _transport(square)
    layer = ConvexLayer(problem, parameters, variables, solver=solver, on_failure="keep")
    M, r, c = _marginals(torch.float32)
    assert (r.double().sum(1) - c.double().sum(1)).abs().max() > 1e-8
    solution = layer.solve(M, r, c)
    assert solution.status.tolist() == [Status.SOLVED] * ROWS
    assert any("differed by rounding" in note for note in solution.notes)
    # By the same program with marginals that agree, as CVXPY solves it.
    for k in range(0, ROWS, 8):
        a, b = (part[k].double() / part[k].double().sum() for part in (r, c))
        for parameter, value in zip(parameters, (M[k].double(), a, b), strict=True):
            parameter.value = value.numpy()
        value = problem.solve(solver=cp.CLARABEL)
        assert abs(solution.objective[k].item() - value) <= 1e-5 * abs(value)


def _balanced(kind: str):
    """Marginals of a table: a quadratic programme with equalities only, or an entropic
    transport."""
    Z, r, c = cp.Variable((N, N)), cp.Parameter(N), cp.Parameter(N)
    cost = cp.sum_squares(Z) if kind == "equality_constrained_qp" else -cp.sum(cp.entr(Z))
    rules = [cp.sum(Z, axis=1) == r, cp.sum(Z, axis=0) == c]
    return (
        cp.Problem(
            cp.Minimize(cost), rules if kind == "equality_constrained_qp" else [*rules, Z >= 0]
        ),
        [r, c],
        [Z],
    )


def _words(solution) -> list[str]:
    """Its notes, but for those that say which way a row took."""
    return [note for note in solution.notes if "not settled" not in note]


@pytest.mark.parametrize("kind", ["equality_constrained_qp", "entropic_optimal_transport"])
@pytest.mark.parametrize(
    ("dtype", "apart"),
    [(torch.float32, 0.0), (torch.float64, 0.0), (torch.float64, 5e-9), (torch.float64, 1e-3)],
)
def test_a_kernel_says_of_equalities_that_differ_what_the_cone_program_says(kind, dtype, apart):
    """The right-hand sides themselves are the oracle: whether they differ, and by how much."""
    problem, parameters, variables = _balanced(kind)
    _, r, c = _marginals(dtype)
    r, c = r[:4] * (1 + apart), c[:4]
    found = []
    for structure in (kind, "generic"):
        layer = ConvexLayer(problem, parameters, variables, structure=structure, on_failure="keep")
        solution = layer.solve(r, c)
        with_words = layer.with_options(on_failure="raise")
        if apart > 1e-8:
            with pytest.raises(
                SolverError, match=r"depend on each other disagree by .* rounding in float64"
            ):
                with_words(r, c)
        found.append((solution.status.tolist(), _words(solution)))
    differ = dtype is torch.float32 or apart > 0
    assert found[0] == found[1]
    assert found[0][0] == [Status.INFEASIBLE if apart > 1e-8 else Status.SOLVED] * 4
    assert any("differed by rounding" in note for note in found[0][1]) == (differ and apart < 1e-8)


def test_a_kernel_weighs_a_difference_by_what_it_is_made_of():
    """A difference of numbers of size 1e6 in single precision is off by 0.1, and what the user says
    is rounding is rounding."""
    x, a, b = cp.Variable(4), cp.Parameter(2), cp.Parameter(2)
    rules = [x[:2] + a == b, cp.sum(x[:2]) + cp.sum(a) == cp.sum(b)]
    layer = ConvexLayer(
        cp.Problem(cp.Minimize(cp.sum_squares(x)), rules), [a, b], [x], on_failure="keep"
    )
    assert layer.structure == "equality_constrained_qp"
    rows = (
        torch.tensor([[1e6 + 0.3, 2e6]], dtype=torch.float32),
        torch.tensor([[1e6 + 1.7, 2e6 + 0.9]], dtype=torch.float32),
    )
    assert layer.solve(*rows).status.tolist() == [Status.SOLVED]
    problem, parameters, variables = _balanced("equality_constrained_qp")
    layer = ConvexLayer(problem, parameters, variables, on_failure="keep")
    _, r, c = _marginals(torch.float64)
    for tolerance, status in ((1e-8, Status.INFEASIBLE), (1e-6, Status.SOLVED)):
        solution = layer.solve(r[:2] * (1 + 1e-6), c[:2], solver_args={"tolerance": tolerance})
        assert solution.status.tolist() == [status] * 2


@pytest.mark.parametrize("structure", ["auto", "generic"])
def test_a_note_says_what_came_of_rows_that_another_way_took(structure):
    """Infeasible rows are not solved."""
    x, a = cp.Variable(2), cp.Parameter(2)
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x - a)), [x >= a, cp.sum(x) <= 1])
    rows = torch.tensor([[0.2, 0.3], [2.0, 3.0]], dtype=torch.float64)
    solution = ConvexLayer(problem, [a], [x], structure=structure, on_failure="keep").solve(rows)
    assert solution.status.tolist() == [Status.SOLVED, Status.INFEASIBLE]
    (note,) = solution.notes
    assert note.startswith("row 1: ")
    assert "infeasible" in note
    assert "; solved" not in note


def test_the_solution_is_that_of_the_least_change_of_the_right_hand_sides():
    """Both marginals move towards each other by the same number in every entry, which the
    transport's own scale does not do."""
    problem, parameters, variables = _transport(0.1)
    layer = ConvexLayer(problem, parameters, variables)
    M, r, c = _marginals(torch.float64)
    apart = 3e-9
    gap = apart / (2 * N)
    (moved,) = layer(M, r + apart / N, c)
    (wanted,) = layer(M, r + apart / N - gap, c + gap)
    torch.testing.assert_close(moved, wanted, rtol=0, atol=1e-13)


@pytest.mark.parametrize("solver", [None, "daqp", "clarabel"])
def test_equal_rows_have_equal_answers_and_more_than_rounding_is_infeasible_in_words(solver):
    problem, parameters, variables = _transport()
    M, r, c = (part[:1].expand(40, *part.shape[1:]) for part in _marginals(torch.float64))
    layer = ConvexLayer(problem, parameters, variables, solver=solver, on_failure="keep")
    for apart in (1e-7, 1e-3):
        assert layer.solve(M, r * (1 + apart), c).status.tolist() == [Status.INFEASIBLE] * 40
    with pytest.raises(
        SolverError, match=r"depend on each other disagree by .* rounding in float64"
    ):
        ConvexLayer(problem, parameters, variables)(M, r * (1 + 1e-7), c)
    # What the user says is rounding is rounding.
    solution = layer.solve(M, r * (1 + 1e-7), c, solver_args={"tolerance": 1e-6})
    assert solution.status.tolist() == [Status.SOLVED] * 40
    torch.testing.assert_close(
        solution.objective, solution.objective[:1].expand(40), rtol=1e-14, atol=0
    )


def test_the_gradient_is_that_along_right_hand_sides_that_agree():
    problem, parameters, variables = _transport(0.1)
    layer = ConvexLayer(problem, parameters, variables)
    M, r, c = (part[:3] for part in _marginals(torch.float64))
    weights = torch.randn(3, N, N, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    leaves = [part.clone().requires_grad_() for part in (M, r, c)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        bars = torch.autograd.grad((weights * layer(*leaves)[0]).sum(), leaves)
    g = torch.Generator().manual_seed(2)
    for _ in range(3):
        moves = [torch.randn(part.shape, dtype=torch.float64, generator=g) for part in (M, r, c)]
        moves[1] -= (moves[1].sum(1) - moves[2].sum(1)).unsqueeze(1) / N

        def along(h, moves=moves):
            with torch.no_grad():
                parts = [part + h * move for part, move in zip((M, r, c), moves, strict=True)]
                return (weights * layer(*parts)[0]).sum().item()

        slope = (8 * (along(1e-5) - along(-1e-5)) - (along(2e-5) - along(-2e-5))) / 12e-5
        assert abs(
            sum((b * m).sum().item() for b, m in zip(bars, moves, strict=True)) - slope
        ) <= 1e-6 * (1 + abs(slope))


def test_a_sum_declared_twice_and_its_parts():
    w, s, mu = cp.Variable(9), cp.Parameter(3), cp.Parameter(9)
    G = np.kron(np.eye(3), np.ones((1, 3)))
    problem = cp.Problem(cp.Maximize(mu @ w), [G @ w == s, cp.sum(w) == 1, w >= 0])
    g = torch.Generator().manual_seed(1)
    rows = torch.softmax(torch.randn(32, 3, generator=g), -1), torch.randn(32, 9, generator=g)
    solution = ConvexLayer(problem, [s, mu], [w]).solve(*rows)
    assert solution.status.tolist() == [Status.SOLVED] * 32
    torch.testing.assert_close(
        solution.variables[0] @ torch.tensor(G.T, dtype=torch.float32), rows[0], rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("holds", [True, False])
def test_an_equation_or_an_inequality_between_numbers_is_true_or_infeasible(holds):
    x, p = cp.Variable(3), cp.Parameter(3)
    value = torch.tensor([0.3, 0.2, 0.3 if holds else 0.4], dtype=torch.float64)
    wanted = Status.SOLVED if holds else Status.INFEASIBLE
    for rule in (
        p[0] == p[2],
        p[2] <= p[0],
        cp.Constant(0) == (0 if holds else 1),
        cp.Constant(1) <= (1 if holds else 0),
    ):
        problem = cp.Problem(cp.Minimize(cp.sum_squares(x - p)), [x >= 0, rule])
        assert (
            ConvexLayer(problem, [p], [x], on_failure="keep").solve(value).status.item() == wanted
        )


def test_right_hand_sides_that_cancel_are_weighed_by_what_they_are_made_of():
    """a - b of numbers of size 1e6 in single precision is off by 0.1."""
    x, a, b = cp.Variable(4), cp.Parameter(2), cp.Parameter(2)
    rules = [x[:2] + a == b, cp.sum(x[:2]) + cp.sum(a) == cp.sum(b), x >= -1]
    layer = ConvexLayer(
        cp.Problem(cp.Minimize(cp.sum_squares(x)), rules), [a, b], [x], on_failure="keep"
    )
    rows = (
        torch.tensor([[1e6 + 0.3, 2e6]], dtype=torch.float32),
        torch.tensor([[1e6 + 1.7, 2e6 + 0.9]], dtype=torch.float32),
    )
    assert layer.solve(*rows).status.tolist() == [Status.SOLVED]


@pytest.mark.parametrize("square", [0.0, 0.1], ids=["linear", "quadratic"])
def test_caps_that_sum_to_one_but_for_rounding_leave_a_point(square):
    """sum(w) == 1, w <= cap with sum(cap) == 1 in single precision: infeasible by rounding in every
    second row."""
    w, cap, mu = cp.Variable(3), cp.Parameter(3), cp.Parameter(3)
    problem = cp.Problem(
        cp.Maximize(mu @ w - square * cp.sum_squares(w)), [cp.sum(w) == 1, w <= cap, w >= 0]
    )
    layer = ConvexLayer(problem, [cap, mu], [w])
    g = torch.Generator().manual_seed(0)
    caps, mus = torch.softmax(torch.randn(60, 3, generator=g), -1), torch.randn(60, 3, generator=g)
    assert (caps.double().sum(1) < 1 - 1e-9).any()
    solution = layer.solve(caps, mus)
    assert solution.status.tolist() == [Status.SOLVED] * 60
    torch.testing.assert_close(solution.variables[0], caps, rtol=0, atol=1e-6)
    # By more than the tolerance, and less than what single precision explains, and this is said:
    solution = layer.solve(caps * (1 - 5e-6), mus)
    assert solution.status.tolist() == [Status.SOLVED] * 60
    torch.testing.assert_close(solution.variables[0], caps, rtol=0, atol=1e-5)
    assert any("by rounding alone" in note for note in solution.notes)


@pytest.mark.parametrize("cost", ["linear", "quadratic", "norm"])
def test_rows_of_a_matrix_parameter_that_depend_on_each_other(cost):
    """No pattern tells of these: the right-hand sides agree to 1e-8, and each row has the solution
    of those that agree."""
    x, A, b, c = (
        cp.Variable(16, nonneg=True),
        cp.Parameter((8, 16)),
        cp.Parameter(8),
        cp.Parameter(16),
    )
    more = {"linear": 0.0, "quadratic": 0.1 * cp.sum_squares(x), "norm": 0.1 * cp.norm(x)}[cost]
    layer = ConvexLayer(
        cp.Problem(cp.Minimize(c @ x + more), [A @ x == b]), [A, b, c], [x], on_failure="keep"
    )
    g = np.random.default_rng(0)
    M = np.vstack([np.kron(np.eye(4), np.ones((1, 4))), np.kron(np.ones((1, 4)), np.eye(4))])
    left, right, costs = (
        g.dirichlet(np.ones(4), 12),
        g.dirichlet(np.ones(4), 12),
        g.uniform(size=(12, 16)),
    )

    def solved(apart):
        values = np.concatenate([left, right * (1 + apart)], 1)
        return layer.solve(*(torch.from_numpy(part) for part in (M, values, costs)))

    exact, near = solved(0.0), solved(1e-8)
    assert near.status.tolist() == [Status.SOLVED] * 12
    torch.testing.assert_close(near.objective, exact.objective, rtol=1e-6, atol=0)
    assert solved(1e-4).status.tolist() == [Status.INFEASIBLE] * 12

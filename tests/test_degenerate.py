"""Where the solution map has no derivative: flagged if that is ambiguous for what is asked, not if
it is harmless; always finite."""

import dataclasses
import warnings

import cvxpy as cp
import numpy as np
import pytest
import torch
from cases import FIVE_POINT, close, leaves

import convlayer.conic.polish
from convlayer import Cause, ConvexLayer, GradientWarning, Status


def tensor(*values):
    """tensor(1.0, 2.0) is a vector, tensor(1.0) a scalar, tensor(array) that array."""
    return torch.as_tensor(values[0] if len(values) == 1 else values, dtype=torch.float64)


def run(problem, parameters, variables, *values, cotangents=None, **options):
    """(solution, gradients, whether a GradientWarning came) with a cotangent of ones, or those
    given."""
    layer = ConvexLayer(problem, parameters, variables, **{"structure": "generic", **options})
    inputs = leaves([tensor(v) if not isinstance(v, torch.Tensor) else v for v in values])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        solution = layer.solve(*inputs)
        outputs = solution.variables
        bars = torch.autograd.grad(
            outputs, inputs, cotangents or [torch.ones_like(o) for o in outputs]
        )
    assert (solution.status == Status.SOLVED).all()
    assert all(bar.isfinite().all() for bar in bars)
    warned = any(
        w.category is GradientWarning and w.message.cause is not Cause.ZERO for w in caught
    )
    assert warned == bool(solution.degenerate.any()), (
        "a flag and no warning, or a warning and no flag"
    )
    return solution, bars, warned


# Weakly active constraints
# ----------------------------------------------------------------------------------------------


def test_a_weakly_active_bound_is_flagged_and_counts_as_inactive():
    a, x = cp.Parameter(2, name="a"), cp.Variable(2, name="x")
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x - a)), [x >= 0])
    _, (bar,), flagged = run(problem, [a], [x], tensor(0.0, 1.0))
    assert flagged
    assert close(bar, tensor(1.0, 1.0), 1e-9)


@pytest.mark.parametrize("distance", [1e-3, 1e-5, -1e-3, -1e-5])
def test_near_a_kink_but_not_at_it_nothing_is_flagged_and_the_branch_is_right(distance):
    a, x = cp.Parameter(2, name="a"), cp.Variable(2, name="x")
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x - a)), [x >= 0])
    _, (bar,), flagged = run(problem, [a], [x], tensor(distance, 1.0))
    assert not flagged
    assert close(bar, tensor(float(distance > 0), 1.0), 1e-9)


@pytest.mark.parametrize("distance", [1e-7, 1e-9, 1e-11, -1e-7, -1e-9, -1e-11])
def test_within_a_hair_of_a_kink_the_branch_is_right_or_flagged(distance):
    a, x = cp.Parameter(2, name="a"), cp.Variable(2, name="x")
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x - a)), [x >= 0])
    _, (bar,), flagged = run(problem, [a], [x], tensor(distance, 1.0))
    assert flagged or close(bar, tensor(float(distance > 0), 1.0), 1e-9)


def test_a_weakly_active_ball_is_flagged():
    a, x = cp.Parameter(3, name="a"), cp.Variable(3, name="x")
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x - a)), [cp.norm(x) <= 3])
    assert run(problem, [a], [x], tensor(1.0, 2.0, 2.0))[2]


def test_a_zero_eigenvalue_on_the_boundary_is_flagged():
    C, X = cp.Parameter((3, 3), symmetric=True, name="C"), cp.Variable((3, 3), PSD=True, name="X")
    problem = cp.Problem(cp.Minimize(cp.sum_squares(X - C)))
    assert run(problem, [C], [X], torch.diag(tensor(1.0, 0.0, -1.0)))[2]


def test_soft_thresholding_at_its_threshold_is_flagged():
    y, x = cp.Parameter(3, name="y"), cp.Variable(3, name="x")
    problem = cp.Problem(cp.Minimize(0.5 * cp.sum_squares(x - y) + cp.norm1(x)))
    _, (bar,), flagged = run(problem, [y], [x], tensor(1.0, 3.0, 0.2))
    assert flagged
    assert close(bar[1:], tensor(1.0, 0.0), 1e-9), (
        "the entries away from the kink are untouched by it"
    )
    assert -1e-9 <= float(bar[0]) <= 1 + 1e-9, "an element of the Clarke derivative"


def test_a_norm_at_its_apex_weakly_is_flagged_and_strictly_is_not():
    y, x = cp.Parameter(2, name="y"), cp.Variable(2, name="x")
    problem = cp.Problem(cp.Minimize(0.5 * cp.sum_squares(x - y) + cp.norm(x)))
    assert run(problem, [y], [x], tensor(0.6, 0.8))[2]
    _, (bar,), flagged = run(problem, [y], [x], tensor(0.3, 0.4))
    assert not flagged
    assert close(bar, tensor(0.0, 0.0), 1e-9)


# Redundant constraints
# --------------------------------------------------------------------------------------------------


def redundant_equalities(parametrised, dual):
    a, b, c, x = (
        cp.Parameter(3, name="a"),
        cp.Parameter(name="b"),
        cp.Parameter(name="c"),
        cp.Variable(3, name="x"),
    )
    first = cp.sum(x) == (b if parametrised else 1.0)
    problem = cp.Problem(
        cp.Minimize(cp.sum_squares(x - a)), [first, 2 * cp.sum(x) == (c if parametrised else 2.0)]
    )
    outputs = [x, first.dual_variables[0]] if dual else [x]
    return problem, [a, b, c] if parametrised else [a], outputs


def test_redundant_equalities_without_parameters_are_harmless():
    _, (bar,), flagged = run(
        *redundant_equalities(False, False),
        tensor(0.1, 0.2, 0.9),
        cotangents=[tensor(1.0, 0.0, 0.0)],
    )
    assert not flagged
    assert close(bar, tensor(2 / 3, -1 / 3, -1 / 3), 1e-8)


def test_redundant_equalities_whose_multiplier_is_an_output_are_flagged():
    assert run(*redundant_equalities(False, True), tensor(0.1, 0.2, 0.9))[2]


def test_redundant_equalities_with_parameters_are_differentiated_along_feasible_ones():
    """Along (db, dc) = t (1, 2), which keeps the problem feasible, the derivative is that of x;
    across it there is no problem."""
    problem, parameters, outputs = redundant_equalities(True, False)
    _, (a_bar, b_bar, c_bar), flagged = run(
        problem, parameters, outputs, tensor(0.1, 0.2, 0.9), 1.0, 2.0
    )
    assert not flagged
    assert run(*redundant_equalities(True, True), tensor(0.1, 0.2, 0.9), 1.0, 2.0)[2], (
        "the multiplier is not unique"
    )
    assert close(a_bar, tensor(0.0, 0.0, 0.0), 1e-8)
    assert float(b_bar + 2 * c_bar) == pytest.approx(1.0, abs=1e-8)


def test_more_active_inequalities_than_dimensions_without_parameters_are_harmless():
    """Three lines through one vertex, all pressing: x stays, whatever the multipliers."""
    q, x = cp.Parameter(2, name="q"), cp.Variable(2, name="x")
    problem = cp.Problem(cp.Minimize(q @ x), [x >= 0, cp.sum(x) >= 0, x <= 5])
    solution, (bar,), flagged = run(problem, [q], [x], tensor(1.0, 2.0))
    assert close(solution.variables[0], tensor(0.0, 0.0), 1e-9)
    assert not flagged
    assert close(bar, tensor(0.0, 0.0), 1e-9)


def test_more_active_inequalities_than_dimensions_with_parameters_are_flagged():
    h, x = cp.Parameter(3, name="h"), cp.Variable(2, name="x")
    problem = cp.Problem(cp.Minimize(x[0] + 2 * x[1]), [x >= h[:2], cp.sum(x) >= h[2]])
    assert run(problem, [h], [x], tensor(0.0, 0.0, 0.0))[2]


def test_a_duplicated_inequality_is_harmless_where_no_one_looks_at_it():
    a, x = cp.Parameter(2, name="a"), cp.Variable(2, name="x")
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x - a)), [x >= 0, x >= 0, 3 * x >= 0])
    _, (bar,), flagged = run(problem, [a], [x], tensor(-1.0, 1.0))
    assert not flagged
    assert close(bar, tensor(0.0, 1.0), 1e-9)


def test_a_duplicated_inequality_whose_multiplier_is_an_output_is_flagged():
    a, x = cp.Parameter(2, name="a"), cp.Variable(2, name="x")
    first = x >= 0
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x - a)), [first, x >= 0])
    assert run(problem, [a], [x, first.dual_variables[0]], tensor(-1.0, 1.0))[2]


def test_an_equality_written_as_two_inequalities():
    """The multipliers' difference is unique, they are not."""
    a, x = cp.Parameter(2, name="a"), cp.Variable(2, name="x")
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x - a)), [cp.sum(x) <= 1, cp.sum(x) >= 1])
    _, (bar,), flagged = run(problem, [a], [x], tensor(0.3, 0.1), cotangents=[tensor(1.0, 0.0)])
    assert not flagged
    assert close(bar, tensor(0.5, -0.5), 1e-6)


# Linear programs
# --------------------------------------------------------------------------------------------------------


def test_a_linear_program_at_a_vertex_moves_with_its_constraints_and_not_with_its_cost():
    c, h, x = cp.Parameter(2, name="c"), cp.Parameter(2, name="h"), cp.Variable(2, name="x")
    G = np.array([[1.0, 2.0], [3.0, 1.0]])
    problem = cp.Problem(cp.Minimize(-c @ x), [G @ x <= h, x >= 0])
    w = tensor(0.3, -0.7)
    _, (c_bar, h_bar), flagged = run(
        problem, [c, h], [x], tensor(1.0, 1.0), tensor(4.0, 6.0), cotangents=[w]
    )
    assert not flagged
    assert close(c_bar, tensor(0.0, 0.0), 1e-10)
    assert close(h_bar, torch.linalg.solve(torch.from_numpy(G).mT, w), 1e-9)


def test_a_linear_program_with_a_face_of_solutions_is_flagged():
    c, x = cp.Parameter(2, name="c"), cp.Variable(2, name="x")
    problem = cp.Problem(cp.Minimize(c @ x), [x >= 0, cp.sum(x) == 1])
    assert run(problem, [c], [x], tensor(1.0, 1.0))[2]


def test_a_free_coordinate_is_flagged_if_it_is_an_output_and_only_then():
    a, x, z = cp.Parameter(2, name="a"), cp.Variable(2, name="x"), cp.Variable(name="z")
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x - a)), [z >= 0, z <= 1])
    assert run(problem, [a], [x, z], tensor(0.5, 1.0))[2]
    _, (bar,), flagged = run(problem, [a], [x], tensor(0.5, 1.0))
    assert not flagged
    assert close(bar, tensor(1.0, 1.0), 1e-9)


def test_underdetermined_least_squares_is_flagged_and_right_along_the_rows():
    """|A x - b|^2 with more unknowns than rows: A x = b moves with b, whichever solution is
    returned."""
    A = torch.randn(2, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    b, x = cp.Parameter(2, name="b"), cp.Variable(4, name="x")
    problem = cp.Problem(cp.Minimize(cp.sum_squares(A.numpy() @ x - b)))
    w = tensor(0.4, -1.0)
    _, (bar,), flagged = run(problem, [b], [x], tensor(1.0, 2.0), cotangents=[A.mT @ w])
    assert flagged
    assert close(bar, w, 1e-7), (
        "the cotangent lies in the row space: the least-norm derivative is exact on it"
    )
    _, (bar,), _ = run(problem, [b], [x], tensor(1.0, 2.0), cotangents=[tensor(1.0, 0.0, 0.0, 0.0)])
    assert close(bar, torch.linalg.pinv(A).mT @ tensor(1.0, 0.0, 0.0, 0.0), 1e-7), (
        "least norm: the pseudo-inverse"
    )


def test_a_feasibility_problem_is_flagged_unless_it_has_one_point():
    b, x = cp.Parameter(2, name="b"), cp.Variable(2, name="x")
    assert run(cp.Problem(cp.Minimize(0), [x >= b, x <= 5]), [b], [x], tensor(0.0, 1.0))[2]
    matrix = np.array([[1.0, 2.0], [0.0, 1.0]])
    _, (bar,), flagged = run(
        cp.Problem(cp.Minimize(0), [matrix @ x == b]), [b], [x], tensor(0.0, 1.0)
    )
    assert not flagged
    assert close(bar, torch.linalg.solve(torch.from_numpy(matrix).mT, tensor(1.0, 1.0)), 1e-9)


# Matrices and cones
# -----------------------------------------------------------------------------------------------------


def directional(layer, value, direction, weight, step=1e-4):
    with torch.no_grad():
        return (
            sum(
                c * float((weight * layer(value + k * step * direction)[0]).sum())
                for k, c in FIVE_POINT.items()
            )
            / step
        )


@pytest.mark.parametrize(
    "eigenvalues", [(2.0, 2.0, 2.0), (2.0, 2.0, -1.0), (-1.0, -1.0, -1.0), (3.0, 1.0, 1.0)]
)
def test_equal_eigenvalues_away_from_zero_are_harmless(eigenvalues):
    C, X = cp.Parameter((3, 3), symmetric=True, name="C"), cp.Variable((3, 3), PSD=True, name="X")
    problem = cp.Problem(cp.Minimize(cp.sum_squares(X - C)))
    generator = torch.Generator().manual_seed(1)
    Q = torch.linalg.qr(torch.randn(3, 3, generator=generator, dtype=torch.float64)).Q
    value = Q @ torch.diag(tensor(eigenvalues)) @ Q.mT
    value = (value + value.mT) / 2
    weight, direction = (
        torch.randn(3, 3, generator=generator, dtype=torch.float64) for _ in range(2)
    )
    direction = direction + direction.mT
    _, (bar,), flagged = run(problem, [C], [X], value, cotangents=[weight])
    assert not flagged
    expected = directional(ConvexLayer(problem, [C], [X]), value, direction, weight)
    assert float((bar * direction).sum()) == pytest.approx(expected, rel=1e-6, abs=1e-8)


def test_a_tie_for_the_leading_eigenvector_is_flagged():
    C, X = cp.Parameter((3, 3), symmetric=True, name="C"), cp.Variable((3, 3), PSD=True, name="X")
    problem = cp.Problem(cp.Maximize(cp.trace(C @ X)), [cp.trace(X) == 1])
    assert run(problem, [C], [X], torch.diag(tensor(2.0, 2.0, 1.0)))[2]


def test_a_tie_for_the_largest_eigenvalue_is_flagged_or_right():
    C, a, x = (
        cp.Parameter((2, 2), symmetric=True, name="C"),
        cp.Parameter(2, name="a"),
        cp.Variable(2, name="x"),
    )
    problem = cp.Problem(cp.Minimize(cp.lambda_max(C + cp.diag(x)) + cp.sum_squares(x - a)))
    weight = tensor(1.0, -0.5)
    _, (_, bar), flagged = run(
        problem,
        [C, a],
        [x],
        torch.zeros(2, 2, dtype=torch.float64),
        tensor(0.0, 0.1),
        cotangents=[weight],
    )
    layer = ConvexLayer(problem, [C, a], [x])
    expected = []
    for k in range(2):
        step = 1e-4 * torch.eye(2, dtype=torch.float64)[k]
        with torch.no_grad():
            expected.append(
                sum(
                    c
                    * float(
                        weight
                        @ layer(
                            torch.zeros(2, 2, dtype=torch.float64), tensor(0.0, 0.1) + m * step
                        )[0]
                    )
                    for m, c in FIVE_POINT.items()
                )
                / 1e-4
            )
    assert flagged or close(bar, tensor(expected), 1e-5)


def test_the_unit_ball_with_no_pull_is_flagged():
    """min c'x over a ball at c = 0: every point is a solution."""
    c, x = cp.Parameter(3, name="c"), cp.Variable(3, name="x")
    assert run(cp.Problem(cp.Minimize(c @ x), [cp.norm(x) <= 1]), [c], [x], tensor(0.0, 0.0, 0.0))[
        2
    ]


def test_a_norm_to_zero_radius_has_one_point():
    """|x - a| <= r at r = 0: Slater fails; the point moves with a, and how with r is not
    determined."""
    a, r, x = (
        cp.Parameter(2, name="a"),
        cp.Parameter(nonneg=True, name="r"),
        cp.Variable(2, name="x"),
    )
    problem = cp.Problem(cp.Minimize(x[0] + 2 * x[1]), [cp.norm(x - a) <= r])
    layer = ConvexLayer(problem, [a, r], [x], on_failure="keep")
    inputs = leaves([tensor(1.0, 2.0), tensor(0.0)])
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        solution = layer.solve(*inputs)
        bars = torch.autograd.grad(solution.variables[0].sum(), inputs)
    if int(solution.status) == Status.SOLVED:
        assert close(solution.variables[0], tensor(1.0, 2.0), 1e-6)
        assert bool(solution.degenerate)
        assert all(bar.isfinite().all() for bar in bars)
    else:
        assert all(bar.isnan().all() for bar in bars)


# Warnings
# ---------------------------------------------------------------------------------------------------------------


def test_the_warning_comes_once_a_layer_and_says_what_to_do():
    a, x = cp.Parameter(name="a"), cp.Variable(name="x")
    layer = ConvexLayer(cp.Problem(cp.Minimize(cp.square(x - a)), [x >= 0]), [a], [x])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            value = tensor([1.0, 0.0, -1.0, 0.0]).requires_grad_()
            layer(value)[0].sum().backward()
    told = [w for w in caught if w.category is GradientWarning]
    assert len(told) == 1
    for word in ("1, 3", "weakly active", "Solution.degenerate", "layer.check"):
        assert word in str(told[0].message)


def test_a_degenerate_row_that_the_loss_does_not_use_warns_no_one():
    a, x = cp.Parameter(name="a"), cp.Variable(name="x")
    layer = ConvexLayer(cp.Problem(cp.Minimize(cp.square(x - a)), [x >= 0]), [a], [x])
    value = tensor([1.0, 0.0]).requires_grad_()
    layer(value)[0][0].backward()
    assert close(value.grad, tensor(1.0, 0.0), 1e-12)


def test_a_degenerate_row_leaves_the_gradients_of_the_others_alone():
    a, x = cp.Parameter(2, name="a"), cp.Variable(2, name="x")
    problem = cp.Problem(cp.Minimize(a @ x + cp.sum_squares(x[:1])), [x >= 0, x <= 1])
    value = torch.stack([tensor(-1.0, 1.0), tensor(-1.0, 0.0), tensor(-0.5, -1.0)])
    solution, (bar,), flagged = run(problem, [a], [x], value)
    assert flagged
    assert solution.degenerate.tolist() == [False, True, False]
    assert close(bar[[0, 2]], tensor([[-0.5, 0.0], [-0.5, 0.0]]), 1e-9)


def test_the_value_needs_no_warning():
    """The optimal value's derivative is that of the Lagrangian, however the solution is
    degenerate."""
    a, x = cp.Parameter(2, name="a"), cp.Variable(2, name="x")
    layer = ConvexLayer(cp.Problem(cp.Minimize(cp.sum_squares(x - a)), [x >= 0]), [a], [x])
    value = tensor(0.0, -1.0).requires_grad_()
    layer.solve(value).objective.backward()
    assert close(value.grad, tensor(0.0, -2.0), 1e-9)


def test_without_gradients_nothing_is_warned_about():
    a, x = cp.Parameter(name="a"), cp.Variable(name="x")
    layer = ConvexLayer(cp.Problem(cp.Minimize(cp.square(x - a)), [x >= 0]), [a], [x])
    with torch.no_grad():
        solution = layer.solve(tensor([0.0]))
    assert bool(solution.degenerate[0]), "the flag needs no backward pass"


# Ties everywhere: data of small whole numbers
# -----------------------------------------------------------------------------


def tied(kind):
    q, h, G, x = (
        cp.Parameter(3, name="q"),
        cp.Parameter(4, name="h"),
        cp.Parameter((4, 3), name="G"),
        cp.Variable(3, name="x"),
    )
    quadratic, rows = 0.5 * cp.sum_squares(x) + q @ x, [G @ x <= h]
    objective, constraints = {
        "quadratic": (quadratic, rows),
        "linear": (q @ x, [*rows, x <= 3, x >= -3]),
        "absolute": (quadratic + cp.norm1(x), rows),
        "norm": (quadratic + cp.norm(x), rows),
        "largest": (quadratic + cp.norm_inf(x), rows),
        "equality": (0.5 * cp.sum_squares(x[:2]) + q @ x, [*rows, cp.sum(x) == 1, x >= -2]),
    }[kind]
    return ConvexLayer(
        cp.Problem(cp.Minimize(objective), constraints), [q, h, G], [x], on_failure="keep"
    )


@pytest.mark.parametrize("kind", ["quadratic", "linear", "absolute", "norm", "largest", "equality"])
def test_with_ties_a_gradient_is_the_derivative_or_flagged_and_a_kink_is_always_flagged(kind):
    """One-sided differences at two steps tell a kink from a smooth point."""
    rows, layer, rng = 60, tied(kind), np.random.default_rng(0)
    values = [
        tensor(rng.integers(low, high, (rows, *shape)).astype(float))
        for low, high, shape in ((-2, 3, (3,)), (0, 3, (4,)), (-1, 2, (4, 3)))
    ]
    inputs = leaves(values)
    weight = tensor(rng.standard_normal((rows, 3)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        solution = layer.solve(*inputs)
        solved = solution.status <= Status.INACCURATE
        base = (solution.variables[0] * weight).sum(1)
        bars = torch.autograd.grad(base[solved].sum(), inputs)
        base = base.detach()
        for k in range(3):
            moves = [torch.zeros_like(v) for v in values]
            moves[k] = tensor(rng.standard_normal(tuple(values[k].shape)))
            moves[k] = moves[k].abs() if k == 1 else moves[k]  # keeps the origin feasible
            slopes, usable = {}, solved.clone()
            for step in (1e-3, -1e-3, 1e-4, -1e-4):
                moved = layer.solve(*(v + step * d for v, d in zip(values, moves, strict=True)))
                slopes[step] = ((moved.variables[0] * weight).sum(1) - base) / step
                usable &= moved.status <= Status.INACCURATE
            got = (bars[k] * moves[k]).reshape(rows, -1).sum(1)
            unit = 1 + got.abs()
            fine, coarse = ((slopes[h] - slopes[-h]).abs() for h in (1e-4, 1e-3))
            kink = usable & (fine > 0.2 * unit) & (coarse > 0.2 * unit)
            smooth = usable & (fine < 0.02 * unit) & (coarse < 0.1 * unit)
            wrong = smooth & ((got - (slopes[1e-4] + slopes[-1e-4]) / 2).abs() > 0.02 * unit)
            assert int(smooth.sum()) >= rows // 10
            assert not (wrong & ~solution.degenerate).any(), (
                torch.nonzero(wrong & ~solution.degenerate).flatten().tolist()
            )
            assert not (kink & ~solution.degenerate).any(), (
                torch.nonzero(kink & ~solution.degenerate).flatten().tolist()
            )


@pytest.mark.parametrize("slope", [[-1.0, 0.0, 0.0], [-1.0, 1.0, 1.0], [-1.0, 0.5, 0.2]])
def test_a_kink_at_a_solution_of_zero_is_flagged(slope):
    """There is no size of x to measure a distance by: rounding must not be taken for a margin."""
    q, x = cp.Parameter(3, name="q"), cp.Variable(3, name="x")
    problem = cp.Problem(cp.Minimize(0.5 * cp.sum_squares(x) + q @ x + cp.norm1(x)), [x <= 1])
    assert run(problem, [q], [x], tensor(*slope))[2]


# Active sets that an interior point does not tell
# ----------------------------------------------------------------------------


def test_an_active_set_that_newton_cannot_settle_is_settled_by_the_central_path(monkeypatch):
    """A thousand bounds and rows, some all but weakly active: the polish takes the interior-point
    steps that are missing."""
    generator = torch.Generator().manual_seed(0)
    n, band = 300, 5
    A = sum(
        np.diag(torch.randn(n - k, generator=generator, dtype=torch.float64).numpy(), k)
        for k in range(band)
    )
    q, b, x = cp.Parameter(n, name="q"), cp.Parameter(n, name="b"), cp.Variable(n, name="x")
    problem = cp.Problem(
        cp.Minimize(0.5 * cp.sum_squares(x) + q @ x), [A @ x <= b, x >= -1, x <= 1]
    )
    layer = ConvexLayer(problem, [q, b], [x], solver_args={"max_iter": 5}, on_failure="keep")
    values = (
        torch.randn(8, n, generator=generator, dtype=torch.float64),
        torch.rand(8, n, generator=generator, dtype=torch.float64) / 2,
    )
    with monkeypatch.context() as patch:
        patch.setattr(
            convlayer.conic.polish,
            "PATH",
            dataclasses.replace(convlayer.conic.polish.PATH, steps=0),
        )
        patch.setattr(
            convlayer.conic.polish,
            "NEWTON",
            dataclasses.replace(convlayer.conic.polish.NEWTON, steps=6),
        )
        assert (layer.solve(*values).status != Status.SOLVED).any(), "the case is too easy"
    solution = layer.solve(*values)
    assert (solution.status == Status.SOLVED).all()
    assert float(solution.residual.max()) < 1e-10


@pytest.mark.parametrize("distance", [1e-1, 1e-3, 1e-5])
def test_the_margin_falls_with_the_distance_from_the_kink(distance):
    a, x = cp.Parameter(2, name="a"), cp.Variable(2, name="x")
    layer = ConvexLayer(
        cp.Problem(cp.Minimize(cp.sum_squares(x - a)), [x >= 0]), [a], [x], structure="generic"
    )
    value = torch.stack([tensor(1.0, distance), tensor(1.0, -distance), tensor(1.0, 2.0)])
    margin = layer.solve(value).margin
    assert float(margin[0] / distance) == pytest.approx(1.0, rel=0.1)
    assert 1e-2 < float(margin[1] / distance) < 1e2
    assert float(margin[2]) > 0.1
    assert float(layer.check(value).margin[0]) == pytest.approx(float(margin[0]), rel=1e-6)


def test_a_kernel_does_not_say_its_margin():
    a, x = cp.Parameter(2), cp.Variable(2)
    layer = ConvexLayer(cp.Problem(cp.Minimize(cp.sum_squares(x - a))), [a], [x])
    assert bool(layer.solve(torch.ones(3, 2, dtype=torch.float64)).margin.isnan().all())

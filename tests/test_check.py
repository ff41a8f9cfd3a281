"""`checked` says where the solution map has no derivative, which constraint is at fault, and how
far away that is."""

import cvxpy as cp
import numpy as np
import pytest
import torch
from cases import CASES
from structures import SPELLINGS

import convlayer.report.examine
from convlayer import ConvexLayer, Status

FIELDS = (
    "margin",
    "rank",
    "size",
    "condition",
    "unique",
    "unique_duals",
    "ambiguous",
    "tie",
    "differentiable",
)
STRUCTURED = {spelling.structure: spelling for spelling in SPELLINGS}


def tensor(*values):
    return torch.as_tensor(values[0] if len(values) == 1 else values, dtype=torch.float64)


def box():
    """The projection onto 0 <= x <= u, by an attribute and a constraint."""
    a, u, x = (
        cp.Parameter(2, name="a"),
        cp.Parameter(2, name="u"),
        cp.Variable(2, name="x", nonneg=True),
    )
    return ConvexLayer(
        cp.Problem(cp.Minimize(cp.sum_squares(x - a)), [x <= u]), [a, u], [x], structure="generic"
    )


def simplex_program(*more):
    """A linear program over the simplex, with more constraints on x."""
    q, b, x = cp.Parameter(3, name="q"), cp.Parameter(name="b"), cp.Variable(3, name="x")
    rules = [cp.sum(x) == b, x >= 0, *(rule(x) for rule in more)]
    return ConvexLayer(cp.Problem(cp.Minimize(q @ x), rules), [q, b], [x], structure="generic")


def checked(layer, tensors):
    return layer.check(*tensors)


def named(check, part):
    """The one constraint whose name holds this."""
    (found,) = (constraint for constraint in check.constraints if part in constraint.name)
    return found


# Kinks
# ------------------------------------------------------------------------------------------------------------------


def test_a_weakly_active_constraint_is_named_with_its_entry_and_no_other_is():
    check = checked(
        box(), (tensor([[2.0, 1.0], [0.5, 0.3], [0.0, 0.5], [2.0, -1.0]]), tensor(1.0, 1.0))
    )
    upper, lower = named(check, "constraint 0, `x <= u`"), named(check, "`x >= 0`, declared")
    assert [c.name for c in check.constraints] == [upper.name, lower.name]
    assert upper.weakly_active.tolist() == [True, False, False, False]
    assert lower.weakly_active.tolist() == [False, False, True, False]
    assert upper.active.tolist() == [True, False, False, True]
    assert lower.active.tolist() == [False, False, True, True]
    assert (int(upper.entry[0]), int(lower.entry[2])) == (1, 0)
    assert check.differentiable.tolist() == [False, True, False, True]
    assert "Row 0: constraint 0, `x <= u`, is weakly active at entry 1" in str(check)
    assert "Row 2: `x >= 0`, declared, is weakly active at entry 0" in str(check)


@pytest.mark.parametrize("side", [1.0, -1.0])
def test_the_margin_falls_linearly_with_the_distance_to_the_kink(side):
    distances = tensor(10.0 ** -np.arange(2, 7.0))
    a = torch.stack([1 + side * distances, torch.full((5,), 0.5, dtype=torch.float64)], 1)
    check = checked(box(), (a, tensor(1.0, 1.0)))
    ratio = check.margin / distances
    assert float((ratio / ratio[-1] - 1).abs().max()) < 0.02
    assert 0.1 < float(ratio[-1]) < 10, "in units where x and y are of size one, and so is the data"
    assert torch.equal(check.margin, check.tie)
    assert check.differentiable.all()


def test_the_entry_is_counted_in_row_major_order_and_a_bound_by_its_side():
    low, c = cp.Parameter(name="low"), cp.Parameter((2, 3), name="c")
    z = cp.Variable((2, 3), bounds=[low, 1], name="z")
    layer = ConvexLayer(
        cp.Problem(cp.Minimize(cp.sum_squares(z - c)), [z <= 0.8]),
        [low, c],
        [z],
        structure="generic",
    )
    check = checked(layer, (tensor(0.0), tensor([[0.5, 0.2, 0.8], [0.3, 0.0, 0.5]])))
    assert [c.name for c in check.constraints] == [
        "constraint 0, `z <= 0.8`",
        "the lower bound of `z`",
        "the upper bound of `z`",
    ]
    assert [bool(c.weakly_active) for c in check.constraints] == [True, True, False]
    assert [int(c.entry) for c in check.constraints[:2]] == [2, 4]


def test_a_kink_of_an_atom_is_told_by_its_term_or_its_constraint():
    y, x = cp.Parameter(3, name="y"), cp.Variable(3, name="x")
    objective = 0.5 * cp.sum_squares(x - y) + cp.norm1(x)
    layer = ConvexLayer(
        cp.Problem(cp.Minimize(objective), [cp.norm(x) <= 2, x[0] <= 9]),
        [y],
        [x],
        structure="generic",
    )
    # Soft thresholding: the first row at its threshold, the second with a point on the ball that no
    # multiplier holds.
    check = checked(layer, (tensor([[1.0, 1.5, 0.2], [3.0, 0.3, 0.2]]),))
    term, ball = named(check, "the term `norm1(x)` of the objective"), named(check, "constraint 0")
    assert term.weakly_active.tolist() == [True, False]
    assert ball.weakly_active.tolist() == [False, True]
    assert not named(check, "constraint 1").active.any()
    assert not any("quad" in c.name for c in check.constraints), (
        "the definition of an auxiliary variable has no kink"
    )


@pytest.mark.parametrize("structure", ["auto", "generic"])
def test_a_tie_in_sparsemax_is_an_entry_at_the_threshold(structure):
    y, x = cp.Parameter(4, name="y"), cp.Variable(4, name="x")
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x - y)), [x >= 0, cp.sum(x) == 1])
    layer = ConvexLayer(problem, [y], [x], structure=structure)
    # tau = 0: the third entry stands at it.
    distances = tensor(0.0, 1e-5, 1e-4, 1e-3)
    rows = torch.stack(
        [torch.stack([tensor(0.6), tensor(0.4), -t, tensor(-0.5)]) for t in distances]
    )
    check = checked(layer, (rows,))
    assert check.differentiable.tolist() == [False, True, True, True]
    assert (
        float((check.tie[1:] / distances[1:] / (check.tie[3] / distances[3]) - 1).abs().max())
        < 1e-6
    )
    assert int(named(check, "`x >= 0`").entry[1]) == 2


# Null spaces
# ------------------------------------------------------------------------------------------------------------


def test_a_linear_program_on_a_face_is_not_unique_and_at_a_vertex_constant_in_its_cost():
    layer = simplex_program()
    q, b = tensor([[1.0, 2.0, 3.0], [1.0, 1.0, 2.0], [1.0, 1.0, 1.0]]), tensor(1.0)
    check = checked(layer, (q, b))
    assert check.unique.tolist() == [True, False, False]
    assert check.unique_duals.tolist() == [True, True, True]
    assert (check.size - check.rank).tolist() == [0, 1, 2], "the dimension of the face"
    assert check.zero_gradient["q"].all()
    assert not check.zero_gradient["b"].any()
    assert check.differentiable.tolist() == [True, False, False]
    assert float(check.adjoint_residual[0]) < 1e-12
    assert bool((check.adjoint_residual[1:] > 1e-3).all()), "no adjoint exists"
    # The oracle: on the face any change of the cost throws the solution to a vertex; at a vertex it
    # does nothing.
    step = tensor(1e-4, -1e-4, 0.0)
    moved = [layer(q[k] + step, b)[0] - layer(q[k] - step, b)[0] for k in (0, 1)]
    assert float(moved[0].abs().max()) < 1e-10
    assert float(moved[1].abs().max()) > 0.5
    text = str(check)
    assert "Row 1: The solution is not unique (rank" in text
    assert "no gradient reaches `q`" in text


def test_a_duplicated_constraint_is_redundant_and_the_others_are_not():
    layer = simplex_program(lambda x: 2 * x[0] >= 0, lambda x: x[2] <= 5)
    check = checked(layer, (tensor([[3.0, 1.0, 2.0], [1.0, 2.0, 3.0]]), tensor(1.0)))
    assert [c.redundant.tolist() for c in check.constraints] == [
        [False, False],
        [True, False],
        [True, False],
        [False, False],
    ]
    assert check.unique.all()
    assert check.unique_duals.tolist() == [False, True]
    assert check.differentiable.all(), (
        "no parameter moves the duplicates, and no one looks at their multipliers"
    )


def test_constraints_that_are_dependent_and_moved_by_parameters_are_named():
    a, b, c, x = (
        cp.Parameter(3, name="a"),
        cp.Parameter(name="b"),
        cp.Parameter(name="c"),
        cp.Variable(3, name="x"),
    )
    problem = cp.Problem(
        cp.Minimize(cp.sum_squares(x - a)), [cp.sum(x) == b, 2 * cp.sum(x) == c, x[0] <= 4]
    )
    layer = ConvexLayer(problem, [a, b, c], [x], structure="generic")
    check = checked(layer, (tensor(0.1, 0.2, 0.9), tensor(1.0), tensor(2.0)))
    assert bool(check.unique)
    assert bool(check.ambiguous)
    assert bool(check.differentiable), "along the parameters that leave the problem feasible"
    assert [bool(part.redundant) for part in check.constraints] == [True, True, False]
    assert "constraint 0" in str(check)
    assert "Drop what the others imply" in str(check)
    assert "constraint 2" not in str(check)


def test_tied_eigenvalues_at_the_cut_make_a_face():
    C, X = (
        cp.Parameter((4, 4), symmetric=True, name="C"),
        cp.Variable((4, 4), symmetric=True, name="X"),
    )
    problem = cp.Problem(
        cp.Maximize(cp.trace(C @ X)), [cp.trace(X) == 2, X >> 0, np.eye(4) - X >> 0]
    )
    layer = ConvexLayer(problem, [C], [X])
    assert layer.structure == "leading_eigenspace"
    gaps = tensor(1.0, 1e-2, 1e-4, 0.0)
    rotation = torch.linalg.qr(
        torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    )[0]
    values = torch.stack(
        [torch.stack([tensor(4.0), tensor(2.0), 2 - gap, tensor(-1.0)]) for gap in gaps]
    )
    check = checked(layer, (rotation @ torch.diag_embed(values) @ rotation.mT,))
    assert float((check.eigenvalue_gap - gaps / 4).abs().max()) < 1e-12
    assert check.unique.tolist() == [True, True, True, False]
    assert check.differentiable.tolist() == [True, True, True, False]
    assert bool((check.margin[1:3] / gaps[1:3] < 1).all())


def test_the_gap_of_a_psd_projection_is_that_between_its_positive_and_negative_eigenvalues():
    C, X = cp.Parameter((3, 3), symmetric=True, name="C"), cp.Variable((3, 3), PSD=True, name="X")
    layer = ConvexLayer(
        cp.Problem(cp.Minimize(cp.sum_squares(X - C) / 2)), [C], [X], structure="generic"
    )
    matrices = torch.diag_embed(
        tensor([[1.0, 0.5, -0.25], [1.0, 0.5, -0.5], [1.0, 0.5, 0.25], [1.0, 0.0, -1.0]])
    )
    check = checked(layer, (matrices,))
    # In units where the largest entry of A, sqrt 2, is one: s is divided by it and y multiplied.
    assert (
        float((check.eigenvalue_gap[:2] - tensor(0.25 + 0.25, 0.25 + 0.5) * 2**0.5).abs().max())
        < 1e-9
    )
    assert bool(check.eigenvalue_gap[2].isinf())
    assert check.differentiable.tolist() == [True, True, True, False]
    assert named(check, "`X >> 0`, declared").weakly_active.tolist() == [False, False, False, True]


# Numbers
# ----------------------------------------------------------------------------------------------------------------


def test_the_condition_is_numpys_of_the_equilibrated_matrix():
    P, G, x_star, y_star = (
        np.array([[1.0, 0.5], [0.5, 1.0]]),
        np.array([[1.0, 0.5]]),
        np.array([1.0, -0.5]),
        0.25,
    )
    # x and the cost are of size one, as are the rows of G: the units are those of the data.
    q, h = cp.Parameter(2, name="q"), cp.Parameter(name="h")
    x = cp.Variable(2)
    problem = cp.Problem(cp.Minimize(cp.quad_form(x, P) / 2 + q @ x), [G @ x <= h, x[1] <= 5])
    layer = ConvexLayer(problem, [q, h], [x], structure="generic")
    check = checked(layer, (tensor(-(P @ x_star + y_star * G[0])), tensor(float(G[0] @ x_star))))
    K = np.block([[P, G.T], [G, np.zeros((1, 1))]])
    scale = 1 / np.sqrt(np.abs(K).max(1))
    assert float(check.condition) == pytest.approx(
        np.linalg.cond(scale[:, None] * K * scale), rel=1e-9
    )
    assert (int(check.rank), int(check.size)) == (3, 3)


def test_an_ill_conditioned_least_squares_says_so_with_what_it_costs_the_adjoint():
    A, b, x = cp.Parameter((4, 3), name="A"), cp.Parameter(4, name="b"), cp.Variable(3, name="x")
    layer = ConvexLayer(
        cp.Problem(cp.Minimize(cp.sum_squares(A @ x - b))), [A, b], [x], structure="generic"
    )
    generator = torch.Generator().manual_seed(1)
    U, _ = torch.linalg.qr(torch.randn(4, 3, dtype=torch.float64, generator=generator))
    V, _ = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64, generator=generator))
    least = tensor(1.0, 1e-2, 1e-4, 1e-6)
    matrices = torch.stack(
        [U @ torch.diag(torch.stack([tensor(1.0), tensor(0.5), s])) @ V for s in least]
    )
    check = checked(layer.with_options(solver="clarabel"), (matrices, matrices.sum(-1)))
    assert bool((check.condition[1:] > 10 * check.condition[:-1]).all())
    assert bool((check.adjoint_residual[:3] < 1e-8).all())
    assert bool((check.adjoint_residual < 1e-12 * check.condition).all())
    assert check.unique.all()
    assert "ill-conditioned" in str(check)
    assert "Row 0" not in str(check)


def test_lanczos_tells_of_a_large_matrix_what_all_eigenvalues_do(monkeypatch):
    n = 60
    q, x = cp.Parameter(n, name="q"), cp.Variable(n, name="x")
    rules = [x >= 0, x <= 1, cp.sum(x) == n / 4, cp.sum(x) == n / 4]
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x) + q @ x), rules)
    layer = ConvexLayer(problem, [q], [x], structure="generic")
    rows = (torch.randn(2, n, dtype=torch.float64, generator=torch.Generator().manual_seed(0)),)
    whole = checked(layer, rows)
    monkeypatch.setattr(convlayer.report.examine, "DIRECT", 10)
    estimate = checked(layer, rows)
    for name in FIELDS:
        ours, theirs = getattr(whole, name).double(), getattr(estimate, name).double()
        assert torch.allclose(ours, theirs, rtol=1e-6), name
    assert [c.redundant.tolist() for c in whole.constraints] == [
        c.redundant.tolist() for c in estimate.constraints
    ]
    assert (whole.size - whole.rank).tolist() == [1, 1]


# Rows
# -------------------------------------------------------------------------------------------------------------------


def test_rows_that_failed_are_reported_and_leave_the_others_untouched():
    a, u = (
        tensor([[0.5, 0.2], [np.nan, 0.2], [2.0, 0.5], [0.5, 0.5]]),
        tensor([[1.0, 1.0]] * 3 + [[-1.0, 1.0]]),
    )
    check, good = checked(box(), (a, u)), checked(box(), (a[::2], u[::2]))
    assert check.status.tolist() == [
        Status.SOLVED,
        Status.BAD_INPUT,
        Status.SOLVED,
        Status.INFEASIBLE,
    ]
    assert check.differentiable.tolist() == [True, False, True, False]
    assert check.margin[1::2].isnan().all()
    assert check.condition[1::2].isnan().all()
    assert not check.unique[1::2].any()
    for name in FIELDS:
        assert torch.allclose(
            getattr(check, name)[::2].double(), getattr(good, name).double(), rtol=1e-6
        ), name
    text = str(check)
    assert "4 rows: 2 differentiable, 0 not, 2 failed." in text
    assert "Row 1: BAD_INPUT" in text
    assert "Row 3: INFEASIBLE" in text


def test_nothing_is_left_to_look_at_where_every_row_failed():
    check = checked(box(), (tensor([[np.nan, 0.0]]), tensor(1.0, 1.0)))
    assert check.margin.isnan().all()
    assert "1 row: 0 differentiable, 0 not, 1 failed." in str(check)


@pytest.mark.parametrize("batch", [(), (1,), (0,), (2, 3)])
def test_every_tensor_has_the_batch_shape(batch):
    generator = torch.Generator().manual_seed(0)
    check = checked(
        box(), (torch.randn(*batch, 2, dtype=torch.float64, generator=generator), tensor(1.0, 1.0))
    )
    parts = [value for value in vars(check).values() if isinstance(value, torch.Tensor)]
    parts += [*check.zero_gradient.values(), check.differentiable]
    parts += [v for c in check.constraints for v in vars(c).values() if isinstance(v, torch.Tensor)]
    assert {tuple(part.shape) for part in parts} == {batch}
    assert str(check)


def test_many_rows_in_need_are_told_five_by_five():
    a = tensor(np.column_stack([np.ones(12), np.full(12, 0.5)]))
    text = str(checked(box(), (a, tensor(1.0, 1.0))))
    assert text.count("is weakly active") == 5
    assert "Rows 5, 6, 7, 8, 9, 10, 11: in need of attention too." in text


def test_a_problem_without_constraints_or_with_shared_parameters_is_checked():
    a, x = cp.Parameter(2, name="a"), cp.Variable(2, name="x")
    layer = ConvexLayer(
        cp.Problem(cp.Minimize(cp.quad_form(x, np.eye(2)) - a @ x)), [a], [x], structure="generic"
    )
    check = checked(layer, (tensor(1.0, 2.0),))
    assert check.constraints == ()
    assert bool(check.margin.isinf())
    assert float(check.condition) == pytest.approx(1.0)


# Laws
# -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES.values(), ids=str)
def test_it_calls_differentiable_what_backward_does_not_flag_and_names_every_row(case):
    tensors = case.sample(2)
    check, solution = checked(case.shared, tensors), case.shared.solve(*tensors)
    assert torch.equal(check.differentiable, ~solution.degenerate)
    assert float(check.adjoint_residual.max()) < 1e-10
    assert not any("auxiliary" in constraint.name for constraint in check.constraints)
    users = len(case.declare().problem.constraints)
    assert all(
        c.name.startswith(f"constraint {k}, ") for k, c in enumerate(check.constraints[:users])
    )
    assert not any(c.name.startswith("constraint ") for c in check.constraints[users:])


@pytest.mark.parametrize("case", CASES.values(), ids=str)
def test_a_parameter_is_without_gradient_exactly_where_finite_differences_vanish(case):
    tensors = case.sample(1)
    check = checked(case.shared, tensors)
    generator = torch.Generator().manual_seed(5)
    base = case.shared.solve(*tensors).variables
    for k, name in enumerate(check.zero_gradient):
        step = 1e-4 * torch.randn(tensors[k].shape, dtype=torch.float64, generator=generator)
        step = (step + step.mT) / 2 if case.shared._canonical.parameters[k].symmetric else step
        moved = list(tensors)
        moved[k] = tensors[k] + step * tensors[k].abs()
        after = case.shared.with_options(validate=False).solve(*moved).variables
        change = max(float((p - q).abs().max()) for p, q in zip(base, after, strict=True))
        assert (change < 1e-9) == bool(check.zero_gradient[name].all()), (name, change)


@pytest.mark.parametrize("spelling", STRUCTURED.values(), ids=str)
def test_a_structures_layer_is_checked_as_its_cone_program(spelling):
    layer, tensors = spelling.layer(), spelling.sample((3,), 0)
    mine, generic = (
        checked(layer, tensors),
        checked(layer.with_options(structure="generic"), tensors),
    )
    for name in FIELDS:
        assert torch.equal(getattr(mine, name), getattr(generic, name)), name
    assert [c.name for c in mine.constraints] == [c.name for c in generic.constraints]

"""Kinks of the canonical form that are none of the user's: the solution is smooth in what
parameters move and outputs read, the cone program degenerate. There the gradient is the derivative,
from both sides, and nothing is flagged; at the user's own kinks it is."""

import warnings

import cvxpy as cp
import numpy as np
import pytest
import torch

from convlayer import AccuracyWarning, ConvexLayer, GradientWarning, Status

ROWS = 6
STEP = 1e-5


def variable(*shape, **attributes):
    return cp.Variable(shape, **attributes)


def on_the_plane(p):
    return p + (1 - p.sum(-1, keepdims=True)) / p.shape[-1]


def squared_slack(seen):
    x, s, q = variable(3), variable(3), cp.Parameter(3)
    cost = cp.sum_squares(x - q) + 5 * cp.sum_squares(s)
    return cp.Problem(cp.Minimize(cost), [x <= 0.5 + s, s >= 0]), [q], [x, s] if seen else [x], None


def soft_control():
    A, B, x0 = np.array([[1, 0.3], [0, 1]]), np.array([[0.0], [0.3]]), cp.Parameter(2)
    x, u, s = variable(5, 2), variable(4, 1), variable(5, 2, nonneg=True)
    rules = [x[0] == x0, cp.abs(u) <= 1, x <= 1 + s, x >= -1 - s]
    rules += [x[k + 1] == A @ x[k] + B @ u[k] for k in range(4)]
    cost = cp.sum_squares(x) + 0.1 * cp.sum_squares(u) + 100 * cp.sum_squares(s)
    return cp.Problem(cp.Minimize(cost), rules), [x0], [u], None


def of_difference(penalty, *rules):
    """min penalty(x, q) with some of the rules."""

    def declare():
        x, q = variable(3), cp.Parameter(3)
        return cp.Problem(cp.Minimize(penalty(x, q)), [rule(x) for rule in rules]), [q], [x], None

    return declare


def box(x):
    return x <= 0.5


def ball(x):
    return cp.norm(x) <= 1


def ridge(x):
    return 0.5 * cp.sum_squares(x)


def own_absolute_value():
    x, t, q = variable(3), variable(3), cp.Parameter(3)
    return (
        cp.Problem(cp.Minimize(cp.sum_squares(t)), [t >= x - q, t >= q - x, x <= 0.5]),
        [q],
        [x],
        None,
    )


def declared_twice():
    x, q, p = variable(3, nonneg=True), cp.Parameter(3), cp.Parameter()
    return (
        cp.Problem(cp.Minimize(cp.sum_squares(x - q)), [x >= 0, x <= p, cp.max(x) <= p]),
        [q, p],
        [x],
        None,
    )


def projection_by_a_norm(*rules):
    def declare():
        y, p = variable(4), cp.Parameter(4)
        sample = (
            on_the_plane if not rules else lambda p: np.abs(p) / np.abs(p).sum(-1, keepdims=True)
        )
        problem = cp.Problem(
            cp.Minimize(cp.norm(y - p)), [cp.sum(y) == 1, *(rule(y) for rule in rules)]
        )
        return problem, [p], [y], sample

    return declare


def pure(norm):
    """A point that the constraints let be."""
    return lambda x, q: norm(x - q)


SMOOTH = {
    "squared slack": lambda: squared_slack(False),
    "squared slack, an output": lambda: squared_slack(True),
    "soft constraints in a controller": soft_control,
    "squared hinge": of_difference(lambda x, q: cp.sum_squares(cp.pos(1 - x + q)) + ridge(x)),
    "squared maximum": of_difference(
        lambda x, q: cp.sum(cp.square(cp.maximum(q - x, 0))) + ridge(x), box
    ),
    "power of a positive part": of_difference(
        lambda x, q: cp.sum(cp.power(cp.pos(x - q), 2)) + ridge(x)
    ),
    "squared negative part": of_difference(lambda x, q: cp.sum_squares(cp.neg(x - q)) + ridge(x)),
    "quadratic over a number": of_difference(
        lambda x, q: cp.quad_over_lin(cp.pos(x - q), 2) + ridge(x), box
    ),
    "scalene": of_difference(lambda x, q: cp.sum(cp.scalene(x - q, 0.7, 1.3)) + ridge(x)),
    "squared scalene": of_difference(
        lambda x, q: cp.sum_squares(cp.scalene(x - q, 0.7, 1.3)) + ridge(x)
    ),
    "sum of the largest": of_difference(lambda x, q: cp.sum_largest(x, 2) + cp.sum_squares(x - q)),
    "sorted": of_difference(
        lambda x, q: 0.3 * cp.dotsort(x, np.array([3.0, 2, 1])) + cp.sum_squares(x - q)
    ),
    "power of an absolute value": of_difference(
        lambda x, q: cp.sum(cp.power(cp.abs(x - q), 2)), box
    ),
    "squared absolute value": of_difference(lambda x, q: cp.sum(cp.square(cp.abs(x - q))), box),
    "its squares in a ball": of_difference(
        lambda x, q: cp.sum_squares(cp.abs(x - q)) + 0.1 * cp.norm1(x), ball
    ),
    "squared norm": of_difference(lambda x, q: cp.square(cp.norm(x - q)), box),
    "power of a norm": of_difference(lambda x, q: cp.power(cp.norm(x - q), 2), ball),
    "squared norm bounded": of_difference(
        lambda x, q: cp.sum_squares(x - q), lambda x: cp.square(cp.norm(x)) <= 1
    ),
    "squared hinge bounded": of_difference(
        lambda x, q: cp.sum_squares(x - q), lambda x: cp.sum_squares(cp.pos(x)) <= 0.5
    ),
    "absolute value by hand": own_absolute_value,
    "declared twice": declared_twice,
    "projection by a norm": projection_by_a_norm(),
    "projection by a norm on the simplex": projection_by_a_norm(lambda y: y >= 0),
}


def values_of(parameters, sample):
    random = np.random.default_rng(0)
    values = [np.asarray(random.standard_normal((ROWS, *p.shape))) for p in parameters]
    if sample is not None:
        values = [sample(value) for value in values]
    values[1:] = [np.abs(value) for value in values[1:]]
    return [torch.from_numpy(value) for value in values]


def differences(layer, values, directions, bars):
    """The one-sided difference quotients of <bars, solution>, left and right, (rows,) each."""

    def loss(step):
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            outputs = layer(*(v + step * d for v, d in zip(values, directions, strict=True)))
        return sum(
            (bar * out).reshape(ROWS, -1).sum(1) for bar, out in zip(bars, outputs, strict=True)
        )

    here = loss(0.0)
    return (here - loss(-STEP)) / STEP, (loss(STEP) - here) / STEP


def derivative(problem, parameters, variables, sample, structure):
    """(flagged (rows,), our directional derivative, and the quotients from the left and the
    right)."""
    layer = ConvexLayer(problem, parameters, variables, structure=structure)
    values = [value.requires_grad_() for value in values_of(parameters, sample)]
    random = torch.Generator().manual_seed(1)
    directions, bars = (
        [torch.randn(ROWS, *part.shape, dtype=torch.float64, generator=random) for part in parts]
        for parts in (parameters, variables)
    )
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        solution = layer.solve(*values)
        grads = torch.autograd.grad(solution.variables, values, bars)
    assert (solution.status == Status.SOLVED).all()
    warned = any(issubclass(w.category, GradientWarning) for w in said)
    assert warned == bool(solution.degenerate.any())
    ours = sum((g * d).reshape(ROWS, -1).sum(1) for g, d in zip(grads, directions, strict=True))
    return (
        solution.degenerate,
        ours,
        *differences(layer, [v.detach() for v in values], directions, bars),
    )


@pytest.mark.parametrize("structure", ["auto", "generic"])
@pytest.mark.parametrize("name", SMOOTH)
def test_where_the_solution_is_smooth_the_gradient_is_right_and_nothing_is_flagged(name, structure):
    flagged, ours, left, right = derivative(*SMOOTH[name](), structure)
    size = 1 + torch.maximum(left.abs(), right.abs())
    assert ((left - right).abs() <= 1e-3 * size).all(), "the case is not smooth"
    assert ((ours - (left + right) / 2).abs() <= 1e-4 * size).all()
    assert not flagged.any()


@pytest.mark.parametrize(
    "square", [lambda z: cp.sum(cp.square(cp.abs(z))), lambda z: cp.square(cp.norm(z))]
)
def test_where_only_some_directions_leave_the_apex_the_gradient_is_that_of_the_squares(square):
    """The projection onto g'x <= 1 of a point inside, and of one beyond with g_2 = 0, where x_2 =
    q_2 until g_2 moves."""
    x, q, g = variable(2), cp.Parameter(2), cp.Parameter(2)
    layers = (
        ConvexLayer(cp.Problem(cp.Minimize(f(x - q)), [g @ x <= 1]), [q, g], [x])
        for f in (square, cp.sum_squares)
    )
    q_value = torch.tensor([[0.3, 0.4], [2.0, 0.7]], dtype=torch.float64, requires_grad=True)
    g_value = torch.tensor([1.0, 0.0], dtype=torch.float64).expand(2, 2).clone().requires_grad_()
    bar = torch.tensor([[0.7, -1.3], [0.4, 2.0]], dtype=torch.float64)
    ours, right = (
        torch.autograd.grad((bar * layer(q_value, g_value)[0]).sum(), (q_value, g_value))
        for layer in layers
    )
    for one, other in zip(ours, right, strict=True):
        assert torch.allclose(one, other, atol=1e-9)


def test_a_constraint_that_is_written_otherwise_keeps_its_multiplier():
    x, q = variable(3), cp.Parameter(3)
    rules = [cp.square(cp.norm(x)) <= 1, cp.sum(cp.power(cp.abs(x), 4)) <= 0.9]
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x - q)), rules)
    value = np.array([0.2, 0.4, 1.5])
    found = ConvexLayer(problem, [q], [x, *(rule.dual_variables[0] for rule in rules)])(
        torch.from_numpy(value)
    )
    q.value = value
    problem.solve(solver=cp.CLARABEL)
    for ours, theirs in zip(found, [x.value, *(rule.dual_value for rule in rules)], strict=True):
        assert np.allclose(ours.numpy(), theirs, atol=1e-4)


def test_at_the_apex_second_derivatives_are_those_of_the_smooth_spelling():
    def layer(square):
        x, q = variable(3), cp.Parameter(3)
        problem = cp.Problem(cp.Minimize(square(x - q) + 0.1 * cp.sum(cp.exp(x))), [x <= 0.5])
        return ConvexLayer(problem, [q], [x])

    def loss(layer):
        return lambda q: (layer(q)[0] ** 3).sum()

    q = torch.tensor([-1.0, 0.2, 2.0], dtype=torch.float64)
    squares = (lambda z: cp.sum_squares(cp.pos(z)) + cp.sum_squares(cp.neg(z)), cp.sum_squares)
    one, two = (torch.autograd.functional.hessian(loss(layer(square)), q) for square in squares)
    assert torch.allclose(one, two, atol=1e-7)


# The user's own kinks
# ----------------------------------------------------------------------------------------------------


def run(problem, parameters, variables, *values):
    """Whether the row is flagged."""
    layer = ConvexLayer(problem, parameters, variables, structure="generic")
    return bool(layer.solve(*(torch.tensor(v, dtype=torch.float64) for v in values)).degenerate)


def test_a_slack_that_a_parameter_moves_off_its_bound_is_flagged():
    x, s, q, low = variable(), variable(), cp.Parameter(), cp.Parameter()
    problem = cp.Problem(cp.Minimize(cp.square(x - q) + cp.square(s)), [x <= 0.5 + s, s >= low])
    assert run(problem, [q, low], [x, s], 0.2, 0.0)
    assert run(problem, [q, low], [s], 0.2, 0.0)


def test_a_kink_is_flagged_though_only_one_of_many_outputs_feels_it():
    x, q = variable(3), cp.Parameter(3)
    problem = cp.Problem(
        cp.Minimize(cp.sum_squares(x - q) + cp.sum_squares(cp.pos(x - 2))), [x <= 0.5]
    )
    assert run(problem, [q], [x], [0.1, 0.5, 0.3])
    assert not run(problem, [q], [x], [0.1, 0.6, 0.3])


def test_an_absolute_value_that_is_an_output_is_flagged_at_zero():
    """x = q, t = |x - r|."""
    x, t, q, r = variable(), variable(), cp.Parameter(), cp.Parameter()
    problem = cp.Problem(cp.Minimize(cp.square(x - q) + t), [t >= cp.abs(x - r)])
    assert not run(problem, [q, r], [x, t], 1.0, 0.3)
    kink = cp.Problem(cp.Minimize(cp.square(x - q) + 1e-3 * cp.square(t)), [t >= x - r, t >= r - x])
    assert run(kink, [q, r], [t], 0.3, 0.3)


def test_a_norm_that_is_zero_is_flagged_where_its_multiplier_leans():
    """min |y - p| + |y|^2/10, sum y = 1 at a feasible p: off the plane y moves by |dp| as well."""
    y, p = variable(3), cp.Parameter(3)
    problem = cp.Problem(cp.Minimize(cp.norm(y - p) + 0.1 * cp.sum_squares(y)), [cp.sum(y) == 1])
    assert run(problem, [p], [y], [0.2, 0.5, 0.3])


def test_two_norms_that_are_zero_at_once_are_flagged():
    y, p = variable(2), cp.Parameter((2, 2))
    problem = cp.Problem(cp.Minimize(cp.norm(y - p[0]) + cp.norm(y - p[1])))
    assert run(problem, [p], [y], [[0.2, 0.5], [0.2, 0.5]])


def test_an_output_that_is_free_on_one_side_is_flagged():
    x, z, q = variable(2), variable(), cp.Parameter(2)
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x - q)), [z >= cp.norm(x), z <= 10])
    assert run(problem, [q], [x, z], [0.3, 0.4])
    assert not run(problem, [q], [x], [0.3, 0.4])


# Redundant equalities
# ----------------------------------------------------------------------------------------------------


def transport(entropy):
    cost = np.random.default_rng(0).random((3, 3))
    X, r, c = variable(3, 3), cp.Parameter(3), cp.Parameter(3)
    value = cp.sum(cp.multiply(cost, X)) + (
        -0.1 * cp.sum(cp.entr(X)) if entropy else 0.1 * cp.sum_squares(X)
    )
    rules = [cp.sum(X, axis=1) == r, cp.sum(X, axis=0) == c]
    return cp.Problem(cp.Minimize(value), [*rules, X >= 0]), [r, c], X, rules


@pytest.mark.parametrize("structure", ["auto", "generic"])
@pytest.mark.parametrize("entropy", [True, False])
def test_both_marginals_of_a_plan_are_differentiated_along_feasible_ones_on_every_path(
    entropy, structure
):
    problem, parameters, X, _ = transport(entropy)
    r, c = (torch.tensor(v, dtype=torch.float64) for v in ([0.2, 0.5, 0.3], [0.4, 0.25, 0.35]))
    dr, dc = (torch.tensor(v, dtype=torch.float64) for v in ([0.3, -0.1, -0.2], [-0.4, 0.3, 0.1]))
    layer = ConvexLayer(problem, parameters, [X], structure=structure)
    r, c = r.requires_grad_(), c.requires_grad_()
    solution = layer.solve(r, c)
    assert not solution.degenerate
    bar = torch.linspace(-1, 2, 9, dtype=torch.float64).reshape(3, 3)
    r_bar, c_bar = torch.autograd.grad((bar * solution.variables[0]).sum(), (r, c))
    with torch.no_grad():
        up, down = (layer(r + h * dr, c + h * dc)[0] for h in (1e-5, -1e-5))
    right = (bar * (up - down)).sum() / 2e-5
    assert torch.allclose((r_bar * dr).sum() + (c_bar * dc).sum(), right, rtol=1e-5, atol=1e-8)


def test_their_multipliers_are_not_unique_and_flagged_as_outputs():
    problem, parameters, X, rules = transport(False)
    assert run(
        problem, parameters, [X, rules[0].dual_variables[0]], [0.2, 0.5, 0.3], [0.4, 0.25, 0.35]
    )


def depending(kind):
    """(the equalities of x, the parameter of their right-hand sides, its value, a direction in
    which they agree)"""
    p = cp.Parameter(2)
    rules = {
        "declared twice": lambda x: [cp.sum(x) == p[0], 2 * cp.sum(x) == 2 * p[0], x[1] == p[1]],
        "and their total": lambda x: [x[:2] == p, x[0] + x[1] == cp.sum(p)],
        "apart": lambda x: [cp.sum(x) == p[0], 2 * cp.sum(x) == p[1]],
    }
    return rules[kind], p, [0.3, 0.6], [1.0, 2.0]


@pytest.mark.parametrize("structure", ["auto", "generic"])
@pytest.mark.parametrize("kind", ["declared twice", "and their total", "apart"])
def test_equalities_that_depend_on_each_other_are_flagged_by_no_path_unless_their_multipliers_are_outputs(
    kind, structure
):
    rules, p, value, direction = depending(kind)
    x, q = variable(3), cp.Parameter(3)
    own = rules(x)
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x) + q @ x), own)
    layer = ConvexLayer(problem, [q, p], [x], structure=structure)
    slope = torch.tensor([1.0, 2.0, -2.0], dtype=torch.float64)
    at, along = (torch.tensor(v, dtype=torch.float64) for v in (value, direction))
    at.requires_grad_()
    solution = layer.solve(slope, at)
    assert solution.status == Status.SOLVED
    assert not solution.degenerate
    bar = torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64)
    (ours,) = torch.autograd.grad((bar * solution.variables[0]).sum(), at)
    with torch.no_grad():
        up, down = (layer(slope, at + step * along)[0] for step in (1e-3, -1e-3))
    assert torch.allclose((ours * along).sum(), (bar * (up - down)).sum() / 2e-3, rtol=1e-9)
    seen = ConvexLayer(problem, [q, p], [x, own[0].dual_variables[0]], structure=structure)
    assert seen.solve(slope, at).degenerate


# Programs without costs
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", [None, "clarabel", "scs", "interior_point"])
def test_a_feasibility_problem_with_room_is_solved(solver):
    S, A = cp.Variable((2, 2), symmetric=True), cp.Parameter((2, 2), symmetric=True)
    options = {} if solver is None else {"solver": solver}
    problem = cp.Problem(cp.Minimize(0), [S >> A, S << A + np.eye(2)])
    value = torch.tensor([[1.0, 0.3], [0.3, 2.0]], dtype=torch.float64)
    solution = ConvexLayer(problem, [A], [S], **options).solve(value)
    assert solution.status == Status.SOLVED
    gap = torch.linalg.eigvalsh(solution.variables[0] - value)
    assert gap.min() >= -1e-8
    assert gap.max() <= 1 + 1e-8


@pytest.mark.parametrize("structure", ["auto", "generic"])
def test_constant_equalities_that_depend_on_each_other_are_flagged_on_neither_path(structure):
    """Both marginals of a table, without its sign: the kernel and the cone program say the same."""
    Z, M, r, c = cp.Variable((3, 3)), cp.Parameter((3, 3)), cp.Parameter(3), cp.Parameter(3)
    rules = [cp.sum(Z, axis=1) == r, cp.sum(Z, axis=0) == c]
    problem = cp.Problem(cp.Minimize(cp.sum_squares(Z - M)), rules)
    g = torch.Generator().manual_seed(0)
    values = (
        torch.randn(4, 3, 3, dtype=torch.float64, generator=g),
        *(torch.softmax(torch.randn(4, 3, dtype=torch.float64, generator=g), -1) for _ in "rc"),
    )
    layer = ConvexLayer(problem, [M, r, c], [Z], structure=structure)
    assert not layer.solve(*values).degenerate.any()
    duals = ConvexLayer(problem, [M, r, c], [Z, rules[0].dual_variables[0]], structure=structure)
    assert duals.solve(*values).degenerate.all()


# Bounds that a cone implies, multipliers that a matrix turns
# ------------------------------------------------------------


@pytest.mark.parametrize("how", ["rule", "attribute"])
def test_a_bound_beside_an_entropy_changes_nothing(how):
    """The softmax of scores so far apart that some shares are rounding."""
    y, q = cp.Variable(5, nonneg=how == "attribute"), cp.Parameter(5)
    rules = [cp.sum(y) == 1, *([y >= 0] if how == "rule" else [])]
    layer = ConvexLayer(
        cp.Problem(cp.Maximize(q @ y + 0.3 * cp.sum(cp.entr(y))), rules),
        [q],
        [y],
        structure="generic",
    )
    generator = torch.Generator().manual_seed(0)
    score, bar = (torch.randn(32, 5, dtype=torch.float64, generator=generator) for _ in "qb")
    score = (5 * score).requires_grad_()
    solution, exact = layer.solve(score), torch.softmax(score / 0.3, 1)
    assert (solution.status == Status.SOLVED).all()
    assert not solution.degenerate.any()
    assert torch.allclose(solution.variables[0], exact, atol=1e-9)
    ours, right = (
        torch.autograd.grad((bar * value).sum(), score)[0]
        for value in (solution.variables[0], exact)
    )
    assert torch.allclose(ours, right, atol=1e-8)


def test_the_multiplier_of_such_a_bound_is_still_an_output():
    x, q = cp.Variable(2), cp.Parameter(2)
    bound = x >= 0
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x - q) - cp.sum(cp.sqrt(x))), [bound])
    x_value, y_value = ConvexLayer(problem, [q], [x, bound.dual_variables[0]])(
        torch.tensor([1.0, 2.0], dtype=torch.float64)
    )
    assert (x_value > 0).all()
    assert torch.allclose(y_value, torch.zeros(2, dtype=torch.float64), atol=1e-8)


def test_a_matrix_that_chooses_among_multipliers_is_flagged():
    """min |x - q|^2/2 + |Mx|_1 with M of rank two: x_1 + x_2 is free until M moves, and then held
    or not by the multipliers' choice."""
    x, q, M = cp.Variable(3), cp.Parameter(3), cp.Parameter((4, 3))
    problem = cp.Problem(cp.Minimize(0.5 * cp.sum_squares(x - q) + cp.norm1(M @ x)))
    matrix = [[-1.0, 1.0, -1.0], [0.0, 0.0, 1.0], [-1.0, 1.0, 1.0], [1.0, -1.0, 1.0]]
    assert run(problem, [q, M], [x], [0.0, 0.0, 2.0], matrix)
    fixed = cp.Problem(cp.Minimize(0.5 * cp.sum_squares(x - q) + cp.norm1(np.array(matrix) @ x)))
    assert not run(fixed, [q], [x], [0.0, 0.0, 2.0])


def test_a_multiplier_shared_with_a_curved_boundary_is_flagged_where_the_curvature_is_felt():
    """min q'x in the unit ball at q = -e_1, beside x_1 <= 1, which touches it: x = -q/|q|, which
    the boundary gives only if the multiplier is its alone. In the ball beside x_1 >= 0 it is."""
    x, q = cp.Variable(3), cp.Parameter(3)
    touching, apart = (
        cp.Problem(cp.Minimize(q @ x), [cp.norm(x) <= 1, rule]) for rule in (x[0] <= 1, x[0] >= 0)
    )
    assert run(touching, [q], [x], [-1.0, 0.0, 0.0])
    assert not run(touching, [q], [x], [-1.0, 0.1, 0.0])
    assert not run(apart, [q], [x], [-1.0, 0.0, 0.0])


def test_a_multiplier_shared_with_a_curved_boundary_is_not_flagged_where_nothing_moves_along_it():
    """The constraints hold x at a corner of a half ball and two planes through it, one of them to
    spare."""
    x, q = cp.Variable(2), cp.Parameter(2)
    rules = [cp.norm(cp.hstack([x, 0])) <= 1, x[0] + x[1] <= 1, x[0] - x[1] <= 1]
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x - q)), rules)
    assert not run(problem, [q], [x], [3.0, 0.2])


def test_a_single_feasible_point_that_is_found_roughly_is_flagged():
    """The unit ball and x_1 >= 1, which touches it."""
    x, q = cp.Variable(3), cp.Parameter(3)
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x - q)), [cp.norm(x) <= 1, x[0] >= 1])
    layer = ConvexLayer(problem, [q], [x], structure="generic", on_failure="nan")
    with pytest.warns(AccuracyWarning):
        solution = layer.solve(
            torch.tensor([[1.0, 2.0, 0.0], [-1.0, 1.0, 2.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
        )
    assert solution.degenerate.all()


@pytest.mark.parametrize("solver", [None, "clarabel", "interior_point"])
def test_a_ball_through_the_vertex_of_linear_costs_is_flagged(solver):
    """|(2, 2, -1, 0)| = 3, where the absolute values have their kink too: a double root."""
    x, p, q = cp.Variable(4), cp.Parameter(4), cp.Parameter(4)
    costs = cp.norm_inf(x - p) + cp.norm1(x - q)
    rules = [-2 * x[0] - 2 * x[1] + 2 * x[2] <= -1, cp.norm(x) <= 3]
    layer = ConvexLayer(
        cp.Problem(cp.Minimize(costs), rules), [p, q], [x], structure="generic", solver=solver
    )
    values = [[1.0, 2.0, -2.0, 2.0], [2.0, 2.0, -1.0, -1.0]]
    solution = layer.solve(*torch.tensor(values, dtype=torch.float64))
    assert solution.degenerate
    torch.testing.assert_close(
        solution.variables[0],
        torch.tensor([2.0, 2.0, -1.0, 0.0], dtype=torch.float64),
        atol=1e-6,
        rtol=0,
    )

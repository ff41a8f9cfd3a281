"""Whatever the spelling, `auto` agrees with `generic`: value, objective, status and gradient, over
a table of nasty problems.

`@nasty` registers a declaration () -> (problem, parameters, variables), or with values of the
parameters for the layer at them; without, they are drawn by what they declare.
"""

import warnings

import cvxpy as cp
import numpy as np
import pytest
import torch

from convlayer import ConvexLayer

TABLE = {}


def nasty(declare):
    assert declare.__name__ not in TABLE
    TABLE[declare.__name__] = declare
    return declare


RNG = np.random.default_rng(11)
C_6x3, C_4x4, POSITIVE = (
    RNG.standard_normal((6, 3)),
    RNG.standard_normal((4, 4)),
    np.arange(1.0, 5.0),
)
COMPLEX = RNG.standard_normal((6, 3)) + 1j * RNG.standard_normal((6, 3))
INDEFINITE = np.array([[1.0, 2, 0], [2, 1, 0], [0, 0, 1]])


def parameter(*shape, **attributes):
    return cp.Parameter(shape, **attributes)


def weight(*shape):
    return cp.Parameter(shape, nonneg=True)


def least(objective, rules, parameters, variables, *values):
    return cp.Problem(cp.Minimize(objective), rules), parameters, variables, *values


def most(objective, rules, parameters, variables, *values):
    return cp.Problem(cp.Maximize(objective), rules), parameters, variables, *values


# The same expression in two places


@nasty
def the_same_term_twice_in_hstack():
    x, y, p, q = cp.Variable(3), cp.Variable(2), parameter(3), parameter(2)
    s = cp.square(x - p)
    return least(
        cp.sum(cp.hstack([s, s, cp.square(y - q)])) + cp.sum_squares(x + 1), [], [p, q], [x, y]
    )


@nasty
def the_same_term_twice_before_a_step():
    u, p, mu = cp.Variable(6), parameter(6), weight()
    s = cp.square(u - p)
    return least(cp.sum(cp.hstack([s, s, mu * cp.abs(cp.diff(u))])), [], [p, mu], [u])


@nasty
def the_same_term_twice_alone():
    x, p = cp.Variable((3, 2)), parameter(3, 2)
    s = cp.square(x - p)
    return least(cp.sum(cp.hstack([s, s]) @ np.arange(4.0)) + cp.sum_squares(x), [], [p], [x])


@nasty
def the_same_map_twice_in_a_square():
    x, y, p = cp.Variable(3), cp.Variable(3), parameter(3)
    z = cp.hstack([x, x, y - p])
    return least(cp.sum_squares(cp.cumsum(z)) + cp.sum_squares(z), [], [p], [x, y])


@nasty
def the_same_map_twice_in_a_constraint():
    x, p = cp.Variable(3), parameter(3)
    s = x - p
    return least(cp.sum_squares(x), [cp.hstack([s, s, 2 * x])[3:5] == 1], [p], [x])


@nasty
def a_parameter_in_the_matrix_and_the_right_side():
    A, x = parameter(5, 3), cp.Variable(3)
    fit = cp.sum_squares(A @ x - A[:, 0] + cp.sum(A)) + cp.sum_squares(A.T @ np.ones(5) - x)
    return least(fit, [], [A], [x])


@nasty
def a_parameter_in_the_weight_and_the_slope():
    r, y, x = weight(), parameter(5), cp.Variable(5)
    return least(
        r * cp.sum_squares(x) + (r + 1) * cp.sum_squares(x - 1) + y @ x,
        [cp.sum(x) == r, x >= 0],
        [y, r],
        [x],
    )


@nasty
def a_parameter_for_temperature_radius_and_scores():
    a, p, y = weight(), parameter(3), cp.Variable(3)
    return most(
        a * cp.sum(y) + p @ y + a * cp.sum(cp.entr(y)), [cp.sum(y) == a, y >= 0], [p, a], [y]
    )


@nasty
def a_parameter_that_weighs_fit_and_steps():
    w, p, u = weight(), parameter(6), cp.Variable(6)
    return least(
        (w + 1) * cp.sum_squares(u - 1) + p @ u + 2 * w * cp.tv(u) + w * cp.sum(u), [], [p, w], [u]
    )


# Domains


@nasty
def an_entropy_selected_away():
    p, x = parameter(4), cp.Variable(4)
    return most(p @ x + cp.sum(cp.entr(cp.hstack([x, 0.4 - x]))[:4]), [cp.sum(x) == 1], [p], [x])


@nasty
def an_entropy_of_weight_zero():
    p, x = parameter(4), cp.Variable(4)
    entropies = cp.entr(cp.hstack([x, 0.4 - x]))
    return most(p @ x + np.repeat([1.0, 0.0], 4) @ entropies, [cp.sum(x) == 1], [p], [x])


@nasty
def zero_times_the_entropy():
    p, x = parameter(4), cp.Variable(4)
    return least(cp.sum_squares(x - p) - 0 * cp.sum(cp.entr(x)), [], [p], [x])


@nasty
def an_entropy_of_a_scaled_argument():
    p, x = parameter(4), cp.Variable(4)
    return most(p @ x + cp.sum(cp.entr(2 * x)) / 3, [cp.sum(x) == 1, x >= 0], [p], [x])


@nasty
def an_entropy_of_the_negative():
    p, x = parameter(4), cp.Variable(4)
    return most(p @ x + cp.sum(cp.entr(-x)), [cp.sum(x) == -1], [p], [x])


@nasty
def an_entropy_of_what_is_left():
    p, x = parameter(4), cp.Variable(4)
    return most(p @ x + cp.sum(cp.entr(1 - x)), [cp.sum(x) == 1], [p], [x])


@nasty
def two_entropies_of_different_scale():
    p, x = parameter(4), cp.Variable(4)
    return most(p @ x + cp.sum(cp.entr(2 * x)) / 3 + cp.sum(cp.entr(x)), [cp.sum(x) == 1], [p], [x])


@nasty
def a_shifted_relative_entropy():
    p, x = parameter(4), cp.Variable(4)
    return least(p @ x + cp.sum(cp.rel_entr(2 * x + 0.1, POSITIVE)), [cp.sum(x) == 1], [p], [x])


@nasty
def a_divergence_of_equal_scales():
    p, t, x = parameter(4), weight(), cp.Variable(4)
    return least(p @ x + t * cp.sum(cp.kl_div(3 * x, POSITIVE)), [cp.sum(x) == 2], [p, t], [x])


@nasty
def a_divergence_of_unequal_scales():
    p, x = parameter(4), cp.Variable(4)
    return least(
        p @ x + cp.sum(cp.kl_div(cp.multiply(POSITIVE, x), POSITIVE)), [cp.sum(x) == 2], [p], [x]
    )


@nasty
def unequal_scales_that_the_weights_undo():
    p, x = parameter(4), cp.Variable(4)
    divergence = cp.kl_div(cp.multiply(POSITIVE, x), 1 / POSITIVE)
    return least(p @ x + cp.sum(cp.multiply(1 / POSITIVE, divergence)), [cp.sum(x) == 2], [p], [x])


@nasty
def a_temperature_that_is_declared_negative():
    p, a, x = parameter(3), cp.Parameter(nonpos=True), cp.Variable(3)
    return least(p @ x + a * cp.sum(cp.entr(x)), [-2 * cp.sum(x) == a, x >= 0], [p, a], [x])


@nasty
def entropies_of_a_variable_declared_negative():
    p, x = parameter(3), cp.Variable(3, nonpos=True)
    return least(p @ x - cp.sum(cp.entr(x)), [cp.sum(x) == 1], [p], [x])


@nasty
def a_radius_below_zero():
    p, r, x = parameter(3), parameter(), cp.Variable(3)
    return least(p @ x - cp.sum(cp.entr(x)), [cp.sum(x) == r], [p, r], [x], [[1.0, 2, 3], -1.0])


@nasty
def a_temperature_of_zero():
    p, t, x = parameter(3), weight(), cp.Variable(3)
    return least(p @ x - t * cp.sum(cp.entr(x)), [cp.sum(x) == 1], [p, t], [x], [[1.0, 2, 3], 0.0])


# Complex numbers


@nasty
def a_complex_matrix():
    b, x = parameter(6), cp.Variable(3)
    return least(cp.sum_squares(COMPLEX @ x - b), [], [b], [x])


@nasty
def the_magnitude_of_a_complex_map():
    b, x = parameter(6), cp.Variable(3)
    return least(cp.sum(cp.square(cp.abs(COMPLEX @ x - b))), [], [b], [x])


@nasty
def the_imaginary_part_of_a_map():
    b, x = parameter(6), cp.Variable(3)
    return least(cp.sum_squares(cp.imag(COMPLEX @ x) - b), [], [b], [x])


@nasty
def the_real_part_of_a_map():
    b, x = parameter(6), cp.Variable(3)
    return least(cp.sum_squares(cp.real(COMPLEX @ x) - b), [], [b], [x])


@nasty
def a_complex_equality():
    b, x = parameter(3), cp.Variable(3)
    return least(cp.sum_squares(x - b), [COMPLEX[:1] @ x == 1], [b], [x])


# Eigenspaces


def eigen(rules, gain=lambda X, Z: cp.trace(X @ Z), values=None, scale=None, **attributes):
    X, Z = (
        parameter(4, 4, symmetric=True),
        cp.Variable((4, 4), **(attributes or {"symmetric": True})),
    )
    parameters = [X] if scale is None else [X, scale]
    return most(gain(X, Z), rules(Z), parameters, [Z], *([] if values is None else [values]))


SYMMETRIC = C_4x4 + C_4x4.T


@nasty
def an_eigenspace_of_a_negative_trace():
    return eigen(lambda Z: [cp.trace(Z) == -1, Z >> 0])


@nasty
def an_eigenspace_of_a_trace_that_a_parameter_makes_negative():
    t = parameter()
    return eigen(lambda Z: [cp.trace(Z) == t, Z >> 0], scale=t, values=[SYMMETRIC, -0.5])


@nasty
def an_eigenspace_under_a_negative_bound():
    t = cp.Parameter(nonpos=True)
    return eigen(lambda Z: [cp.trace(Z) == 2 * t, Z >> 0, t * np.eye(4) - Z >> 0], scale=t)


@nasty
def an_eigenspace_of_scaled_cones():
    t = weight()
    return eigen(
        lambda Z: [3 * cp.trace(Z) == 6 * t, 5 * Z >> 0, 2 * t * np.eye(4) >> 2 * Z], scale=t
    )


@nasty
def an_eigenspace_of_everything():
    return eigen(lambda Z: [cp.trace(Z) == 4, Z >> 0, np.eye(4) - Z >> 0])


@nasty
def an_eigenspace_of_more_than_everything():
    return eigen(lambda Z: [cp.trace(Z) == 5, Z >> 0, np.eye(4) - Z >> 0])


@nasty
def a_negative_semidefinite_variable():
    return eigen(lambda Z: [cp.trace(Z) == -1], NSD=True)


@nasty
def a_bound_above_the_trace():
    return eigen(lambda Z: [cp.trace(Z) == 1, Z >> 0, 2 * np.eye(4) - Z >> 0])


@nasty
def a_cost_of_mixed_signs():
    gain = lambda X, Z: cp.vdot(X, Z) - 2 * Z[0, 1] + Z[2, 2] + cp.trace(X)  # noqa: E731
    return eigen(lambda Z: [cp.trace(Z) == 1], gain, PSD=True)


# Quadratic forms


@nasty
def an_indefinite_form_made_convex_by_another_term():
    p, x = parameter(3), cp.Variable(3)
    return least(
        cp.quad_form(x - 1, INDEFINITE, assume_PSD=True) + 5 * cp.sum_squares(x - p), [], [p], [x]
    )


@nasty
def an_indefinite_diagonal_form_made_convex_by_another_term():
    p, x = parameter(3), cp.Variable(3)
    return least(
        cp.quad_form(x - 1, np.diag([1, -0.5, 1]), assume_PSD=True) + 5 * cp.sum_squares(x - p),
        [],
        [p],
        [x],
    )


@nasty
def a_negative_divisor_made_convex_by_another_term():
    p, x = parameter(3), cp.Variable(3)
    return least(cp.quad_over_lin(x - p, -1.0) + 3 * cp.sum_squares(x), [], [p], [x])


@nasty
def a_negative_form_maximised():
    M, p, x = parameter(3, 3, NSD=True), parameter(3), cp.Variable(3)
    return most(3 * cp.quad_form(x, M) - p @ x, [cp.sum(x) == p[0]], [p, M], [x])


@nasty
def a_form_of_repeated_and_scaled_entries():
    M, p, x = parameter(3, 3, PSD=True), parameter(4), cp.Variable(4)
    form = cp.quad_form(cp.multiply(np.array([1.0, -2, 0.5]), x[[1, 1, 2]]), M)
    return least(form + cp.sum_squares(x) + p @ x, [], [M, p], [x])


@nasty
def two_forms_that_overlap():
    M, p, x = parameter(2, 2, PSD=True), parameter(4), cp.Variable(4)
    return least(
        cp.quad_form(x[1:3], M) + cp.quad_form(x[:2], M) + cp.sum_squares(x) + p @ x,
        [],
        [M, p],
        [x],
    )


@nasty
def a_form_of_a_column():
    M, p, x = parameter(3, 3, PSD=True), parameter(3, 1), cp.Variable((3, 1))
    return least(cp.quad_form(x, M) + cp.sum(cp.multiply(p, x)), [], [M, p], [x])


@nasty
def first_powers():
    p, x = parameter(3), cp.Variable(3)
    return least(
        cp.sum(cp.power(cp.square(x - p), 1)) + cp.sum_squares(cp.power(x, 1)), [], [p], [x]
    )


@nasty
def squares_of_norms_of_scalars():
    p, x = parameter(), cp.Variable()
    return least(
        cp.square(cp.norm1(x - p)) + cp.square(cp.abs(x)) + cp.square(cp.norm(x, 2)), [], [p], [x]
    )


@nasty
def norms_along_an_axis():
    p, x = parameter(3, 2), cp.Variable((3, 2))
    along = cp.sum(cp.square(cp.norm(x - p, axis=0, keepdims=True)))
    return least(along + POSITIVE[:3] @ cp.square(cp.norm(x, axis=1)), [], [p], [x])


# Least squares of matrices and tensors


def fit(objective, *shapes, **attributes):
    parameters, X = [parameter(*shape) for shape in shapes], cp.Variable((3, 2), **attributes)
    return least(objective(X, *parameters), [], parameters, [X])


@nasty
def columns_in_another_order():
    return fit(lambda X, A, B: cp.sum_squares(A @ X[:, ::-1] - B), (4, 3), (4, 2))


@nasty
def rows_shuffled_for_one_column():
    def f(X, A, B):
        return cp.sum_squares(A @ X[:, 0] - B[:, 0]) + cp.sum_squares(
            A[[1, 0, 2, 3]] @ X[:, 1] - B[:, 1]
        )

    return fit(f, (4, 3), (4, 2))


@nasty
def columns_that_are_coupled():
    return fit(
        lambda X, A, B: cp.sum_squares(A @ X - B) + cp.sum_squares(X[:, 0] - X[:, 1]),
        (4, 3),
        (4, 2),
    )


@nasty
def columns_of_unequal_weight():
    return fit(lambda X, A, B: cp.sum_squares((A @ X - B) @ np.diag([1.0, 2])), (4, 3), (4, 2))


@nasty
def matrices_on_both_sides():
    return fit(
        lambda X, A, B: cp.sum_squares(A @ X @ np.array([[1.0, 2], [3, 4]]) - B), (4, 3), (4, 2)
    )


@nasty
def weights_transposed():
    w, B, X = weight(3, 2), parameter(3, 2), cp.Variable((3, 2))
    return least(
        cp.sum(cp.multiply(w.T, cp.square(X - 1).T)) + cp.sum_squares(B - X), [], [w, B], [X]
    )


@nasty
def weights_by_cumsum_kron_convolution_and_trace():
    B, X = parameter(3, 2), cp.Variable((3, 2))
    squares = cp.square(X - 1)
    f = cp.sum(cp.cumsum(squares, axis=0)) + cp.sum(cp.kron(np.array([[1.0, 2]]), squares))
    f += cp.sum(cp.convolve(np.array([1.0, 2]), squares[:, 0])) + cp.trace(squares[:2])
    return least(f + cp.sum_squares(B - X), [], [B], [X])


@nasty
def three_dimensions():
    u, p, w = cp.Variable((2, 3, 2)), parameter(2, 3, 2), parameter(3)
    f = cp.sum_squares(u - p) + cp.sum_squares(cp.sum(u, axis=(0, 2)) - w)
    return least(f + cp.sum_squares(cp.transpose(u, (2, 0, 1)) - 1), [], [p, w], [u])


@nasty
def orders_of_reshape():
    A, q, x = parameter(2, 4), parameter(4), cp.Variable(4)
    map_ = cp.reshape(x, (2, 2), order="C") @ np.array([[1.0, 2], [3, 4]]) - cp.reshape(
        q, (2, 2), order="F"
    )
    return least(cp.sum_squares(map_), [A @ x == A[:, 0]], [A, q], [x])


@nasty
def a_variable_that_nothing_uses():
    p, x, z = parameter(3), cp.Variable(3), cp.Variable(2)
    return least(cp.sum_squares(x - p) + 0 * cp.sum(z), [], [p], [x, z])


@nasty
def a_diagonal_parameter():
    A, b, x = parameter(3, 3, diag=True), parameter(3), cp.Variable(3)
    values = [np.diag([1.0, -2, 0.5]), [1.0, 2, 3]]
    return least(cp.sum_squares(A @ x - b) + cp.sum_squares(x), [], [A, b], [x], values)


@nasty
def a_sparse_parameter():
    A, b, x = parameter(3, 3, sparsity=[(0, 1, 2), (1, 0, 2)]), parameter(3), cp.Variable(3)
    values = [[[0.0, 1, 0], [2, 0, 0], [0, 0, -1]], [1.0, 2, 3]]
    return least(cp.sum_squares(A @ x - b) + cp.sum_squares(x), [], [A, b], [x], values)


@nasty
def a_weight_negative_by_rounding():
    w, b, x = weight(3), parameter(6), cp.Variable(3)
    values = [[1.0, 0.0, -1e-12], np.ones(6)]
    return least(cp.sum_squares(C_6x3 @ x - b) + w @ cp.square(x), [], [w, b], [x], values)


# Lines


def line(f, rules=lambda u: [], n=6):
    p, mu, u = parameter(n), weight(), cp.Variable(n)
    return least(cp.sum_squares(u - p) + mu * f(u), rules(u), [p, mu], [u])


@nasty
def steps_of_mixed_signs_and_undone_scales():
    steps = np.array([1.0, 0.5, 1, 0.25, 1]), np.array([1.0, 2, -1, -4, 1])
    return line(lambda u: steps[0] @ cp.abs(cp.multiply(steps[1], cp.diff(u))))


@nasty
def a_line_in_two_parts():
    return line(lambda u: cp.tv(u[:3]) + cp.tv(u[2:]))


@nasty
def a_line_with_a_gap():
    return line(lambda u: cp.tv(u[:3]) + cp.tv(u[3:]))


@nasty
def a_star():
    return line(lambda u: cp.sum(cp.abs(u[0] - u[1:])))


@nasty
def a_cycle_and_a_line():
    pairs = [(0, 1), (1, 2), (2, 0), (3, 4), (4, 5)]
    return line(lambda u: sum(cp.abs(u[i] - u[j]) for i, j in pairs))


@nasty
def sums_of_neighbours():
    return line(lambda u: cp.sum(cp.abs(u[1:] + u[:-1])))


@nasty
def the_steps_of_a_scaled_reversed_line():
    return line(lambda u: cp.tv(1 - 2 * u[::-1]))


@nasty
def differences_that_do_not_quite_cancel():
    return line(lambda u: cp.sum(cp.abs(u[1:] - (1 + 1e-3) * u[:-1])))


@nasty
def a_line_and_a_false_constraint():
    return line(cp.tv, lambda u: [u <= u - 1])


@nasty
def a_line_and_a_true_constraint():
    return line(cp.tv, lambda u: [cp.Constant(0) <= 1, u <= u + 1])


@nasty
def two_variables_on_a_line():
    u, w, p = cp.Variable(3), cp.Variable(2), parameter(5)
    z = cp.hstack([w, u])
    return least(cp.sum_squares(z - p) + cp.tv(z), [], [p], [w, u, w])


@nasty
def a_fit_of_weight_zero():
    p, w, u = parameter(5), weight(), cp.Variable(5)
    return least(
        w * cp.sum_squares(u - 1) + p @ u + cp.tv(u), [], [p, w], [u], [[0.1, 0, -0.1, 0, 0], 0.0]
    )


@nasty
def an_indicator():
    p, x = parameter(3), cp.Variable(3)
    return least(cp.sum_squares(x - p) + cp.transforms.indicator([x >= 0]), [], [p], [x])


# Simplices


def simplex(f, rules, **attributes):
    y, r, x = parameter(5), weight(), cp.Variable(5, **attributes)
    return least(f(x, y), rules(x, r), [y, r], [x])


def distance(x, y):
    return cp.sum_squares(x - y)


@nasty
def a_negative_sum():
    return simplex(distance, lambda x, r: [-3 * cp.sum(x) == -r, -2 * x <= 0])


@nasty
def an_impossible_sum():
    return simplex(distance, lambda x, r: [cp.sum(x) == -r, x >= 0])


@nasty
def a_nonpositive_simplex():
    return simplex(distance, lambda x, r: [cp.sum(x) == -r], nonpos=True)


@nasty
def signs_in_parts_that_overlap():
    return simplex(distance, lambda x, r: [cp.mean(x) == r, x[:3] >= 0, x[2:] >= 0])


@nasty
def a_sign_scaled_by_zero():
    return simplex(distance, lambda x, r: [cp.sum(x) == r, cp.multiply(np.arange(5.0), x) >= 0])


@nasty
def bounds_that_leave_one_free():
    return simplex(
        distance, lambda x, r: [cp.sum(x) == r], bounds=[np.array([0, 0, 0, 0, -np.inf]), None]
    )


@nasty
def a_sum_that_is_nearly_plain():
    return simplex(distance, lambda x, r: [np.array([1, 1, 1, 1, 1 + 1e-3]) @ x == r, x >= 0])


@nasty
def squares_equal_in_sum():
    def f(x, y):
        return cp.sum_squares(x - y) + cp.sum_squares(x[:2]) + cp.sum_squares(x[2:] - 1)

    return simplex(f, lambda x, r: [cp.sum(x) == r, x >= 0])


@nasty
def squares_whose_coupling_cancels():
    def f(x, y):
        return cp.square(x[0] + x[1] - x[1] - y[0]) + cp.sum_squares(x[1:] - y[1:])

    return simplex(f, lambda x, r: [cp.sum(x) == r, x >= 0])


@nasty
def a_projection_of_weight_zero():
    y, w, x = parameter(5), weight(), cp.Variable(5)
    return least(
        w * cp.sum_squares(x) + y @ x,
        [cp.sum(x) == 1, x >= 0],
        [y, w],
        [x],
        [[1.0, 2, 3, -1, 4], 0.0],
    )


@nasty
def a_symmetric_simplex():
    y, x = parameter(3, 3), cp.Variable((3, 3), symmetric=True)
    return least(cp.sum_squares(x - y), [cp.sum(x) == 2, x >= 0], [y], [x])


@nasty
def pieces_of_every_shape():
    a, b, c, y = cp.Variable((1, 1)), cp.Variable((1,)), cp.Variable(nonneg=True), parameter(3)
    f = cp.square(a[0, 0] - y[0]) + cp.sum_squares(b - y[1]) + cp.square(c - y[2])
    return least(f, [a[0, 0] + b + c == 1, a >= 0, b >= 0], [y], [c, b, a])


# Equalities


def equalities(f, rules):
    q, A, b, x = parameter(4), parameter(2, 4), parameter(2), cp.Variable(4)
    return least(f(x, q), rules(x, q, A, b), [q, A, b], [x])


def bowl(x, q):
    return cp.sum_squares(x - q) + cp.var(x)


@nasty
def equalities_twice_as_large():
    return equalities(bowl, lambda x, q, A, b: [A @ x == b, cp.sum(x) == 1, 2 * cp.sum(x) == 2])


@nasty
def equalities_that_contradict():
    return equalities(bowl, lambda x, q, A, b: [A @ x == b, cp.sum(x) == 1, 2 * cp.sum(x) == 2.1])


@nasty
def as_many_equalities_as_unknowns():
    return equalities(bowl, lambda x, q, A, b: [x == cp.hstack([b, q[:2] + A[0, :2]])])


@nasty
def equalities_without_their_variable():
    return equalities(bowl, lambda x, q, A, b: [A @ x == b, x[0] - x[0] + x[1] == b[0]])


@nasty
def no_curvature_left():
    return equalities(
        lambda x, q: cp.square(x[0] - q[0]) + q[1] * x[1],
        lambda x, q, A, b: [A[:, :2] @ x[:2] == b],
    )


@nasty
def no_bound_below():
    return equalities(
        lambda x, q: cp.square(x[0] - q[0]) + q[1] * x[1],
        lambda x, q, A, b: [b + A @ x * 0 == x[:1]],
    )


# Transport


def transport(rules, m=3, n=3, f=lambda M, P, e: cp.vdot(M, P) - e * cp.sum(cp.entr(P))):
    M, r, c, e = (
        parameter(m, n),
        cp.Parameter(m, name="rows"),
        cp.Parameter(n, name="columns"),
        weight(),
    )
    P = cp.Variable((m, n))
    return least(f(M, P, e), rules(P, r, c), [M, r, c, e], [P])


@nasty
def diagonals_and_rows():
    def rules(P, r, c):
        diagonals = [P[0, j] + P[1, (j + 1) % 3] + P[2, (j + 2) % 3] for j in range(3)]
        return [cp.hstack(diagonals) == c, cp.sum(P, axis=1) == r]

    return transport(rules)


@nasty
def one_equality_for_both_marginals():
    return transport(
        lambda P, r, c: [
            cp.hstack([-cp.sum(P, axis=1), 3 * cp.sum(P, axis=0)]) == cp.hstack([-r, 3 * c])
        ]
    )


@nasty
def a_transposed_cost():
    rules = lambda P, r, c: [cp.sum(P, axis=0)[::-1] == r[::-1], cp.sum(P, axis=1) == c]  # noqa: E731
    return transport(
        rules,
        f=lambda M, P, e: (
            cp.vdot(M, P.T) + e * cp.sum(cp.kl_div(P / 2, np.arange(1.0, 10.0).reshape(3, 3)))
        ),
    )


@nasty
def a_redundant_marginal_dropped():
    return transport(
        lambda P, r, c: [cp.sum(P, axis=1) == r, cp.sum(P, axis=0)[1:] == c[1:]], m=3, n=2
    )


@nasty
def a_transport_of_temperature_zero():
    M, e, P = parameter(2, 2), weight(), cp.Variable((2, 2))
    rules = [cp.sum(P, axis=1) == 0.5, cp.sum(P, axis=0) == np.array([0.3, 0.7])]
    values = [[[1.0, 2], [0.5, 3]], 0.0]
    return least(cp.vdot(M, P) - e * cp.sum(cp.entr(P)), rules, [M, e], [P], values)


def drawn(leaf, generator):
    value, attributes = (
        torch.randn(leaf.shape, generator=generator, dtype=torch.float64),
        leaf.attributes,
    )
    if attributes["PSD"] or attributes["NSD"]:
        value = (torch.eye(len(value)) + value @ value.mT / len(value)) * (
            1 if attributes["PSD"] else -1
        )
    elif attributes["symmetric"]:
        value = (value + value.mT) / 2
    elif attributes["nonneg"] or attributes["nonpos"]:
        value = (0.5 + value.abs()) * (1 if attributes["nonneg"] else -1)
    elif leaf.name() in ("rows", "columns"):
        value = torch.softmax(value, 0)
    return value


def solved(declaration, structure, values):
    """(status, degenerate, objective, variables, gradients of a functional of the variables, and of
    the objective)."""
    layer = ConvexLayer(*declaration, structure=structure, on_failure="nan")
    leaves = [value.clone().requires_grad_() for value in values]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        solution, generator = layer.solve(*leaves), torch.Generator().manual_seed(5)
        weighed = [
            (torch.randn(v.shape, generator=generator, dtype=v.dtype) * v).sum()
            for v in solution.variables
        ]
        gradients = [
            torch.autograd.grad(
                loss, leaves, retain_graph=True, allow_unused=True, materialize_grads=True
            )
            for loss in (sum(weighed), solution.objective)
        ]
    return solution.status, solution.degenerate, solution.objective, solution.variables, *gradients


def close(a, b, tolerance):
    return torch.allclose(
        a, b, rtol=tolerance, atol=tolerance * max(1.0, float(b.detach().abs().max()))
    )


@pytest.mark.parametrize("name", TABLE)
def test_whatever_the_spelling_auto_agrees_with_generic(name):
    problem, parameters, variables, *values = TABLE[name]()
    declaration = problem, parameters, variables
    for seed in (0, 1):
        generator = torch.Generator().manual_seed(seed)
        given = [drawn(leaf, generator) for leaf in parameters]
        if values:
            given = [torch.as_tensor(np.asarray(value, dtype=float)) for value in values[0]]
        ours, theirs = (solved(declaration, structure, given) for structure in ("auto", "generic"))
        failed = int(theirs[0]) >= 2
        assert int(ours[0]) == int(theirs[0]) if failed else int(ours[0]) < 2, "the statuses differ"
        if failed:
            continue
        assert close(ours[2], theirs[2], 1e-7), "the objectives differ"
        if bool(theirs[1]):
            continue  # variables or gradients are not unique
        parts = ("variables", "gradients", "gradients of the objective")
        for what, mine, other in zip(parts, ours[3:], theirs[3:], strict=True):
            assert all(close(a, b, 1e-6) for a, b in zip(mine, other, strict=True)), (
                f"the {what} differ"
            )

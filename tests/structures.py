"""Spellings of every structure: the same mathematics as users write it, each with a sampler of its
parameters.

`@spelling(structure)` registers a declaration () -> (problem, parameters, variables). Parameters
are sampled by what they declare (nonneg: between 0.5 and 2; PSD: well conditioned; symmetric; else
normal); those named `rows` and `columns` sum to one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import cvxpy as cp
import numpy as np
import torch
from torch import Tensor

from convlayer import ConvexLayer


@dataclass(frozen=True, eq=False)
class Spelling:
    structure: str
    name: str
    declare: Callable

    def layer(self, **options) -> ConvexLayer:
        return ConvexLayer(*self.declare(), **options)

    def sample(self, batch: tuple[int, ...], seed: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return [draw(parameter, batch, generator) for parameter in self.declare()[1]]

    def __repr__(self) -> str:
        return f"{self.structure}-{self.name}"


SPELLINGS: list[Spelling] = []


def spelling(structure: str):
    def register(declare):
        SPELLINGS.append(Spelling(structure, declare.__name__, declare))
        return declare

    return register


def draw(parameter: cp.Parameter, batch: tuple[int, ...], generator: torch.Generator) -> Tensor:
    shape, attributes = (*batch, *parameter.shape), parameter.attributes
    value = torch.randn(shape, generator=generator, dtype=torch.float64)
    if attributes["PSD"]:
        return torch.eye(shape[-1], dtype=torch.float64) + value @ value.mT / shape[-1]
    if attributes["symmetric"]:
        return (value + value.mT) / 2
    if attributes["nonneg"]:
        value = 0.5 + 1.5 * torch.rand(shape, generator=generator, dtype=torch.float64)
    return value / value.sum(-1, keepdim=True) if parameter.name() in ("rows", "columns") else value


RNG = np.random.default_rng(7)
C_7x4, WEIGHTS_7, SPD_4 = (
    RNG.standard_normal((7, 4)),
    RNG.uniform(0.5, 2, 7),
    np.eye(4) + np.ones((4, 4)) / 5,
)


def A_b():
    return cp.Parameter((7, 4)), cp.Parameter(7)


def lam():
    return cp.Parameter(nonneg=True)


# Least squares


@spelling("least_squares")
def sum_squares():
    (A, b), x = A_b(), cp.Variable(4)
    return cp.Problem(cp.Minimize(cp.sum_squares(A @ x - b))), [A, b], [x]


@spelling("least_squares")
def the_norm_squared():
    (A, b), x = A_b(), cp.Variable(4)
    return cp.Problem(cp.Minimize(cp.norm(b - A @ x) ** 2)), [A, b], [x]


@spelling("least_squares")
def a_sum_of_powers():
    (A, b), x = A_b(), cp.Variable(4)
    return cp.Problem(cp.Minimize(cp.sum((A @ x - b) ** 2) / 2 + 3)), [b, A], [x]


@spelling("least_squares")
def maximise_minus_quad_over_lin():
    (A, b), x = A_b(), cp.Variable(4)
    return cp.Problem(cp.Maximize(-cp.quad_over_lin(A @ x - b, 2.0))), [A, b], [x]


@spelling("least_squares")
def ridge_with_a_parameter():
    (A, b), x, mu = A_b(), cp.Variable(4), lam()
    return (
        cp.Problem(cp.Minimize(cp.sum_squares(A @ x - b) + mu * cp.norm(x) ** 2)),
        [A, b, mu],
        [x],
    )


@spelling("least_squares")
def ridge_that_underdetermines_nothing():
    A, b, x, mu = cp.Parameter((3, 5)), cp.Parameter(3), cp.Variable(5), lam()
    return (
        cp.Problem(cp.Minimize(cp.sum_squares(A @ x - b) + mu * cp.sum_squares(x))),
        [A, b, mu],
        [x],
    )


@spelling("least_squares")
def weights_by_a_parameter():
    b, w, x = cp.Parameter(7), cp.Parameter(7, nonneg=True), cp.Variable(4)
    z = cp.square(C_7x4 @ x - np.arange(7))
    return (
        cp.Problem(cp.Minimize(w @ z + cp.sum_squares(x[:3] - b[:3]) + 0 * cp.sum(b))),
        [b, w],
        [x],
    )


@spelling("least_squares")
def constant_weights_inside_and_outside():
    (A, b), x = A_b(), cp.Variable(4)
    objective = cp.sum(cp.multiply(WEIGHTS_7, cp.square(A @ x - b))) + cp.sum_squares(
        cp.multiply(WEIGHTS_7, A @ x)
    )
    return cp.Problem(cp.Minimize(objective)), [A, b], [x]


@spelling("least_squares")
def quad_form_of_a_constant():
    (A, b), x = A_b(), cp.Variable(4)
    return (
        cp.Problem(
            cp.Minimize(cp.quad_form(A @ x - b, np.diag(WEIGHTS_7)) + cp.quad_form(x, SPD_4))
        ),
        [A, b],
        [x],
    )


@spelling("least_squares")
def tikhonov():
    (A, b), x, mu = A_b(), cp.Variable(4), lam()
    return (
        cp.Problem(cp.Minimize(cp.sum_squares(A @ x - b) + mu * cp.sum_squares(cp.diff(x)))),
        [A, b, mu],
        [x],
    )


@spelling("least_squares")
def a_matrix_right_hand_side():
    A, B, X, mu = cp.Parameter((6, 3)), cp.Parameter((6, 2)), cp.Variable((3, 2)), lam()
    return (
        cp.Problem(cp.Minimize(cp.sum_squares(A @ X - B) + mu * cp.sum_squares(X))),
        [A, B, mu],
        [X],
    )


@spelling("least_squares")
def a_matrix_on_the_left():
    A, B, X = cp.Parameter((6, 3)), cp.Parameter((2, 6)), cp.Variable((2, 3))
    return cp.Problem(cp.Minimize(cp.norm(X @ A.T - B, "fro") ** 2)), [A, B], [X]


@spelling("least_squares")
def a_matrix_of_unlike_columns():
    A, B, X = cp.Parameter((6, 3)), cp.Parameter((6, 2)), cp.Variable((3, 2))
    return cp.Problem(cp.Minimize(cp.sum_squares(A @ X - B) + cp.sum_squares(X[:, 0]))), [A, B], [X]


@spelling("least_squares")
def two_variables_stacked():
    (A, b), x, y = A_b(), cp.Variable(4), cp.Variable()
    return cp.Problem(cp.Minimize(cp.sum_squares(A @ x + y - b) + cp.square(y - 1))), [A, b], [y, x]


@spelling("least_squares")
def one_square_at_a_time():
    (A, b), x = A_b(), cp.Variable(4)
    return cp.Problem(cp.Minimize(sum(cp.square(A[i] @ x - b[i]) for i in range(7)))), [A, b], [x]


@spelling("least_squares")
def the_square_of_an_absolute_value():
    (A, b), x = A_b(), cp.Variable((4, 1))
    return (
        cp.Problem(
            cp.Minimize(cp.sum(cp.power(cp.abs(A @ x - cp.reshape(b, (7, 1), order="F")), 2)))
        ),
        [A, b],
        [x],
    )


# Equality-constrained quadratic programs


def P_q():
    return cp.Parameter((5, 5), PSD=True), cp.Parameter(5)


@spelling("equality_constrained_qp")
def quad_form_of_a_parameter():
    (P, q), A, b, x = P_q(), cp.Parameter((2, 5)), cp.Parameter(2), cp.Variable(5)
    return cp.Problem(cp.Minimize(cp.quad_form(x, P) / 2 + q @ x), [A @ x == b]), [P, q, A, b], [x]


@spelling("equality_constrained_qp")
def quad_form_without_constraints():
    (P, q), x = P_q(), cp.Variable(5)
    return cp.Problem(cp.Maximize(q @ x - cp.quad_form(x, P))), [P, q], [x]


@spelling("equality_constrained_qp")
def squares_and_a_sum():
    (A, b), x, r = A_b(), cp.Variable(4), cp.Parameter()
    return cp.Problem(cp.Minimize(cp.sum_squares(A @ x - b)), [r == cp.sum(x)]), [A, b, r], [x]


@spelling("equality_constrained_qp")
def squares_and_a_linear_term():
    (A, b), x, q = A_b(), cp.Variable(4), cp.Parameter(4)
    return cp.Problem(cp.Minimize(cp.sum_squares(A @ x - b) + q @ x)), [A, b, q], [x]


@spelling("equality_constrained_qp")
def a_constant_quad_form():
    q, x, r = cp.Parameter(4), cp.Variable(4), cp.Parameter()
    return (
        cp.Problem(cp.Minimize(cp.quad_form(x, SPD_4) + q @ x), [x[0] + x[1] == r, x[3] - 1 == 0]),
        [q, r],
        [x],
    )


@spelling("equality_constrained_qp")
def a_quad_form_of_an_affine_map():
    P, q, x = cp.Parameter((3, 3), PSD=True), cp.Parameter(4), cp.Variable(4)
    inner = C_7x4[:3] @ x - np.ones(3)
    return (
        cp.Problem(
            cp.Minimize(cp.quad_form(inner, P) + cp.sum_squares(x) + q @ x), [cp.sum(x) == 1]
        ),
        [P, q],
        [x],
    )


@spelling("equality_constrained_qp")
def a_weighted_quad_form():
    (A, b), mu, x = A_b(), lam(), cp.Variable(4)
    return (
        cp.Problem(
            cp.Minimize(cp.sum_squares(A @ x - b) + mu * cp.quad_form(x, SPD_4)), [cp.sum(x) == 1]
        ),
        [A, b, mu],
        [x],
    )


@spelling("equality_constrained_qp")
def two_variables_and_dynamics():
    A, b, x, u = cp.Parameter((2, 2)), cp.Parameter(2), cp.Variable((2, 4)), cp.Variable((1, 3))
    rules = [x[:, 0] == b] + [
        x[:, t + 1] == A @ x[:, t] + np.ones((2, 1)) @ u[:, t] for t in range(3)
    ]
    return cp.Problem(cp.Minimize(cp.sum_squares(x) + cp.sum_squares(u)), rules), [A, b], [u, x]


@spelling("equality_constrained_qp")
def its_multipliers():
    (P, q), A, b, x = P_q(), cp.Parameter((2, 5)), cp.Parameter(2), cp.Variable(5)
    rules = [b == A @ x]
    return (
        cp.Problem(cp.Minimize(cp.quad_form(x, P) / 2 + q @ x), rules),
        [P, q, A, b],
        [x, rules[0].dual_variables[0]],
    )


@spelling("equality_constrained_qp")
def multipliers_of_a_maximum():
    (P, q), r, x = P_q(), cp.Parameter(), cp.Variable(5)
    rules = [2 * cp.sum(x) - r == 0, x[1] == x[2]]
    duals = [rule.dual_variables[0] for rule in rules]
    return cp.Problem(cp.Maximize(q @ x - cp.quad_form(x, P) / 2), rules), [P, q, r], [*duals, x]


# Transport


def plan():
    M, r, c = (
        cp.Parameter((4, 3)),
        cp.Parameter(4, nonneg=True, name="rows"),
        cp.Parameter(3, nonneg=True, name="columns"),
    )
    return M, r, c, cp.Variable((4, 3))


@spelling("entropic_optimal_transport")
def multiply_and_sum():
    (M, r, c, P), eps = plan(), lam()
    rules = [cp.sum(P, axis=1) == r, cp.sum(P, axis=0) == c]
    return (
        cp.Problem(cp.Minimize(cp.sum(cp.multiply(M, P)) - eps * cp.sum(cp.entr(P))), rules),
        [M, r, c, eps],
        [P],
    )


@spelling("entropic_optimal_transport")
def the_trace_and_products_with_ones():
    (M, r, c, P), eps = plan(), lam()
    rules = [P >= 0, c == P.T @ np.ones(4), P @ np.ones(3) - r == 0]
    return (
        cp.Problem(cp.Maximize(-cp.trace(M.T @ P) + eps * cp.sum(cp.entr(P))), rules),
        [eps, M, r, c],
        [P],
    )


@spelling("entropic_optimal_transport")
def a_nonnegative_variable_and_vdot():
    M, r, c, _ = plan()
    P = cp.Variable((4, 3), nonneg=True)
    rules = [cp.sum(P, axis=1) == r, cp.sum(P, axis=0) == c]
    return cp.Problem(cp.Minimize(cp.vdot(M, P) - 0.3 * cp.sum(cp.entr(P))), rules), [M, r, c], [P]


@spelling("entropic_optimal_transport")
def relative_entropy_to_a_constant():
    M, r, c, P = plan()
    rules = [cp.sum(P, axis=1) == r, cp.sum(P, axis=0) == c]
    prior = np.full((4, 3), 0.25)
    return (
        cp.Problem(cp.Minimize(cp.vdot(M, P) + 0.5 * cp.sum(cp.rel_entr(P, prior))), rules),
        [M, r, c],
        [P],
    )


@spelling("entropic_optimal_transport")
def kullback_leibler():
    (M, r, c, P), eps = plan(), lam()
    rules = [cp.sum(P, axis=1) == r, cp.sum(P, axis=0) == c]
    prior = np.outer([0.1, 0.2, 0.3, 0.4], [0.2, 0.3, 0.5])
    return (
        cp.Problem(
            cp.Minimize(cp.sum(cp.multiply(M, P)) + eps * cp.sum(cp.kl_div(P, prior))), rules
        ),
        [M, r, c, eps],
        [P],
    )


@spelling("entropic_optimal_transport")
def one_constraint_a_row():
    M, r, c, P = plan()
    rules = [cp.sum(P[:, j]) == c[j] for j in (2, 0, 1)] + [cp.sum(P[i]) == r[i] for i in range(4)]
    return (
        cp.Problem(cp.Minimize(cp.sum(cp.multiply(M, P)) - 0.4 * cp.sum(cp.entr(P))), rules),
        [M, r, c],
        [P],
    )


@spelling("entropic_optimal_transport")
def the_plan_transposed_and_scaled():
    M, r, c, _ = plan()
    P = cp.Variable((3, 4))
    rules = [2 * cp.sum(P, axis=0) == 2 * r, -cp.sum(P, axis=1) == -c]
    return (
        cp.Problem(cp.Minimize(cp.sum(cp.multiply(M, P.T)) - cp.sum(cp.entr(P)) / 2), rules),
        [M, r, c],
        [P],
    )


@spelling("entropic_optimal_transport")
def a_long_vector():
    M, r, c, _ = plan()
    p = cp.Variable(12)
    P = cp.reshape(p, (4, 3), order="C")
    rules = [cp.sum(P, axis=1) == r, cp.sum(P, axis=0) == c]
    return (
        cp.Problem(cp.Minimize(cp.vec(M, order="C") @ p - 0.2 * cp.sum(cp.entr(p))), rules),
        [M, r, c],
        [p],
    )


@spelling("entropic_optimal_transport")
def constant_costs_and_marginals():
    eps, P = lam(), cp.Variable((2, 3))
    rules = [cp.sum(P, axis=1) == np.array([0.4, 0.6]), cp.sum(P, axis=0) == np.full(3, 1 / 3)]
    return (
        cp.Problem(
            cp.Minimize(cp.sum(cp.multiply(C_7x4[:2, :3], P)) - eps * cp.sum(cp.entr(P))), rules
        ),
        [eps],
        [P],
    )


# Eigenspaces


def X_Z(**attributes):
    return cp.Parameter((5, 5), symmetric=True), cp.Variable(
        (5, 5), **(attributes or {"symmetric": True})
    )


@spelling("leading_eigenspace")
def the_leading_vector():
    X, Z = X_Z()
    return cp.Problem(cp.Maximize(cp.trace(X @ Z)), [cp.trace(Z) == 1, Z >> 0]), [X], [Z]


@spelling("leading_eigenspace")
def a_psd_variable():
    X, Z = X_Z(PSD=True)
    return cp.Problem(cp.Maximize(cp.sum(cp.multiply(X, Z))), [cp.trace(Z) == 1]), [X], [Z]


@spelling("leading_eigenspace")
def the_trailing_vector():
    X, Z = X_Z()
    return cp.Problem(cp.Minimize(cp.vdot(X, Z)), [Z >> 0, cp.sum(cp.diag(Z)) == 1]), [X], [Z]


@spelling("leading_eigenspace")
def minus_the_other_way_round():
    X, Z = X_Z()
    return cp.Problem(cp.Minimize(-2 * cp.trace(Z @ X)), [0 << Z, 2 * cp.trace(Z) == 2]), [X], [Z]


@spelling("leading_eigenspace")
def ky_fan_three():
    X, Z = X_Z()
    rules = [cp.trace(Z) == 3, Z >> 0, Z << np.eye(5)]
    return cp.Problem(cp.Maximize(cp.trace(X @ Z)), rules), [X], [Z]


@spelling("leading_eigenspace")
def ky_fan_two_trailing():
    X, Z = X_Z(PSD=True)
    return (
        cp.Problem(cp.Minimize(cp.trace(X @ Z)), [np.eye(5) - Z >> 0, cp.trace(Z) == 2]),
        [X],
        [Z],
    )


@spelling("leading_eigenspace")
def a_scaled_trace():
    (X, Z), t = X_Z(), lam()
    return cp.Problem(cp.Maximize(cp.trace(X @ Z)), [cp.trace(Z) == t, Z >> 0]), [X, t], [Z]


@spelling("leading_eigenspace")
def a_scaled_bound():
    (X, Z), t = X_Z(), lam()
    rules = [cp.trace(Z) == 2 * t, Z >> 0, t * np.eye(5) - Z >> 0]
    return cp.Problem(cp.Maximize(cp.trace(X @ Z)), rules), [X, t], [Z]


@spelling("leading_eigenspace")
def of_a_parameter_that_is_not_symmetric():
    X, Z = cp.Parameter((4, 4)), cp.Variable((4, 4), symmetric=True)
    return cp.Problem(cp.Maximize(cp.sum(cp.multiply(X, Z))), [cp.trace(Z) == 1, Z >> 0]), [X], [Z]


# Total variation


@spelling("total_variation")
def cvxpys_tv():
    x, mu, u = cp.Parameter(10), lam(), cp.Variable(10)
    return cp.Problem(cp.Minimize(cp.sum_squares(u - x) / 2 + mu * cp.tv(u))), [x, mu], [u]


@spelling("total_variation")
def the_norm_of_differences():
    x, mu, u = cp.Parameter(10), lam(), cp.Variable(10)
    return cp.Problem(cp.Minimize(cp.norm(x - u) ** 2 + mu * cp.norm1(cp.diff(u)))), [x, mu], [u]


@spelling("total_variation")
def absolute_values_of_slices():
    x, u = cp.Parameter(10), cp.Variable(10)
    return (
        cp.Problem(
            cp.Minimize(0.5 * cp.sum(cp.square(u - x)) + 0.3 * cp.sum(cp.abs(u[:-1] - u[1:])))
        ),
        [x],
        [u],
    )


@spelling("total_variation")
def a_difference_matrix():
    x, mu, u = cp.Parameter(10), lam(), cp.Variable(10)
    D = np.eye(9, 10, 1) - np.eye(9, 10)
    return cp.Problem(cp.Minimize(cp.sum_squares(u - x) + mu * cp.norm(D @ u, 1))), [x, mu], [u]


@spelling("total_variation")
def maximise_the_negative():
    x, mu, u = cp.Parameter(10), lam(), cp.Variable(10)
    return cp.Problem(cp.Maximize(-mu * cp.tv(u) - cp.quad_over_lin(u - x, 4))), [mu, x], [u]


@spelling("total_variation")
def step_by_step():
    x, mu, u = cp.Parameter(8), lam(), cp.Variable(8)
    steps = sum(cp.abs(u[i] - u[i + 1]) for i in (3, 0, 6, 1, 2, 5, 4))
    return cp.Problem(cp.Minimize(cp.sum_squares(u - x) + mu * steps)), [x, mu], [u]


@spelling("total_variation")
def a_line_in_another_order():
    x, mu, u = cp.Parameter(6), lam(), cp.Variable(6)
    order = [4, 0, 5, 2, 1, 3]
    steps = cp.sum(cp.abs(u[order[1:]] - u[order[:-1]]))
    return cp.Problem(cp.Minimize(cp.sum_squares(u - x) + mu * steps)), [x, mu], [u]


@spelling("total_variation")
def a_weighted_fit_and_a_linear_term():
    x, mu, q, u = cp.Parameter(8), lam(), cp.Parameter(8), cp.Variable(8)
    return (
        cp.Problem(cp.Minimize(3 * cp.sum_squares(2 * u - x) + q @ u + mu * cp.tv(u))),
        [x, q, mu],
        [u],
    )


@spelling("total_variation")
def the_fit_weighted_by_a_parameter():
    w, q, u = lam(), cp.Parameter(8), cp.Variable(8)
    return (
        cp.Problem(
            cp.Minimize(w * cp.sum_squares(u - np.arange(8.0) % 3) + q @ u + 0.3 * cp.tv(u))
        ),
        [w, q],
        [u],
    )


@spelling("total_variation")
def a_row_of_a_matrix():
    x, mu, u = cp.Parameter((1, 8)), lam(), cp.Variable((1, 8))
    return (
        cp.Problem(cp.Minimize(cp.sum_squares(u - x) + mu * cp.sum(cp.abs(cp.diff(u, axis=1))))),
        [x, mu],
        [u],
    )


# Softmax


@spelling("softmax")
def a_linear_objective_with_entropy():
    theta, y = cp.Parameter(6), cp.Variable(6)
    return (
        cp.Problem(cp.Maximize(theta @ y + cp.sum(cp.entr(y))), [cp.sum(y) == 1, y >= 0]),
        [theta],
        [y],
    )


@spelling("softmax")
def minimised_at_a_temperature():
    theta, tau, y = cp.Parameter(6), lam(), cp.Variable(6)
    return (
        cp.Problem(cp.Minimize(-theta @ y - tau * cp.sum(cp.entr(y))), [cp.sum(y) == 1]),
        [theta, tau],
        [y],
    )


@spelling("softmax")
def any_radius():
    theta, r, y = cp.Parameter(6), lam(), cp.Variable(6, nonneg=True)
    return (
        cp.Problem(cp.Maximize(theta @ y + 0.5 * cp.sum(cp.entr(y))), [r - cp.sum(y) == 0]),
        [theta, r],
        [y],
    )


@spelling("softmax")
def relative_entropy():
    theta, y = cp.Parameter(6), cp.Variable(6)
    prior = np.arange(1.0, 7.0) / 21
    return (
        cp.Problem(cp.Maximize(theta @ y - cp.sum(cp.rel_entr(y, prior))), [np.ones(6) @ y == 1]),
        [theta],
        [y],
    )


@spelling("softmax")
def kl_divergence():
    theta, y = cp.Parameter(6), cp.Variable(6)
    return (
        cp.Problem(cp.Minimize(theta @ y + 2 * cp.sum(cp.kl_div(y, 1 / 6))), [cp.sum(y) == 1]),
        [theta],
        [y],
    )


@spelling("softmax")
def a_matrix_of_scores():
    theta, Y = cp.Parameter((2, 3)), cp.Variable((2, 3))
    return (
        cp.Problem(
            cp.Maximize(cp.sum(cp.multiply(theta, Y)) + cp.sum(cp.entr(Y))),
            [cp.sum(Y) == 1, Y >= 0],
        ),
        [theta],
        [Y],
    )


@spelling("softmax")
def two_variables():
    theta, y, z = cp.Parameter(5), cp.Variable(3), cp.Variable(2)
    entropy = cp.sum(cp.entr(y)) + cp.sum(cp.entr(z))
    return (
        cp.Problem(
            cp.Maximize(theta[:3] @ y + theta[3:] @ z + entropy), [cp.sum(y) + cp.sum(z) == 1]
        ),
        [theta],
        [z, y],
    )


@spelling("softmax")
def scores_that_are_affine():
    theta, y = cp.Parameter(3), cp.Variable(5)
    return (
        cp.Problem(
            cp.Maximize((C_7x4[:5, :3] @ theta + 1) @ y + cp.sum(cp.entr(y))), [cp.sum(y) == 1]
        ),
        [theta],
        [y],
    )


@spelling("softmax")
def one_entropy_at_a_time_and_multipliers():
    theta, tau, y = cp.Parameter(4), lam(), cp.Variable(4)
    rules = [3 * cp.sum(y) == 6, y >= 0]
    objective = theta @ y + tau * sum(cp.entr(y[i]) for i in range(4))
    return (
        cp.Problem(cp.Maximize(objective), rules),
        [theta, tau],
        [y, rules[0].dual_variables[0], rules[1].dual_variables[0]],
    )


# Sparsemax


@spelling("sparsemax")
def projection_onto_the_simplex():
    y, x = cp.Parameter(6), cp.Variable(6)
    return cp.Problem(cp.Minimize(cp.sum_squares(x - y)), [cp.sum(x) == 1, x >= 0]), [y], [x]


@spelling("sparsemax")
def a_nonnegative_variable():
    y, r, x = cp.Parameter(6), lam(), cp.Variable(6, nonneg=True)
    return cp.Problem(cp.Minimize(cp.norm(y - x) ** 2 / 2), [r == cp.sum(x)]), [y, r], [x]


@spelling("sparsemax")
def a_linear_objective_with_squares():
    y, x = cp.Parameter(6), cp.Variable(6)
    return (
        cp.Problem(cp.Maximize(y @ x - cp.sum_squares(x) / 2), [x >= 0, np.ones(6) @ x == 1]),
        [y],
        [x],
    )


@spelling("sparsemax")
def at_a_temperature():
    y, tau, x = cp.Parameter(6), lam(), cp.Variable(6)
    return (
        cp.Problem(cp.Maximize(y @ x - tau * cp.sum_squares(x)), [cp.sum(x) == 1, x >= 0]),
        [y, tau],
        [x],
    )


@spelling("sparsemax")
def a_quad_form():
    y, x = cp.Parameter(6), cp.Variable(6)
    return (
        cp.Problem(cp.Minimize(cp.quad_form(x, 2 * np.eye(6)) - y @ x), [cp.sum(x) == 3, -x <= 0]),
        [y],
        [x],
    )


@spelling("sparsemax")
def entry_by_entry():
    y, x = cp.Parameter(4), cp.Variable(4)
    rules = [x[i] >= 0 for i in range(4)] + [x[0] + x[1] + x[2] + x[3] == 1]
    return cp.Problem(cp.Minimize(sum((x[i] - y[i]) ** 2 for i in range(4))), rules), [y], [x]


@spelling("sparsemax")
def a_matrix():
    y, x = cp.Parameter((2, 3)), cp.Variable((2, 3))
    return cp.Problem(cp.Minimize(cp.norm(x - y, "fro") ** 2), [cp.sum(x) == 2, x >= 0]), [y], [x]


@spelling("sparsemax")
def bounds_of_the_variable():
    y, x = cp.Parameter(6), cp.Variable(6, bounds=[0, None])
    return cp.Problem(cp.Minimize(cp.sum_squares(x - y)), [-cp.sum(x) == -1]), [y], [x]


@spelling("sparsemax")
def multipliers():
    y, r, x = cp.Parameter(6), lam(), cp.Variable(6)
    rules = [2 * x >= 0, cp.sum(x) == r]
    return (
        cp.Problem(cp.Minimize(cp.sum_squares(x - y)), rules),
        [y, r],
        [rules[0].dual_variables[0], x, rules[1].dual_variables[0]],
    )


# Quadratic programs


@spelling("quadratic_program")
def optnet():
    (P, q), G, h, x = P_q(), cp.Parameter((6, 5)), cp.Parameter(6, nonneg=True), cp.Variable(5)
    return cp.Problem(cp.Minimize(cp.quad_form(x, P) / 2 + q @ x), [G @ x <= h]), [P, q, G, h], [x]


@spelling("quadratic_program")
def nonnegative_least_squares():
    (A, b), x = A_b(), cp.Variable(4, nonneg=True)
    return cp.Problem(cp.Minimize(cp.sum_squares(A @ x - b))), [A, b], [x]


@spelling("quadratic_program")
def lasso():
    (A, b), mu, x = A_b(), lam(), cp.Variable(4)
    return cp.Problem(cp.Minimize(cp.sum_squares(A @ x - b) + mu * cp.norm1(x))), [A, b, mu], [x]


@spelling("quadratic_program")
def huber():
    (A, b), x = A_b(), cp.Variable(4)
    return cp.Problem(cp.Minimize(cp.sum(cp.huber(A @ x - b, 0.5)))), [A, b], [x]


@spelling("quadratic_program")
def the_largest_residual():
    (A, b), x = A_b(), cp.Variable(4)
    return cp.Problem(cp.Minimize(cp.norm_inf(A @ x - b) + 0.1 * cp.sum_squares(x))), [A, b], [x]


@spelling("quadratic_program")
def a_capped_simplex():
    y, x = cp.Parameter(6), cp.Variable(6)
    return (
        cp.Problem(cp.Minimize(cp.sum_squares(x - y)), [cp.sum(x) == 1, x >= 0, x <= 0.4]),
        [y],
        [x],
    )


@spelling("quadratic_program")
def a_portfolio():
    mu, gamma, w = cp.Parameter(4), lam(), cp.Variable(4)
    risk = gamma * cp.quad_form(w, SPD_4)
    return (
        cp.Problem(
            cp.Maximize(mu @ w - risk - 0.1 * cp.norm1(w)), [cp.sum(w) == 1, cp.abs(w) <= 1]
        ),
        [mu, gamma],
        [w],
    )


@spelling("quadratic_program")
def a_maximum_of_lines():
    (A, b), x = A_b(), cp.Variable(4)
    return cp.Problem(cp.Minimize(cp.max(A @ x + b) + cp.sum_squares(x))), [A, b], [x]


@spelling("quadratic_program")
def multipliers_of_a_box():
    q, x = cp.Parameter(4), cp.Variable(4)
    rules = [x <= 0.1, x >= -0.1]
    return (
        cp.Problem(cp.Minimize(cp.quad_form(x, SPD_4) + q @ x), rules),
        [q],
        [x, *(rule.dual_variables[0] for rule in rules)],
    )

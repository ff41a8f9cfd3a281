"""Problems beside those of convlayer.problems, so that every cone, duals, mixtures and log-log
programs are covered.

Where a problem has no oracle, the reference is CVXPY's own solution by a tight interior point
method.
"""

from __future__ import annotations

from itertools import chain, combinations, product

import cvxpy as cp
import numpy as np
import torch
from scipy.optimize import brentq, linprog, root
from scipy.optimize import isotonic_regression as isotonic
from scipy.special import logsumexp
from scipy.special import softmax as soft

from convlayer.problems import PROBLEMS, Prebuilt, prebuilt


@prebuilt()
def linear_program_dual(n=4, m=6):
    c, A, b, x = cp.Parameter(n), cp.Parameter((m, n)), cp.Parameter(m), cp.Variable(n)
    limit = A @ x <= b
    return cp.Problem(cp.Minimize(-c @ x), [limit, x >= 0]), [c, A, b], [x, limit.dual_variables[0]]


linear_program_dual.sampled_by(
    lambda draw, n, m: (draw.uniform(0.5, 2, n), draw.uniform(0.1, 1, m, n), draw.uniform(1, 2, m))
)


@linear_program_dual.solved_by
def _vertex(c, A, b):
    result = linprog(-c, A, b)
    return result.x, -result.ineqlin.marginals


@prebuilt()
def chebyshev_regression(m=8, n=3):
    A, b, x = cp.Parameter((m, n)), cp.Parameter(m), cp.Variable(n)
    return cp.Problem(cp.Minimize(cp.norm_inf(A @ x - b))), [A, b], [x]


@prebuilt()
def least_absolute_deviations(m=7, n=2):
    A, b, x = cp.Parameter((m, n)), cp.Parameter(m), cp.Variable(n)
    return cp.Problem(cp.Minimize(cp.norm1(A @ x - b))), [A, b], [x]


for _regression, _bound in (
    (chebyshev_regression, lambda m: np.ones((m, 1))),
    (least_absolute_deviations, np.eye),
):
    _regression.sampled_by(lambda draw, m, n: (draw.normal(m, n), draw.normal(m)))

    @_regression.solved_by
    def _linear(A, b, bound=_bound):
        T = bound(len(b))
        cost = np.append(np.zeros(A.shape[1]), np.ones(T.shape[1]))
        return linprog(
            cost, np.block([[A, -T], [-A, -T]]), np.concatenate([b, -b]), bounds=(None, None)
        ).x[: A.shape[1]]


@prebuilt()
def quadratic_program_duals(n=4, m=5, p=1):
    P, q, G = cp.Parameter((n, n), PSD=True), cp.Parameter(n), cp.Parameter((m, n))
    h, A, b, x = cp.Parameter(m), cp.Parameter((p, n)), cp.Parameter(p), cp.Variable(n)
    limit, equal = G @ x <= h, A @ x == b
    problem = cp.Problem(cp.Minimize(0.5 * cp.quad_form(x, P) + q @ x), [limit, equal])
    return problem, [P, q, G, h, A, b], [x, limit.dual_variables[0], equal.dual_variables[0]]


@quadratic_program_duals.sampled_by
def _feasible(draw, n, m, p):
    inside, G, A = draw.normal(n, 1), draw.normal(m, n), draw.normal(p, n)
    h, b = (G @ inside).squeeze(-1) + draw.uniform(0.1, 1, m), (A @ inside).squeeze(-1)
    return draw.positive_definite(n), 3 * draw.normal(n), G, h, A, b


@quadratic_program_duals.solved_by
def _active_sets(P, q, G, h, A, b):
    n, m, p = len(q), len(h), len(b)
    for active in map(
        list, chain.from_iterable(combinations(range(m), k) for k in range(n - p + 1))
    ):
        B, c = np.vstack([G[active], A]), np.concatenate([h[active], b])
        z = np.linalg.solve(
            np.block([[P, B.T], [B, np.zeros((len(c), len(c)))]]), np.concatenate([-q, c])
        )
        x, multipliers = z[:n], z[n : n + len(active)]
        if np.all(G @ x <= h + 1e-12) and np.all(multipliers >= 0):
            dual = np.zeros(m)
            dual[active] = multipliers
            return x, dual, z[n + len(active) :]
    raise ValueError("no active set is optimal")


@prebuilt()
def quadratic_program_factored(n=4, m=5, p=1):
    L, q, G = cp.Parameter((n, n)), cp.Parameter(n), cp.Parameter((m, n))
    h, A, b, x = cp.Parameter(m), cp.Parameter((p, n)), cp.Parameter(p), cp.Variable(n)
    return (
        cp.Problem(cp.Minimize(0.5 * cp.sum_squares(L.T @ x) + q @ x), [G @ x <= h, A @ x == b]),
        [L, q, G, h, A, b],
        [x],
    )


@quadratic_program_factored.sampled_by
def _factored(draw, n, m, p):
    P, *rest = _feasible(draw, n, m, p)
    return torch.linalg.cholesky(P), *rest


quadratic_program_factored.solved_by(lambda L, *rest: _active_sets(L @ L.T, *rest)[0])


@prebuilt()
def isotonic_regression(n=8):
    y, x = cp.Parameter(n), cp.Variable(n)
    return cp.Problem(cp.Minimize(cp.sum_squares(x - y)), [cp.diff(x) >= 0]), [y], [x]


isotonic_regression.sampled_by(lambda draw, n: (draw.normal(n) + torch.linspace(0, 2, n),))
isotonic_regression.solved_by(lambda y: isotonic(y).x)


@prebuilt()
def linear_over_a_ball_dual(n=4):
    c, a, r, x = cp.Parameter(n), cp.Parameter(n), cp.Parameter(pos=True), cp.Variable(n)
    ball = cp.norm2(x - a) <= r
    return cp.Problem(cp.Minimize(c @ x), [ball]), [c, a, r], [x, ball.dual_variables[0]]


linear_over_a_ball_dual.sampled_by(
    lambda draw, n: (draw.normal(n), draw.normal(n), draw.uniform(0.5, 2))
)
linear_over_a_ball_dual.solved_by(
    lambda c, a, r: (a - r * c / np.linalg.norm(c), np.linalg.norm(c))
)


@prebuilt()
def group_soft_threshold(groups=3, n=3):
    Y, lam, X = cp.Parameter((groups, n)), cp.Parameter(nonneg=True), cp.Variable((groups, n))
    return (
        cp.Problem(cp.Minimize(0.5 * cp.sum_squares(X - Y) + lam * cp.sum(cp.norm2(X, axis=1)))),
        [Y, lam],
        [X],
    )


group_soft_threshold.sampled_by(
    lambda draw, groups, n: (1.5 * draw.normal(groups, n), draw.uniform(0.3, 1.5))
)
group_soft_threshold.solved_by(
    lambda Y, lam: Y * np.maximum(1 - lam / np.linalg.norm(Y, axis=1, keepdims=True), 0)
)


@prebuilt()
def norm_regression(m=8, n=4):
    A, b, x = cp.Parameter((m, n)), cp.Parameter(m), cp.Variable(n)
    return cp.Problem(cp.Minimize(cp.norm2(A @ x - b) + 0.5 * cp.sum_squares(x))), [A, b], [x]


norm_regression.sampled_by(lambda draw, m, n: (draw.normal(m, n), 3 * draw.normal(m)))
norm_regression.solved_by(
    lambda A, b: (
        root(
            lambda x: A.T @ (A @ x - b) / np.linalg.norm(A @ x - b) + x,
            np.zeros(A.shape[1]),
            tol=1e-14,
        ).x
    )
)


@prebuilt()
def psd_projection_dual(n=4):
    C, X = cp.Parameter((n, n), symmetric=True), cp.Variable((n, n), symmetric=True)
    psd = X >> 0
    return cp.Problem(cp.Minimize(cp.sum_squares(X - C)), [psd]), [C], [X, psd.dual_variables[0]]


psd_projection_dual.sampled_by(lambda draw, n: (_symmetric(draw.normal(n, n)),))


@psd_projection_dual.solved_by
def _spectral(C):
    values, vectors = np.linalg.eigh(C)
    X = (vectors * np.maximum(values, 0)) @ vectors.T
    return X, 2 * (X - C)


@prebuilt()
def singular_value_threshold(m=4, n=3):
    C, lam, X = cp.Parameter((m, n)), cp.Parameter(nonneg=True), cp.Variable((m, n))
    return cp.Problem(cp.Minimize(0.5 * cp.sum_squares(X - C) + lam * cp.normNuc(X))), [C, lam], [X]


singular_value_threshold.sampled_by(lambda draw, m, n: (draw.normal(m, n), draw.uniform(0.5, 1.2)))


@singular_value_threshold.solved_by
def _shrunk(C, lam):
    U, values, V = np.linalg.svd(C, full_matrices=False)
    return (U * np.maximum(values - lam, 0)) @ V


@prebuilt()
def inverse_covariance(n=3):
    S, X = cp.Parameter((n, n), PSD=True), cp.Variable((n, n), symmetric=True)
    return cp.Problem(cp.Maximize(cp.log_det(X) - cp.trace(S @ X))), [S], [X]


inverse_covariance.sampled_by(lambda draw, n: (draw.positive_definite(n),))
inverse_covariance.solved_by(np.linalg.inv)


@prebuilt()
def water_filling(n=5):
    a, w, x = cp.Parameter(n, nonneg=True), cp.Parameter(pos=True), cp.Variable(n)
    return cp.Problem(cp.Maximize(cp.sum(cp.log(a + x))), [x >= 0, cp.sum(x) == w]), [a, w], [x]


water_filling.sampled_by(lambda draw, n: (draw.uniform(0.2, 2, n), draw.uniform(0.5, 2)))


@water_filling.solved_by
def _level(a, w):
    return np.maximum(np.min((np.sort(a).cumsum() + w) / np.arange(1, len(a) + 1)) - a, 0)


@prebuilt()
def softmax_dual(n=5):
    y, x = cp.Parameter(n), cp.Variable(n)
    total = cp.sum(x) == 1
    return (
        cp.Problem(cp.Minimize(-y @ x - cp.sum(cp.entr(x))), [total]),
        [y],
        [x, total.dual_variables[0]],
    )


softmax_dual.sampled_by(lambda draw, n: (2 * draw.normal(n),))
softmax_dual.solved_by(lambda y: (soft(y), logsumexp(y) - 1))


@prebuilt()
def relative_entropy_projection(n=4):
    y, r, x = cp.Parameter(n, pos=True), cp.Parameter(pos=True), cp.Variable(n)
    return cp.Problem(cp.Minimize(cp.sum(cp.kl_div(x, y))), [cp.sum(x) == r]), [y, r], [x]


relative_entropy_projection.sampled_by(
    lambda draw, n: (draw.uniform(0.2, 2, n), draw.uniform(0.5, 2))
)
relative_entropy_projection.solved_by(lambda y, r: y * r / y.sum())


@prebuilt()
def entropic_transport(n=3):
    C, X = cp.Parameter((n, n)), cp.Variable((n, n))
    margins = [cp.sum(X, axis=0) == 1 / n, cp.sum(X, axis=1) == 1 / n]
    return (
        cp.Problem(cp.Minimize(cp.sum(cp.multiply(C, X)) - 0.3 * cp.sum(cp.entr(X))), margins),
        [C],
        [X],
    )


entropic_transport.sampled_by(lambda draw, n: (draw.uniform(0, 1, n, n),))


@entropic_transport.solved_by
def _sinkhorn(C):
    K, v = np.exp(-C / 0.3), np.ones(len(C))
    for _ in range(1000):
        u = 1 / len(C) / (K @ v)
        v = 1 / len(C) / (K.T @ u)
    return u[:, None] * K * v


@prebuilt()
def log_sum_exp(m=6, n=3):
    A, b, x = cp.Parameter((m, n)), cp.Parameter(m), cp.Variable(n)
    return cp.Problem(cp.Minimize(cp.log_sum_exp(A @ x + b) + 0.5 * cp.sum_squares(x))), [A, b], [x]


log_sum_exp.sampled_by(lambda draw, m, n: (draw.normal(m, n), draw.normal(m)))
log_sum_exp.solved_by(
    lambda A, b: root(lambda x: A.T @ soft(A @ x + b) + x, np.zeros(A.shape[1]), tol=1e-14).x
)


@prebuilt()
def cost_minimisation_dual(share=0.3):
    p, u, x, z = cp.Parameter(2, pos=True), cp.Parameter(pos=True), cp.Variable(2), cp.Variable()
    target = z == u
    return (
        cp.Problem(cp.Minimize(p @ x), [cp.PowCone3D(x[0], x[1], z, share), target]),
        [p, u],
        [x, target.dual_variables[0]],
    )


cost_minimisation_dual.sampled_by(
    lambda draw, share: (draw.uniform(0.5, 2, 2), draw.uniform(0.5, 2))
)


@cost_minimisation_dual.solved_by
def _demand(p, u, share=0.3):
    cost = (p[0] / share) ** share * (p[1] / (1 - share)) ** (1 - share)
    return np.array([share, 1 - share]) * cost * u / p, -cost


@prebuilt()
def power_penalty(n=4, exponent=3.0):
    b, x, t = cp.Parameter(n), cp.Variable(n), cp.Variable(n)
    return (
        cp.Problem(cp.Minimize(cp.sum(t) - b @ x), [cp.PowCone3D(t, np.ones(n), x, 1 / exponent)]),
        [b],
        [x],
    )


power_penalty.sampled_by(lambda draw, n, exponent: (draw.normal(n),))
power_penalty.solved_by(lambda b: np.sign(b) * np.sqrt(np.abs(b) / 3))


@prebuilt(gp=True)
def posynomial():
    a, b, c = (cp.Parameter(pos=True) for _ in range(3))
    x, y = cp.Variable(pos=True), cp.Variable(pos=True)
    return cp.Problem(cp.Minimize(a / (x * y) + b * x + c * y)), [a, b, c], [x, y]


posynomial.sampled_by(lambda draw: tuple(draw.uniform(0.5, 2) for _ in range(3)))
posynomial.solved_by(lambda a, b, c: (np.cbrt(a * c / b**2), np.cbrt(a * b / c**2)))


@prebuilt()
def control(states=4, inputs=2, horizon=10):
    A, B = cp.Parameter((states, states)), cp.Parameter((states, inputs))
    start, X, U = (
        cp.Parameter(states),
        cp.Variable((states, horizon + 1)),
        cp.Variable((inputs, horizon)),
    )
    moves = [X[:, 0] == start, X[:, 1:] == A @ X[:, :-1] + B @ U, cp.abs(U) <= 0.5]
    return (
        cp.Problem(cp.Minimize(cp.sum_squares(X) + 0.2 * cp.sum_squares(U)), moves),
        [A, B, start],
        [U],
    )


@control.sampled_by
def _systems(draw, states, inputs, horizon):
    return (
        torch.eye(states) + 0.1 * draw.normal(states, states),
        0.5 * draw.normal(states, inputs),
        draw.normal(states),
    )


@prebuilt()
def risk_budget(n=4):
    mu, L, sigma, w = cp.Parameter(n), cp.Parameter((n, n)), cp.Parameter(pos=True), cp.Variable(n)
    risk = cp.norm2(L.T @ w) <= sigma
    return (
        cp.Problem(cp.Maximize(mu @ w + 0.1 * cp.sum(cp.entr(w))), [risk, cp.sum(w) == 1]),
        [mu, L, sigma],
        [w, risk.dual_variables[0]],
    )


@risk_budget.sampled_by
def _risks(draw, n):
    return 2 * draw.normal(n), torch.eye(n) + 0.1 * draw.normal(n, n), draw.uniform(0.55, 0.65)


@risk_budget.solved_by
def _within_budget(mu, L, sigma):
    """With w = exp(z): stationarity, the risk and the budget, for z and the two multipliers."""
    n = len(mu)

    def conditions(unknowns):
        w, multiplier, nu = np.exp(unknowns[:n]), unknowns[n], unknowns[n + 1]
        risk = np.linalg.norm(L.T @ w)
        return np.concatenate(
            [
                mu - 0.1 * (unknowns[:n] + 1) - multiplier * (L @ (L.T @ w)) / risk - nu,
                [risk - sigma, w.sum() - 1],
            ]
        )

    found = root(conditions, np.concatenate([np.full(n, -np.log(n)), [5.0, 0.0]]), tol=1e-14)
    if np.abs(found.fun).max() > 1e-10 or found.x[n] < 0:
        raise ValueError("the risk is not at its limit")
    return np.exp(found.x[:n]), found.x[n]


@prebuilt()
def norm_fit_psd(n=3):
    C, lam, X = (
        cp.Parameter((n, n), symmetric=True),
        cp.Parameter(nonneg=True),
        cp.Variable((n, n), PSD=True),
    )
    return (
        cp.Problem(cp.Minimize(cp.norm(X - C, "fro") + lam * cp.sum_squares(X) + cp.trace(X) / 10)),
        [C, lam],
        [X],
    )


norm_fit_psd.sampled_by(
    lambda draw, n: (
        _symmetric(draw.normal(n, n)) + torch.diag(torch.linspace(-3, 3, n)),
        draw.uniform(0.05, 0.2),
    )
)


@norm_fit_psd.solved_by
def _shrunk_spectrum(C, lam):
    """By eigenvalues: x = max((c - N / 10) / (1 + 2 lam N), 0) with N = |x - c|."""
    values, vectors = np.linalg.eigh(C)

    def shrunk(N):
        return np.maximum((values - N / 10) / (1 + 2 * lam * N), 0)

    N = brentq(lambda N: np.linalg.norm(shrunk(N) - values) - N, 1e-6, 1e3, xtol=1e-15, rtol=1e-15)
    return (vectors * shrunk(N)) @ vectors.T


@prebuilt()
def all_cones(n=3):
    y, S, lam, b = (
        cp.Parameter(n),
        cp.Parameter((n, n), symmetric=True),
        cp.Parameter(nonneg=True),
        cp.Parameter(),
    )
    x, t = cp.Variable(n), cp.Variable(n)
    total = cp.sum(x) == b
    cost = (
        cp.sum_squares(x - y)
        + lam * cp.norm2(x)
        + cp.log_sum_exp(x)
        + cp.lambda_max(S + cp.diag(x))
        + cp.sum(t)
    )
    problem = cp.Problem(cp.Minimize(cost), [cp.PowCone3D(t, np.ones(n), x, 0.4), x <= 0.5, total])
    return problem, [y, S, lam, b], [x, total.dual_variables[0]]


all_cones.sampled_by(
    lambda draw, n: (
        draw.normal(n),
        _symmetric(draw.normal(n, n)),
        draw.uniform(0.2, 1),
        draw.uniform(0.2, 1),
    )
)


@all_cones.solved_by
def _by_active_bounds(y, S, lam, b):
    """On each set of bounds: the gradient of the cost plus a multiplier of the sum vanishes off
    it."""

    def gradient(x):
        v = np.linalg.eigh(S + np.diag(x))[1][:, -1]
        return (
            2 * (x - y)
            + lam * x / np.linalg.norm(x)
            + soft(x)
            + v * v
            + 2.5 * np.sign(x) * np.abs(x) ** 1.5
        )

    for bounded in product((False, True), repeat=len(y)):
        free = ~np.array(bounded)

        def point(z, free=free):
            x = np.full(len(y), 0.5)
            x[free] = z[:-1]
            return x

        def conditions(z, free=free, point=point):
            return np.append((gradient(point(z)) + z[-1])[free], point(z).sum() - b)

        found = root(conditions, np.full(free.sum() + 1, b / 3), tol=1e-14)
        x, slope = point(found.x), gradient(point(found.x)) + found.x[-1]
        if (
            np.abs(found.fun).max() < 1e-11
            and np.all(x <= 0.5 + 1e-12)
            and np.all(slope[~free] <= 0)
        ):
            return x, found.x[-1]
    raise ValueError("no set of bounds is optimal")


def _symmetric(W):
    return (W + W.mT) / 2


OWN: dict[str, Prebuilt] = {
    value.name: value for value in list(globals().values()) if isinstance(value, Prebuilt)
}
CASES = {**PROBLEMS, **OWN}

"""Quadratic programs as Stellato et al. draw them, and dense ones of a given condition, declared
with Parameters; and what certifies a solution.

Sparse matrices are constants of the problem, vectors are Parameters; in the dense families
everything is a Parameter.

Source: Stellato, Banjac, Goulart, Bemporad and Boyd (2020), OSQP: an operator splitting solver for
        quadratic programs, appendix A.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import cvxpy as cp
import numpy as np
import scipy.linalg
import scipy.sparse as sp
import torch

from convlayer import ConvexLayer, Solution, Status

DENSITY = 0.15
RIDGE = 1e-2  # on the diagonal of P
HORIZON = 10
TINY = 1e-300
SECOND = {  # solvers of CVXPY's, and options, with which the objective is compared
    cp.CLARABEL: {"tol_feas": 1e-10, "tol_gap_abs": 1e-10, "tol_gap_rel": 1e-10},
    cp.OSQP: {"eps_abs": 1e-10, "eps_rel": 1e-10, "max_iter": 20_000, "polishing": True},
}
Values = tuple[np.ndarray, ...]
Draw = Callable[[np.random.Generator], Values]


@dataclass(frozen=True, eq=False)
class Instance:
    """A problem, and a batch of values for its parameters."""

    problem: cp.Problem
    parameters: Sequence[cp.Parameter]
    batch: list[Values]

    @property
    def variables(self) -> list[cp.Variable]:
        return self.problem.variables()

    @property
    def duals(self) -> list[cp.Variable]:
        return [constraint.dual_variables[0] for constraint in self.problem.constraints]

    def layer(self) -> ConvexLayer:
        """All variables and all duals are outputs."""
        return ConvexLayer(
            self.problem, self.parameters, [*self.variables, *self.duals], on_failure="keep"
        )

    def tensors(self) -> list[torch.Tensor]:
        """One a parameter, the batch in front."""
        return [torch.from_numpy(np.stack(values)) for values in zip(*self.batch, strict=True)]

    def set(self, values: Values) -> None:
        for parameter, value in zip(self.parameters, values, strict=True):
            parameter.value = value


Family = Callable[[int, np.random.Generator], tuple[cp.Problem, Sequence[cp.Parameter], Draw]]


def instance(family: Family, size: int, batch: int = 2, seed: int = 0) -> Instance:
    random = np.random.default_rng([seed, size])
    problem, parameters, draw = family(size, random)
    return Instance(problem, parameters, [draw(random) for _ in range(batch)])


def certificate(problem: cp.Problem, duals: Sequence[np.ndarray]) -> dict[str, float]:
    """Violations of the optimality conditions at the values of the variables, relative to the
    largest terms of each.

    With f to be minimised subject to g <= 0, e = 0:  grad f + J_g'y + J_e'u = 0,  g <= 0,  e = 0,  y >= 0,  y'g = 0;
    values and Jacobians are CVXPY's. The lengths that errors are relative to are those of all constraints together.
    """
    objective = problem.objective.args[0]
    sign = 1.0 if isinstance(problem.objective, cp.Minimize) else -1.0
    gradient = {v: sign * _column(part, v) for v, part in objective.grad.items()}
    terms = [np.abs(part) for part in gradient.values()]
    outside, lengths, negative, multipliers = [], [], [], []
    gap, weight = 0.0, abs(float(objective.value))
    for constraint, dual in zip(problem.constraints, duals, strict=True):
        y, excess = dual.ravel(order="F"), np.ravel(constraint.expr.value, order="F")
        constant, length = excess.copy(), np.zeros(len(y))
        for v, part in constraint.expr.grad.items():  # (size of v, size of the constraint)
            J = sp.csr_array(part if sp.issparse(part) else np.atleast_2d(part)).reshape(
                v.size, len(y)
            )
            value = v.value.ravel(order="F")
            constant, length = constant - J.T @ value, length + abs(J).T @ np.abs(value)
            gradient[v] = gradient.get(v, 0.0) + J @ y
            terms.append(abs(J) @ np.abs(y))
        length = length + np.abs(constant)
        lengths.append(length)
        if isinstance(constraint, cp.constraints.Equality):
            outside.append(excess)
        else:
            outside.append(np.maximum(excess, 0))
            negative.append(np.maximum(-y, 0))
            multipliers.append(y)
            gap, weight = (
                gap + float(np.abs(y) @ np.abs(excess)),
                weight + float(np.abs(y) @ length),
            )
    return {
        "feasibility": _size(outside) / max(_size(lengths), TINY),
        "stationarity": _size(gradient.values()) / max(_size(terms), TINY),
        "sign": _size(negative) / max(_size(multipliers), TINY),
        "complementarity": gap / max(weight, TINY),
    }


def second_objective(problem: cp.Problem) -> float | None:
    """By CVXPY with the parameters' values: Clarabel's, else OSQP's, at 1e-10; None where neither
    says that it has it."""
    for name, options in SECOND.items():
        with warnings.catch_warnings(), contextlib.suppress(cp.SolverError):
            warnings.simplefilter("ignore")
            value = problem.solve(solver=name, **options)
            if problem.status == cp.OPTIMAL:
                return float(value)
    return None


@dataclass(frozen=True)
class Finding:
    """What a row's solution is worth."""

    status: Status
    conditions: dict[str, float]  # violations
    objective: float | None  # relative difference from the second solver's

    @property
    def error(self) -> float:
        return max(self.conditions.values())


def examine(these: Instance, solution: Solution) -> list[Finding]:
    """Every row of a solution whose variables are those of the problem, then its duals."""
    findings, count = [], len(these.variables)
    for row, values in enumerate(these.batch):
        these.set(values)
        outputs = [x[row].detach().numpy() for x in solution.variables]
        for variable, value in zip(these.variables, outputs[:count], strict=True):
            variable.value = value
        conditions = certificate(these.problem, outputs[count:])
        mine, other = float(these.problem.objective.value), second_objective(these.problem)
        difference = None if other is None else abs(mine - other) / max(abs(mine), abs(other), TINY)
        findings.append(Finding(Status(int(solution.status[row])), conditions, difference))
    return findings


def _column(part, v: cp.Variable) -> np.ndarray:
    return np.asarray(part.toarray() if sp.issparse(part) else part, dtype=float).reshape(v.size)


def _size(parts: Iterable[np.ndarray]) -> float:
    return max((float(np.abs(part).max(initial=0)) for part in parts), default=0.0)


def sparse(random: np.random.Generator, m: int, n: int, density: float = DENSITY) -> sp.csc_array:
    """Gaussian, with at least one entry in each row and column."""
    A = sp.random_array(
        (m, n), density=density, rng=random, data_sampler=random.standard_normal, format="lil"
    )
    for i in range(max(m, n)):
        A[i % m, i % n] = random.standard_normal()
    return sp.csc_array(A)


def random_quadratic_program(n: int, random: np.random.Generator):
    """n variables, 10 n inequalities."""
    M, A = sparse(random, n, n), sparse(random, 10 * n, n)
    q, u, x = cp.Parameter(n, name="q"), cp.Parameter(10 * n, name="u"), cp.Variable(n, name="x")
    curvature = cp.sum_squares(M.T @ x) + RIDGE * cp.sum_squares(x)
    problem = cp.Problem(cp.Minimize(curvature / 2 + q @ x), [A @ x <= u])
    return (
        problem,
        [q, u],
        lambda r: (r.standard_normal(n), A @ r.standard_normal(n) + r.uniform(0, 1, 10 * n)),
    )


def equality_program(n: int, random: np.random.Generator):
    """n variables, n / 2 equalities."""
    M, A = sparse(random, n, n), sparse(random, n // 2, n)
    q, b, x = cp.Parameter(n, name="q"), cp.Parameter(n // 2, name="b"), cp.Variable(n, name="x")
    curvature = cp.sum_squares(M.T @ x) + RIDGE * cp.sum_squares(x)
    problem = cp.Problem(cp.Minimize(curvature / 2 + q @ x), [A @ x == b])
    return problem, [q, b], lambda r: (r.standard_normal(n), A @ r.standard_normal(n))


def predictive_control(states: int, random: np.random.Generator):
    """A linear system with bounds on states and inputs, over ten steps; the horizon's cost is that
    of Riccati's equation."""
    inputs = max(states // 2, 1)
    A, B = (
        np.eye(states) + 0.01 * random.standard_normal((states, states)),
        random.standard_normal((states, inputs)),
    )
    A /= max(1.0, np.abs(np.linalg.eigvals(A)).max() / 0.999)
    Q, R = (
        np.diag(random.uniform(0, 10, states) * (random.uniform(size=states) < 0.7)),
        0.1 * np.eye(inputs),
    )
    end = scipy.linalg.solve_discrete_are(A, B, Q + 1e-6 * np.eye(states), R)
    far, most = random.uniform(1, 2, states), random.uniform(0, 0.1, inputs)
    start, X = cp.Parameter(states, name="start"), cp.Variable((states, HORIZON + 1), name="X")
    U = cp.Variable((inputs, HORIZON), name="U")
    cost = cp.sum_squares(np.sqrt(Q) @ X[:, :-1]) + cp.sum_squares(np.sqrt(R) @ U)
    cost += cp.sum_squares(np.linalg.cholesky(end).T @ X[:, -1])
    bounds = [
        sign * v <= size[:, None] for v, size in ((X[:, 1:], far), (U, most)) for sign in (1, -1)
    ]
    problem = cp.Problem(
        cp.Minimize(cost / 2), [X[:, 0] == start, X[:, 1:] == A @ X[:, :-1] + B @ U, *bounds]
    )
    return problem, [start], lambda r: (r.uniform(-0.5, 0.5, states) * far,)


def portfolio(factors: int, random: np.random.Generator):
    """Ten assets a factor."""
    n = 10 * factors
    F, D = sparse(random, n, factors, 0.5), random.uniform(0, factors**0.5, n)
    mu, w, y = cp.Parameter(n, name="mu"), cp.Variable(n, name="w"), cp.Variable(factors, name="y")
    risk = cp.sum_squares(cp.multiply(D**0.5, w)) + cp.sum_squares(y)
    problem = cp.Problem(cp.Minimize(risk - mu @ w), [y == F.T @ w, cp.sum(w) == 1, w >= 0])
    return problem, [mu], lambda r: (r.standard_normal(n),)


def lasso(n: int, random: np.random.Generator):
    """n features, 10 n observations; |x| by bounds t."""
    A = sparse(random, 10 * n, n)
    b, lam = cp.Parameter(10 * n, name="b"), cp.Parameter(nonneg=True, name="lam")
    x, y, t = cp.Variable(n, name="x"), cp.Variable(10 * n, name="y"), cp.Variable(n, name="t")
    problem = cp.Problem(
        cp.Minimize(cp.sum_squares(y) + lam * cp.sum(t)), [y == A @ x - b, x <= t, x >= -t]
    )

    def draw(r):
        truth = r.standard_normal(n) * (r.uniform(size=n) < 0.5) / n**0.5
        value = A @ truth + r.standard_normal(10 * n)
        return value, np.array(np.abs(A.T @ value).max() / 5)

    return problem, [b, lam], draw


def huber(n: int, random: np.random.Generator):
    """n features, 10 n observations, a twentieth of them far out; errors beyond 1 are r - s."""
    m = 10 * n
    A, b, x = sparse(random, m, n), cp.Parameter(m, name="b"), cp.Variable(n, name="x")
    u, r, s = (cp.Variable(m, name=name) for name in "urs")
    loss = cp.sum_squares(u) + 2 * cp.sum(r + s)
    problem = cp.Problem(cp.Minimize(loss), [A @ x - b - u == r - s, r >= 0, s >= 0])

    def draw(g):
        noise = np.where(g.uniform(size=m) < 0.95, 0.25 * g.standard_normal(m), g.uniform(0, 10, m))
        return (A @ g.standard_normal(n) / n**0.5 + noise,)

    return problem, [b], draw


def support_vectors(n: int, random: np.random.Generator):
    """n features, 10 n points of two classes."""
    m = 10 * n
    label = np.where(np.arange(m) < m // 2, 1.0, -1.0)
    A = sp.csc_array(
        sp.diags_array(label)
        @ (sparse(random, m, n) + sp.csc_array(np.outer(label / n, np.ones(n))))
    )
    lam, x, t = (
        cp.Parameter(nonneg=True, name="lam"),
        cp.Variable(n, name="x"),
        cp.Variable(m, name="t"),
    )
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x) + lam * cp.sum(t)), [t >= 1 - A @ x, t >= 0])
    return problem, [lam], lambda r: (np.array(r.uniform(0.5, 1.0)),)


SPARSE: dict[str, Family] = {
    f.__name__: f
    for f in (
        random_quadratic_program,
        equality_program,
        predictive_control,
        portfolio,
        lasso,
        huber,
        support_vectors,
    )
}

N, INEQUALITIES, EQUALITIES = 20, 20, 5


def of_condition(random: np.random.Generator, m: int, n: int, condition: float) -> np.ndarray:
    """A dense matrix with singular values from 1 to 1 / condition."""
    U, V = (np.linalg.qr(random.standard_normal((k, k)))[0] for k in (m, n))
    k = min(m, n)
    return U[:, :k] * np.logspace(0, -np.log10(condition), k) @ V[:, :k].T


def dense(condition: float, what: str) -> Family:
    """1/2 |L x|^2 + q'x with G x <= h and A x = b, the condition being that of L'L, of G or of A;
    or 1/2 x'Px, of P."""
    form = what == "P"

    def declare(n: int, random: np.random.Generator):
        P = cp.Parameter((n, n), PSD=True, name="P") if form else cp.Parameter((n, n), name="L")
        q, G = cp.Parameter(n, name="q"), cp.Parameter((n, n), name="G")
        h, A, b = (
            cp.Parameter(n, name="h"),
            cp.Parameter((n // 4, n), name="A"),
            cp.Parameter(n // 4, name="b"),
        )
        x = cp.Variable(n, name="x")
        curvature = cp.quad_form(x, P) if form else cp.sum_squares(P @ x)
        problem = cp.Problem(cp.Minimize(curvature / 2 + q @ x), [G @ x <= h, A @ x == b])

        def draw(r):
            L = of_condition(r, n, n, condition**0.5 if what in ("P", "L") else 10)
            G = of_condition(r, n, n, condition if what == "G" else 10)
            A = of_condition(r, n // 4, n, condition if what == "A" else 10)
            inside = r.standard_normal(n)
            first = (L.T @ L + (L.T @ L).T) / 2 if form else L
            return first, r.standard_normal(n), G, G @ inside + r.uniform(0, 1, n), A, A @ inside

        return problem, [P, q, G, h, A, b], draw

    return declare


CONDITIONS = (1e0, 1e2, 1e4, 1e6, 1e8)
DENSE: dict[str, tuple[Family, float]] = {
    f"dense, cond {what} {condition:.0e}": (dense(condition, what), condition)
    for what in ("P", "L", "G", "A")
    for condition in CONDITIONS
}

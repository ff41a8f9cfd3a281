"""Declarations of any size, as people write them, with values of their parameters.

A case is a function of its size that gives the problem with its parameters' values set; the sizes
at which it is measured stand beside it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import cvxpy as cp
import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from convlayer.problems import Declared

CASES: dict[str, Case] = {}


@dataclass(frozen=True)
class Case:
    """One declaration at its sizes."""

    declare: Callable[[int], tuple[cp.Problem, cp.Variable]]
    sizes: tuple[int, ...]

    def __call__(self, size: int) -> tuple[Declared, tuple[Tensor, ...]]:
        problem, variable = self.declare(size)
        parameters = tuple(problem.parameters())
        declared = Declared(self.declare.__name__, problem, parameters, (variable,))
        return declared, tuple(torch.from_numpy(np.array(p.value)) for p in parameters)


def case(*sizes: int):
    def register(declare: Callable[[int], tuple[cp.Problem, cp.Variable]]) -> Case:
        CASES[declare.__name__] = found = Case(declare, sizes)
        return found

    return register


def draw() -> np.random.Generator:
    return np.random.default_rng(0)


def parameter(name: str, value: np.ndarray, **attributes) -> cp.Parameter:
    return cp.Parameter(value.shape, name=name, value=value, **attributes)


@case(30, 100, 300)
def transport(n: int):
    """A linear program over tables n x n, with its cost table and both marginals."""
    random = draw()
    C = parameter("C", random.uniform(size=(n, n)))
    r, c = (parameter(name, random.dirichlet(np.ones(n))) for name in "rc")
    X = cp.Variable((n, n), nonneg=True)
    marginals = [cp.sum(X, axis=1) == r, cp.sum(X, axis=0) == c]
    return cp.Problem(cp.Minimize(cp.sum(cp.multiply(C, X))), marginals), X


@case(100, 400, 1600)
def network_flow(n: int):
    """Least cost over a random graph of n nodes and 5 n edges with capacities."""
    random = draw()
    ring = np.arange(n)
    source = np.concatenate([ring, random.integers(n, size=4 * n)])
    target = np.concatenate([(ring + 1) % n, random.integers(n, size=4 * n)])
    edges = np.arange(5 * n)
    ones = np.ones(5 * n)
    incidence = sp.coo_array((ones, (source, edges)), (n, 5 * n)) - sp.coo_array(
        (ones, (target, edges)), (n, 5 * n)
    )
    within = random.uniform(size=5 * n)
    cost = parameter("cost", random.uniform(0.1, 1, 5 * n))
    supply = parameter("supply", np.asarray(incidence @ within))
    capacity = parameter("capacity", 1.5 * within + 0.05)
    f = cp.Variable(5 * n)
    constraints = [incidence.tocsr() @ f == supply, f >= 0, f <= capacity]
    return cp.Problem(cp.Minimize(cost @ f), constraints), f


@case(32, 64, 100)
def image_total_variation(n: int):
    """Denoising of an image n x n by `cp.tv`."""
    random = draw()
    clean = np.kron(random.uniform(size=(4, 4)), np.ones((-(-n // 4),) * 2))[:n, :n]
    Y = parameter("Y", clean + 0.1 * random.standard_normal((n, n)))
    X = cp.Variable((n, n))
    return cp.Problem(cp.Minimize(cp.sum_squares(X - Y) / 2 + 0.1 * cp.tv(X))), X


@case(20, 45, 60, 100)
def nearest_correlation(n: int):
    """The nearest correlation matrix, a psd cone of order n."""
    noise = draw().standard_normal((n, n))
    S = parameter("S", np.eye(n) + 0.2 * (noise + noise.T), symmetric=True)
    X = cp.Variable((n, n), PSD=True)
    return cp.Problem(cp.Minimize(cp.sum_squares(X - S)), [cp.diag(X) == 1]), X


@case(20, 60, 100)
def maximum_cut(n: int):
    """The semidefinite relaxation of maximum cut."""
    noise = draw().standard_normal((n, n))
    W = parameter("W", (noise + noise.T) / 2, symmetric=True)
    X = cp.Variable((n, n), PSD=True)
    return cp.Problem(cp.Maximize(cp.trace(W @ X)), [cp.diag(X) == 1]), X


@case(500, 1000, 2000, 20_000)
def logistic_data(m: int):
    """Logistic regression whose data matrix, m x 20, is a Parameter."""
    random = draw()
    A = parameter("A", random.standard_normal((m, 20)))
    y = np.sign(A.value @ random.standard_normal(20) + random.standard_normal(m))
    w, lam = cp.Variable(20), cp.Parameter(nonneg=True, name="lam", value=0.1)
    loss = cp.sum(cp.logistic(cp.multiply(-y, A @ w))) / m
    return cp.Problem(cp.Minimize(loss + lam * cp.sum_squares(w))), w


@case(1000, 10_000, 100_000)
def logistic(m: int):
    """Logistic regression over m points whose labels are a Parameter: m exponential cones twice."""
    random = draw()
    A = random.standard_normal((m, 20))
    y = np.sign(A @ random.standard_normal(20) + random.standard_normal(m))
    y, w = parameter("y", y), cp.Variable(20)
    loss = cp.sum(cp.logistic(-cp.multiply(y, A @ w))) / m
    return cp.Problem(cp.Minimize(loss + 0.1 * cp.sum_squares(w))), w


@case(2000, 20_000, 100_000)
def cost_vector(n: int):
    """A linear program over a box and a few resources, its cost a Parameter."""
    random = draw()
    q = parameter("q", random.standard_normal(n))
    A = sp.random_array((50, n), density=0.1, random_state=random, format="csr")
    x = cp.Variable(n)
    return cp.Problem(cp.Minimize(q @ x), [A @ x <= np.ones(50), x >= 0, x <= 1]), x


@case(100, 1000, 10_000)
def control(T: int):
    """Regulation over T steps, 6 states and 3 bounded inputs."""
    random = draw()
    A = np.eye(6) + 0.1 * random.standard_normal((6, 6))
    A /= max(1.0, np.abs(np.linalg.eigvals(A)).max())
    B = random.standard_normal((6, 3))
    start = parameter("start", random.standard_normal(6))
    x, u = cp.Variable((6, T + 1)), cp.Variable((3, T))
    dynamics = x[:, 1:] == A @ x[:, :-1] + B @ u
    cost = cp.sum_squares(x) + 0.1 * cp.sum_squares(u)
    return cp.Problem(cp.Minimize(cost), [dynamics, x[:, 0] == start, cp.abs(u) <= 0.2]), u


@case(2000, 20_000, 100_000)
def sparse_quadratic_program(n: int):
    """Ten nonzeros a row in a band, scaled by a Parameter, with parameters in cost and bounds."""
    random = draw()
    columns = (np.arange(n)[:, None] + np.cumsum(random.integers(1, 8, (n, 10)), axis=1)) % n
    places = np.repeat(np.arange(n), 10), columns.ravel()
    A = sp.csr_array((random.standard_normal(10 * n), places), shape=(n, n))
    q, b = parameter("q", random.standard_normal(n)), parameter("b", random.uniform(0, 1, n))
    d, x = parameter("d", random.uniform(0.5, 1.5, n)), cp.Variable(n)
    constraints = [cp.multiply(d, A @ x) <= b, x >= -1, x <= 1]
    return cp.Problem(cp.Minimize(cp.sum_squares(x) / 2 + q @ x), constraints), x


@case(1000, 10_000, 100_000)
def portfolio(n: int):
    """Mean against variance by a factor model of n / 100 factors (half of the loadings zero)."""
    random, k = draw(), n // 100
    F = sp.random_array(
        (n, k), density=min(0.5, 20 / k), random_state=random, data_sampler=random.standard_normal
    )
    D = random.uniform(size=n) * k**0.5
    mu = parameter("mu", random.standard_normal(n))
    x, y = cp.Variable(n), cp.Variable(k)
    risk = cp.sum_squares(y) + cp.sum_squares(cp.multiply(np.sqrt(D), x))
    constraints = [y == F.tocsr().T @ x, cp.sum(x) == 1, x >= 0]
    return cp.Problem(cp.Minimize(risk - mu @ x), constraints), x


def regression(n: int) -> tuple[sp.csr_array, np.ndarray]:
    random, m = draw(), 2 * n
    A = sp.random_array(
        (m, n), density=min(0.15, 10 / n), random_state=random, data_sampler=random.standard_normal
    )
    A = A.tocsr() + sp.eye_array(m, n, format="csr")
    truth = random.standard_normal(n) * (random.uniform(size=n) < 0.5)
    return A, np.asarray(A @ truth) + random.standard_normal(m)


@case(200, 2000, 10_000)
def lasso(n: int):
    """Sparse least squares, 2 n x n."""
    A, b = regression(n)
    b, lam = parameter("b", b), cp.Parameter(nonneg=True, name="lam", value=1.0)
    x = cp.Variable(n)
    return cp.Problem(cp.Minimize(cp.sum_squares(A @ x - b) + lam * cp.norm1(x))), x


@case(200, 2000, 10_000)
def huber(n: int):
    """Robust regression, 2 n x n."""
    A, b = regression(n)
    b, x = parameter("b", b), cp.Variable(n)
    return cp.Problem(cp.Minimize(cp.sum(cp.huber(A @ x - b)) + 0.01 * cp.sum_squares(x))), x


@case(2000, 20_000, 100_000)
def ball(n: int):
    """Projection on a ball and a half-space: one second-order cone of n + 1 rows."""
    random = draw()
    y, x = parameter("y", random.standard_normal(n)), cp.Variable(n)
    constraints = [cp.norm(x) <= 1, cp.sum(x[: n // 2]) >= 0.5]
    return cp.Problem(cp.Minimize(cp.sum_squares(x - y)), constraints), x


@case(10, 32, 100)
def assignment(n: int):
    """An assignment of n to n, smoothed by a small square."""
    C = parameter("C", draw().uniform(size=(n, n)))
    X = cp.Variable((n, n), nonneg=True)
    sums = [cp.sum(X, axis=1) == 1, cp.sum(X, axis=0) == 1]
    objective = cp.sum(cp.multiply(C, X)) + 0.01 * cp.sum_squares(X)
    return cp.Problem(cp.Minimize(objective), sums), X

"""The registry: small well-posed problems over every cone, attribute and shape, each with a sampler
of its parameters.

A case is solved uniquely and with strict complementarity at the seeds the laws use, so that its
derivative exists. `@case(sampler)` registers a declaration; the sampler takes a Draw and returns
one tensor a parameter.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import cvxpy as cp
import numpy as np
import torch
from torch import Tensor

from convlayer import ConvexLayer, Solution, Status, problems

FIVE_POINT = {-2: 1 / 12, -1: -2 / 3, 1: 2 / 3, 2: -1 / 12}


class Draw(problems.Draw):
    """With the shapes that only the cases need."""

    def symmetric(self, n: int) -> Tensor:
        W = self.normal(n, n)
        return (W + W.mT) / 2

    def pattern(self, entries: Sequence[Sequence[int]], *shape: int) -> Tensor:
        """Normal at the entries listed by their coordinates, zero elsewhere."""
        value = torch.zeros((*self.batch, *shape), dtype=torch.float64)
        value[(..., *(torch.tensor(place) for place in entries))] = self.normal(len(entries[0]))
        return value


@dataclass(frozen=True, eq=False)
class Declared:
    """The arguments of a ConvexLayer; `outputs` holds variables and dual variables."""

    problem: cp.Problem
    parameters: list[cp.Parameter]
    outputs: list[cp.Variable]


@dataclass(frozen=True, eq=False)
class Case:
    name: str
    declare: Callable[[], Declared]
    sampler: Callable[[Draw], Sequence[Tensor]]
    gp: bool
    quadratic: bool  # the cone program has a quadratic objective
    scs: bool  # SCS can reach 1e-10 on it

    def layer(self, **options: Any) -> ConvexLayer:
        """On the generic path, unless `structure` says otherwise."""
        declared = self.declare()
        options = {"structure": "generic", **options}
        return ConvexLayer(
            declared.problem, declared.parameters, declared.outputs, gp=self.gp, **options
        )

    @functools.cached_property
    def shared(self) -> ConvexLayer:
        """The layer of the generic path with default options, built once."""
        return self.layer()

    def sample(self, batch: int | tuple[int, ...] = (), seed: int = 0) -> tuple[Tensor, ...]:
        lead = (batch,) if isinstance(batch, int) else tuple(batch)
        return tuple(self.sampler(Draw(lead, torch.Generator().manual_seed(seed))))

    def __repr__(self) -> str:
        return self.name


CASES: dict[str, Case] = {}


def case(
    sampler: Callable[[Draw], Sequence[Tensor]],
    *,
    gp: bool = False,
    quadratic: bool = False,
    scs: bool = True,
):
    """Register a declaration () -> (problem or (objective, constraints), parameters, outputs)."""

    def register(declare: Callable[[], tuple]) -> Callable[[], tuple]:
        def declared() -> Declared:
            problem, parameters, outputs = declare()
            return Declared(problem, list(parameters), list(outputs))

        CASES[declare.__name__] = Case(declare.__name__, declared, sampler, gp, quadratic, scs)
        return declare

    return register


def weights(outputs: Sequence[Tensor], batch: int = 0, seed: int = 99) -> list[Tensor]:
    """A random cotangent for each output; the same for every row if `batch` counts leading
    dimensions."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(output.shape[batch:], generator=generator, dtype=torch.float64)
        for output in outputs
    ]


def outputs_of(layer: ConvexLayer, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Variables, duals and the optimal value."""
    solution = layer.solve(*tensors)
    return [*solution.variables, solution.objective]


def leaves(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.detach().clone().requires_grad_() for tensor in tensors]


def relative(got: Tensor, expected: Tensor) -> float:
    """|got - expected| in units of |expected|."""
    return (
        float((got - expected).norm() / expected.norm().clamp_min(1e-300))
        if expected.numel()
        else 0.0
    )


def close(got: Tensor, expected: Tensor, tolerance: float) -> bool:
    """Equal to a tolerance relative to the larger of the expected norm and one."""
    return bool(((got - expected).norm() <= tolerance * expected.norm().clamp_min(1.0)).item())


def solved_right_or_flagged(solution: Solution, expected: Solution) -> None:
    """A row marked SOLVED is the reference's solution, and every other says that it did not get
    there."""
    for row, status in enumerate(solution.status.tolist()):
        if status == Status.SOLVED:
            for got, reference in zip(solution.variables, expected.variables, strict=True):
                assert close(got[row], reference[row], 1e-7)
        else:
            assert status in (Status.NOT_CONVERGED, Status.INACCURATE)


def set_values(declared: Declared, tensors: Sequence[Tensor]) -> None:
    for parameter, tensor in zip(declared.parameters, tensors, strict=True):
        value = tensor.detach().numpy()
        if parameter.sparse_idx is not None:
            parameter.value_sparse = _sparse(parameter, value)
        else:
            parameter.value = value


def _sparse(parameter: cp.Parameter, value: np.ndarray) -> Any:
    import scipy.sparse as sp

    return sp.coo_array(
        (value[tuple(parameter.sparse_idx)], parameter.sparse_idx), shape=value.shape
    )


# The zero cone
# ---------------------------------------------------------------------------------------------------------


@case(lambda d: (d.normal(2, 5), d.normal(2)), quadratic=True)
def least_norm():
    A, b, x = cp.Parameter((2, 5), name="A"), cp.Parameter(2, name="b"), cp.Variable(5, name="x")
    equal = A @ x == b
    return cp.Problem(cp.Minimize(cp.sum_squares(x)), [equal]), [A, b], [x, equal.dual_variables[0]]


@case(lambda d: (d.positive_definite(4), d.normal(4), d.normal(2, 4), d.normal(2)), quadratic=True)
def equality_qp():
    P, q = cp.Parameter((4, 4), PSD=True, name="P"), cp.Parameter(4, name="q")
    A, b, x = cp.Parameter((2, 4), name="A"), cp.Parameter(2, name="b"), cp.Variable(4, name="x")
    equal = A @ x == b
    problem = cp.Problem(cp.Minimize(cp.quad_form(x, P) / 2 + q @ x), [equal])
    return problem, [P, q, A, b], [x, equal.dual_variables[0]]


# No constraints
# ---------------------------------------------------------------------------------------------------------


@case(lambda d: (d.normal(6, 3), d.normal(6), d.uniform(0.5, 2.0)), quadratic=True)
def ridge():
    A, b = cp.Parameter((6, 3), name="A"), cp.Parameter(6, name="b")
    lam, x = cp.Parameter(nonneg=True, name="lam"), cp.Variable(3, name="x")
    return (
        cp.Problem(cp.Minimize(cp.sum_squares(A @ x - b) + lam * cp.sum_squares(x))),
        [A, b, lam],
        [x],
    )


@case(lambda d: (d.positive_definite(3), d.normal(3)), quadratic=True)
def free_quadratic():
    """No constraint even after canonicalisation: m = 0."""
    P, q, x = (
        cp.Parameter((3, 3), PSD=True, name="P"),
        cp.Parameter(3, name="q"),
        cp.Variable(3, name="x"),
    )
    return cp.Problem(cp.Minimize(cp.quad_form(x, P) + q @ x)), [P, q], [x]


# The nonnegative cone
# ---------------------------------------------------------------------------------------------------


@case(lambda d: (d.normal(3), d.normal(4, 3), d.uniform(0.5, 1.5, 4)))
def linear_program():
    """Inequalities only, at a vertex."""
    c, G, h = cp.Parameter(3, name="c"), cp.Parameter((4, 3), name="G"), cp.Parameter(4, name="h")
    x = cp.Variable(3, name="x")
    below = G @ x <= h
    problem = cp.Problem(cp.Minimize(c @ x), [below, x <= 2, x >= -3])
    return problem, [c, G, h], [x, below.dual_variables[0]]


@case(
    lambda d: (
        d.uniform(0.0, 1.0, 3, 4),
        torch.softmax(d.normal(3), -1),
        torch.softmax(d.normal(4), -1),
    ),
    quadratic=True,
)
def transport():
    """A nonnegative matrix variable, and one marginal left to a penalty, so that the equalities are
    independent."""
    C, a, b = cp.Parameter((3, 4), name="C"), cp.Parameter(3, name="a"), cp.Parameter(4, name="b")
    T = cp.Variable((3, 4), nonneg=True, name="T")
    rows = cp.sum(T, axis=1) == a
    cost = (
        cp.sum(cp.multiply(C, T)) + 0.5 * cp.sum_squares(T) + cp.sum_squares(cp.sum(T, axis=0) - b)
    )
    return cp.Problem(cp.Minimize(cost), [rows]), [C, a, b], [T, rows.dual_variables[0]]


@case(
    lambda d: (
        d.positive_definite(4),
        8 * d.normal(4),
        d.normal(5, 4),
        d.uniform(0.1, 1.0, 5),
        d.normal(1, 4),
    ),
    quadratic=True,
)
def quadratic_program():
    P, q = cp.Parameter((4, 4), PSD=True, name="P"), cp.Parameter(4, name="q")
    G, h = cp.Parameter((5, 4), name="G"), cp.Parameter(5, name="h")
    A, x = cp.Parameter((1, 4), name="A"), cp.Variable(4, name="x")
    below, equal = G @ x <= h, A @ x == 0
    problem = cp.Problem(cp.Minimize(0.5 * cp.quad_form(x, P) + q @ x), [below, equal])
    return problem, [P, q, G, h, A], [x, below.dual_variables[0], equal.dual_variables[0]]


@case(lambda d: (-d.positive_definite(3), d.normal(3), d.uniform(0.1, 0.5)), quadratic=True)
def concave_quadratic():
    """Maximize, with an NSD parameter."""
    P, q, t = (
        cp.Parameter((3, 3), NSD=True, name="P"),
        cp.Parameter(3, name="q"),
        cp.Parameter(name="t"),
    )
    x = cp.Variable(3, name="x")
    above = x >= t
    return (
        cp.Problem(cp.Maximize(cp.quad_form(x, P) + q @ x), [above]),
        [P, q, t],
        [x, above.dual_variables[0]],
    )


@case(lambda d: (d.normal(5, 3), d.normal(5)), quadratic=True)
def nonnegative_least_squares():
    A, b, x = (
        cp.Parameter((5, 3), name="A"),
        cp.Parameter(5, name="b"),
        cp.Variable(3, nonneg=True, name="x"),
    )
    return cp.Problem(cp.Minimize(cp.sum_squares(A @ x - b))), [A, b], [x]


@case(lambda d: (d.normal(6, 4), d.normal(6), d.uniform(0.5, 1.5)), quadratic=True)
def lasso():
    A, b = cp.Parameter((6, 4), name="A"), cp.Parameter(6, name="b")
    lam, x = cp.Parameter(nonneg=True, name="lam"), cp.Variable(4, name="x")
    return (
        cp.Problem(cp.Minimize(0.5 * cp.sum_squares(A @ x - b) + lam * cp.norm1(x))),
        [A, b, lam],
        [x],
    )


@case(lambda d: (2 * d.normal(6), d.uniform(0.3, 0.8)), quadratic=True)
def total_variation():
    y, lam, x = (
        cp.Parameter(6, name="y"),
        cp.Parameter(pos=True, name="lam"),
        cp.Variable(6, name="x"),
    )
    return cp.Problem(cp.Minimize(0.5 * cp.sum_squares(x - y) + lam * cp.tv(x))), [y, lam], [x]


@case(lambda d: (2 * d.normal(5, 3), 2 * d.normal(5)))
def chebyshev():
    """norm_inf: a linear program in disguise."""
    A, b, x = cp.Parameter((5, 3), name="A"), cp.Parameter(5, name="b"), cp.Variable(3, name="x")
    return cp.Problem(cp.Minimize(cp.norm_inf(A @ x - b))), [A, b], [x]


@case(lambda d: (d.normal(8, 3), 2 * d.normal(8), d.uniform(0.4, 0.9)), quadratic=True)
def huber():
    A, b, x = cp.Parameter((8, 3), name="A"), cp.Parameter(8, name="b"), cp.Variable(3, name="x")
    lam = cp.Parameter(nonneg=True, name="lam")
    return (
        cp.Problem(cp.Minimize(cp.sum(cp.huber(A @ x - b, 1.0)) + lam * cp.sum_squares(x))),
        [A, b, lam],
        [x],
    )


@case(lambda d: (2 * d.normal(4), d.uniform(-2.0, -0.1, 3), d.normal(1)), quadratic=True)
def bounded():
    """Bounds, signs and a scalar, all as attributes; several variables."""
    a, b, c = (
        cp.Parameter(4, name="a"),
        cp.Parameter(3, nonpos=True, name="b"),
        cp.Parameter(1, name="c"),
    )
    x, y = cp.Variable(4, bounds=[-1, 1], name="x"), cp.Variable(3, nonpos=True, name="y")
    z = cp.Variable(name="z")
    objective = (
        cp.sum_squares(x - a) + cp.sum_squares(y - b + z) + cp.square(z - c[0]) + cp.sum(x) * 0.3
    )
    return cp.Problem(cp.Minimize(objective)), [a, b, c], [x, y, z]


# Second-order cones
# -----------------------------------------------------------------------------------------------------


@case(lambda d: (d.normal(4), d.normal(3, 4), d.normal(3), d.uniform(1.0, 2.0)))
def raw_second_order():
    """cp.SOC with both of its dual variables."""
    c, A, b, r = (
        cp.Parameter(4, name="c"),
        cp.Parameter((3, 4), name="A"),
        cp.Parameter(3, name="b"),
        cp.Parameter(pos=True, name="r"),
    )
    x = cp.Variable(4, name="x")
    cone, ball = cp.SOC(r, A @ x - b), cp.SOC(cp.Constant(3.0), x)
    return (
        cp.Problem(cp.Minimize(c @ x), [cone, ball]),
        [c, A, b, r],
        [x, *cone.dual_variables, *ball.dual_variables],
    )


@case(lambda d: (d.normal(3), d.normal(5, 3), d.uniform(0.5, 2.0)))
def norm_ball():
    c, A, r, x = (
        cp.Parameter(3, name="c"),
        cp.Parameter((5, 3), name="A"),
        cp.Parameter(nonneg=True, name="r"),
        cp.Variable(3, name="x"),
    )
    ball = cp.norm(A @ x) <= r
    return cp.Problem(cp.Minimize(c @ x), [ball]), [c, A, r], [x, ball.dual_variables[0]]


@case(lambda d: (2 * d.normal(6), d.uniform(0.7, 1.2)), quadratic=True)
def group_lasso():
    """One block is zero at the solution, an apex, and others are not."""
    y, lam, x = (
        cp.Parameter(6, name="y"),
        cp.Parameter(nonneg=True, name="lam"),
        cp.Variable(6, name="x"),
    )
    groups = cp.norm(x[:2]) + cp.norm(x[2:4]) + 6 * cp.norm(x[4:])
    return cp.Problem(cp.Minimize(0.5 * cp.sum_squares(x - y) + lam * groups)), [y, lam], [x]


@case(lambda d: (2 * d.normal(4, 2), d.normal(2)))
def fermat_weber():
    """A sum of norms: many cones of one size."""
    points, c, x = (
        cp.Parameter((4, 2), name="points"),
        cp.Parameter(2, name="c"),
        cp.Variable(2, name="x"),
    )
    return (
        cp.Problem(cp.Minimize(sum(cp.norm(x - points[i]) for i in range(4)) + 0.3 * c @ x)),
        [points, c],
        [x],
    )


@case(lambda d: (d.normal(3), d.normal(3, 3), d.uniform(1.0, 2.0)))
def quadratic_over_linear():
    c, A, t = (
        cp.Parameter(3, name="c"),
        cp.Parameter((3, 3), name="A"),
        cp.Parameter(pos=True, name="t"),
    )
    x, z = cp.Variable(3, name="x"), cp.Variable(name="z")
    problem = cp.Problem(
        cp.Minimize(c @ x + cp.quad_over_lin(x, z) + t * z), [cp.norm(A @ x - 3) <= 4, z <= 5]
    )
    return problem, [c, A, t], [x, z]


@case(lambda d: (d.normal(4, 3), d.normal(4), d.normal(3)), quadratic=True)
def quadratic_constraint():
    A, b, a, x = (
        cp.Parameter((4, 3), name="A"),
        cp.Parameter(4, name="b"),
        cp.Parameter(3, name="a"),
        cp.Variable(3, name="x"),
    )
    inside = cp.sum_squares(x - a) <= 0.3
    return (
        cp.Problem(cp.Minimize(cp.sum_squares(A @ x - b)), [inside]),
        [A, b, a],
        [x, inside.dual_variables[0]],
    )


# Positive semidefinite cones
# --------------------------------------------------------------------------------------------


@case(lambda d: (d.symmetric(3),), quadratic=True)
def spectraplex():
    """Variable(PSD=True) and a symmetric parameter."""
    C, X = cp.Parameter((3, 3), symmetric=True, name="C"), cp.Variable((3, 3), PSD=True, name="X")
    unit = cp.trace(X) == 1
    return cp.Problem(cp.Minimize(cp.sum_squares(X - C)), [unit]), [C], [X, unit.dual_variables[0]]


@case(lambda d: (d.symmetric(4),))
def leading_eigenvector():
    """A linear objective: the solution has rank one."""
    C, X = cp.Parameter((4, 4), symmetric=True, name="C"), cp.Variable((4, 4), PSD=True, name="X")
    return cp.Problem(cp.Maximize(cp.trace(C @ X)), [cp.trace(X) == 1]), [C], [X]


@case(lambda d: (d.symmetric(3), d.symmetric(3), d.positive_definite(3), d.normal(2)))
def matrix_inequality():
    F, G, H, c = (
        *(cp.Parameter((3, 3), symmetric=True, name=name) for name in "FGH"),
        cp.Parameter(2, name="c"),
    )
    x = cp.Variable(2, name="x")
    above = H + x[0] * F + x[1] * G >> 0
    problem = cp.Problem(cp.Minimize(c @ x), [above, cp.norm(x) <= 2])
    return problem, [F, G, H, c], [x, above.dual_variables[0]]


@case(lambda d: (torch.eye(3, dtype=torch.float64) + 2 * d.symmetric(3),), quadratic=True)
def nearest_correlation():
    """A symmetric variable with >>, and the dual matrix."""
    C, X = (
        cp.Parameter((3, 3), symmetric=True, name="C"),
        cp.Variable((3, 3), symmetric=True, name="X"),
    )
    above, unit = X >> 0.05 * np.eye(3), cp.diag(X) == 1
    problem = cp.Problem(cp.Minimize(cp.sum_squares(X - C)), [above, unit])
    return problem, [C], [X, above.dual_variables[0], unit.dual_variables[0]]


@case(lambda d: (d.normal(2, 3), d.uniform(0.4, 0.8)), quadratic=True)
def nuclear_norm():
    Y, lam = cp.Parameter((2, 3), name="Y"), cp.Parameter(nonneg=True, name="lam")
    X = cp.Variable((2, 3), name="X")
    return cp.Problem(cp.Minimize(0.5 * cp.sum_squares(X - Y) + lam * cp.normNuc(X))), [Y, lam], [X]


@case(lambda d: (d.symmetric(3), d.normal(3)), quadratic=True)
def largest_eigenvalue():
    C, a, x = (
        cp.Parameter((3, 3), symmetric=True, name="C"),
        cp.Parameter(3, name="a"),
        cp.Variable(3, name="x"),
    )
    problem = cp.Problem(cp.Minimize(cp.lambda_max(C + cp.diag(x)) + cp.sum_squares(x - a)))
    return problem, [C, a], [x]


@case(lambda d: (d.uniform(-0.5, 0.5), 2 * d.normal(2, 2)), quadratic=True)
def small_psd():
    """Cones of orders one and two, and an asymmetric matrix inside >>, of which CVXPY sees the
    symmetric part."""
    a, B, x = (
        cp.Parameter(name="a"),
        cp.Parameter((2, 2), name="B"),
        cp.Variable((2, 2), symmetric=True, name="X"),
    )
    t = cp.Variable((1, 1), PSD=True, name="t")
    problem = cp.Problem(
        cp.Minimize(cp.square(t[0, 0] - a) + cp.sum_squares(x - B)), [x << t[0, 0] * np.eye(2)]
    )
    return problem, [a, B], [x, t]


# Exponential cones
# ------------------------------------------------------------------------------------------------------


@case(lambda d: (d.normal(4), d.normal(1, 4)))
def entropy():
    c, A, x = cp.Parameter(4, name="c"), cp.Parameter((1, 4), name="A"), cp.Variable(4, name="x")
    equal, other = cp.sum(x) == 1, A @ x <= cp.sum(A) / 4 + 0.1
    return (
        cp.Problem(cp.Maximize(cp.sum(cp.entr(x)) + c @ x), [equal, other]),
        [c, A],
        [x, equal.dual_variables[0]],
    )


@case(lambda d: (torch.softmax(d.normal(4), -1), d.normal(4)))
def relative_entropy():
    p, c, x = (
        cp.Parameter(4, pos=True, name="p"),
        cp.Parameter(4, name="c"),
        cp.Variable(4, name="x"),
    )
    equal = cp.sum(x) == 1
    return (
        cp.Problem(cp.Minimize(cp.sum(cp.kl_div(x, p)) + c @ x), [equal]),
        [p, c],
        [x, equal.dual_variables[0]],
    )


@case(lambda d: (d.normal(4, 3), d.normal(4)), quadratic=True)
def log_sum_exp():
    A, b, x = cp.Parameter((4, 3), name="A"), cp.Parameter(4, name="b"), cp.Variable(3, name="x")
    return cp.Problem(cp.Minimize(cp.log_sum_exp(A @ x + b) + 0.5 * cp.sum_squares(x))), [A, b], [x]


@case(lambda d: (d.normal(6, 2), d.uniform(0.2, 1.0)), quadratic=True)
def logistic_regression():
    X, lam, w = (
        cp.Parameter((6, 2), name="X"),
        cp.Parameter(pos=True, name="lam"),
        cp.Variable(2, name="w"),
    )
    return (
        cp.Problem(cp.Minimize(cp.sum(cp.logistic(X @ w)) + lam * cp.sum_squares(w))),
        [X, lam],
        [w],
    )


@case(lambda d: (d.positive_definite(3), d.uniform(0.1, 0.4)))
def sparse_inverse_covariance():
    """log_det: exponential and psd cones at once, and |X|_1."""
    S, lam = cp.Parameter((3, 3), PSD=True, name="S"), cp.Parameter(nonneg=True, name="lam")
    X = cp.Variable((3, 3), PSD=True, name="X")
    return (
        cp.Problem(cp.Minimize(cp.trace(S @ X) - cp.log_det(X) + lam * cp.sum(cp.abs(X)))),
        [S, lam],
        [X],
    )


@case(lambda d: (d.normal(2), d.uniform(1.0, 2.0, 2)))
def raw_exponential():
    """cp.ExpCone with its three dual variables."""
    a, c, x, z = (
        cp.Parameter(2, name="a"),
        cp.Parameter(2, pos=True, name="c"),
        cp.Variable(2, name="x"),
        cp.Variable(2, name="z"),
    )
    cone = cp.constraints.ExpCone(x + a, np.array([1.0, 2.0]), z)
    problem = cp.Problem(cp.Minimize(c @ z - cp.sum(x)), [cone])
    return problem, [a, c], [x, z, *cone.dual_variables]


# Power cones
# ------------------------------------------------------------------------------------------------------------


@case(lambda d: (d.uniform(0.5, 2.0, 2), d.uniform(0.5, 1.5, 2)))
def raw_power():
    """cp.PowCone3D with its three dual variables; an exponent for each row."""
    c, r, x, y, z = (
        cp.Parameter(2, pos=True, name="c"),
        cp.Parameter(2, name="r"),
        *(cp.Variable(2, name=name) for name in "xyz"),
    )
    cone = cp.constraints.PowCone3D(x, y + 0.1, z, np.array([0.3, 0.6]))
    problem = cp.Problem(cp.Minimize(cp.sum(x) + c @ y), [cone, z >= r])
    return problem, [c, r], [x, y, z, *cone.dual_variables]


@case(lambda d: (d.normal(2, 4), d.normal(2), d.normal(4)), scs=False)
def p_norm():
    A, b, a, x = (
        cp.Parameter((2, 4), name="A"),
        cp.Parameter(2, name="b"),
        cp.Parameter(4, name="a"),
        cp.Variable(4, name="x"),
    )
    equal = A @ x == b
    problem = cp.Problem(cp.Minimize(cp.pnorm(x - a, 3, approx=False)), [equal])
    return problem, [A, b, a], [x, equal.dual_variables[0]]


@case(lambda d: (d.uniform(0.5, 2.0, 3),), quadratic=True)
def geometric_mean():
    c, x = cp.Parameter(3, pos=True, name="c"), cp.Variable(3, name="x")
    budget = c @ x <= 3
    problem = cp.Problem(
        cp.Maximize(cp.geo_mean(x, approx=False) - 0.1 * cp.sum_squares(x)), [budget]
    )
    return problem, [c], [x, budget.dual_variables[0]]


@case(lambda d: (d.uniform(0.5, 2.0, 3), d.uniform(1.0, 2.0)))
def weighted_geometric_mean():
    c, r, x = (
        cp.Parameter(3, pos=True, name="c"),
        cp.Parameter(pos=True, name="r"),
        cp.Variable(3, name="x"),
    )
    floor = cp.geo_mean(x, [1, 2, 3]) >= r
    return cp.Problem(cp.Minimize(c @ x), [floor]), [c, r], [x, floor.dual_variables[0]]


@case(lambda d: (d.normal(3), d.uniform(0.5, 2.0, 3)), quadratic=True)
def fractional_powers():
    a, w, x = (
        cp.Parameter(3, name="a"),
        cp.Parameter(3, pos=True, name="w"),
        cp.Variable(3, name="x"),
    )
    objective = w @ cp.power(x, 1.5, approx=False) + cp.sum_squares(x - a - 3)
    return cp.Problem(cp.Minimize(objective)), [a, w], [x]


# Log-log convex programs
# ------------------------------------------------------------------------------------------------


@case(lambda d: (d.uniform(1.0, 2.0), d.uniform(0.5, 1.0), d.uniform(1.5, 2.5)), gp=True)
def box_volume():
    a, b, c = (cp.Parameter(pos=True, name=name) for name in "abc")
    h, w, depth = (cp.Variable(pos=True, name=name) for name in ("h", "w", "depth"))
    problem = cp.Problem(
        cp.Maximize(h * w * depth),
        [2 * (h * w + h * depth) <= 10 * a, w * depth <= c, h / w <= 2, b * w <= depth],
    )
    return problem, [a, b, c], [h, w, depth]


@case(lambda d: (d.uniform(0.5, 2.0, 2), d.uniform(0.5, 2.0), d.uniform(0.3, 1.2)), gp=True)
def posynomial():
    """A parameter as an exponent, and a posynomial objective."""
    k, a, p, x = (
        cp.Parameter(2, pos=True, name="k"),
        cp.Parameter(pos=True, name="a"),
        cp.Parameter(name="p"),
        cp.Variable(2, pos=True, name="x"),
    )
    problem = cp.Problem(
        cp.Minimize(k[0] * x[0] + k[1] * x[1] + a / (x[0] * x[1])), [x[0] ** p <= 0.5 * x[1]]
    )
    return problem, [k, a, p], [x]


# Shapes and attributes
# --------------------------------------------------------------------------------------------------


@case(lambda d: (d.normal(3, 2), d.normal(2, 2), d.normal(3, 2)), quadratic=True)
def matrix_shapes():
    A, B, C = (
        cp.Parameter((3, 2), name="A"),
        cp.Parameter((2, 2), name="B"),
        cp.Parameter((3, 2), name="C"),
    )
    X = cp.Variable((3, 2), name="X")
    below = X @ B <= 0.5
    objective = cp.sum_squares(X - A) + cp.sum(cp.multiply(C, X))
    return cp.Problem(cp.Minimize(objective), [below]), [A, B, C], [X, below.dual_variables[0]]


@case(lambda d: (torch.diag_embed(d.normal(3)), d.normal(3, 3)), quadratic=True)
def diagonal():
    D, B = cp.Parameter((3, 3), diag=True, name="D"), cp.Parameter((3, 3), name="B")
    X = cp.Variable((3, 3), diag=True, name="X")
    problem = cp.Problem(
        cp.Minimize(cp.sum_squares(X - D) + cp.sum_squares(B @ X)), [cp.trace(X) <= 0.1]
    )
    return problem, [D, B], [X]


PLACES = ((0, 0, 1, 2), (0, 2, 1, 0))


@case(lambda d: (d.pattern(PLACES, 3, 3), d.normal(3, 3)), quadratic=True)
def sparse():
    S, B = cp.Parameter((3, 3), sparsity=PLACES, name="S"), cp.Parameter((3, 3), name="B")
    X = cp.Variable((3, 3), sparsity=PLACES, name="X")
    return cp.Problem(cp.Minimize(cp.sum_squares(X - S - B)), [cp.sum(X) == 1]), [S, B], [X]


@case(lambda d: (d.normal(2, 3, 2), d.normal(2)), quadratic=True)
def three_dimensional():
    A, c, X = (
        cp.Parameter((2, 3, 2), name="A"),
        cp.Parameter(2, name="c"),
        cp.Variable((2, 3, 2), name="X"),
    )
    equal = cp.sum(X, axis=1) == np.array([[1.0, 2.0], [3.0, 4.0]])
    problem = cp.Problem(
        cp.Minimize(
            cp.sum_squares(X - A)
            + cp.sum(cp.multiply(X[:, 0, :], A[:, 1, :] * 0.5))
            + c @ X[0, 1, :]
        ),
        [equal, X >= 0],
    )
    return problem, [A, c], [X, equal.dual_variables[0]]


@case(lambda d: (d.normal(3), d.normal(2, 3), d.normal(2)), quadratic=True)
def unmentioned_variable():
    """z stands in no term of the objective, and the constraints fix it."""
    a, B, c, x, z = (
        cp.Parameter(3, name="a"),
        cp.Parameter((2, 3), name="B"),
        cp.Parameter(2, name="c"),
        cp.Variable(3, name="x"),
        cp.Variable(2, name="z"),
    )
    tie = z == B @ x + c
    return (
        cp.Problem(cp.Minimize(cp.sum_squares(x - a)), [tie, x[0] >= a[1] + 0.2]),
        [a, B, c],
        [z, x],
    )


@case(lambda d: (d.normal(),), quadratic=True)
def scalars():
    a, x = cp.Parameter(name="a"), cp.Variable(name="x")
    above = x >= 0.3
    return (
        cp.Problem(cp.Minimize(cp.square(x - a) + 0.4 * x), [above]),
        [a],
        [x, above.dual_variables[0]],
    )


# All cones at once
# ------------------------------------------------------------------------------------------------------


@case(lambda d: (d.normal(4), d.normal(3, 4), d.symmetric(2), d.uniform(0.3, 0.6)), quadratic=True)
def every_cone():
    a, B, C, r = (
        cp.Parameter(4, name="a"),
        cp.Parameter((3, 4), name="B"),
        cp.Parameter((2, 2), symmetric=True, name="C"),
        cp.Parameter(pos=True, name="r"),
    )
    x, X = cp.Variable(4, name="x"), cp.Variable((2, 2), PSD=True, name="X")
    equal, below, ball = cp.sum(x) == 1, B[:1] @ x <= 0.1, cp.norm(B @ x) <= r + X[0, 0]
    objective = (
        0.5 * cp.sum_squares(x - a)
        + cp.log_sum_exp(B @ x)
        + cp.sum_squares(X - C)
        + cp.trace(X)
        + cp.pnorm(x, 3, approx=False)
        + 0.2 * x[0] * 1.0
    )
    problem = cp.Problem(cp.Minimize(objective), [equal, below, ball])
    return problem, [a, B, C, r], [x, X, equal.dual_variables[0], below.dual_variables[0]]


@case(lambda d: (d.normal(3, 2), d.normal(2), d.positive_definite(2)), quadratic=False)
def many_cones_linear():
    """Zero, nonnegative, second-order, psd and exponential cones under a linear objective."""
    A, c, S = (
        cp.Parameter((3, 2), name="A"),
        cp.Parameter(2, name="c"),
        cp.Parameter((2, 2), PSD=True, name="S"),
    )
    x, X = cp.Variable(2, name="x"), cp.Variable((2, 2), PSD=True, name="X")
    tie = X[0, 1] == 0.3 * x[0]
    problem = cp.Problem(
        cp.Minimize(
            c @ x + cp.trace(S @ X) - cp.log(X[0, 0]) - cp.log(X[1, 1]) + cp.norm(A @ x - 1)
        ),
        [tie, cp.norm1(x) <= 2],
    )
    return problem, [A, c, S], [x, X, tie.dual_variables[0]]


def names(predicate: Callable[[Case], bool] = lambda _: True) -> list[str]:
    return [name for name, member in CASES.items() if predicate(member)]

"""The drop-in: the incumbent's examples, refusals and options, on our class and, where it is
installed, on theirs."""

from __future__ import annotations

import copy
import pickle
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import cvxpy as cp
import diffcp
import pytest
import torch

import convlayer
from convlayer import compat
from convlayer.solvers import SOLVERS, Iterate, Solver, Task
from convlayer.solvers.clarabel import Clarabel

ACCURATE = {"eps": 1e-10, "max_iters": 100_000, "acceleration_lookback": 0}


@pytest.fixture(params=["convlayer", "cvxpylayers"])
def layer_class(request):
    """Every test that takes it asserts our side; the run on theirs shows that the same code and
    claims hold there."""
    if request.param == "convlayer":
        return compat.CvxpyLayer
    return pytest.importorskip(
        "cvxpylayers.torch", reason="the incumbent is not installed"
    ).CvxpyLayer


@pytest.fixture(autouse=True)
def quiet():
    """An option without effect is reported by a warning, which only the tests of warnings look
    at."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="CvxpyLayer: ")
        yield


def ours(layer_class) -> bool:
    return layer_class is compat.CvxpyLayer


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# The incumbent's example problems, each (problem, parameters, variables, values).


@dataclass
class Example:
    problem: cp.Problem
    parameters: list
    variables: list
    values: list
    gp: bool = False


def minimise(objective, constraints, parameters, variables, values, gp=False) -> Example:
    return Example(
        cp.Problem(cp.Minimize(objective), constraints), parameters, variables, values, gp
    )


def readme() -> Example:
    x, A, b = cp.Variable(2), cp.Parameter((3, 2)), cp.Parameter(3)
    return minimise(
        0.5 * cp.pnorm(A @ x - b, p=1),
        [x >= 0],
        [A, b],
        [x],
        [normal(3, 2, seed=7), normal(3, seed=8)],
    )


def constrained_least_squares() -> Example:
    x, A, b = cp.Variable(5), cp.Parameter((8, 5)), cp.Parameter(8)
    return minimise(
        cp.sum_squares(A @ x - b), [x >= 0], [A, b], [x], [normal(8, 5), normal(8, seed=1)]
    )


def relu() -> Example:
    x, y = cp.Parameter(4), cp.Variable(4)
    return minimise(cp.sum_squares(y - x), [y >= 0], [x], [y], [normal(4)])


def sigmoid() -> Example:
    x, y = cp.Parameter(4), cp.Variable(4)
    return minimise(-x @ y - cp.sum(cp.entr(y) + cp.entr(1 - y)), [], [x], [y], [normal(4)])


def softmax() -> Example:
    x, y = cp.Parameter(4), cp.Variable(4)
    return minimise(-x @ y - cp.sum(cp.entr(y)), [cp.sum(y) == 1], [x], [y], [normal(4)])


def constrained_softmax() -> Example:
    x, u, y = cp.Parameter(4), cp.Parameter(4), cp.Variable(4)
    values = [normal(4), torch.full((4,), 0.4, dtype=torch.float64)]
    return minimise(-x @ y - cp.sum(cp.entr(y)), [cp.sum(y) == 1, y <= u], [x, u], [y], values)


def sparsemax() -> Example:
    x, y = cp.Parameter(4), cp.Variable(4)
    return minimise(
        cp.sum_squares(x - y), [cp.sum(y) == 1, y >= 0, y <= 1], [x], [y], [normal(4) / 2]
    )


def constrained_sparsemax() -> Example:
    x, u, y = cp.Parameter(4), cp.Parameter(4), cp.Variable(4)
    values = [normal(4), torch.full((4,), 0.45, dtype=torch.float64)]
    return minimise(cp.sum_squares(x - y), [cp.sum(y) == 1, y >= 0, y <= u], [x, u], [y], values)


def limited_multilabel() -> Example:
    x, y = cp.Parameter(5), cp.Variable(5)
    return minimise(
        -x @ y - cp.sum(cp.entr(y)) - cp.sum(cp.entr(1 - y)),
        [cp.sum(y) == 2],
        [x],
        [y],
        [normal(5)],
    )


def optnet() -> Example:
    root, p, A, b = cp.Parameter((4, 4)), cp.Parameter(4), cp.Parameter((1, 4)), cp.Parameter(1)
    G, h, z = cp.Parameter((3, 4)), cp.Parameter(3), cp.Variable(4)
    values = [
        normal(4, 4),
        normal(4, seed=1),
        normal(1, 4, seed=2),
        normal(1, seed=3),
        normal(3, 4, seed=4),
    ]
    values.append(normal(3, seed=5).abs())
    objective = 0.5 * cp.sum_squares(root @ z) + p @ z
    return minimise(objective, [A @ z == b, G @ z <= h], [root, p, A, b, G, h], [z], values)


def ellipsoid_projection() -> Example:
    x, A, c, y = cp.Parameter(3), cp.Parameter((3, 3)), cp.Parameter(3), cp.Variable(3)
    values = [
        3 * normal(3),
        torch.eye(3, dtype=torch.float64) + 0.3 * normal(3, 3, seed=1),
        0.1 * normal(3, seed=2),
    ]
    return minimise(0.5 * cp.sum_squares(x - y), [cp.norm(A @ y - c) <= 1], [x, A, c], [y], values)


def semidefinite() -> Example:
    X, C = cp.Variable((3, 3), symmetric=True), cp.Parameter((3, 3))
    A, b = [cp.Parameter((3, 3)) for _ in range(2)], [cp.Parameter() for _ in range(2)]
    constraints = [X >> 0, *(cp.trace(F @ X) == g for F, g in zip(A, b, strict=True))]
    roots = [normal(3, 3, seed=k) for k in range(3)]
    matrices = [torch.eye(3, dtype=torch.float64), roots[1] @ roots[1].T]
    cost, traces = roots[0] + roots[0].T, [torch.tensor(3.0).double(), matrices[1].trace()]
    return minimise(cp.trace(C @ X), constraints, [C, *A, *b], [X], [cost, *matrices, *traces])


def geometric() -> Example:
    x, y, z = (cp.Variable(pos=True) for _ in range(3))
    a, b, c = cp.Parameter(pos=True), cp.Parameter(pos=True), cp.Parameter()
    values = [torch.tensor(v, dtype=torch.float64) for v in (2.0, 1.0, 0.5)]
    constraints = [a * (x * y + x * z + y * z) <= b, x >= y**c]
    return minimise(1 / (x * y * z), constraints, [a, b, c], [x, y, z], values, gp=True)


def control_policy() -> Example:
    """Approximate dynamic programming: an input in a ball, and a parametrised cost of the next
    state."""
    state, root, u, following = (
        cp.Parameter(3),
        cp.Parameter((3, 3)),
        cp.Variable(2),
        cp.Variable(3),
    )
    A, B = normal(3, 3, seed=1).numpy(), normal(3, 2, seed=2).numpy()
    objective = cp.sum_squares(u) + cp.sum_squares(root @ following)
    constraints = [following == A @ state + B @ u, cp.norm(u) <= 0.5]
    return minimise(objective, constraints, [state, root], [u], [normal(3), normal(3, 3, seed=3)])


def linear_quadratic_regulator() -> Example:
    start, x, u = cp.Parameter(2), cp.Variable((4, 2)), cp.Variable((3, 1))
    A, B = (
        torch.tensor([[1.0, 0.2], [0.0, 1.0]]).double().numpy(),
        torch.tensor([[0.0], [0.2]]).double().numpy(),
    )
    constraints = [
        x[0] == start,
        cp.abs(u) <= 1,
        *(x[k + 1] == A @ x[k] + B @ u[k] for k in range(3)),
    ]
    return minimise(
        cp.sum_squares(x) + 0.1 * cp.sum_squares(u), constraints, [start], [u, x], [normal(2) + 2]
    )


def portfolio() -> Example:
    w, mu, root = cp.Variable(5), cp.Parameter(5), cp.Parameter((5, 5))
    values = [0.3 * normal(5), 0.5 * torch.eye(5, dtype=torch.float64) + 0.2 * normal(5, 5, seed=1)]
    return minimise(
        cp.sum_squares(root @ w) - mu @ w, [cp.sum(w) == 1, w >= 0], [mu, root], [w], values
    )


def logistic_regression() -> Example:
    X, beta = cp.Parameter((8, 2)), cp.Variable(2)
    labels = torch.sign(normal(8, seed=4)).numpy()
    loss = cp.sum(cp.logistic(cp.multiply(-labels, X @ beta))) / 8
    return minimise(loss + 0.1 * cp.sum_squares(beta), [], [X], [beta], [normal(8, 2, seed=5)])


EXAMPLES = [
    readme,
    constrained_least_squares,
    relu,
    sigmoid,
    softmax,
    constrained_softmax,
    sparsemax,
    constrained_sparsemax,
    limited_multilabel,
    optnet,
    ellipsoid_projection,
    semidefinite,
    geometric,
    control_policy,
    linear_quadratic_regulator,
    portfolio,
    logistic_regression,
]


@pytest.mark.parametrize("build", EXAMPLES, ids=[build.__name__ for build in EXAMPLES])
def test_an_example_of_the_incumbents_gives_cvxpys_solution_and_the_gradient_of_finite_differences(
    layer_class, build
):
    example = build()
    layer = layer_class(
        example.problem, parameters=example.parameters, variables=example.variables, gp=example.gp
    )
    values = [value.requires_grad_() for value in example.values]
    outputs = layer(*values, solver_args=ACCURATE)
    weights = [normal(*output.shape, seed=10 + k) for k, output in enumerate(outputs)]

    def loss(*tensors):
        solved = layer(*tensors, solver_args=ACCURATE)
        return float(sum((w * x).sum() for w, x in zip(weights, solved, strict=True)))

    gradients = torch.autograd.grad(
        sum((w * x).sum() for w, x in zip(weights, outputs, strict=True)), values
    )
    directions = [normal(*value.shape, seed=20 + k) for k, value in enumerate(values)]
    if build is semidefinite:
        directions = [d + d.T if d.ndim == 2 else d for d in directions]
    slope = float(sum((g * d).sum() for g, d in zip(gradients, directions, strict=True)))
    step = 1e-5
    with torch.no_grad():
        ahead = loss(*(v + step * d for v, d in zip(values, directions, strict=True)))
        behind = loss(*(v - step * d for v, d in zip(values, directions, strict=True)))
    assert abs(slope) > 1e-2
    assert slope == pytest.approx(
        (ahead - behind) / (2 * step), rel=1e-5 if ours(layer_class) else 1e-2
    )

    for parameter, value in zip(example.parameters, values, strict=True):
        parameter.value = value.detach().numpy()
    example.problem.solve(solver="CLARABEL", gp=example.gp)
    for output, variable in zip(outputs, example.variables, strict=True):
        expected = torch.as_tensor(variable.value)
        assert tuple(output.shape) == tuple(variable.shape)
        assert float((output.detach() - expected).norm()) <= 1e-4 * (1 + float(expected.norm()))


def test_a_batch_equals_a_loop_and_a_shared_parameters_gradient_is_the_sum(layer_class):
    example = constrained_least_squares()
    layer = layer_class(example.problem, example.parameters, example.variables)
    A, b = normal(8, 5).requires_grad_(), normal(3, 8, seed=1).requires_grad_()
    (batch,) = layer(A, b, solver_args=ACCURATE)
    rows = [layer(A, row, solver_args=ACCURATE)[0] for row in b]
    assert tuple(batch.shape) == (3, 5)
    torch.testing.assert_close(batch, torch.stack(rows), rtol=0, atol=1e-6)
    weights = normal(3, 5, seed=2)
    together = torch.autograd.grad((weights * batch).sum(), [A, b])
    alone = torch.autograd.grad(
        sum((w * row).sum() for w, row in zip(weights, rows, strict=True)), [A, b]
    )
    for ours_, theirs in zip(together, alone, strict=True):
        torch.testing.assert_close(ours_, theirs, rtol=1e-4, atol=1e-5)


def test_dual_variables_are_returned_and_differentiated(layer_class):
    x, c, b = cp.Variable(2), cp.Parameter(2), cp.Parameter()
    total, sign = cp.sum(x) == b, x >= 0
    problem = cp.Problem(cp.Minimize(c @ x), [total, sign])
    layer = layer_class(problem, [c, b], [x, total.dual_variables[0], sign.dual_variables[0]])
    c_t, b_t = (
        torch.tensor([1.0, 2.0]).double().requires_grad_(),
        torch.tensor(1.0).double().requires_grad_(),
    )
    x_star, price, reduced = layer(c_t, b_t, solver_args=ACCURATE)
    c.value, b.value = c_t.detach().numpy(), b_t.item()
    problem.solve(solver="CLARABEL")
    for got, expected in (
        (x_star, x),
        (price, total.dual_variables[0]),
        (reduced, sign.dual_variables[0]),
    ):
        torch.testing.assert_close(
            got.detach(), torch.as_tensor(expected.value), rtol=0, atol=1e-5, check_dtype=False
        )
    (slope,) = torch.autograd.grad(price.sum(), c_t)
    torch.testing.assert_close(slope, torch.tensor([-1.0, 0.0]).double(), rtol=0, atol=1e-4)


# Refusals: the type and the phrase are those of the incumbent; ours say more, in the user's names.


def least_squares(layer_class, **options):
    x, A, b = cp.Variable(2, name="x"), cp.Parameter((3, 2), name="A"), cp.Parameter(3, name="b")
    problem = cp.Problem(cp.Minimize(cp.sum_squares(A @ x - b)), [x >= 0])
    return layer_class(
        problem, options.pop("parameters", [A, b]), options.pop("variables", [x]), **options
    )


def declared(layer_class, objective: Callable, gp=False, **attributes):
    x, p = cp.Variable(2, **attributes), cp.Parameter(2, pos=gp)
    return layer_class(cp.Problem(objective(x, p)), [p], [x], gp=gp)


def given(*shapes, **keywords):
    return lambda layer: least_squares(layer)(*(normal(*shape) for shape in shapes), **keywords)


def with_args(**solver_args):
    return lambda layer: least_squares(layer)(
        normal(3, 2), normal(3, seed=1), solver_args=solver_args
    )


def bounded(layer_class):
    """Infeasible where the parameter is below one."""
    x, c = cp.Variable(2), cp.Parameter(2)
    return layer_class(cp.Problem(cp.Minimize(cp.sum(x)), [x >= 1, x <= c]), [c], [x])


def downhill(layer_class):
    """Unbounded where the parameter is below zero."""
    x, c = cp.Variable(2), cp.Parameter(2)
    return layer_class(cp.Problem(cp.Minimize(c @ x), [x >= 1]), [c], [x])


def least(f):
    return lambda x, p: cp.Minimize(f(x, p))


def wanting_a_gradient(layer_class, **solver_args):
    return least_squares(layer_class)(
        normal(3, 2).requires_grad_(), normal(3), solver_args=solver_args
    )


def nan_in_the_matrix(layer_class):
    return least_squares(layer_class)(torch.full((3, 2), torch.nan, dtype=torch.float64), normal(3))


SHAPE, BATCH = "Invalid parameter shape for parameter", "Inconsistent batch sizes"
UNDPP = r"Problem must be DPP\."
REFUSALS = {
    "not DPP": (
        lambda k: declared(k, least(lambda x, p: cp.sum_squares(p @ p * x))),
        ValueError,
        UNDPP,
    ),
    "not convex": (
        lambda k: declared(k, lambda x, p: cp.Maximize(cp.sum_squares(x - p))),
        ValueError,
        UNDPP,
    ),
    "not log-log convex": (
        lambda k: declared(k, least(lambda x, p: cp.sum_squares(x - p)), gp=True, pos=True),
        ValueError,
        "Problem must be DPP for geometric programming",
    ),
    "a parameter missing": (
        lambda k: least_squares(k, parameters=[]),
        ValueError,
        "parameters must exactly match problem.parameters",
    ),
    "a foreign parameter": (
        lambda k: least_squares(k, parameters=[cp.Parameter(), cp.Parameter()]),
        ValueError,
        "parameters must exactly match problem.parameters",
    ),
    "a foreign variable": (
        lambda k: least_squares(k, variables=[cp.Variable()]),
        ValueError,
        "must be a subset of problem.variables or a constraint dual variable",
    ),
    "variables no list": (
        lambda k: least_squares(k, variables={cp.Variable()}),
        ValueError,
        "variables must be provided as a list or tuple",
    ),
    "mixed-integer": (
        lambda k: declared(k, least(lambda x, p: cp.sum_squares(x - p)), integer=True),
        cp.error.SolverError,
        "cannot solve this problem",
    ),
    "complex": (
        lambda k: declared(k, least(lambda x, p: cp.sum_squares(x - p)), complex=True),
        NotImplementedError,
        "Complex variables are not yet supported",
    ),
    "an unknown solver": (
        lambda k: least_squares(k, solver="NONSENSE"),
        cp.error.SolverError,
        "NONSENSE is not installed",
    ),
    "a solver of no layer": (
        lambda k: least_squares(k, solver="OSQP"),
        RuntimeError,
        "Unknown solver",
    ),
    "a solver of a wrong type": (
        lambda k: least_squares(k, solver=3),
        cp.error.SolverError,
        "solver",
    ),
    "an unknown backend": (
        lambda k: least_squares(k, canon_backend="NONSENSE"),
        ValueError,
        "Unknown backend",
    ),
    "too few tensors": (
        given((3, 2)),
        ValueError,
        "A tensor must be provided for each CVXPY parameter; received 1 tensors, expected 2",
    ),
    "a transposed matrix": (given((2, 3), (3,)), ValueError, f"{SHAPE} 0"),
    "a wrong row": (given((3, 2), (4, 4)), ValueError, f"{SHAPE} 1"),
    "two batch dimensions": (
        given((1, 1, 3, 2), (3,)),
        ValueError,
        "Invalid parameter dimensionality for parameter 0",
    ),
    "a scalar": (given((3, 2), ()), ValueError, "Invalid parameter dimensionality for parameter 1"),
    "two batch sizes": (given((4, 3, 2), (5, 3)), ValueError, BATCH),
    "a batch of one among others": (given((4, 3, 2), (1, 3)), ValueError, BATCH),
    "a warm start": (
        given((3, 2), (3,), warm_start=True),
        ValueError,
        "warm_start=True is only supported with solver='MOREAU'",
    ),
    "an unknown keyword": (
        given((3, 2), (3,), colour=1),
        TypeError,
        "unexpected keyword argument 'colour'",
    ),
    "an unknown option": (with_args(colour=1), TypeError, "colour"),
    "an unknown solve_method": (
        with_args(solve_method="NONSENSE"),
        ValueError,
        "Solver NONSENSE not supported",
    ),
    "an unknown mode": (
        lambda k: wanting_a_gradient(k, mode="fast"),
        ValueError,
        "Unsupported mode",
    ),
    "infeasible": (
        lambda k: bounded(k)(torch.zeros(2)),
        diffcp.SolverError,
        r"Solver \w+ returned status infeasible",
    ),
    "unbounded": (
        lambda k: downhill(k)(-torch.ones(2)),
        diffcp.SolverError,
        r"Solver \w+ returned status unbounded",
    ),
    "NaN": (nan_in_the_matrix, RuntimeError, "Found a NaN in"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_the_incumbent_refuses_is_refused_with_its_exception_and_its_words(layer_class, case):
    provoke, kind, phrase = REFUSALS[case]
    with pytest.raises(kind, match=phrase):
        provoke(layer_class)


@pytest.mark.parametrize(
    ("case", "kind", "phrase"),
    [
        ("not DPP", convlayer.ProblemError, "multiplies Parameters with each other"),
        ("a parameter missing", convlayer.ProblemError, "lacks `A`, `b`"),
        ("variables no list", TypeError, r"must be a list or tuple of cvxpy\.Variable"),
        ("mixed-integer", convlayer.ProblemError, "no useful derivative"),
        ("complex", convlayer.ProblemError, "real and imaginary parts"),
        ("an unknown solver", ValueError, "Expected one of DIFFCP, CLARABEL, SCS"),
        ("too few tensors", ValueError, "expected 2: `A`, `b`"),
        ("a transposed matrix", ValueError, r"`A` was given a tensor of shape \(2, 3\)"),
        ("two batch dimensions", ValueError, "ConvexLayer takes any number"),
        ("two batch sizes", ValueError, "`A` 4, `b` 5"),
        ("infeasible", convlayer.SolverError, "relax a constraint"),
        ("unbounded", convlayer.SolverError, "raise_on_error"),
        ("NaN", convlayer.ParameterError, "`A` holds NaN"),
        ("NaN", diffcp.SolverError, "raise_on_error"),
    ],
)
def test_a_refusal_is_also_convlayers_own_and_says_what_to_do(case, kind, phrase):
    with pytest.raises(kind, match=phrase):
        REFUSALS[case][0](compat.CvxpyLayer)


def test_an_error_of_rows_names_them():
    with pytest.raises(compat.SolverError) as caught:
        bounded(compat.CvxpyLayer)(torch.tensor([[2.0, 2.0], [0.0, 0.0], [3.0, 3.0]]))
    assert caught.value.rows == [(1,)]
    assert caught.value.status == [convlayer.Status.INFEASIBLE]


def test_the_old_fourth_argument_gp_is_recognised():
    x, a = cp.Variable(pos=True), cp.Parameter(pos=True)
    problem = cp.Problem(cp.Minimize(x), [x >= a])
    with pytest.raises(compat.UnknownSolverError, match="write gp=True"):
        compat.CvxpyLayer(problem, [a], [x], True)
    (x_star,) = compat.CvxpyLayer(problem, [a], [x], None, True)(torch.tensor(2.0))
    torch.testing.assert_close(x_star, torch.tensor(2.0))


def test_what_is_no_tensor_is_named():
    with pytest.raises(TypeError, match=r"`b` was given a list; expected a torch\.Tensor"):
        least_squares(compat.CvxpyLayer)(normal(3, 2), [1.0, 2.0, 3.0])


def test_refusals_without_a_counterpart_stay_ours():
    A = cp.Parameter((3, 2))
    x = cp.Variable(2)
    problem = cp.Problem(cp.Minimize(cp.sum_squares(A @ x)))
    with pytest.raises(convlayer.ProblemError, match="more than once"):
        compat.CvxpyLayer(problem, [A, A], [x])
    with pytest.raises(TypeError, match=r"must be a cvxpy\.Problem"):
        compat.CvxpyLayer(None, [A], [x])


# Symmetric parameters, what is no tensor, and the gradient that `mode` asks for.


def matrix_of(layer_class, **attributes):
    """The nearest matrix of unit trace to -C: X = (t I - C) / 2, linear in C, which sets the trace
    right."""
    X, C = cp.Variable((3, 3), symmetric=True), cp.Parameter((3, 3), name="C", **attributes)
    return layer_class(
        cp.Problem(cp.Minimize(cp.trace(C @ X) + cp.sum_squares(X)), [cp.trace(X) == 1]), [C], [X]
    )


MATRIX = torch.tensor([[2.0, 0.5, 0.1], [0.5, 3.0, 0.2], [0.1, 0.2, 1.5]], dtype=torch.float64)


@pytest.mark.parametrize(("attribute", "sign"), [("symmetric", 1.0), ("PSD", 1.0), ("NSD", -1.0)])
def test_a_symmetric_parameter_perturbed_entry_by_entry_passes_gradcheck(
    layer_class, attribute, sign
):
    if attribute == "NSD" and not ours(layer_class):
        pytest.skip("theirs takes no definite parameter with this solver")
    layer = matrix_of(layer_class, **{attribute: True})
    args = {} if ours(layer_class) else {"solver_args": ACCURATE}
    assert torch.autograd.gradcheck(
        lambda C: layer(C, **args)[0],
        ((sign * MATRIX).clone().requires_grad_(),),
        atol=1e-4,
        rtol=1e-3,
    )


def test_what_is_not_symmetric_is_symmetrised_with_one_warning_and_its_gradient_is_symmetric():
    layer, stray = matrix_of(compat.CvxpyLayer, symmetric=True), MATRIX.clone()
    stray[0, 1] += 0.6
    both = torch.stack([MATRIX, stray]).requires_grad_()
    with pytest.warns(
        UserWarning, match="`C` is symmetric, and the tensor for it is not"
    ) as caught:
        (X,) = layer(both)
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(both)
        (right,) = layer((both + both.mT) / 2)
    torch.testing.assert_close(X, right)
    (slope,) = torch.autograd.grad(X[:, 0, 1].sum(), both)
    torch.testing.assert_close(
        slope,
        torch.tensor([[0, -0.25, 0], [-0.25, 0, 0], [0, 0, 0]]).double().expand(2, 3, 3),
        rtol=0,
        atol=1e-9,
    )


def test_a_symmetric_parameter_passes_through_compilers_and_transforms():
    layer = matrix_of(compat.CvxpyLayer, symmetric=True)
    stray = MATRIX.clone()
    stray[0, 1] += 0.6
    both = torch.stack([MATRIX, stray])
    (expected,) = layer((both + both.mT) / 2)
    torch.testing.assert_close(
        torch.compile(layer, fullgraph=True, backend="aot_eager")(both)[0], expected
    )
    torch.testing.assert_close(torch.func.vmap(lambda C: layer(C)[0])(both), expected)


@pytest.mark.parametrize(
    "nothing", [None, 2.0, [1.0, 2.0, 3.0]], ids=["None", "a number", "a list"]
)
def test_what_is_no_tensor_raises_what_it_raises_there(layer_class, nothing):
    with pytest.raises(AttributeError):
        least_squares(layer_class)(normal(3, 2), nothing)


def projected(point):
    """Onto the simplex, by sorting."""
    falling = point.sort(descending=True).values
    thresholds = (falling.cumsum(0) - 1) / torch.arange(1, len(point) + 1)
    return (point - thresholds[(falling > thresholds).sum() - 1]).clamp(min=0)


@pytest.mark.parametrize("mode", ["lpgd", "lpgd_right", "lpgd_left"])
@pytest.mark.parametrize(("tau", "rho"), [(0.5, 0.1), (0.2, 1.0), (2.0, 0.5)])
@pytest.mark.parametrize("at_construction", [True, False])
def test_lpgd_is_the_secant_of_the_perturbed_problems_in_their_units(
    layer_class, mode, tau, rho, at_construction
):
    x, c = cp.Variable(3), cp.Parameter(3)
    problem = cp.Problem(cp.Minimize(c @ x), [cp.sum(x) == 1, x >= 0])
    options = {
        "mode": mode,
        "derivative_kwargs": {"tau": tau, "rho": rho},
        **({} if ours(layer_class) else ACCURATE),
    }
    costs, bar = (
        torch.tensor([1.0, 1.1, 1.5]).double().requires_grad_(),
        torch.tensor([1.0, 0.0, -1.0]).double(),
    )
    layer = layer_class(problem, [c], [x], **({"solver_args": options} if at_construction else {}))
    (solution,) = layer(costs, **({} if at_construction else {"solver_args": options}))
    (found,) = torch.autograd.grad(solution, costs, bar)
    vertex = torch.tensor([1.0, 0.0, 0.0]).double()
    right, left = (
        projected(vertex - (costs.detach() + side * tau * bar) / rho) for side in (1, -1)
    )
    secants = {
        "lpgd": (right - left) / (2 * tau),
        "lpgd_right": (right - vertex) / tau,
        "lpgd_left": (vertex - left) / tau,
    }
    torch.testing.assert_close(
        found, secants[mode], rtol=0, atol=1e-7 if ours(layer_class) else 1e-4
    )


@pytest.mark.parametrize(("options", "kind"), [
    ({"mode": "lpgd"}, TypeError), ({"mode": "lpgd", "derivative_kwargs": {"tau": 0.1}}, TypeError),
    ({"mode": "lpgd", "derivative_kwargs": {"tau": 0.0, "rho": 0.1}}, ValueError),
    ({"mode": "lpgd_left", "derivative_kwargs": {"tau": 0.1, "rho": -0.1}}, ValueError)])  # fmt: skip
def test_lpgd_without_its_numbers_is_refused_as_it_is_there(layer_class, options, kind):
    with pytest.raises(kind, match=r"tau|rho"):
        wanting_a_gradient(layer_class, **options)[0].sum().backward()


def test_the_incumbents_tolerance_of_its_accelerated_solver_is_understood():
    layer = least_squares(compat.CvxpyLayer, solver="MOREAU")
    (found,) = layer(normal(3, 2), normal(3, seed=1), solver_args={"tol": 1e-12, "max_iters": 500})
    torch.testing.assert_close(found, layer(normal(3, 2), normal(3, seed=1))[0])


# Options: each is translated, accepted with a warning, or refused.


@dataclass
class Ran:
    solver: str
    tolerance: float
    options: dict
    thread: str


@pytest.fixture
def ran(monkeypatch) -> list[Ran]:
    """What the solvers were asked to do."""
    record: list[Ran] = []
    by_rows = {name: type(solver) for name, solver in SOLVERS.items() if isinstance(solver, Solver)}
    originals = {name: kind.solve for name, kind in by_rows.items()}

    def solve(self, task):
        record.append(
            Ran(self.name, task.tolerance, dict(task.options), threading.current_thread().name)
        )
        return originals[self.name](self, task)

    for kind in by_rows.values():
        monkeypatch.setattr(kind, "solve", solve)
    return record


@pytest.mark.parametrize(
    ("options", "solver", "tolerance", "passed"),
    [
        ({}, "clarabel", 1e-8, {}),
        ({"solve_method": "SCS"}, "scs", 1e-8, {}),
        ({"solve_method": "Clarabel"}, "clarabel", 1e-8, {}),
        ({"solve_method": "CLARABEL", "max_iter": 50}, "clarabel", 1e-8, {"max_iter": 50}),
        ({"solve_method": "ECOS", "abstol": 1e-7, "feastol": 1e-6}, "clarabel", 1e-7, {}),
        ({"eps": 1e-6}, "clarabel", 1e-6, {}),
        ({"eps": 1e-14}, "clarabel", compat.FINEST, {}),
        ({"eps_abs": 1e-5, "eps_rel": 0.0}, "clarabel", 1e-5, {}),
        ({"solve_method": "SCS", "eps_abs": 1e-5, "eps_rel": 1e-6}, "scs", 1e-6, {}),
        (
            {"max_iters": 99, "time_limit_secs": 9.0},
            "clarabel",
            1e-8,
            {"max_iter": 99, "time_limit": 9.0},
        ),
        (
            {"solve_method": "SCS", "max_iters": 9999, "acceleration_lookback": 0},
            "scs",
            1e-8,
            {"max_iters": 9999, "acceleration_lookback": 0},
        ),
        ({"verbose": False}, "clarabel", 1e-8, {"verbose": False}),
        (
            {"mode": "lsqr", "n_jobs_backward": 1, "use_indirect": False, "scale": 5.0},
            "clarabel",
            1e-8,
            {},
        ),
    ],
)
def test_an_option_means_here_what_it_meant_there(ran, options, solver, tolerance, passed):
    at_construction = least_squares(compat.CvxpyLayer, solver_args=options)
    at_call = least_squares(compat.CvxpyLayer)
    values = normal(3, 2), normal(3, seed=1)
    results = [at_construction(*values), at_call(*values, solver_args=options), at_call(*values)]
    assert [r.solver for r in ran] == [solver, solver, "clarabel"]
    for r in ran[:2]:
        assert r.tolerance == pytest.approx(tolerance)
        assert r.options == passed
    assert ran[2].options == {}
    for (result,) in results[1:]:
        torch.testing.assert_close(result, results[0][0], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("solver", "runs"),
    [
        (None, "clarabel"),
        ("DIFFCP", "clarabel"),
        ("CLARABEL", "clarabel"),
        (cp.CLARABEL, "clarabel"),
        (cp.SCS, "scs"),
    ],
)
def test_a_solvers_name_chooses_the_solver(ran, solver, runs):
    least_squares(compat.CvxpyLayer, solver=solver)(normal(3, 2), normal(3, seed=1))
    assert [r.solver for r in ran] == [runs]


def test_a_solver_of_ones_own_is_taken():
    class Mine(Solver):
        name = "mine"

        def solve(self, task: Task) -> list[Iterate]:
            return Clarabel().solve(task)

    values = normal(3, 2), normal(3, seed=1)
    (mine,) = least_squares(compat.CvxpyLayer, solver=Mine())(*values)
    torch.testing.assert_close(mine, least_squares(compat.CvxpyLayer)(*values)[0])


@pytest.mark.parametrize("solver", ["MOREAU", "CUCLARABEL", "MPAX"])
def test_an_accelerated_solver_is_replaced_with_one_warning(ran, solver):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        layer = least_squares(compat.CvxpyLayer, solver=solver)
        layer(normal(3, 2), normal(3, seed=1), warm_start=True, solver_args={"device": "cuda"})
        layer(normal(3, 2), normal(3, seed=1), warm_start=True)
    assert [str(w.message).split("`")[1] for w in caught] == ["solver", "warm_start", "device"]
    assert solver in str(caught[0].message)
    assert [r.solver for r in ran] == ["clarabel", "clarabel"]


@pytest.mark.parametrize(
    "option",
    [
        {"mode": "dense"},
        {"n_jobs_backward": 1},
        {"warm_starts": None},
        {"use_indirect": True},
        {"acceleration_lookback": 0},
        {"solve_method": "ECOS"},
    ],
)
def test_an_option_without_effect_is_named_once(option):
    layer = least_squares(compat.CvxpyLayer)
    with pytest.warns(UserWarning, match=f"`{next(iter(option))}` has no effect"):
        layer(normal(3, 2), normal(3, seed=1), solver_args=option)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(normal(3, 2), normal(3, seed=1), solver_args=option)


def test_canon_backend_is_accepted_with_a_warning():
    with pytest.warns(UserWarning, match="`canon_backend` has no effect"):
        least_squares(compat.CvxpyLayer, canon_backend="SCIPY")


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({"colour": 1}, TypeError),
        ({"solve_method": "SCS", "tol_feas": 1e-6}, TypeError),
        ({"eps": "small"}, ValueError),
        ({"eps": 2.0}, ValueError),
        ({"n_jobs_forward": 0}, ValueError),
        ({"mode": "fast"}, ValueError),
    ],
)
def test_an_option_that_cannot_be_is_refused_at_construction_and_at_a_call(options, kind):
    with pytest.raises(kind, match=list(options)[-1]):
        least_squares(compat.CvxpyLayer, solver_args=options)
    with pytest.raises(kind, match=list(options)[-1]):
        least_squares(compat.CvxpyLayer)(normal(3, 2), normal(3), solver_args=options)


def test_a_calls_options_override_the_constructors_one_by_one(ran):
    layer = least_squares(
        compat.CvxpyLayer, solver_args={"solve_method": "SCS", "eps": 1e-5, "max_iters": 5000}
    )
    layer(normal(3, 2), normal(3, seed=1), solver_args={"eps": 1e-9})
    layer(
        normal(3, 2), normal(3, seed=1), solver_args={"solve_method": "Clarabel", "max_iters": 70}
    )
    assert [(r.solver, r.tolerance, r.options) for r in ran] == [
        ("scs", 1e-9, {"max_iters": 5000}),
        ("clarabel", 1e-5, {"max_iter": 70}),
    ]


@pytest.mark.parametrize("jobs", [1, 2])
def test_n_jobs_forward_is_the_number_of_threads(ran, jobs):
    (x,) = least_squares(compat.CvxpyLayer)(
        normal(9, 3, 2), normal(9, 3), solver_args={"n_jobs_forward": jobs}
    )
    assert x.shape == (9, 2)
    assert len({r.thread for r in ran}) <= jobs
    assert all(r.thread.startswith(f"convlayer-{jobs}_") for r in ran)


def test_raise_on_error_false_fills_failed_rows_with_nan(layer_class):
    layer, bounds = bounded(layer_class), torch.tensor([[2.0, 2.0], [0.0, 0.0]]).double()
    (x,) = layer(bounds, solver_args={"raise_on_error": False})
    torch.testing.assert_close(x[0], torch.ones(2).double(), rtol=0, atol=1e-3)
    assert bool(x[1].isnan().all())


@pytest.mark.parametrize("switch", [{"verbose": True}, {"solver_args": {"verbose": True}}])
def test_verbose_reaches_the_solver(ran, switch, capfd):
    least_squares(compat.CvxpyLayer, **switch)(normal(3, 2), normal(3))
    assert ran[0].options == {"verbose": True}


# A module like any other.


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_outputs_have_the_parameters_dtype_where_the_incumbents_are_float64(layer_class, dtype):
    (x,) = least_squares(layer_class)(normal(3, 2).to(dtype), normal(3).to(dtype))
    assert x.dtype == (dtype if ours(layer_class) else torch.float64)


def test_integers_are_taken_as_float64(layer_class):
    (x,) = least_squares(layer_class)(
        torch.eye(3, 2, dtype=torch.int64), torch.tensor([1, 2, 3]), solver_args=ACCURATE
    )
    torch.testing.assert_close(x, torch.tensor([1.0, 2.0]).double(), rtol=0, atol=1e-6)


def test_it_is_a_module_without_state_of_its_own(layer_class):
    layer = least_squares(layer_class)
    values = normal(3, 2), normal(3, seed=1)
    (before,) = layer(*values)
    for change in (
        layer.double,
        layer.eval,
        layer.train,
        lambda: layer.to("cpu"),
        lambda: layer.to(torch.float32),
    ):
        assert change() is layer
    torch.testing.assert_close(layer(*values)[0], before)
    assert isinstance(layer, torch.nn.Module)
    assert list(layer.parameters()) == []


def test_a_checkpoint_of_a_model_with_the_incumbents_layer_loads():
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.layer = torch.nn.Linear(2, 3), least_squares(compat.CvxpyLayer)

    model = Model()
    theirs = {
        **{f"linear.{k}": v for k, v in model.linear.state_dict().items()},
        **{f"layer.{name}": torch.zeros(2, 2) for name in ("P", "q", "A")},
    }
    model.load_state_dict(theirs)
    with pytest.raises(RuntimeError, match="colour"):
        model.load_state_dict({**theirs, "layer.colour": torch.zeros(2)})


def test_it_trains_inside_a_model(layer_class):
    x, p = cp.Variable(3), cp.Parameter(3)
    project = layer_class(
        cp.Problem(cp.Minimize(cp.sum_squares(x - p)), [x >= 0, cp.sum(x) == 1]), [p], [x]
    )
    linear = torch.nn.Linear(2, 3).double()
    with torch.no_grad():
        linear.weight.copy_(0.1 * normal(3, 2))
        linear.bias.zero_()
    inputs, target = normal(6, 2, seed=1), torch.tensor([0.6, 0.3, 0.1]).double()
    optimiser, losses = torch.optim.SGD(linear.parameters(), lr=0.5), []
    for _ in range(5):
        (output,) = project(linear(inputs))
        loss = (output - target).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))]
)
def test_a_copy_solves_alike_with_all_its_options(duplicate):
    layer = least_squares(compat.CvxpyLayer, solver_args={"n_jobs_forward": 1})
    values = normal(5, 3, 2), normal(5, 3, seed=1)
    (before,) = layer(*values, solver_args={"solve_method": "SCS"})
    twin = duplicate(layer)
    for options in (None, {"solve_method": "SCS"}, {"raise_on_error": False}):
        torch.testing.assert_close(twin(*values, solver_args=options)[0], before, rtol=0, atol=1e-6)


def test_what_the_incumbent_cannot_take_is_taken():
    x, P, q = cp.Variable(2), cp.Parameter((2, 2), PSD=True), cp.Parameter(2)
    layer = compat.CvxpyLayer(
        cp.Problem(cp.Minimize(0.5 * cp.quad_form(x, P) + q @ x)), [P, q], [x]
    )
    P_t, q_t = torch.tensor([[2.0, 0.5], [0.5, 1.0]]).double(), normal(2)
    torch.testing.assert_close(layer(P_t, q_t)[0], -torch.linalg.solve(P_t, q_t))
    assert least_squares(compat.CvxpyLayer)(normal(0, 3, 2), normal(3))[0].shape == (0, 2)


def test_a_parameter_outside_its_domain_is_an_error_of_both_kinds():
    x, p = cp.Variable(2), cp.Parameter(nonneg=True)
    layer = compat.CvxpyLayer(
        cp.Problem(cp.Minimize(cp.sum_squares(x - 1) + p * cp.norm1(x))), [p], [x]
    )
    with pytest.raises(diffcp.SolverError, match="nonneg=True") as caught:
        layer(torch.tensor(-1.0))
    assert isinstance(caught.value, convlayer.ParameterError)


def test_its_repr_says_what_it_maps_and_what_runs():
    assert "A(3, 2), b(3,)) -> (x(2,))" in repr(least_squares(compat.CvxpyLayer))

"""A row that fails is named, flagged and kept from the others; a loss that uses it has a gradient
of NaN."""

import copy
import dataclasses
import math
import pickle
import warnings
from typing import ClassVar

import cvxpy as cp
import numpy as np
import pytest
import torch
from cases import CASES, close, leaves, relative, solved_right_or_flagged, weights

import convlayer.conic.polish
from convlayer import (
    AccuracyWarning,
    ConvexLayer,
    Iterate,
    ParameterError,
    ProblemError,
    Solver,
    SolverError,
    Status,
)
from convlayer.solvers.clarabel import Clarabel

NAN, INF = float("nan"), float("inf")
BAD_ROW = 2


def interval(**options):
    """min |x - a|^2 subject to lower <= x <= upper: infeasible where lower > upper."""
    a, lower, upper = (cp.Parameter(2, name=name) for name in ("a", "lower", "upper"))
    x = cp.Variable(2, name="x")
    above = x >= lower
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x - a)), [above, x <= upper])
    return ConvexLayer(problem, [a, lower, upper], [x, above.dual_variables[0]], **options)


def interval_data(rows=4, infeasible=(BAD_ROW,)):
    generator = torch.Generator().manual_seed(3)
    a = torch.randn(rows, 2, generator=generator, dtype=torch.float64)
    lower, upper = (
        torch.full((rows, 2), -0.3, dtype=torch.float64),
        torch.full((rows, 2), 0.4, dtype=torch.float64),
    )
    for row in infeasible:
        lower[row] = 1.0
    return a, lower, upper


def ray(**options):
    """min c'x subject to x >= b: unbounded where c is negative."""
    c, b, x = cp.Parameter(2, name="c"), cp.Parameter(2, name="b"), cp.Variable(2, name="x")
    return ConvexLayer(cp.Problem(cp.Minimize(c @ x), [x >= b]), [c, b], [x], **options)


def test_raise_names_the_rows_and_their_statuses():
    with pytest.raises(SolverError) as caught:
        interval()(*interval_data(5, (1, 3)))
    assert caught.value.rows == [(1,), (3,)]
    assert caught.value.status == [Status.INFEASIBLE] * 2
    for word in ("2 of 5", "1, 3", "INFEASIBLE", "on_failure"):
        assert word in str(caught.value)


def test_raise_names_rows_of_several_batch_dimensions_and_of_none():
    a, lower, upper = interval_data(6, (4,))
    with pytest.raises(SolverError) as caught:
        interval()(*(t.view(2, 3, 2) for t in (a, lower, upper)))
    assert caught.value.rows == [(1, 1)]
    assert "(1, 1)" in str(caught.value)
    with pytest.raises(SolverError) as caught:
        interval()(a[4], lower[4], upper[4])
    assert caught.value.rows == [()]


def test_raise_tells_different_failures_apart():
    c, b = (
        torch.tensor([[1.0, 1], [-1, 1], [1, NAN], [1, 2]], dtype=torch.float64),
        torch.zeros(4, 2, dtype=torch.float64),
    )
    solution = ray(on_failure="keep").solve(c, b)
    assert solution.status.tolist() == [
        Status.SOLVED,
        Status.UNBOUNDED,
        Status.BAD_INPUT,
        Status.SOLVED,
    ]
    with pytest.raises(SolverError, match="UNBOUNDED") as caught:
        ray()(c[:2], b[:2])
    assert caught.value.rows == [(1,)]


def test_solver_errors_pickle_and_copy():
    with pytest.raises(SolverError) as caught:
        interval()(*interval_data())
    with pytest.raises(ParameterError) as bad:
        ray()(torch.full((2,), NAN, dtype=torch.float64), torch.zeros(2, dtype=torch.float64))
    for error in (caught.value, bad.value):
        for twin in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
            assert type(twin) is type(error)
            assert str(twin) == str(error)
            assert twin.rows == error.rows
            assert twin.status == error.status


@pytest.mark.parametrize("policy", ["nan", "keep"])
def test_other_rows_keep_value_and_gradient(policy):
    """Shared parameters included: their gradient is the sum over the rows that the loss uses."""
    a, lower, upper = interval_data()
    good = [k for k in range(4) if k != BAD_ROW]
    upper_shared = upper[0]
    layer = interval(on_failure=policy)
    inputs = leaves((a, lower, upper_shared))
    solution = layer.solve(*inputs)
    assert solution.status.tolist() == [0, 0, Status.INFEASIBLE, 0]
    clean = leaves((a[good], lower[good], upper_shared))
    expected = interval().solve(*clean)
    outputs, references = (
        [*solution.variables, solution.objective],
        [*expected.variables, expected.objective],
    )
    for got, reference in zip(outputs, references, strict=True):
        assert close(got[good], reference, 1e-8)
    if policy == "nan":
        assert all(got[BAD_ROW].isnan().all() for got in outputs)
    cotangents = weights(references)
    bars = torch.autograd.grad([o[good] for o in outputs], inputs, cotangents)
    bars_expected = torch.autograd.grad(references, clean, cotangents)
    for k in (0, 1):
        assert relative(bars[k][good], bars_expected[k]) < 1e-8
        assert torch.equal(bars[k][BAD_ROW], torch.zeros(2, dtype=torch.float64))
    assert relative(bars[2], bars_expected[2]) < 1e-8


@pytest.mark.parametrize("policy", ["nan", "keep"])
@pytest.mark.parametrize("output", ["variable", "dual", "objective"])
@pytest.mark.parametrize("kind", ["infeasible", "nan", "inf"])
def test_a_failed_row_that_the_loss_uses_has_a_gradient_of_nan(policy, output, kind):
    a, lower, upper = interval_data(infeasible=(BAD_ROW,) if kind == "infeasible" else ())
    if kind != "infeasible":
        a[BAD_ROW, 0] = NAN if kind == "nan" else INF
    inputs = leaves((a, lower, upper))
    solution = interval(on_failure=policy).solve(*inputs)
    used = {
        "variable": solution.variables[0],
        "dual": solution.variables[1],
        "objective": solution.objective,
    }[output]
    bars = torch.autograd.grad(used.sum(), inputs)
    for bar in bars:
        assert bar[BAD_ROW].isnan().all(), "never a plausible number"
        assert bar[[0, 1, 3]].isfinite().all()


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("poison", [NAN, INF, -INF])
def test_a_row_that_is_not_finite_leaves_the_others_alone(name, poison):
    case = CASES[name]
    tensors = case.sample(4, seed=1)
    layer = case.layer(on_failure="nan")
    clean = leaves(tensors)
    expected = case.shared.solve(*clean)
    cotangents = [
        w[0].expand_as(w).clone() for w in weights([*expected.variables, expected.objective])
    ]
    for k in range(len(tensors)):
        bad = [t.clone() for t in tensors]
        bad[k].view(4, -1)[BAD_ROW, 0] = poison
        inputs = leaves(bad)
        solution = layer.solve(*inputs)
        # Infinity as the right-hand side of an inequality is a limit like another, or none:
        # tests/test_bounds.py.
        limit = not math.isnan(poison) and bool(layer._canonical.limits[k][0])
        assert limit or int(solution.status[BAD_ROW]) == Status.BAD_INPUT
        outputs = [*solution.variables, solution.objective]
        good = [0, 1, 3]
        for got, reference in zip(outputs, [*expected.variables, expected.objective], strict=True):
            assert limit or got[BAD_ROW].isnan().all()
            assert close(got[good], reference[good], 1e-9)
        bars = torch.autograd.grad(
            [o[good] for o in outputs], inputs, [w[good] for w in cotangents]
        )
        references = torch.autograd.grad(
            [*expected.variables, expected.objective], clean, cotangents, retain_graph=True
        )
        size = max(float(r.norm()) for r in references)
        for bar, reference in zip(bars, references, strict=True):
            assert float((bar[good] - reference[good]).norm()) <= 1e-8 * size
            assert bar[BAD_ROW].abs().max() == 0


def test_a_shared_parameter_that_is_not_finite_fails_every_row():
    c, b = torch.tensor([NAN, 1.0], dtype=torch.float64), torch.zeros(3, 2, dtype=torch.float64)
    with pytest.raises(ParameterError) as caught:
        ray()(c, b)
    assert caught.value.rows == [(0,), (1,), (2,)]
    assert "`c`" in str(caught.value)
    assert ray(on_failure="nan")(c, b)[0].isnan().all()


class Spoiled(Solver):
    """Clarabel, but for one row, for which it returns nothing that is a number."""

    name: ClassVar[str] = "spoiled"

    def solve(self, task):
        iterates = Clarabel().solve(task)
        nothing = [
            np.full(len(part), NAN)
            for part in (iterates[BAD_ROW].x, iterates[BAD_ROW].s, iterates[BAD_ROW].y)
        ]
        iterates[BAD_ROW] = Iterate(*nothing, Status.NOT_CONVERGED, 7)
        return iterates


@pytest.mark.parametrize("policy", ["nan", "keep"])
@pytest.mark.parametrize("name", CASES)
def test_a_solver_that_returns_nan_for_a_row_spoils_that_row_only(name, policy):
    """Gradients of shared parameters included."""
    case = CASES[name]
    tensors = case.sample(3, seed=1)
    layer = case.layer(on_failure=policy, solver=Spoiled())
    for shared in range(len(tensors)) if len(tensors) > 1 else (None,):
        inputs = leaves([t[0] if k == shared else t for k, t in enumerate(tensors)])
        clean = leaves([t[0] if k == shared else t[:2] for k, t in enumerate(tensors)])
        solution, expected = layer.solve(*inputs), case.shared.solve(*clean)
        assert solution.status.tolist() == [0, 0, Status.NOT_CONVERGED]
        outputs = [o[:2] for o in (*solution.variables, solution.objective)]
        references = [*expected.variables, expected.objective]
        cotangents = weights(references)
        bars = torch.autograd.grad(outputs, inputs, cotangents)
        references_bar = torch.autograd.grad(references, clean, cotangents)
        size = max(float(r.norm()) for r in references_bar)
        for k, (bar, reference) in enumerate(zip(bars, references_bar, strict=True)):
            assert float(((bar if k == shared else bar[:2]) - reference).norm()) <= 1e-8 * size


def test_every_row_failed_is_still_an_answer():
    inputs = leaves(interval_data(3, (0, 1, 2)))
    solution = interval(on_failure="nan").solve(*inputs)
    assert all(o.isnan().all() for o in (*solution.variables, solution.objective))
    bars = torch.autograd.grad(solution.objective.sum(), inputs)
    assert all(bar.isnan().all() for bar in bars)


def test_unbounded_and_infeasible_problems_of_every_cone_are_told():
    x, X = cp.Variable(2, name="x"), cp.Variable((2, 2), symmetric=True, name="X")
    p = cp.Parameter(name="p")
    one = torch.tensor(1.0, dtype=torch.float64)
    infeasible = [
        [x >= p, cp.sum(x) <= 1],
        [cp.norm(x - 3 * p) <= 1, x <= 0],
        [X >> p * torch.eye(2).numpy(), cp.trace(X) <= 1],
        [cp.exp(x[0]) <= -p],
        [cp.log(x[0]) >= p, x[0] <= 2],
        [x[0] == p, x[0] == 2 * p],
    ]
    for constraints in infeasible:
        variable = X if any(v.id == X.id for c in constraints for v in c.variables()) else x
        layer = ConvexLayer(
            cp.Problem(cp.Minimize(cp.sum_squares(variable)), constraints),
            [p],
            [variable],
            on_failure="keep",
        )
        assert int(layer.solve(one).status) == Status.INFEASIBLE, constraints
    p = cp.Parameter(name="p", nonneg=True)
    unbounded = [
        (-p * x[0], []),
        (cp.trace(-p * X), [X >> 0]),
        (-p * cp.sum(x), [cp.norm(x[1:]) <= x[0] * 2]),
        (p * cp.exp(x[0]) - x[1], []),
        (-cp.log(x[0]) - p * x[1], [x >= 0]),
    ]
    for objective, constraints in unbounded:
        variables = objective.variables()[:1]
        layer = ConvexLayer(
            cp.Problem(cp.Minimize(objective), constraints), [p], variables, on_failure="keep"
        )
        assert int(layer.solve(one).status) == Status.UNBOUNDED, objective


# Domains
# ----------------------------------------------------------------------------------------------------------------

MATRIX = (2, 2)
DOMAINS = {
    "nonneg": ({"nonneg": True}, (2,), [1.0, 0.0], [1.0, -0.1], ("nonneg", "-0.1", "softplus")),
    "pos": ({"pos": True}, (2,), [1.0, 0.5], [1.0, 0.0], ("pos", "0", "softplus")),
    "nonpos": ({"nonpos": True}, (2,), [-1.0, 0.0], [-1.0, 0.2], ("nonpos", "0.2", "lamp")),
    "neg": ({"neg": True}, (2,), [-1.0, -0.5], [-1.0, 0.0], ("neg", "0", "lamp")),
    "symmetric": (
        {"symmetric": True},
        MATRIX,
        [[1.0, 2], [2, 0]],
        [[1.0, 2], [3, 0]],
        ("symmetric", "1", "(X + X.mT) / 2"),
    ),
    "PSD": (
        {"PSD": True},
        MATRIX,
        [[1.0, 0], [0, 0]],
        [[1.0, 2], [2, 1]],
        ("PSD", "-1", "L @ L.mT"),
    ),
    "PSD asymmetric": (
        {"PSD": True},
        MATRIX,
        [[1.0, 0], [0, 1]],
        [[1.0, 0.5], [0, 1]],
        ("symmetric", "0.5"),
    ),
    "NSD": (
        {"NSD": True},
        MATRIX,
        [[-1.0, 0], [0, 0]],
        [[-1.0, 2], [2, -1]],
        ("NSD", "1", "-L @ L.mT"),
    ),
    "diag": ({"diag": True}, MATRIX, [[1.0, 0], [0, 2]], [[1.0, 0.5], [0, 2]], ("diag", "pattern")),
    "sparsity": (
        {"sparsity": ((0, 1), (0, 1))},
        MATRIX,
        [[1.0, 0], [0, 2]],
        [[1.0, 0.5], [0, 2]],
        ("sparse", "pattern"),
    ),
    "bounds": ({"bounds": [-1, 1]}, (2,), [1.0, -1.0], [1.5, 0.0], ("bounds", "lamp")),
}


def shifted(attributes, shape, **options):
    p, x = cp.Parameter(shape, name="price", **attributes), cp.Variable(shape, name="x")
    return ConvexLayer(cp.Problem(cp.Minimize(cp.sum_squares(x - p))), [p], [x], **options)


@pytest.mark.parametrize("domain", DOMAINS)
def test_a_value_outside_a_declared_domain_is_refused_with_name_row_and_remedy(domain):
    attributes, shape, good, bad, words = DOMAINS[domain]
    good, bad = torch.tensor(good, dtype=torch.float64), torch.tensor(bad, dtype=torch.float64)
    layer = shifted(attributes, shape)
    assert close(layer(good)[0], good, 1e-9)
    with pytest.raises(ParameterError) as caught:
        layer(torch.stack([good, bad, good]))
    assert caught.value.rows == [(1,)]
    assert caught.value.status == [Status.BAD_INPUT]
    assert isinstance(caught.value, ValueError)
    for word in ("`price`", "row 1", *words):
        assert word in str(caught.value), str(caught.value)


@pytest.mark.parametrize("domain", DOMAINS)
def test_a_value_outside_a_domain_fails_its_row_alone(domain):
    attributes, shape, good, bad, _ = DOMAINS[domain]
    good, bad = torch.tensor(good, dtype=torch.float64), torch.tensor(bad, dtype=torch.float64)
    value = torch.stack([good, bad, good]).requires_grad_()
    for policy in ("nan", "keep"):
        solution = shifted(attributes, shape, on_failure=policy).solve(value)
        assert solution.status.tolist() == [0, Status.BAD_INPUT, 0]
        assert solution.variables[0][1].isnan().all(), (
            "nothing was solved: there is no last iterate"
        )
        assert close(solution.variables[0][0], good, 1e-9)
        (bar,) = torch.autograd.grad(solution.variables[0].sum(), value)
        assert bar[1].isnan().any()
        assert bar[[0, 2]].isfinite().all()


@pytest.mark.parametrize(
    "domain", [d for d in DOMAINS if d not in ("PSD asymmetric", "symmetric", "diag", "sparsity")]
)
def test_validate_false_solves_what_it_is_given(domain):
    attributes, shape, _, bad, _ = DOMAINS[domain]
    bad = torch.tensor(bad, dtype=torch.float64)
    assert close(shifted(attributes, shape, validate=False)(bad)[0], bad, 1e-9)


def test_validate_false_still_refuses_what_is_not_finite():
    with pytest.raises(ParameterError, match="NaN"):
        shifted({}, (2,), validate=False)(torch.tensor([NAN, 0.0], dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rounding_is_no_violation_of_a_domain(dtype):
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(16, 6, 3, generator=generator, dtype=dtype)
    P = W @ W.mT  # of rank 3: three eigenvalues are zero up to rounding
    p, x = cp.Parameter((6, 6), PSD=True, name="P"), cp.Variable(6, name="x")
    layer = ConvexLayer(
        cp.Problem(cp.Minimize(cp.quad_form(x, p) + cp.sum_squares(x - 1))), [p], [x]
    )
    for scale in (1e-6, 1.0, 1e6):
        assert (layer.solve(scale * P).status == Status.SOLVED).all()


def test_the_first_reason_of_each_row_is_reported():
    p, q, x = (
        cp.Parameter(nonneg=True, name="first"),
        cp.Parameter(pos=True, name="second"),
        cp.Variable(name="x"),
    )
    layer = ConvexLayer(cp.Problem(cp.Minimize(p * cp.square(x) + q * cp.abs(x - 1))), [p, q], [x])
    bad = (
        torch.tensor([1.0, -1, 1], dtype=torch.float64),
        torch.tensor([1.0, 1, -2], dtype=torch.float64),
    )
    with pytest.raises(ParameterError) as caught:
        layer(*bad)
    assert caught.value.rows == [(1,), (2,)]
    assert "`first`" in str(caught.value)
    assert "`second`" in str(caught.value)


# Log-log convex programs
# ------------------------------------------------------------------------------------------------


def test_a_row_of_a_log_log_program_that_is_not_positive_fails_alone():
    case = CASES["posynomial"]
    tensors = case.sample(4, seed=0)
    tensors[1][BAD_ROW] = -1.0
    for options in ({}, {"validate": False}):
        layer = case.layer(on_failure="nan", **options)
        inputs = leaves(tensors)
        solution = layer.solve(*inputs)
        assert int(solution.status[BAD_ROW]) == Status.BAD_INPUT
        assert (solution.status[[0, 1, 3]] == Status.SOLVED).all()
        bars = torch.autograd.grad(
            solution.variables[0][[0, 1, 3]].sum(), inputs, retain_graph=True
        )
        assert all(bar.isfinite().all() for bar in bars)
        bars = torch.autograd.grad(solution.variables[0].sum(), inputs)
        assert bars[0][BAD_ROW].isnan().all()


def test_an_infeasible_log_log_row_is_told():
    a, x = cp.Parameter(pos=True, name="a"), cp.Variable(pos=True, name="x")
    layer = ConvexLayer(
        cp.Problem(cp.Minimize(1 / x), [x <= a, x >= 2]), [a], [x], gp=True, on_failure="nan"
    )
    solution = layer.solve(torch.tensor([3.0, 1.0], dtype=torch.float64))
    assert solution.status.tolist() == [Status.SOLVED, Status.INFEASIBLE]
    assert float(solution.variables[0][0]) == pytest.approx(3.0, rel=1e-9)
    assert solution.variables[0][1].isnan()


# Honesty
# ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["every_cone", "quadratic_program", "entropy", "nearest_correlation", "raw_power"]
)
@pytest.mark.parametrize("options", [{"max_iter": 1}, {"max_iter": 3}, {"max_iter": 5}])
def test_a_row_that_ran_out_of_iterations_is_flagged_or_right(name, options):
    """Polishing may finish what the solver began; then the answer is the solution, and otherwise
    the status says so."""
    case = CASES[name]
    tensors = case.sample(6, seed=0)
    expected = case.shared.solve(*tensors)
    solution = case.layer(solver_args=options, on_failure="keep").solve(*tensors)
    solved_right_or_flagged(solution, expected)
    assert (solution.residual[solution.status != Status.SOLVED] > 1e-8).all()


def test_a_row_that_neither_solver_nor_polish_settles_is_named(monkeypatch):
    monkeypatch.setattr(
        convlayer.conic.polish, "PATH", dataclasses.replace(convlayer.conic.polish.PATH, steps=0)
    )
    case = CASES["every_cone"]
    tensors, options = case.sample(6, seed=0), {"max_iter": 1}
    solution = case.layer(solver_args=options, on_failure="keep").solve(*tensors)
    assert (solution.status == Status.NOT_CONVERGED).any()
    assert (solution.residual[solution.status == Status.NOT_CONVERGED] > 1e-8).all()
    with pytest.raises(SolverError, match="NOT_CONVERGED"):
        case.layer(solver_args=options)(*tensors)


def test_keep_returns_the_last_iterate_of_a_row_that_did_not_converge():
    case = CASES["quadratic_program"]
    solution = case.layer(solver_args={"max_iter": 2}, on_failure="keep").solve(
        *case.sample(3, seed=0)
    )
    failed = solution.status == Status.NOT_CONVERGED
    assert solution.variables[0][failed].isfinite().all()
    assert all(status in list(Status) for status in solution.status.tolist())


def test_an_inaccurate_row_is_warned_about_once_and_kept():
    case = CASES["quadratic_program"]
    layer = case.layer(
        solver="scs", solver_args={"max_iters": 20, "tolerance": 1e-14}, on_failure="keep"
    )
    tensors = case.sample(4, seed=0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        statuses = [layer.solve(*tensors).status for _ in range(2)]
    warned = [w for w in caught if w.category is AccuracyWarning]
    assert len(warned) == int(any((s == Status.INACCURATE).any() for s in statuses))


def ill_posed():
    p, x, X = (
        cp.Parameter(nonneg=True, name="p"),
        cp.Variable(2, name="x"),
        cp.Variable((2, 2), symmetric=True, name="X"),
    )
    yield (
        "unbounded, logarithmically",
        cp.Problem(cp.Minimize(-cp.log(x[0]) + cp.square(x[1] - p))),
        p,
        x,
    )
    yield (
        "unbounded, by a square root",
        cp.Problem(cp.Minimize(-cp.sqrt(x[0]) + cp.square(x[1] - p))),
        p,
        x,
    )
    yield (
        "weakly infeasible",
        cp.Problem(cp.Minimize(p * X[0, 0]), [X >> 0, X[0, 1] == 1, X[1, 1] == 0]),
        p,
        X,
    )
    yield (
        "weakly infeasible cone",
        cp.Problem(
            cp.Minimize(p * x[0]), [cp.SOC(x[0] + x[1], cp.hstack([x[0] - x[1], 2.0])), x[1] == 0]
        ),
        p,
        x,
    )
    yield (
        "an exponential's infimum",
        cp.Problem(cp.Minimize(p * cp.exp(x[0]) + cp.square(x[1] - p))),
        p,
        x,
    )
    yield (
        "a logistic's infimum",
        cp.Problem(
            cp.Minimize(cp.logistic(-p * x[0]) + cp.logistic(-2 * x[0]) + cp.square(x[1] - p))
        ),
        p,
        x,
    )
    yield (
        "a reciprocal's infimum",
        cp.Problem(cp.Minimize(p * cp.inv_pos(x[0]) + cp.square(x[1] - p))),
        p,
        x,
    )
    yield "a duality gap", cp.Problem(cp.Minimize(p * X[0, 1]), [X >> 0, X[0, 0] == 0]), p, X
    yield (
        "an infimum not attained",
        cp.Problem(cp.Minimize(p * X[0, 0]), [X >> 0, X[0, 1] == 1]),
        p,
        X,
    )


ILL_POSED = list(ill_posed())


@pytest.mark.parametrize("k", range(len(ILL_POSED)), ids=[name for name, *_ in ILL_POSED])
def test_a_problem_without_a_solution_is_never_called_solved(k):
    """No primal-dual solution exists: iterates run off to infinity, where a residual relative to
    their size means nothing."""
    _, problem, p, variable = ILL_POSED[k]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        solution = ConvexLayer(problem, [p], [variable], on_failure="keep").solve(
            torch.tensor(1.0, dtype=torch.float64)
        )
    assert int(solution.status) != Status.SOLVED, f"x = {solution.variables[0].tolist()}"


# The closest feasible problem
# --------------------------------------------------------------------------------------------------


def halfway(**options):
    """min |x - a|^2 with 1 <= x <= h: infeasible where h < 1, and then halfway, both bounds shifted
    alike."""
    a, h, x = cp.Parameter(2, name="a"), cp.Parameter(2, name="h"), cp.Variable(2, name="x")
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x - a)), [x >= 1, x <= h])
    return ConvexLayer(problem, [a, h], [x], on_failure="closest", **options)


@pytest.mark.parametrize("structure", ["auto", "generic"])
def test_an_infeasible_row_has_the_closest_feasible_solution_and_says_its_shifts(structure):
    layer = halfway(structure=structure)
    a = torch.zeros(2, dtype=torch.float64)
    h = torch.tensor([[3.0, 4.0], [-1.0, 2.0], [0.0, 0.5]], dtype=torch.float64, requires_grad=True)
    solution = layer.solve(a, h)
    assert solution.status.tolist() == [Status.SOLVED] * 3
    expected = torch.tensor([[1.0, 1.0], [0.0, 1.0], [0.5, 0.75]], dtype=torch.float64)
    assert torch.allclose(solution.variables[0], expected, atol=1e-9)
    assert "rows 1, 2: infeasible" in " ".join(solution.notes)
    lower, upper = solution.shift
    shifts = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.5, 0.25]], dtype=torch.float64)
    assert torch.allclose(lower, shifts, atol=1e-9)
    assert torch.allclose(upper, shifts, atol=1e-9)
    (bar,) = torch.autograd.grad(solution.variables[0].sum(), h)
    assert torch.allclose(
        bar, torch.tensor([[0.0, 0.0], [0.5, 0.0], [0.5, 0.5]], dtype=torch.float64), atol=1e-8
    )
    tangent = torch.func.jvp(lambda t: layer(a, t)[0], (h.detach(),), (torch.ones_like(h),))[1]
    assert torch.allclose(tangent, bar, atol=1e-8)
    mapped = torch.func.vmap(lambda t: layer(a, t)[0])(h.detach())
    assert torch.allclose(mapped, expected, atol=1e-9)


def test_feasible_rows_have_no_shift_and_other_failures_still_raise():
    layer = halfway()
    a, h = torch.zeros(2, dtype=torch.float64), torch.full((2, 2), 3.0, dtype=torch.float64)
    assert layer.solve(a, h).shift is None
    h[1, 0] = torch.nan
    with pytest.raises(SolverError, match="row 1"):
        layer(a, h)


def test_what_has_no_closest_feasible_problem_is_refused_when_the_layer_is_built():
    a, x = cp.Parameter(2), cp.Variable(2)
    problem = cp.Problem(cp.Minimize(cp.sum(cp.exp(x))), [x >= a])
    with pytest.raises(ProblemError, match="exponential"):
        ConvexLayer(problem, [a], [x], on_failure="closest")
    with pytest.raises(ProblemError, match="exponential"):
        ConvexLayer(problem, [a], [x]).with_options(on_failure="closest")


# Nothing that could give way
# ---------------------------------------------------------------------------------------------


class Lost(Solver):
    """It finds nothing."""

    name: ClassVar[str] = "lost"

    def solve(self, task):
        sizes = task.program.n, task.program.m, task.program.m
        return [
            Iterate(*(np.full(size, NAN) for size in sizes), Status.NOT_CONVERGED, 7)
            for _ in range(len(task))
        ]


@pytest.mark.parametrize("on_failure", ["raise", "nan", "closest"])
def test_a_problem_without_constraints_that_does_not_settle_says_so(on_failure):
    x, q = cp.Variable(3), cp.Parameter(3)
    problem = cp.Problem(cp.Minimize(cp.sum(cp.huber(x - q)) + cp.norm(x)))
    layer = ConvexLayer(problem, [q], [x], solver=Lost(), on_failure=on_failure)
    value = torch.tensor([3.0, -1.0, 2.0], dtype=torch.float64)
    if on_failure == "nan":
        assert layer.solve(value).status == Status.NOT_CONVERGED
    else:
        with pytest.raises(SolverError, match="NOT_CONVERGED"):
            layer(value)


@pytest.mark.parametrize("on_failure", ["raise", "nan", "closest", "closest_few"])
def test_infeasible_without_constraints_is_said_as_such(on_failure):
    """The domain of the objective and a declared sign contradict each other: neither is shifted."""
    x, p = cp.Variable(nonneg=True), cp.Parameter()
    layer = ConvexLayer(
        cp.Problem(cp.Minimize(x - cp.sqrt(p - x))), [p], [x], on_failure=on_failure
    )
    values = torch.tensor([1.0, -1.0], dtype=torch.float64)
    if on_failure == "nan":
        assert layer.solve(values).status.tolist() == [Status.SOLVED, Status.INFEASIBLE]
    else:
        with pytest.raises(SolverError, match="row 1: INFEASIBLE"):
            layer(values)

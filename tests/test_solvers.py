"""Whichever solver runs, the answer is the same: x, s, y and the gradient; and what a solver is
told is what it does."""

import inspect
import pickle
import warnings
from collections.abc import Mapping
from typing import Any, ClassVar

import clarabel
import cvxpy as cp
import numpy as np
import pytest
import torch
from cases import CASES, close, leaves, names, outputs_of, solved_right_or_flagged, weights
from oracles import outside

import convlayer.cones
from convlayer import AccuracyWarning, ConvexLayer, Iterate, Solver, SolverError, Status, Task
from convlayer.cones import Cone, Exponential, Nonnegative, Power, Product, Psd, SecondOrder, Zero
from convlayer.conic.program import Data, Program
from convlayer.solvers import DEFAULT, SOLVERS, BatchSolver
from convlayer.solvers.clarabel import Clarabel
from convlayer.solvers.dealing import Inline, solve_batch
from convlayer.solvers.scs import SCS

FOR_SCS = names(lambda case: case.scs and case.shared._canonical.program.m > 0)
OPTIONS = {"max_iters": 100_000, "acceleration_lookback": 0}


def answers(layer, tensors):
    inputs = leaves(tensors)
    solution = layer.solve(*inputs)
    outputs = [*solution.variables, solution.objective]
    cotangents = [w.expand_as(o) for w, o in zip(weights(outputs, 1), outputs, strict=True)]
    return solution, outputs, torch.autograd.grad(outputs, inputs, cotangents)


def same(first, second, iterate=True):
    (a, a_outputs, a_bars), (b, b_outputs, b_bars) = first, second
    assert (a.status == Status.SOLVED).all()
    assert (b.status == Status.SOLVED).all()
    for got, reference in zip(a_outputs, b_outputs, strict=True):
        assert close(got, reference, 1e-8)
    size = max(float(bar.norm()) for bar in b_bars)
    for got, reference in zip(a_bars, b_bars, strict=True):
        assert float((got - reference).norm()) <= 1e-7 * size
    if iterate:
        for got, reference in zip(a.iterate, b.iterate, strict=True):
            assert close(got, reference, 1e-7)


@pytest.mark.parametrize("name", FOR_SCS)
def test_clarabel_and_scs_agree(name):
    case = CASES[name]
    tensors = case.sample(2, seed=0)
    same(
        answers(case.layer(solver="scs", solver_args=OPTIONS), tensors),
        answers(case.layer(solver="clarabel"), tensors),
        iterate=False,
    )


@pytest.mark.parametrize("name", CASES)
def test_clarabel_and_the_batched_interior_point_agree(name):
    case = CASES[name]
    tensors = case.sample(2, seed=0)
    same(
        answers(case.layer(solver="interior_point"), tensors),
        answers(case.layer(solver="clarabel"), tensors),
        iterate=False,
    )


LINEAR = names(
    lambda case: (
        {block.name for block in case.shared._canonical.program.cones.blocks}
        <= {"zero", "nonnegative"}
    )
)


@pytest.mark.parametrize("name", LINEAR)
def test_clarabel_and_daqp_agree(name):
    case = CASES[name]
    tensors = case.sample(2, seed=0)
    same(
        answers(case.layer(solver="daqp"), tensors),
        answers(case.layer(solver="clarabel"), tensors),
        iterate=False,
    )


def test_daqp_refuses_other_cones_and_options_it_does_not_have():
    with pytest.raises(ValueError, match="daqp takes linear and quadratic programs"):
        CASES["norm_ball"].layer(solver="daqp")
    with pytest.raises(TypeError, match=r"no option `speed`\. It has: tolerance"):
        CASES["quadratic_program"].layer(solver="daqp", solver_args={"speed": 11})
    with pytest.raises(TypeError, match="`iter_limit` cannot be 'many'"):
        CASES["quadratic_program"].layer(solver="daqp", solver_args={"iter_limit": "many"})


def test_rows_that_the_first_choice_does_not_settle_are_solved_by_another_and_noted():
    """One row infeasible: DAQP has no proof of that, Clarabel has."""
    a, h, x = cp.Parameter(3, name="a"), cp.Parameter(name="h"), cp.Variable(3, name="x")
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x - a)), [cp.sum(x) <= h, x >= 0])
    layer = ConvexLayer(problem, [a, h], [x], on_failure="nan")
    assert (
        layer._settings.solving.attempts(layer._canonical, 4, torch.device("cpu"))[0].solver.name
        == "daqp"
    )
    heights = torch.tensor([1.0, -1.0, 0.5, 2.0], dtype=torch.float64)
    solution = layer.solve(torch.ones(4, 3, dtype=torch.float64), heights)
    assert solution.status.tolist() == [
        Status.SOLVED,
        Status.INFEASIBLE,
        Status.SOLVED,
        Status.SOLVED,
    ]
    assert solution.notes == ("row 1: not settled by daqp; proved infeasible by clarabel",)
    assert layer.solve(torch.ones(2, 3, dtype=torch.float64), heights[[0, 2]]).notes == ()


def test_a_redundant_constraint_is_not_taken_for_a_weakly_active_one():
    """An active-set method gives one of two equal constraints the whole multiplier, and the other
    none."""
    a, x = cp.Parameter(3, name="a"), cp.Variable(3, name="x")
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x - a)), [x >= 0, 2 * x >= 0])
    solution = ConvexLayer(problem, [a], [x]).solve(
        torch.tensor([[-1.0, 2.0, 3.0]], dtype=torch.float64)
    )
    assert not solution.degenerate.any()


def semidefinite(n, **options):
    """min <C, X> + |X|^2/2 subject to X >> D, <B, X> = 1: x, y and s all of rank neither zero nor
    full."""
    C, D = (
        cp.Parameter((n, n), symmetric=True, name="C"),
        cp.Parameter((n, n), symmetric=True, name="D"),
    )
    X = cp.Variable((n, n), symmetric=True, name="X")
    above = X >> D
    B = np.arange(1.0, n + 1)
    problem = cp.Problem(
        cp.Minimize(cp.trace(C @ X) + 0.5 * cp.sum_squares(X)), [above, B @ cp.diag(X) == n]
    )
    return ConvexLayer(problem, [C, D], [X, above.dual_variables[0]], **options)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 6])
def test_psd_cones_of_every_order_agree_in_x_y_and_s(n):
    """A library shipped wrong gradients for years because only x was tested."""
    generator = torch.Generator().manual_seed(n)
    C, D = (torch.randn(2, n, n, generator=generator, dtype=torch.float64) for _ in range(2))
    tensors = [(M + M.mT) / 2 for M in (2 * C, 0.3 * D)]
    a, b = (
        answers(semidefinite(n, solver="scs", solver_args=OPTIONS), tensors),
        answers(semidefinite(n), tensors),
    )
    same(a, b)
    for solution in (a[0], b[0]):
        X, Y = solution.variables
        assert float(torch.linalg.eigvalsh(Y)[:, 0].min()) > -1e-9
        assert float(torch.linalg.eigvalsh(X - tensors[1])[:, 0].min()) > -1e-9
        assert float(((X - tensors[1]) @ Y).abs().max()) < 1e-8


class Raw(Solver):
    """Hands on what a solver returned before polishing, and counts."""

    name: ClassVar[str] = "raw"

    def __init__(self, inner):
        self.inner, self.iterates = inner, []

    def check(self, program, options):
        self.inner.check(program, options)

    def solve(self, task):
        self.iterates += (found := self.inner.solve(task))
        return found


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 6])
@pytest.mark.parametrize("solver", [Clarabel, SCS])
def test_a_solvers_own_point_is_nearly_optimal_in_our_convention_before_any_polish(solver, n):
    generator = torch.Generator().manual_seed(n)
    C, D = (torch.randn(n, n, generator=generator, dtype=torch.float64) for _ in range(2))
    seen = {}

    class Keep(Raw):
        def solve(self, task):
            seen["task"] = task
            return super().solve(task)

    raw = Keep(solver())
    layer = semidefinite(n, solver=raw, solver_args={} if solver is Clarabel else OPTIONS)
    layer((C + C.mT), 0.3 * (D + D.mT))
    P, q, A, b = seen["task"].matrices(0)
    found = raw.iterates[0]
    P = P.toarray()
    P = P + np.triu(P, 1).T
    assert np.abs(P @ found.x + q + A.T @ found.y).max() < 1e-6 * (1 + np.abs(found.y).max())
    assert np.abs(A @ found.x + found.s - b).max() < 1e-6 * (1 + np.abs(found.x).max())
    start = 0
    for block in seen["task"].program.cones.blocks:
        rows = slice(start, start := start + block.size)
        assert outside(block.name, block.parameter, found.s[rows], dual=False) < 1e-6 * (
            1 + np.abs(found.s).max()
        )
        assert outside(block.name, block.parameter, found.y[rows], dual=True) < 1e-6 * (
            1 + np.abs(found.y).max()
        )
    assert abs(found.s @ found.y) < 1e-6 * (1 + np.abs(found.s).max() * np.abs(found.y).max())


@pytest.mark.parametrize("solver", ["clarabel", "scs"])
def test_tolerance_bounds_the_residual_and_a_smaller_one_takes_more_iterations(solver):
    case = CASES["every_cone"] if solver == "clarabel" else CASES["quadratic_program"]
    tensors = case.sample(4, seed=0)
    counts = []
    for tolerance in (1e-3, 1e-6, 1e-9):
        solution = case.layer(solver=solver, solver_args={"tolerance": tolerance}).solve(*tensors)
        assert (solution.residual <= tolerance).all()
        counts.append(int(solution.iterations.sum()))
    assert counts[0] < counts[-1]
    assert counts == sorted(counts)


@pytest.mark.parametrize("solver", ["clarabel", "scs"])
def test_options_at_a_call_override_those_of_the_layer(solver):
    case = CASES["quadratic_program"]
    option = "max_iter" if solver == "clarabel" else "max_iters"
    tensors = case.sample(2, seed=0)
    layer = case.layer(solver=solver, solver_args={option: 1}, on_failure="keep")
    assert (layer.solve(*tensors).iterations <= 1).all()
    assert (layer.solve(*tensors, solver_args={option: 50_000}).status == Status.SOLVED).all()
    assert (layer.solve(*tensors).iterations <= 1).all(), "a call's options are that call's alone"


def test_a_warm_start_takes_fewer_iterations_to_the_same_answer():
    case = CASES["transport"]
    layer = case.layer(solver="scs", solver_args={"acceleration_lookback": 0})
    tensors = case.sample(3, seed=0)
    cold = layer.solve(*tensors)
    nearby = [
        t * (1 + 1e-3 * torch.cos(torch.arange(t.numel(), dtype=torch.float64)).view(t.shape))
        for t in tensors
    ]
    nearby_cold = layer.solve(*nearby)
    warm, nearby_warm = (
        layer.solve(*tensors, warm_start=cold),
        layer.solve(*nearby, warm_start=cold),
    )
    assert (warm.iterations < cold.iterations).all()
    assert int(nearby_warm.iterations.sum()) < int(nearby_cold.iterations.sum())
    for a, b in ((warm, cold), (nearby_warm, nearby_cold)):
        for got, reference in zip(a.variables, b.variables, strict=True):
            assert close(got, reference, 1e-8)


def test_a_warm_start_from_failed_rows_is_a_cold_one():
    b, x = cp.Parameter(2, name="b"), cp.Variable(2, name="x")
    layer = ConvexLayer(
        cp.Problem(cp.Minimize(cp.sum_squares(x)), [x >= b, cp.sum(x) <= 1]),
        [b],
        [x],
        solver="scs",
        on_failure="nan",
    )
    failed = layer.solve(torch.tensor([[2.0, 2.0], [0.1, 0.2]], dtype=torch.float64))
    assert failed.status.tolist() == [Status.INFEASIBLE, Status.SOLVED]
    good = torch.tensor([[0.2, 0.1], [0.1, 0.3]], dtype=torch.float64)
    again = layer.solve(good, warm_start=failed)
    assert (again.status == Status.SOLVED).all()
    assert close(again.variables[0], good, 1e-8)


def vectors_only(solver, **options):
    """Only q and b depend on the parameters: one factorisation, or one set-up, serves the batch."""
    c, b, x = cp.Parameter(4, name="c"), cp.Parameter(3, name="b"), cp.Variable(4, name="x")
    A = np.random.default_rng(0).standard_normal((3, 4))
    problem = cp.Problem(
        cp.Minimize(cp.sum_squares(x) + c @ x), [A @ x <= b, x <= 1, cp.norm(x) <= 2]
    )
    return ConvexLayer(problem, [c, b], [x], solver=solver, **options)


@pytest.mark.parametrize("solver", ["clarabel", "scs"])
def test_where_only_vectors_change_a_row_does_not_depend_on_its_neighbours(solver):
    generator = torch.Generator().manual_seed(0)
    c, b = (
        3 * torch.randn(9, 4, generator=generator, dtype=torch.float64),
        torch.rand(9, 3, generator=generator, dtype=torch.float64),
    )
    layer = vectors_only(solver, solver_args={} if solver == "clarabel" else OPTIONS)
    whole = layer.solve(c, b)
    for row in range(9):
        assert close(whole.variables[0][row], layer(c[row], b[row])[0], 1e-9)
    order = torch.randperm(9, generator=generator)
    assert close(layer(c[order], b[order])[0], whole.variables[0][order], 1e-9)


@pytest.mark.parametrize("solver", ["clarabel", "scs"])
@pytest.mark.parametrize("name", ["quadratic_program", "every_cone", "entropy"])
def test_a_failed_row_does_not_spoil_the_solver_for_the_next(solver, name):
    """Rows of one task reuse a solver: a row that is infeasible, then one that is not."""
    b, c, x = cp.Parameter(2, name="b"), cp.Parameter(2, name="c"), cp.Variable(2, name="x")
    extra = (
        [cp.entr(x[0] + 10) >= -50]
        if name == "entropy"
        else [cp.norm(x) <= 20]
        if name == "every_cone"
        else []
    )
    layer = ConvexLayer(
        cp.Problem(cp.Minimize(cp.sum_squares(x - c)), [x >= b, cp.sum(x) <= 1, *extra]),
        [b, c],
        [x],
        solver=solver,
        on_failure="nan",
    )
    b_t = torch.tensor(
        [[0.0, 0.0], [5.0, 5.0], [0.1, 0.2], [9.0, 0.0], [0.3, 0.3], [-1.0, 0.0]],
        dtype=torch.float64,
    )
    c_t = torch.tensor([[2.0, 0.0]], dtype=torch.float64).expand(6, 2)
    solution = layer.solve(b_t, c_t)
    assert solution.status.tolist() == [0, Status.INFEASIBLE, 0, Status.INFEASIBLE, 0, 0]
    for row in (0, 2, 4, 5):
        assert close(solution.variables[0][row], layer(b_t[row], c_t[row])[0], 1e-8)


class Pickling(Inline):
    """What processes do to a task and to its answer, in one."""

    def map(self, function, tasks):
        again = lambda value: pickle.loads(pickle.dumps(value))  # noqa: E731
        return [again(again(function)(again(task))) for task in tasks]


class Unpolished(Solver):
    """A solver of a user's own: Clarabel called by hand, only linear-quadratic programs, one
    option."""

    name: ClassVar[str] = "unpolished"

    def check(self, program: Program, options: Mapping[str, Any]) -> None:
        if any(block.name not in ("zero", "nonnegative") for block in program.cones.blocks):
            raise ValueError("unpolished takes linear constraints only")
        if set(options) - {"steps"}:
            raise TypeError(f"unpolished has no option {set(options) - {'steps'}}")

    def solve(self, task: Task) -> list[Iterate]:
        kinds = {"zero": clarabel.ZeroConeT, "nonnegative": clarabel.NonnegativeConeT}
        settings = clarabel.DefaultSettings()
        settings.verbose = False
        settings.max_iter = task.options.get("steps", 50)
        iterates = []
        for row in range(len(task)):
            P, q, A, b = task.matrices(row)
            found = clarabel.DefaultSolver(
                P, q, A, b, [kinds[k.name](k.size) for k in task.program.cones.blocks], settings
            ).solve()
            status = Status.SOLVED if str(found.status) == "Solved" else Status.NOT_CONVERGED
            iterates.append(
                Iterate(
                    np.array(found.x),
                    np.array(found.s),
                    np.array(found.z),
                    status,
                    found.iterations,
                )
            )
        return iterates


def test_a_solver_of_ones_own():
    case = CASES["quadratic_program"]
    tensors = case.sample(5, seed=0)
    expected = answers(case.shared, tensors)
    same(answers(case.layer(solver=Unpolished(), solver_args={"steps": 40}), tensors), expected)
    with pytest.raises(TypeError, match="no option"):
        case.layer(solver=Unpolished(), solver_args={"strides": 40})
    with pytest.raises(ValueError, match="linear constraints only"):
        CASES["norm_ball"].layer(solver=Unpolished())
    same(answers(case.layer(solver=Unpolished(), executor=Pickling()), tensors), expected)


class Liar(Solver):
    """Says SOLVED of whatever it is told to return."""

    name: ClassVar[str] = "liar"

    def __init__(self, kind):
        self.kind = kind

    def solve(self, task):
        n, m = task.program.n, task.program.m
        fill = {"zeros": 0.0, "nan": np.nan, "inf": np.inf, "noise": None, "huge": 1e200}[self.kind]
        rng = np.random.default_rng(0)
        return [
            Iterate(
                *(rng.standard_normal(k) if fill is None else np.full(k, fill) for k in (n, m, m)),
                Status.SOLVED,
                1,
            )
            for _ in range(len(task))
        ]


@pytest.mark.parametrize("kind", ["zeros", "nan", "inf", "noise", "huge"])
@pytest.mark.parametrize(
    "name", ["quadratic_program", "every_cone", "linear_program", "nearest_correlation", "entropy"]
)
def test_a_solver_that_lies_is_found_out_or_its_point_polished_to_the_truth(kind, name):
    case = CASES[name]
    tensors = case.sample(3, seed=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AccuracyWarning)
        solution = case.layer(solver=Liar(kind), on_failure="keep").solve(*tensors)
    expected = case.shared.solve(*tensors)
    solved_right_or_flagged(solution, expected)


class Crash(Solver):
    name: ClassVar[str] = "crash"

    def solve(self, task):
        raise ZeroDivisionError("in the user's own solver")


def test_an_error_inside_a_users_solver_is_the_users_error():
    case = CASES["quadratic_program"]
    for rows in (1, 6):
        with pytest.raises(ZeroDivisionError, match="user's own solver"):
            case.layer(solver=Crash())(*case.sample(rows))


class Short(Solver):
    name: ClassVar[str] = "short"

    def solve(self, task):
        return []


def test_a_solver_that_returns_too_few_rows_is_an_error():
    case = CASES["quadratic_program"]
    with pytest.raises((ValueError, RuntimeError, SolverError)):
        case.layer(solver=Short())(*case.sample(3))


@pytest.mark.parametrize("solver", ["clarabel", "scs"])
def test_iterations_that_ran_out_are_never_a_solution_that_is_wrong(solver):
    option = "max_iter" if solver == "clarabel" else "max_iters"
    for name in ("linear_program", "lasso", "norm_ball", "matrix_inequality", "raw_exponential"):
        case = CASES[name]
        tensors = case.sample(4, seed=0)
        expected = outputs_of(case.shared, tensors)
        for steps in (1, 2, 4, 8):
            solution = case.layer(
                solver=solver, solver_args={option: steps}, on_failure="keep"
            ).solve(*tensors)
            good = solution.status == Status.SOLVED
            for got, reference in zip(solution.variables, expected, strict=False):
                assert close(got[good], reference[good], 1e-6)
            assert not (solution.residual[~good] <= 1e-8).any()


# Every cone with every solver
# ------------------------------------------------------------------------------------------------


def cone_program(cone):
    """minimise |x - a|^2 / 2 subject to x in the cone."""
    n = cone.size
    columns, rows = np.arange(n), np.arange(n)
    product = Product([cone])
    program = Program(n, n, product, columns, columns, rows, columns)
    eye = torch.ones(1, n, dtype=torch.float64)
    a = torch.linspace(-1.0, 1.3, n, dtype=torch.float64).unsqueeze(0)
    return Data(program, eye, -a, -eye, torch.zeros(1, n, dtype=torch.float64)), a


class IceCream(Nonnegative):
    """A cone of a kind that no solver has heard of."""

    name: ClassVar[str] = "ice_cream"


KINDS_OF_CONES = [
    Zero(3),
    Nonnegative(3),
    SecondOrder(3),
    Psd(2),
    Exponential(),
    Power(0.3),
    SecondOrder(1),
    Psd(1),
    IceCream(3),
]


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
@pytest.mark.parametrize("cone", KINDS_OF_CONES, ids=lambda cone: f"{cone.name}-{cone.size}")
def test_every_cone_with_every_solver_is_taken_or_refused_in_words(cone, solver):
    """The projection onto it is the solution."""
    data, a = cone_program(cone)
    if not solver.takes(data.program):
        with pytest.raises(
            ValueError, match=f"Solver {solver.name} takes .* a cone of the kind {cone.name}"
        ):
            solver.check(data.program, {})
        return
    solver.check(data.program, {})
    assert cone.name != "ice_cream"
    points = solve_batch(solver, 1e-9, {}, data, None, None)
    assert points.status.tolist() == [Status.SOLVED]
    assert close(points.x, cone.project(a), 1e-4)


def test_the_default_solver_takes_every_cone_there_is():
    kinds = {
        kind.name
        for kind in vars(convlayer.cones).values()
        if inspect.isclass(kind) and issubclass(kind, Cone) and kind is not Cone
    }
    assert SOLVERS[DEFAULT].cones == kinds
    assert all(
        isinstance(solver, Solver) != isinstance(solver, BatchSolver) for solver in SOLVERS.values()
    )

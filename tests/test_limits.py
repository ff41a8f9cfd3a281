"""A time limit ends a row's work; Ctrl-C is heard while compiled code solves."""

import itertools
import subprocess
import sys
from types import SimpleNamespace

import cvxpy as cp
import numpy as np
import pytest
import torch

import convlayer.paths.attempts
import convlayer.paths.refined
from convlayer import ConvexLayer, SolverError, Status
from convlayer.solvers import interior_point

AT_ONCE = {
    "clarabel": {"time_limit": 1e-9},
    "daqp": {"time_limit": 1e-9},
    "interior_point": {"time_limit": 1e-9},
    "scs": {"time_limit_secs": 1e-9, "tolerance": 1e-12},
}


def correlation(n, **options):
    C, X = cp.Parameter((n, n), symmetric=True, name="C"), cp.Variable((n, n), PSD=True, name="X")
    return ConvexLayer(
        cp.Problem(cp.Minimize(cp.sum_squares(X - C)), [cp.diag(X) == 1]), [C], [X], **options
    )


def bounded(n, **options):
    """A linear program, where DAQP looks at the clock now and then."""
    c, x = cp.Parameter(n, name="c"), cp.Variable(n, name="x")
    A = np.random.default_rng(1).standard_normal((3 * n, n))
    return ConvexLayer(
        cp.Problem(cp.Minimize(c @ x), [A @ x <= 0.1, cp.abs(x) <= 1]), [c], [x], **options
    )


def symmetric(n, *batch):
    matrix = np.random.default_rng(0).standard_normal((*batch, n, n))
    return torch.from_numpy(matrix + matrix.swapaxes(-1, -2))


@pytest.mark.parametrize("solver", AT_ONCE)
@pytest.mark.parametrize("named", [True, False])
def test_a_row_that_its_time_limit_ended_is_neither_tried_again_nor_polished(
    solver, named, monkeypatch
):
    """Whether the solver is named, or the layer's own first choice."""
    if not named and solver != "clarabel":
        pytest.skip("only Clarabel is the layer's own choice")
    tried, original = [], convlayer.paths.attempts.solve_batch
    monkeypatch.setattr(
        convlayer.paths.attempts,
        "solve_batch",
        lambda kind, *rest: tried.append(kind.name) or original(kind, *rest),
    )
    monkeypatch.setattr(convlayer.paths.refined, "polish", lambda *_, **__: pytest.fail("polished"))
    options = {
        "on_failure": "keep",
        "solver_args": AT_ONCE[solver],
        **({"solver": solver} if named else {}),
    }
    layer, values = (
        (bounded(80, **options), symmetric(80)[0])
        if solver == "daqp"
        else (correlation(8, **options), symmetric(8))
    )
    solution = layer.solve(values)
    assert int(solution.status) == Status.NOT_CONVERGED
    assert tried == [solver]
    assert solution.variables[0].isfinite().all()
    assert float(solution.residual) > 1e-3
    with pytest.raises(SolverError, match="time limit"):
        layer.with_options(on_failure="raise")(values)


def test_rows_that_the_batched_solver_finished_in_time_are_as_without_a_limit(monkeypatch):
    """By a clock that strikes after so many looks; rows of different difficulty need different
    numbers of them."""
    values = symmetric(6, 8) * torch.logspace(-3, 3, 8, dtype=torch.float64).view(-1, 1, 1)
    layer = correlation(6, on_failure="keep", solver="interior_point")
    freely, seen = layer.solve(values), set()
    for looks in range(2, 20):
        clock = itertools.count()
        monkeypatch.setattr(
            interior_point,
            "time",
            SimpleNamespace(monotonic=lambda clock=clock: float(next(clock))),
        )
        solution = layer.solve(values, solver_args={"time_limit": float(looks)})
        solved = solution.status == Status.SOLVED
        assert bool((solved | (solution.status == Status.NOT_CONVERGED)).all())
        assert solution.variables[0].isfinite().all()
        torch.testing.assert_close(
            solution.variables[0][solved], freely.variables[0][solved], rtol=0, atol=1e-7
        )
        seen.add(int(solved.sum()))
    assert {0, 8} < seen, seen


@pytest.mark.parametrize("value", [0, -1.0, True, "long"])
def test_a_time_limit_is_a_positive_number(value):
    with pytest.raises(TypeError, match=r"`time_limit` cannot be .* positive number of seconds"):
        correlation(4, solver="interior_point", solver_args={"time_limit": value})


def test_a_row_within_its_time_limit_is_solved_beside_one_that_is_not(monkeypatch):
    """Of two rows the solver says of one that time is up."""
    layer = correlation(6, on_failure="keep", solver="clarabel")
    kind = type(layer._settings.solving.solver)
    original = kind.solve

    def first_is_late(self, task):
        iterates = original(self, task)
        late = iterates[0].__class__(
            *(getattr(iterates[0], k) for k in ("x", "s", "y")), Status.NOT_CONVERGED, 3, True
        )
        return [late, *iterates[1:]]

    values = symmetric(6, 3)
    right = layer.solve(values)
    monkeypatch.setattr(kind, "solve", first_is_late)
    values.requires_grad_()
    solution = layer.solve(values)
    assert solution.status.tolist() == [Status.NOT_CONVERGED, Status.SOLVED, Status.SOLVED]
    assert torch.allclose(solution.variables[0][1:], right.variables[0][1:], atol=1e-9)
    (bar,) = torch.autograd.grad(solution.variables[0][1:].square().sum(), values)
    assert bar.isfinite().all()
    assert bool((bar[0] == 0).all())


def test_an_iteration_limit_is_no_time_limit():
    """Where the polish finds the solution from there, the row is solved."""
    x, a = cp.Variable(3), cp.Parameter(3)
    layer = ConvexLayer(
        cp.Problem(cp.Minimize(cp.sum_squares(x - a)), [x >= 0]),
        [a],
        [x],
        solver="clarabel",
        solver_args={"max_iter": 3},
    )
    solution = layer.solve(torch.tensor([1.0, -1.0, 0.5], dtype=torch.float64))
    assert int(solution.status) == Status.SOLVED


# Ctrl-C
# ---------------------------------------------------------------------------------------------------------------------

LONG = """
import os, signal, sys, threading, time
import cvxpy as cp, numpy as np, torch
import convlayer.solvers.{module} as module
from convlayer import ConvexLayer

n = {n}
C, X = cp.Parameter((n, n), symmetric=True), cp.Variable((n, n), PSD=True)
problem = cp.Problem(cp.Minimize(cp.sum_squares(X - C)), [cp.diag(X) == 1])
small_C, small_X = cp.Parameter((3, 3), symmetric=True), cp.Variable((3, 3), PSD=True)
small = cp.Problem(cp.Minimize(cp.sum_squares(small_X - small_C)))
layer = ConvexLayer(problem, [C], [X], solver="{module}", solver_args={args})
layer._canonical
events = []

def send():
    if "sent" not in events:
        events.append("sent")
        os.kill(os.getpid(), signal.SIGINT)

{how}
M = torch.from_numpy(np.random.default_rng(0).standard_normal(({rows}, n, n)))
try:
    layer(M + M.mT)
    events.append("finished")
except KeyboardInterrupt:
    events.append("heard")
while {told} and "told" not in events:
    time.sleep(1e-3)
print(*sorted(events))
Y = ConvexLayer(small, [small_C], [small_X], structure="generic")(torch.eye(3, dtype=torch.float64).expand(40, 3, 3))[0]
print("usable", bool((Y - torch.eye(3, dtype=torch.float64)).abs().max() < 1e-6), flush=True)
os._exit(0)
"""

# Sent from the middle of an iteration, which goes on when the solver has been told to stop.
AMID = """
original = module.interrupted

def interrupted():
    send()
    for _ in range(60_000 * ("told" not in events)):
        if original():
            events.append("told")
            return True
        time.sleep(1e-3)
    return False

module.interrupted = interrupted
"""

# Sent while it runs, for hours if it were left to.
DURING = """
original = module.SCS.solve

def solve(self, task):
    threading.Timer(0.3, send).start()
    return original(self, task)

module.SCS.solve = solve
"""


@pytest.mark.parametrize(
    ("rows", "module", "n", "args", "how", "events"),
    [
        (1, "clarabel", 20, {}, AMID, "heard sent told"),
        (4, "scs", 20, {"tolerance": 1e-15, "max_iters": 10**9}, DURING, "heard sent"),
    ],
    ids=["clarabel", "scs"],
)
def test_ctrl_c_is_heard_while_a_solver_runs_and_leaves_the_layers_usable(
    rows, module, n, args, how, events
):
    """By the order of events: the solver had not finished, and the main thread did not wait for it
    to."""
    code = LONG.format(module=module, n=n, args=args, how=how, rows=rows, told="told" in events)
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=False
    )
    # SCS says so itself
    lines = [line for line in run.stdout.splitlines() if "interrupted" not in line]
    assert lines == [events, "usable True"], run.stdout + run.stderr[-2000:]

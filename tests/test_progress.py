"""Long work shows how far it is, in a bar or in the log, and the answers are the same; what nobody
watches says nothing."""

import logging
import re
import subprocess
import sys

import cvxpy as cp
import numpy as np
import pytest
import torch

import convlayer
from convlayer import ConvexLayer, problems, progress
from convlayer.paths import attempts
from convlayer.solvers import SOLVERS
from convlayer.solvers.dealing import Inline

LINE = re.compile(r"(.+): (\d+) of (\d+) rows after \d+ s(.*)")


def layer(kind, n, **options):
    C = cp.Parameter((n, n), symmetric=True, name="C")
    if kind == "polyhedral":
        X = cp.Variable((n, n))
        constraints = [X >= 0, cp.sum(X) == 1, X[0] <= 0.5 + X[1]]
    else:
        X = cp.Variable((n, n), PSD=True)
        constraints = [cp.diag(X) == 1]
    problem = cp.Problem(cp.Minimize(cp.sum_squares(X - C)), constraints)
    return ConvexLayer(problem, [C], [X], structure="generic", **options)


def symmetric(rows, n):
    M = torch.from_numpy(np.random.default_rng(0).standard_normal((rows, n, n)))
    return M + M.mT


@pytest.fixture
def lines(monkeypatch, caplog):
    """Every look at the work is told in the log; what was told, as (title, done, total, what
    else)."""
    monkeypatch.setattr(progress, "tqdm", None)
    monkeypatch.setattr(progress, "AT_FIRST", 0.0)
    monkeypatch.setattr(progress, "BETWEEN", 0.0)
    caplog.set_level(logging.INFO, logger="convlayer")

    def told():
        found = [LINE.fullmatch(record.getMessage()) for record in caplog.records]
        caplog.clear()
        return [(m[1], int(m[2]), int(m[3]), m[4]) for m in found]

    return told


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_rows_of_a_batch_are_counted_to_the_last_and_their_answers_are_the_same(solver, lines):
    rows = 40
    mine, values = layer("polyhedral", 4, solver=solver), symmetric(rows, 4)
    freely = mine.solve(values)
    assert not lines(), "nobody asked"
    with convlayer.progress.shown():
        solution = mine.solve(values)
    told = lines()
    first = [(done, total) for title, done, total, _ in told if title == solver and total == rows]
    assert first[-1] == (rows, rows)
    assert [done for done, _ in first] == sorted(done for done, _ in first)
    if solver != "daqp":  # whose rows are over before they could be dealt
        assert len({done for done, _ in first}) > 2, "seen on the way"
    torch.testing.assert_close(solution.variables, freely.variables, rtol=0, atol=1e-8)
    mine.solve(values)
    assert not lines(), "nor afterwards"


@pytest.mark.parametrize(("solver", "n"), [("clarabel", 24), ("interior_point", 8)])
def test_a_single_program_that_takes_long_tells_its_iterations(solver, n, lines):
    mine, values = layer("psd", n, solver=solver), symmetric(1, n)
    with convlayer.progress.shown():
        count = int(mine.solve(values).iterations.max())
    steps = [
        int(found[1]) for *_, more in lines() if (found := re.search(r"iteration (\d+)", more))
    ]
    assert set(range(1, count)) <= set(steps)


def test_a_large_dense_batch_in_pieces_shows_its_own_rows_alone(lines, monkeypatch):
    monkeypatch.setattr(attempts, "LARGE", 1)
    monkeypatch.setattr(attempts, "PIECE", 2000)
    with convlayer.progress.shown():
        qp = problems.quadratic_program
        qp.layer(12, 12, 6, solver="interior_point").solve(*qp.sample(30, 0, 12, 12, 6))
    told = lines()
    assert {(title, total) for title, _, total, _ in told} == {("solved and polished", 30)}
    assert told[-1][1] == 30
    assert len(told) > 2


def test_rows_of_an_executor_of_the_users_own_are_counted(lines):
    with convlayer.progress.shown():
        layer("polyhedral", 4, solver="clarabel", executor=Inline()).solve(symmetric(12, 4))
    assert [done for _, done, *_ in lines()][:12] == list(range(1, 13))


def test_where_tqdm_is_installed_there_is_a_bar(monkeypatch, capsys):
    pytest.importorskip("tqdm", reason="the bar is tqdm's")
    monkeypatch.setattr(progress, "AT_FIRST", 0.0)
    with convlayer.progress.shown():
        layer("polyhedral", 4, solver="clarabel").solve(symmetric(40, 4))
    said = capsys.readouterr().err
    assert "clarabel" in said
    assert "40/40" in said


def test_work_that_is_over_at_once_shows_nothing(capsys):
    with convlayer.progress.shown():
        layer("polyhedral", 4).solve(symmetric(2, 4))
    captured = capsys.readouterr()
    assert not captured.err
    assert not captured.out


def test_what_the_log_does_not_take_goes_to_the_standard_error(monkeypatch, capsys):
    monkeypatch.setattr(progress, "tqdm", None)
    monkeypatch.setattr(progress, "AT_FIRST", 0.0)
    monkeypatch.setattr(progress.LOG, "level", logging.WARNING)
    with convlayer.progress.shown():
        layer("polyhedral", 4, solver="clarabel").solve(symmetric(40, 4))
    assert "of 40 rows" in capsys.readouterr().err


def test_what_is_not_to_be_shown_is_not_whatever_stands_around_it(lines):
    with convlayer.progress.shown(), convlayer.progress.shown(False):
        layer("polyhedral", 4).solve(symmetric(8, 4))
    assert not lines()


def test_an_error_on_the_way_is_the_users_error_and_the_next_call_is_shown(lines, monkeypatch):
    mine, values = layer("polyhedral", 4, solver="clarabel"), symmetric(8, 4)
    with monkeypatch.context() as broken, convlayer.progress.shown():
        broken.setattr(type(SOLVERS["clarabel"]), "solve", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            mine.solve(values)
    lines()
    with convlayer.progress.shown():
        mine.solve(values)
    assert lines()[-1][1:3] == (8, 8)


# Ctrl-C
# ---------------------------------------------------------------------------------------------------------------------

BATCH = """
import os, signal, threading, time
import cvxpy as cp, numpy as np, torch
import convlayer.progress, convlayer.solvers.{module} as module
from convlayer import ConvexLayer
from convlayer.solvers import dealing

C, X = cp.Parameter((4, 4), symmetric=True), cp.Variable((4, 4), PSD=True)
problem = cp.Problem(cp.Minimize(cp.sum_squares(X - C)), [cp.diag(X) == 1])
layer = ConvexLayer(problem, [C], [X], solver="{module}")
M = torch.from_numpy(np.random.default_rng(0).standard_normal((2000, 4, 4)))
M = M + M.mT
expected, = layer(M[:3])
begun, sent = [], []
original = {target}

def amid(*arguments):
    begun.append(threading.current_thread())
    if len(begun) == 5:
        sent.append(os.kill(os.getpid(), signal.SIGINT))
    for _ in range(60_000 * bool(sent) * {waits}):  # a row goes on when its solver has been told to stop
        if module.interrupted():
            break
        time.sleep(1e-3)
    return original(*arguments)

{target} = amid
pool = dealing.default_executor()
try:
    with convlayer.progress.shown({shown}):
        layer(M)
    print("finished")
except KeyboardInterrupt:
    print("heard")
pool.shutdown()  # waits for what is left of the work
print("begun", len(begun) <= 5 + dealing.cores())
{target} = original
found, = layer(M[:3])
print("usable", bool((found - expected).abs().max() < 1e-9), flush=True)
many, = layer(M[:50])
print("usable", bool((many[:3] - expected).abs().max() < 1e-9), flush=True)
"""


@pytest.mark.parametrize(
    ("module", "target", "waits", "shown"),
    [
        ("clarabel", "module.Clarabel._load", 1, True),
        pytest.param("clarabel", "module.Clarabel._load", 1, False, marks=pytest.mark.long),
        ("interior_point", "module.direction", 0, False),
    ],
)
def test_ctrl_c_ends_a_batch_at_the_next_row_or_iteration_and_leaves_pools_usable(
    module, target, waits, shown
):
    """By counting what is begun afterwards: of 2,000 short rows, or of the batch's iterations."""
    code = BATCH.format(module=module, target=target, waits=waits, shown=shown)
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=False
    )
    assert run.stdout.splitlines() == ["heard", "begun True", "usable True", "usable True"], (
        run.stdout + run.stderr[-2000:]
    )

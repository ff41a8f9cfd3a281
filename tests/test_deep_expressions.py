"""Expressions as deep as loops write them: read in proportion to their graph, each part once, and
never by recursion."""

from __future__ import annotations

import sys

import cvxpy as cp
import numpy as np
import pytest
import torch

from convlayer import ConvexLayer, ProblemError
from convlayer.declaration import affine
from convlayer.declaration.affine import NONE, Reader
from convlayer.declaration.atoms.square import Square
from convlayer.declaration.graph import arguments_first
from convlayer.declaration.normal_form import normal_form


def dense(table, variables: int, parameters: int) -> tuple[np.ndarray, np.ndarray]:
    """The coefficients of the variables and of the parameters, of a table without products of the
    two."""
    of_variables, of_parameters = (
        np.zeros((table.size, variables)),
        np.zeros((table.size, parameters)),
    )
    moving = table.variable != NONE
    np.add.at(of_variables, (table.row[moving], table.variable[moving]), table.coefficient[moving])
    given = ~moving & (table.parameter != NONE)
    np.add.at(of_parameters, (table.row[given], table.parameter[given]), table.coefficient[given])
    return of_variables, of_parameters


@pytest.fixture
def counted(monkeypatch):
    """The parts that are read."""
    read, parts = Reader._read, []

    def counting(self, expression):
        parts.append(expression)
        return read(self, expression)

    monkeypatch.setattr(Reader, "_read", counting)
    return parts


def test_dynamics_written_out_have_no_duplicates():
    steps, random = 40, np.random.default_rng(0)
    A, B = random.normal(size=(3, 3)), random.normal(size=(3, 2))
    A /= np.abs(np.linalg.eigvals(A)).max()
    u, start = cp.Variable((2, steps)), cp.Parameter(3)
    z = start
    for t in range(steps):
        z = A @ z + B @ u[:, t]
    table = Reader([u], [start]).table(z)
    assert len(table.row) <= 3 * (2 * steps + 3)
    power = [np.linalg.matrix_power(A, k) for k in range(steps + 1)]
    by_inputs, by_start = dense(table, 2 * steps, 3)
    wanted = np.hstack([power[steps - 1 - t] @ B for t in range(steps)])
    np.testing.assert_allclose(by_inputs, wanted, rtol=0, atol=1e-12 * np.abs(wanted).max())
    np.testing.assert_allclose(by_start, power[steps], rtol=0, atol=1e-12)


def test_a_shared_part_is_read_once(counted):
    n, steps = 4, 30  # as a tree it has a thousand million parts
    x = cp.Variable(n)
    z = x
    for _ in range(steps):
        z = z - 0.1 * cp.mean(z)
    table = Reader([x], []).table(z)
    assert len(counted) <= len(arguments_first([z]))
    centred = np.eye(n) - 0.1 / n * np.ones((n, n))
    matrix, _ = dense(table, n, 0)
    np.testing.assert_allclose(matrix, np.linalg.matrix_power(centred, steps), rtol=0, atol=1e-14)


def test_a_chain_of_scalars_is_read_without_recursion():
    steps = sys.getrecursionlimit() + 100
    u, charge = cp.Variable(steps), cp.Parameter()
    s = charge
    for t in range(steps):
        s = 0.99 * s + u[t]
    by_inputs, by_start = dense(Reader([u], [charge]).table(s), steps, 1)
    np.testing.assert_allclose(by_inputs[0], 0.99 ** np.arange(steps)[::-1], rtol=1e-12)
    np.testing.assert_allclose(by_start, 0.99**steps, rtol=1e-12)


def test_a_cost_that_is_used_often_is_taken_once():
    x, p = cp.Variable(3), cp.Parameter(3)
    f = cp.sum_squares(x - p)
    cost = f
    for _ in range(8):
        cost = 0.5 * cost + 2 * (f + cost)
    form = normal_form(cp.Problem(cp.Minimize(cost)), [p])
    weight = 1.0
    for _ in range(8):
        weight = 2.5 * weight + 2
    assert not form.others
    assert form.of(Square).size == 3
    np.testing.assert_allclose(form.of(Square).weight.coefficient, weight, rtol=1e-14)


def test_a_store_of_170_hours_is_recognised():
    steps = 170
    u, charge = cp.Variable(steps), cp.Parameter()
    s, constraints = charge, [cp.abs(u) <= 1]
    for t in range(steps):
        s = 0.99 * s + u[t]
        if t % 17 == 16:
            constraints.append(s >= 0)
    problem = cp.Problem(cp.Minimize(cp.sum_squares(u + 0.1)), constraints)
    layer = ConvexLayer(problem, [charge], [u])
    assert layer.structure == "quadratic_program"
    (found,) = layer(torch.tensor(0.5, dtype=torch.float64))
    level = 0.5
    for t in range(steps):
        level = 0.99 * level + found[t].item()
        assert t % 17 != 16 or level >= -1e-9


def test_maps_that_are_not_affordable_take_the_cone_program(monkeypatch):
    n, random = 30, np.random.default_rng(0)
    x, p = cp.Variable(n), cp.Parameter(n)
    F, G = (random.normal(size=(n, n)) / n for _ in "FG")
    problem = cp.Problem(cp.Minimize(cp.sum_squares(F @ (G @ x) + x - p)))
    assert ConvexLayer(problem, [p], [x]).structure == "least_squares"
    monkeypatch.setattr(affine, "ENTRIES_AT_LEAST", 100)
    monkeypatch.setattr(affine, "ENTRIES_A_LEAF", 0)
    layer = ConvexLayer(problem, [p], [x])
    # which CVXPY says it is, and its cone program solves
    assert layer.structure == "quadratic_program"
    value = random.normal(size=n)
    (found,) = layer(torch.from_numpy(value))
    np.testing.assert_allclose(
        found.numpy(), np.linalg.solve(F @ G + np.eye(n), value), rtol=0, atol=1e-9
    )


def test_what_is_too_deep_for_cvxpy_is_refused_in_words():
    limit, deep = sys.getrecursionlimit(), 300
    x, p = cp.Variable(), cp.Parameter()
    z = p
    for _ in range(deep):
        z = 0.9 * z + x
    try:
        sys.setrecursionlimit(limit + 4 * deep)
        problem = cp.Problem(cp.Minimize(cp.square(x - 1)), [z >= 0])
        sys.setrecursionlimit(limit)
        with pytest.raises(ProblemError, match="a variable of its own"):
            ConvexLayer(problem, [p], [x])
    finally:
        sys.setrecursionlimit(limit)

"""Words about any part of a problem are short and never fail; what CVXPY would drop without a word
is refused in words."""

from __future__ import annotations

import cvxpy as cp
import pytest
import torch

from convlayer import ConvexLayer, ProblemError
from convlayer.declaration.spelling import SHORT_LENGTH, short


def unprintable():
    x, c = cp.Variable(3), cp.Parameter(3)
    objective = cp.Minimize(cp.sum_squares(x - c))
    shifted = 2 * x[None, :] - c[None, :]
    return [
        (x, c, cp.Problem(objective, [constraint]))
        for constraint in (
            x[None] >= 0,
            x[None] == c[None],
            cp.norm(shifted) <= 2,
            cp.SOC(c[0] + 5, x[None][0]),
        )
    ]


@pytest.mark.parametrize(
    ("x", "c", "problem"), unprintable(), ids=["sign", "equality", "norm", "cone"]
)
def test_a_problem_that_cvxpy_cannot_print_is_a_layer(x, c, problem):
    layer = ConvexLayer(problem, [c], [x])
    value = torch.tensor([2.0, 1.0, 0.5], dtype=torch.float64)
    c.value = value.numpy()
    problem.solve(solver=cp.CLARABEL)
    assert (layer(value)[0] - torch.from_numpy(x.value)).abs().max() < 1e-6
    for words in (
        layer.explain(),
        str(layer.check(value)),
        *map(short, (problem.objective, *problem.constraints)),
    ):
        assert words


def test_a_refusal_of_what_cannot_be_printed_is_one():
    x, c = cp.Variable(3), cp.Parameter(3)
    with pytest.raises(ProblemError, match=r"constraints\[0\]"):
        ConvexLayer(
            cp.Problem(cp.Minimize(cp.sum_squares(x - c)), [cp.sqrt(x[None]) <= 1]), [c], [x]
        )


def test_words_about_a_shared_part_do_not_grow_with_its_uses():
    x = cp.Variable(4, name="x")
    z = x
    for _ in range(40):  # a million million uses
        z = z - 0.1 * cp.mean(z)
    assert len(short(cp.sum_squares(z))) <= SHORT_LENGTH


@pytest.mark.parametrize("leaf", ["Variable", "Parameter"])
@pytest.mark.parametrize(
    ("name", "value"), [("bounds", [0, 1]), ("nonneg", True), ("PSD", True), ("integer", True)]
)
def test_an_attribute_set_after_construction_is_refused(leaf, name, value):
    x, p = cp.Variable((2, 2), name="x"), cp.Parameter((2, 2), name="p")
    setattr({"Variable": x, "Parameter": p}[leaf], name, value)
    with pytest.raises(ProblemError, match=f"`{name}` of {leaf}"):
        ConvexLayer(cp.Problem(cp.Minimize(cp.sum_squares(x - p))), [p], [x])


def test_bounds_changed_after_construction_are_refused():
    x, p = cp.Variable(2, bounds=[0, 1], name="x"), cp.Parameter(2)
    x.bounds = [0, 2]
    with pytest.raises(ProblemError, match="`bounds` of Variable `x`"):
        ConvexLayer(cp.Problem(cp.Minimize(cp.sum_squares(x - p))), [p], [x])

"""An infeasible row names constraints that contradict each other, as few as there are, and by how
much: against closed forms and CVXPY."""

from __future__ import annotations

import cvxpy as cp
import numpy as np
import pytest
import torch

from convlayer import ConvexLayer, SolverError

x, cap, cost = cp.Variable(5, name="x"), cp.Parameter(5, name="cap"), cp.Parameter(5, name="cost")
z = cp.Variable(3, nonneg=True, name="z")
inside = cp.Variable(3, bounds=[0, 1], name="inside")
S = cp.Variable((2, 2), PSD=True, name="S")
w = cp.Variable(2, pos=True, name="w")
d, a = cp.Parameter(name="d"), cp.Parameter(pos=True, name="a")


def tensor(value):
    return torch.as_tensor(np.asarray(value, dtype=float))


def minimise(f, *constraints):
    return cp.Problem(cp.Minimize(f), list(constraints))


# The problem, its parameters and a variable, values, options, and what contradicts: (name, amount,
# entries) each.
CASES = {
    "a sum and bounds": (
        minimise(cost @ x, cp.sum(x) == 1, x <= cap, x >= 0, x <= 10), [cost, cap], x, [np.ones(5), np.full(5, 0.1)], {},
        [("constraint 0, `sum(x) == 1`", 0.5, ()), ("constraint 1, `x <= cap`", 0.1, (0, 1, 2, 3, 4))],
    ),
    "a ball": (
        minimise(cp.sum_squares(x - cost), x >= -5, cp.norm(x) <= 1, x[0] >= d), [cost, d], x, [np.ones(5), 2.0], {},
        [("constraint 1, `norm(x) <= 1`", 1.0, ()), ("constraint 2, `x[0] >= d`", 1.0, ())],
    ),
    "a declared sign": (
        minimise(cp.sum_squares(z), z <= 9, cp.sum(z) <= d), [d], z, [-0.5], {},
        [("constraint 1, `sum(z) <= d`", 0.5, ()), ("`z >= 0`, declared", 0.5 / 3, (0, 1, 2))],
    ),
    "declared bounds": (
        minimise(cp.sum(inside), cp.sum(inside) >= d), [d], inside, [4.0], {},
        [("constraint 0, `sum(inside) >= d`", 1.0, ()), ("the upper bound of `inside`", 1 / 3, (0, 1, 2))],
    ),
    "one entry": (
        minimise(cp.sum_squares(z), z <= cap[:3], z[1] == d), [cap, d], z, [np.arange(1.0, 6.0), 5.0], {},
        [("constraint 0, `z <= cap[:3]`", 3.0, (1,)), ("constraint 1, `z[1] == d`", 3.0, ())],
    ),
    "a declared semidefinite matrix": (
        minimise(cp.trace(S), S[0, 0] <= 10, cp.trace(S) == d), [d], S, [-1.0], {},
        [("constraint 1, `trace(S) == d`", 1.0, ()), ("`S >> 0`, declared", 0.5, ())],
    ),
    "a geometric program": (
        minimise(w[0], w[0] * w[1] >= a, w[0] <= 1, w[1] <= 2), [a], w, [8.0], {"gp": True},
        [(f"constraint {k}, `{text}`", np.log(4), ()) for k, text in enumerate(["w[0] * w[1] >= a", "w[0] <= 1", "w[1] <= 2"])],
    ),
    "a logarithm": (
        minimise(cp.sum(z), cp.log(z[0]) >= d, z <= 1), [d], z, [2.0], {},
        [("constraint 0, `log(z[0]) >= d`", 2.0, ()), ("constraint 1, `z <= 1`", np.exp(2) - 1, (0,))],
    ),
    "the objective's domain": (
        minimise(-cp.sum(cp.log(x[:1])) + cost @ x, x >= -3, x[0] <= d), [cost, d], x, [np.ones(5), -1.0], {},
        [("constraint 1, `x[0] <= d`", 1.0, ()), ("the term `log(x[0])` of the objective", None, ())],
    ),
    "two equations": (
        minimise(cp.sum_squares(x), x[1] == 2, x[0] == d, x[0] == 1), [d], x, [1.5], {},
        [("constraint 1, `x[0] == d`", 0.5, ()), ("constraint 2, `x[0] == 1`", 0.5, ())],
    ),
    "one that cannot hold": (
        minimise(cp.sum_squares(x), cp.sum_squares(x) <= d, x <= 1), [d], x, [-0.25], {},
        [("constraint 0, `sum_squares(x) <= d`", 0.25, ())],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_the_contradiction_is_named_with_its_amounts(name):
    problem, parameters, variable, values, options, expected = CASES[name]
    layer = ConvexLayer(problem, parameters, [variable], **options)
    tensors = [tensor(value) for value in values]
    check = layer.check(*tensors)
    conflict = check.conflicts[()]
    assert [member.name for member in conflict.members] == [word for word, _, _ in expected]
    for member, (_, amount, entries) in zip(conflict.members, expected, strict=True):
        assert member.entries == entries
        assert member.amount == (
            None if amount is None else pytest.approx(amount, rel=1e-4, abs=1e-6)
        )
    with pytest.raises(SolverError) as caught:
        layer(*tensors)
    for text in (str(caught.value), str(check)):
        assert str(conflict) in text
        assert all(word in text for word, _, _ in expected)


@pytest.mark.parametrize("seed", range(3))
def test_what_is_named_is_infeasible_and_no_part_of_it_is(seed):
    rng = np.random.default_rng(seed)
    v, b = cp.Variable(4, name="v"), cp.Parameter(12, name="b")
    rows = rng.standard_normal((12, 4))
    constraints = [rows[k] @ v <= b[k] for k in range(12)]
    layer = ConvexLayer(minimise(cp.sum_squares(v), *constraints), [b], [v])
    b.value = rng.standard_normal(12) - 0.5
    conflict = layer.check(tensor(b.value)).conflicts[()]
    named = [constraints[int(member.name.split(",")[0].split()[1])] for member in conflict.members]

    def status(some):
        problem = cp.Problem(cp.Minimize(0), some)
        problem.solve(solver=cp.CLARABEL)
        return problem.status

    assert status(named) == "infeasible"
    assert all(status([c for c in named if c is not one]) == "optimal" for one in named)
    # Each amount is what lets the set hold: a thousandth more is enough, a thousandth less is not.
    for one, member in zip(named, conflict.members, strict=True):
        rest = [c for c in named if c is not one]
        for share, outcome in ((1.001, "optimal"), (0.999, "infeasible")):
            assert status([*rest, one.args[0] <= one.args[1] + share * member.amount]) == outcome


def test_rows_of_a_batch_have_contradictions_of_their_own():
    problem, parameters, variable, _, _, _ = CASES["a sum and bounds"]
    layer = ConvexLayer(problem, parameters, [variable])
    caps = tensor([[0.1] * 5, [1.0] * 5, [-0.5, 1, 1, 1, 1]])
    with pytest.raises(SolverError) as caught:
        layer(tensor(np.ones(5)), caps)
    message = str(caught.value)
    assert "row 0: These contradict one another" in message
    assert "row 2: These contradict one another" in message
    assert "`x <= cap` at entry 0 (0.5)" in message
    assert "constraint 2, `x >= 0` at entry 0 (0.5)" in message
    assert set(layer.check(tensor(np.ones(5)), caps).conflicts) == {(0,), (2,)}


@pytest.mark.parametrize("policy", ["nan", "keep"])
def test_a_call_that_raises_nothing_looks_for_none(monkeypatch, policy):
    problem, parameters, variable, values, _, _ = CASES["a sum and bounds"]
    layer = ConvexLayer(problem, parameters, [variable], on_failure=policy)
    monkeypatch.setattr("convlayer.paths.policy.conflicts", lambda *_: pytest.fail("looked for"))
    layer(*[tensor(value) for value in values])
    ConvexLayer(problem, parameters, [variable])(tensor(values[0]), tensor(np.ones(5)))


def test_words_that_fail_do_not_hide_the_error(monkeypatch):
    problem, parameters, variable, values, _, _ = CASES["a sum and bounds"]
    monkeypatch.setattr("convlayer.paths.conflict.sources_of", lambda *_: 1 / 0)
    with pytest.raises(SolverError, match="INFEASIBLE"):
        ConvexLayer(problem, parameters, [variable])(*[tensor(value) for value in values])

"""What `verify` compares with, and what `explain` says, is so."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import cvxpy as cp
import numpy as np
import pytest
import torch
from cases import CASES

import convlayer.paths.cone_solution
from convlayer import ConvexLayer, Status
from convlayer.core.library import library
from convlayer.paths.short import Answered
from convlayer.solvers import SOLVERS, BatchSolver
from convlayer.structures import STRUCTURES

ROOT = Path(__file__).parent.parent


def told(text: str, head: str) -> str:
    (line,) = (line for line in text.splitlines() if line.startswith(f"{head}:"))
    return line.split(":", 1)[1].strip()


@pytest.mark.parametrize(
    "name",
    ["quadratic_program", "lasso", "norm_ball", "nearest_correlation", "logistic_regression"],
)
@pytest.mark.parametrize("solver", [None, "clarabel", "scs"])
def test_the_cone_program_is_verified_by_a_solver_that_has_no_part_in_it(name, solver, monkeypatch):
    layer = (
        CASES[name].layer(structure="generic", solver=solver)
        if solver is None
        else CASES[name].layer(solver=solver)
    )
    tensors = CASES[name].sample(2)
    used: list[set[str]] = []

    def watched(kind):
        method = "solve_data" if issubclass(kind, BatchSolver) else "solve"
        inner = getattr(kind, method)
        monkeypatch.setattr(
            kind, method, lambda self, *a: (used[-1].add(self.name), inner(self, *a))[1]
        )

    for one in SOLVERS.values():
        watched(type(one))
    solve = ConvexLayer.solve
    monkeypatch.setattr(
        ConvexLayer, "solve", lambda self, *a: (used.append(set()), solve(self, *a))[1]
    )
    found = layer.verify(*tensors)
    mine, theirs = used
    assert mine or (solver is None and library() is not None)  # the compiled core's rows
    assert theirs
    assert not mine & theirs
    assert found.against == f"cone_program by {min(theirs)}"
    assert found.agrees, str(found)
    assert bool(found.compared.all())


def box(**options):
    x, p = cp.Variable(3, name="x"), cp.Parameter(3, name="p")
    return ConvexLayer(
        cp.Problem(cp.Minimize(cp.sum_squares(x - p)), [cp.norm(x) <= 1]), [p], [x], **options
    )


def test_a_solution_that_is_off_is_found_out(monkeypatch):
    layer, solve = box(), ConvexLayer.solve

    def off(self, *tensors):
        solution = solve(self, *tensors)
        return (
            solution
            if self._settings.solving.alone
            else replace(solution, variables=tuple(1.001 * v for v in solution.variables))
        )

    monkeypatch.setattr(ConvexLayer, "solve", off)
    assert not layer.verify(torch.tensor([3.0, 1.0, 2.0], dtype=torch.float64)).agrees


def test_where_no_other_solver_is_left_it_says_so(monkeypatch):
    monkeypatch.setattr("convlayer.report.verification.other_solver", lambda *_: None)
    found = box().verify(torch.ones(4, 3, dtype=torch.float64))
    assert not found.agrees
    assert "nothing to compare with" in str(found)
    assert found.value.shape == (4,)


def test_a_row_that_the_other_solver_does_not_settle_is_not_called_a_disagreement(monkeypatch):
    layer = box()
    solve = ConvexLayer.solve

    def stopped(self, *tensors):
        solution = solve(self, *tensors)
        if self._settings.solving.alone:
            solution.status[0] = int(Status.NOT_CONVERGED)
        return solution

    monkeypatch.setattr(ConvexLayer, "solve", stopped)
    found = layer.verify(torch.tensor([[3.0, 1, 2], [0.1, 0.2, 0.3]], dtype=torch.float64))
    assert found.compared.tolist() == [False, True]
    assert found.agrees
    assert "1 not compared" in str(found)


# explain
# ----------------------------------------------------------------------------------------------------------------

x, q = cp.Variable(4, name="x"), cp.Parameter(4, name="q")
w, a = cp.Variable(2, name="w", pos=True), cp.Parameter(pos=True, name="a")
DECLARED = {
    "a ball": (cp.Problem(cp.Minimize(q @ x), [cp.norm(x) <= 1]), [q], [x], {}),
    "a norm": (cp.Problem(cp.Minimize(cp.norm(x - q)), [x >= 0]), [q], [x], {}),
    "an entropy": (cp.Problem(cp.Minimize(q @ x - cp.sum(cp.entr(x))), [cp.norm(x) <= 1]), [q], [x], {}),
    "a logarithm": (cp.Problem(cp.Minimize(cp.sum_squares(x - q)), [cp.sum(cp.log(x)) >= 0]), [q], [x], {}),
    "a quadratic program": (cp.Problem(cp.Minimize(cp.sum_squares(x - q)), [x >= 0, x[0] <= 1]), [q], [x], {}),
    "a geometric program": (cp.Problem(cp.Minimize(w[0] * a + 1 / w[1]), [w <= 3]), [a], [w], {"gp": True}),
}  # fmt: skip


@pytest.mark.parametrize("name", DECLARED)
def test_explain_has_one_set_of_costs_and_hints_that_are_true(name):
    problem, parameters, variables, options = DECLARED[name]
    layer = ConvexLayer(problem, parameters, variables, **options)
    for batch in (1, 32):
        text = layer.explain(batch)
        assert "estimated" not in text
        assert (
            len(re.findall(r"^Forward:", text, re.M))
            == len(re.findall(r"^Backward:", text, re.M))
            == 1
        )
        assert ("a norm in the objective" in text) == (name == "a norm")
        assert ("entropy" in text) == (name == "an entropy")
        assert "scs" not in text
        lines = [
            line.split(":", 1)[1].strip()
            for line in text.splitlines()
            if line.split(":")[0].strip() in {*STRUCTURES, "no"}
        ]
        assert len(lines) == len(set(lines)), "two lines say the same"
        assert all(structure in text for structure in STRUCTURES)


@pytest.mark.parametrize("name", DECLARED)
def test_the_cost_of_a_forward_is_a_row_s_times_the_batch(name):
    problem, parameters, variables, options = DECLARED[name]
    layer = ConvexLayer(problem, parameters, variables, **options)
    units = {"flop": 1.0, "kflop": 1e3, "Mflop": 1e6, "Gflop": 1e9}

    def flops(batch: int) -> float:
        number, unit = told(layer.explain(batch), "Forward").split()[:2]
        return float(number) * units[unit]

    np.testing.assert_allclose(flops(64), 8 * flops(8), rtol=1e-2)


def test_the_solver_that_explain_names_is_the_one_that_runs():
    for name, (problem, parameters, variables, options) in DECLARED.items():
        layer = ConvexLayer(problem, parameters, variables, on_failure="nan", **options)
        named = told(layer.explain(3), "Solver").split(",")[0]
        solution = layer.solve(
            *[torch.full((3, *p.shape), 0.4, dtype=torch.float64) for p in parameters]
        )
        assert not any("not settled" in note for note in solution.notes), (name, solution.notes)
        assert named in SOLVERS


def test_the_front_door_names_the_solvers_that_there_are():
    (named,) = re.findall(
        r"or by name (.*?), or a convlayer", " ".join(ConvexLayer.__doc__.split())
    )
    assert re.findall(r'"(\w+)"', named) == list(SOLVERS)


@pytest.mark.parametrize("solver", [None, *SOLVERS])
def test_repr_names_a_solver_that_was_named_and_no_other(solver):
    named = f"solver={'the cheapest' if solver is None else solver}, "
    assert named in repr(
        CASES["quadratic_program"].layer(structure="generic")
        if solver is None
        else CASES["quadratic_program"].layer(solver=solver)
    )
    options = {"daqp": {"iter_limit": 99}, "clarabel": {"max_iter": 99}}
    if solver in options:
        assert named in repr(
            CASES["quadratic_program"].layer(solver=solver, solver_args=options[solver])
        )
    # whose options they are
    assert "solver=clarabel, " in repr(
        CASES["quadratic_program"].layer(solver_args=options["clarabel"])
    )


def test_no_sentence_counts_the_solvers():
    """A number of them, or `the other one`, is wrong as soon as there is one more."""
    counted = re.compile(r"\b(two|three|four|both|2|3|4) solvers?\b|\bthe other solver\b")
    for path in sorted((ROOT / "convlayer").rglob("*.py")):
        assert not counted.search(path.read_text()), path


# Against diffcp
# ---------------------------------------------------------------------------------------------------------------


def variables_alone(name):
    declared = CASES[name].declare()
    own = {variable.id for variable in declared.problem.variables()}
    return ConvexLayer(
        declared.problem,
        declared.parameters,
        [v for v in declared.outputs if v.id in own],
        gp=CASES[name].gp,
    )


@pytest.mark.parametrize(
    "name", ["lasso", "norm_ball", "nearest_correlation", "logistic_regression", "posynomial"]
)
def test_a_layer_is_verified_against_cvxpy_with_diffcp_which_finds_a_wrong_gradient(
    name, monkeypatch
):
    layer, tensors = variables_alone(name), CASES[name].sample(2)
    found = layer.verify(*tensors, against="diffcp")
    assert found.agrees, found
    assert "against CVXPY with diffcp, 2 rows: agree" in str(found)
    assert bool((found.value > 0).any())  # two computations, not one
    adjoint = convlayer.paths.cone_solution.adjoint_of
    monkeypatch.setattr(
        convlayer.paths.cone_solution,
        "adjoint_of",
        lambda *a: [1.01 * part for part in adjoint(*a)],
    )
    pulled = Answered.cotangents
    monkeypatch.setattr(Answered, "cotangents", lambda *a: [1.01 * part for part in pulled(*a)])
    wrong = (
        variables_alone(name).with_options(structure="generic").verify(*tensors, against="diffcp")
    )
    assert not wrong.agrees
    assert "DISAGREE" in str(wrong)


def test_what_diffcp_cannot_say_is_said():
    with pytest.raises(
        ValueError, match="returns multipliers too: verify a layer of the variables alone"
    ):
        CASES["quadratic_program"].layer().verify(
            *CASES["quadratic_program"].sample(2), against="diffcp"
        )
    with pytest.raises(ValueError, match="`against` must be one of 'diffcp'; got 'ecos'"):
        CASES["lasso"].layer().verify(*CASES["lasso"].sample(2), against="ecos")
    infeasible = ConvexLayer(*_capped(), on_failure="keep").verify(
        torch.tensor([1.0, -1.0]).double(), against="diffcp"
    )
    assert infeasible.agrees
    form = variables_alone("quadratic_program").verify(
        *CASES["quadratic_program"].sample(2), against="diffcp"
    )
    assert "2 not compared" in str(form)
    assert "not DPP (when requires_grad is True" in str(form)
    a, x, z = cp.Parameter(2, nonneg=True), cp.Variable(2), cp.Variable()
    powers = cp.Problem(cp.Maximize(z), [cp.PowCone3D(x[0], x[1], z, 0.3), x <= a])
    found = ConvexLayer(powers, [a], [z]).verify(torch.rand(2, 2).double() + 1, against="diffcp")
    assert "diffcp's derivative of power cones is wrong" in str(found)
    assert not found.gradient.any()


def _capped():
    x, cap = cp.Variable(3), cp.Parameter()
    return (
        cp.Problem(cp.Minimize(cp.norm(x - np.arange(3))), [x >= 0, cp.sum(x) <= cap]),
        [cap],
        [x],
    )


def test_gradients_across_what_dependent_equalities_allow_are_not_compared_with_diffcp():
    """Of a plan's marginals, whose totals are one: any constant may be added to their gradients."""
    structure = STRUCTURES["entropic_optimal_transport"]
    layer = ConvexLayer(*structure.declare())
    found = layer.verify(
        *structure.sample((2,), torch.Generator().manual_seed(0)), against="diffcp"
    )
    assert found.agrees
    assert float(found.solution.max()) > 0
    assert "equalities depend on each other" in str(found)

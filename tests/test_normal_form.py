"""The normal form is the user's problem: affine maps and objectives have CVXPY's values at random
variables and parameters."""

import cvxpy as cp
import numpy as np
import pytest
import torch
from structures import SPELLINGS

from convlayer import ConvexLayer
from convlayer.declaration.affine import NONE, Reader, Table, UnsupportedError
from convlayer.declaration.atoms import ATOMS
from convlayer.declaration.atoms.atom import Elementwise
from convlayer.declaration.atoms.square import Square
from convlayer.declaration.graph import arguments_first
from convlayer.declaration.normal_form import normal_form
from convlayer.structures import STRUCTURES
from convlayer.structures.reading import only
from convlayer.structures.structure import MismatchError

RNG = np.random.default_rng(3)
C2x4, D3, KERNEL = RNG.standard_normal((2, 4)), RNG.standard_normal((3, 3)), RNG.standard_normal(4)
A, B, b, s = cp.Parameter((4, 3)), cp.Parameter((3, 3)), cp.Parameter(4), cp.Parameter()
x, X, Z = cp.Variable(3), cp.Variable((3, 2)), cp.Variable((3, 3))
VARIABLES, PARAMETERS = [x, X, Z], [A, B, b, s]

AFFINE = {
    "product": A @ x - b,
    "product of a product": C2x4 @ (A @ x - b),
    "slice": (A @ X)[1:3, :],
    "transpose": X.T @ A.T,
    "promotion": s * x + 1,
    "stack": cp.vstack([x, 2 * x]) + X.T,
    "columns": cp.sum(X, axis=0),
    "rows kept": cp.sum(A @ X, axis=1, keepdims=True),
    "side by side": cp.hstack([x, b]),
    "trace of a product": cp.trace(B @ Z),
    "trace": cp.trace(Z),
    "running sum": cp.cumsum(x),
    "running sum of columns": cp.cumsum(X, axis=1),
    "diagonal matrix": cp.diag(x) @ D3,
    "diagonal": cp.diag(Z),
    "upper triangle": cp.upper_tri(Z),
    "kronecker": cp.kron(D3, X),
    "convolution": cp.convolve(KERNEL, x),
    "row-major": cp.vec(X, order="C"),
    "quotient": x / 3 - cp.sum(b),
    "parameter of the outside": b @ (np.ones((4, 3)) @ x),
    "difference": cp.diff(x),
    "second difference": cp.diff(X, 2, axis=0),
    "from the right": x @ B,
    "blocks": cp.bmat([[Z, X], [X.T, np.eye(2)]]),
    "scaled": cp.multiply(s, X) + X * s,
    "weights": cp.sum(cp.multiply(B, Z)),
    "inner product": cp.vdot(B, Z),
    "reshaped": cp.reshape(A @ X, (2, 4), order="C"),
    "picked": Z[[0, 2], [1, 1]],
    "masked": Z[np.eye(3) > 0],
    "partial trace": cp.partial_trace(cp.kron(np.eye(2), Z), [2, 3], 0),
    "outer product": cp.outer(np.ones(2), x),
    "broadcast": cp.broadcast_to(x, (2, 3)),
    "broadcast sum": X.T + x,
    "mean": cp.mean(X, axis=1),
    "first power": cp.power(x, 1),
    "constant": cp.Constant(np.arange(3.0)),
}  # fmt: skip


def evaluate(table: Table, x_value: np.ndarray, theta: np.ndarray) -> np.ndarray:
    one_x, one_theta = np.append(x_value, 1.0), np.append(theta, 1.0)  # NONE is -1: the last
    terms = table.coefficient * one_theta[table.parameter] * one_x[table.variable]
    return np.bincount(table.row, terms, minlength=table.size)


def stacked(leaves) -> np.ndarray:
    return np.concatenate(
        [np.asarray(leaf.value, dtype=float).ravel(order="F") for leaf in leaves] or [np.zeros(0)]
    )


def randomise(leaves) -> None:
    for leaf in leaves:
        value = RNG.uniform(0.2, 1.5, leaf.shape)
        if leaf.attributes["PSD"] or leaf.attributes["symmetric"]:
            value = value @ value.T + np.eye(len(value))
        leaf.save_value(value)


@pytest.mark.parametrize("name", AFFINE)
def test_a_table_has_the_expressions_values(name):
    expression = AFFINE[name]
    table = Reader(VARIABLES, PARAMETERS).table(expression)
    for part in (table, table.normal):
        for _ in range(2):
            randomise([*VARIABLES, *PARAMETERS])
            expected = np.asarray(expression.value, dtype=float).ravel(order="F")
            np.testing.assert_allclose(
                evaluate(part, stacked(VARIABLES), stacked(PARAMETERS)),
                expected,
                rtol=1e-12,
                atol=1e-12,
            )
    keys = np.stack([table.normal.row, table.normal.variable, table.normal.parameter])
    assert len(np.unique(keys, axis=1).T) == keys.shape[1], (
        "one entry for each row, variable and parameter"
    )


@pytest.mark.parametrize(
    "expression",
    [cp.abs(x), cp.square(x), cp.multiply(B, cp.multiply(s, Z)), cp.multiply(B, B)],
    ids=str,
)
def test_what_is_no_affine_map_is_not_read(expression):
    with pytest.raises(UnsupportedError):
        Reader(VARIABLES, PARAMETERS).table(expression)


def test_what_cancels_is_not_there():
    table = Reader(VARIABLES, PARAMETERS).table(x + 0.1 * x - 1.1 * x + b[:3]).normal
    assert (table.variable == NONE).all()
    assert len(table.row) == 3


def objective_value(form, x_value: np.ndarray, theta: np.ndarray) -> float:
    def rows(table):
        return evaluate(table, x_value, theta)

    total = rows(form.linear)[0]
    for atom, term in form.present:
        sides = (torch.from_numpy(rows(table))[None] for table in (term.weight, term.argument))
        total += atom.value(*sides).item()
    return -total if form.maximise else total


KNOWN = [s for s in SPELLINGS if s.structure != "quadratic_program"]


@pytest.mark.parametrize("spelling", KNOWN, ids=str)
def test_the_objective_has_cvxpys_value_and_the_constraints_their_violations(spelling):
    problem, parameters, _ = spelling.declare()
    form = normal_form(problem, parameters)
    assert not form.others
    randomise([*form.variables, *parameters])
    point = stacked(form.variables), stacked(form.parameters)
    assert objective_value(form, *point) == pytest.approx(
        float(problem.objective.args[0].value), rel=1e-11, abs=1e-11
    )
    for constraint in form.constraints:
        owner = next((c for c in problem.constraints if c.id == constraint.origin), None)
        if owner is None:
            continue
        rows = evaluate(constraint.table, *point)
        got = {"zero": np.abs(rows), "nonnegative": np.maximum(-rows, 0)}.get(constraint.cone)
        if got is None:
            n = round(len(rows) ** 0.5)
            got = max(
                0.0, -np.linalg.eigvalsh(rows.reshape(n, n) / 2 + rows.reshape(n, n).T / 2)[0]
            )
        np.testing.assert_allclose(
            np.linalg.norm(got), np.linalg.norm(owner.violation()), rtol=1e-9, atol=1e-9
        )


@pytest.mark.parametrize("objective", [
    cp.huber(x[0]) + cp.sum_squares(x), cp.max(x), cp.norm2(x), cp.log_sum_exp(x), cp.sum(cp.exp(x)), cp.sum(cp.huber(x)),
    cp.norm1(cp.abs(x) + 1), cp.sum_squares(cp.pos(x)), cp.power(cp.norm(x), 3), cp.sum(cp.kl_div(x, X[:, 0])), cp.sigma_max(Z) ** 2,
], ids=str)  # fmt: skip
def test_what_has_another_form_is_named(objective):
    assert normal_form(cp.Problem(cp.Minimize(objective)), []).others


# An atom is a file: what holds of every one that is there -----------------------------------------


def test_an_expression_is_of_one_atom_at_most_and_every_atom_is_spelt_somewhere():
    spelt = set()
    for spelling in SPELLINGS:
        for part in arguments_first([spelling.declare()[0].objective.args[0]]):
            names = (
                []
                if part.is_affine()
                else [name for name, atom in ATOMS.items() if atom.recognises(part)]
            )
            assert len(names) <= 1, f"{part}: {names}"
            spelt.update(names)
    assert spelt == set(ATOMS)


@pytest.mark.parametrize("name", ATOMS)
def test_a_structure_that_does_not_name_an_atom_takes_no_problem_with_it(name):
    asked = 0
    for spelling in KNOWN:
        form = normal_form(*spelling.declare()[:2])
        held = {atom.name for atom, _ in form.present}
        if name not in held:
            continue
        asked += 1
        others = [type(ATOMS[other]) for other in held - {name}]
        with pytest.raises(MismatchError, match=ATOMS[name].words):
            only(form, *others, tied=True)
        only(form, *others, type(ATOMS[name]), tied=True)
    assert asked


def test_what_an_atom_is_not_defined_for_is_a_violation():
    p, y = cp.Parameter(3), cp.Variable(3)
    problem = cp.Problem(cp.Maximize(p @ y + cp.sum(cp.entr(y))), [cp.sum(y) == 1])
    layer = ConvexLayer(problem, [p], [y])
    assert layer.structure == "softmax"
    specialised = layer._choice.kernel
    run, given = specialised._run, [torch.zeros(1, 3, dtype=torch.float64)]
    assert specialised.infeasibility(given, None, torch.float64).item() <= 1e-15
    wrong = torch.tensor([[1.5, -0.5, 0.0]], dtype=torch.float64)
    specialised._run = lambda *arguments: run(*arguments).with_outputs(wrong)
    # Of the size of the solution, whose norm is that of (1.5, -0.5, 0).
    assert specialised.infeasibility(given, None, torch.float64).item() == pytest.approx(
        0.5 / 2.5**0.5
    )


class Positive(Elementwise):
    """f(z) = max(z, 0), as one would add it."""

    name = "positive"
    words = "positive parts"

    def recognises(self, expression):
        return (
            isinstance(expression, cp.atoms.elementwise.maximum.maximum)
            and expression.args[1].is_zero()
        )

    def read(self, expression, weight, terms):
        terms.keep(Positive, weight, terms.reader.table(expression.args[0]))

    def of(self, argument):
        return argument.clamp(min=0)


def test_an_atom_is_added_by_one_class(monkeypatch):
    target, y = cp.Parameter(3), cp.Variable(3)
    problem = cp.Problem(cp.Minimize(cp.sum_squares(y - target) + 2 * cp.sum(cp.pos(3 * y - 1))))
    with pytest.raises(MismatchError, match="which this structure does not know"):
        STRUCTURES["least_squares"].match(normal_form(problem, [target]))
    monkeypatch.setitem(ATOMS, "positive", Positive())
    form = normal_form(problem, [target])
    assert not form.others
    assert form.of(Positive).size == form.of(Square).size == 3
    randomise([y, target])
    assert objective_value(form, stacked([y]), stacked([target])) == pytest.approx(
        float(problem.objective.value)
    )
    with pytest.raises(MismatchError, match="its objective has positive parts"):
        STRUCTURES["least_squares"].match(form)
    assert ConvexLayer(problem, [target], [y]).structure == "quadratic_program"

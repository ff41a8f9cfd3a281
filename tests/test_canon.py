"""The affine map of the parameters is CVXPY's own, the way back too, and the user's problem is left
as it was."""

import tracemalloc

import cvxpy as cp
import numpy as np
import pytest
import torch
from cases import CASES, set_values
from oracles import ThreeDimensionalPowers, cone_program

import convlayer.declaration.canonicalise
import convlayer.declaration.coefficients
from convlayer import CanonicalisationError, ConvexLayer
from convlayer.declaration.affine import Reader, UnsupportedError
from convlayer.declaration.reductions import Reduced
from convlayer.paths.evaluation import evaluate

every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def dense(canonical, tensors):
    """Our (P, q, A, b, d) at these parameters."""
    entries = [p.read(t[None].double()) for p, t in zip(canonical.parameters, tensors, strict=True)]
    like, program = torch.zeros((), dtype=torch.float64), canonical.program
    data, d = evaluate(canonical, entries, False, like)
    P, A = np.zeros((program.n, program.n)), np.zeros((program.m, program.n))
    P[program.P_rows, program.P_cols] = data.P[0].numpy()
    P = P + np.triu(P, 1).T
    A[program.A_rows, program.A_cols] = data.A[0].numpy()
    whole, _ = evaluate(canonical, entries, True, like)
    np.testing.assert_array_equal(whole.P[0].numpy(), P)
    np.testing.assert_array_equal(whole.A[0].numpy(), A)
    return P, data.q[0].numpy(), A, data.b[0].numpy(), d[0, 0].item()


@every_case
def test_the_map_is_cvxpys_canonicalisation_at_any_values(case):
    canonical, declared = case.shared._canonical, case.declare()
    for seed in range(3):
        tensors = case.sample(seed=seed)
        P, q, A, b, _ = dense(canonical, tensors)
        expected = cone_program(case, declared, tensors)
        for got, reference in ((P, expected.P), (q, expected.q), (A, expected.A), (b, expected.b)):
            assert got.shape == reference.shape
            assert np.abs(got - reference).max(initial=0.0) <= 1e-12 * (
                1 + np.abs(reference).max(initial=0.0)
            )


@every_case
def test_the_cones_are_cvxpys_in_its_order(case):
    declared = case.declare()
    expected = cone_program(case, declared, case.sample(seed=0)).blocks
    blocks = case.shared._canonical.program.cones.blocks
    assert [(b.name, b.size) for b in blocks] == [(name, size) for name, size, _ in expected]
    assert [b.start for b in blocks] == np.cumsum([0, *(size for _, size, _ in expected)])[
        :-1
    ].tolist()
    for block, (name, _, parameter) in zip(blocks, expected, strict=True):
        if name in ("psd", "power"):
            assert block.parameter == pytest.approx(parameter)


@every_case
def test_variables_and_duals_are_recovered_as_cvxpy_does(case):
    """Any (x, y), not only a solution: CVXPY's own chain unpacks it."""
    declared = case.declare()
    set_values(declared, case.sample(seed=0))
    problem = cp.Problem(declared.problem.objective, declared.problem.constraints)
    _, chain, inverse = problem.get_problem_data(
        ThreeDimensionalPowers(), gp=case.gp, solver_opts={}
    )
    canonical = case.shared._canonical
    rng = np.random.default_rng(0)
    x, y = (
        np.abs(rng.standard_normal(canonical.program.n)),
        rng.standard_normal(canonical.program.m),
    )
    found = type(
        "Found",
        (),
        {"status": "Solved", "x": x, "z": y, "obj_val": 0.0, "solve_time": 0.0, "iterations": 0},
    )()
    problem.unpack_results(found, chain, inverse)
    duals = {d.id for c in problem.constraints for d in c.dual_variables}
    for variable, recovery in zip(declared.outputs, canonical.variables, strict=True):
        got = recovery.value(torch.from_numpy(x)[None], torch.from_numpy(y)[None])[0].numpy()
        projected = ("nonneg", "nonpos", "PSD", "NSD", "pos", "neg", "bounds")
        if variable.id not in duals and any(variable.attributes[a] for a in projected):
            continue  # CVXPY projects these onto their attribute, which moves what is no solution
        value = variable.value_sparse if variable.sparse_idx is not None else variable.value
        value = value.toarray() if hasattr(value, "toarray") else np.asarray(value)
        assert np.abs(got - value.reshape(got.shape)).max() <= 1e-12 * (1 + np.abs(value).max())


@every_case
def test_building_a_layer_leaves_the_users_problem_as_it_was(case):
    declared = case.declare()
    tensors = case.sample(seed=0)
    set_values(declared, tensors)
    problem = declared.problem
    before = problem.solve(solver=cp.CLARABEL, gp=case.gp)

    def state():
        values = [
            p.value_sparse.toarray() if p.sparse_idx is not None else p.value
            for p in declared.parameters
        ]
        leaves = [*problem.variables(), *(d for c in problem.constraints for d in c.dual_variables)]
        values += [
            v.value_sparse.toarray() if v.sparse_idx is not None else v.value for v in leaves
        ]
        return [np.array(v.toarray() if hasattr(v, "toarray") else v, dtype=float) for v in values]

    first = state()
    cache = problem._cache.key, problem._cache.param_prog
    layer = ConvexLayer(problem, declared.parameters, declared.outputs, gp=case.gp)
    layer(*case.sample(2, seed=5))
    for a, b in zip(first, state(), strict=True):
        assert np.array_equal(a, b)
    assert problem.status == "optimal"
    assert problem.value == before
    assert (problem._cache.key, problem._cache.param_prog) == cache
    assert problem.solve(solver=cp.CLARABEL, gp=case.gp) == pytest.approx(before, rel=1e-6)


def test_building_a_layer_needs_no_values():
    declared = CASES["quadratic_program"].declare()
    ConvexLayer(declared.problem, declared.parameters, declared.outputs)
    assert all(p.value is None for p in declared.parameters)
    assert all(v.value is None for v in declared.problem.variables())


@every_case
def test_a_user_who_changes_the_problem_afterwards_does_not_change_the_layer(case):
    declared = case.declare()
    layer = ConvexLayer(declared.problem, declared.parameters, declared.outputs, gp=case.gp)
    tensors = case.sample(seed=0)
    before = layer(*tensors)
    set_values(declared, case.sample(seed=1))
    declared.problem.solve(solver=cp.CLARABEL, gp=case.gp)
    assert all(torch.equal(a, b) for a, b in zip(before, layer(*tensors), strict=True))


# A CVXPY that canonicalises otherwise is noticed
# ------------------------------------------------------------------------


def tampered(monkeypatch, name, change):
    original = convlayer.declaration.canonicalise._maps

    def replaced(*arguments):
        program, matrices = original(*arguments)
        return program, matrices | {name: change(matrices[name].copy())}

    monkeypatch.setattr(convlayer.declaration.canonicalise, "_maps", replaced)


@pytest.mark.parametrize("name", ["P", "q", "A", "b"])
@pytest.mark.parametrize("how", ["one entry", "sign", "scale"])
def test_a_map_that_is_not_cvxpys_raises(monkeypatch, name, how):
    def change(tensor):
        if how == "one entry":
            tensor.data[len(tensor.data) // 2] += 1e-6
        elif how == "sign":
            tensor.data *= -1
        else:
            tensor.data *= 1 + 1e-7
        return tensor

    tampered(monkeypatch, name, change)
    with pytest.raises(CanonicalisationError, match="this version is not supported"):
        CASES["quadratic_program"].layer()


def test_an_offset_that_is_not_cvxpys_raises(monkeypatch):
    a, x = cp.Parameter(2, name="a"), cp.Variable(2, name="x")
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x) + cp.sum(a) + 3))
    layer = ConvexLayer(problem, [a], [x], structure="generic")
    assert float(layer.solve(torch.ones(2, dtype=torch.float64)).objective) == pytest.approx(5.0)

    def change(tensor):
        tensor.data += 1.0
        return tensor

    tampered(monkeypatch, "d", change)
    with pytest.raises(CanonicalisationError, match="offset"):
        ConvexLayer(problem, [a], [x], structure="generic")


@pytest.mark.parametrize(
    "name", ["every_cone", "posynomial", "three_dimensional", "sparse", "nearest_correlation"]
)
def test_parameters_that_are_swapped_in_the_map_raise(monkeypatch, name):
    case = CASES[name]
    original = Reduced.parameters
    if len(case.declare().parameters) < 2:
        pytest.skip("one parameter cannot be swapped")

    def swapped(*arguments):
        pairs = original(*arguments)
        return [*pairs[1:], pairs[0]]

    monkeypatch.setattr(Reduced, "parameters", swapped)
    with pytest.raises((CanonicalisationError, ValueError)):
        case.layer()


def test_a_recovery_that_is_no_gather_raises(monkeypatch):
    original = Reduced.primal

    def mixed(self, x):
        return {key: value + 0.1 * np.roll(value, 1) for key, value in original(self, x).items()}

    monkeypatch.setattr(Reduced, "primal", mixed)
    with pytest.raises(CanonicalisationError):
        CASES["quadratic_program"].layer()


# Parameters that stand in unusual places
# ----------------------------------------------------------------------------------


@pytest.mark.parametrize("structure", ["auto", "generic"])
def test_a_parameter_that_stands_nowhere_that_matters_has_a_gradient_of_zero(structure):
    a, idle, x = cp.Parameter(2, name="a"), cp.Parameter(2, name="idle"), cp.Variable(2, name="x")
    layer = ConvexLayer(
        cp.Problem(cp.Minimize(cp.sum_squares(x - a) + cp.sum(idle))),
        [a, idle],
        [x],
        structure=structure,
    )
    inputs = [torch.ones(2, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    solution = layer.solve(*inputs)
    bars = torch.autograd.grad(solution.variables[0].sum(), inputs, retain_graph=True)
    assert torch.equal(bars[1], torch.zeros(2, dtype=torch.float64))
    bars = torch.autograd.grad(solution.objective, inputs)
    assert torch.allclose(bars[1], torch.ones(2, dtype=torch.float64))


def test_a_parameter_in_objective_matrix_and_right_hand_side_at_once():
    p, x = cp.Parameter(nonneg=True, name="p"), cp.Variable(name="x")
    layer = ConvexLayer(
        cp.Problem(cp.Minimize(p * cp.square(x) - x), [p * x <= p + 1, x >= p]), [p], [x]
    )
    for value in (0.3, 1.5):
        leaf = torch.tensor(value, dtype=torch.float64, requires_grad=True)
        (found,) = layer(leaf)
        expected = max(min(1 / (2 * value), 1 + 1 / value), value)
        assert float(found) == pytest.approx(expected, rel=1e-9)
        slope = 1.0 if expected == value else -1 / (2 * value**2)
        assert float(torch.autograd.grad(found, leaf)[0]) == pytest.approx(slope, rel=1e-8)


def test_a_problem_that_stands_twice_in_two_layers_and_a_variable_named_alike():
    a = cp.Parameter(name="a")
    x, other = cp.Variable(name="x"), cp.Variable(name="x")
    layer = ConvexLayer(
        cp.Problem(cp.Minimize(cp.square(x - a) + cp.square(other + a))), [a], [other, x]
    )
    first, second = layer(torch.tensor(2.0, dtype=torch.float64))
    assert (float(first), float(second)) == pytest.approx((-2.0, 2.0))


def test_an_output_may_be_asked_for_twice():
    a, x = cp.Parameter(2, name="a"), cp.Variable(2, name="x")
    layer = ConvexLayer(cp.Problem(cp.Minimize(cp.sum_squares(x - a))), [a], [x, x])
    leaf = torch.ones(2, dtype=torch.float64, requires_grad=True)
    first, second = layer(leaf)
    (bar,) = torch.autograd.grad(first.sum() + 2 * second.sum(), leaf)
    assert torch.allclose(bar, torch.full((2,), 3.0, dtype=torch.float64))


def test_a_constraint_without_variables_or_that_stands_twice():
    a, x = cp.Parameter(2, name="a", nonneg=True), cp.Variable(2, name="x")
    above = x >= a
    layer = ConvexLayer(
        cp.Problem(cp.Minimize(cp.sum_squares(x)), [above, a >= -1, above]), [a], [x]
    )
    leaf = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
    (found,) = layer(leaf)
    assert torch.allclose(found, leaf.detach(), atol=1e-9)


# Spellings that CVXPY canonicalises its own way
# ---------------------------------------------------------------------------


def test_a_quadratic_form_of_a_parametrised_argument_stays_quadratic():
    """(x - p)'K(x - p) is DPP although its constant is quadratic in p."""
    x, p, K = cp.Variable(3, name="x"), cp.Parameter(3, name="p"), np.eye(3) + 0.3
    S = cp.Parameter((3, 3), PSD=True, name="S")
    value = torch.tensor([1.0, -1.0, 2.0], dtype=torch.float64, requires_grad=True)
    for problem, parameters, values in (
        (cp.Problem(cp.Minimize(cp.quad_form(x - p, K) + cp.sum(x)), [x >= 0]), [p], (value,)),
        (
            cp.Problem(cp.Maximize(-2 * cp.quad_form(x - p, K) - cp.quad_form(x, S))),
            [p, S],
            (value, torch.eye(3, dtype=torch.float64)),
        ),
    ):
        layer = ConvexLayer(problem, parameters, [x])
        for parameter, given in zip(parameters, values, strict=True):
            parameter.value = given.detach().numpy()
        problem.solve(solver=cp.CLARABEL, tol_gap_abs=1e-12, tol_gap_rel=1e-12)
        solution = layer.solve(*values)
        assert np.abs(solution.variables[0].detach().numpy() - x.value).max() < 1e-7
        assert float(solution.objective.detach()) == pytest.approx(problem.value, rel=1e-8)
        assert all(
            block.name in ("zero", "nonnegative") for block in layer._canonical.program.cones.blocks
        )
        assert torch.autograd.gradcheck(
            lambda a, layer=layer, rest=values[1:]: layer(a, *rest)[0], (value,)
        )


def test_a_perspective_is_canonicalised():
    t, z, r = cp.Variable(name="t"), cp.Variable(nonneg=True, name="z"), cp.Parameter(name="r")
    problem = cp.Problem(
        cp.Minimize(cp.perspective(cp.square(t), z) + cp.square(z - r) + cp.square(t - 1))
    )
    layer, r.value = ConvexLayer(problem, [r], [t, z]), 1.0
    problem.solve(solver=cp.CLARABEL, tol_gap_abs=1e-13, tol_gap_rel=1e-13, tol_feas=1e-13)
    for got, variable in zip(layer(torch.tensor(1.0, dtype=torch.float64)), (t, z), strict=True):
        assert float(got) == pytest.approx(float(variable.value), abs=1e-5)


def test_a_declared_sign_holds_to_the_last_bit():
    a, x, y = (
        cp.Parameter(50, name="a"),
        cp.Variable(50, nonneg=True, name="x"),
        cp.Variable(50, nonpos=True, name="y"),
    )
    layer = ConvexLayer(
        cp.Problem(cp.Minimize(cp.sum_squares(x - a) + cp.sum_squares(y - a))), [a], [x, y]
    )
    x_star, y_star = layer(
        torch.randn(20, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    )
    assert float(x_star.min()) >= 0
    assert float(y_star.max()) <= 0


# Coefficients are stored where they are
# ------------------------------------------------------------------------


@every_case
def test_nothing_of_these_is_left_to_cvxpys_matrices(case):
    assert not case.shared._canonical.stuffed
    assert "Building" not in case.shared.explain()


def test_a_product_in_three_dimensions_is_left_to_cvxpys_matrices_and_named():
    C, X = cp.Parameter((2, 3, 4), name="C"), cp.Variable((2, 4, 3), name="X")
    x = cp.Variable(3, name="x")
    rules = [C @ X <= 1, cp.sum(X) + cp.sum(x) == 1]
    problem = cp.Problem(cp.Minimize(cp.sum_squares(X) + cp.sum_squares(x)), rules)
    layer = ConvexLayer(problem, [C], [X], structure="generic")
    assert "C @ X" in layer.explain()
    value = torch.randn(2, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    (found,) = layer(value)
    C.value = value.numpy()
    problem.solve(solver=cp.CLARABEL, tol_gap_abs=1e-12, tol_gap_rel=1e-12, tol_feas=1e-12)
    np.testing.assert_allclose(found.numpy(), X.value, atol=1e-7)


def test_an_objective_that_is_not_read_is_taken_from_cvxpys_matrices(monkeypatch):
    def refuse(*_):
        raise UnsupportedError("not today")

    case = CASES["quadratic_program"]
    expected = dense(case.shared._canonical, case.sample(seed=0))
    monkeypatch.setattr(convlayer.declaration.coefficients, "_objective", refuse)
    monkeypatch.setattr(Reader, "table", refuse)
    canonical = case.layer(structure="generic")._canonical
    assert len(canonical.stuffed) == 1 + len(case.declare().problem.constraints)
    for got, wanted in zip(dense(canonical, case.sample(seed=0)), expected, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-14, atol=0)


def data_matrix(m):
    A, w = cp.Parameter((m, 5), name="A"), cp.Variable(5, name="w")
    loss = cp.sum(cp.logistic(A @ w)) + cp.sum_squares(w)
    return cp.Problem(cp.Minimize(loss)), [A], [w]


def table_of_costs(m):
    C, X = cp.Parameter((m, 10), name="C"), cp.Variable((m, 10), name="X")
    return cp.Problem(cp.Minimize(cp.sum(cp.multiply(C, X))), [X >= 0, cp.sum(X) == 1]), [C], [X]


@pytest.mark.parametrize("declared", [data_matrix, table_of_costs])
def test_memory_to_build_grows_with_the_entries(declared):
    """Four times the rows: CVXPY's own tensors take sixteen times the memory."""
    peaks = []
    for m in (500, 500, 2000):
        problem, parameters, variables = declared(m)
        tracemalloc.start()
        ConvexLayer(problem, parameters, variables, structure="generic")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[2] <= 6 * peaks[1]

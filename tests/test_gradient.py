"""On every case: the KKT residual vanishes, value and duals are CVXPY's, the gradient is that of
differences."""

import numpy as np
import pytest
import torch
from cases import CASES, FIVE_POINT, leaves, outputs_of, relative, set_values, weights
from oracles import cone_program, kkt_violation, solve_with_cvxpy

from convlayer import ConvexLayer

SEEDS = (0, 1, 2)
STEP = 2e-4  # of the way to another sample: symmetry, pattern and domain are kept

every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@every_case
def test_the_recomputed_kkt_residual_vanishes_on_cvxpys_own_cone_program(case):
    declared = case.declare()
    for seed in SEEDS:
        tensors = case.sample(seed=seed)
        solution = case.shared.solve(*tensors)
        program = cone_program(case, declared, tensors)
        x, s, y = (part[0].numpy() for part in solution.iterate)
        assert kkt_violation(program, x, s, y) < 1e-11
        assert float(solution.residual) < 1e-11


@every_case
def test_variables_duals_and_value_are_those_of_cvxpys_own_solve(case):
    """To the root of its tolerance: so far is an interior point from the solution where the
    objective is flat."""
    declared = case.declare()
    for seed in SEEDS:
        tensors = case.sample(seed=seed)
        solution = case.shared.solve(*tensors)
        expected, value, tolerance = solve_with_cvxpy(case, declared, tensors)
        for got, reference in zip(solution.variables, expected, strict=True):
            assert got.shape == reference.shape
            assert np.abs(got.numpy() - reference).max() <= 3 * tolerance**0.5 * (
                1 + np.abs(reference).max()
            )
        assert float(solution.objective) == pytest.approx(value, rel=1e-7, abs=1e-7)


@every_case
def test_the_value_is_the_users_objective_at_the_users_variables(case):
    declared = case.declare()
    variables = declared.problem.variables()
    if any(v.sparse_idx is not None or v.attributes["diag"] for v in variables):
        pytest.skip("CVXPY evaluates no expression of a variable stored sparsely")
    tensors = case.sample(seed=3)
    solution = ConvexLayer(declared.problem, declared.parameters, variables, gp=case.gp).solve(
        *tensors
    )
    set_values(declared, tensors)
    for variable, value in zip(variables, solution.variables, strict=True):
        variable.save_value(value.numpy())
    expected = float(declared.problem.objective.expr.value)
    assert float(solution.objective) == pytest.approx(expected, rel=1e-10, abs=1e-10)


def differences(layer, cotangents, tensors, moves, step):
    """Five-point differences (len(moves),) along moves, each of (parameter, direction); all the
    points are one batch."""
    values = [t.expand(len(moves), len(FIVE_POINT), *t.shape).clone() for t in tensors]
    places = torch.tensor(list(FIVE_POINT), dtype=torch.float64)
    for row, (k, direction) in enumerate(moves):
        values[k][row] += step * places.view(-1, *[1] * direction.dim()) * direction
    with torch.no_grad():
        outputs = outputs_of(layer, values)
    found = sum(
        (w * o).reshape(*o.shape[:2], -1).sum(2) for w, o in zip(cotangents, outputs, strict=True)
    )
    return (found @ torch.tensor(list(FIVE_POINT.values()), dtype=torch.float64) / step).tolist()


@every_case
def test_the_gradient_of_variables_duals_and_value_is_that_of_five_point_differences(case):
    """Each parameter moves alone, so that none hides behind another, along a direction that keeps
    its domain."""
    layer = case.shared
    moved = [False] * len(case.sample())
    for seed in SEEDS:
        tensors, others = case.sample(seed=seed), case.sample(seed=seed + 100)
        inputs = leaves(tensors)
        outputs = outputs_of(layer, inputs)
        cotangents = weights(outputs)
        gradients = torch.autograd.grad(outputs, inputs, cotangents)
        moves = [b - a for a, b in zip(tensors, others, strict=True)]
        size = max(float(g.norm() * d.norm()) for g, d in zip(gradients, moves, strict=True))
        wides, narrows = (
            differences(layer, cotangents, tensors, list(enumerate(moves)), h)
            for h in (STEP, STEP / 2)
        )
        for k, (gradient, move, wide, narrow) in enumerate(
            zip(gradients, moves, wides, narrows, strict=True)
        ):
            unit = max(abs(narrow), 1e-2 * float(gradient.norm() * move.norm()), 1e-3 * size)
            assert abs(wide - narrow) <= 1e-6 * unit, (
                f"parameter {k}, seed {seed}: differences do not converge here"
            )
            got = float((gradient * move).sum())
            assert abs(got - narrow) <= 1e-6 * unit, (
                f"parameter {k}, seed {seed}: {got} against {narrow}"
            )
            moved[k] |= abs(narrow) > 1e-3 * size
    assert all(moved), "a parameter that moves nothing at any seed tests nothing"


@every_case
@pytest.mark.parametrize("scale", [2.0**-30, 2.0**30])  # powers of two: nothing rounds otherwise
def test_a_scaled_loss_scales_the_gradient_exactly(case, scale):
    inputs = leaves(case.sample(seed=1))
    outputs = outputs_of(case.shared, inputs)
    cotangents = weights(outputs)
    plain = torch.autograd.grad(outputs, inputs, cotangents, retain_graph=True)
    scaled = torch.autograd.grad(outputs, inputs, [scale * w for w in cotangents])
    for a, b in zip(plain, scaled, strict=True):
        assert relative(b / scale, a) < 1e-12


SYMMETRIC = [
    name
    for name, case in CASES.items()
    if any(p.attributes[a] for p in case.declare().parameters for a in ("symmetric", "PSD", "NSD"))
]


@pytest.mark.parametrize("case", [CASES[name] for name in SYMMETRIC], ids=SYMMETRIC)
def test_a_symmetric_parameter_has_a_symmetric_gradient_that_is_right_along_every_symmetric_direction(
    case,
):
    layer, declared = case.shared, case.declare()
    tensors = case.sample(seed=1)
    inputs = leaves(tensors)
    outputs = outputs_of(layer, inputs)
    cotangents = weights(outputs)
    gradients = torch.autograd.grad(outputs, inputs, cotangents)
    size = max(float(g.norm()) for g in gradients)

    for k, (parameter, gradient) in enumerate(zip(declared.parameters, gradients, strict=True)):
        if not any(parameter.attributes[a] for a in ("symmetric", "PSD", "NSD")):
            continue
        assert torch.equal(gradient, gradient.mT)
        n = parameter.shape[0]
        directions = torch.zeros(n * (n + 1) // 2, n, n, dtype=torch.float64)
        i, j = torch.tril_indices(n, n)
        row = torch.arange(len(directions))
        directions[row, i, j] = directions[row, j, i] = 1.0
        moves = [(k, direction) for direction in directions]
        for direction, expected in zip(
            directions, differences(layer, cotangents, tensors, moves, 5e-4), strict=True
        ):
            got = float((gradient * direction).sum())
            assert abs(got - expected) <= 1e-6 * max(
                abs(expected), float(gradient.norm()), 1e-3 * size
            )


@every_case
def test_an_output_that_the_loss_does_not_use_adds_nothing(case):
    """Each output alone, added up, is all of them together."""
    inputs = leaves(case.sample(seed=2))
    outputs = outputs_of(case.shared, inputs)
    cotangents = weights(outputs)
    together = torch.autograd.grad(outputs, inputs, cotangents, retain_graph=True)
    alone = [
        torch.autograd.grad(o, inputs, w, retain_graph=True)
        for o, w in zip(outputs, cotangents, strict=True)
    ]
    for k, total in enumerate(together):
        assert relative(sum(parts[k] for parts in alone), total) < 1e-10

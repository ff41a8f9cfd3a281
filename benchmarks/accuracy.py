"""Solution and gradient errors over problems of every cone, with default settings, ours and the
peer's.

Solution:  relative error of the variables against an oracle or, where there is none, CVXPY by a
           tight solver.
KKT:       residual of our canonical point in CVXPY's own matrices.
Gradient:  of a random linear functional of the variables, along random directions, against 5-point
           differences of the oracle or, where there is none, of our own solutions (which the KKT
           residual certifies). Where two step sizes disagree the functional has a kink or moves too
           little to be measured: such rows are left out, and counted.
Value:     the same for the optimal objective, ours alone (the peer does not return it), against
           differences of our own.
"""

from __future__ import annotations

import math
import statistics
import warnings
from collections.abc import Callable, Iterable

import cvxpy as cp
import numpy as np
import torch
from torch import Tensor

from benchmarks.cases import CASES
from benchmarks.certificate import kkt_residual
from benchmarks.peer import MISSING, peer_layer
from benchmarks.table import Family, Options, Row
from convlayer import ConvexLayer
from convlayer.declaration.canonicalise import canonicalise
from convlayer.problems import Declared, Prebuilt

ROWS, DIRECTIONS, STEP = 4, 4, 4e-4
POINTS = (-4, -2, -1, 1, 2, 4)  # in half steps
FIVE_POINT = {-2: 1 / 12, -1: -2 / 3, 1: 2 / 3, 2: -1 / 12}
AGREE = 1e-7  # relative difference of the two step sizes' results
SOLUTION, GRADIENT = "solution", "gradient"
CONES = {"zero", "nonnegative", "second_order", "psd", "exponential", "power"}
Variables = tuple[Tensor, ...]


def family(options: Options) -> Family:
    names = list(CASES)[::4] if options.quick else list(CASES)
    return Family(
        "accuracy",
        "Relative errors with default settings: the worst of four instances a problem. "
        "`vs` names the reference of the solution; `kinks` counts pairs of instance and direction left out.",
        [(name, lambda name=name: measure(CASES[name], options)) for name in names],
        summary,
    )


def measure(case: Prebuilt, options: Options) -> Iterable[Row]:
    declared, tensors = case(), case.sample(ROWS, 0)
    gp = not declared.problem.is_dcp()
    layer = ConvexLayer(
        declared.problem, declared.parameters, declared.variables, gp=gp, structure="generic"
    )
    exact, source = _reference(case, declared, tensors)
    expected, slopes = differences(case, layer, tensors)
    row = Row(
        case.name,
        {
            "cones": ", ".join(
                sorted({block.name for block in _program(declared, gp).cones.blocks})
            ),
            "vs": source,
        },
        {SOLUTION: ("<=", 1e-8), GRADIENT: ("<=", 1e-6), "value": ("<=", 1e-6)},
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")

        def ours(*leaves: Tensor) -> Variables:
            return tuple(x.cpu() for x in layer(*(leaf.to(options.device) for leaf in leaves)))

        error, gradient = (
            solution_error(ours, tensors, exact),
            gradient_error(ours, tensors, *expected),
        )
        solution = layer.solve(*tensors)
        value = gradient_error(
            lambda *leaves: (layer.solve(*leaves).objective,), tensors, (torch.ones(ROWS),), slopes
        )
        kkt = [
            kkt_residual(
                declared,
                [t[k].numpy() for t in tensors],
                *(part[k].numpy() for part in solution.iterate),
            )
            for k in range(ROWS)
        ]
        row.figures |= {
            SOLUTION: error,
            "KKT": float(max(kkt)),
            GRADIENT: gradient,
            "value": value,
            "kinks": int((~expected[1][2]).sum()),
        }
        row.figures |= _peer(case, tensors, exact, *expected)
    yield row


def summary(rows: list[Row]) -> Iterable[Row]:
    """Median and worst over the problems, and whether every cone was there."""
    measured = [row for row in rows if not row.error]
    columns = (SOLUTION, "KKT", GRADIENT, "value", "peer solution", "peer gradient")
    for name, reduce in (("median", statistics.median), ("worst", max)):
        figures = {
            c: reduce(v)
            for c in columns
            if (v := [r.figures[c] for r in measured if math.isfinite(_number(r.figures.get(c)))])
        }
        yield Row(name, figures, {SOLUTION: ("<=", 1e-8), GRADIENT: ("<=", 1e-6)})
    failed = [
        row
        for row in measured
        if "peer solution" in row.figures
        and not math.isfinite(_number(row.figures.get("peer gradient")))
    ]
    yield Row("the peer has no finite gradient", {"problems": len(failed)})
    seen = {cone for row in measured for cone in row.figures["cones"].split(", ")}
    yield Row(
        "problems",
        {
            "cones": "all" if seen >= CONES else "missing " + ", ".join(CONES - seen),
            "problems": len(measured),
            "errors": len(rows) - len(measured),
        },
        {"problems": (">=", 24), "errors": ("<=", 0)},
    )


def _number(figure: object) -> float:
    return figure if isinstance(figure, float) else math.nan


def _program(declared: Declared, gp: bool):
    return canonicalise(declared.problem, declared.parameters, declared.variables, gp=gp).program


def _reference(case: Prebuilt, declared: Declared, tensors: Variables) -> tuple[Variables, str]:
    try:
        return case.oracle(*tensors), "oracle"
    except NotImplementedError:
        return _tight(declared, tensors), "tight CVXPY"


def _tight(declared: Declared, tensors: Variables) -> Variables:
    """CVXPY's solution by Clarabel, as tight as it still calls solved."""
    rows = []
    for k in range(ROWS):
        for parameter, tensor in zip(declared.parameters, tensors, strict=True):
            parameter.value = tensor[k].numpy()
        for tolerance in (1e-14, 1e-13, 1e-12, 1e-11, 1e-10):
            declared.problem.solve(
                cp.CLARABEL, tol_gap_abs=tolerance, tol_gap_rel=tolerance, tol_feas=tolerance
            )
            if declared.problem.status == cp.OPTIMAL:
                break
        rows.append([torch.as_tensor(np.array(v.value, dtype=float)) for v in declared.variables])
    return tuple(map(torch.stack, zip(*rows, strict=True)))


def differences(case: Prebuilt, layer: ConvexLayer, tensors: Variables):
    """Expected (directions, derivatives, which to keep): of the functional, with its weights, and
    of the value."""
    directions = [
        tuple(b - a for a, b in zip(tensors, case.sample(ROWS, seed), strict=True))
        for seed in range(1, DIRECTIONS + 1)
    ]
    # All points of all directions in one batch: (rows, directions, points).
    moved = [
        torch.stack(
            [torch.stack([t + k * STEP / 2 * d[i] for k in POINTS], 1) for d in directions], 1
        )
        for i, t in enumerate(tensors)
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        solution = layer.solve(*moved)
    try:
        variables = case.oracle(*moved)
    except NotImplementedError:
        variables = solution.variables
    generator = torch.Generator().manual_seed(100)
    weights = tuple(
        torch.randn((ROWS, *v.shape[3:]), generator=generator, dtype=torch.float64)
        for v in variables
    )
    functional = sum(
        (w[:, None, None] * v).reshape(ROWS, DIRECTIONS, len(POINTS), -1).sum(-1)
        for w, v in zip(weights, variables, strict=True)
    )
    return (weights, (directions, *slopes(functional))), (directions, *slopes(solution.objective))


def slopes(values: Tensor) -> tuple[Tensor, Tensor]:
    """(rows, directions, points) -> 5-point derivatives, and where two step sizes agree, (rows,
    directions) each."""
    at = {k: values[..., i] for i, k in enumerate(POINTS)}
    coarse, fine = (
        sum(c * at[factor * k] for k, c in FIVE_POINT.items()) / (factor * STEP / 2)
        for factor in (2, 1)
    )
    size = fine.abs().amax(1, keepdim=True).clamp(min=1e-12)
    return fine, (coarse - fine).abs() <= AGREE * size


def solution_error(layer: Callable[..., Variables], tensors: Variables, exact: Variables) -> float:
    """The worst row's relative error of all variables together."""
    with torch.no_grad():
        got = layer(*tensors)
    error = sum(_flat(x - e).square().sum(1) for x, e in zip(got, exact, strict=True))
    return float((error / sum(_flat(e).square().sum(1) for e in exact)).sqrt().max())


def gradient_error(
    layer: Callable[..., Variables], tensors: Variables, weights: Variables, expected
) -> float:
    """The worst row's error over its directions, in units of its derivative."""
    directions, slopes, kept = expected
    leaves = [t.clone().requires_grad_() for t in tensors]
    gradients = torch.autograd.grad(layer(*leaves), leaves, weights, allow_unused=True)
    got = torch.stack(
        [
            sum(
                _flat(g * d).sum(1)
                for g, d in zip(gradients, direction, strict=True)
                if g is not None
            )
            for direction in directions
        ],
        1,
    )
    difference = torch.where(kept, got - slopes, 0.0).norm(dim=1)
    sizes = torch.where(kept, slopes, 0.0).norm(dim=1)
    # Where a row's derivative is zero, rounding of the others' size is no error.
    floor = max(1e-12, 1e-9 * float(sizes.max()))
    return float((difference / sizes.clamp(min=floor)).max())


def _peer(
    case: Prebuilt, tensors: Variables, exact: Variables, weights: Variables, expected
) -> dict[str, float | str]:
    try:
        layer = peer_layer(case())
        if layer is None:
            return {"peer solution": MISSING}
        figures = {"peer solution": solution_error(layer, tensors, exact)}
    except Exception as error:  # the peer's failure is a finding
        return {"peer solution": f"refused: {type(error).__name__}"}
    try:
        return {**figures, "peer gradient": gradient_error(layer, tensors, weights, expected)}
    except Exception as error:
        return {**figures, "peer gradient": f"refused: {type(error).__name__}"}


def _flat(t: Tensor) -> Tensor:
    return t.reshape(len(t), -1)

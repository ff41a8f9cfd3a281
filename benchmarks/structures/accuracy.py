"""Errors of every kernel through its layer, with the reference of the generic suite's accuracy, and
40 digits for transports."""

from __future__ import annotations

import warnings
from inspect import signature

import torch
from torch import Tensor

from benchmarks.accuracy import DIRECTIONS, POINTS, STEP, gradient_error, slopes, solution_error
from benchmarks.structures.exact_transport import transport
from benchmarks.structures.tasks import Task, Variables, weights_of
from benchmarks.structures.timing import Run
from benchmarks.table import Family, Options, Row
from convlayer.problems import PROBLEMS, Prebuilt

SOLUTION, GRADIENT = "solution", "gradient"
WANTED = {SOLUTION: ("<=", 1e-10), GRADIENT: ("<=", 1e-8)}
ROWS = 4
TASKS = [
    Task("least_squares", "least_squares", ROWS, (100, 50)),
    Task("least_squares", "least_squares", ROWS, (20, 10)),
    Task("ridge", "least_squares", ROWS, (30, 20)),
    Task("equality_constrained_qp", "equality_constrained_qp", ROWS, (50, 20)),
    Task("constrained_least_squares", "equality_constrained_qp", ROWS, (40, 20, 5)),
    Task("entropic_optimal_transport", "entropic_optimal_transport", ROWS, (25, 25)),
    Task("total_variation", "total_variation", ROWS, (50,)),
    Task("leading_eigenvector", "leading_eigenspace", ROWS, (8,)),
    Task("leading_eigenvector", "leading_eigenspace", ROWS, (32,)),
    Task("ky_fan_subspace", "leading_eigenspace", ROWS, (12, 2)),
    Task("softmax", "softmax", ROWS, (1000,)),
    Task("sparsemax", "sparsemax", ROWS, (100,)),
    Task("simplex_projection", "sparsemax", ROWS, (100,)),
]
TEMPERATURES, SHAPE = (1.0, 1e-1, 1e-2, 1e-3), (10, 12)


def family(options: Options) -> Family:
    tasks = [
        (task.name, lambda task=task: [measure(task, options)])
        for task in (TASKS[::4] if options.quick else TASKS)
    ]
    for eps in TEMPERATURES[:2] if options.quick else TEMPERATURES:
        tasks.append((f"transport at {eps:g}", lambda eps=eps: [temperature(eps, options)]))
    return Family(
        "accuracy",
        f"Relative errors through the layer, the worst of {ROWS} rows. Solutions: against the library's oracle. Gradients: of a "
        "random functional along random directions against 5-point differences of the oracle; `kinks` counts pairs of row and "
        "direction where two steps disagree, left out. Transports by temperature: against 40 digits, each parameter's "
        "gradient in units of its own, which at 1e-3 may be as small as 1e-8.",
        tasks,
    )


def measure(task: Task, options: Options) -> Row:
    case, layer, tensors = (
        PROBLEMS[task.problem],
        task.layer(),
        task.data(Options(options.quick, torch.device("cpu"))),
    )

    def ours(*leaves: Tensor) -> tuple[Tensor, ...]:
        return tuple(
            x.cpu() for x in layer(*(leaf.to(options.device, options.dtype) for leaf in leaves))
        )

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sizes = dict(zip(signature(case).parameters, task.sizes, strict=True))
        exact = case.oracle(*tensors, **sizes)
        weights, expected = weights_of(exact), differences(case, tensors, sizes)
        figures = {
            SOLUTION: solution_error(ours, tensors, exact),
            GRADIENT: gradient_error(ours, tensors, weights, expected),
            "kinks": int((~expected[2]).sum()),
        }
    return Row(task.name, figures, WANTED)


def differences(
    case: Prebuilt, tensors: Variables, sizes: dict[str, int]
) -> tuple[list[Variables], Tensor, Tensor]:
    """Directions, the derivatives of the functional along them, (rows, directions), and which of
    those are to be kept."""
    others = [case.sample(ROWS, seed, **sizes) for seed in range(1, DIRECTIONS + 1)]
    directions = [tuple(b - a for a, b in zip(tensors, other, strict=True)) for other in others]
    values = []
    for direction in directions:
        at = [
            case.oracle(*(t + k * STEP / 2 * d for t, d in zip(tensors, direction)), **sizes)
            for k in POINTS
        ]
        weights = weights_of(at[0])
        values.append(
            torch.stack(
                [sum((w * x).flatten(1).sum(1) for w, x in zip(weights, xs)) for xs in at], -1
            )
        )
    return directions, *slopes(torch.stack(values, 1))


def temperature(eps: float, options: Options) -> Row:
    """Solution, and the gradient of all parameters together and of each in units of its own, the
    worst row."""
    task = Task("entropic_optimal_transport", "entropic_optimal_transport", ROWS, SHAPE, eps)
    tensors = task.data(Options(options.quick, torch.device("cpu")))
    run = Run(task.layer(), tuple(t.to(options.device, options.dtype) for t in tensors))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run()
    (V,) = weights_of((torch.empty(ROWS, *SHAPE, dtype=torch.float64),))
    solution, gradient, parts = [], [], []
    for k in range(ROWS):
        M, r, c, eps = (t[k].numpy() for t in tensors)
        plan, exact = transport(M, r, c, float(eps), V[k].numpy())
        solution.append(_relative([run.outputs[0][k]], [torch.from_numpy(plan)]))
        bars, exactly = (
            [bar[k] for bar in run.gradients if bar is not None],
            [torch.from_numpy(e) for e in exact],
        )
        parts.append([_relative([got], [e]) for got, e in zip(bars, exactly, strict=True)])
        gradient.append(max(parts[-1]))
    figures = {SOLUTION: max(solution), GRADIENT: max(gradient)}
    for name, errors in zip(("M", "r", "c", "eps"), zip(*parts, strict=True), strict=True):
        figures[f"gradient of {name}"] = max(errors)
    return Row(task.name, figures, WANTED)


def _relative(got: list[Tensor], exact: list[Tensor]) -> float:
    error = sum((g.cpu().double() - e).square().sum() for g, e in zip(got, exact, strict=True))
    return float((error / sum(e.square().sum() for e in exact)) ** 0.5)

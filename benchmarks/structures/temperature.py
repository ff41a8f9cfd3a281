"""Entropy on the simplex at a low temperature, against the closed form in 40 digits.

    maximise    y'x + tau sum entr(x)
    subject to  1'x = 1

with tau = 0.01 and y of standard deviation 0.1, so that the solution is near a vertex and its gradient is small but not zero.
"""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Iterable

import cvxpy as cp
import mpmath as mp
import torch
from torch import Tensor

from benchmarks.structures.rivals import CVXPYLAYERS, INCUMBENTS, MOREAU, incumbent
from benchmarks.structures.tasks import weights_of
from benchmarks.structures.timing import Run, reason
from benchmarks.table import Family, Options, Row
from convlayer import ConvexLayer
from convlayer.problems import Declared

ROWS, N, TAU, SPREAD = 64, 10, 0.01, 0.1
SOLUTION, GRADIENT, FAR = "solution, worst", "gradient, worst", "rows off by 10 %"


def family(options: Options) -> Family:
    return Family(
        "temperature",
        f"Softmax at temperature {TAU:g}, {ROWS} rows of {N}: relative errors of the solution, and of the gradient of y in units of "
        f"that row's gradient; and how many rows of the gradient are off by more than 10 %.",
        [(name, lambda name=name: [measure(name, options)]) for name in ("ours", CVXPYLAYERS, MOREAU)],
        summary,
    )


def declare() -> Declared:
    y, tau, x = cp.Parameter(N, name="y"), cp.Parameter(nonneg=True, name="tau"), cp.Variable(N, name="x")
    problem = cp.Problem(cp.Maximize(y @ x + tau * cp.sum(cp.entr(x))), [cp.sum(x) == 1])
    return Declared("softmax", problem, (y, tau), (x,))


def measure(name: str, options: Options) -> Row:
    declared = declare()
    y = SPREAD * torch.randn(ROWS, N, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    tensors = (y, torch.full((ROWS,), TAU, dtype=torch.float64))
    solution, gradient = closed_form(y)
    wanted = {SOLUTION: ("<=", 1e-10), GRADIENT: ("<=", 1e-8)} if name == "ours" else {}
    row = Row(name, wanted=wanted)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            if name in INCUMBENTS:
                run = Run(incumbent(name, declared), tensors)
            else:
                layer = ConvexLayer(declared.problem, declared.parameters, declared.variables)
                if layer.structure != "softmax":
                    raise ValueError(f"the layer took {layer.structure}")
                run = Run(layer, tuple(t.to(options.device) for t in tensors))
            run()
        except Exception as error:
            if name not in INCUMBENTS:
                raise
            row.figures = {SOLUTION: reason(error)}
            return row
    found = run.gradients[0]
    assert found is not None
    x_error, g_error = _relative(run.outputs[0], solution), _relative(found, gradient)
    row.figures = {
        SOLUTION: max(x_error),
        "solution, median": statistics.median(x_error),
        GRADIENT: max(g_error),
        "gradient, median": statistics.median(g_error),
        FAR: sum(error > 0.1 for error in g_error),
    }
    return row


def summary(rows: list[Row]) -> Iterable[Row]:
    return []


def closed_form(y: Tensor) -> tuple[Tensor, Tensor]:
    """x = softmax(y / tau), and y_bar = x o (w - w'x) / tau for the common cotangents w."""
    w = weights_of((y,))[0]
    solution, gradient = [], []
    with mp.workdps(40):
        tau = mp.mpf(TAU)
        for y_row, w_row in zip(y.tolist(), w.tolist(), strict=True):
            powers = [mp.exp(mp.mpf(entry) / tau) for entry in y_row]
            x = [power / mp.fsum(powers) for power in powers]
            mean = mp.fdot(x, w_row)
            solution.append([float(entry) for entry in x])
            gradient.append([float(a * (b - mean) / tau) for a, b in zip(x, w_row, strict=True)])
    return torch.tensor(solution, dtype=torch.float64), torch.tensor(gradient, dtype=torch.float64)


def _relative(got: Tensor, exact: Tensor) -> list[float]:
    return ((got.cpu().double() - exact).norm(dim=1) / exact.norm(dim=1)).tolist()

"""Entropy on the simplex at a low temperature, against the closed form in 40 digits.

    maximise    y'x + tau sum entr(x)
    subject to  1'x = 1

with tau = 0.01 and y of standard deviation 0.1, so that the solution is near a vertex and its
gradient is small but not zero.
"""

from __future__ import annotations

import statistics
import warnings

import cvxpy as cp
import mpmath as mp
import torch
from torch import Tensor

from benchmarks.structures.rivals import CVXPYLAYERS, INCUMBENTS, MOREAU, incumbent
from benchmarks.structures.tasks import weights_of
from benchmarks.structures.timing import Run
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
        [
            (name, lambda name=name: [measure(name, options)])
            for name in ("ours", CVXPYLAYERS, MOREAU)
        ],
    )


def declare() -> Declared:
    y, tau, x = (
        cp.Parameter(N, name="y"),
        cp.Parameter(nonneg=True, name="tau"),
        cp.Variable(N, name="x"),
    )
    problem = cp.Problem(cp.Maximize(y @ x + tau * cp.sum(cp.entr(x))), [cp.sum(x) == 1])
    return Declared("softmax", problem, (y, tau), (x,))


def measure(name: str, options: Options) -> Row:
    declared = declare()
    y = SPREAD * torch.randn(
        ROWS, N, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    tensors = (y, torch.full((ROWS,), TAU, dtype=torch.float64))
    (w,) = weights_of((y,))
    solution, gradient = closed_form(y, w)
    wanted = {SOLUTION: ("<=", 1e-10), GRADIENT: ("<=", 1e-8)} if name == "ours" else {}
    layer = incumbent(name, declared) if name in INCUMBENTS else ours(declared)
    device = torch.device("cpu") if name in INCUMBENTS else options.device
    x_error, g_error, failed = [], [], 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for k in range(ROWS):  # one at a time: a peer that fails in one row fails in all of a batch
            run = Run(
                layer,
                tuple(t[k : k + 1].to(device) for t in tensors),
                weights=(w[k : k + 1].to(device),),
            )
            try:
                run()
            except Exception:
                if name not in INCUMBENTS:
                    raise
                failed += 1
            x_error += [_relative(x[0], solution[k]) for x in run.outputs]
            g_error += [_relative(g[0], gradient[k]) for g in run.gradients[:1] if g is not None]
    figures = {
        SOLUTION: max(x_error),
        "solution, median": statistics.median(x_error),
        GRADIENT: max(g_error),
        "gradient, median": statistics.median(g_error),
        FAR: sum(error > 0.1 for error in g_error),
        "rows that fail": failed,
    }
    return Row(name, figures, wanted)


def ours(declared: Declared) -> ConvexLayer:
    layer = ConvexLayer(declared.problem, declared.parameters, declared.variables)
    if layer.structure != "softmax":
        raise ValueError(f"the layer took {layer.structure}")
    return layer


def closed_form(y: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """x = softmax(y / tau), and y_bar = x o (w - w'x) / tau for the cotangents w."""
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


def _relative(got: Tensor, exact: Tensor) -> float:
    return float((got.cpu().double() - exact).norm() / exact.norm())

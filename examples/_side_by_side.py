"""What the examples share: two layers of one problem, timed in turn and compared, and the look of a
picture."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cvxpy as cp
import matplotlib
import torch
from threadpoolctl import threadpool_limits
from torch import Tensor

from convlayer import ConvexLayer

matplotlib.use("Agg")
from matplotlib import pyplot as plt

BEFORE, AFTER, TRUTH = "#c8763a", "#1f6f8b", "#777777"
plt.rcParams.update(
    {
        "font.size": 12,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlelocation": "left",
        "axes.titlesize": 13,
        "axes.titleweight": "bold",
        "legend.frameon": False,
        "savefig.dpi": 120,
    }
)


def side_by_side(
    problem: cp.Problem,
    parameters: Sequence[cp.Parameter],
    variables: Sequence[cp.Variable],
    *tensors: Tensor,  # one a parameter, at which the two are compared
) -> ConvexLayer:
    """The layer on the path it chose, after printing how it compares with the cone program on these
    tensors."""
    threadpool_limits(1, user_api="openmp")  # such small matrices are not worth sharing
    layer = ConvexLayer(problem, parameters, variables)
    generic = ConvexLayer(problem, parameters, variables, solver="clarabel")
    leaves = [t.detach().requires_grad_() for t in tensors]
    times: list[list[float]] = [[], []]
    for k in range(6):
        for mine, path in zip(times, (layer, generic), strict=True):
            start = time.perf_counter()
            torch.autograd.grad(sum(x.square().sum() for x in path(*leaves)), leaves)
            if k:  # the first is a warm-up
                mine.append(1e3 * (time.perf_counter() - start))
    ours, theirs = map(statistics.median, times)
    print(
        f"{layer.structure}: {ours:.2f} ms; cone program by Clarabel: {theirs:.1f} ms, {theirs / ours:.1f} times as long (forward and backward, medians)"
    )
    print(layer.verify(*leaves))
    return layer


def descend(loss: Any, *leaves: Tensor, steps: int, rate: float) -> list[float]:
    """Adam on loss(); the losses on the way."""
    optimiser, history = torch.optim.Adam(leaves, lr=rate), []
    for _ in range(steps):
        optimiser.zero_grad()
        value = loss()
        value.backward()
        optimiser.step()
        history.append(value.item())
    return history


def save(figure: Any, name: str) -> None:
    path = Path("out") / f"{name}.png"
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path)
    plt.close(figure)
    print(f"picture: {path}")

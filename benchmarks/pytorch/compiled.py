"""A model with a layer in it, eager and by torch.compile: `python -m benchmarks.pytorch.compiled K
REPEATS`, PATHS[K] alone."""

from __future__ import annotations

import json
import sys
import warnings

import torch
from torch import nn

from benchmarks.measure import clock, interleaved, medians
from benchmarks.pytorch.model import built, features
from benchmarks.pytorch.paths import Path
from benchmarks.subprocesses import alone
from benchmarks.table import Family, Options, Row

BATCH, REPEATS, SECONDS = 64, 200, 6.0
PATHS = (
    Path("softmax", (50,)),
    Path("least_squares", (100, 50)),
    Path("equality_constrained_qp", (50, 20)),
    Path("quadratic_program", (20, 20, 5)),
    Path("ball_projection", (20,)),
)


def family(options: Options) -> Family:
    return Family(
        "compiled",
        f"An MLP, the layer on what it says, and a loss, batch {BATCH}: milliseconds of forward and of backward to the MLP's weights, eager "
        "and by torch.compile(fullgraph=True) with inductor; medians of steps that alternate, each model in a process of its own, on one torch thread. "
        "`compile, s` is the first compiled step, forward and backward, no cache read or written, once the compiler itself is loaded. "
        "`difference` is that of the gradients of the two, relative.",
        [(path.name, lambda k=k: [measure(k, options)]) for k, path in enumerate(PATHS)],
    )


def measure(k: int, options: Options) -> Row:
    figures = alone(
        "benchmarks.pytorch.compiled",
        k,
        5 if options.quick else REPEATS,
        timeout=300,
        OMP_NUM_THREADS="1",
    )
    return Row(PATHS[k].name, figures, {"difference": ("<=", 1e-10)})


def main(k: int, repeats: int) -> dict[str, float | str]:
    warnings.simplefilter("ignore")
    torch._inductor.config.force_disable_caches = True
    given = features(BATCH)
    step(torch.compile(nn.Sequential(nn.Linear(given.shape[1], 1).double(), _Sum())), given)
    eager = built(PATHS[k])
    step(eager, given)
    compiled = torch.compile(eager, fullgraph=True)
    start = clock()
    step(compiled, given)
    seconds = clock() - start
    difference = _gradient(compiled, given) - (exact := _gradient(eager, given))
    figures = interleaved(
        lambda: step(eager, given), lambda: step(compiled, given), repeats=repeats, seconds=SECONDS
    )
    (forward, backward), (forward_compiled, backward_compiled) = map(medians, figures)
    return {
        "path": eager.layer.structure,
        "forward": forward,
        "backward": backward,
        "forward, compiled": forward_compiled,
        "backward, compiled": backward_compiled,
        "eager / compiled": (forward + backward) / (forward_compiled + backward_compiled),
        "compile, s": seconds,
        "difference": float(difference.norm() / exact.norm()),
    }


class _Sum(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.sum()


def step(model: nn.Module, given: torch.Tensor) -> tuple[float, float]:
    """Milliseconds of forward and backward."""
    model.zero_grad()
    start = clock()
    loss = model(given)
    middle = clock()
    loss.backward()
    return 1e3 * (middle - start), 1e3 * (clock() - middle)


def _gradient(model: nn.Module, given: torch.Tensor) -> torch.Tensor:
    step(model, given)
    return nn.utils.parameters_to_vector([p.grad for p in model.parameters()]).clone()


if __name__ == "__main__":
    print(json.dumps(main(*map(int, sys.argv[1:]))))

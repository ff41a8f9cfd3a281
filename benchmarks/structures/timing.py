"""Forward and backward of several layers in turn, and how well they agree."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.measure import clock
from benchmarks.structures.tasks import Layer, Variables, weights_of
from convlayer.problems import Declared

SLICE = 0.02  # seconds that a fast run repeats itself in one turn
UNDETERMINED = ("r", "c")  # the marginals of a transport: up to a constant
LONG = 3.0  # a first call that takes longer is the measurement


@dataclass
class Timed:
    """Milliseconds of forward and backward, a pair a call; `scale` turns fewer rows into the whole batch."""

    calls: list[tuple[float, float]]
    scale: float = 1.0

    @property
    def totals(self) -> list[float]:
        return [self.scale * (forward + backward) for forward, backward in self.calls]

    @property
    def total(self) -> float:
        return statistics.median(self.totals)

    @property
    def forward(self) -> float:
        return self.scale * statistics.median(forward for forward, _ in self.calls)

    @property
    def quartiles(self) -> str:
        if len(self.calls) < 2:
            return "one call"
        low, _, high = statistics.quantiles(self.totals, n=4, method="inclusive")
        return f"{low:.3g} to {high:.3g}"


def once(layer: Layer, tensors: Variables) -> tuple[float, float]:
    """Milliseconds of a forward and of the gradient of all parameters."""
    device, leaves = tensors[0].device, [t.detach().clone().requires_grad_() for t in tensors]
    start = clock(device)
    outputs = layer(*leaves)
    middle = clock(device)
    weights = weights_of(outputs)
    begin = clock(device)
    torch.autograd.grad(outputs, leaves, weights, allow_unused=True)
    return 1e3 * (middle - start), 1e3 * (clock(device) - begin)


def one_thread(run: Callable[[], tuple[float, float]]) -> Callable[[], tuple[float, float]]:
    def limited() -> tuple[float, float]:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return run()
        finally:
            torch.set_num_threads(threads)

    return limited


def alternating(
    runs: dict[str, Callable[[], tuple[float, float]]], seconds: float, turns: int = 60
) -> dict[str, Timed | str]:
    """All runs in turn for about `seconds` after a warm-up, so that drift hits all alike; a run that fails says how."""
    found: dict[str, Timed | str] = {}
    for name, run in runs.items():
        try:
            first = run()
            found[name] = Timed([first] if sum(first) > 1e3 * LONG else [])
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a panic of a compiled peer is no Exception
            found[name] = reason(error)
    waiting = {name: timed for name, timed in found.items() if isinstance(timed, Timed) and not timed.calls}
    start = time.perf_counter()
    for turn in range(turns):
        for name, timed in waiting.items():
            begin = time.perf_counter()
            while not timed.calls or time.perf_counter() - begin < SLICE:
                timed.calls.append(runs[name]())
        if turn >= 2 and time.perf_counter() - start > seconds:
            break
    return found


def reason(error: BaseException) -> str:
    """A peer's failure in a cell."""
    words = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {words[0]}".replace("|", "/")[:70]


def differences(
    mine: tuple[Variables, dict[str, Tensor]], theirs: tuple[Variables, dict[str, Tensor]]
) -> tuple[float, float]:
    """Relative differences of the solution and of the gradient of the parameters that both have, the worst row."""
    outputs = _relative(list(theirs[0]), list(mine[0]))
    names = [name for name in mine[1] if name in theirs[1]]
    return outputs, _relative([theirs[1][name] for name in names], [mine[1][name] for name in names])


def answers(layer: Layer, tensors: Variables, declared: Declared) -> tuple[Variables, dict[str, Tensor]]:
    """The solution, and the gradient of a fixed random functional, by the names of the parameters that determine it."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    outputs = layer(*leaves)
    gradients = torch.autograd.grad(outputs, leaves, weights_of(outputs), allow_unused=True)
    found = {}
    for parameter, gradient in zip(declared.parameters, gradients, strict=True):
        if gradient is not None and parameter.name() not in UNDETERMINED:
            found[parameter.name()] = (gradient + gradient.mT) / 2 if parameter.is_symmetric() else gradient
    return tuple(x.detach() for x in outputs), found


def _relative(got: list[Tensor], exact: list[Tensor]) -> float:
    error = sum((g.cpu().double() - e.cpu().double()).flatten(1).square().sum(1) for g, e in zip(got, exact, strict=True))
    size = sum(e.cpu().double().flatten(1).square().sum(1) for e in exact)
    return float((error / size).sqrt().max())

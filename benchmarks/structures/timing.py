"""Forward and backward of several layers in turn, and how well they agree."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks.measure import clock
from benchmarks.structures.tasks import Layer, Variables, weights_of
from convlayer.autodiff.threads import one_thread
from convlayer.problems import Declared

SLICE = 0.02  # seconds that a fast run repeats itself in one turn
LONG = 3.0  # seconds of a first call that is the measurement
TURNS = 60
ROUNDING = 1e-13  # what is smaller is zero
# parameters, the marginals of a transport, whose gradient is known up to a constant
UNDETERMINED = (
    "r",
    "c",
)


@dataclass
class Run:
    """A layer on its data; a call takes milliseconds of the forward, and of the gradient of all
    parameters."""

    layer: Layer
    tensors: Variables
    scale: float = 1.0  # from the rows measured to the batch
    alone: bool = False  # on one torch thread
    weights: Variables | None = None  # cotangents, by default those that everyone has
    outputs: Variables = ()  # of the last call
    gradients: tuple[Tensor | None, ...] = ()

    def __call__(self) -> tuple[float, float]:
        try:
            with one_thread() if self.alone else nullcontext():
                return self._timed()
        except BaseException as error:
            if type(error).__name__ != "PanicException":
                raise
            # inside a compiled peer: not an Exception
            raise RuntimeError(f"panic: {error}") from None

    def _timed(self) -> tuple[float, float]:
        device, leaves = (
            self.tensors[0].device,
            [t.detach().clone().requires_grad_() for t in self.tensors],
        )
        start = clock(device)
        outputs = tuple(self.layer(*leaves))
        forward = clock(device) - start
        self.outputs, self.gradients = tuple(x.detach() for x in outputs), ()
        self.weights = weights_of(outputs) if self.weights is None else self.weights
        start = clock(device)
        self.gradients = torch.autograd.grad(outputs, leaves, self.weights, allow_unused=True)
        return 1e3 * self.scale * forward, 1e3 * self.scale * (clock(device) - start)

    def on_one_thread(self) -> Run:
        return replace(self, alone=True)


@dataclass
class Timed:
    """Milliseconds of forward and backward, a pair a call."""

    calls: list[tuple[float, float]]

    @property
    def total(self) -> float:
        return statistics.median(map(sum, self.calls))

    @property
    def forward(self) -> float:
        return statistics.median(forward for forward, _ in self.calls)

    @property
    def quartiles(self) -> str:
        if len(self.calls) < 2:
            return "one call"
        low, _, high = statistics.quantiles(map(sum, self.calls), n=4, method="inclusive")
        return f"{low:.3g} to {high:.3g}"


def alternating(
    runs: Mapping[str, Run], seconds: float, long: float = LONG
) -> dict[str, Timed | str]:
    """All runs in turn for about `seconds` after a warm-up, so that drift hits all alike; one that
    fails says how.

    A run whose first call takes more than `long` seconds is not asked again.
    """
    found: dict[str, Timed | str] = {}
    for name, run in runs.items():
        try:
            first = run()
            found[name] = Timed([first] if sum(first) > 1e3 * long * run.scale else [])
        except Exception as error:  # a peer's failure is a finding
            found[name] = reason(error)
    waiting = {
        name: timed for name, timed in found.items() if isinstance(timed, Timed) and not timed.calls
    }
    start = time.perf_counter()
    for turn in range(TURNS):
        for name, timed in waiting.items():
            begin = time.perf_counter()
            while time.perf_counter() - begin < SLICE:
                timed.calls.append(runs[name]())
        if turn >= 2 and time.perf_counter() - start > seconds:
            break
    return found


def reason(error: BaseException) -> str:
    """A failure, for a cell."""
    words = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {words[0]}".replace("|", "/")[:70]


def cell(timed: Timed | str | None) -> float | str | None:
    return timed.total if isinstance(timed, Timed) else timed


def errors(
    mine: Run, theirs: Run, declared: Declared, peers: Declared
) -> tuple[float | None, float | None]:
    """Relative differences from ours of the solution, and of the gradient of the parameters that
    both have; the worst row."""
    if not theirs.outputs:
        return None, None
    solution = _relative(
        theirs.outputs,
        tuple(x[: len(y)] for x, y in zip(mine.outputs, theirs.outputs, strict=True)),
    )
    ours, others = _named(mine, declared), _named(theirs, peers)
    both = [name for name in others if name in ours]
    if not both:
        return solution, None
    return solution, _relative(
        tuple(others[name] for name in both),
        tuple(ours[name][: len(others[name])] for name in both),
    )


def _named(run: Run, declared: Declared) -> dict[str, Tensor]:
    found = {}
    for parameter, gradient in zip(declared.parameters, run.gradients, strict=False):
        if gradient is not None and parameter.name() not in UNDETERMINED:
            found[parameter.name()] = (
                (gradient + gradient.mT) / 2 if parameter.attributes["symmetric"] else gradient
            )
    return found


def _relative(got: Variables, exact: Variables) -> float:
    pairs = [(g.cpu().double(), e.cpu().double()) for g, e in zip(got, exact, strict=True)]
    error = sum((g - e).reshape(len(e), -1).square().sum(1) for g, e in pairs)
    size = sum(e.reshape(len(e), -1).square().sum(1) for _, e in pairs)
    # A row that is zero, as the gradient at a vertex of the simplex, is compared absolutely.
    return float((error / torch.where(size > ROUNDING**2, size, 1.0)).sqrt().max())

"""How a comparison takes its times: in turn, so that drift cancels, and medians."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Work = Callable[[], Any]


@dataclass(frozen=True)
class Effort:
    """How much of it: seconds of timing a problem, the longest run on a curve, sizes and
    batches."""

    seconds: float
    limit: float
    points: int
    shrink: int

    @classmethod
    def of(cls, quick: bool) -> Effort:
        """Seconds in all, or about a minute."""
        return cls(0.15, 0.1, 3, 4) if quick else cls(2.5, 1.0, 5, 1)


def forward_and_backward(layer: Callable[..., Any], tensors: list[Tensor]) -> Work:
    """What is timed: a call, and the gradient of the sum of squares of what it returns."""

    def work() -> None:
        outputs = layer(*tensors)
        torch.autograd.grad(sum(o.square().sum() for o in outputs), tensors)

    return work


def seconds_of(work: Work, device: torch.device) -> float:
    """The device's work included."""
    start = _clock(device)
    work()
    return _clock(device) - start


def in_turn(works: Sequence[Work], device: torch.device, budget: float) -> list[float]:
    """The median of each one's times, at least three of them. Each has run before."""
    times: list[list[float]] = [[] for _ in works]
    start = time.perf_counter()
    while len(times[0]) < 3 or (time.perf_counter() - start < budget and len(times[0]) < 50):
        for mine, work in zip(times, works, strict=True):
            mine.append(seconds_of(work, device))
    return [statistics.median(mine) for mine in times]


def _clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()

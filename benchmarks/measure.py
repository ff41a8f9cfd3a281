"""Time and memory."""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

MEGABYTE = 2**20


def interleaved(
    *runs: Callable[[], tuple[float, ...]], repeats: int, seconds: float
) -> list[list[tuple[float, ...]]]:
    """Each run's figures in turn, ours, peer, ours, peer ..., so that drift cancels; about
    `seconds` after a warm-up."""
    for run in runs:
        run()
    figures: list[list[tuple[float, ...]]] = [[] for _ in runs]
    start = time.perf_counter()
    for _ in range(repeats):
        for k, run in enumerate(runs):
            figures[k].append(run())
        if time.perf_counter() - start > seconds:
            break
    return figures


def medians(figures: list[tuple[float, ...]]) -> list[float]:
    """The median of each figure over the repeats."""
    return [statistics.median(column) for column in zip(*figures, strict=True)]


def clock(device: torch.device | str = "cpu") -> float:
    """Seconds, once the device is done."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class PeakMemory:
    """`with PeakMemory() as peak: ...; peak.megabytes`: by how much the resident memory rose at its
    highest."""

    def __enter__(self) -> PeakMemory:
        try:
            # the high-water mark starts again from here
            Path("/proc/self/clear_refs").write_text("5")
            self.before = status("VmRSS")
        except OSError:
            self.before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return self

    def __exit__(self, *_) -> None:
        try:
            high = status("VmHWM")
        except OSError:
            high = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        self.megabytes = (high - self.before) / MEGABYTE


def status(name: str) -> int:
    """Of this process, in bytes where it is memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    words = next(line.split() for line in lines if line.startswith(name + ":"))
    return int(words[1]) * (1024 if words[2:] == ["kB"] else 1)

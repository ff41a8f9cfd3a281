"""Many calls of a small layer: how long the slowest take, and what grows."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator

import numpy as np

from benchmarks.measure import MEGABYTE, status
from benchmarks.real.declarations import CASES, Subject
from benchmarks.table import Family, Options, Row

LAYERS = ("barrier_filter", "long_only_portfolio", "second_order_cone", "ridge_head")
CALLS, MANY = 10_000, 100_000


def family(options: Options) -> Family:
    return Family(
        "steady",
        f"Forward and backward at batch 1, milliseconds: quantiles of {CALLS:,} calls one after the other, with Python's garbage collector "
        f"as it is; and by how much the memory of the process, in MB, its threads and its objects have grown after {MANY:,} more.",
        [(name, lambda name=name: measure(name, options)) for name in LAYERS],
    )


def measure(name: str, options: Options) -> Iterator[Row]:
    subject = Subject(*CASES[name])
    layer = subject.ours()
    inputs = [t[0].requires_grad_() for t in subject.case.sample(1, 0)]

    def call() -> float:
        start = time.perf_counter()
        sum(output.sum() for output in layer(*inputs)).backward()
        return time.perf_counter() - start

    calls, many = (CALLS // 20, MANY // 100) if options.quick else (CALLS, MANY)
    for _ in range(calls // 10):
        call()
    times = np.array([call() for _ in range(calls)])
    gc.collect()
    before = status("VmRSS"), status("Threads"), len(gc.get_objects())
    for _ in range(many):
        call()
    gc.collect()
    after = status("VmRSS"), status("Threads"), len(gc.get_objects())
    memory, threads, objects = (b - a for a, b in zip(before, after, strict=True))
    quantiles = {f"{100 * q:g} %": 1e3 * float(np.quantile(times, q)) for q in (0.5, 0.99, 0.999)}
    figures = quantiles | {
        "memory": memory / MEGABYTE,
        "threads": threads,
        "objects": objects,
    }
    yield Row(name, figures, {"memory": ("<=", 8.0), "threads": ("<=", 0), "objects": ("<=", 100)})

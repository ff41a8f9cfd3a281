"""Six problems by the kernel of their structure and by the cone program, on the same data: time,
agreement, memory; and small ones beside CVXPY with diffcp.

Times are medians of a forward and a backward pass, run in turn so that drift cancels. The cone
program has one thread a core; the kernels have one torch thread, whose times neighbours on the
machine disturb least.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import statistics
import sys
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from convlayer import __version__, problems
from convlayer.autodiff.threads import one_thread
from convlayer.command_line import rivals
from convlayer.command_line.figures import Curve, Rivalry, Row, aligned, milliseconds
from convlayer.command_line.picture import draw
from convlayer.command_line.timing import Effort, Work, forward_and_backward, in_turn, seconds_of
from convlayer.layer import ConvexLayer

# the layer's choice, and the cone program by its solver for every cone
PATHS: tuple[dict[str, str], ...] = (
    {},
    {"solver": "clarabel"},
)
MEGABYTE = 2**20
BATCH, SCALING_BATCH = 64, 16
GRID = 2.0**16  # multiples of its inverse add up without rounding


def as_drawn(tensors: list[Tensor]) -> list[Tensor]:
    """A sample that both precisions take as it is."""
    return tensors


def balanced(tensors: list[Tensor]) -> list[Tensor]:
    """Marginals of the same sum in either precision; otherwise the cone program, which is exact,
    finds float32's infeasible."""
    M, r, c, eps = tensors
    r, c = ((marginal * GRID).round().clamp(min=1) / GRID for marginal in (r, c))
    larger = c.argmax(-1, keepdim=True)
    return [M, r, c.scatter_add(-1, larger, (r.sum(-1) - c.sum(-1)).unsqueeze(-1)), eps]


@dataclass(frozen=True)
class Case:
    """A problem of the library, at the size of the table and at those of the curve."""

    title: str
    problem: str
    describe: str  # of a size
    axis: str  # what the curve's sizes count
    sizes: Callable[[int], tuple[int, ...]]  # the library's sizes
    size: int
    curve: tuple[int, ...]
    prepare: Callable[[list[Tensor]], list[Tensor]] = as_drawn


CASES = (
    Case("least squares", "least_squares", "A {0} x {1}", "columns of A", lambda n: (2 * n, n), 50, (10, 25, 50, 100, 200)),
    Case(
        "equality-constrained QP", "equality_constrained_qp", "{0} variables and {1} equalities", "variables",
        lambda n: (n, 2 * n // 5), 50, (10, 25, 50, 100, 200),
    ),
    Case(
        "entropic transport", "entropic_optimal_transport", "{0} x {1} plan", "points on each side",
        lambda n: (n, n), 16, (4, 8, 16, 32, 64), balanced,
    ),
    Case("leading eigenvector", "leading_eigenvector", "{0} x {0} matrix", "rows of the matrix", lambda n: (n,), 10, (4, 8, 16, 32, 64)),
    Case("total variation", "total_variation", "{0} points", "points", lambda n: (n,), 300, (30, 100, 300, 1000, 3000)),
    Case(
        "QP (OptNet form)", "quadratic_program", "{0} variables and {1} inequalities", "variables",
        lambda n: (n, n, n // 2), 60, (5, 10, 20, 40, 80),
    ),
)  # fmt: skip


def compare(*, quick: bool, device: str, dtype: str, out: str) -> int:
    """Measure, print the table, write compare.json and compare.png into `out`."""
    try:
        place = torch.zeros((), device=device).device
    except (RuntimeError, AssertionError) as error:
        print(
            f"The device {device!r} cannot be used: {str(error).splitlines()[0]}", file=sys.stderr
        )
        return 2
    warnings.simplefilter("ignore")  # a degenerate row among random ones is no news here
    effort, kind = Effort.of(quick), getattr(torch, dtype)
    rows, curves, rivalries = [], [], []
    total = 2 * len(CASES) + len(rivals.SMALL)
    with one_thread(), tqdm(total=total, unit="part") as bar:
        for case in CASES:
            bar.set_description(f"{case.title:<24}")
            rows.append(measure(case, effort, place, kind))
            bar.update()
            curves.append(scale(case, effort, place, kind))
            bar.update()
        for small in rivals.SMALL:
            bar.set_description(f"{small.title:<24}")
            rivalries.append(rivals.rivalry(small, effort))
            bar.update()
    print("\n" + table_of_rows(rows))
    print("\n" + rivals.table_of_rivalries(rivalries))
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    where = f"{_device_name(place)}, {dtype}"
    (folder / "compare.json").write_text(
        json.dumps(_record(rows, curves, rivalries, where), indent=1) + "\n"
    )
    worst = max(max(row.value, row.gradient) for row in rows)
    draw(
        rows,
        curves,
        f"Forward and backward; values and gradients agree to {worst:.0e}; {where}",
        folder / "compare.png",
    )
    print(f"\npicture: {folder / 'compare.png'}; figures: {folder / 'compare.json'}")
    return 0


def measure(case: Case, effort: Effort, device: torch.device, dtype: torch.dtype) -> Row:
    """The line of the table: memory at the first call, then times in turn, then agreement."""
    batch, sizes = BATCH // effort.shrink, case.sizes(case.size)
    tensors = _sample(case, case.size, batch, device, dtype)
    layers = [_layer(case, case.size, path) for path in PATHS]
    works = [forward_and_backward(layer, tensors) for layer in layers]
    memory = [_peak(work, device) for work in works]
    seconds = in_turn(works, device, effort.seconds)
    found = layers[0].verify(*tensors)
    return Row(
        title=case.title,
        structure=layers[0].structure,
        size=case.describe.format(*sizes),
        batch=batch,
        specialised=seconds[0],
        generic=seconds[1],
        value=float(found.value.max()),
        gradient=float(found.gradient.max()),
        memory_specialised=memory[0],
        memory_generic=memory[1],
    )


def scale(case: Case, effort: Effort, device: torch.device, dtype: torch.dtype) -> Curve:
    """Time against size on both paths, each until its next run would be too long."""
    sizes, batch = list(case.curve[: effort.points]), SCALING_BATCH // effort.shrink
    times: list[list[float]] = []
    for path in PATHS:
        mine: list[float] = []
        for size in sizes:
            if len(mine) > 1 and mine[-1] * (mine[-1] / mine[-2]) > 2 * effort.limit:
                break
            tensors = _sample(case, size, batch, device, dtype)
            work = forward_and_backward(_layer(case, size, path), tensors)
            first = seconds_of(work, device)  # a warm-up, unless it is long
            again = [] if first > effort.limit / 2 else [seconds_of(work, device) for _ in range(3)]
            mine.append(statistics.median(again or [first]))
        times.append(mine)
    return Curve(case.title, case.axis, batch, sizes[: max(map(len, times))], *times)


def table_of_rows(rows: list[Row]) -> str:
    """For the terminal."""
    head = (
        "problem",
        "size",
        "batch",
        "cone program",
        "kernel",
        "speed-up",
        "value",
        "gradient",
        "memory, MB",
    )
    lines = [
        (
            row.title, row.size, str(row.batch), milliseconds(row.generic), milliseconds(row.specialised), f"{row.speedup:.3g}x",
            f"{row.value:.0e}", f"{row.gradient:.0e}", f"{row.memory_generic:.1f} -> {row.memory_specialised:.1f}",
        )
        for row in rows
    ]  # fmt: skip
    text = aligned(head, lines)
    text += [
        "cone program: by Clarabel; kernel: what the layer chose. Medians of forward and backward; memory: the peak of a call of each.",
        "value, gradient: the worst relative difference between the two.",
    ]
    return "\n".join(text)


def _sample(
    case: Case, size: int, batch: int, device: torch.device, dtype: torch.dtype
) -> list[Tensor]:
    drawn = getattr(problems, case.problem).sample(batch, 0, *case.sizes(size))
    return [t.to(device, dtype).requires_grad_() for t in case.prepare(list(drawn))]


def _layer(case: Case, size: int, path: dict[str, str]) -> ConvexLayer:
    return getattr(problems, case.problem).layer(*case.sizes(size), **path)


def _peak(work: Work, device: torch.device) -> float:
    """Megabytes by which a call raises the memory at its highest: the device's, or the process's
    resident one."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        seconds_of(work, device)
        return (torch.cuda.max_memory_allocated(device) - before) / MEGABYTE
    with _ResidentPeak() as peak:
        seconds_of(work, device)
    return peak.megabytes


class _ResidentPeak:
    """`with _ResidentPeak() as peak: ...; peak.megabytes`. What was freed before is given back
    first, or it would hide new use."""

    def __enter__(self) -> _ResidentPeak:
        with suppress(OSError, AttributeError, TypeError):  # not glibc
            ctypes.CDLL(None).malloc_trim(0)
        with suppress(OSError):
            # the high-water mark starts again from here
            Path("/proc/self/clear_refs").write_text("5")
        self.before = _resident("VmRSS")
        return self

    def __exit__(self, *_: object) -> None:
        self.megabytes = max(_resident("VmHWM") - self.before, 0) / MEGABYTE


def _resident(field: str) -> int:
    """Bytes; where there is no /proc, the largest since the process began."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
            1 if sys.platform == "darwin" else 1024
        )
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{os.cpu_count()} CPU cores"


def _record(
    rows: list[Row], curves: list[Curve], rivalries: list[Rivalry], where: str
) -> dict[str, Any]:
    return {
        "convlayer": __version__,
        "torch": torch.__version__,
        "where": where,
        "units": {
            "times": "seconds",
            "memory": "megabytes",
            "value, gradient": "relative difference",
        },
        "problems": [{**asdict(row), "speedup": row.speedup} for row in rows],
        "scaling": [asdict(curve) for curve in curves],
        "small": [asdict(rivalry) for rivalry in rivalries],
    }

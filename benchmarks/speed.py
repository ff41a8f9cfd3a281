"""Forward and backward at batch 32: ours against the peer, against the bare solver calls, and with
one torch thread.

All times are medians in milliseconds; runs of ours and of the peer alternate. `bare` is the time
inside convlayer.paths.attempts.solve_batch during the same forward. Speed-up: the peer's forward +
backward over ours; `one thread` is ours with one torch thread, the peer being as it is.
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from benchmarks.cases import CASES
from benchmarks.measure import clock, interleaved, medians
from benchmarks.peer import MISSING, peer_layer
from benchmarks.table import Family, Options, Row
from convlayer import ConvexLayer
from convlayer.autodiff.threads import one_thread
from convlayer.paths import attempts

BATCH, REPEATS, SECONDS = 32, 21, 8.0
SIZES = {
    "quadratic_program": (20, 20, 5),
    "quadratic_program_factored": (20, 20, 5),
    "nonnegative_least_squares": (50, 20),
    "lasso": (50, 20),
    "portfolio": (10,),
    "softmax": (20,),
    "simplex_projection": (50,),
    "ball_projection": (20,),
    "group_soft_threshold": (10, 5),
    "nearest_correlation": (6,),
    "logistic_regression": (30, 5),
    "total_variation": (100,),
    "control": (4, 2, 10),
    "cobb_douglas": (),
}
BACKWARD, BARE, SPEED_UP, SINGLE = (
    "backward / forward",
    "forward / bare",
    "speed-up",
    "speed-up, one thread",
)


def family(options: Options) -> Family:
    names = ["softmax", "simplex_projection"] if options.quick else list(SIZES)
    return Family(
        "speed",
        f"Forward and backward at batch {BATCH}, milliseconds. The speed-up is wanted of the geometric mean.",
        [(name, lambda name=name: [measure(name, options)]) for name in names],
        summary,
    )


def measure(name: str, options: Options) -> Row:
    case, sizes = CASES[name], SIZES[name]
    tensors = tuple(t.to(options.device) for t in case.sample(BATCH, 0, *sizes))
    declared = case(*sizes)
    layer = ConvexLayer(
        declared.problem,
        declared.parameters,
        declared.variables,
        gp=not declared.problem.is_dcp(),
        structure="generic",
    )
    row = Row(
        f"{name} {', '.join(map(str, sizes))}".strip(),
        wanted={BACKWARD: ("<=", 0.5), BARE: ("<=", 1.5)},
    )
    with warnings.catch_warnings(), bare_clock() as bare:
        warnings.simplefilter("ignore")
        runs = [
            lambda: timed(layer, tensors, bare),
            lambda: on_one_thread(lambda: timed(layer, tensors, bare)),
        ]
        try:
            peer = peer_layer(case(*sizes))
            if peer is not None:
                timed(peer, tensors)
                runs.append(lambda: timed(peer, tensors))
            else:
                row.figures["peer total"] = MISSING
        except Exception as error:  # the peer's failure is a finding
            row.figures["peer total"] = f"refused: {type(error).__name__}"
        figures = interleaved(*runs, repeats=5 if options.quick else REPEATS, seconds=SECONDS)
    ours, single = figures[0], figures[1]
    forward, backward, solver = medians(ours)
    row.figures = {
        "forward": forward,
        "backward": backward,
        "bare": solver,
        "peer total": row.figures.get("peer total"),
        "one thread total": sum(medians(single)[:2]),
        SPEED_UP: None,
        BACKWARD: statistics.median(b / f for f, b, _ in ours),
        BARE: statistics.median(f / s for f, _, s in ours),
    }
    if len(figures) > 2:
        peer_forward, peer_backward, _ = medians(figures[2])
        ratio = statistics.median(
            (p[0] + p[1]) / (o[0] + o[1]) for o, p in zip(ours, figures[2], strict=True)
        )
        alone = statistics.median(
            (p[0] + p[1]) / (o[0] + o[1]) for o, p in zip(single, figures[2], strict=True)
        )
        row.figures |= {
            "peer forward": peer_forward,
            "peer total": peer_forward + peer_backward,
            SPEED_UP: ratio,
            SINGLE: alone,
        }
    return row


def summary(rows: list[Row]) -> Iterable[Row]:
    """Geometric means over the rows."""
    figures = {
        c: statistics.geometric_mean(v)
        for c in (SPEED_UP, SINGLE, BACKWARD, BARE)
        if (v := [row.figures[c] for row in rows if isinstance(row.figures.get(c), float)])
    }
    yield Row(
        "geometric mean", figures, {SPEED_UP: (">=", 3), BACKWARD: ("<=", 0.5), BARE: ("<=", 1.5)}
    )


def timed(
    layer: Callable[..., tuple[Tensor, ...]],
    tensors: tuple[Tensor, ...],
    bare: list[float] | None = None,
) -> tuple[float, float, float]:
    """Milliseconds of forward, backward, and the bare solver calls in that forward."""
    device = tensors[0].device
    leaves = [t.clone().requires_grad_() for t in tensors]
    spent = sum(bare) if bare else 0.0
    start = clock(device)
    outputs = layer(*leaves)
    middle = clock(device)
    torch.autograd.grad(outputs, leaves, [torch.ones_like(x) for x in outputs], allow_unused=True)
    end = clock(device)
    return (
        1e3 * (middle - start),
        1e3 * (end - middle),
        1e3 * ((sum(bare) if bare else 0.0) - spent),
    )


def on_one_thread(run: Callable[[], tuple[float, ...]]) -> tuple[float, ...]:
    with one_thread():
        return run()


@contextmanager
def bare_clock() -> Iterator[list[float]]:
    """Collects the seconds of every call of solve_batch that the layer makes."""
    spent, solve_batch = [], attempts.solve_batch

    def clocked(*arguments, **named):
        start = time.perf_counter()
        try:
            return solve_batch(*arguments, **named)
        finally:
            spent.append(time.perf_counter() - start)

    attempts.solve_batch = clocked
    try:
        yield spent
    finally:
        attempts.solve_batch = solve_batch

"""Memory against the batch: what lies between a forward and its backward, and the peak of both.

A point is a process of its own, `python -m benchmarks.pytorch.memory K BATCH ours` (or
cvxpylayers), PATHS[K].

Kept: the resident set by the number of forwards that are held, its slope from some forwards to more
of them, so that neither what a process keeps for good nor memory that is free at the start has a
part in it; solvers' own memory counts like torch's.
Peak: by how much the resident set rises at its highest in the first forward and backward at this
      batch.

What a derivative cannot do without, in float64 numbers a row:

    softmax             x, n
    least squares       the triangle R, x and the residual, n (n + 1) / 2 + n + m
    sparsemax           x, whose support it is, n
    total variation     the segment of every element, n
    leading eigenvector U and the eigenvalues, n^2 + n
    equality QP         the factors of P and of its Schur complement, L^-1 A', x and nu, n (n + 1) / 2 + p (p + 1) / 2 + n p + n + p
    transport           P and the Cholesky factor of its Schur complement, m n + k (k + 1) / 2 with k = min(m, n)
    quadratic program   LU of the KKT matrix on the active rows, x and the multipliers, (n + active)^2 + n + m + p
    sparse program      the entries of L and D in LDL', x and y; their places are the same for all rows
"""

from __future__ import annotations

import ctypes
import gc
import json
import math
import sys
import time
import warnings

import torch

from benchmarks.measure import MEGABYTE, PeakMemory, status
from benchmarks.peer import MISSING, peer_layer
from benchmarks.pytorch.paths import SPARSE, Path
from benchmarks.structures.tasks import weights_of
from benchmarks.structures.timing import reason
from benchmarks.subprocesses import alone
from benchmarks.table import Family, Options, Row

BATCHES = (1, 8, 64, 512)
PEER_ROWS = 64  # the largest batch that the peer is asked for
# what is held should come to so many bytes, in so many forwards at most
PAGES, HELD, SECONDS = (
    32 * MEGABYTE,
    256,
    10.0,
)
PATHS = (
    Path("softmax", (200,)),
    Path("sparsemax", (200,)),
    Path("total_variation", (200,)),
    Path("leading_eigenvector", (16,)),
    Path("least_squares", (100, 50)),
    Path("equality_constrained_qp", (50, 20)),
    Path("entropic_optimal_transport", (25, 25)),
    Path("quadratic_program", (40, 40, 10)),
    Path(SPARSE, (2_500,)),
)
OURS, PEER = "ours", "cvxpylayers"


def family(options: Options) -> Family:
    batches = BATCHES[:2] if options.quick else BATCHES
    return Family(
        "memory",
        "Megabytes. `needed`: the factor and the solution, by formula (benchmarks/pytorch/memory.py). `kept`: what a forward keeps for its "
        f"backward, by the slope of the resident set over forwards that are held, up to {HELD} of them. `peak`: what the resident set rises by at "
        "its highest in the first forward and backward. A fresh process for each figure, after a batch of 2; cvxpylayers up to "
        f"{PEER_ROWS} rows.",
        [
            (f"{path.name} at {batch}", lambda k=k, batch=batch: [measure(k, batch)])
            for k, path in enumerate(PATHS)
            for batch in batches
        ],
    )


def measure(k: int, batch: int) -> Row:
    ours = alone("benchmarks.pytorch.memory", k, batch, OURS, timeout=200)
    figures = {
        "path": ours["path"],
        "needed": ours["needed"],
        "kept": ours["kept"],
        "kept / needed": ours["kept"] / ours["needed"],
        "peak": ours["peak"],
        "peak / needed": ours["peak"] / ours["needed"],
    }
    if batch <= PEER_ROWS:
        figures |= peer(k, batch)
    return Row(f"{PATHS[k].name}, batch {batch}", figures)


def peer(k: int, batch: int) -> dict[str, float | str]:
    names = {what: f"{PEER}, {what}" for what in ("kept", "peak")}
    try:
        theirs = alone("benchmarks.pytorch.memory", k, batch, PEER, timeout=200)
    except Exception as error:  # the peer's failure is a finding
        return dict.fromkeys(names.values(), reason(error))
    return {name: theirs[what] for what, name in names.items()}


def main(k: int, batch: int, who: str) -> dict[str, float | str]:
    warnings.simplefilter("ignore")
    path = PATHS[k]
    needed = 8 * batch * path.numbers()
    if who == OURS:
        layer, few, tensors = path.layer(), path.sample(2), path.sample(batch)
    else:
        _, few = path.for_peers(path.sample(2))
        declared, tensors = path.for_peers(path.sample(batch))
        layer = peer_layer(declared)
        if layer is None:
            raise ImportError(MISSING)

    def forward(tensors):
        outputs = layer(*tensors)
        return outputs, weights_of(outputs)

    def both(tensors):
        outputs, weights = forward(tensors)
        torch.autograd.grad(outputs, tensors, weights, allow_unused=True)

    few, leaves = ([t.clone().requires_grad_() for t in given] for given in (few, tensors))
    both(few)  # libraries are loaded, and what a layer works out once is
    resident()
    with PeakMemory() as peak:
        both(leaves)
    start = time.perf_counter()
    held = [layer(*leaves)]
    likely = max(needed, peak.megabytes * MEGABYTE)
    wanted = min(
        HELD, math.ceil(PAGES / likely), math.ceil(SECONDS / (time.perf_counter() - start))
    )
    held += [layer(*leaves) for _ in range(wanted // 4)]  # what was free is in use again
    before = resident()
    held += [layer(*leaves) for _ in range(wanted)]
    kept = (resident() - before) / wanted
    structure = layer.structure if who == OURS else who
    return {
        "path": structure,
        "needed": needed / MEGABYTE,
        "kept": kept / MEGABYTE,
        "peak": peak.megabytes,
    }


def resident() -> int:
    """Bytes, once what is free has gone back."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return status("VmRSS")


if __name__ == "__main__":
    print(json.dumps(main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])))

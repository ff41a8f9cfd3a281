"""DistributedDataParallel: one process against two on the same global batch.

`python -m benchmarks.pytorch.processes K STEPS (core|machine)`, PATHS[K], alone or under
torch.distributed.run, which deals it the rows; on a core of its own, or on all of them.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import warnings

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from benchmarks.measure import clock
from benchmarks.pytorch.model import built, features
from benchmarks.pytorch.paths import Path
from benchmarks.subprocesses import alone
from benchmarks.table import Family, Options, Row

BATCH, STEPS, WARM_UP, RATE = 256, 50, 5, 1e-3
WORLD, CORE, MACHINE = 2, "core", "machine"
PATHS = (
    Path("quadratic_program", (20, 20, 5)),
    Path("portfolio", (10,)),
    Path("total_variation", (2_000,)),
    Path("softmax", (1_000,)),
)


def family(options: Options) -> Family:
    return Family(
        "processes",
        f"An MLP, the layer and a loss, a global batch of {BATCH}: milliseconds of a training step (forward, backward with the gradients "
        "averaged, one of SGD), the median of "
        f"{STEPS} on the first process, after a barrier before each. {WORLD} processes by torch.distributed.run with gloo, one torch thread and one "
        "core each, which its pool for rows shares too; one process so, and one on all cores. `difference`: of the loss after the last step, relative.",
        [(path.name, lambda k=k: [measure(k, options)]) for k, path in enumerate(PATHS)],
    )


def measure(k: int, options: Options) -> Row:
    module, steps = "benchmarks.pytorch.processes", 5 if options.quick else STEPS
    together = ("--standalone", "--nproc_per_node", WORLD, "-m", module)
    one = alone(module, k, steps, CORE, OMP_NUM_THREADS="1")
    own = alone(module, k, steps, MACHINE)
    two = alone("torch.distributed.run", *together, k, steps, CORE, OMP_NUM_THREADS="1")
    figures = {
        "path": one["path"],
        "one process": one["ms"],
        "one process, all cores": own["ms"],
        "two processes": two["ms"],
        "one / two": one["ms"] / two["ms"],
        "all cores / two": own["ms"] / two["ms"],
        "difference": abs(two["loss"] / one["loss"] - 1),
    }
    return Row(PATHS[k].name, figures, {"difference": ("<=", 1e-9)})


def main(k: int, steps: int, where: str) -> dict[str, float | str]:
    warnings.simplefilter("ignore")
    rank, world = 0, 1
    if dist.is_torchelastic_launched():
        dist.init_process_group("gloo")
        rank, world = dist.get_rank(), dist.get_world_size()
    if where == CORE:
        # and every thread that is begun from here
        os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[rank]})
    network = built(PATHS[k])
    model = DistributedDataParallel(network) if world > 1 else network
    optimiser = torch.optim.SGD(network.parameters(), lr=RATE)
    whole = features(BATCH)
    mine, times = whole[rank::world], []
    for _ in range(WARM_UP + steps):
        if world > 1:
            dist.barrier()
        start = clock()
        optimiser.zero_grad()
        model(mine).backward()
        optimiser.step()
        times.append(1e3 * (clock() - start))
    with torch.no_grad():
        loss = float(network(whole))
    if world > 1:
        dist.destroy_process_group()
    return (
        {"path": network.layer.structure, "ms": statistics.median(times[WARM_UP:]), "loss": loss}
        if rank == 0
        else {}
    )


if __name__ == "__main__":
    found = main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
    if found:
        print(json.dumps(found))

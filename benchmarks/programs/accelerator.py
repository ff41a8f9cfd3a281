"""Large batches of quadratic programs on the device against our own CPU; `--device cuda`."""

from __future__ import annotations

import warnings

import torch

from benchmarks.programs.speed import SMALL, Task, layer, solver
from benchmarks.structures.timing import Run, Timed, alternating, errors
from benchmarks.table import Family, Options, Row

TASKS = [Task("dense_program", 4096, SMALL, "QP"), Task("dense_program", 512, (100, 100, 20), "QP")]
QUICK = [Task("dense_program", 256, SMALL, "QP"), Task("dense_program", 16, (100, 100, 20), "QP")]
SECONDS = 6.0


def family(options: Options) -> Family:
    return Family(
        "accelerator",
        "Forward and the gradient of all parameters with the parameters on the device, and on the host, milliseconds; relative "
        "differences of the two.",
        [
            (task.name, lambda task=task: [measure(task, options)])
            for task in (QUICK if options.quick else TASKS)
        ],
    )


def measure(task: Task, options: Options) -> Row:
    if not torch.cuda.is_available():
        return Row(task.name, {"device": "skipped: there is no device"})
    if options.device.type == "cpu":
        return Row(task.name, {"device": "skipped: no device was asked for, --device cuda"})
    declared, host = task.declared, task.data()
    data = tuple(t.to(options.device, options.dtype) for t in host)
    runs = {"device": Run(layer(declared), data), "host": Run(layer(declared), host)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = alternating(runs, SECONDS / 4 if options.quick else SECONDS)
        device, cpu = found["device"], found["host"]
        if not (isinstance(device, Timed) and isinstance(cpu, Timed)):
            raise RuntimeError(f"device: {device}; host: {cpu}")
        solution, gradient = errors(runs["host"], runs["device"], declared, declared)
    return Row(
        task.name,
        {
            "device": device.total,
            "device quartiles": device.quartiles,
            "host": cpu.total,
            "host quartiles": cpu.quartiles,
            "host / device": cpu.total / device.total,
            "solver": solver(runs["device"].layer, task.batch),
            "solution": solution,
            "gradient": gradient,
        },
    )

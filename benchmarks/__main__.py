"""Run the benchmarks, print their tables, and write them.

    python -m benchmarks [--suite generic|structures|programs|real|scale|crossover|torch|all]
    [--only FAMILY] [--case NAME ...] [--quick] [--device cpu] [--dtype float64]

The suites: `generic`, the cone program, on any problem; `structures`, the kernels of the problems
that the layer recognises, and `programs`, quadratic and cone programs that no kernel knows, against
every peer there is for them; `real`, some seventy layers as people declare them, of many fields,
against the incumbents; `scale`, problems of up to a million nonzeros; `crossover`, the bare
solvers, and the model by which the layer chooses between them; `torch`, the layer as a part of
torch: calls, torch.compile, transforms, memory, processes. All, by default. The full run of a
suite is written to benchmarks/results/SUITE-DEVICE.md and .json (SUITE-DEVICE-float32 in single
precision), a partial one to out/.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
from tqdm import tqdm

from benchmarks import (
    accuracy,
    conditioning,
    construction,
    crossover,
    large,
    programs,
    real,
    speed,
    structures,
)
from benchmarks.programs import accelerator, published
from benchmarks.programs import accuracy as programs_accuracy
from benchmarks.programs import families as programs_families
from benchmarks.programs import speed as programs_speed
from benchmarks.pytorch import calls, compiled, memory, processes, transforms
from benchmarks.real import declarations, predictive, steady
from benchmarks.scale import building
from benchmarks.structures import accuracy as structures_accuracy
from benchmarks.structures import construction as structures_construction
from benchmarks.structures import growth, incumbents, overhead, specialists, temperature
from benchmarks.table import Options, Row, collect, environment, markdown, write


@dataclass(frozen=True)
class Suite:
    title: str
    families: dict[str, ModuleType]
    packages: tuple[str, ...] = ()  # whose versions matter, beside those of every suite


def by_name(*modules: ModuleType) -> dict[str, ModuleType]:
    return {module.__name__.rpartition(".")[2]: module for module in modules}


SUITES = {
    "generic": Suite("Generic path", by_name(accuracy, conditioning, speed, large, construction)),
    "structures": Suite(
        "Structures",
        by_name(
            incumbents,
            specialists,
            growth,
            temperature,
            structures_accuracy,
            overhead,
            structures_construction,
        ),
        structures.PACKAGES,
    ),
    "programs": Suite(
        "Programs",
        by_name(programs_speed, published, programs_accuracy, programs_families, accelerator),
        programs.PACKAGES,
    ),
    "real": Suite("Real declarations", by_name(declarations, predictive, steady), real.PACKAGES),
    "scale": Suite("Scale", by_name(building)),
    "crossover": Suite("Crossover of the solvers", by_name(crossover), crossover.PACKAGES),
    "torch": Suite("Within torch", by_name(calls, compiled, transforms, memory, processes)),
}


def main() -> None:
    families = dict.fromkeys(name for suite in SUITES.values() for name in suite.families)
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--suite", choices=(*SUITES, "all"), default="all", help="one of them, or all"
    )
    parser.add_argument("--only", choices=families, help="one family of rows")
    parser.add_argument(
        "--case", nargs="+", default=(), metavar="NAME", help="rows whose names have one of these"
    )
    parser.add_argument(
        "--quick", action="store_true", help="fewer problems, smaller sizes, fewer repeats"
    )
    parser.add_argument(
        "--device", default="cpu", type=torch.device, help="where the parameters live"
    )
    parser.add_argument(
        "--dtype",
        default="float64",
        choices=("float64", "float32"),
        help="of the parameters, in the suites structures and programs",
    )
    arguments = parser.parse_args()
    options = Options(
        arguments.quick,
        arguments.device,
        getattr(torch, arguments.dtype),
        tuple(arguments.case),
    )
    chosen = [name for name in SUITES if arguments.suite in (name, "all")]
    chosen = [
        name for name in chosen if arguments.only is None or arguments.only in SUITES[name].families
    ]
    if not chosen:
        parser.error(f"the suite {arguments.suite} has no family {arguments.only}")
    for name in chosen:
        run(name, arguments.only, options)


def run(name: str, only: str | None, options: Options) -> None:
    suite = SUITES[name]
    about, start = environment(options.device, suite.packages), time.perf_counter()
    families = [
        suite.families[family].family(options) for family in ([only] if only else suite.families)
    ]
    tasks = {
        family.name: [task for task in family.tasks if options.chosen(task[0])]
        for family in families
    }
    tables: dict[str, tuple[str, list[Row]]] = {}
    with tqdm(total=sum(map(len, tasks.values())), unit="problem") as progress:
        for family in families:
            rows = []
            for task_name, task in tasks[family.name]:
                progress.set_description(f"{family.name}: {task_name}")
                rows += collect(task, task_name)
                progress.update()
            tables[family.name] = (
                family.title,
                rows + collect(lambda family=family, rows=rows: family.summary(rows), "summary"),
            )
    about["seconds"] = time.perf_counter() - start
    if options.dtype is not torch.float64:
        suite_title, suffix = f"{suite.title} in float32", "-float32"
    else:
        suite_title, suffix = suite.title, ""
    print(markdown(suite_title, about, tables))
    partial = options.quick or only or options.cases
    folder = Path("out") if partial else Path(__file__).parent / "results"
    paths = write(folder, f"{name}-{options.device.type}{suffix}", suite_title, about, tables)
    print("written:", *paths)


if __name__ == "__main__":
    main()

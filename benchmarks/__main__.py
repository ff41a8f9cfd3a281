"""Run the benchmarks, print their tables, and write them.

    python -m benchmarks [--quick] [--only FAMILY] [--device cpu]

The full run is written to benchmarks/results, a partial one to out/.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks import accuracy, conditioning, construction, large, speed
from benchmarks.table import Options, Row, collect, environment, markdown, write

SUITE = "generic"
FAMILIES = {
    module.__name__.rpartition(".")[2]: module for module in (accuracy, conditioning, speed, large, construction)
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Accuracy and speed of the generic path.")
    parser.add_argument("--quick", action="store_true", help="fewer problems, smaller sizes, fewer repeats")
    parser.add_argument("--only", choices=FAMILIES, help="one family of rows")
    parser.add_argument("--device", default="cpu", type=torch.device, help="where the parameters live")
    arguments = parser.parse_args()

    options = Options(arguments.quick, arguments.device)
    about, start = environment(options.device), time.perf_counter()
    families = [FAMILIES[name].family(options) for name in ([arguments.only] if arguments.only else FAMILIES)]
    tables: dict[str, tuple[str, list[Row]]] = {}
    with tqdm(total=sum(len(family.tasks) for family in families), unit="problem") as progress:
        for family in families:
            rows = []
            for name, task in family.tasks:
                progress.set_description(f"{family.name}: {name}")
                rows += collect(task, name)
                progress.update()
            tables[family.name] = (
                family.title,
                rows + collect(lambda family=family, rows=rows: family.summary(rows), "summary"),
            )
    about["seconds"] = time.perf_counter() - start
    print(markdown(about, tables))
    partial = arguments.quick or arguments.only
    folder = Path("out") if partial else Path(__file__).parent / "results"
    paths = write(folder, f"{SUITE}-{options.device.type}", about, tables)
    print("written:", *paths)


if __name__ == "__main__":
    main()

"""Building a layer: seconds and peak megabytes, and CVXPY's canonicalisation of the same within
limits of time and memory.

Each case at each size is a process of its own, `python -m benchmarks.scale.building CASE SIZE WHO`.
"""

from __future__ import annotations

import json
import resource
import sys
import warnings
from collections.abc import Iterable

import numpy as np
import torch

from benchmarks.construction import build
from benchmarks.measure import PeakMemory, clock
from benchmarks.scale.cases import CASES
from benchmarks.structures.timing import reason
from benchmarks.subprocesses import alone
from benchmarks.table import Family, Options, Row
from convlayer.declaration.canonicalise import canonicalise

PATIENCE, GIGABYTES = 60, 8  # for CVXPY
ENTRIES, SECONDS, MEMORY = "entries", "seconds", "MB"
WANTED = {SECONDS: ("<=", 10.0), MEMORY: ("<=", 1500.0)}
EXPONENT = ("<=", 1.15)


def family(options: Options) -> Family:
    sizes = {name: case.sizes[:2] if options.quick else case.sizes for name, case in CASES.items()}
    return Family(
        "building",
        f"Building a layer. `{ENTRIES}`: nonzeros of P and A, and entries of the parameters. CVXPY: its own matrices for the same "
        f"declaration, at most {PATIENCE} s and {GIGABYTES} GB.",
        [
            (f"{name} {size}", lambda name=name, size=size: [measure(name, size)])
            for name, some in sizes.items()
            for size in some
        ],
        exponents,
    )


def measure(name: str, size: int) -> Row:
    figures = alone("benchmarks.scale.building", name, size, "ours", timeout=200)
    try:
        figures |= alone("benchmarks.scale.building", name, size, "CVXPY", timeout=PATIENCE)
    except Exception as error:  # what CVXPY cannot do is a finding
        figures["CVXPY seconds"] = reason(error)
    return Row(f"{name} {size}", figures, WANTED)


def exponents(rows: list[Row]) -> Iterable[Row]:
    """Growth with the entries from the second largest size to the largest."""
    for name in CASES:
        sizes = [row for row in rows if not row.error and row.name.rpartition(" ")[0] == name]
        if len(sizes) < 2:
            continue
        small, large = (row.figures for row in sizes[-2:])
        more = np.log(large[ENTRIES] / small[ENTRIES])
        grown = {c: float(np.log(large[c] / small[c]) / more) for c in (SECONDS, MEMORY)}
        yield Row(f"{name}, exponent", grown, dict.fromkeys(grown, EXPONENT))


def main(name: str, size: int, who: str) -> dict[str, float]:
    warnings.simplefilter("ignore")
    torch.linalg.lu_factor(torch.eye(3))  # libraries are loaded before memory is counted
    case = CASES[name]
    build(who, case(case.sizes[0])[0], structure="generic")
    declared, tensors = case(size)
    if who == "CVXPY":
        resource.setrlimit(resource.RLIMIT_AS, (GIGABYTES * 2**30,) * 2)
    with PeakMemory() as peak:
        start = clock()
        build(who, declared, structure="generic")
        seconds = clock() - start
    if who == "CVXPY":
        return {"CVXPY seconds": seconds, "CVXPY MB": peak.megabytes}
    program = canonicalise(declared.problem, declared.parameters, declared.variables).program
    entries = len(program.A_rows) + len(program.P_rows) + sum(t.numel() for t in tensors)
    return {ENTRIES: entries, SECONDS: seconds, MEMORY: peak.megabytes}


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], int(sys.argv[2]), sys.argv[3])))

"""Rows, what is wanted of them, and how they are printed and written."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import math
import os
import platform
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

PACKAGES = (
    "convlayer",
    "torch",
    "numpy",
    "scipy",
    "cvxpy",
    "clarabel",
    "scs",
    "qdldl",
    "cvxpylayers",
    "diffcp",
)


@dataclass(frozen=True)
class Options:
    quick: bool
    device: torch.device
    dtype: torch.dtype = torch.float64
    cases: tuple[str, ...] = ()  # parts of the names of those that are measured; none: all

    def chosen(self, name: str) -> bool:
        return not self.cases or any(case in name for case in self.cases)


@dataclass
class Row:
    """One row of a table: its figures by column, and bounds on some of them as (sense, bound)."""

    name: str
    figures: dict[str, Any] = field(default_factory=dict)
    wanted: dict[str, tuple[str, float]] = field(default_factory=dict)
    error: str = ""

    def misses(self) -> list[str]:
        """The columns whose figure is not as wanted, or is missing."""
        return [
            name
            for name, (sense, bound) in self.wanted.items()
            if not _meets(self.figures.get(name), sense, bound)
        ]

    def verdict(self) -> str:
        if self.error:
            return f"error: {self.error}"
        misses = self.misses()
        return "not met: " + ", ".join(misses) if misses else "met" if self.wanted else ""


@dataclass(frozen=True)
class Family:
    """A family of rows: tasks that give rows when called, and a summary of all of them."""

    name: str
    title: str
    tasks: list[tuple[str, Callable[[], Iterable[Row]]]]
    summary: Callable[[list[Row]], Iterable[Row]] = lambda rows: []


def collect(task: Callable[[], Iterable[Row]], name: str) -> list[Row]:
    """The task's rows; an error is a row that states it."""
    try:
        return list(task())
    except Exception as error:  # a benchmark goes on whatever happens in one row
        return [
            Row(
                name,
                error=f"{type(error).__name__}: {error}".replace("\n", " ").replace("|", "/")[:200],
            )
        ]


def environment(device: torch.device, packages: tuple[str, ...] = ()) -> dict[str, Any]:
    """What the figures depend on; `packages` beside those of every suite."""
    versions = {
        "python": platform.python_version(),
        **{name: _version(name) for name in (*PACKAGES, *packages)},
    }
    machine = {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "torch threads": torch.get_num_threads(),
        "load at the start": [round(load, 2) for load in os.getloadavg()],
    }
    if device.type == "cuda":
        there = torch.cuda.is_available()
        machine["accelerator"] = torch.cuda.get_device_name(device) if there else "none"
    return {
        "date": datetime.date.today().isoformat(),
        "device": str(device),
        "versions": versions,
        "machine": machine,
    }


def markdown(title: str, about: dict[str, Any], families: dict[str, tuple[str, list[Row]]]) -> str:
    lines = [
        f"# {title} on {about['device']}, {about['date']}",
        "",
        ", ".join(f"{name} {version}" for name, version in about["versions"].items()) + ".",
        "",
        ", ".join(f"{name} {value}" for name, value in about["machine"].items())
        + f". The run took {about['seconds']:.0f} s.",
    ]
    for name, (title, rows) in families.items():
        columns = list(dict.fromkeys(column for row in rows for column in row.figures))
        wanted = {
            column: {row.wanted[column] for row in rows if column in row.wanted}
            for column in columns
        }
        heads = [
            f"{c}{_bound(next(iter(wanted[c])))}" if len(wanted[c]) == 1 else c for c in columns
        ]
        lines += [
            "",
            f"## {name}",
            "",
            title,
            "",
            _line(["", *heads, "wanted"]),
            _line(["---"] * (len(columns) + 2)),
        ]
        # A bound that is not the same in every row stands in its cell.
        own = [
            {c: _bound(b) for c, b in row.wanted.items() if len(wanted.get(c, ())) > 1}
            for row in rows
        ]
        lines += [
            _line(
                [
                    row.name,
                    *(_format(row.figures.get(c)) + bound.get(c, "") for c in columns),
                    row.verdict(),
                ]
            )
            for row, bound in zip(rows, own, strict=True)
        ]
    return "\n".join(lines) + "\n"


def write(
    folder: Path,
    name: str,
    title: str,
    about: dict[str, Any],
    families: dict[str, tuple[str, list[Row]]],
) -> list[Path]:
    """NAME.json and NAME.md in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = {
        family: {"title": title, "rows": [_record(row) for row in rows]}
        for family, (title, rows) in families.items()
    }
    contents = {
        "json": json.dumps({**about, "families": rows}, indent=1) + "\n",
        "md": markdown(title, about, families),
    }
    paths = [folder / f"{name}.{suffix}" for suffix in contents]
    for path, content in zip(paths, contents.values(), strict=True):
        path.write_text(content)
    return paths


def _record(row: Row) -> dict[str, Any]:
    figures = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in row.figures.items()
    }
    return {
        "name": row.name,
        "figures": figures,
        "wanted": {c: " ".join(map(str, bound)) for c, bound in row.wanted.items()},
        "verdict": row.verdict(),
    }


def _meets(value: Any, sense: str, bound: float) -> bool:
    if not isinstance(value, (int, float)):
        return False
    return value <= bound if sense == "<=" else value >= bound


def _format(value: Any) -> str:
    if value is None:
        return ""
    if not isinstance(value, float):
        return str(value)
    return f"{value:.3g}" if value == 0 or 1e-2 <= abs(value) < 1e4 else f"{value:.1e}"


def _bound(bound: tuple[str, float]) -> str:
    return f" [{bound[0]} {bound[1]:.3g}]"


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")),
        platform.machine(),
    )

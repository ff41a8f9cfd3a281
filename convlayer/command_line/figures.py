"""What a comparison finds: lines of its tables and curves, times in seconds, memory in
megabytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One problem by its kernel and as a cone program."""

    title: str
    structure: str
    size: str
    batch: int
    specialised: float
    generic: float
    value: float
    gradient: float
    memory_specialised: float
    memory_generic: float

    @property
    def speedup(self) -> float:
        """How many times as long the cone program takes."""
        return self.generic / self.specialised


@dataclass(frozen=True)
class Curve:
    """Seconds by size; the cone program's list may be the shorter one."""

    title: str
    axis: str
    batch: int
    sizes: list[int]
    specialised: list[float]
    generic: list[float]


@dataclass(frozen=True)
class Rivalry:
    """One small problem by the layer's choice, by solvers that were named, and by CVXPY with diffcp."""

    title: str
    structure: str
    size: str
    batch: int
    layer: float
    clarabel: float
    scs: float
    diffcp: float
    value: float  # relative differences of the layer's choice from diffcp
    gradient: float


def aligned(head: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    """A table's lines: the first two columns are words, the others figures."""
    widths = [max(map(len, column)) for column in zip(head, *lines, strict=True)]
    text = [
        "  ".join(
            cell.ljust(width) if k < 2 else cell.rjust(width)
            for k, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in (head, *lines)
    ]
    return [text[0], "-" * len(text[0]), *text[1:]]


def milliseconds(seconds: float) -> str:
    """In words, seconds where there are some."""
    return f"{1e3 * seconds:.3g} ms" if seconds < 0.9995 else f"{seconds:.2f} s"

"""How results stand at a prompt and in a notebook: short, in words."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from torch import Tensor

SHOWN = 10  # rows of a table


class Shown:
    """A result whose whole text, `str`, is what a notebook shows."""

    def _repr_html_(self) -> str:
        return f"<pre>{escape(str(self))}</pre>"


class Words(Shown, str):
    """A report that prompts and notebooks show as it prints."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def rows_of(batch: Sequence[int]) -> str:
    """`one instance`, `32 rows`, `2 x 3 rows`."""
    return f"{' x '.join(map(str, batch))} rows" if len(batch) else "one instance"


def counted(names: Sequence[str]) -> str:
    """Names with how often each occurs, in the order of their first appearance: `30 SOLVED, 2
    INFEASIBLE`."""
    return ", ".join(f"{names.count(name)} {name}" for name in dict.fromkeys(names)) or "none"


def spanned(values: Tensor) -> str:
    """`1.5`, or `1 to 2.5`; what is not a number is left out."""
    values = values.detach().double().flatten()
    values = values[~values.isnan()]
    if not len(values):
        return "NaN"
    low, high = f"{values.min().item():.4g}", f"{values.max().item():.4g}"
    return low if low == high else f"{low} to {high}"


def html_table(header: Sequence[str], rows: Sequence[Sequence[str]], more: int = 0) -> str:
    """HTML."""
    lines = ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows]
    if more:
        lines.append(f'<td colspan="{len(header)}">and {more} more</td>')
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(f'<tr>{line}</tr>' for line in lines)}</tbody></table>"

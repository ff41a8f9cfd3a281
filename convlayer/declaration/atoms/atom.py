"""What an atom of the normal form is: how CVXPY spells it, its value, its cost as a cone program.

A new atom is a new file beside this one: a subclass of `NormalAtom`, or of `Elementwise`, found by
being there. The structures that do not name it take no problem with it, and those that do ask for
its terms by its class.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import cvxpy as cp
import numpy as np
from torch import Tensor

from convlayer.declaration.affine import Reader, Table, picked, selected_rows, stack, summed_into


@dataclass(frozen=True, eq=False)
class Weighted:
    """A term of an atom: its weight, a table without variables, and the affine map that is its
    argument.

    Of an elementwise atom sum_i weight_i atom(argument_i), with as many rows in both; of another as
    the atom says.
    """

    weight: Table
    argument: Table

    @property
    def size(self) -> int:
        """The rows of the argument."""
        return self.argument.size


class Terms:
    """What has been read of an objective so far."""

    def __init__(self, reader: Reader) -> None:
        self.reader = reader  # of affine expressions
        self.by_atom: dict[str, list[Weighted]] = {}
        self.linear: list[Table] = []  # of one row each

    def keep(self, atom: type[NormalAtom], weight: Table, argument: Table) -> None:
        """Add a term."""
        self.by_atom.setdefault(atom.name, []).append(Weighted(weight, argument))

    def keep_linear(self, row: Table) -> None:
        """Add an affine function of the variables."""
        self.linear.append(row)


class NormalAtom(ABC):
    """A function of which the objective of a normal form has terms; one file, one atom, one
    instance in the registry."""

    name: ClassVar[str]
    words: ClassVar[str]  # what an objective with such terms has
    restricts: ClassVar[bool] = False  # its argument is kept in a domain, whatever its weight

    # How CVXPY spells it ------------------------------------------------------------------------

    @abstractmethod
    def recognises(self, expression: Any) -> bool:
        """Whether a CVXPY atom, no affine one, is this. At most one of the registry says so."""

    @abstractmethod
    def read(self, expression: Any, weight: Table, terms: Terms) -> None:
        """Keep sum_i weight_i expression_i among the terms. UnsupportedError: it is not read."""

    @abstractmethod
    def gathered(self, terms: Sequence[Weighted]) -> list[Weighted]:
        """All terms of an objective, as the normal form holds them."""

    # What it is worth ---------------------------------------------------------------------------

    @abstractmethod
    def value(self, weight: Tensor, argument: Tensor) -> Tensor:
        """Of one term, from the rows of its two tables: (B or 1, rows) each -> (B or 1,)."""

    def outside(self, argument: Tensor) -> Tensor | None:
        """(B or 1, k) how far the argument is outside of the atom's domain; None: it is defined
        everywhere."""
        return None

    # What it costs as a cone program ------------------------------------------------------------

    def matrix_entries(self, term: Weighted) -> int:
        """Stored entries of the program's matrices, beside those of the argument's rows."""
        return 0

    def joined(self, term: Weighted) -> np.ndarray:
        """Variables that P joins, each to the next: enough to tell the width of a band."""
        return np.zeros(0, dtype=np.int64)


class Elementwise(NormalAtom):
    """sum_i weight_i f(argument_i): all its terms are one, with their rows below each other."""

    @abstractmethod
    def of(self, argument: Tensor) -> Tensor:
        """f, entry by entry."""

    def value(self, weight: Tensor, argument: Tensor) -> Tensor:
        """sum_i weight_i f(argument_i)."""
        return (weight * self.of(argument)).sum(1)

    def gathered(self, terms: Sequence[Weighted]) -> list[Weighted]:
        """One term, of no rows where there is none; without rows of weight zero, unless they
        restrict their argument."""
        weight = stack([term.weight for term in terms]).normal
        argument = stack([term.argument for term in terms]).normal
        if self.restricts:
            return [Weighted(weight, argument)]
        used = np.zeros(argument.size, dtype=bool)
        used[weight.row] = True
        if used.all():
            return [Weighted(weight, argument)]
        return [Weighted(selected_rows(weight, used), selected_rows(argument, used))]


def number_of(p: Any) -> float | None:
    """The value of a scalar constant expression or number, None if it is neither."""
    if isinstance(p, cp.Expression):
        if p.variables() or p.parameters() or p.size != 1:
            return None
        p = p.value
    return float(np.asarray(p, dtype=float).reshape(()))


def along_axis(weight: Table, expression: Any) -> Table:
    """The weights of an atom's entries, as weights of what it sums over along its axis."""
    return picked(weight, summed_into(expression))

"""How far constraints were moved so that infeasible rows have an answer: by constraint, and in
words."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor

SHARE = 1e-9  # of the largest shift of a row up to which one is none


class Shifts(tuple[Any, ...]):
    """One for each of problem.constraints, in order: (*batch, *its shape), a tuple of its
    arguments' for a cone constraint, None for a constraint without multipliers.

    It held as lhs <= rhs + shift, or lhs == rhs + shift. Rows that were feasible have zeros. Print
    it for the constraints that moved.
    """

    names: tuple[str, ...]  # of the constraints, as the user spells them

    @classmethod
    def of(cls, parts: Sequence[Any], names: Sequence[str]) -> Shifts:
        shifts = cls(parts)
        shifts.names = tuple(names)
        return shifts

    def each(self, function: Callable[[Tensor], Tensor]) -> Shifts:
        """The same constraints', after a function of every tensor there is."""
        return Shifts.of(
            [
                tuple(map(function, shift))
                if isinstance(shift, tuple)
                else None
                if shift is None
                else function(shift)
                for shift in self
            ],
            self.names,
        )

    @property
    def moved(self) -> dict[str, Any]:
        """By name, the constraints that moved in some row."""
        return {self.names[k]: self[k] for k, _, _ in self._sizes()}

    def __repr__(self) -> str:
        return f"Shifts({', '.join(self._words())})" if self._words() else "Shifts(none)"

    def __str__(self) -> str:
        words = self._words()
        return f"Shifted: {'; '.join(words)}." if words else "No constraint was shifted."

    def _words(self) -> list[str]:
        return [
            f"{self.names[k]} by {'up to ' if several else ''}{largest:.3g}"
            for k, largest, several in self._sizes()
        ]

    def _sizes(self) -> Iterator[tuple[int, float, bool]]:
        """(which, its largest shift, whether it has several) of those that moved."""
        sizes = [max((_largest(part) for part in _parts(shift)), default=0.0) for shift in self]
        for k, size in enumerate(sizes):
            if size > SHARE * max(sizes):
                yield k, size, sum(part.numel() for part in _parts(self[k])) > 1


def _parts(shift: Any) -> list[Tensor]:
    return [] if shift is None else list(shift) if isinstance(shift, tuple) else [shift]


def _largest(part: Tensor) -> float:
    return float(part.detach().abs().max().nan_to_num(0.0)) if part.numel() else 0.0

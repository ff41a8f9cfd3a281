"""Sparse affine maps: from the user's parameters to a cone program's data, and from its solution to
the user's variables.

    (P, q, A, b, d) = constant + sum over parameters of map_p @ theta_p

theta_p are the parameter's entries as they are read (`ParameterEntries`); a map is one sparse
matrix over a constant zero, a constant one and the entries of all parameters (`AffineMap`).
Variables and dual variables are gathered from (x, y), with one coefficient an entry (`Recovery`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from convlayer.conic.linear_map import LinearMap
from convlayer.memo import constants

# The columns of an AffineMap's matrix before those of the parameters' entries: a constant zero,
# which blanks are gathered from, and a constant one, whose coefficients are the constant part of
# the map.
ZERO, ONE = 0, 1


@dataclass(frozen=True, eq=False)
class ParameterEntries:
    """How a user's parameter is read: row-major, a symmetric one from both triangles alike, in a
    log-log program by its logarithm."""

    shape: tuple[int, ...]
    symmetric: bool
    log: bool

    def read(self, value: Tensor) -> Tensor:
        """(B, *shape) -> (B, size)."""
        if self.symmetric:
            value = (value + value.mT) / 2
        flat = value.flatten(1) if value.ndim > 1 else value.unsqueeze(1)
        return flat.log() if self.log else flat

    def pull_back(self, bar: Tensor, value: Tensor) -> Tensor:
        """The cotangent of `read`, (B, size) -> (B, *shape). Through a logarithm nothing comes of
        nothing, be the value what it may."""
        bar = bar.reshape(value.shape)
        if self.log:
            bar = torch.where(bar == 0, 0.0, bar / value)
        return (bar + bar.mT) / 2 if self.symmetric else bar


class AffineMap:
    """From the parameters' entries to one of P, q, A, b, d, and back."""

    def __init__(
        self, matrix: sp.csr_array, sizes: Sequence[int], moving: np.ndarray | None
    ) -> None:
        """matrix (values, 2 + all parameter entries); sizes of the parameters; moving: the outputs
        of which cotangents come back."""
        self._matrix, self._moving = matrix, moving
        self._starts = starts = np.cumsum([ONE + 1, *sizes])
        used = np.zeros(matrix.shape[1], dtype=bool)
        used[matrix.indices] = True
        self.parameters = [k for k in range(len(sizes)) if used[starts[k] : starts[k + 1]].any()]

    @cached_property
    def forward(self) -> LinearMap:
        """Of the constants and the entries of the parameters that it reads."""
        matrix, starts = self._matrix, self._starts
        if len(self.parameters) < len(starts) - 1:
            kept = np.zeros(matrix.shape[1], dtype=bool)
            kept[: ONE + 1] = True
            for k in self.parameters:
                kept[starts[k] : starts[k + 1]] = True
            place = np.cumsum(kept) - 1
            shape = matrix.shape[0], int(kept.sum())
            matrix = sp.csr_array((matrix.data, place[matrix.indices], matrix.indptr), shape=shape)
        return LinearMap(matrix, blank=ZERO)

    @cached_property
    def back(self) -> dict[int, LinearMap]:
        """For each parameter that it reads, from the outputs' cotangents to the parameter's."""
        starts, matrix, moving = self._starts, self._matrix, self._moving
        columns = sp.csc_array(matrix if moving is None else matrix[moving])
        return {
            k: LinearMap(sp.csr_array(columns[:, starts[k] : starts[k + 1]].T))
            for k in self.parameters
        }

    def __call__(self, entries: Sequence[Tensor], like: Tensor) -> Tensor:
        """Entries (B or 1, size) of every parameter -> (B or 1, values): shared where all that it
        reads is."""
        mine = [entries[k] for k in self.parameters]
        run = self.forward.run
        if run is not None and len(mine) == 1 and run.start > ONE:
            return mine[0][:, run.start - ONE - 1 : run.stop - ONE - 1]
        return self._applied(_constants(like.device, like.dtype), mine)

    def linear(self, directions: Sequence[Tensor], like: Tensor) -> Tensor:
        """The same of directions: without the constant part."""
        return self._applied(like.new_zeros(1, 2), [directions[k] for k in self.parameters])

    def _applied(self, head: Tensor, mine: Sequence[Tensor]) -> Tensor:
        batch = max((len(part) for part in mine), default=1)
        if any(len(part) == 0 for part in mine):
            batch = 0
        return self.forward(torch.cat([part.expand(batch, -1) for part in (head, *mine)], 1))


@constants
def _constants(device: torch.device, dtype: torch.dtype) -> Tensor:
    """(1, 2) the inputs of an AffineMap before the parameters' own."""
    return torch.tensor([[0.0, 1.0]], dtype=dtype).to(device)


@dataclass(frozen=True, eq=False)
class Recovery:
    """From (x, y) to one of the user's variables: value = coefficient * (x, y)[position], then exp
    in a log-log program."""

    shape: tuple[int, ...]
    dual: bool
    position: Tensor  # (size,) row-major order of the user's variable
    coefficient: Tensor | None  # (size,), None where all are one
    exp: bool

    def _on(self, device: torch.device) -> tuple[Tensor | slice, Tensor | None]:
        """Where the entries stand, as a slice if they stand in order, and their coefficients, on a
        device."""
        if device not in self._places:
            first, size = int(self.position[0]) if len(self.position) else 0, len(self.position)
            in_order = bool((self.position == torch.arange(first, first + size)).all())
            position = slice(first, first + size) if in_order else self.position.to(device)
            coefficient = None if self.coefficient is None else self.coefficient.to(device)
            self._places[device] = position, coefficient
        return self._places[device]

    @cached_property
    def _places(self) -> dict[torch.device, tuple[Tensor | slice, Tensor | None]]:
        return {}

    def value(self, x: Tensor, y: Tensor) -> Tensor:
        """(B, n), (B, m) -> (B, *shape)."""
        source = y if self.dual else x
        position, coefficient = self._on(source.device)
        flat = source[:, position]
        if coefficient is not None:
            flat = flat * coefficient
        value = flat.reshape(len(x), *self.shape)
        return value.exp() if self.exp else value


def row_of_each(matrix: sp.csr_array) -> np.ndarray:
    """The row of each stored entry."""
    return np.repeat(np.arange(matrix.shape[0]), np.diff(matrix.indptr))


def fixed_values(matrix: sp.csr_array) -> np.ndarray:
    """(values,) of a map's matrix what no parameter moves, NaN elsewhere."""
    values = matrix[:, [ONE]].toarray()[:, 0]
    values[row_of_each(matrix)[matrix.indices > ONE]] = np.nan
    return values

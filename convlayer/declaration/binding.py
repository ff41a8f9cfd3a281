"""From the user's parameters to a kernel's inputs: affine maps that are views where they can be.

A Binding is compiled once from entries (target, parameter entry, coefficient) and applied at every
call, in plain torch operations, so that its derivative is torch's. A whole Parameter is passed as
it is, transposed or scaled; the rest is gathered.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import cvxpy as cp
import numpy as np
import torch
from torch import Tensor

from convlayer.declaration.affine import NONE, Table


class Kept(dict):
    """Constant arrays as tensors, made once for each dtype and device; neither copied nor
    pickled."""

    def tensor(self, key: Hashable, array: np.ndarray, like: Tensor) -> Tensor:
        """On the device of `like`, and of its dtype unless the array holds integers."""
        dtype = like.dtype if array.dtype.kind == "f" else torch.int64
        place = (key, dtype, like.device)
        tensor = self.get(place)
        if tensor is None:
            with torch.inference_mode(False):  # it serves calls that are differentiated too
                found = torch.from_numpy(np.ascontiguousarray(array)).to(like.device, dtype)
            # atomic: threads that meet here take the same one
            tensor = self.setdefault(place, found)
        return tensor

    def __reduce__(self):
        return Kept, ()


@dataclass(frozen=True, eq=False)
class _Piece:
    """The part of one parameter: view, then scale, then, where it is not the whole, scatter."""

    parameter: int
    # "whole", "transposed", "scalar", or row-major positions in the parameter
    source: np.ndarray | str
    scale: float | np.ndarray
    target: np.ndarray | None  # flat positions; None: all of them in order


class Binding:
    """An affine map (values of all parameters) -> (B or 1, *shape), B where one of its parameters
    is batched."""

    def __init__(
        self,
        shape: tuple[int, ...],
        target: np.ndarray,  # flat row-major positions in `shape`
        parameter: np.ndarray,  # entry of the stacked parameters, or NONE
        coefficient: np.ndarray,
        parameters: Sequence[cp.Parameter],
        starts: Sequence[int],
    ) -> None:
        self.shape, self.size = tuple(shape), math.prod(shape)
        fixed = parameter == NONE
        constant = np.zeros(self.size)
        np.add.at(constant, target[fixed], coefficient[fixed])
        self._constant = constant if constant.any() or fixed.all() else None
        self._pieces = []
        for k, (leaf, start) in enumerate(zip(parameters, starts, strict=False)):
            mine = (parameter >= start) & (parameter < start + leaf.size)
            if mine.any():
                self._pieces.append(
                    _piece(
                        k,
                        leaf.shape,
                        self.size,
                        target[mine],
                        parameter[mine] - start,
                        coefficient[mine],
                    )
                )
        self._kept = Kept()

    @classmethod
    def of_rows(
        cls, table: Table, parameters: Sequence[cp.Parameter], starts: Sequence[int]
    ) -> Binding:
        """The rows of a table without variables, (rows,)."""
        return cls((table.size,), table.row, table.parameter, table.coefficient, parameters, starts)

    @property
    def names(self) -> list[int]:
        """The parameters it reads, by number."""
        return [piece.parameter for piece in self._pieces]

    def __call__(self, values: Sequence[Tensor], like: Tensor) -> Tensor:
        """`like` tells dtype and device where no parameter does."""
        total = (
            None
            if self._constant is None
            else self._kept.tensor("constant", self._constant, like).view(1, *self.shape)
        )
        for k, piece in enumerate(self._pieces):
            part = self._part(k, piece, values[piece.parameter])
            total = part if total is None else total + part
        assert total is not None
        return total

    def _part(self, k: int, piece: _Piece, value: Tensor) -> Tensor:
        rows = value.shape[0]
        if not isinstance(piece.source, str):
            part = (
                value.unsqueeze(-1)
                .flatten(1)
                .index_select(1, self._kept.tensor(("source", k), piece.source, value))
            )
        elif piece.source == "whole":
            part = value
        elif piece.source == "transposed":
            part = value.mT
        else:
            part = value.reshape(rows, *[1] * len(self.shape)).expand(rows, *self.shape)
        if isinstance(piece.scale, np.ndarray):
            part = part * self._kept.tensor(("scale", k), piece.scale, value)
        elif piece.scale == -1.0:
            part = -part
        elif piece.scale != 1.0:
            part = part * piece.scale
        if piece.target is not None:
            blank = part.new_zeros(rows, self.size)
            part = blank.index_add(1, self._kept.tensor(("target", k), piece.target, value), part)
        return part if part.shape[1:] == self.shape else part.reshape(rows, *self.shape)


def _piece(
    k: int,
    shape: tuple[int, ...],
    size: int,
    target: np.ndarray,
    entry: np.ndarray,
    coefficient: np.ndarray,
) -> _Piece:
    if len(target) > 1 and (np.diff(target) <= 0).any():
        order = np.argsort(target, kind="stable")
        target, entry, coefficient = target[order], entry[order], coefficient[order]
    # CVXPY counts entries column-major, torch row-major.
    entry = (
        np.ravel_multi_index(np.unravel_index(entry, shape, order="F"), shape)
        if len(shape) > 1
        else entry
    )
    everything = len(target) == size and np.array_equal(target, np.arange(size))
    scale: float | np.ndarray = coefficient
    if len(coefficient) and (coefficient == coefficient[0]).all():
        scale = float(coefficient[0])
    source: np.ndarray | str = entry
    if everything and not isinstance(scale, np.ndarray):
        if math.prod(shape) == 1:
            source = "scalar"
        elif np.array_equal(entry, np.arange(math.prod(shape))):
            source = "whole"
        elif len(shape) == 2 and np.array_equal(
            entry, np.arange(math.prod(shape)).reshape(shape).T.ravel()
        ):
            source = "transposed"
    return _Piece(k, source, scale, None if everything else target)

"""The cone of a program as the interior point wants it: its kinds in runs, and the orthant last.

Rows are put in the order  zero | second order | psd | exponential | power | nonnegative,  equal cones side by side, so that one
call serves them all; cones of one row are nonnegative. tau follows the orthant as one more of its rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from inspect import isclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from convlayer.cones import Block, Nonnegative, Zero
from convlayer.conic.program import Program
from convlayer.memo import once_for_each
from convlayer.solvers import barriers, scalings
from convlayer.solvers.scalings import ConeScaling, Kind

# The terms of A'H^-1 A are added one by one where they are at most this share of those of dense
# products; measured.
FEW = 0.05


def _kinds() -> dict[str, type[Kind]]:
    """By the cone's name, in the order of their rows: whatever scaling there is, the symmetric
    first."""
    found = (kind for module in (scalings, barriers) for kind in vars(module).values())
    own = [
        kind for kind in found if isclass(kind) and issubclass(kind, Kind) and "cone" in vars(kind)
    ]
    return {kind.cone.name: kind for kind in own}


KINDS = _kinds()
# The cones of a program, in the order of their rows.
ORDER = (Zero.name, *KINDS, Nonnegative.name)
CONES = frozenset(ORDER)


@dataclass(frozen=True, eq=False)
class RowOrder:
    """The solver's row order, and the cones in it."""

    order: Tensor | None  # (m,) the Program's row for each row; None for the same order
    free: int  # rows of the zero cone, the first
    runs: list[tuple[str, list[Block]]]  # the cones that are in KINDS, by name
    pairs: Pairs | None  # where A'H^-1 A has few terms

    @classmethod
    def of(cls, program: Program) -> RowOrder:
        """Found once for each Program."""
        return _row_order(program)

    @classmethod
    def _found(cls, program: Program) -> RowOrder:
        members: dict[tuple, list] = {}
        for block in program.cones.blocks:
            members.setdefault(_key(block), []).append(block)
        keys = sorted(members, key=lambda key: (ORDER.index(key[0]), key[1]))
        rows = [
            np.arange(block.start, block.start + block.size)
            for key in keys
            for block in members[key]
        ]
        order = np.concatenate(rows) if rows else np.zeros(0, np.int64)
        runs = [(key[0], members[key]) for key in keys if key[0] in KINDS]
        free = sum(block.size for block in members.get((Zero.name, 0), []))
        same = bool((np.diff(order) == 1).all())
        return cls(
            None if same else torch.from_numpy(order),
            free,
            runs,
            Pairs.of(program, order, free, runs),
        )

    def cones(self) -> Cones:
        return Cones([KINDS[name].of(blocks) for name, blocks in self.runs])


@once_for_each
def _row_order(program: Program) -> RowOrder:
    return RowOrder._found(program)


def _key(block: Block) -> tuple[str, int]:
    """Blocks with the same key are served by one call."""
    if block.elementwise:
        return block.name, 0
    # A cone of one row is a half-line.
    return (Nonnegative.name, 0) if block.size == 1 else (block.name, block.size)


class Pairs(NamedTuple):
    """A'H^-1 A term by term: entry `target` of the flat matrix gets A[left] A[right] H^-1[source],
    where there are few terms.

    A is flat, (m n,) in the solver's row order; H^-1 is w of the orthant, then each cone's matrix,
    flat.
    """

    left: Tensor  # (terms,)
    right: Tensor  # (terms,)
    source: Tensor  # (terms,)
    target: Tensor  # (terms,)
    rows: Tensor  # (nnz,) and columns of A's entries, without the free rows
    columns: Tensor  # (nnz,)

    @classmethod
    def of(
        cls, program: Program, order: np.ndarray, free: int, runs: list[tuple[str, list[Block]]]
    ) -> Pairs | None:
        m, n = program.m, program.n
        sizes = np.concatenate(
            [np.full(len(blocks), blocks[0].size) for _, blocks in runs]
            + [
                np.ones(
                    m - free - sum(block.size for _, blocks in runs for block in blocks), np.int64
                )
            ]
        ).astype(np.int64)
        block_of_row = np.repeat(np.arange(len(sizes)), sizes)
        place = np.empty(m, np.int64)
        place[order] = np.arange(m)
        row, column = place[program.A_rows], program.A_cols.astype(np.int64)
        row, column = row[row >= free] - free, column[row >= free]
        block = block_of_row[row]
        sorting = np.argsort(block, kind="stable")
        row, column, block = row[sorting], column[sorting], block[sorting]
        entries = np.bincount(block, minlength=len(sizes))
        if not 0 < int((entries.astype(np.float64) ** 2).sum()) <= FEW * (m - free) * n * n:
            return None
        # Every entry of a block meets every other.
        first = np.concatenate([[0], np.cumsum(entries)[:-1]])
        repeats = entries[block]
        left = np.repeat(np.arange(len(row)), repeats)
        within = np.arange(len(left)) - np.repeat(np.cumsum(repeats) - repeats, repeats)
        right = first[block[left]] + within
        start = np.concatenate([[0], np.cumsum(sizes)[:-1]])  # first row of a block
        curved = sum(len(blocks) for _, blocks in runs)
        rows_of_cones = int(sizes[:curved].sum())
        squares = np.where(np.arange(len(sizes)) < curved, sizes**2, 0)
        offset = np.concatenate([[0], np.cumsum(squares)[:-1]]) + (m - free - rows_of_cones)
        offset[curved:] = start[curved:] - rows_of_cones
        b = block[left]
        source = offset[b] + (row[left] - start[b]) * sizes[b] + row[right] - start[b]
        target = column[left] * n + column[right]
        sorting = np.argsort(target, kind="stable")
        parts = (
            (row[left] + free) * n + column[left],
            (row[right] + free) * n + column[right],
            source,
            target,
        )
        found = [part[sorting] for part in parts] + [row, column]
        return cls(*(torch.from_numpy(np.ascontiguousarray(part)) for part in found))

    def to(self, device: torch.device) -> Pairs:
        return Pairs(*(part.to(device) for part in self))


class Cones:
    """A product of kinds, x (B, ..., rows) being their rows side by side."""

    def __init__(self, kinds: list[Kind]) -> None:
        self.kinds = kinds
        self.sizes = [kind.count * kind.size for kind in kinds]
        self.rows = sum(self.sizes)
        self.degree = sum(kind.count * kind.degree for kind in kinds)
        self.symmetric = all(kind.symmetric for kind in kinds)

    def split(self, x: Tensor) -> list[Tensor]:
        """(B, ..., rows) -> (B, ..., count, size) for each kind."""
        parts = x.split_with_sizes(self.sizes, -1) if len(self.kinds) > 1 else (x,)
        return [
            part.unflatten(-1, (kind.count, kind.size)) for part, kind in zip(parts, self.kinds)
        ]

    def unit(self, like: Tensor) -> Tensor:
        """(B, rows)"""
        parts = [kind.unit(like).flatten() for kind in self.kinds]
        return torch.cat(parts).expand(len(like), -1) if parts else like[:, :0]

    def at(self, s: Tensor, y: Tensor) -> ScaledPoint:
        return ScaledPoint(
            self, [k.at(s, y) for k, s, y in zip(self.kinds, self.split(s), self.split(y))]
        )

    def at_unit(self, like: Tensor) -> ScaledPoint:
        """The point with H = I."""
        unit = self.unit(like)
        return self.at(unit, unit)

    def inside(self, v: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """Eigenvalues (B, .) of v (B, l), the orthant's last, and the map from new ones to a
        point."""
        found = [kind.inside(part) for kind, part in zip(self.kinds, self.split(v[:, : self.rows]))]
        values = [values for values, _ in found] + [v[:, self.rows :]]
        sizes = [part.shape[1] for part in values]

        def back(new: Tensor) -> Tensor:
            parts = new.split_with_sizes(sizes, 1)
            return torch.cat(
                [kind(part).flatten(1) for (_, kind), part in zip(found, parts)] + [parts[-1]], 1
            )

        return torch.cat(values, 1), back


class ScaledPoint:
    """The scalings of a point of the product, on rows side by side."""

    def __init__(self, cones: Cones, scalings: list[ConeScaling]) -> None:
        self.cones, self.scalings = cones, scalings

    def weigh(self, x: Tensor) -> Tensor:
        """H^-1 x, (B or 1, k, rows) -> (B, k, rows)."""
        return _joined(
            [scaling.weigh(part) for scaling, part in zip(self.scalings, self.cones.split(x))], 2
        )

    @property
    def scaled(self) -> Tensor:
        """lambda, (B, rows)."""
        return _joined([scaling.scaled for scaling in self.scalings], 1)

    def reduce(self, x: Tensor) -> Tensor:
        """W^-T x, (B, k, rows)."""
        return _joined(
            [scaling.reduce(part) for scaling, part in zip(self.scalings, self.cones.split(x))], 2
        )

    def enlarge(self, x: Tensor) -> Tensor:
        """W^-1 x, (B, rows)."""
        return _joined(
            [scaling.enlarge(part) for scaling, part in zip(self.scalings, self.cones.split(x))], 1
        )

    def correction(
        self, d_s: Tensor, d_y: Tensor, ds: Tensor | None, dy: Tensor, sigma_mu: Tensor
    ) -> Tensor:
        """(B, rows), of the predictor in scaled terms and, where a cone is not symmetric, in its
        own; sigma_mu (B, 1)."""
        split, sigma_mu = self.cones.split, sigma_mu.unsqueeze(2)
        plain = [split(ds), split(dy)] if ds is not None else [[None] * len(self.scalings)] * 2
        parts = zip(self.scalings, split(d_s), split(d_y), *plain)
        return _joined([scaling.correction(*step, sigma_mu) for scaling, *step in parts], 1)

    def worst(self, d_s: Tensor, d_y: Tensor, worst: Tensor) -> Tensor:
        """`worst`, -1 / (longest step), with that of these cones."""
        for scaling, *step in zip(self.scalings, self.cones.split(d_s), self.cones.split(d_y)):
            own = scaling.worst(*step)
            worst = worst if own is None else torch.minimum(worst, own)
        return worst

    def shorten(self, length: Tensor, ds: Tensor, dy: Tensor) -> Tensor:
        for scaling, *step in zip(self.scalings, self.cones.split(ds), self.cones.split(dy)):
            length = scaling.shorten(length, *step)
        return length

    def add_to(self, K: Tensor) -> None:
        """K (B, rows, rows) += H^-1"""
        start = 0
        for scaling, kind in zip(self.scalings, self.cones.kinds):
            end = start + kind.count * kind.size
            blocks = (
                K[:, start:end, start:end]
                .unflatten(1, (kind.count, kind.size))
                .unflatten(3, (kind.count, kind.size))
            )
            blocks.diagonal(dim1=1, dim2=3).add_(scaling.inverse().movedim(1, -1))
            start = end


@dataclass(frozen=True, eq=False)
class Weight:
    """H^-1 of all rows: the cones' first, then w = y / s of the orthant."""

    w: Tensor  # (B, orthant's rows)
    point: ScaledPoint | None

    def __call__(self, x: Tensor) -> Tensor:
        """(B or 1, k, l) -> (B, k, l)"""
        if self.point is None:
            return x * self.w.unsqueeze(1)
        g = self.point.cones.rows
        weighed = self.point.weigh(x[..., :g])
        return (
            torch.cat([weighed, x[..., g:] * self.w.unsqueeze(1)], 2)
            if self.w.shape[1]
            else weighed
        )

    def flat(self) -> Tensor:
        """(B, .) as `Pairs` wants it."""
        blocks = (
            []
            if self.point is None
            else [scaling.inverse().flatten(1) for scaling in self.point.scalings]
        )
        return torch.cat([self.w, *blocks], 1) if blocks else self.w

    def add_to(self, K: Tensor) -> None:
        """K (B, l, l) += H^-1"""
        g = K.shape[1] - self.w.shape[1]
        K.diagonal(dim1=1, dim2=2)[:, g:] += self.w
        if self.point is not None:
            self.point.add_to(K)


def _joined(parts: list[Tensor], dim: int) -> Tensor:
    """(B, ..., count, size) from dimension `dim` flattened and side by side."""
    flat = [part.flatten(dim) for part in parts]
    return flat[0] if len(flat) == 1 else torch.cat(flat, -1)

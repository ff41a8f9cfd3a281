"""What the dense and the sparse system of the residual map do alike: null vectors, and when a
solve is good. See `kkt`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from convlayer.cones import ProductSpectrum
from convlayer.conic.null_space import NullSpace, Projector, normalised, off_null
from convlayer.memo import constants


class Visible(NamedTuple):
    """The entries of x and rows of A where a null vector of K would make an output or a gradient
    ambiguous."""

    x: Tensor  # (n,) bool
    y: Tensor  # (m,) bool


# Null vectors fewer than this are all found.
FEW = 16
# Of more, so many random ones tell what they touch.
PROBES = 2
# A null vector that is to be found for certain is looked for among so many; where these are all
# null, among four times as many.
NARROW = 4
# What an entry of a unit null vector above this stands for is not unique.
TOUCHED = 1e-7
# A pivot, or the inverse of a probe's growth, below this: even the solves of Newton's method are
# refined.
STIFF = 1e-5


@dataclass(frozen=True)
class _Refinement:
    """Iterative refinement x += (K + delta J)^-1 (r - K x), and when what it gives is good."""

    exact: float  # relative residual at which a solve needs no further step
    steps: int  # of a pivoted factor, at most
    certified: float  # relative residual that a solve must reach, or the row is flagged;
    backward: float  # or this share of the solution, as an ill-conditioned K allows,
    growth: float  # provided that the solution is not larger than the right-hand side by this


REFINEMENT = _Refinement(exact=1e-15, steps=6, certified=1e-10, backward=1e-13, growth=1e12)


def solved_well(error: Tensor, solution: Tensor, right: Tensor) -> Tensor:
    """Whether a solve of the equilibrated system is good: by its residual, or by backward
    stability where K is ill-conditioned."""
    certified = error <= REFINEMENT.certified * right
    stable = (error <= REFINEMENT.backward * solution) & (solution <= REFINEMENT.growth * right)
    return certified | stable


@constants
def probe_of(size: int, device: torch.device) -> Tensor:
    """(size, 1) a random vector."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(size, 1, dtype=torch.float64, generator=generator).to(device)


def random_vectors(size: int, width: int) -> Tensor:
    """(size, width), the same for every row."""
    return torch.randn(size, width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class KKTSystem(ABC):
    """A factored system, and what is known of its null vectors."""

    n: int
    m: int
    scale: Tensor  # (B, size) of the equilibrated matrix
    sqrt_d: Tensor
    held: Tensor  # (B, n) variables that an active row or a quadratic term holds
    smallest: Tensor  # (B,) pivot, or as good as one
    poor: Tensor  # (B,) a solve could not be certified
    spectrum: ProductSpectrum
    units: Tensor | None
    visible: Visible
    projector: Projector | None = None  # of rows with few null vectors
    null_space: NullSpace | None = None  # of rows with many,
    # these, if not looked at yet, and which are only expected to have many,
    _unjudged: tuple[Tensor, Tensor] | None = None
    # and those where one is visible, with about how many they have
    _ambiguous: tuple[Tensor, int] | None = None
    _least_norm: Projector | None = None
    _singular: Tensor  # (B,), of what was looked at

    @abstractmethod
    def solve(self, a: Tensor, c: Tensor, *, newton: bool = False) -> tuple[Tensor, Tensor]:
        """a (B, n), c (B, m) -> w (B, n), e (B, m), see `kkt`.

        newton: for a step of Newton's method, to the accuracy of the shifted factor unless it is
        stiff, and not of least norm in the user's units.
        """

    @property
    @abstractmethod
    def _size(self) -> int:
        """Of the matrix."""

    @abstractmethod
    def _near(self, rows: Tensor) -> NullSpace:
        """What takes vectors of these rows into the null space."""

    @abstractmethod
    def _dual(self, rows: Tensor, eta: Tensor) -> Tensor:
        """Null vectors' dual parts as the system holds them, (rows, ., k) -> those of y's rows,
        (rows, m, k), without the basis U."""

    @abstractmethod
    def _null_vectors(self, rows: Tensor, width: int) -> Tensor:
        """Orthonormal null vectors of K among `width` Ritz vectors of inverse iteration, (rows,
        size, width); other columns are zero."""

    def _unscaled(self, rows: Tensor, vectors: Tensor) -> Tensor:
        """Vectors (rows, size, k) of the equilibrated matrix in x's own units, and as one of x
        beside one of the basis U."""
        return self.scale[rows].unsqueeze(-1) * vectors

    def _widest(self) -> int:
        """Null vectors in a basis, at most."""
        return self._size

    @property
    def singular(self) -> Tensor:
        """(B,) a null vector touches what the user sees or moves."""
        self.judge()
        return self._singular

    def judge(self) -> None:
        """Look at rows of many null vectors, which a step of Newton's method only takes out of
        right-hand sides."""
        if self._unjudged is None:
            return
        (rows, expected), self._unjudged = self._unjudged, None
        found = self._look_beyond(rows)
        few = expected & (found < FEW / 2)
        if bool(few.any()):  # what looked like null vectors were small eigenvalues
            rows = torch.cat([rows[~few], self._look_for_basis(rows[few], FEW)]).sort().values
            self.null_space = self._near(rows) if len(rows) else None

    def _look_for_null_vectors(self, suspects: Tensor, expected: Tensor | None = None) -> None:
        """Null vectors of the matrix for these rows: all of them where they are few. `expected`:
        about how many they have."""
        if expected is None:
            expected = torch.zeros(len(suspects), device=suspects.device)
        wide, narrow = expected >= 4 * FEW, expected < NARROW + 2
        beyond = [
            self._look_for_basis(suspects[narrow], NARROW),
            self._look_for_basis(suspects[~wide & ~narrow], FEW),
        ]
        rows, order = torch.cat([suspects[wide], *beyond]).sort()
        if len(rows):
            self.null_space = self._near(rows)
            self._unjudged = rows, order < int(wide.sum())

    def _look_for_basis(self, rows: Tensor, width: int) -> Tensor:
        """Rows with few null vectors get their projector; the others are given back."""
        parts: list[tuple[Tensor, Tensor]] = []
        if self.projector is not None:
            parts.append((self.projector.rows, self.projector.unit))
        while len(rows):
            vectors = self._null_vectors(rows, min(width, self._size))
            many = (vectors.abs().amax(1) > 0).all(1) & (width < self._size)
            found = rows[~many]
            if len(found):
                unit = normalised(self._unscaled(found, vectors[~many]), found, self.units)
                self._singular[found] |= self._harmful(found, unit)
                parts.append((found, unit))
            rows = rows[many]
            if width >= FEW:
                break
            width *= 4
        if parts:
            widest = max(unit.shape[2] for _, unit in parts)
            rows_of_all = torch.cat([found for found, _ in parts])
            padded = [
                torch.nn.functional.pad(unit, (0, widest - unit.shape[2])) for _, unit in parts
            ]
            self.projector = Projector(rows_of_all, torch.cat(padded), self.units)
        return rows

    def _look_beyond(self, rows: Tensor) -> Tensor:
        """Whether one of many null vectors is visible, and about how many there are, (rows,)."""
        assert self.null_space is not None
        probe = random_vectors(self._size, PROBES).to(self.scale.dtype)
        vectors, clean = self.null_space.part(probe.to(rows.device).expand(len(rows), -1, -1))
        vectors = vectors * clean.unsqueeze(1)
        unit = normalised(self._unscaled(rows, vectors), rows, self.units)
        harmful = self._harmful(rows, unit) | ~clean.any(1)
        self._singular[rows] |= harmful
        # A random vector's part in k dimensions has length sqrt(k).
        found = vectors.square().sum(1).mean(1)
        if bool(harmful.any()):
            self._ambiguous = rows[harmful], int(found[harmful].max().item())
        return found

    def _harmful(self, rows: Tensor, unit: Tensor) -> Tensor:
        """(rows,) whether unit null vectors (rows, size, k) touch what the user sees or moves."""
        spectrum = self.spectrum.index_select(rows)
        dual = spectrum.from_basis(self._dual(rows, unit[:, self.n :]), columns=True)
        primal = unit[:, : self.n]
        seen = self.visible
        parts = [
            primal[:, seen.x].flatten(1),
            dual[:, seen.y].flatten(1),
            primal.new_zeros(len(primal), 1),
        ]
        return torch.cat(parts, 1).abs().amax(1) > TOUCHED

    def _entering(self, right: Tensor, newton: bool) -> Tensor:
        """A right-hand side (B, size) in x's own units, without what no solution can meet."""
        right = off_null(self.projector, right, -1)
        return right if newton else off_null(self._projector(), right, -1)

    def _off_wide(self, scaled: Tensor, newton: bool) -> Tensor:
        """The equilibrated right-hand side (B, size) without what no solution can meet, where
        there are many null vectors."""
        return self.null_space.off(scaled) if newton and self.null_space is not None else scaled

    def _leaving(self, solution: Tensor, newton: bool) -> Tensor:
        """A solution (B, size) in x's own units, without what no right-hand side determines, where
        that matters."""
        solution = off_null(self.projector, solution, 1)
        return solution if newton else off_null(self._projector(), solution, 1)

    def _projector(self) -> Projector | None:
        """Onto the complement of the null space, for rows of many null vectors of which some are
        visible."""
        self.judge()
        if self._least_norm is None and self._ambiguous is not None:
            rows, dimension = self._ambiguous
            limit, width = self._widest(), dimension + int(3 * dimension**0.5) + 8
            while True:
                width = min(width, limit)
                vectors = self._null_vectors(rows, width)
                if width == limit or not bool((vectors.abs().amax(1) > 0).all(1).any()):
                    break
                width *= 4
            unit = normalised(self._unscaled(rows, vectors), rows, self.units)
            self._least_norm = Projector(rows, unit, self.units)
        return self._least_norm

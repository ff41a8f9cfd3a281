"""The null space of the system of the residual map, for some rows of a batch: without a basis, and
by one.

With J = diag(1, -1) over x and the rows, a vector's part in the null space of K is

    delta (K + delta J)^-1 J z  =  z - (K + delta J)^-1 K z,

which shrinks every other part, so that products with the shifted factor reach it (`NullSpace`).
Where there are few null vectors, a basis of them in the user's units takes them out of right-hand
sides and of solutions (`Projector`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from convlayer.conic.program import take_rows

# |K z| below this share of |z|, times the square root of the size, makes z a null vector.
NULL = 1e-12
# |K z| below this share of |z|: z is null vectors to the last bit, and another step would gain
# nothing.
CLEAN = 1e-15
# A part in the null space below this share of a vector is rounding.
NOTHING = 1e-14
# Steps, at most, that take other parts out of a vector of the null space.
STEPS = 30
# A step that leaves more than this share of the other parts gains nothing.
GAIN = 0.9
# Times that a part is taken out of a right-hand side: what rounding leaves of it, the shifted
# factor would make large again.
TURNS = 3


@dataclass(frozen=True, eq=False)
class NullSpace:
    """The null space of K for some rows of a batch, without a basis."""

    rows: Tensor
    shift: Tensor  # (size, 1) or (rows, size, 1) delta J
    image: Callable[[Tensor], Tensor]  # K x, for x (rows, size, k)
    solve: Callable[[Tensor], Tensor]  # (K + delta J)^-1 x
    exact: Callable[[int, Tensor], Tensor] | None = None  # K^+ in K's range, of one row

    def part(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(the part of x (rows, size, k) in the null space, which of its columns (rows, k) are
        nothing but null vectors)."""
        least = NOTHING * x.norm(dim=1)
        # delta (K + delta J)^-1 J x
        part = self.solve(self.shift * x)
        image = self.image(part)
        for _ in range(STEPS):
            before, length = image.norm(dim=1), part.norm(dim=1)
            if bool(((before <= CLEAN * length) | (length <= least)).all()):
                break
            # z - (K + delta J)^-1 K z
            trial = part - self.solve(image)
            trial_image = self.image(trial)
            better = trial_image.norm(dim=1) < GAIN * before
            if not bool(better.any()):
                break
            part = torch.where(better.unsqueeze(1), trial, part)
            image = torch.where(better.unsqueeze(1), trial_image, image)
        clean = self._is_clean(part, image)
        if self.exact is not None:
            for row, column in torch.nonzero(~clean & (part.norm(dim=1) > least)).tolist():
                part[row, :, column] -= self.exact(row, image[row, :, column])
            clean = clean if bool(clean.all()) else self._is_clean(part, self.image(part))
        return part, clean & (part.norm(dim=1) > least)

    def off(self, vector: Tensor) -> Tensor:
        """(B, size) without these rows' parts in the null space."""
        rest = vector[self.rows].unsqueeze(-1)
        for _ in range(TURNS):
            part, clean = self.part(rest)
            if not bool(clean.any()):
                break
            rest = rest - part * clean.unsqueeze(1)
        return vector.index_copy(0, self.rows, rest.squeeze(-1))

    def _is_clean(self, part: Tensor, image: Tensor) -> Tensor:
        size = self.shift.shape[-2]
        return image.norm(dim=1) <= NULL * size**0.5 * part.norm(dim=1)


class Projector:
    """Takes the null spaces of some rows of a batch out of vectors in x's own units.

    A solution is in units^1 and a right-hand side in units^-1; in the user's units both are
    orthogonal to the null space:

        z - N N^+ z,   N unit null vectors, N^+ = (N'N)^+ N'.
    """

    def __init__(self, rows: Tensor, unit: Tensor, units: Tensor | None):
        """unit (rows, size, k) as `normalised` gives them, zero where there are fewer than k;
        units (B or 1, n) of x, None for ones."""
        self.rows = rows
        self.units = unit.new_ones(unit.shape[:2])
        if units is not None:
            self.units[:, : units.shape[1]] = take_rows(units, rows)
        self.unit = unit
        self.dual = self.unit @ torch.linalg.pinv(self.unit.mT @ self.unit, hermitian=True)

    def __call__(self, vector: Tensor, power: int) -> Tensor:
        """vector (B, size)."""
        units = self.units**power
        part = vector[self.rows] * units
        along = (self.dual @ (self.unit.mT @ part.unsqueeze(-1))).squeeze(-1)
        return vector.index_copy(0, self.rows, (part - along) / units)


def normalised(vectors: Tensor, rows: Tensor, units: Tensor | None) -> Tensor:
    """Vectors (rows, size, k) in x's own units as unit vectors in the user's; zeros stay zeros."""
    if units is not None:
        vectors = vectors.clone()
        vectors[:, : units.shape[1]] *= take_rows(units, rows).unsqueeze(-1)
    return vectors / vectors.norm(dim=1, keepdim=True).clamp(min=1e-300)


def off_null(projector: Projector | None, vector: Tensor, power: int) -> Tensor:
    """The part of (B, size) orthogonal to the null spaces, where there are any."""
    return vector if projector is None else projector(vector, power)

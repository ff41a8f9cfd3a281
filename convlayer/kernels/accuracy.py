"""How accurately a linear system was solved, and what that makes of a row.

Two measures. The residual, relative to the terms that it is the sum of, says whether the equations
hold. How far the solution may be off is seen by one more solve, with the residual and two samples
of what rounding makes of its terms; it is asked only where the system is so nearly singular that a
residual of rounding could hide an error that matters.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from convlayer.memo import constants
from convlayer.solution import Status


@dataclass(frozen=True)
class Accuracy:
    """The errors at which a row changes its status; all of them relative."""

    # A row with a larger residual is INACCURATE.
    residual: float = 1e-8
    # A row whose solution is further off is INACCURATE.
    sensitive: float = 3e-8
    # A row whose solution is further off has none: NOT_CONVERGED.
    meaningless: float = 1e-2
    # The inverse, in equilibrated units, is at least this large where rounding moves a solution by
    # `sensitive`.
    doubtful: float = 1e6
    # Rounding of an entry of a residual is this share of the terms that it is the sum of.
    rounding: float = 2e-16
    # An error is relative to the solution, or to this share of the data where the solution is
    # smaller.
    floor: float = 1e-3
    # An entry of a unit null vector is zero up to this.
    hidden: float = 1e-7


ACCURACY = Accuracy()


@constants
def probe(n: int, device: torch.device) -> Tensor:
    """(n,) entries without a pattern, so that no vector of interest is orthogonal to it."""
    return torch.arange(n, dtype=torch.float64, device=device).square().cos()


@constants
def _waves(n: int, device: torch.device) -> Tensor:
    """(2, 1, n) in which no two columns, and so no two rows of a matrix, are alike."""
    phase = torch.arange(n, dtype=torch.float64, device=device).square()
    return 2**0.5 * torch.stack((phase.cos(), phase.sin())).unsqueeze(1)


def rounding_samples(terms: Tensor) -> Tensor:
    """(F, k, n) -> (F, 2 k, n): two samples of what rounding makes of sums of terms of these
    sizes."""
    waves = _waves(terms.shape[2], terms.device)
    return (ACCURACY.rounding * terms.unsqueeze(1) * waves).flatten(1, 2)


def largest_sample(step: Tensor) -> Tensor:
    """(F, 2 k, n) -> (F, k, n): the larger of what both samples move."""
    return step.abs().unflatten(1, (2, -1)).amax(1)


def relative_residual(error: Tensor, *terms: Tensor) -> Tensor:
    """(F, k) the length of each row of `error`, relative to those of its terms together."""
    first, *others = (torch.linalg.vector_norm(t, dim=2) for t in terms)
    size = sum(others, first)
    return torch.linalg.vector_norm(error, dim=2) / size.clamp(min=torch.finfo(size.dtype).tiny)


def relative_to(off: Tensor, size: Tensor, data: Tensor) -> Tensor:
    """An error of a solution of this size, relative to it; to a share of the data where it is next
    to nothing."""
    scale = torch.maximum(size, ACCURACY.floor * data)
    return off / scale.clamp(min=torch.finfo(off.dtype).tiny)


def corrections_for(size: float, enough: tuple[tuple[float, int], ...]) -> int:
    """How many corrections a factor needs whose inverse is of this size; `enough`: pairs (size up
    to which, so many)."""
    return next((count for limit, count in enough if size <= limit), enough[-1][1])


def accuracy_status(residual: Tensor, error: Tensor | None, precision: float = 0.0) -> Tensor:
    """The status of rows by their residuals and, where it was estimated, by how far their solutions
    are off.

    precision: of the data; no more is asked of a residual or a solution.
    """
    accurate = residual <= max(ACCURACY.residual, precision)
    status = torch.where(accurate, int(Status.SOLVED), int(Status.INACCURATE))
    if error is None:
        return status
    sure = error <= max(ACCURACY.sensitive, precision)
    status = status.masked_fill(~sure, int(Status.INACCURATE))
    return status.masked_fill(~(error <= ACCURACY.meaningless), int(Status.NOT_CONVERGED))

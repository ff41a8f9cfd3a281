"""Paths around a path that move constraints where a row has no solution otherwise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from convlayer.autodiff.threads import one_thread
from convlayer.conic.program import take_rows
from convlayer.declaration import domain
from convlayer.declaration.declaration import Declaration
from convlayer.paths.closest import Closest, Relaxation, applies, closest, relaxed
from convlayer.paths.cone_program import coarsest_of, entries_of
from convlayer.paths.path import Found, Path, Request, put
from convlayer.shifts import Shifts
from convlayer.solution import Cause, Status

REAL = 1e-13  # a relative shift from which on constraints do contradict each other
ROUNDED = (
    "constraints contradict each other by rounding alone; solved with the least shift that ends it"
)
Entries = Callable[[list[Tensor]], list[Tensor]]  # of some rows, from all values


@dataclass(frozen=True, eq=False)
class Reconciled:
    """Rows that do not settle because constraints contradict each other by rounding get the least
    shift that ends it."""

    path: Path
    declared: Declaration
    tolerance: float

    def __call__(self, request: Request) -> Found:
        found = self.path(request)
        if found.verdict is None or not bool(found.verdict.unsettled.any()):
            return found
        unsettled = (
            found.verdict.unsettled
            if found.stopped is None
            else found.verdict.unsettled & ~found.stopped
        )
        rows = torch.nonzero(unsettled).flatten()
        relaxation = _relaxation(self.declared, rows)
        if relaxation is None:
            return found
        entries = partial(_entries, self.declared, rows)
        given = entries(request.values)
        with one_thread():
            least = closest(relaxation, given, self.tolerance, least=REAL)
        precision = max(domain.relative(coarsest_of(request.values)), self.tolerance)
        sizes = self.declared.canonical.sizes_of_b(given)
        little = (least.shift.detach().abs() <= precision * sizes.amax(1, keepdim=True)).all(1)
        good = torch.nonzero((least.status == Status.SOLVED) & little).flatten()
        if not len(good):
            return found
        answered = _answered(found, request, rows[good], relaxation, least, good, entries)
        return replace(answered, notes=(*found.notes, (rows[good], ROUNDED)))


@dataclass(frozen=True, eq=False)
class Relaxed:
    """Infeasible rows get the closest feasible problem's answer, and they alone."""

    path: Path
    declared: Declaration
    tolerance: float
    few: bool  # few constraints are shifted, rather than all a little

    def __call__(self, request: Request) -> Found:
        found = self.path(request)
        if found.verdict is None or not bool(found.verdict.failed.any()):
            return found
        rows = torch.nonzero(found.verdict.status == Status.INFEASIBLE).flatten()
        relaxation = _relaxation(self.declared, rows)
        if relaxation is None:
            return found
        entries = partial(_entries, self.declared, rows)
        with one_thread():
            least = closest(relaxation, entries(request.values), self.tolerance, self.few)
        answered = _answered(
            found, request, rows, relaxation, least, torch.arange(len(rows)), entries
        )
        good = least.status < Status.INFEASIBLE
        shift = Shifts.of(relaxation.by_constraint(least.shift.detach()), relaxation.names)
        notes = found.notes
        if bool(good.any()):
            how = shift.each(lambda part: part[good])
            notes = (
                *notes,
                (rows[good], f"infeasible; solved as the closest feasible problem. {how}"),
            )
        # (R, ...) of these rows -> (B, ...), zeros elsewhere
        among_all = shift.each(
            lambda part: part.new_zeros(request.size, *part.shape[1:]).index_copy(0, rows, part)
        )
        return replace(answered, notes=notes, shift=among_all)


def _relaxation(declared: Declaration, rows: Tensor) -> Relaxation | None:
    """The problem whose constraints may give way; None: there are no rows, or no such problem."""
    if not len(rows) or applies(declared.canonical) is not None:
        return None
    relaxation = relaxed(declared)
    return relaxation if bool(relaxation.soft.any()) else None


def _entries(declared: Declaration, rows: Tensor, values: list[Tensor]) -> list[Tensor]:
    return entries_of(declared, [take_rows(value, rows) for value in values])


def _answered(
    found: Found,
    request: Request,
    rows: Tensor,
    relaxation: Relaxation,
    least: Closest,
    good: Tensor,  # of the rows of `least` those that stand at `rows`
    entries: Entries,
) -> Found:
    """What was found, with the closest feasible problem's answer in the place of these rows'."""
    canonical = relaxation.canonical

    def answered(outputs: list[Tensor], x: Tensor, y: Tensor, value: Tensor) -> list[Tensor]:
        x, y, value = (take_rows(part, good) for part in (x, y, value))
        theirs = [recovery.value(x, y) for recovery in canonical.variables]
        if request.everything:
            theirs.append(canonical.objective(value))
        return put(outputs, rows, theirs, request.size)

    def outputs_at(values: list[Tensor]) -> list[Tensor]:
        return answered(found.outputs_at(values), *least.outputs_at(entries(values))[:3])

    assert found.verdict is not None
    verdict = least.verdict.take(good)
    others = torch.ones(request.size, dtype=torch.bool).index_fill(0, rows, False)
    ruled = torch.zeros_like(others).index_copy(0, rows, verdict.degenerate)
    return replace(
        found,
        outputs=answered(found.outputs, least.x, least.y, least.value),
        outputs_at=outputs_at,
        verdict=found.verdict.put(rows, verdict),
        blank=None
        if found.blank is None
        else found.blank.index_fill(0, rows.to(found.blank.device), False),
        ruled=(*((mask & others, cause) for mask, cause in found.ruled), (ruled, Cause.SINGULAR)),
        iterate=None,
    )

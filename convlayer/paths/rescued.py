"""A path with another one behind it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from convlayer.autodiff.derivative import Local, Recorded, anew
from convlayer.autodiff.threads import one_thread
from convlayer.conic.program import take_rows
from convlayer.paths.notes import another_way
from convlayer.paths.path import Found, Outputs, Path, Request, put
from convlayer.paths.specialised import without


@dataclass(frozen=True, eq=False)
class Rescued:
    """A kernel, and the cone program for the rows that it could not settle, and for those alone."""

    kernel: Path
    cone_program: Path

    def __call__(self, request: Request) -> Found:
        found = self.kernel(request)
        if found.verdict is None or not bool(found.verdict.unsettled.any()):
            return found
        unsettled = found.verdict.unsettled
        rows = torch.nonzero(unsettled).flatten()
        with one_thread():
            other = self.cone_program(request.of_rows(rows))
        assert other.verdict is not None
        assert found.blank is not None
        verdict = found.verdict.put(rows, other.verdict)
        blank = (
            torch.zeros(len(rows), dtype=torch.bool) if other.blank is None else other.blank.cpu()
        )
        rescued = rows[~verdict.failed[rows]]
        return replace(
            found,
            outputs=put(found.outputs, rows, other.outputs, request.size),
            outputs_at=_outputs_at(found, self.cone_program, request, unsettled, rescued),
            verdict=verdict,
            blank=found.blank.index_copy(0, rows, blank),
            # The cone program tells of its rows by itself.
            ruled=tuple((mask & ~unsettled, cause) for mask, cause in found.ruled),
            notes=(
                *found.notes,
                *another_way(
                    rows, other.verdict.status, "not settled by the kernel", "as a cone program"
                ),
                *((rows[which], what) for which, what in other.notes),
            ),
            details={**found.details, **{int(rows[k]): why for k, why in other.details.items()}},
        )


def _outputs_at(
    found: Found, path: Path, request: Request, unsettled: Tensor, rescued: Tensor
) -> Outputs:
    """The outputs with those of the rescued rows, solved anew, in their place."""

    def solve(values: Sequence[Tensor], _: bool) -> tuple[list[Tensor], tuple, Local]:
        leaves = [value.detach().requires_grad_() for value in values]
        with torch.enable_grad(), one_thread():
            theirs = path(request.of_rows(rescued).at(leaves))
        local = Recorded(
            leaves, theirs.outputs, lambda *values: theirs.outputs_at(list(values)), tuple, list
        )
        return [output.detach() for output in theirs.outputs], (), local

    settled = [output.detach() for output in found.outputs]

    def outputs_at(values: list[Tensor]) -> list[Tensor]:
        # The kernel's own function knows nothing of these rows: it gets the values of others there.
        outputs = settled
        if not bool(unsettled.all()):
            outputs = found.outputs_at([without(value, unsettled) for value in values])
        if not len(rescued):
            return outputs
        parts = [take_rows(value, rescued) for value in values]
        return put(outputs, rescued, anew(solve, parts), request.size)

    return outputs_at

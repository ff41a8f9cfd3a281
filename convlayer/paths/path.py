"""What a path is: a way from parameters to the outputs of a layer.

A layer asks with a `Request`, and a path answers with what it `Found`. Either is frozen. A path
that stands around another one asks it, looks at the verdict, and returns what was found with some
rows answered in another way.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from convlayer.conic.program import take_rows
from convlayer.core.maps import Called
from convlayer.declaration.inputs import BadRows
from convlayer.paths.verdict import Verdict
from convlayer.shifts import Shifts
from convlayer.solution import Cause

# Told of rows (by number) whose derivative wants a warning, why, and of the parameters that are
# concerned (by number).
Tell = Callable[[Tensor, Cause, Sequence[int]], None]
# Parameters (B or 1, *shape) -> outputs (B or 1, ...), twice differentiable at the values at which
# they were found.
Outputs = Callable[[list[Tensor]], list[Tensor]]


NONE_BAD = BadRows()


@dataclass(frozen=True, eq=False)
class Request:
    """What a path is asked: a batch of parameter values, and what is wanted of their solutions."""

    values: list[Tensor]  # of each parameter, (B or 1, *shape)
    size: int  # B
    dtype: torch.dtype  # of the outputs
    tell: Tell  # at backward
    bad: BadRows = NONE_BAD
    # The same with no check left to the kernel, see `Match.vouches`; it raises where the policy
    # says so.
    look_closer: Callable[[], BadRows] = BadRows
    everything: bool = False  # the objective, as the last output, and a verdict on every row
    solver_args: Mapping[str, Any] | None = None  # of this call
    # (x, s, y) of the cone program, NaN in rows that have none
    start: tuple[Tensor, ...] | None = None
    called: Called | None = None  # what the compiled core has found of these rows
    # the rows' names, under which their solutions are kept for a next start
    samples: Sequence[Hashable] | None = None

    def of_rows(self, rows: Tensor) -> Request:
        """These rows alone, cold, none of them bad."""

        def tell(which: Tensor, cause: Cause, parameters: Sequence[int]) -> None:
            self.tell(rows[which], cause, parameters)

        values = [take_rows(value, rows) for value in self.values]
        return Request(
            values,
            len(rows),
            self.dtype,
            tell,
            everything=self.everything,
            solver_args=self.solver_args,
        )

    def at(self, values: list[Tensor]) -> Request:
        """The same at other values of the parameters."""
        return replace(self, values=values, called=None)


@dataclass(frozen=True, eq=False)
class Found:
    """What a path found, rows by number, (B,) each on the host."""

    outputs: list[Tensor]  # the variables, then the objective if it was asked for: (B or 1, ...)
    outputs_at: Outputs  # the same as a function of the parameters
    # None: every row is solved, by a closed form, and nobody asked for more
    verdict: Verdict | None
    blank: Tensor | None = None  # rows without any iterate; None: no row
    # Rows differentiated by rule, and the cause of it, of which the path does not tell by itself at
    # backward.
    ruled: tuple[tuple[Tensor, Cause], ...] = ()
    stopped: Tensor | None = None  # rows that a time limit ended; None: no row
    # (x, s, y) of the cone program, if it was solved alone
    iterate: tuple[Tensor, Tensor, Tensor] | None = None
    notes: tuple[tuple[Tensor, str], ...] = ()  # rows, and which way they took
    details: Mapping[int, str] = field(default_factory=dict)  # of rows that failed, why
    shift: Shifts | None = None  # of each constraint, (B, ...), where one was shifted


class Path(Protocol):
    """A way from parameters to outputs."""

    def __call__(self, request: Request) -> Found:
        """Solve, with what derivatives need where a value requires one."""


def put(
    outputs: Sequence[Tensor], rows: Tensor, theirs: Sequence[Tensor], size: int
) -> list[Tensor]:
    """The outputs (size or 1, ...) with those of another path, (R, ...), in these rows."""
    return [
        mine.expand(size, *mine.shape[1:]).index_copy(
            0, rows.to(mine.device), part.to(mine.device, mine.dtype)
        )
        for mine, part in zip(outputs, theirs, strict=True)
    ]

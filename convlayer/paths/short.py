"""The short way of a call: one call of the compiled core from parameters to outputs, where it
settles every row, and another for the way back.

What it does not settle, and whatever else is asked than outputs and a cotangent, goes the long way
(`convlayer.paths.front`), which takes over what the core has found.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from convlayer.autodiff.derivative import Local, Tensors
from convlayer.autodiff.threads import few_threads
from convlayer.autodiff.torch_internals import is_plain, laid_out
from convlayer.core.maps import INEXACT, NOT_FINITE, Called, Calls
from convlayer.declaration.by_core import sees
from convlayer.declaration.declaration import Declaration
from convlayer.declaration.inputs import bad_rows
from convlayer.paths.choice import Choice
from convlayer.paths.cone_program import HOST, tolerance_of
from convlayer.paths.dispatch import cheaper_core
from convlayer.paths.exit import Exit
from convlayer.paths.gate import flatten_batch
from convlayer.paths.gradients import Exact
from convlayer.paths.path import Tell
from convlayer.paths.pieces import NOTHING
from convlayer.paths.settings import Settings, Solving
from convlayer.paths.specialised import Specialised
from convlayer.solution import Cause
from convlayer.structures import STRUCTURES

DTYPES = (torch.float32, torch.float64)
# What a call and its backward cost beside the core, in seconds.
CALL = 1.2e-4
# Numbers in parameters and variables up to which a problem with a kernel is the core's as well.
LARGEST = 5000
# Kinds of calls, as of batches of many sizes, whose arrangements are kept.
KEPT = 256


class Long(Protocol):
    """The long way of a call."""

    def shapes(self, tensors: Sequence[Any]) -> tuple[torch.dtype, torch.device, tuple[int, ...]]:
        """The outputs' dtype and device, and the batch shape; it refuses what is no value."""

    def values(self, tensors: Sequence[Tensor], batch: tuple[int, ...]) -> list[Tensor]:
        """(*own batch, *shape) -> (B or 1, *shape) of each parameter."""

    def teller(self, batch: tuple[int, ...]) -> Tell:
        """Of rows of this batch."""

    def taken_over(self, tensors: Sequence[Tensor], everything: bool, called: Called) -> Exit:
        """From what the core has found."""


@dataclass(frozen=True, eq=False)
class Arranged:
    """What calls with tensors of the same shapes and dtypes have in common."""

    calls: Calls
    batch: tuple[int, ...]
    dtype: torch.dtype  # of the outputs
    given: list[torch.Size]  # of the parameters
    outputs: list[tuple[int, ...]]  # shapes of the variables
    wide: list[bool]  # parameters that are to be expanded to the batch


class ShortWay:
    """For one problem, with the options that a call's outcome depends on."""

    def __init__(self, declared: Declaration, solving: Solving, kernel: Specialised | None) -> None:
        """kernel: what the core is to be faster than."""
        self.declared, self.solving, self.kernel = declared, solving, kernel
        self.ranks = [len(parameter.shape) for parameter in declared.parameters]
        self._arrangements: dict[Hashable, Arranged | None] = {}

    @classmethod
    def of(cls, choice: Choice, settings: Settings) -> ShortWay | None:
        """None: the core is not asked."""
        declared, kernel, solving = choice.declared, choice.kernel, settings.solving
        if solving.alone or declared.weight is not None or not isinstance(settings.gradient, Exact):
            return None
        if kernel is not None:
            # It is canonicalised for the core, which is not to take long.
            numbers = sum(p.size for p in (*declared.parameters, *declared.variables))
            small = STRUCTURES[choice.structure].compiled and numbers <= LARGEST
            if not small or settings.structure != "auto":
                return None
        return cls(declared, solving, kernel)

    @cached_property
    def sees_all(self) -> bool:
        """Whether the core sees all that is declared of the parameters."""
        return all(map(sees, self.declared.domains, self.declared.parameters))

    @cached_property
    def costs(self) -> list[int]:
        """The parameters whose gradient may be zero everywhere."""
        canonical = self.declared.canonical
        return canonical.costs if canonical.program.is_linear else []

    def __call__(
        self,
        long: Long,
        tensors: Sequence[Tensor],
        everything: bool,
        differentiable: bool,
        validate: bool,
    ) -> Answered | Called | None:
        """None: it is not for this call. What was called, where some row was not settled."""
        if (everything and self.kernel is not None) or not all([is_plain(t) for t in tensors]):
            return None
        like = everything, validate, *[(t.shape, t.dtype) for t in tensors]
        try:  # another thread may clear them meanwhile
            kind = self._arrangements[like]
        except KeyError:
            kind = self._arranged(long, tensors, everything, validate)
            if len(self._arrangements) >= KEPT:
                self._arrangements.clear()
            self._arrangements[like] = kind
        if kind is None:
            return None
        held = self.held(tensors, kind)
        if validate and not (self.sees_all or self._are_inside(long, held, kind)):
            return None
        outputs = [torch.empty(shape, dtype=kind.dtype) for shape in kind.outputs]
        if everything:
            outputs.append(torch.empty(kind.batch, dtype=kind.dtype))
        places = [output.data_ptr() for output in outputs]
        if not everything:
            places.append(0)
        called = kind.calls([t.data_ptr() for t in held], places, differentiable)
        if called.unsettled:
            return called
        return Answered(self, long, kind, called, outputs, tensors, differentiable)

    def takes(self, batch: int) -> bool:
        """Whether the core is asked at this batch: where it is not the slower way."""
        canonical = self.declared.canonical
        core = canonical.core
        if core is None:
            return False
        if self.kernel is None:
            solver = self.solving.attempts(canonical, batch, HOST)[0].solver
            return cheaper_core(canonical, solver, batch) is not None
        cost = self.kernel.match.cost
        return cost is not None and core.seconds(batch) + CALL <= cost.seconds(batch)

    def held(self, tensors: Sequence[Tensor], kind: Arranged) -> list[Tensor]:
        """As the core reads them."""
        if not any(kind.wide) and all([t.is_contiguous() for t in tensors]):
            return list(tensors)
        with few_threads(sum(t.numel() for t in tensors)):
            each = zip(tensors, self.declared.parameters, kind.wide, strict=True)
            wider = [flatten_batch(t, p, kind.batch) if more else t for t, p, more in each]
            return [t.contiguous() for t in wider]

    def _arranged(
        self, long: Long, tensors: Sequence[Tensor], everything: bool, validate: bool
    ) -> Arranged | None:
        dtype, _, batch = long.shapes(tensors)
        declared, size = self.declared, math.prod(batch)
        if not size or any(t.dtype not in DTYPES for t in tensors) or not self.takes(size):
            return None
        maps = declared.maps if everything else declared.lean_maps
        if maps is None:
            return None
        own = [
            t.shape[: t.ndim - rank].numel() for t, rank in zip(tensors, self.ranks, strict=True)
        ]
        calls = Calls(
            maps,
            size,
            [count == 1 < size for count in own],
            [t.dtype is torch.float32 for t in tensors],
            dtype is torch.float32,
            tolerance_of(self.solving, tensors),
            validate,
        )
        outputs = [(*batch, *variable.shape) for variable in declared.variables]
        wide = [count not in (1, size) for count in own]
        return Arranged(calls, batch, dtype, [t.shape for t in tensors], outputs, wide)

    def _are_inside(self, long: Long, held: Sequence[Tensor], kind: Arranged) -> bool:
        """Whether the parameters are in their domains, of which the core does not see all."""
        values = long.values(held, kind.batch)
        return bad_rows(self.declared, values, kind.calls.batch, True).which is None


@dataclass(frozen=True, eq=False)
class Answered(Exit, Local):
    """A call all of whose rows the core settled."""

    way: ShortWay
    long: Long
    kind: Arranged
    called: Called
    outputs: list[Tensor]  # the variables, perhaps the objective
    given: Sequence[Tensor]
    differentiable: bool

    @property
    def filled(self) -> list[Tensor]:
        return [output.detach() for output in self.outputs]

    @property
    def ranks(self) -> list[int]:
        return self.way.ranks

    @property
    def local(self) -> Local:
        return self

    @property
    def everything(self) -> bool:
        """The objective is among the outputs."""
        return len(self.outputs) > len(self.kind.outputs)

    def table(self) -> tuple[Tensor, ...]:
        report, batch = self.called.parts[-1], self.kind.batch
        with few_threads(report.numel()):
            status = torch.zeros(batch, dtype=torch.int64)
            _, residual, _, _, margin, _, iterations = report.mT.clone()
            parts = iterations.long(), residual, self._degenerate, margin
            return status, *(part.reshape(batch) for part in parts)

    @property
    def iterate(self) -> tuple[Tensor, Tensor, Tensor]:
        x, s, y, _, _ = self.called.parts
        with few_threads(len(self.called.points)):
            return x.clone(), s.clone(), y.clone()

    def cotangents(
        self, thetas: Tensors, bars: Sequence[Tensor | None], needed: Sequence[bool]
    ) -> list[Tensor]:
        kind, calls = self.kind, self.kind.calls
        found = self._room(thetas, needed)
        given = [None if bar is None else laid_out(bar, kind.dtype) for bar in bars]
        costs, read, sizes = self._moving_costs(bars, needed), [0] * len(found), None
        if costs:
            sizes = torch.empty(calls.batch, 3, dtype=torch.float64)
        if costs or calls.maps.reads_entries:
            held = self.way.held(thetas, kind)
            read = [t.data_ptr() for t in held]
        flags = torch.empty(calls.batch, dtype=torch.uint8)
        places = [0 if bar is None else bar.data_ptr() for bar in given]
        flagged = calls.pull(
            self.called,
            read,
            places if self.everything else [*places, 0],
            [0 if part is None else part.data_ptr() for part in found],
            flags,
            sizes,
        )
        if flagged or sizes is not None:
            with few_threads(sum(part.numel() for part in found if part is not None)):
                self._tell(flags)
                if sizes is not None:
                    self._tell_of_zero(sizes, costs, found)
        each = zip(found, kind.given, kind.wide, strict=True)
        return [
            part.sum_to_size(shape) if wide else part
            for part, shape, wide in each
            if part is not None
        ]

    def cotangent(self, thetas: Tensors, bars: Tensors, needed: Sequence[bool]) -> list[Tensor]:
        pairs = zip(thetas, self.kind.given, strict=True)
        if all(theta.shape == shape for theta, shape in pairs):
            return self.cotangents(thetas, bars, needed)
        return self._longer.cotangent(thetas, bars, needed)  # for each row of what is shared

    def tangent(self, thetas: Tensors, a: Tensors) -> list[Tensor]:
        return self._longer.tangent(thetas, a)

    def second(self, thetas: Tensors, a: Tensors, b: Tensors) -> list[Tensor]:
        return self._longer.second(thetas, a, b)

    def mixed(
        self, thetas: Tensors, bars: Tensors, a: Tensors, needed: Sequence[bool]
    ) -> list[Tensor]:
        return self._longer.mixed(thetas, bars, a, needed)

    @cached_property
    def _longer(self) -> Local:
        """The same by the long way."""
        return self.long.taken_over(self.given, self.everything, self.called).local

    @cached_property
    def _degenerate(self) -> Tensor:
        """(B,) of the table; a derivative may flag some."""
        return torch.zeros(self.kind.calls.batch, dtype=torch.bool)

    def _room(self, thetas: Tensors, needed: Sequence[bool]) -> list[Tensor | None]:
        """For the cotangents that are needed, as the core gives them."""
        batch = self.kind.batch

        def room(t: Tensor, rank: int, wide: bool) -> Tensor:
            if wide:
                return t.new_empty((*batch, *t.shape[t.ndim - rank :]))
            return torch.empty_like(t, memory_format=torch.contiguous_format)

        each = zip(thetas, self.ranks, self.kind.wide, needed, strict=True)
        return [room(t, rank, wide) if need else None for t, rank, wide, need in each]

    def _moving_costs(self, bars: Sequence[Tensor | None], needed: Sequence[bool]) -> list[int]:
        """Of the parameters that are needed, those whose gradient is to be looked at."""
        costs = [k for k in self.way.costs if needed[k]]
        objective = bars[-1] if costs and self.everything else None
        if objective is None:
            return costs
        with few_threads(objective.numel()):
            return [] if bool(objective.any()) else costs

    def _tell(self, flags: Tensor) -> None:
        tell = self.long.teller(self.kind.batch)
        for flag, cause in ((NOT_FINITE, Cause.LOSS), (INEXACT, Cause.ILL_CONDITIONED)):
            rows = torch.nonzero(flags == flag).flatten()
            if len(rows):
                tell(rows, cause, ())
            if flag == INEXACT:
                self._degenerate[rows] = True

    def _tell_of_zero(
        self, sizes: Tensor, costs: Sequence[int], found: Sequence[Tensor | None]
    ) -> None:
        """Of rows that have a cotangent, and no gradient in any of the costs."""
        x_bar, x, q = sizes.unbind(1)
        unmoved = x_bar * x > 0
        for k in costs:
            bar = found[k]
            assert bar is not None
            largest = bar.reshape(self.kind.calls.rows[k], -1).abs().amax(1).double()
            unmoved &= largest * q <= NOTHING * x_bar * x
        if bool(unmoved.any()):
            tell = self.long.teller(self.kind.batch)
            tell(torch.nonzero(unmoved).flatten(), Cause.ZERO, costs)

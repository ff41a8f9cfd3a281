"""What a call found, row by row, and the gate through which its outputs leave.

Behind the gate stands the graph that the path recorded. In front of it outputs are the user's: filled with NaN where a row failed
and the policy says so, their cotangents guarded, and differentiable as often as the path's solution is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import cvxpy as cp
import torch
from torch import Tensor

from convlayer.autodiff.derivative import (
    Local,
    Point,
    Recorded,
    is_transformed,
    pulled,
    pulled_back,
)
from convlayer.autodiff.threads import few_threads_to_differentiate
from convlayer.kernels.answer import Answer
from convlayer.paths.specialised import without
from convlayer.shifts import Shifts
from convlayer.solution import Cause, Status


@dataclass(eq=False)
class Rows:
    """What a path found, row by row: (B,) each, on the host. None: what holds for every row of a closed form."""

    outputs: list[
        Tensor
    ]  # the variables, then the objective if it was asked for: (B or 1, ...), in the end (*batch, ...)
    again: Callable[
        [list[Tensor]], list[Tensor]
    ]  # parameters (B or 1, *shape) -> outputs (B or 1, ...), twice differentiable
    status: Tensor | None
    iterations: Tensor | None
    residual: Tensor | None
    degenerate: Tensor | None
    margin: Tensor | None
    blank: Tensor | None  # rows without any iterate
    iterate: tuple[Tensor, Tensor, Tensor] | None = None
    notes: list[tuple[Tensor, str]] = field(default_factory=list)  # rows, and which way they took
    shift: Shifts | None = None  # of each constraint, (B, ...), where one was shifted
    warned: bool = False  # the path itself tells at backward which rows were differentiated by rule
    batch: tuple[int, ...] = ()
    stopped: Tensor | None = None  # rows that a time limit ended, if one did
    details: dict[int, str] = field(default_factory=dict)  # of rows that failed
    leaves: tuple[Tensor, ...] = ()  # the parameters as they were given
    parameters: Sequence[cp.Parameter] = ()
    versions: tuple[int, ...] = ()  # of the outputs, by torch's count of changes in place
    dtype: torch.dtype = torch.float64
    device: torch.device = field(default_factory=partial(torch.device, "cpu"))
    failed: Tensor | None = None  # (*batch,) rows that failed, if any did
    empty: Tensor | None = None  # (*batch,) of those the rows to be filled with NaN
    ruled: Tensor | None = None  # (B,) rows differentiated by rule that `warn` is to be told of
    cause: Cause = Cause.SINGULAR  # of their rule
    warn: Callable[[Tensor, Cause], None] | None = None

    @property
    def filled(self) -> list[Tensor]:
        """The outputs apart from their graph, NaN in rows that are to be empty."""
        outputs = [output.detach() for output in self.outputs]
        return outputs if self.empty is None else [_filled(output, self.empty) for output in outputs]

    def leave(self, thetas: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The outputs, through the gate if they are differentiable."""
        if any(output.requires_grad for output in self.outputs):
            return _Gate.apply(self, *thetas)
        return tuple(self.filled)

    def table(self) -> tuple[Tensor, ...]:
        """Status, iterations, residual, degenerate and margin, (*batch,) each."""
        return tuple(
            getattr(self, name).reshape(self.batch)
            for name in ("status", "iterations", "residual", "degenerate", "margin")
        )

    @property
    def shifts(self) -> Shifts | None:
        """By constraint, (*batch, ...) each."""
        if self.shift is None:
            return None
        return Shifts.of([_in_batch(part, self.batch) for part in self.shift], self.shift.names)

    def guard(self, bars: Sequence[Any]) -> list[Any]:
        """Cotangents of the outputs: in rows that failed NaN where the loss uses them and zero where it does not."""
        self._tell(bars)
        spoilt = self._spoilt(bars)
        if spoilt is not None:
            bars = [None if bar is None else _filled(bar, spoilt) for bar in bars]
        if self.failed is None:
            return list(bars)
        guarded = []
        for bar in bars:
            if bar is not None:
                bar, failed = bar.clone(), self.failed.to(bar.device)
                rows = bar[failed]
                bar[failed] = torch.zeros_like(rows).masked_fill_(rows != 0, torch.nan)
            guarded.append(bar)
        return guarded

    def spoil(self, tangents: Sequence[Tensor]) -> list[Tensor]:
        """Tangents of the outputs, NaN in rows that failed."""
        self._tell(tangents)
        return list(tangents) if self.failed is None else [_filled(tangent, self.failed) for tangent in tangents]

    def _tell(self, parts: Sequence[Tensor | None]) -> None:
        """Warn of rows differentiated by rule whose cotangents, or tangents, are not zero."""
        if self.ruled is None or self.warn is None:
            return
        used = torch.zeros_like(self.ruled)
        for part in parts:
            if part is not None:
                used |= _used(part, self.batch).cpu()
        if bool((used & self.ruled).any()):
            self.warn(torch.nonzero(used & self.ruled).flatten(), self.cause)

    def _spoilt(self, bars: Sequence[Tensor | None]) -> Tensor | None:
        """Rows (*batch,) that have a solution and cotangents that are not finite, if any: told of, as it is no fault of the layer's."""
        doubtful = [bar for bar in bars if bar is not None and not math.isfinite(bar.sum().item())]
        if not doubtful:  # a finite sum has finite terms
            return None
        spoilt = torch.zeros(math.prod(self.batch), dtype=torch.bool)
        for bar in doubtful:
            spoilt |= (~torch.isfinite(bar)).reshape(len(spoilt), -1).any(1).cpu()
        if self.failed is not None:
            spoilt &= ~self.failed.flatten()
        if not bool(spoilt.any()):
            return None
        if self.warn is not None:
            self.warn(torch.nonzero(spoilt).flatten(), Cause.LOSS)
        return spoilt.view(self.batch)

    def fence(self, values: Sequence[Tensor]) -> None:
        """Keep rows that failed from the path's own derivative; the values are the parameters, (B or 1, *shape) each."""
        if self.failed is not None and any(value.requires_grad for value in values):
            fenced = _Fence.apply(self.failed, len(self.outputs), *self.outputs, *values)
            self.outputs = list(fenced)

    @property
    def local(self) -> Local:
        return Recorded(self.leaves, self.outputs, self._again, self.guard, self.spoil)

    def _again(self, *thetas: Tensor) -> list[Tensor]:
        """The outputs as a function of the parameters, twice differentiable.

        A row that failed becomes a sum of squares: a cotangent of it that is NaN arrives as NaN, and one that is zero as zero.
        """
        if tuple(output._version for output in self.outputs if output.requires_grad) != self.versions:
            raise RuntimeError("An output of the layer was changed in place; its derivative needs it as it was.")
        size = math.prod(self.batch)
        with no_autocast(self.device):
            values = [flatten_batch(t, p, self.batch) for t, p in zip(thetas, self.parameters, strict=True)]
            if self.failed is None:
                outputs = self.again(values)
            else:
                failed = self.failed.flatten()
                squares = torch.stack(
                    [v.nan_to_num(0.0, 0.0, 0.0).unsqueeze(-1).flatten(1).square().sum(1).expand(size) for v in values]
                ).sum(0)
                if bool(failed.all()):  # there are no values at which the path could be asked
                    shapes = [output.shape[len(self.batch) :] for output in self.outputs]
                    flat = [o.detach().reshape(size, *shape) for o, shape in zip(self.outputs, shapes, strict=True)]
                else:
                    flat = self.again([without(value, failed) for value in values])
                outputs = [_where(failed, squares, output) for output in flat]
            return [shaped(output, self.dtype, self.device, self.batch, size) for output in outputs]

    @classmethod
    def of_answer(
        cls,
        answer: Answer,
        outputs: list[Tensor],
        again: Callable[[list[Tensor]], list[Tensor]],
        size: int,
        bad: Tensor | None,
        everything: bool,
    ) -> Rows:
        """The rows of a kernel's answer; only `everything`, or a row that is not plainly solved, fills them in."""

        def row(values: Tensor | None, blank: Any, dtype: torch.dtype) -> Tensor:
            if values is None:
                return torch.full((size,), blank, dtype=dtype)
            return values.to("cpu", dtype).expand(size)

        status, degenerate = answer.status, answer.degenerate
        if status is not None and not bool(status.any()):
            status = None
        if degenerate is not None and not bool(degenerate.any()):
            degenerate = None
        if status is None and bad is None and not everything:
            flags = None if degenerate is None else row(degenerate, False, torch.bool)
            return cls(outputs, again, None, None, None, flags, None, None)
        status = row(status, int(Status.SOLVED), torch.int64)
        # Parameters were found inside their domains: what a kernel cannot take there is the cone program's to judge.
        status = torch.where(status == Status.BAD_INPUT, int(Status.NOT_CONVERGED), status)
        if bad is not None:
            status = torch.where(bad, int(Status.BAD_INPUT), status)
        failed = status >= Status.INFEASIBLE
        residual = row(answer.residual, 0.0, torch.float64).masked_fill(failed, torch.nan)
        degenerate = row(degenerate, False, torch.bool) & ~failed
        iterations, margin = row(answer.iterations, 0, torch.int64), torch.full_like(residual, torch.nan)
        return cls(outputs, again, status, iterations, residual, degenerate, margin, failed)


class _Fence(torch.autograd.Function):
    """(failed (*batch,), how many outputs, *outputs (*batch, ...), *parameters (B or 1, *shape)) -> the outputs.

    Of a row that failed no cotangent reaches the path, whose formulas hold for solutions only. Instead every parameter of the row
    gets NaN if the cotangent is not zero, a shared one if that of any row is not.
    """

    @staticmethod
    def forward(ctx, failed: Tensor, count: int, *tensors: Tensor):
        ctx.failed, ctx.count = failed, count
        ctx.shapes = [(value.shape, value.dtype, value.device) for value in tensors[count:]]
        ctx.set_materialize_grads(False)
        return tuple(output.view_as(output) for output in tensors[:count])

    @staticmethod
    def backward(ctx, *bars: Tensor | None):
        used = torch.zeros_like(ctx.failed).flatten()
        passed: list[Tensor | None] = []
        for bar in bars:
            if bar is not None:
                used |= _used(bar, ctx.failed.shape).cpu()
                bar = bar.masked_fill(_beside(ctx.failed, bar), 0.0)
            passed.append(bar)
        used &= ctx.failed.flatten()
        if not bool(used.any()):
            return None, None, *passed, *(None for _ in ctx.shapes)
        spoilt = []
        for (shape, dtype, device), needed in zip(ctx.shapes, ctx.needs_input_grad[2 + ctx.count :], strict=True):
            rows = used if shape[0] == len(used) else used.any().unsqueeze(0)
            zeros = torch.zeros(shape, dtype=dtype, device=device) if needed else None
            spoilt.append(None if zeros is None else zeros.masked_fill_(_beside(rows, zeros), torch.nan))
        return None, None, *passed, *spoilt


def _used(bar: Tensor, batch: Sequence[int]) -> Tensor:
    """(B,) rows whose cotangent, (*batch, ...), is not zero."""
    return (bar.unsqueeze(-1).flatten(len(batch)) != 0).any(-1).flatten()


def _beside(rows: Tensor, output: Tensor) -> Tensor:
    """(*batch,) as it broadcasts over (*batch, ...)."""
    return rows.to(output.device).view(rows.shape + (1,) * (output.ndim - rows.ndim))


def _filled(output: Tensor, rows: Tensor) -> Tensor:
    """NaN in these rows, (*batch,) of (*batch, ...)."""
    return output.masked_fill(_beside(rows, output), torch.nan)


def _where(rows: Tensor, then: Tensor, output: Tensor) -> Tensor:
    """(B,), (B or 1,), (B or 1, ...) -> (B, ...): the one number in these rows."""
    ones = [1] * (output.ndim - 1)
    return torch.where(rows.to(output.device).view(-1, *ones), then.to(output).view(-1, *ones), output)


def _in_batch(part: Any, batch: tuple[int, ...]) -> Any:
    """(B, ...) -> (*batch, ...); a tuple's parts each, None as it is."""
    if isinstance(part, tuple):
        return tuple(_in_batch(one, batch) for one in part)
    return None if part is None else part.reshape(batch + part.shape[1:])


def spread(part: Any, rows: Tensor, size: int) -> Any:
    """What these rows have, (R, ...), as (size, ...) with zeros elsewhere; a tuple's parts each, None as it is."""
    if isinstance(part, tuple):
        return tuple(spread(one, rows, size) for one in part)
    return None if part is None else part.new_zeros(size, *part.shape[1:]).index_copy(0, rows, part)


def put(outputs: Sequence[Tensor], rows: Tensor, theirs: Sequence[Tensor], size: int) -> list[Tensor]:
    """The outputs (size or 1, ...) with those of other paths, (R, ...), in these rows."""
    return [
        mine.expand(size, *mine.shape[1:]).index_copy(0, rows.to(mine.device), part.to(mine.device, mine.dtype))
        for mine, part in zip(outputs, theirs, strict=True)
    ]


def leaves_of(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The same tensors as leaves of a graph of the layer's own, to be differentiated as they are."""
    recorded = torch.is_grad_enabled()
    return tuple(
        t.detach().requires_grad_(recorded and t.requires_grad) if isinstance(t, Tensor) else t for t in tensors
    )


class _Gate(torch.autograd.Function):
    """(rows, *parameters) -> the outputs, NaN in rows that are to be empty.

    Cotangents pass as `Rows.guard` lets them into the graph that was recorded between leaves and outputs, which is of the layer's own
    so that all of it can run on one thread. Where their own derivative is wanted (create_graph=True) they are pulled back by a
    function that has one.
    """

    @staticmethod
    def forward(ctx, rows: Rows, *thetas: Tensor):
        ctx.rows = rows
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*thetas)
        return tuple(rows.filled)

    @staticmethod
    def backward(ctx, *bars: Tensor | None):
        if any(bar is not None and torch._C._functorch.is_legacy_batchedtensor(bar) for bar in bars):
            raise RuntimeError(
                "A layer does not take torch's old vmap (is_grads_batched=True, vectorize=True, check_batched_grad=True): use torch.func.jacrev, "
                "or torch.func.vmap over torch.autograd.grad."
            )
        rows, thetas, needed = ctx.rows, ctx.saved_tensors, ctx.needs_input_grad[1:]
        if not (torch.is_grad_enabled() or is_transformed(bars)):
            wanted = [leaf for leaf, need in zip(rows.leaves, needed, strict=True) if need]
            keep = torch._C._autograd._get_current_graph_task_keep_graph()
            with few_threads_to_differentiate([*thetas, *rows.outputs]):
                found = iter(pulled(rows.outputs, wanted, rows.guard(bars), retain_graph=keep))
            return None, *(next(found) if need else None for need in needed)
        given = [
            torch.zeros_like(output) if bar is None else bar for bar, output in zip(bars, rows.outputs, strict=True)
        ]
        point = Point([len(p.shape) for p in rows.parameters], local=rows.local)
        return None, *pulled_back(point, thetas, rows.filled[0], given, needed)


def flatten_batch(tensor: Tensor, parameter: cp.Parameter, batch: tuple[int, ...]) -> Tensor:
    """(*own batch, *shape) -> (B, *shape), or (1, *shape) for a parameter that the whole batch shares."""
    shape: tuple[int, ...] = tuple(parameter.shape)
    lead = tensor.ndim - len(shape)
    if not lead:
        return tensor.expand(0, *shape) if 0 in batch else tensor.unsqueeze(0)
    own = tensor.shape[:lead]
    if lead == 1 and own == batch:
        return tensor
    if own.numel() == 1 and 0 not in batch:
        return tensor.reshape(1, *shape)
    return tensor.expand(*batch, *shape).reshape(math.prod(batch), *shape)


def shaped(output: Tensor, dtype: torch.dtype, device: torch.device, batch: tuple[int, ...], size: int) -> Tensor:
    """(B or 1, *shape) -> (*batch, *shape)."""
    if output.dtype is not dtype or output.device != device:
        output = output.to(device, dtype)
    if not batch:
        return output.squeeze(0)
    if output.shape[0] != size:
        output = output.expand(size, *output.shape[1:])
    return output if len(batch) == 1 else output.reshape(*batch, *output.shape[1:])


def no_autocast(device: torch.device):
    """A context in which no operation on this device is cast to another precision."""
    kind = device.type if device.type == "cpu" or torch.amp.is_autocast_available(device.type) else "cpu"
    if not (torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled(kind)):
        return nullcontext()
    stack = ExitStack()
    for off in {"cpu", kind}:
        stack.enter_context(torch.autocast(off, enabled=False))
    return stack

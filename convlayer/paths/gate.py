"""The gate through which the outputs of a call leave.

Behind the gate stands the graph that the path recorded. In front of it outputs are the user's:
filled with NaN where a row failed and the policy says so, their cotangents guarded, and
differentiable as often as the path's solution is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any

import cvxpy as cp
import torch
from torch import Tensor

from convlayer.autodiff.derivative import Local, Recorded, pulled
from convlayer.autodiff.threads import few_threads_to_differentiate
from convlayer.autodiff.torch_internals import keeps_graph, versions
from convlayer.paths.exit import Exit
from convlayer.paths.path import Found, Tell
from convlayer.paths.specialised import without
from convlayer.shifts import Shifts
from convlayer.solution import Cause, rows_in_words


@dataclass(frozen=True, eq=False)
class Gate(Exit):
    """The outputs of a call on their way out."""

    # (*batch, ...), as the path recorded them; where rows failed, behind the fence
    outputs: list[Tensor]
    found: Found
    # the parameters as they were given, in the graph that the path recorded
    leaves: tuple[Tensor, ...]
    parameters: Sequence[cp.Parameter]
    batch: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    tell: Tell
    failed: Tensor | None  # (*batch,) rows that failed, if any did
    empty: Tensor | None  # (*batch,) of those the rows to be filled with NaN
    versions: list[int]  # of the outputs, by torch's count of changes in place

    @classmethod
    def of(
        cls,
        found: Found,
        values: Sequence[Tensor],  # of each parameter, (B or 1, *shape)
        leaves: tuple[Tensor, ...],
        parameters: Sequence[cp.Parameter],
        batch: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        tell: Tell,
        fill: bool,  # rows that failed with NaN, not only those that have no iterate
    ) -> Gate:
        size = math.prod(batch)
        outputs = [shaped(output, dtype, device, batch, size) for output in found.outputs]
        failed = empty = None
        if found.verdict is not None and bool(found.verdict.failed.any()):
            failed = found.verdict.failed.view(batch)
            blank = (
                torch.zeros(size, dtype=torch.bool) if found.blank is None else found.blank.cpu()
            )
            empty = failed if fill else blank.view(batch)
            if any(value.requires_grad for value in values):
                # Keep rows that failed from the path's own derivative.
                outputs = list(_Fence.apply(failed, len(outputs), *outputs, *values))
        changes = versions([output for output in outputs if output.requires_grad])
        return cls(
            outputs, found, leaves, parameters, batch, dtype, device, tell, failed, empty, changes
        )

    @property
    def filled(self) -> list[Tensor]:
        """NaN in rows that are to be empty."""
        outputs = [output.detach() for output in self.outputs]
        return (
            outputs if self.empty is None else [_filled(output, self.empty) for output in outputs]
        )

    @property
    def differentiable(self) -> bool:  # type: ignore[override]
        return any(output.requires_grad for output in self.outputs)

    @property
    def ranks(self) -> list[int]:
        return [len(parameter.shape) for parameter in self.parameters]

    def cotangents(
        self, thetas: tuple[Tensor, ...], bars: Sequence[Tensor | None], needed: Sequence[bool]
    ) -> list[Tensor]:
        """As `guard` lets them into the graph that was recorded between leaves and outputs, which
        is of the layer's own so that all of it can run on one thread."""
        wanted = [leaf for leaf, need in zip(self.leaves, needed, strict=True) if need]
        keep = keeps_graph()
        with few_threads_to_differentiate([*thetas, *self.outputs]):
            return pulled(self.outputs, wanted, self.guard(bars), plain=True, retain_graph=keep)

    def table(self) -> tuple[Tensor, ...]:
        assert self.found.verdict is not None
        return self.found.verdict.each(lambda part: part.reshape(self.batch)).parts()

    @property
    def iterate(self) -> tuple[Tensor, Tensor, Tensor] | None:
        return self.found.iterate

    @property
    def shifts(self) -> Shifts | None:
        shift = self.found.shift
        if shift is None:
            return None
        return shift.each(lambda part: part.reshape(self.batch + part.shape[1:]))

    @property
    def notes(self) -> tuple[str, ...]:
        return tuple(
            f"{rows_in_words(rows, self.batch)}: {what}" for rows, what in self.found.notes
        )

    def guard(self, bars: Sequence[Any]) -> list[Any]:
        """Cotangents of the outputs: in rows that failed NaN where the loss uses them and zero
        where it does not."""
        self._tell_of_ruled(bars)
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
        self._tell_of_ruled(tangents)
        return (
            list(tangents)
            if self.failed is None
            else [_filled(tangent, self.failed) for tangent in tangents]
        )

    def _tell_of_ruled(self, parts: Sequence[Tensor | None]) -> None:
        """Warn of rows differentiated by rule whose cotangents, or tangents, are not zero."""
        if not self.found.ruled:
            return
        used = torch.zeros(math.prod(self.batch), dtype=torch.bool)
        for part in parts:
            if part is not None:
                used |= _used(part, self.batch).cpu()
        for ruled, cause in self.found.ruled:
            if bool((used & ruled).any()):
                self.tell(torch.nonzero(used & ruled).flatten(), cause, ())

    def _spoilt(self, bars: Sequence[Tensor | None]) -> Tensor | None:
        """Rows (*batch,) that have a solution and cotangents that are not finite, if any: told of,
        as it is no fault of the layer's."""
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
        self.tell(torch.nonzero(spoilt).flatten(), Cause.LOSS, ())
        return spoilt.view(self.batch)

    @property
    def local(self) -> Local:
        return Recorded(self.leaves, self.outputs, self._outputs_at, self.guard, self.spoil)

    def _outputs_at(self, *thetas: Tensor) -> list[Tensor]:
        """The outputs as a function of the parameters, twice differentiable.

        A row that failed becomes a sum of squares: a cotangent of it that is NaN arrives as NaN,
        and one that is zero as zero.
        """
        if versions([output for output in self.outputs if output.requires_grad]) != self.versions:
            raise RuntimeError(
                "An output of the layer was changed in place; its derivative needs it as it was."
            )
        size = math.prod(self.batch)
        with no_autocast(self.device):
            values = [
                flatten_batch(t, p, self.batch)
                for t, p in zip(thetas, self.parameters, strict=True)
            ]
            if self.failed is None:
                outputs = self.found.outputs_at(values)
            else:
                outputs = self._outputs_beside_failed(self.failed.flatten(), values)
            return [shaped(output, self.dtype, self.device, self.batch, size) for output in outputs]

    def _outputs_beside_failed(self, failed: Tensor, values: list[Tensor]) -> list[Tensor]:
        size = len(failed)
        squares = torch.stack(
            [
                v.nan_to_num(0.0, 0.0, 0.0).unsqueeze(-1).flatten(1).square().sum(1).expand(size)
                for v in values
            ]
        ).sum(0)
        if bool(failed.all()):  # there are no values at which the path could be asked
            shapes = [output.shape[len(self.batch) :] for output in self.outputs]
            flat = [
                o.detach().reshape(size, *shape)
                for o, shape in zip(self.outputs, shapes, strict=True)
            ]
        else:
            flat = self.found.outputs_at([without(value, failed) for value in values])
        return [_where(failed, squares, output) for output in flat]


class _Fence(torch.autograd.Function):
    """(failed (*batch,), how many outputs, *outputs (*batch, ...), *parameters (B or 1, *shape)) ->
    the outputs.

    Of a row that failed no cotangent reaches the path, whose formulas hold for solutions only.
    Instead every parameter of the row gets NaN if the cotangent is not zero, a shared one if that
    of any row is not.
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
        for (shape, dtype, device), needed in zip(
            ctx.shapes, ctx.needs_input_grad[2 + ctx.count :], strict=True
        ):
            rows = used if shape[0] == len(used) else used.any().unsqueeze(0)
            zeros = torch.zeros(shape, dtype=dtype, device=device) if needed else None
            spoilt.append(
                None if zeros is None else zeros.masked_fill_(_beside(rows, zeros), torch.nan)
            )
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
    return torch.where(
        rows.to(output.device).view(-1, *ones), then.to(output).view(-1, *ones), output
    )


def flatten_batch(tensor: Tensor, parameter: cp.Parameter, batch: tuple[int, ...]) -> Tensor:
    """(*own batch, *shape) -> (B, *shape), or (1, *shape) for a parameter that the whole batch
    shares."""
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


def shaped(
    output: Tensor, dtype: torch.dtype, device: torch.device, batch: tuple[int, ...], size: int
) -> Tensor:
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
    kind = (
        device.type
        if device.type == "cpu" or torch.amp.is_autocast_available(device.type)
        else "cpu"
    )
    if not (torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled(kind)):
        return nullcontext()
    stack = ExitStack()
    for off in {"cpu", kind}:
        stack.enter_context(torch.autocast(off, enabled=False))
    return stack

"""What a call leaves by: its outputs, and the way of their cotangents back to the parameters."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from convlayer.autodiff.derivative import EvaluationPoint, Local, pulled_back
from convlayer.autodiff.torch_internals import at_home, is_of_old_vmap, is_transformed
from convlayer.shifts import Shifts

NO_OLD_VMAP = (
    "A layer does not take torch's old vmap (is_grads_batched=True, vectorize=True, check_batched_grad=True): use torch.func.jacrev, "
    "or torch.func.vmap over torch.autograd.grad."
)


class Exit(ABC):
    """The outputs of a call, with `everything` the objective last."""

    differentiable: bool  # there is a way back to a parameter

    @property
    @abstractmethod
    def filled(self) -> list[Tensor]:
        """The outputs apart from their graph."""

    @property
    @abstractmethod
    def ranks(self) -> list[int]:
        """Dimensions of each parameter, without those of the batch."""

    @property
    @abstractmethod
    def local(self) -> Local:
        """The derivative, for torch to compose."""

    @abstractmethod
    def cotangents(
        self, thetas: tuple[Tensor, ...], bars: Sequence[Tensor | None], needed: Sequence[bool]
    ) -> list[Tensor]:
        """From those of the outputs, None being zero, to those of the parameters that are needed;
        once, and plain."""

    @abstractmethod
    def table(self) -> tuple[Tensor, ...]:
        """Status, iterations, residual, degenerate and margin, (*batch,) each."""

    @property
    @abstractmethod
    def iterate(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """(x, s, y) of the cone program, if it was solved alone."""

    @property
    def notes(self) -> tuple[str, ...]:
        """Which rows took which way, in words."""
        return ()

    @property
    def shifts(self) -> Shifts | None:
        """By constraint, (*batch, ...) each."""
        return None

    def leave(self, thetas: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The outputs, differentiable if they are."""
        return _Leave.apply(self, *thetas) if self.differentiable else tuple(self.filled)


class _Leave(torch.autograd.Function):
    """(exit, *parameters) -> the outputs.

    Where the cotangents' own derivative is wanted (create_graph=True) they are pulled back by a
    function that has one.
    """

    @staticmethod
    def forward(ctx, way_out: Exit, *thetas: Tensor):
        ctx.way_out = way_out
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*thetas)
        return tuple(way_out.filled)

    @staticmethod
    def backward(ctx, *bars: Tensor | None):
        if any(bar is not None and is_of_old_vmap(bar) for bar in bars):
            raise RuntimeError(NO_OLD_VMAP)
        way_out, thetas, needed = ctx.way_out, ctx.saved_tensors, ctx.needs_input_grad[1:]
        if not (torch.is_grad_enabled() or is_transformed(bars)):
            with at_home():
                found = iter(way_out.cotangents(thetas, bars, needed))
            return None, *(next(found) if need else None for need in needed)
        outputs = way_out.filled
        given = [
            torch.zeros_like(output) if bar is None else bar
            for bar, output in zip(bars, outputs, strict=True)
        ]
        point = EvaluationPoint(way_out.ranks, local=way_out.local)
        return None, *pulled_back(point, thetas, outputs[0], given, needed)

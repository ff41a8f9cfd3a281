"""What a kernel returns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from convlayer.solution import Status


@dataclass(frozen=True, eq=False)
class Answer:
    """The solution of a batch by a kernel; None stands for what holds for every row of a closed
    form."""

    # (B, ...) each: the primal solution, then the duals, as the kernel's docstring says.
    outputs: tuple[Tensor, ...]
    # (B,) int64, values of Status; None: every row is SOLVED.
    status: Tensor | None = None
    # (B,) int64; None: a closed form, 0.
    iterations: Tensor | None = None
    # (B,) float64, relative residual of the optimality conditions; None: rounding, 0.
    residual: Tensor | None = None
    # (B,) bool, rows differentiated one-sidedly or least-norm; None: nowhere.
    degenerate: Tensor | None = None
    # The kernel has found its matrices positive definite, all of them.
    definite: bool = False
    # The outputs as a function of the inputs, see `again`; None: no input is to be differentiated.
    local: Callable[..., tuple[Tensor, ...]] | None = None
    # (B,) by how much equalities that depend on each other disagree, relative to their right-hand
    # sides.
    apart: Callable[[], Tensor] | None = None
    # Without `local`: the kernel's outputs, from which `outputs` were made.
    constant: tuple[Tensor, ...] | None = None

    def unsettled(self, rows: Tensor | None) -> Answer:
        """With these rows (B or 1,) bool, if any, left to the cone program."""
        if rows is None or not bool(rows.any()):
            return self
        before = torch.zeros_like(rows, dtype=torch.int64) if self.status is None else self.status
        return replace(self, status=torch.where(rows, int(Status.NOT_CONVERGED), before))

    def flagged(self) -> Answer:
        """With every row differentiated by rule."""
        first = self.outputs[0]
        return replace(
            self, degenerate=torch.ones(len(first), dtype=torch.bool, device=first.device)
        )

    def again(self, *inputs: Tensor | None) -> Answer:
        """The same answer for the same inputs, in plain torch operations with the kernel's own
        factor: its first and second derivatives are those of the solution, in forward and in
        reverse mode. A third is not.

        Where no input was to be differentiated, what is made of the outputs may be: they are
        constants."""
        if self.local is not None:
            return replace(self, outputs=self.local(*inputs))
        return (
            self if self.constant is None else replace(self, outputs=self.constant, constant=None)
        )

    def with_outputs(self, *outputs: Tensor) -> Answer:
        """The same rows with other outputs made from these."""
        return replace(self, outputs=outputs, constant=self.outputs if self.local is None else None)


def answered(at: Answer | None, kernel: Callable[..., Answer], *inputs: Tensor | None) -> Answer:
    """The kernel's answer; with `at`, that answer as a function of the inputs, for second
    derivatives and forward mode."""
    return kernel(*inputs) if at is None else at.again(*inputs)

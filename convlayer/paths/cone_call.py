"""A batch of a cone program: what is asked of its solution, and what was found."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from convlayer.conic.elimination import Elimination
from convlayer.conic.lift import Lift
from convlayer.core.rows import Plan, Solved
from convlayer.declaration.canonical import Canonical
from convlayer.paths.cone_derivative import ConeDerivative
from convlayer.paths.evaluation import Agreement
from convlayer.paths.path import Tell
from convlayer.paths.verdict import Verdict
from convlayer.solvers import Attempt


@dataclass(frozen=True, eq=False)
class ConeRequest:
    """How a batch is solved and differentiated."""

    canonical: Canonical
    attempts: Sequence[Attempt]
    tolerance: float
    executor: Executor | None
    elimination: Elimination | None  # for the first attempt
    core: Plan | None  # the compiled core's, which goes before all attempts
    device: torch.device  # where the work is done
    bad: Tensor  # (B,) on the host: rows whose parameters are not to be used
    start: tuple[Tensor, ...] | None  # canonical (x, s, y), (B, .) each, NaN in rows that have none
    differentiable: bool
    judged: bool  # whether anybody asks which rows are degenerate
    selected: bool  # by a small proximal term, the solution of least norm
    # Relative, of the parameters: what their rounding may have moved apart is not told from what
    # agrees.
    parameters_precision: float
    # to be taken in place of the exact one
    gradient: Callable[[ConeFound, ConeDerivative], ConeDerivative]
    tell: Tell  # of rows whose derivative wants a warning
    called: Solved | None = None  # what the core has found already, of all rows
    lift: Lift | None = None  # that was of a smaller program

    @property
    def precision(self) -> float:
        """What is infeasible by less is feasible to the tolerance, or to the parameters' own
        rounding."""
        return max(self.parameters_precision, self.tolerance)


@dataclass(frozen=True, eq=False)
class ConeFound:
    """The solution of a batch. Rows that failed hold the solver's last iterate, or zeros."""

    request: ConeRequest
    x: Tensor  # (B, n)
    s: Tensor  # (B, m)
    y: Tensor  # (B, m)
    value: Tensor  # (B,)
    verdict: Verdict  # on the host
    attempt: Tensor  # (B,) on the host, which of the attempts gave the answer
    blank: Tensor  # (B,) rows without any iterate
    stopped: Tensor | None  # (B,) on the host, rows that a time limit ended; None: no row
    agreement: Agreement | None
    exact: ConeDerivative | None  # None: no derivative was asked for

    @property
    def point(self) -> tuple[Tensor, Tensor, Tensor]:
        """(x, s, y)"""
        return self.x, self.s, self.y

    @cached_property
    def derivative(self) -> ConeDerivative:
        """The one that was asked for, made when it is first needed."""
        assert self.exact is not None
        return self.request.gradient(self, self.exact)

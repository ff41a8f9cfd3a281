"""What a structure is: a problem declared in CVXPY, the test that a normal form is that problem,
and the kernel that solves it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import cvxpy as cp
import numpy as np
import torch
from torch import Tensor

from convlayer.declaration.normal_form import NormalForm
from convlayer.kernels.answer import Answer
from convlayer.solution import Cause

# A problem, the parameters that its layer takes, and the variables that it returns.
DeclaredProblem = tuple[cp.Problem, Sequence[cp.Parameter], Sequence[cp.Variable]]

# What one core moves, in bytes a second: for estimates of time.
BYTES_A_SECOND = 8e9

# A kernel bound to a problem's parameters:
# (their values, a tensor of their dtype and device, at=None: see `answered`) -> Answer.
Run = Callable[..., Answer]


class MismatchError(Exception):
    """The first reason why a problem is not of this structure, in the user's terms."""


@dataclass(frozen=True)
class Cost:
    """Of a forward and a backward, a row of the batch."""

    flops: float
    bytes: float
    fixed: float = 2e-4  # seconds a call, whatever the size
    a_row: float = 0.0  # seconds a row, whatever the size
    rate: float = 4e9  # flops a second and core that this kind of work reaches

    def seconds(self, batch: int = 1) -> float:
        """A coarse estimate on one core, for choosing between paths and for nothing else."""
        return self.fixed + batch * (
            self.a_row + max(self.flops / self.rate, self.bytes / BYTES_A_SECOND)
        )


@dataclass(frozen=True, eq=False)
class Dual:
    """A multiplier among a kernel's outputs: coefficient * outputs[output][position], or zero
    everywhere (output None)."""

    output: int | None
    position: np.ndarray  # (rows of the constraint's table,)
    coefficient: np.ndarray


@dataclass(frozen=True, eq=False)
class Wanted:
    """What a layer returns of a solution."""

    duals: bool = True  # multipliers among it
    x: np.ndarray | None = None  # (n,) bool, of the stacked variables; None: all of them
    # Whose multipliers, by position among the normal form's constraints; None: all of them.
    constraints: frozenset[int] | None = None


Builder = Callable[[Wanted], Run]  # -> the bound kernel


@dataclass(frozen=True, eq=False)
class Match:
    """A problem recognised: how its parameters are bound to the kernel, and where its variables are
    in the answer."""

    bound: str  # what was bound to what, in words
    # Made only if the structure is chosen; None: it has no kernel, and is the cone program.
    build: Builder | None
    x: np.ndarray  # (n,) where each entry of x stands in outputs[0], flattened by row
    cost: Cost | None  # None: known with the cone program
    # Parameters, by number, that are semidefinite where the answer says `definite`.
    vouches: frozenset[int] = frozenset()
    # The kernel reads symmetric parameters from both triangles alike by itself.
    symmetrises: bool = False
    # by position among the normal form's constraints
    duals: Mapping[int, Dual] = field(default_factory=dict)


class Structure(ABC):
    """One file, one structure, one instance in the registry."""

    name: ClassVar[str]
    cause: ClassVar[Cause] = Cause.SINGULAR  # why its kernel flags a row
    # Of solutions that are not unique its kernel gives the one of least norm.
    least_norm: ClassVar[bool] = False
    # Small batches are the compiled core's, whose answer is as good: no closed form gives more.
    compiled: ClassVar[bool] = False
    refines: ClassVar[str]  # the more general structure that also answers it

    @abstractmethod
    def declare(self) -> DeclaredProblem:
        """The problem it answers."""

    @abstractmethod
    def sample(self, batch: tuple[int, ...], generator: torch.Generator) -> tuple[Tensor, ...]:
        """Float64 parameters of `declare`, inside their domain, with a solution that is
        differentiable almost surely."""

    @abstractmethod
    def near_misses(self) -> dict[str, DeclaredProblem]:
        """Problems that look alike and are not of this structure."""

    @abstractmethod
    def match(self, form: NormalForm) -> Match:
        """MismatchError: it is not this problem, and why."""

    def gap(self, answer: Answer) -> Tensor | None:
        """(B or 1,) how far apart eigenvalues are whose meeting is a kink; None: it is no question
        of eigenvalues."""
        return None


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    """Standard normal, float64."""
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def uniform(generator: torch.Generator, low: float, high: float, *shape: int) -> Tensor:
    """Uniform between two bounds, float64."""
    return low + (high - low) * torch.rand(shape, generator=generator, dtype=torch.float64)

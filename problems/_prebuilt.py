"""What a prebuilt problem is: a declaration in CVXPY, a sampler of its parameters, and an
oracle."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import cvxpy as cp
import numpy as np
import torch
from torch import Tensor

from convlayer.layer import ConvexLayer

DeclaredProblem = tuple[cp.Problem, Sequence[cp.Parameter], Sequence[cp.Variable]]


@dataclass(frozen=True, eq=False)
class Declared:
    """A prebuilt problem at one size: the arguments of a ConvexLayer."""

    name: str
    problem: cp.Problem
    parameters: tuple[cp.Parameter, ...]
    variables: tuple[cp.Variable, ...]


@dataclass(frozen=True, eq=False)
class Draw:
    """Random float64 tensors with the batch in front."""

    batch: tuple[int, ...]
    generator: torch.Generator

    def normal(self, *shape: int) -> Tensor:
        return torch.randn((*self.batch, *shape), generator=self.generator, dtype=torch.float64)

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(
            (*self.batch, *shape), generator=self.generator, dtype=torch.float64
        )

    def positive_definite(self, n: int) -> Tensor:
        """I + W W' / n, symmetric to the last bit."""
        W = self.normal(n, n)
        P = torch.eye(n, dtype=torch.float64) + W @ W.mT / n
        return (P + P.mT) / 2


class Prebuilt:
    """A prebuilt problem. A call declares it in CVXPY; sizes are those of the declaration, with its
    defaults."""

    def __init__(
        self, declare: Callable[..., DeclaredProblem], layer_options: dict[str, Any]
    ) -> None:
        functools.update_wrapper(self, declare)
        self.name = declare.__name__
        self._declare, self._options = declare, layer_options
        self._signature = inspect.signature(declare).replace(
            return_annotation=inspect.Signature.empty
        )
        self._sampler: Callable[..., Sequence[Tensor]] | None = None
        self._oracle: Callable[..., Any] | None = None

    def __call__(self, *sizes: Any, **named: Any) -> Declared:
        problem, parameters, variables = self._declare(*sizes, **named)
        return Declared(self.name, problem, tuple(parameters), tuple(variables))

    def layer(self, *sizes: Any, **named: Any) -> ConvexLayer:
        """The problem's ConvexLayer; keywords that are no sizes are options of the layer."""
        options = {key: named.pop(key) for key in set(named) - set(self._signature.parameters)}
        declared = self(*sizes, **named)
        return ConvexLayer(
            declared.problem,
            declared.parameters,
            declared.variables,
            **{**self._options, **options},
        )

    def sample(
        self, batch: int | tuple[int, ...] = (), seed: int = 0, *sizes: Any, **named: Any
    ) -> tuple[Tensor, ...]:
        """One float64 tensor a parameter, (*batch, *its shape), inside its domain so that small
        steps stay there."""
        if self._sampler is None:
            raise NotImplementedError(
                f"`{self.name}` has no sampler; write one under @{self.name}.sampled_by."
            )
        bound = self._signature.bind(*sizes, **named)
        bound.apply_defaults()
        draw = Draw(
            (batch,) if isinstance(batch, int) else tuple(batch),
            torch.Generator().manual_seed(seed),
        )
        return tuple(self._sampler(draw, *bound.args))

    def oracle(self, *tensors: Tensor, **sizes: Any) -> tuple[Tensor, ...]:
        """The variables by a method that is not ours, row by row in NumPy; no gradient. By name, a
        size that no tensor shows."""
        if self._oracle is None:
            raise NotImplementedError(
                f"`{self.name}` has no oracle; write one under @{self.name}.solved_by."
            )
        leads = [
            t.ndim - parameter.ndim for t, parameter in zip(tensors, self().parameters, strict=True)
        ]
        batch = torch.broadcast_shapes(*(t.shape[:lead] for t, lead in zip(tensors, leads)))
        arrays = [
            t.detach().expand(*batch, *t.shape[lead:]).numpy() for t, lead in zip(tensors, leads)
        ]
        hidden = self._hidden_sizes(sizes)
        rows = [
            self._oracle(*(array[index] for array in arrays), **hidden)
            for index in np.ndindex(*batch)
        ]
        columns = zip(*(row if isinstance(row, tuple) else (row,) for row in rows), strict=True)
        return tuple(
            torch.from_numpy(np.reshape(column, batch + np.shape(column[0]))) for column in columns
        )

    def sampled_by(
        self, sampler: Callable[..., Sequence[Tensor]]
    ) -> Callable[..., Sequence[Tensor]]:
        """Register sampler(draw, *sizes) -> one tensor a parameter."""
        self._sampler = sampler
        return sampler

    def solved_by(self, oracle: Callable[..., Any]) -> Callable[..., Any]:
        """Register oracle(*arrays of one row) -> the variable, or the tuple of them, to rounding
        error.

        A size that the arrays do not show, such as a horizon, is a keyword-only argument under its
        name in the declaration.
        """
        self._oracle = oracle
        return oracle

    def _hidden_sizes(self, sizes: dict[str, Any]) -> dict[str, Any]:
        """The keyword-only arguments of the oracle, with the declaration's defaults."""
        bound = self._signature.bind_partial(**sizes)
        bound.apply_defaults()
        arguments = (
            inspect.signature(self._oracle).parameters.values() if self._oracle is not None else ()
        )
        return {a.name: bound.arguments[a.name] for a in arguments if a.kind is a.KEYWORD_ONLY}

    def __repr__(self) -> str:
        return f"{self.name}{self._signature}"


def prebuilt(**layer_options: Any) -> Callable[[Callable[..., DeclaredProblem]], Prebuilt]:
    """Make a library problem of a function from sizes to a DeclaredProblem; options (gp=True) are those
    of its layer."""
    return lambda declare: Prebuilt(declare, layer_options)

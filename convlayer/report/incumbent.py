"""CVXPY with diffcp, row by row: another way that shares no code with ours, from canonicalisation
to derivative.

It is asked for dense derivatives at a tight tolerance, and is slow. Its derivative of power cones
is wrong, whoever solves, so that gradients are not compared where a program has one.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import cvxpy as cp
import numpy as np
import torch
from torch import Tensor

from convlayer.declaration.declaration import Declaration
from convlayer.solution import Status

NAME = "diffcp"
OPTIONS = {
    "solver": cp.DIFFCP,
    "requires_grad": True,
    "mode": "dense",
    "eps": 1e-10,
    "max_iters": 100_000,
}


class Answers(NamedTuple):
    """What a Solution says of rows, as far as a comparison reads it."""

    variables: tuple[Tensor, ...]  # (*batch, *their shape)
    objective: Tensor  # (*batch,)
    status: Tensor  # (*batch,)
    degenerate: Tensor  # (*batch,)


def check(declared: Declaration) -> None:
    """ValueError: it is not to be asked."""
    multipliers = [variable for variable in declared.variables if variable.id in declared.owners]
    if multipliers:
        raise ValueError(
            f"against={NAME!r} differentiates variables, and this layer returns multipliers too: verify a layer of the variables alone, "
            "or leave `against` out."
        )
    if declared.weight is not None:
        raise ValueError(
            f"against={NAME!r} solves the problem as it is declared, and this layer chooses the solution of least norm."
        )


def solver(declared: Declaration, lead: int, told: list[str]) -> Callable[..., Answers]:
    """(parameters (*batch, *shape)) -> the answers, differentiable once; why a row has none is
    added to `told`."""

    def solve(*leaves: Tensor) -> Answers:
        batch = leaves[0].shape[:lead]
        status = torch.full(batch, int(Status.SOLVED))
        *variables, objective = _Rows.apply(declared, status, told, *leaves)
        return Answers(tuple(variables), objective, status, torch.zeros(batch, dtype=torch.bool))

    return solve


class _Rows(torch.autograd.Function):
    """(declaration, status to be filled, words, *parameters) -> variables and objective."""

    @staticmethod
    def forward(ctx, declared: Declaration, status: Tensor, told: list[str], *leaves: Tensor):
        ctx.declared, ctx.status, ctx.told = declared, status, told
        ctx.save_for_backward(*leaves)
        batch = tuple(status.shape)
        found = [
            torch.full((*batch, *v.shape), torch.nan, dtype=leaves[0].dtype)
            for v in declared.variables
        ]
        objective = torch.full(batch, torch.nan, dtype=leaves[0].dtype)
        for row in np.ndindex(batch):
            try:
                value = _solved(declared, [leaf[row] for leaf in leaves])
            except Exception as error:  # of whatever stands between a declaration and diffcp
                told.append(_words(error))
                status[row] = int(Status.NOT_CONVERGED)
                continue
            status[row] = int(_STATUS.get(declared.problem.status, Status.NOT_CONVERGED))
            if status[row] == Status.SOLVED:
                objective[row] = value
                for part, variable in zip(found, declared.variables, strict=True):
                    part[row] = torch.as_tensor(np.asarray(variable.value), dtype=part.dtype)
        return (*(part.to(leaves[0].device) for part in found), objective.to(leaves[0].device))

    @staticmethod
    def backward(ctx, *bars: Tensor):
        leaves, declared = ctx.saved_tensors, ctx.declared
        found = [torch.zeros_like(leaf) for leaf in leaves]
        for row in np.ndindex(tuple(ctx.status.shape)):
            if ctx.status[row] != Status.SOLVED:
                continue
            try:
                _solved(declared, [leaf[row] for leaf in leaves])
                for variable, bar in zip(declared.variables, bars, strict=False):
                    variable.gradient = bar[row].detach().cpu().double().numpy()
                declared.problem.backward()
            except Exception as error:
                ctx.told.append(_words(error))
                ctx.status[row] = int(Status.NOT_CONVERGED)
                continue
            for part, parameter in zip(found, declared.parameters, strict=True):
                part[row] = torch.as_tensor(_shared_out(parameter), dtype=part.dtype)
        return None, None, None, *found


def _shared_out(parameter: cp.Parameter) -> np.ndarray:
    """The gradient with what belongs to a pair of entries that are one number, in a symmetric
    matrix, divided between them as ours is."""
    gradient = np.asarray(parameter.gradient)
    if not (parameter.ndim == 2 and parameter.is_symmetric() and parameter.size > 1):
        return gradient
    return (gradient + np.diag(np.diag(gradient))) / 2


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


_STATUS = {
    cp.OPTIMAL: Status.SOLVED,
    cp.INFEASIBLE: Status.INFEASIBLE,
    cp.UNBOUNDED: Status.UNBOUNDED,
}


def _solved(declared: Declaration, values: Sequence[Tensor]) -> Any:
    for parameter, value in zip(declared.parameters, values, strict=True):
        parameter.value = value.detach().cpu().double().numpy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return declared.problem.solve(gp=declared.gp, **OPTIONS)

"""What the rows measure: a problem of the library at one size, its data, and the structure that its
layer must find."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import cvxpy as cp
import torch
from torch import Tensor

from benchmarks.table import Options
from convlayer import ConvexLayer
from convlayer.problems import PROBLEMS, Declared

Variables = tuple[Tensor, ...]
Layer = Callable[..., Variables]


@dataclass(frozen=True)
class Task:
    """A batch of one problem."""

    problem: str  # its name in convlayer.problems
    structure: str
    batch: int
    sizes: tuple[int, ...]
    eps: float | None = None  # the temperature of a transport
    peer_rows: int = (
        0  # rows that slow peers and our generic path are measured on, scaled to the batch; 0: all
    )

    @property
    def name(self) -> str:
        shape = " x ".join(map(str, self.sizes))
        if self.problem == "equality_constrained_qp":
            shape = "{} variables, {} rows".format(*self.sizes)
        if self.problem == "leading_eigenvector":
            shape = f"{shape} x {shape}"
        eps = "" if self.eps is None else f", eps {self.eps:g}"
        return f"{self.problem} {self.batch} x ({shape}){eps}"

    @property
    def fewer(self) -> int:
        return self.peer_rows or self.batch

    @cached_property
    def declared(self) -> Declared:
        return PROBLEMS[self.problem](*self.sizes)

    def data(self, options: Options) -> Variables:
        tensors = PROBLEMS[self.problem].sample(self.batch, 0, *self.sizes)
        if self.eps is not None:
            M, r, c, eps = tensors
            tensors = (
                M,
                r / r.sum(1, keepdim=True),
                c / c.sum(1, keepdim=True),
                torch.full_like(eps, self.eps),
            )
        return tuple(t.to(options.device, options.dtype) for t in tensors)

    def layer(self) -> ConvexLayer:
        """Ours, with the path it chooses by itself."""
        layer = ConvexLayer(
            self.declared.problem, self.declared.parameters, self.declared.variables
        )
        if layer.structure != self.structure:
            raise ValueError(
                f"the layer took {layer.structure} for {self.problem}, not {self.structure}"
            )
        return layer

    def generic(self) -> ConvexLayer:
        """Ours by the cone program."""
        return ConvexLayer(
            self.declared.problem,
            self.declared.parameters,
            self.declared.variables,
            structure="generic",
            on_failure="keep",
        )

    def for_peers(self, data: Variables) -> tuple[Declared, Variables]:
        """Declaration and data as the peers take them: they refuse quad_form of a Parameter and get
        a factor of it."""
        if self.problem != "equality_constrained_qp":
            return self.declared, data
        n, p = self.sizes
        L, q = cp.Parameter((n, n), name="L"), cp.Parameter(n, name="q")
        A, b, x = (
            cp.Parameter((p, n), name="A"),
            cp.Parameter(p, name="b"),
            cp.Variable(n, name="x"),
        )
        problem = cp.Problem(cp.Minimize(cp.sum_squares(L.T @ x) / 2 + q @ x), [A @ x == b])
        return Declared(self.problem, problem, (L, q, A, b), (x,)), (
            torch.linalg.cholesky(data[0]),
            *data[1:],
        )


def weights_of(outputs: Variables) -> Variables:
    """Cotangents, the same for everyone."""
    generator = torch.Generator().manual_seed(7)
    return tuple(
        torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x) for x in outputs
    )

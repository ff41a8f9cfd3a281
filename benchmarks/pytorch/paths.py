"""The ways through the library that the rows measure, one problem each, and the same problem as the
peer takes it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.cases import CASES
from benchmarks.large import declare as declare_sparse
from benchmarks.structures.tasks import Task
from convlayer import ConvexLayer
from convlayer.conic.pattern import kkt_pattern
from convlayer.problems import Declared

Tensors = tuple[Tensor, ...]
SPARSE, QUADRATIC = "sparse_program", "quadratic_program"


@dataclass(frozen=True)
class Path:
    # its name in benchmarks.cases; or SPARSE, that of benchmarks.large by its nonzeros
    problem: str
    sizes: tuple[int, ...]

    @property
    def name(self) -> str:
        return f"{self.problem} ({' x '.join(map(str, self.sizes))})"

    def declared(self) -> Declared:
        return (
            declare_sparse(*self.sizes)[0]
            if self.problem == SPARSE
            else CASES[self.problem](*self.sizes)
        )

    def layer(self) -> ConvexLayer:
        return _layer(self.declared(), "auto")

    def sample(self, batch: int | tuple[int, ...], seed: int = 0) -> Tensors:
        if self.problem != SPARSE:
            return CASES[self.problem].sample(batch, seed, *self.sizes)
        generator = torch.Generator().manual_seed(seed)
        return tuple(
            t * (0.9 + 0.2 * torch.rand(batch, len(t), generator=generator, dtype=t.dtype))
            for t in declare_sparse(*self.sizes)[1]
        )

    def for_peers(self, tensors: Tensors) -> tuple[Declared, Tensors]:
        """They refuse quad_form of a Parameter and get a factor of it."""
        if self.problem == QUADRATIC:
            return CASES["quadratic_program_factored"](*self.sizes), (
                torch.linalg.cholesky(tensors[0]),
                *tensors[1:],
            )
        if self.problem == "equality_constrained_qp":
            return Task(self.problem, self.problem, len(tensors[0]), self.sizes).for_peers(tensors)
        return self.declared(), tensors

    def numbers(self) -> float:
        """What a derivative cannot do without, in numbers a row: see benchmarks.pytorch.memory."""
        return NUMBERS[self.problem](self)


def _layer(declared: Declared, structure: str) -> ConvexLayer:
    return ConvexLayer(
        declared.problem, declared.parameters, declared.variables, structure=structure
    )


def twin(declared: Declared) -> ConvexLayer:
    """Ours on a peer's own declaration, for its derivatives to be compared with."""
    return _layer(declared, "generic")


def _triangle(n: int) -> float:
    return n * (n + 1) / 2


def _least_squares(path: Path) -> float:
    m, n = path.sizes
    return _triangle(n) + n + m


def _transport(path: Path) -> float:
    m, n = path.sizes
    return _triangle(min(m, n)) + m * n


def _quadratic(path: Path) -> float:
    """The active rows are counted at the solutions of a few instances."""
    n, m, p = path.sizes
    tensors = path.sample(8)
    with torch.no_grad():
        (x,) = path.layer()(*tensors)
    G, h = tensors[2:4]
    active = p + float(((G @ x.unsqueeze(-1)).squeeze(-1) >= h - 1e-7).sum(1).double().mean())
    return (n + active) ** 2 + n + m + p


def _sparse(path: Path) -> float:
    program = path.layer()._canonical.program
    return kkt_pattern(program).fill + program.n + program.m


def _equality_constrained(path: Path) -> float:
    n, p = path.sizes
    return _triangle(n) + _triangle(p) + n * p + n + p


NUMBERS: dict[str, Callable[[Path], float]] = {
    "softmax": lambda path: path.sizes[0],
    "sparsemax": lambda path: path.sizes[0],
    "total_variation": lambda path: path.sizes[0],
    "leading_eigenvector": lambda path: path.sizes[0] ** 2 + path.sizes[0],
    "equality_constrained_qp": _equality_constrained,
    "least_squares": _least_squares,
    "entropic_optimal_transport": _transport,
    QUADRATIC: _quadratic,
    SPARSE: _sparse,
}

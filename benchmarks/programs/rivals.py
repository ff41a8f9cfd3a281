"""The layers that take a quadratic program as matrices (P, q, G, h) or (P, q, G, h, A, b); both are
optional."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.structures.rivals import INCUMBENTS, MOREAU, incumbent
from benchmarks.structures.tasks import Layer
from convlayer.problems import Declared

try:
    from qpth.qp import QPFunction as BatchedQP
except ImportError:
    BatchedQP = None
try:
    from proxsuite.torch.qplayer import QPFunction as ProximalQP
except ImportError:
    ProximalQP = None

QPTH, PROXQP = "qpth", "ProxQP"
MATRICES = (QPTH, PROXQP)
INSTALL = {QPTH: "--no-deps qpth (which asks for numpy<2)", PROXQP: "proxsuite"}
# which takes a quad_form of a Parameter as we do; cvxpylayers' default does not
BY_MATRIX = f"{MOREAU}, quad_form"
UNBOUNDED = -1e20  # ProxQP's sides of a constraint


def matrix_layer(name: str) -> Layer:
    """An ImportError says what is missing."""
    if {QPTH: BatchedQP, PROXQP: ProximalQP}[name] is None:
        raise ImportError(f"pip install {INSTALL[name]}")
    return {QPTH: _qpth, PROXQP: _proxqp}[name]


def peer(name: str, declared: Declared, factored: Declared) -> Layer:
    """`declared` with quad_form(x, P), `factored` with sum_squares(L @ x)."""
    if name == BY_MATRIX:
        return incumbent(MOREAU, declared)
    return matrix_layer(name) if name in MATRICES else incumbent(name, factored)


def names(quadratic: bool) -> tuple[str, ...]:
    return (*INCUMBENTS, BY_MATRIX, *MATRICES) if quadratic else tuple(INCUMBENTS)


def _qpth(
    P: Tensor, q: Tensor, G: Tensor, h: Tensor, A: Tensor | None = None, b: Tensor | None = None
) -> tuple[Tensor]:
    A, b = (P.new_empty(0) if v is None else v for v in (A, b))
    return (BatchedQP(verbose=-1)(P, q, G, h, A, b),)


def _proxqp(
    P: Tensor, q: Tensor, G: Tensor, h: Tensor, A: Tensor | None = None, b: Tensor | None = None
) -> tuple[Tensor]:
    A, b = (P.new_empty(0) if v is None else v for v in (A, b))
    return (ProximalQP()(P, q, A, b, G, torch.full_like(h, UNBOUNDED), h)[0],)

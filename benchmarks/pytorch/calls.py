"""What one call costs at batch 1, for every structure of the registry at its smallest size."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks.structures.overhead import medians
from benchmarks.structures.tasks import Layer, weights_of
from benchmarks.table import Family, Options, Row
from convlayer import ConvexLayer
from convlayer.autodiff.threads import one_thread
from convlayer.structures import STRUCTURES

CALLS = 1000
FORWARD, TRACED, TOTAL = "forward", "forward, with gradient", "forward + backward"


def softmax(theta: Tensor, tau: Tensor, r: Tensor) -> tuple[Tensor]:
    return (r.unsqueeze(-1) * torch.softmax(theta / tau.unsqueeze(-1), -1),)


def lstsq(A: Tensor, b: Tensor, lam: Tensor) -> tuple[Tensor]:
    """Ridge, as least squares with sqrt(lam) I below A."""
    below = lam.sqrt()[..., None, None] * torch.eye(A.shape[-1], dtype=A.dtype)
    right = torch.cat([b, b.new_zeros(*b.shape[:-1], A.shape[-1])], -1)
    return (
        torch.linalg.lstsq(
            torch.cat([A, below], -2), right.unsqueeze(-1), driver="gelsd"
        ).solution.squeeze(-1),
    )


def solve(P: Tensor, q: Tensor, A: Tensor, b: Tensor) -> tuple[Tensor]:
    """The KKT system."""
    corner = A.new_zeros(*A.shape[:-2], A.shape[-2], A.shape[-2])
    K = torch.cat([torch.cat([P, A.mT], -1), torch.cat([A, corner], -1)], -2)
    return (torch.linalg.solve(K, torch.cat([-q, b], -1))[..., : q.shape[-1]],)


def eigh(X: Tensor) -> tuple[Tensor]:
    """The projector onto the two leading eigenvectors."""
    V = torch.linalg.eigh(X).eigenvectors[..., -2:]
    return (V @ V.mT,)


OPERATORS: dict[str, tuple[str, Layer]] = {
    "softmax": ("torch.softmax", softmax),
    "least_squares": ("torch.linalg.lstsq", lstsq),
    "equality_constrained_qp": ("torch.linalg.solve", solve),
    "leading_eigenspace": ("torch.linalg.eigh", eigh),
}


def family(options: Options) -> Family:
    return Family(
        "calls",
        "Microseconds of a call at batch 1, the declaration and the size of the registry: without a gradient, with parameters that "
        "require one, and with the gradient of all parameters; beside torch's own operator for the same function, where there is one. "
        "The kernel is part of it: what the layer adds is in the structures suite, under overhead. "
        f"Medians of {CALLS} calls that alternate, the first tenth left out, on one torch thread.",
        [(name, lambda name=name: [measure(name, options)]) for name in STRUCTURES],
    )


def measure(name: str, options: Options) -> Row:
    structure = STRUCTURES[name]
    layer = ConvexLayer(*structure.declare())
    tensors = tuple(
        t.to(options.device, options.dtype)
        for t in structure.sample((1,), torch.Generator().manual_seed(0))
    )
    operator, rival = OPERATORS.get(name, (None, None))
    calls = CALLS // 10 if options.quick else CALLS
    figures: dict[str, float | str | None] = {}
    with warnings.catch_warnings(), one_thread():
        warnings.simplefilter("ignore")
        if rival is not None:
            _same(layer(*tensors), rival(*tensors))
        for column, run in ((FORWARD, _plain), (TRACED, _traced), (TOTAL, _backward)):
            both = [
                partial(run, *prepared)
                for prepared in _prepared(layer, rival, tensors, run is not _plain)
            ]
            figures[column], *theirs = medians(*both, calls=calls)
            figures[f"torch's, {column}"] = theirs[0] if theirs else None
    label = name if operator is None else f"{name}: {operator}"
    return Row(label, figures, {})


def _prepared(
    ours: Layer, rival: Layer | None, tensors: tuple[Tensor, ...], traced: bool
) -> list[tuple]:
    leaves = [t.clone().requires_grad_(traced) for t in tensors]
    return [
        (layer, leaves, weights_of(layer(*leaves))) for layer in (ours, rival) if layer is not None
    ]


@torch.no_grad()
def _plain(layer: Callable, leaves: list[Tensor], _: tuple[Tensor, ...]) -> None:
    layer(*leaves)


def _traced(layer: Callable, leaves: list[Tensor], _: tuple[Tensor, ...]) -> None:
    layer(*leaves)


def _backward(layer: Callable, leaves: list[Tensor], weights: tuple[Tensor, ...]) -> None:
    torch.autograd.grad(layer(*leaves), leaves, weights, allow_unused=True)


def _same(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> None:
    """What is timed side by side is the same function."""
    for x, y in zip(ours, theirs, strict=True):
        if not torch.allclose(x, y, rtol=1e-4, atol=1e-5 * float(y.abs().max())):
            raise ValueError("torch's operator and the layer disagree")

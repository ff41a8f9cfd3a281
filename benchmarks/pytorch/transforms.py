"""Forward mode, second derivatives and whole Jacobians, in multiples of a forward and a
backward."""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.func import jacrev

from benchmarks.measure import clock, interleaved, medians
from benchmarks.peer import MISSING, peer_layer
from benchmarks.pytorch.paths import Path, Tensors, twin
from benchmarks.structures.tasks import Layer, weights_of
from benchmarks.structures.timing import reason
from benchmarks.table import Family, Options, Row
from convlayer.autodiff.threads import one_thread

BATCH, REPEATS, SECONDS = 16, 51, 4.0
RIGHT = 1e-3  # relative error up to which a peer's derivative counts as one
PATHS = (
    Path("softmax", (50,)),
    Path("sparsemax", (50,)),
    Path("least_squares", (50, 20)),
    Path("equality_constrained_qp", (20, 5)),
    Path("leading_eigenvector", (8,)),
    Path("total_variation", (50,)),
    Path("entropic_optimal_transport", (10, 10)),
    Path("quadratic_program", (20, 20, 5)),
)


def family(options: Options) -> Family:
    return Family(
        "transforms",
        "`plain` is a forward and the gradient of all parameters, milliseconds, of a batch of "
        f"{BATCH}; the same with torch.func.jvp instead, and with a Hessian-vector product of <w, x> + |x|^2 / 2 by reverse mode twice, as multiples of "
        "it. Of one instance: torch.func.jacrev of the solution in the first parameter, as a multiple of its plain one and for each of "
        "its rows. Medians of calls that alternate, on one torch thread. The same three of cvxpylayers, called once: its error, zeros, or its relative "
        f"difference from ours on its own declaration, `wrong by` where that is above {RIGHT:g}.",
        [(path.name, lambda path=path: [measure(path, options)]) for path in PATHS],
    )


def measure(path: Path, options: Options) -> Row:
    layer, tensors, a = path.layer(), path.sample(BATCH), direction(path, BATCH)
    one = path.sample(())
    runs = [
        partial(plain, layer, tensors),
        partial(tangent, layer, tensors, a),
        partial(product, layer, tensors, a),
        partial(plain, layer, one),
        partial(jacobian, layer, one),
    ]
    with warnings.catch_warnings(), one_thread():
        warnings.simplefilter("ignore")
        repeats = 3 if options.quick else REPEATS
        times = interleaved(
            *(partial(timed, run) for run in runs), repeats=repeats, seconds=SECONDS
        )
        whole, jvp, hvp, single, full = (medians(column)[0] for column in times)
        rows = sum(x.numel() for x in layer(*one))
        figures = {
            "path": layer.structure,
            "plain": whole,
            "jvp / plain": jvp / whole,
            "Hessian-vector / plain": hvp / whole,
            "plain, one": single,
            "rows": rows,
            "Jacobian / plain": full / single,
            "Jacobian / plain, a row": full / single / rows,
        }
        return Row(path.name, figures | peer(path))


def peer(path: Path) -> dict[str, str]:
    """What cvxpylayers says when it is asked for the same."""
    names = [f"cvxpylayers, {what}" for what in ("jvp", "Hessian-vector", "Jacobian")]
    try:
        declared, tensors = path.for_peers(path.sample(BATCH))
        _, others = path.for_peers(path.sample(BATCH, 1))
        theirs = peer_layer(declared)
    except Exception as error:
        return dict.fromkeys(names, f"refused: {reason(error)}")
    if theirs is None:
        return dict.fromkeys(names, MISSING)
    a = tuple(other - t for other, t in zip(others, tensors, strict=True))
    one, ours = tuple(t[0] for t in tensors), twin(declared)
    runs: tuple[Callable[[Layer], Tensors], ...] = (
        lambda layer: tangent(layer, tensors, a),
        lambda layer: product(layer, tensors, a),
        lambda layer: jacobian(layer, one),
    )
    return {name: outcome(run, theirs, ours) for name, run in zip(names, runs, strict=True)}


def outcome(run: Callable[[Layer], Tensors], theirs: Layer, ours: Layer) -> str:
    try:
        found = run(theirs)
    except Exception as error:  # the peer's failure is the finding
        return f"raises {reason(error)}"
    if not any(bool(part.any()) for part in found):
        return "zeros"
    exact = run(ours)
    error = _size([x - y for x, y in zip(found, exact, strict=True)]) / _size(exact)
    return f"{error:.1e}" if error <= RIGHT else f"wrong by {error:.1e}"


def direction(path: Path, batch: int) -> Tensors:
    """From one sample to another, so that symmetric matrices stay so and the marginals of a
    transport agree."""
    return tuple(
        other - t for other, t in zip(path.sample(batch, 1), path.sample(batch), strict=True)
    )


def timed(run: Callable[[], object]) -> tuple[float]:
    start = clock()
    run()
    return (1e3 * (clock() - start),)


def plain(layer: Layer, tensors: Tensors) -> Tensors:
    leaves = _leaves(tensors)
    outputs = layer(*leaves)
    return torch.autograd.grad(outputs, leaves, weights_of(outputs), allow_unused=True)


def tangent(layer: Layer, tensors: Tensors, a: Tensors) -> Tensors:
    return torch.func.jvp(lambda *t: tuple(layer(*t)), tensors, a)[1]


def product(layer: Layer, tensors: Tensors, a: Tensors) -> Tensors:
    leaves = _leaves(tensors)
    loss = smooth(layer(*leaves))
    first = torch.autograd.grad(loss, leaves, create_graph=True)
    sum((g * d).sum() for g, d in zip(first, a, strict=True)).backward()
    return tuple(torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves)


def smooth(outputs: Tensors) -> Tensor:
    """<w, x> + |x|^2 / 2: one of the two alone is constant on some solution sets, such as
    projectors and spheres."""
    return sum(
        (w * x).sum() + x.square().sum() / 2
        for w, x in zip(weights_of(outputs), outputs, strict=True)
    )


def jacobian(layer: Layer, tensors: Tensors) -> Tensors:
    return jacrev(lambda *t: tuple(layer(*t)))(*tensors)


def _leaves(tensors: Tensors) -> list[Tensor]:
    return [t.clone().requires_grad_() for t in tensors]


def _size(tensors: Tensors | list[Tensor]) -> float:
    return statistics.fsum(float(t.square().sum()) for t in tensors) ** 0.5

"""Small problems by the layer's choice, by Clarabel, by SCS, and by CVXPY with diffcp.

diffcp differentiates the cone program by a dense factorisation of its own here, row by row, and
takes only what CVXPY calls DPP: the problems are of a size and a kind that it can take. The layer
and diffcp are asked for the same tolerance.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from convlayer import problems
from convlayer.command_line.figures import Rivalry, aligned, milliseconds
from convlayer.command_line.timing import Effort, Work, forward_and_backward, in_turn
from convlayer.report import incumbent

BATCH = 4
# A small problem gets this share of a larger one's seconds.
SHARE = 0.2
TOLERANCE = 1e-8
WAYS: dict[str, dict[str, Any]] = {
    "layer": {},
    "clarabel": {"solver": "clarabel"},
    "scs": {"solver": "scs"},
}


@dataclass(frozen=True)
class Small:
    """A problem of the library and its sizes."""

    title: str
    problem: str
    describe: str  # of the sizes
    sizes: tuple[int, ...]


SMALL = (
    Small("least squares", "least_squares", "A {0} x {1}", (30, 15)),
    Small("total variation", "total_variation", "{0} points", (30,)),
    Small("leading eigenvector", "leading_eigenvector", "{0} x {0} matrix", (5,)),
    Small("lasso", "lasso", "A {0} x {1}", (20, 10)),
    Small("ball projection", "ball_projection", "{0} variables", (20,)),
    Small("logistic regression", "logistic_regression", "A {0} x {1}", (12, 4)),
)


def rivalry(small: Small, effort: Effort) -> Rivalry:
    """Every way once, then in turn; and how far the layer's answers are from diffcp's."""
    library = getattr(problems, small.problem)
    tensors = [t.requires_grad_() for t in library.sample(BATCH, 0, *small.sizes)]
    layers = {name: library.layer(*small.sizes, **options) for name, options in WAYS.items()}
    works = {name: forward_and_backward(layer, tensors) for name, layer in layers.items()}
    works["diffcp"] = _by_diffcp(library(*small.sizes), tensors)
    for work in works.values():
        work()
    seconds = in_turn(list(works.values()), torch.device("cpu"), SHARE * effort.seconds)
    found = layers["layer"].verify(*tensors, against=incumbent.NAME)
    return Rivalry(
        title=small.title,
        structure=layers["layer"].structure,
        size=small.describe.format(*small.sizes),
        batch=BATCH,
        **dict(zip(works, seconds, strict=True)),
        value=float(found.value.max()),
        gradient=float(found.gradient.max()),
    )


def _by_diffcp(declared: Any, tensors: list[Tensor]) -> Work:
    """The same call and gradient, as one writes it in CVXPY: row by row."""
    options = {**incumbent.OPTIONS, "eps": TOLERANCE}

    def work() -> None:
        for row in zip(*tensors, strict=True):
            for parameter, value in zip(declared.parameters, row, strict=True):
                parameter.value = value.detach().numpy()
            declared.problem.solve(**options)
            for variable in declared.variables:
                variable.gradient = 2 * variable.value
            declared.problem.backward()

    return work


def table_of_rivalries(rivalries: Sequence[Rivalry]) -> str:
    """For the terminal."""
    ways = ("layer", "Clarabel", "SCS", "CVXPY+diffcp")
    head = ("small problem", "size", "batch", *ways, "value", "gradient")
    lines = [
        (
            found.title,
            found.size,
            str(found.batch),
            milliseconds(found.layer),
            milliseconds(found.clarabel),
            milliseconds(found.scs),
            milliseconds(found.diffcp),
            f"{found.value:.0e}",
            f"{found.gradient:.0e}",
        )
        for found in rivalries
    ]
    notes = [
        "layer: what it chose; Clarabel, SCS: the layer's cone program by these; all on the CPU, in float64.",
        "value, gradient: the worst relative difference of the layer from diffcp.",
    ]
    return "\n".join([*aligned(head, lines), *notes])

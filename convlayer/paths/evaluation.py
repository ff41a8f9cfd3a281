"""From the entries of parameters to the values of the cone program."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from convlayer.autodiff.threads import one_thread
from convlayer.conic.bounds import without_infinity
from convlayer.conic.program import Data, Operators
from convlayer.conic.residual import normalise
from convlayer.declaration.canonical import Canonical

NEGLIGIBLE = 1e-6  # weight of a term that only chooses among solutions
ROUNDING = 1e-12  # a relative residual, or disagreement, below this says nothing


class Agreement(NamedTuple):
    """What is to be said of equalities that depend on each other, (B,) each, and y (B, m)."""

    apart: Tensor  # by how much they disagree, relative to their right-hand sides
    refuted: Tensor  # by more than rounding: there is no solution
    y: Tensor  # the proof of that


def evaluate(
    canonical: Canonical, entries: Sequence[Tensor], dense: bool, like: Tensor
) -> tuple[Data, Tensor]:
    """Entries of the parameters, (B or 1, size) each -> the cone program's values and the offset d:
    shared stays shared."""
    maps = {**canonical.maps, **canonical.dense_maps} if dense else canonical.maps
    values = {name: mapping(entries, like) for name, mapping in maps.items()}
    if dense:
        n, m = canonical.program.n, canonical.program.m
        values["P"], values["A"] = (
            values[name].view(len(values[name]), k, n) for name, k in (("P", n), ("A", m))
        )
    d = values.pop("d")
    values["b"] = without_infinity(canonical.program, values["b"])
    return Data(canonical.program, **values), d


def evaluated(
    canonical: Canonical, entries: Sequence[Tensor], dense: bool, device: torch.device
) -> Data:
    """The same apart from every graph, with right-hand sides that agree."""
    like = torch.zeros((), dtype=torch.float64, device=device)
    with torch.no_grad(), one_thread():
        return agreed(canonical, evaluate(canonical, entries, dense, like)[0])


def agreed(canonical: Canonical, data: Data) -> Data:
    """With right-hand sides that agree where equalities depend on each other."""
    dependence = canonical.dependence
    return data if dependence is None else replace(data, b=dependence.agreed(data.b))


def agreement(
    canonical: Canonical, entries: Sequence[Tensor], b: Tensor, batch: int, precision: float
) -> Agreement | None:
    """Whether the right-hand sides agree to the parameters' precision; None: they do, to
    rounding."""
    dependence = canonical.dependence
    if dependence is None:
        return None
    apart = dependence.disagreement(b, b.abs())
    if bool((apart > precision).any()):
        apart = dependence.disagreement(b, canonical.sizes_of_b(entries).to(b.device))
    if not bool((apart > ROUNDING).any()):
        return None
    parts = apart, apart > precision, dependence.proof(b)
    return Agreement(*(part.expand(batch, *part.shape[1:]).cpu() for part in parts))


def objective(operators: Operators, x: Tensor, d: Tensor) -> Tensor:
    """(B,) at points x (B, n)."""
    return (x * (operators.P(x) / 2 + operators.data.q)).sum(1) + d.squeeze(1)


def least_norm_weight(
    canonical: Canonical, thetas: Sequence[Tensor], device: torch.device
) -> Tensor:
    """(B or 1,) of a proximal term, canonical's last parameter: NEGLIGIBLE where the row's solution
    and multipliers are of size one."""
    with torch.no_grad():
        none = torch.zeros(1, dtype=torch.float64, device=device)
        readers = zip(canonical.parameters, [*thetas, none], strict=True)
        data, _ = evaluate(
            canonical, [reader.read(theta) for reader, theta in readers], False, none
        )
        _, scaling = normalise(data)
        return (NEGLIGIBLE * scaling.rho / scaling.tau).squeeze(1).nan_to_num(NEGLIGIBLE)

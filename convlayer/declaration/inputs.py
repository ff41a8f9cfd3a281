"""Which rows of a call hold values that cannot be used, and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from convlayer.autodiff.threads import few_threads
from convlayer.declaration import domain
from convlayer.declaration.declaration import Declaration


@dataclass(frozen=True, eq=False)
class BadRows:
    """Rows whose parameters are NaN, infinite or outside their domain."""

    which: Tensor | None = None  # (B,) on the host; None: there are none
    details: Mapping[int, str] = field(default_factory=dict)  # by row, the first reason


def bad_rows(
    declared: Declaration,
    values: Sequence[Tensor],  # of each parameter, (B or 1, *shape)
    size: int,
    validate: bool,
    vouched: frozenset[int] = frozenset(),
) -> BadRows:
    """validate: look at the declared domains too. Of parameters that are vouched for the kernel
    sees whether they are semidefinite."""
    found: list[tuple[Tensor, str]] = []
    with torch.no_grad(), few_threads(sum(value.numel() for value in values)):
        for k, value in enumerate(values):
            found += _of_parameter(declared, k, value, validate, k in vouched)
    if not found:
        return BadRows()
    bad, details = torch.zeros(size, dtype=torch.bool), dict[int, str]()
    for rows, reason in found:
        rows = rows.cpu().expand(size)
        bad = bad | rows
        for row in torch.nonzero(rows).flatten().tolist():
            details.setdefault(row, reason)
    return BadRows(bad, details)


def _of_parameter(
    declared: Declaration, k: int, value: Tensor, validate: bool, vouched: bool
) -> list[tuple[Tensor, str]]:
    """Rows, (B or 1,), and what is wrong with them."""
    parameter, properties = declared.parameters[k], declared.domains[k]
    look = properties - {"PSD"} | {"symmetric"} if vouched else properties
    if domain.plainly_inside(look if validate else frozenset(), value):
        return []
    flat = value.unsqueeze(-1).flatten(1)
    finite = torch.isfinite(flat).all(1)
    if not bool(finite.all()):
        # As the right-hand side of an inequality infinity says that there is no bound.
        limits = torch.from_numpy(declared.canonical.limits[k]).to(value.device)
        finite = (torch.isfinite(flat) | torch.isinf(flat) & limits).all(1)
    found = []
    if not bool(finite.all()):
        found.append((~finite, f"Parameter `{parameter.name()}` holds {_not_a_number(flat)}."))
    if properties and validate:
        found += [(rows & finite, reason) for rows, reason in domain.violations(parameter, value)]
    return found


def _not_a_number(values: Tensor) -> str:
    if bool(torch.isnan(values).any()):
        return "NaN or infinity"
    return "infinity, which is `no bound` on the large side of an inequality and has no meaning elsewhere"

"""Declared domains of parameters (sign, symmetry, PSD, bounds, sparsity), checked on the values
given, row by row."""

from __future__ import annotations

import math
from collections.abc import Iterator

import cvxpy as cp
import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

# The attributes of a parameter that are about the sign of its entries, and those of a matrix that
# equals its transpose.
SIGNS = frozenset(("nonneg", "pos", "nonpos", "neg"))
MATRICES = frozenset(("symmetric", "PSD", "NSD"))


def is_symmetric(parameter: cp.Parameter) -> bool:
    """Whether it is declared to equal its transpose: its entries across the diagonal are then
    one."""
    return len(parameter.shape) >= 2 and any(parameter.attributes[name] for name in MATRICES)


def declared(parameter: cp.Parameter) -> frozenset[str]:
    """The attributes of a parameter that its values could violate."""
    return frozenset(
        name
        for name, value in parameter.attributes.items()
        if value is not None and value is not False
    )


def plainly_inside(domain: frozenset[str], value: Tensor) -> bool:
    """One look at a whole tensor that settles nearly every call: finite, and within what is
    declared. False: look closer."""
    if value.numel() == 1:
        number = value.item()
        return math.isfinite(number) and domain <= SIGNS and _sign_is_right(domain, number, number)
    if not math.isfinite(value.sum().item()):  # a finite sum has finite terms
        return False
    return not domain or not value.numel() or _plainly_inside(domain, value)


def violations(parameter: cp.Parameter, value: Tensor) -> Iterator[tuple[Tensor, str]]:
    """(rows (B,) outside a declared domain, what is wrong and the remedy) for a value of shape (B,
    *parameter.shape).

    Tolerances are relative to the row's largest entry: 1e-9 in float64, 1e-5 in float32, ten
    roundings in half.
    """
    value = value.detach()
    flat = value.unsqueeze(-1).flatten(1)
    if not flat.shape[1]:
        return
    slack = relative(value.dtype) * torch.where(torch.isfinite(flat), flat, 0.0).abs().amax(1)
    for look in (_wrong_signs, _wrong_matrices, _off_pattern, _out_of_bounds):
        for bad, problem, remedy in look(parameter, value, slack):
            if bool(bad.any()):
                yield bad, f"Parameter `{parameter.name()}` was declared {problem} {remedy}"


# (rows (B,) that are bad, perhaps none; what was declared and is not so; the remedy)
_Violations = Iterator[tuple[Tensor, str, str]]


def _wrong_signs(parameter: cp.Parameter, value: Tensor, slack: Tensor) -> _Violations:
    attributes, flat = parameter.attributes, value.unsqueeze(-1).flatten(1)
    low, high = flat.amin(1), flat.amax(1)
    if attributes["nonneg"] or attributes["pos"]:
        bad = low < -slack if attributes["nonneg"] else low <= 0
        word = "nonneg" if attributes["nonneg"] else "pos"
        yield (
            bad,
            f"{word}=True, but its smallest entry is {_worst(low, bad, min)}.",
            "Pass it through torch.nn.functional.softplus or clamp it.",
        )
    if attributes["nonpos"] or attributes["neg"]:
        bad = high > slack if attributes["nonpos"] else high >= 0
        word = "nonpos" if attributes["nonpos"] else "neg"
        yield (
            bad,
            f"{word}=True, but its largest entry is {_worst(high, bad, max)}.",
            "Clamp it, or declare the parameter without a sign.",
        )


def _wrong_matrices(parameter: cp.Parameter, value: Tensor, slack: Tensor) -> _Violations:
    """Not symmetric, or not semidefinite."""
    attributes = parameter.attributes
    if value.ndim < 3 or not any(attributes[name] for name in MATRICES):
        return
    gap = (value - value.mT).abs().flatten(1).amax(1)
    bad = gap > 10 * slack
    yield (
        bad,
        f"symmetric, but differs from its transpose by {_worst(gap, bad, max)}.",
        "Write (X + X.mT) / 2.",
    )
    for attribute, sign, pick, minus in (("PSD", 1.0, min, ""), ("NSD", -1.0, max, "-")):
        if not attributes[attribute]:
            continue
        finite = torch.where(torch.isfinite(value), value, 0.0).double()
        finite = sign * (finite + finite.mT) / 2
        allowed = 10 * slack.double() * value.shape[-1]
        # Cholesky's method settles what eigenvalues would, at a fraction of their cost.
        half = (allowed / 2).view(-1, *[1] * (value.ndim - 2)).expand(finite.shape[:-1])
        if not bool(torch.linalg.cholesky_ex(finite + torch.diag_embed(half))[1].any()):
            continue
        smallest = torch.linalg.eigvalsh(finite)[..., 0].unsqueeze(-1).flatten(1).amin(1)
        bad = smallest < -allowed
        yield (
            bad,
            f"{attribute}=True, but has the eigenvalue {_worst(sign * smallest, bad, pick)}.",
            f"Write {minus}L @ L.mT for some L.",
        )


def _off_pattern(parameter: cp.Parameter, value: Tensor, slack: Tensor) -> _Violations:
    """Nonzero where a diagonal or sparse parameter has no entries."""
    diagonal = parameter.attributes["diag"]
    if not diagonal and not parameter.sparse_idx:
        return
    pattern = np.zeros(parameter.shape, dtype=bool)
    if diagonal:
        np.fill_diagonal(pattern, True)
    else:
        pattern[parameter.sparse_idx] = True
    stray = (value * torch.from_numpy(~pattern).to(value.device)).flatten(1).abs().amax(1)
    yield (
        stray > slack,
        f"{'diag=True' if diagonal else 'sparse'}, but is nonzero outside that pattern.",
        "Zero those entries; they would be ignored.",
    )


def _out_of_bounds(parameter: cp.Parameter, value: Tensor, slack: Tensor) -> _Violations:
    bounds = parameter.attributes.get("bounds")
    if not isinstance(bounds, (list, tuple)):
        return
    lower, upper = (_dense_bound(bound, parameter.shape, value) for bound in bounds)
    off = slack.view(-1, *[1] * (value.ndim - 1))
    outside = (value < lower - off) | (value > upper + off)
    yield (
        outside.unsqueeze(-1).flatten(1).any(1),
        "with bounds, and lies outside them.",
        "Clamp it.",
    )


def _plainly_inside(domain: frozenset[str], value: Tensor) -> bool:
    if not domain <= SIGNS | MATRICES:
        return False
    signs, matrix = domain & SIGNS, domain & MATRICES
    if signs and not _sign_is_right(signs, value.amin().item(), value.amax().item()):
        return False
    if not matrix:
        return True
    if value.ndim < 3 or not (torch.equal(value, value.mT) or _nearly_symmetric(value)):
        return False
    if matrix == {"symmetric"}:
        return True
    _, info = torch.linalg.cholesky_ex(value.double() if "PSD" in matrix else -value.double())
    return not bool(info.any())


def relative(dtype: torch.dtype) -> float:
    """What a parameter's entries may be off by, relative to the largest: rounding, and that of what
    they were made of."""
    return {torch.float64: 1e-9, torch.float32: 1e-5}.get(dtype, 10 * torch.finfo(dtype).eps)


def _nearly_symmetric(value: Tensor) -> bool:
    """To rounding, as L.mT @ L is: measured by the row of the batch whose largest entry is the
    least."""
    flat = value.flatten(1)
    least = torch.maximum(flat.amax(1), -flat.amin(1)).min().item()
    return (value - value.mT).abs().max().item() <= relative(value.dtype) * least


def _sign_is_right(domain: frozenset[str], low: float, high: float) -> bool:
    return (
        ("nonneg" not in domain or low >= 0)
        and ("pos" not in domain or low > 0)
        and ("nonpos" not in domain or high <= 0)
        and ("neg" not in domain or high < 0)
    )


def _worst(values: Tensor, bad: Tensor, pick) -> str:
    return f"{pick(values[bad].tolist()):.3g}" if bool(bad.any()) else ""


def _dense_bound(bound, shape: tuple[int, ...], like: Tensor) -> Tensor:
    array = bound.toarray() if sp.issparse(bound) else np.asarray(bound, dtype=float)
    return torch.from_numpy(np.broadcast_to(array, shape).copy()).to(like.device, like.dtype)

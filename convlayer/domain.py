"""Declared domains of parameters (sign, symmetry, PSD, bounds, sparsity), checked on the values given, row by row."""

from __future__ import annotations

from collections.abc import Iterator

import cvxpy as cp
import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor


def is_restricted(parameter: cp.Parameter) -> bool:
    """Whether the parameter has a declared domain that its values could violate."""
    return any(value is not None and value is not False for value in parameter.attributes.values())


def violations(parameter: cp.Parameter, value: Tensor) -> Iterator[tuple[Tensor, str]]:
    """(rows (B,) outside a declared domain, what is wrong and the remedy) for a value of shape (B, *parameter.shape).

    Tolerances are relative to the row's largest entry: 1e-9 in float64, 1e-5 in float32, ten roundings in half.
    """
    name, attributes = parameter.name(), parameter.attributes
    value = value.detach()
    if value.numel() and _plainly_inside(attributes, value):
        return
    flat = value.unsqueeze(-1).flatten(1)
    if not flat.shape[1]:
        return
    relative = {torch.float64: 1e-9, torch.float32: 1e-5}.get(value.dtype, 10 * torch.finfo(value.dtype).eps)
    slack = relative * flat.abs().amax(1)

    def report(bad: Tensor, problem: str, remedy: str) -> Iterator[tuple[Tensor, str]]:
        if bool(bad.any()):
            yield bad, f"Parameter `{name}` was declared {problem} {remedy}"

    low, high = flat.amin(1), flat.amax(1)
    if attributes["nonneg"] or attributes["pos"]:
        bad = low < -slack if attributes["nonneg"] else low <= 0
        yield from report(
            bad,
            f"{'nonneg' if attributes['nonneg'] else 'pos'}=True, but its smallest entry is {_worst(low, bad, min)}.",
            "Pass it through torch.nn.functional.softplus or clamp it.",
        )
    if attributes["nonpos"] or attributes["neg"]:
        bad = high > slack if attributes["nonpos"] else high >= 0
        yield from report(
            bad,
            f"{'nonpos' if attributes['nonpos'] else 'neg'}=True, but its largest entry is {_worst(high, bad, max)}.",
            "Clamp it, or declare the parameter without a sign.",
        )
    if any(attributes[a] for a in ("symmetric", "PSD", "NSD")) and value.ndim >= 3:
        gap = (value - value.mT).abs().flatten(1).amax(1)
        bad = gap > 10 * slack
        yield from report(
            bad, f"symmetric, but differs from its transpose by {_worst(gap, bad, max)}.", "Write (X + X.mT) / 2."
        )
        for attribute, sign in (("PSD", 1.0), ("NSD", -1.0)):
            if attributes[attribute]:
                finite = torch.where(torch.isfinite(value), value, 0.0).double()
                smallest = (
                    torch.linalg.eigvalsh(sign * (finite + finite.mT) / 2)[..., 0].unsqueeze(-1).flatten(1).amin(1)
                )
                bad = smallest < -10 * slack * value.shape[-1]
                yield from report(
                    bad,
                    f"{attribute}=True, but has the eigenvalue {_worst(sign * smallest, bad, min if sign > 0 else max)}.",
                    f"Write {'' if sign > 0 else '-'}L @ L.mT for some L.",
                )
    if attributes["diag"] or parameter.sparse_idx:
        allowed = np.zeros(parameter.shape, dtype=bool)
        if attributes["diag"]:
            np.fill_diagonal(allowed, True)
        else:
            allowed[parameter.sparse_idx] = True
        outside = torch.from_numpy(~allowed).to(value.device)
        stray = (value * outside).flatten(1).abs().amax(1)
        yield from report(
            stray > slack,
            f"{'diag=True' if attributes['diag'] else 'sparse'}, but is nonzero outside that pattern.",
            "Zero those entries; they would be ignored.",
        )
    bounds = attributes.get("bounds")
    if isinstance(bounds, (list, tuple)):
        lower, upper = (_dense(b, parameter.shape, value) for b in bounds)
        yield from report(
            (
                (value < lower - slack.view(-1, *[1] * (value.ndim - 1)))
                | (value > upper + slack.view(-1, *[1] * (value.ndim - 1)))
            )
            .unsqueeze(-1)
            .flatten(1)
            .any(1),
            "with bounds, and lies outside them.",
            "Clamp it.",
        )


def _plainly_inside(attributes: dict, value: Tensor) -> bool:
    """One look at the whole tensor, which settles nearly every call; False where it does not."""
    declared = {name for name, value in attributes.items() if value is not None and value is not False}
    if not declared <= {"nonneg", "pos", "nonpos", "neg", "symmetric", "PSD", "NSD"}:
        return False
    if declared & {"nonneg", "pos"}:
        low = value.amin().item()
        if not (low > 0 or (low == 0 and "pos" not in declared)):
            return False
    if declared & {"nonpos", "neg"}:
        high = value.amax().item()
        if not (high < 0 or (high == 0 and "neg" not in declared)):
            return False
    if declared & {"symmetric", "PSD", "NSD"} and (value.ndim < 3 or not torch.equal(value, value.mT)):
        return False
    if not declared & {"PSD", "NSD"}:
        return True
    _, info = torch.linalg.cholesky_ex(value.double() if "PSD" in declared else -value.double())
    return not bool(info.any())


def _worst(values: Tensor, bad: Tensor, pick) -> str:
    return f"{pick(values[bad].tolist()):.3g}" if bool(bad.any()) else ""


def _dense(bound, shape: tuple[int, ...], like: Tensor) -> Tensor:
    array = bound.toarray() if sp.issparse(bound) else np.asarray(bound, dtype=float)
    return torch.from_numpy(np.broadcast_to(array, shape).copy()).to(like.device, like.dtype)

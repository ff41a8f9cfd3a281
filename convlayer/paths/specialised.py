"""The specialised path: parameters -> kernel inputs -> kernel -> the user's variables, on the
parameters' own device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import cvxpy as cp
import numpy as np
import torch
from torch import Tensor

from convlayer.declaration.affine import Table
from convlayer.declaration.binding import Binding, Kept
from convlayer.declaration.domain import is_symmetric
from convlayer.declaration.normal_form import NormalForm
from convlayer.declaration.spelling import short
from convlayer.kernels.answer import Answer
from convlayer.paths.evaluation import ROUNDING
from convlayer.paths.notes import Note, made_to_agree
from convlayer.paths.path import Found, Request
from convlayer.paths.verdict import Verdict
from convlayer.solution import Status
from convlayer.structures import STRUCTURES, Match, MismatchError, Wanted


@dataclass(frozen=True, eq=False)
class Output:
    """One of the user's variables, gathered from an output of the kernel."""

    shape: tuple[int, ...]
    output: int | None  # None: zero everywhere
    position: np.ndarray | None  # (size,) in the flattened output; None: it is the output, reshaped
    coefficient: np.ndarray | None  # None where all are one

    def value(self, outputs: Sequence[Tensor], kept: Kept) -> Tensor:
        """(B or 1, *shape)."""
        if self.output is None:
            # Zero whatever the parameters, and still a function of them to autograd.
            zero = _flat(outputs[0])[:, :1] * 0.0
            return zero.reshape(len(zero), *[1] * len(self.shape)).expand(len(zero), *self.shape)
        flat = outputs[self.output]
        if self.position is None and self.coefficient is None and flat.shape[1:] == self.shape:
            return flat
        rows = len(flat)
        if self.position is not None:
            flat = _flat(flat).index_select(1, kept.tensor((id(self), 0), self.position, flat))
        if self.coefficient is not None:
            flat = _flat(flat) * kept.tensor((id(self), 1), self.coefficient, flat)
        return flat.reshape(rows, *self.shape)


class Specialised:
    """A match put to work for the variables that a layer returns."""

    def __init__(
        self,
        form: NormalForm,
        name: str,
        match: Match,
        variables: Sequence[cp.Variable],
        owners: dict,
    ) -> None:
        self.form, self.name, self.match = form, name, match
        self._variables, self._owners = variables, owners
        self._outputs = outputs_of(form, match, variables, owners)
        assert match.build is not None
        self._run = match.build(wanted(form, variables, owners))
        self._tied = [
            k for k, p in enumerate(form.parameters) if is_symmetric(p) and not match.symmetrises
        ]
        self._masks = [
            (k, mask) for k, p in enumerate(form.parameters) if (mask := _mask(p)) is not None
        ]
        self._kept = Kept()

    def __call__(self, request: Request) -> Found:
        """The answer, row by row."""
        dtype, bad = working_dtype(request.dtype), request.bad
        answer, outputs, values = self.run(request.values, bad.which, dtype)
        if self.match.vouches and not answer.definite:
            # What the kernel was to see for itself it did not: the look that was saved is taken.
            bad = request.look_closer()
            if bad.which is not None:
                answer, outputs, values = self.run(request.values, bad.which, dtype)
        if request.everything:
            outputs.append(self.objective(values, answer))

        def outputs_at(values: list[Tensor]) -> list[Tensor]:
            return self.again(values, answer, dtype, request.everything)

        verdict, notes = _verdict(answer, request, bad.which), list[Note]()
        if verdict is not None and answer.apart is not None:
            # A disagreement is weighed where the numbers are known that right-hand sides are made
            # of.
            apart = answer.apart().cpu()
            refuted = (verdict.status == Status.INFEASIBLE) & (apart > ROUNDING)
            status = verdict.status.masked_fill(refuted, int(Status.NOT_CONVERGED))
            verdict, notes = replace(verdict, status=status), made_to_agree(apart, refuted)
        degenerate = (
            _row(answer.degenerate, request.size, torch.bool)
            if verdict is None
            else verdict.degenerate
        )
        ruled = (
            ()
            if degenerate is None or not bool(degenerate.any())
            else ((degenerate, STRUCTURES[self.name].cause),)
        )
        blank = None if verdict is None else verdict.failed
        return Found(
            outputs, outputs_at, verdict, blank, ruled, notes=tuple(notes), details=bad.details
        )

    def run(
        self, values: list[Tensor], bad: Tensor | None, dtype: torch.dtype
    ) -> tuple[Answer, list[Tensor], list[Tensor]]:
        """(B or 1, *shape) each -> the answer, the variables (B or 1, *shape), and the values as
        the kernel got them.

        Rows that are bad are not the kernel's.
        """
        if bad is not None:
            values = list(_Replaced.apply(bad, *values))
        values = self._entering(values, dtype)
        answer = self._run(values, _like(values, dtype))
        outputs = [output.value(answer.outputs, self._kept) for output in self._outputs]
        return answer, [_attached(output, values) for output in outputs], values

    def operations(self, rows: int) -> float:
        """Flops, or bytes moved, of so many rows."""
        cost = self.match.cost
        return 0.0 if cost is None else rows * max(cost.flops, cost.bytes)

    def again(
        self, values: list[Tensor], answer: Answer, dtype: torch.dtype, everything: bool
    ) -> list[Tensor]:
        """The variables, and the objective with `everything`, as functions of the values that are
        twice differentiable."""
        values = self._entering(values, dtype)
        answer = self._run(values, _like(values, dtype), answer)
        outputs = [output.value(answer.outputs, self._kept) for output in self._outputs]
        return [*outputs, self.objective(values, answer)] if everything else outputs

    def _entering(self, values: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
        """In the kernel's dtype; a symmetric parameter is read from both triangles alike, a sparse
        one on its pattern alone."""
        values = [v if v.dtype is dtype else v.to(dtype) for v in values]
        for k in self._tied:
            values[k] = (values[k] + values[k].mT) / 2
        for k, mask in self._masks:
            values[k] = values[k] * self._kept.tensor(("mask", k), mask, values[k])
        return values

    def objective(self, values: list[Tensor], answer: Answer) -> Tensor:
        """The user's objective at the answer, (B or 1,); the values as the kernel got them."""
        x = self._x(answer)
        total = self._objective(values, x)
        return -total if self.form.maximise else total

    def infeasibility(self, values: list[Tensor], bad: Tensor | None, dtype: torch.dtype) -> Tensor:
        """The largest violation of a constraint at the kernel's solution, relative to the
        solution's size or one, (B or 1,)."""
        answer, _, values = self.run(values, bad, dtype)
        values, x = [v.double() for v in values], self._x(answer).double()
        worst = x.new_zeros(len(x))
        for k, constraint in enumerate(self.form.constraints):
            rows = self._rows(("constraint", k), constraint.table, values, x)
            if constraint.cone == "zero":
                violation = rows.abs()
            elif constraint.cone == "nonnegative":
                violation = -rows
            else:
                n = round(rows.shape[1] ** 0.5)
                square = rows.unflatten(1, (n, n))
                violation = -torch.linalg.eigvalsh((square + square.mT) / 2)
            if violation.shape[1]:
                worst = torch.maximum(worst, violation.amax(1))
        for k, (atom, term) in enumerate(self.form.present):
            outside = atom.outside(self._rows((k, "argument"), term.argument, values, x))
            if outside is not None:
                worst = torch.maximum(worst, outside.amax(1))
        return worst / x.norm(dim=1).clamp(min=1.0)

    def gap(self, values: Sequence[Tensor]) -> Tensor | None:
        """(B,) the structure's own distance from a kink between eigenvalues, if it has one."""
        assert self.match.build is not None
        entered = self._entering(list(values), torch.float64)
        answer = self.match.build(Wanted())(entered, _like(entered, torch.float64))
        gap = STRUCTURES[self.name].gap(answer)
        return None if gap is None else gap.expand(max(len(value) for value in values))

    def _x(self, answer: Answer) -> Tensor:
        """The stacked variables, (B or 1, n)."""
        x = _flat(answer.outputs[0])
        if np.array_equal(self.match.x, np.arange(self.form.n)):
            return x
        return x.index_select(1, self._kept.tensor("x", self.match.x, x))

    def _objective(self, values: list[Tensor], x: Tensor) -> Tensor:
        """c'x + d and the terms of the atoms, (B or 1,)."""
        total = self._rows("linear", self.form.linear, values, x)[:, 0]
        for k, (atom, term) in enumerate(self.form.present):
            weight = self._rows((k, "weight"), term.weight, values, x)
            total = total + atom.value(
                weight, self._rows((k, "argument"), term.argument, values, x)
            )
        return total

    def _rows(self, key, table: Table, values: list[Tensor], x: Tensor) -> Tensor:
        """The rows of a table at x, (B or 1, rows)."""
        if key not in self._kept:
            parts = []
            for part in (table.linear(), table.offset()):
                coefficients = Binding(
                    (len(part.row),),
                    np.arange(len(part.row)),
                    part.parameter,
                    part.coefficient,
                    self.form.parameters,
                    self.form.parameter_starts,
                )
                parts.append((coefficients, part) if len(part.row) else None)
            self._kept[key] = parts
        linear, offset = self._kept[key]
        total = x.new_zeros(1, table.size)
        if linear is not None:
            coefficients, part = linear
            moved = x.index_select(1, self._kept.tensor((key, "variable"), part.variable, x))
            terms = coefficients(values, x) * moved
            row = self._kept.tensor((key, "row"), part.row, x)
            total = x.new_zeros(len(terms), table.size).index_add(1, row, terms)
        if offset is not None:
            coefficients, part = offset
            terms = coefficients(values, x)
            row = self._kept.tensor((key, "offset"), part.row, x)
            total = total + x.new_zeros(len(terms), table.size).index_add(1, row, terms)
        return total


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """The kernels', for outputs of this dtype."""
    return dtype if dtype in (torch.float32, torch.float64) else torch.float32


def _verdict(answer: Answer, request: Request, bad: Tensor | None) -> Verdict | None:
    """None: every row is solved, and nobody asks for more."""
    status, size = answer.status, request.size
    if bad is None and not request.everything and (status is None or not bool(status.any())):
        return None
    status = (
        torch.zeros(size, dtype=torch.int64) if status is None else _row(status, size, torch.int64)
    )
    # Parameters were found inside their domains: what a kernel cannot take there is the cone
    # program's to judge.
    status = torch.where(status == Status.BAD_INPUT, int(Status.NOT_CONVERGED), status)
    if bad is not None:
        status = torch.where(bad, int(Status.BAD_INPUT), status)
    verdict = Verdict.unknown(status)
    residual = (
        torch.zeros_like(verdict.residual)
        if answer.residual is None
        else _row(answer.residual, size, torch.float64)
    )
    return Verdict(
        status,
        verdict.iterations
        if answer.iterations is None
        else _row(answer.iterations, size, torch.int64),
        residual.masked_fill(verdict.failed, torch.nan),
        verdict.degenerate
        if answer.degenerate is None
        else _row(answer.degenerate, size, torch.bool) & ~verdict.failed,
        verdict.margin,
    )


def _row(values: Tensor | None, size: int, dtype: torch.dtype) -> Any:
    """(B,) on the host, of (B,) or (1,)."""
    return None if values is None else values.to("cpu", dtype).expand(size)


def _flat(values: Tensor) -> Tensor:
    """(B, *shape) -> (B, size), of an empty batch too."""
    return values.unsqueeze(-1).flatten(1)


def outputs_of(
    form: NormalForm, match: Match, variables: Sequence[cp.Variable], owners: dict
) -> list[Output]:
    """Where the wanted variables are. MismatchError: a multiplier that the kernel does not give."""
    found = []
    index = {variable.id: k for k, variable in enumerate(form.variables)}
    by_origin = {
        constraint.origin: k
        for k, constraint in enumerate(form.constraints)
        if constraint.origin is not None
    }
    for variable in variables:
        owner = owners.get(variable.id)
        if owner is None:
            start = form.variable_starts[index[variable.id]]
            place = (
                match.x[start : start + variable.size].reshape(variable.shape, order="F").ravel()
            )
            found.append(_output(variable.shape, 0, place, None, form.n))
            continue
        dual = match.duals.get(by_origin.get(owner.id, -1))
        if dual is None:
            raise MismatchError(f"its kernel gives no multiplier of `{short(owner)}`")
        shape = variable.shape
        place, scale = (
            part.reshape(shape, order="F").ravel() for part in (dual.position, dual.coefficient)
        )
        found.append(_output(shape, dual.output, place, scale, -1))
    return found


def wanted(form: NormalForm, variables: Sequence[cp.Variable], owners: dict) -> Wanted:
    """What of a solution these variables, and multipliers, are."""
    seen, ids = np.zeros(form.n, dtype=bool), {v.id for v in variables}
    for variable, start in zip(form.variables, form.variable_starts, strict=False):
        seen[start : start + variable.size] = variable.id in ids
    constraints = {owners[v.id].id for v in variables if v.id in owners}
    places = frozenset(
        k for k, constraint in enumerate(form.constraints) if constraint.origin in constraints
    )
    return Wanted(bool(constraints), seen, places)


def _output(
    shape, output: int | None, place: np.ndarray, scale: np.ndarray | None, size: int
) -> Output:
    whole = len(place) == size and np.array_equal(place, np.arange(size))
    plain = scale is None or bool((scale == 1.0).all())
    return Output(tuple(shape), output, None if whole else place, None if plain else scale)


def _attached(output: Tensor, values: list[Tensor]) -> Tensor:
    """An output that no parameter moves depends on them none the less, with a gradient of zero."""
    if output.requires_grad or not torch.is_grad_enabled():
        return output
    source = next((v for v in values if v.requires_grad), None)
    return output if source is None else output + source.flatten()[:1].sum().to(output.dtype) * 0.0


def _mask(parameter: cp.Parameter) -> np.ndarray | None:
    """One where a sparse or diagonal parameter has entries; None for any other."""
    if parameter.attributes["diag"]:
        return np.eye(parameter.shape[0])
    if parameter.sparse_idx is None:
        return None
    mask = np.zeros(parameter.shape)
    mask[tuple(parameter.sparse_idx)] = 1.0
    return mask


class _Replaced(torch.autograd.Function):
    """The values of a good row in the place of bad ones. Backwards nothing changes: a bad row has
    the cotangent zero."""

    @staticmethod
    def forward(ctx, bad: Tensor, *values: Tensor):
        return tuple(without(v, bad) for v in values)

    @staticmethod
    def backward(ctx, *bars: Tensor):
        return None, *bars


def _like(values: list[Tensor], dtype: torch.dtype) -> Tensor:
    return values[0] if values else torch.zeros((), dtype=dtype)


def without(value: Tensor, bad: Tensor) -> Tensor:
    """With the value of a good row in the place of bad ones; zeros if there is none."""
    good = torch.nonzero(~bad).flatten()
    if not len(good):
        return torch.zeros_like(value)
    if len(value) != len(bad):
        return value.view_as(value)
    mask = bad.to(value.device).view(-1, *[1] * (value.ndim - 1))
    return torch.where(mask, value[good[0]].detach(), value)

"""A call of a layer as one call of the compiled core: from parameters to outputs, and from the
outputs' cotangents back."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from ctypes import addressof, byref, c_int64, c_uint8, c_void_p
from dataclasses import dataclass
from enum import IntFlag
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from convlayer.core.interface import REPORT, CallOf, MapsOf, Options, TensorsAt
from convlayer.core.rows import ADJOINT, ITERATIONS, SOLUTION, Plan, Solved

# Of a row's derivative: what it is not.
INEXACT, NOT_FINITE = 1, 2


class Domain(IntFlag):
    """What is declared of a parameter, as maps.hpp has it."""

    NONNEG = 1
    POS = 2
    NONPOS = 4
    NEG = 8
    SYMMETRIC = 16
    PSD = 32
    NSD = 64


@dataclass(frozen=True)
class Read:
    """How a parameter is read."""

    size: int
    domain: Domain
    order: int  # of a square matrix, or 0
    log: bool
    limits: np.ndarray  # (size,) entries for which infinity has a meaning


@dataclass(frozen=True)
class Written:
    """How an output is made: weight * (x, y)[position], or exp of that."""

    positions: np.ndarray
    weights: np.ndarray
    exp: bool


@dataclass(frozen=True)
class Ties:
    """Equalities that depend on each other, and empty inequalities; see
    `convlayer.conic.consistency`."""

    rows: np.ndarray  # (t,)
    groups: np.ndarray  # (t,)
    basis: np.ndarray  # (t, k)
    empty: np.ndarray  # (e,)


class Maps:
    """From the entries of parameters to (P, q, A, b, d), one after the other, and from (x, y) to
    outputs."""

    def __init__(
        self,
        plan: Plan,
        parameters: Sequence[Read],
        constant: np.ndarray,  # (values,)
        # (value, entry, coefficient), in the order of the values
        coefficients: tuple[np.ndarray, np.ndarray, np.ndarray],
        outputs: Sequence[Written],
        objective: tuple[float, bool],  # sign, and whether it is the exponential
        bounds: tuple[np.ndarray, np.ndarray, np.ndarray],  # row, column, coefficient
        ties: Ties,
        whole: Any = None,  # what leads from this program's solution to that of the one asked for
    ) -> None:
        self.plan, self.whole = plan, whole
        self.sizes = [parameter.size for parameter in parameters]
        self.output_sizes = [len(output.positions) for output in outputs]
        self.reads_entries = any(parameter.log for parameter in parameters)

        def together(parts: Sequence[np.ndarray]) -> np.ndarray:
            return np.concatenate(parts) if parts else np.zeros(0)

        arrays: dict[str, tuple[Any, type]] = {
            "sizes": (self.sizes, np.int32),
            "domains": ([int(parameter.domain) for parameter in parameters], np.int32),
            "orders": ([parameter.order for parameter in parameters], np.int32),
            "logs": ([parameter.log for parameter in parameters], np.uint8),
            "limits": (together([parameter.limits for parameter in parameters]), np.uint8),
            "constant": (constant, np.float64),
            "rows": (coefficients[0], np.int32),
            "columns": (coefficients[1], np.int32),
            "coefficients": (coefficients[2], np.float64),
            "output_sizes": (self.output_sizes, np.int32),
            "output_exps": ([output.exp for output in outputs], np.uint8),
            "positions": (together([output.positions for output in outputs]), np.int32),
            "weights": (together([output.weights for output in outputs]), np.float64),
            "bound_rows": (bounds[0], np.int32),
            "bound_columns": (bounds[1], np.int32),
            "bound_coefficients": (bounds[2], np.float64),
            "tied_rows": (ties.rows, np.int32),
            "tie_groups": (ties.groups, np.int32),
            "tie_basis": (ties.basis, np.float64),
            "empty_rows": (ties.empty, np.int32),
        }
        held: dict[str, np.ndarray] = {
            name: np.ascontiguousarray(part, dtype) for name, (part, dtype) in arrays.items()
        }
        pattern = MapsOf(
            parameters=len(parameters),
            outputs=len(outputs),
            nonzeros=len(coefficients[0]),
            bounds=len(bounds[0]),
            tied=len(ties.rows),
            ties=ties.basis.shape[1],
            empty=len(ties.empty),
            objective_exp=objective[1],
            sign=objective[0],
            **{name: part.ctypes.data for name, part in held.items()},
        )
        library = plan.library
        self.handle = c_void_p(library.core_maps(plan.handle, byref(pattern)))
        weakref.finalize(self, library.core_maps_free, self.handle)


class _Places:
    """Of tensors that are alike in every call: their strides from row to row and precisions."""

    def __init__(self, strides: Sequence[int], single: Sequence[bool]) -> None:
        count = len(strides)
        self.pointers = c_void_p * count
        self._strides = (c_int64 * count)(*strides)
        self._single = (c_uint8 * count)(*single)
        self.template = TensorsAt(None, addressof(self._strides), addressof(self._single))

    def at(self, pointers: Any) -> TensorsAt:
        """These tensors."""
        tensors = TensorsAt.from_buffer_copy(self.template)
        tensors.at = addressof(pointers)
        return tensors


class Calls:
    """Calls of one batch size and kind of tensors.

    Parameters and outputs are contiguous, float32 or float64, on the host; a parameter that the
    batch shares has one row.
    """

    def __init__(
        self,
        maps: Maps,
        batch: int,
        shared: Sequence[bool],  # of each parameter
        single: Sequence[bool],  # float32, of each parameter
        outputs_single: bool,
        tolerance: float,
        validate: bool,
    ) -> None:
        self.maps, self.batch = maps, batch
        plan = maps.plan
        strides = [0 if alone else size for alone, size in zip(shared, maps.sizes, strict=True)]
        count = len(maps.output_sizes)
        self._thetas = _Places(strides, single)
        self._outputs = _Places([*maps.output_sizes, 1], [outputs_single] * (count + 1))
        self.sizes = [batch * size for size in (plan.n, plan.m, plan.m, 1, REPORT)]
        self.rows = [1 if alone else batch for alone in shared]  # of each parameter
        self._numbers = sum(self.sizes)
        self._template = CallOf(
            options=Options(tolerance, ITERATIONS, plan.threads(batch, SOLUTION), 0),
            validate=validate,
            thetas=self._thetas.template,
            outputs=self._outputs.template,
        )
        self._adjoint_threads = plan.threads(batch, ADJOINT)

    def __call__(self, thetas: Sequence[int], outputs: Sequence[int], keep: bool) -> Called:
        """Addresses of the parameters, and of the outputs and the objective, 0 where it is not
        wanted. keep: what the derivative needs."""
        maps, batch = self.maps, self.batch
        plan = maps.plan
        at_once = plan.at_once(batch, keep)
        points = torch.empty(self._numbers, dtype=torch.float64)
        kept = torch.empty((batch if keep else at_once) * plan.kept, dtype=torch.float64)
        call, _alive = self._of(thetas, points, kept), self._outputs.pointers(*outputs)
        call.outputs.at, call.keep = addressof(_alive), keep
        unsettled = 0
        for first in range(0, batch, at_once):
            call.first, call.count = first, min(at_once, batch - first)
            unsettled += plan.library.core_call(maps.handle, byref(call))
        return Called(self, points, kept, unsettled)

    def pull(
        self,
        called: Called,
        thetas: Sequence[int],
        bars: Sequence[int],
        theta_bars: Sequence[int],
        flags: Tensor,  # (B,) uint8
        sizes: Tensor | None,  # (B, 3)
    ) -> int:
        """From the outputs' and the objective's cotangents to those of the parameters, by
        addresses, 0 where there is none, or none is wanted.

        Returns how many rows have a flag, INEXACT or NOT_FINITE. sizes: of x_bar, x and q.
        """
        maps = self.maps
        call = self._of(thetas, called.points, called.kept)
        call.options.threads, call.count = self._adjoint_threads, self.batch
        given, found = self._outputs.pointers(*bars), self._thetas.pointers(*theta_bars)
        given_at, found_at = self._outputs.at(given), self._thetas.at(found)
        return maps.plan.library.core_pull(
            maps.handle,
            byref(call),
            byref(given_at),
            byref(found_at),
            flags.data_ptr(),
            None if sizes is None else sizes.data_ptr(),
        )

    def _of(self, thetas: Sequence[int], points: Tensor, kept: Tensor) -> CallOf:
        call, place = CallOf.from_buffer_copy(self._template), points.data_ptr()
        call.given = self._thetas.pointers(*thetas)  # held by the call
        call.thetas.at = addressof(call.given)
        n, m, _, rows, _ = self.sizes
        call.x, call.s, call.y = place, place + 8 * n, place + 8 * (n + m)
        call.value, call.report = place + 8 * (n + 2 * m), place + 8 * (n + 2 * m + rows)
        call.kept = kept.data_ptr()
        return call


@dataclass(frozen=True, eq=False)
class Called:
    """What a call found."""

    calls: Calls
    points: Tensor  # x, s, y, value and report, each of all rows
    kept: Tensor
    unsettled: int  # rows

    @cached_property
    def parts(self) -> tuple[Tensor, ...]:
        """x (B, n), s (B, m), y (B, m), value (B,) and report (B, REPORT)."""
        plan, batch = self.calls.maps.plan, self.calls.batch
        x, s, y, value, report = self.points.split(self.calls.sizes)
        wide = zip((x, s, y), (plan.n, plan.m, plan.m), strict=True)
        return *(part.view(batch, k) for part, k in wide), value, report.view(batch, REPORT)

    @property
    def solved(self) -> Solved:
        """As rows that the core solved."""
        x, s, y, _, report = self.parts
        plan = self.calls.maps.plan
        return Solved(plan, x, s, y, report, self.kept.view(-1, plan.kept))

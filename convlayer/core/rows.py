"""What the compiled core does for the rows of a batch: their solutions, and cotangents through
them."""

from __future__ import annotations

import ctypes
import os
import weakref
from collections.abc import Sequence
from ctypes import byref, c_void_p
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
import torch
from torch import Tensor

from convlayer.core.interface import REPORT, Options, PatternOf, Values

# Iterations of the interior point, at most.
ITERATIONS = 60
# What a row, solved and differentiated, takes in seconds: by itself, for each variable and row, for
# each row of a second-order, exponential or power cone, for the cube of a psd cone's order; and
# multiplications of one factorisation a second, all of its factorisations counted. Fitted to the
# declarations of `benchmarks/real`.
ROW, UNKNOWN, CURVED, CUBE, RATE = 2.7e-6, 6.5e-7, 1e-6, 6.3e-7, 2.3e9
# Another thread is worth it from so many seconds of work on,
WORTH = 4e-4
# and a call takes no longer than about this.
LONGEST = 0.2
# Rows whose work is held at a time where nothing of it is kept.
FEW = 256
# What is done of a row's solution.
SOLUTION, ADJOINT = 1.0, 0.1


class Outcome(IntEnum):
    """What came of a row; all but the first are rows that another way is to solve."""

    SETTLED = 0
    FOREIGN = 1  # its data want what the core does not have
    UNSOLVED = 2  # the interior point did not converge
    UNPOLISHED = 3  # Newton's method did not settle
    INEXACT = 4  # the point is not certified to the tolerance
    KINK = 5  # a constraint is weakly active, to the accuracy of the point
    SINGULAR = 6  # solution or multipliers are not unique, or all but so
    UNREAD = (
        7  # it was not looked at: its parameters, or right-hand sides, are to be looked at first
    )


class ConeRows(IntEnum):
    """Kinds of cones, as plan.hpp counts them."""

    ZERO = 0
    NONNEGATIVE = 1
    SECOND_ORDER = 2
    PSD = 3
    EXPONENTIAL = 4
    POWER = 5


@dataclass(frozen=True)
class Pattern:
    """What all rows share: sizes, places of the entries, cones, and what is seen of the unknowns."""

    n: int
    m: int
    P: tuple[np.ndarray, np.ndarray]  # rows and columns of the upper triangle's entries
    A: tuple[np.ndarray, np.ndarray]
    # (kind, rows, order of a psd cone's matrices, exponent of a power cone), in the rows' order
    cones: Sequence[tuple[ConeRows, int, int, float]]
    parts: tuple[np.ndarray, np.ndarray, int]  # of each variable and row, and how many
    seen: tuple[
        np.ndarray, np.ndarray
    ]  # variables and rows that an output reads or a parameter moves
    ignored: np.ndarray  # (m,) inequalities that others imply
    # of the variables: group, whether under a logarithm, whether its value; None: no logarithms
    logarithms: tuple[np.ndarray, np.ndarray, np.ndarray] | None


class Plan:
    """What is worked out once for a pattern. It lives as long as this object."""

    def __init__(self, core: ctypes.CDLL, pattern: Pattern) -> None:
        self.n, self.m, self.library = pattern.n, pattern.m, core
        arrays: dict[str, tuple[Any, type]] = {
            "P_rows": (pattern.P[0], np.int32),
            "P_cols": (pattern.P[1], np.int32),
            "A_rows": (pattern.A[0], np.int32),
            "A_cols": (pattern.A[1], np.int32),
            "kinds": ([cone[0] for cone in pattern.cones], np.int32),
            "sizes": ([cone[1] for cone in pattern.cones], np.int32),
            "orders": ([cone[2] for cone in pattern.cones], np.int32),
            "parameters": ([cone[3] for cone in pattern.cones], np.float64),
            "part_x": (pattern.parts[0], np.int32),
            "part_y": (pattern.parts[1], np.int32),
            "seen_x": (pattern.seen[0], np.uint8),
            "seen_y": (pattern.seen[1], np.uint8),
            "ignored": (pattern.ignored, np.uint8),
        }
        if pattern.logarithms is not None:
            for name, part, dtype in zip(
                ("log_group", "log_seen", "log_valued"),
                pattern.logarithms,
                (np.int32, np.uint8, np.uint8),
                strict=True,
            ):
                arrays[name] = (part, dtype)
        held: dict[str, np.ndarray] = {
            name: np.ascontiguousarray(part, dtype) for name, (part, dtype) in arrays.items()
        }
        given = PatternOf(
            n=pattern.n,
            m=pattern.m,
            nnz_P=len(pattern.P[0]),
            nnz_A=len(pattern.A[0]),
            cones=len(pattern.cones),
            parts=pattern.parts[2],
            logs=int(pattern.logarithms is not None),
            **{name: part.ctypes.data for name, part in held.items()},
        )
        self.handle = c_void_p(core.core_plan(byref(given)))
        weakref.finalize(self, core.core_free, self.handle)
        self.kept: int = core.core_kept(self.handle)
        self.flops: float = core.core_flops(self.handle)
        curved = [cone for cone in pattern.cones if cone[0] > ConeRows.NONNEGATIVE]
        self.row_seconds = (
            ROW
            + UNKNOWN * (self.n + self.m)
            + CURVED * sum(size for kind, size, _, _ in curved if kind is not ConeRows.PSD)
            + CUBE * sum(order**3 for _, _, order, _ in curved)
            + self.flops / RATE
        )

    def seconds(self, rows: int) -> float:
        """A coarse estimate for so many rows."""
        return rows * self.row_seconds / self.threads(rows, SOLUTION)

    def at_once(self, rows: int, keep: bool) -> int:
        """Of so many rows those of one call: an interrupt is heard between two. keep: what the
        derivative needs, of all of them."""
        most = max(1, int(LONGEST / self.row_seconds))
        return min(rows, most if keep else min(most, FEW))

    def threads(self, rows: int, share: float) -> int:
        """For so many rows, a share of whose solution is wanted: one, where that is no work to
        deal."""
        return min(rows, os.cpu_count() or 1) if share * rows * self.row_seconds > WORTH else 1


@dataclass(frozen=True, eq=False)
class Solved:
    """The rows of a batch; those that are not SETTLED hold anything."""

    plan: Plan
    x: Tensor  # (B, n)
    s: Tensor  # (B, m)
    y: Tensor  # (B, m)
    report: Tensor  # (B, REPORT) outcome, residual, judged, error, margin, steps, iterations
    kept: Tensor  # (B, plan.kept) for the derivative; fewer rows: nothing was to be kept

    def of_rows(self, rows: Tensor) -> Solved:
        """Of some rows."""
        x, s, y, report = (part[rows] for part in (self.x, self.s, self.y, self.report))
        kept = self.kept if len(self.kept) < len(self.x) else self.kept[rows]
        return Solved(self.plan, x, s, y, report, kept)

    @property
    def settled(self) -> Tensor:
        """(B,)"""
        return self.report[:, 0] == Outcome.SETTLED

    def adjoint(
        self, places: Tensor, x_bar: Tensor, y_bar: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Cotangents of x and y in some rows (k,) int64, (k, .) each -> (w, u), and (k,) whether
        the solve is good."""
        x_bar, y_bar = x_bar.contiguous(), y_bar.contiguous()
        w, u = torch.empty_like(x_bar), torch.empty_like(y_bar)
        good = torch.empty(len(w), dtype=torch.bool)
        self.plan.library.core_adjoint(
            self.plan.handle,
            self.plan.threads(len(w), ADJOINT),
            len(w),
            places.data_ptr(),
            x_bar.data_ptr(),
            y_bar.data_ptr(),
            w.data_ptr(),
            u.data_ptr(),
            good.data_ptr(),
            self.kept.data_ptr(),
        )
        return w, u, good


def solve_rows(
    plan: Plan,
    batch: int,
    data: Sequence[Tensor],  # P, q, A, b: (B or 1, .) each
    tolerance: float,
    start: Sequence[Tensor] | None = None,
    keep: bool = True,
) -> Solved:
    """The rows from their data, or from points (x, s, y) near their solutions. keep: what their
    derivative needs."""
    held = [part.contiguous() for part in data]
    strides = [part.shape[1] if len(part) > 1 else 0 for part in held]
    x, s, y = (
        (torch.empty(batch, k, dtype=torch.float64) for k in (plan.n, plan.m, plan.m))
        if start is None
        else (part.clone(memory_format=torch.contiguous_format) for part in start)
    )
    report = torch.empty(batch, REPORT, dtype=torch.float64)
    at_once = plan.at_once(batch, keep)
    kept = torch.empty(batch if keep else at_once, plan.kept, dtype=torch.float64)
    options = Options(tolerance, ITERATIONS, plan.threads(batch, SOLUTION), int(start is not None))
    outputs = [(part.data_ptr(), 8 * part.shape[1]) for part in (x, s, y, report)]
    for first in range(0, batch, at_once or 1):
        values = Values(
            *(
                part.data_ptr() + 8 * stride * first
                for part, stride in zip(held, strides, strict=True)
            ),
            *strides,
        )
        plan.library.core_solve(
            plan.handle,
            byref(options),
            min(at_once, batch - first),
            byref(values),
            *(pointer + row * first for pointer, row in outputs),
            kept.data_ptr() + 8 * plan.kept * first * keep,
        )
    return Solved(plan, x, s, y, report, kept)

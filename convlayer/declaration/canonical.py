"""A problem as a parametrised cone program: the program, the maps into it and out of it, and what
follows from them alone.

    minimise    1/2 x'Px + q'x + d
    subject to  Ax + s = b,  s in K         (P, q, A, b, d affine in the parameters' entries)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from convlayer.conic.bounds import Bounds, implied
from convlayer.conic.by_core import plan_of
from convlayer.conic.consistency import Dependence
from convlayer.conic.costs import dense_seconds, system_seconds
from convlayer.conic.elimination import Elimination
from convlayer.conic.kkt import Visible
from convlayer.conic.program import Program
from convlayer.core.rows import Plan
from convlayer.declaration.maps import (
    ONE,
    AffineMap,
    ParameterEntries,
    Recovery,
    fixed_values,
    row_of_each,
)
from convlayer.solvers import SOLVERS, Solver


@dataclass(frozen=True, eq=False)
class Canonical:
    """A problem, canonicalised once."""

    program: Program
    maps: dict[str, AffineMap]  # for each of P, q, A, b, d
    # For P and A: positions of the entries that depend on a parameter.
    moving: dict[str, np.ndarray]
    parameters: list[ParameterEntries]
    variables: list[Recovery]
    sign: float  # -1 where the user maximises
    gp: bool
    sizes: dict[str, int]  # the problem as the user wrote it, for explain()
    matrices: dict[str, sp.csr_array]  # of the maps, with all their columns
    # Parts as the user would know them whose coefficients are not read here, but from CVXPY's own
    # matrices, dense in variables and parameter entries.
    stuffed: list[str]

    @cached_property
    def dense_maps(self) -> dict[str, AffineMap]:
        """The maps to whole matrices P and A in place of their stored entries, back from all
        entries of their cotangents."""
        program, sizes = self.program, [math.prod(p.shape) for p in self.parameters]
        n, m = program.n, program.m
        P, A = self.matrices["P"], self.matrices["A"]
        row = row_of_each(P)
        i, j = program.P_rows[row], program.P_cols[row]
        below = i != j
        # Below the diagonal a symmetric parameter is read below its own, so that P is the parameter
        # as it lies in memory.
        column = np.concatenate([P.indices, self.mirrored[P.indices[below]]])
        place = np.concatenate([i * n + j, (j * n + i)[below]])
        whole_P = sp.csr_array(
            (np.concatenate([P.data, P.data[below]]), (place, column)), shape=(n * n, P.shape[1])
        )
        row = row_of_each(A)
        place = program.A_rows[row] * n + program.A_cols[row]
        whole_A = sp.csr_array((A.data, (place, A.indices)), shape=(m * n, A.shape[1]))
        return {"P": AffineMap(whole_P, sizes, None), "A": AffineMap(whole_A, sizes, None)}

    @property
    def mirrored(self) -> np.ndarray:
        """The inputs of the maps, with each entry of a symmetric parameter in the place of its
        mirror image."""
        order, start = np.arange(self.matrices["P"].shape[1]), ONE + 1
        for parameter in self.parameters:
            size = math.prod(parameter.shape)
            if parameter.symmetric:
                own = order[start : start + size]
                order[start : start + size] = own.reshape(parameter.shape).swapaxes(-1, -2).ravel()
            start += size
        return order

    @cached_property
    def visible(self) -> Visible:
        """What some output reads or some parameter moves, and the multipliers of curved cones: how
        x moves along one depends on them."""
        x = torch.zeros(self.program.n, dtype=torch.bool)
        y = torch.zeros(self.program.m, dtype=torch.bool)
        for recovery in self.variables:
            (y if recovery.dual else x)[recovery.position] = True
        for name, seen in (("q", x), ("b", y)):
            matrix = self.matrices[name]
            seen[torch.from_numpy(row_of_each(matrix)[matrix.indices > ONE])] = True
        index = self.program.indices
        x[index["A_cols"][self.moving["A"]]] = True
        y[index["A_rows"][self.moving["A"]]] = True
        x[index["P_rows"][self.moving["P"]]] = True
        x[index["P_cols"][self.moving["P"]]] = True
        return Visible(x, y | self.program.cones.curved)

    @cached_property
    def constant(self) -> Tensor:
        """(m,) equalities whose coefficients no parameter moves."""
        rows = self.program.equalities.clone()
        rows[self.program.indices["A_rows"][self.moving["A"]]] = False
        return rows

    @cached_property
    def directions(self) -> list[dict[str, Tensor]]:
        """How P, q, A, b, d change in a random direction of each parameter, (1, values) each."""
        generator, like = torch.Generator().manual_seed(0), torch.zeros((), dtype=torch.float64)
        still = [
            torch.zeros(1, math.prod(parameter.shape), dtype=torch.float64)
            for parameter in self.parameters
        ]
        changes = []
        for k, parameter in enumerate(self.parameters):
            change = torch.randn(1, *parameter.shape, dtype=torch.float64, generator=generator)
            moved = ((change + change.mT) / 2 if parameter.symmetric else change).reshape(1, -1)
            entries = [*still[:k], moved, *still[k + 1 :]]
            changes.append(
                {name: mapping.linear(entries, like) for name, mapping in self.maps.items()}
            )
        return changes

    @cached_property
    def reading(self) -> tuple[Tensor, Tensor]:
        """Random cotangents of x (1, n) and y (1, m), through the outputs."""
        generator = torch.Generator().manual_seed(1)
        x, y = (
            torch.zeros(1, size, dtype=torch.float64) for size in (self.program.n, self.program.m)
        )
        for recovery in self.variables:
            weights = torch.randn(
                1, len(recovery.position), dtype=torch.float64, generator=generator
            )
            if recovery.coefficient is not None:
                weights = weights * recovery.coefficient
            (y if recovery.dual else x).index_add_(1, recovery.position, weights)
        return x, y

    @cached_property
    def bounds(self) -> Bounds | None:
        """Of single variables that an output reads."""
        shown = np.zeros(self.program.n, dtype=bool)
        for recovery in self.variables:
            if not recovery.dual:
                shown[recovery.position.numpy()] = True
        return Bounds.of(self.program, *self._constants, shown)

    @cached_property
    def implied(self) -> Tensor | None:
        """Inequalities that a cone implies, whose multipliers are nobody's."""
        b = fixed_values(self.matrices["b"])
        return implied(self.program, *self._constants, b, self.visible.y.numpy())

    @cached_property
    def limits(self) -> list[np.ndarray]:
        """For each parameter its entries (size,) that are right-hand sides of inequalities alone,
        where infinity has a meaning.

        Not in a log-log convex program, whose limits are logarithms within exponentials.
        """
        alone = np.ones(self.matrices["b"].shape[1], dtype=bool)
        inequalities = self.program.inequalities.numpy()
        for name, matrix in self.matrices.items():
            elsewhere = matrix[~inequalities] if name == "b" else matrix
            alone[np.unique(elsewhere.indices)] = False
        starts = np.cumsum([ONE + 1, *(math.prod(p.shape) for p in self.parameters)])
        return [alone[lo:hi] & (not self.gp) for lo, hi in pairwise(starts)]

    @cached_property
    def costs(self) -> list[int]:
        """The parameters that enter the linear costs and nothing else."""
        read = {name: set(mapping.parameters) for name, mapping in self.maps.items()}
        return sorted(read["q"] - read["P"] - read["A"] - read["b"])

    @cached_property
    def elimination(self) -> Elimination | None:
        """Of auxiliary variables, if the program is then cheaper to solve and to differentiate."""
        return Elimination.of(self.program, *self._constants, self.visible, _row_seconds)

    @cached_property
    def core(self) -> Plan | None:
        """How the compiled core solves it; None: there is no core, or it is not for it."""
        return plan_of(self.program, self.visible, self.implied)

    @cached_property
    def dependence(self) -> Dependence | None:
        """Of equalities on each other, whatever the parameters."""
        return Dependence.of(self.program, *self._constants)

    @cached_property
    def _constants(self) -> tuple[np.ndarray, np.ndarray]:
        """(nnz(A),) which entries of A no parameter moves, and their values."""
        count = len(self.program.A_rows)
        fixed, values = np.ones(count, dtype=bool), np.zeros(count)
        fixed[self.moving["A"]] = False
        matrix = self.matrices["A"]
        constant = matrix.indices == ONE
        values[row_of_each(matrix)[constant]] = matrix.data[constant]
        return fixed, values

    def sizes_of_b(self, entries: Sequence[Tensor]) -> Tensor:
        """(B or 1, m) of the numbers whose sum is b: their rounding is b's own."""
        batch = max((len(part) for part in entries), default=1)
        ones = torch.ones(batch, 1, dtype=torch.float64)
        head = torch.cat([torch.zeros_like(ones), ones], 1)
        parts = [head, *(part.detach().abs().cpu().expand(batch, -1) for part in entries)]
        sizes = abs(self.matrices["b"]) @ torch.cat(parts, 1).numpy().T
        return torch.from_numpy(np.ascontiguousarray(sizes.T))

    def objective(self, value: Tensor) -> Tensor:
        """The user's objective from the cone program's."""
        return self.sign * value if not self.gp else (self.sign * value).exp()


def _row_seconds(program: Program, dense: bool) -> float:
    """Of solving a row by the cheaper of the solvers that go row by row, its polish and its
    adjoint, `dense` or as is cheaper."""
    system = dense_seconds(program) if dense else system_seconds(program)
    solvers = (solver for solver in SOLVERS.values() if isinstance(solver, Solver))
    return min(solver.row_seconds(program) for solver in solvers) + 2 * system

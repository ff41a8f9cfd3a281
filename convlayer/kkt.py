"""The symmetric linear system of the residual map's Jacobian: factored once, solved for polish and adjoint alike.

With DPi_K*(v) = U diag(d) U', the Jacobian of F reduces to

    K = [ P          B'      ]        B = sqrt(d) U'A,  restricted to rows with d > 0
        [ B   -(1 - d)       ]

Rows with d = 0 (inactive) leave the system, rows with d = 1 are equalities. `solve(a, c)` returns (w, e) with
K (w, eta) = (a, sqrt(d) c) and e = sqrt(d) eta, both in U's coordinates: what Newton and the adjoint need of it.

What is factored is K + delta diag(1, -1), which is quasidefinite and so never singular; iterative refinement against K removes
the shift again. Where K itself is singular, its null space is found by inverse iteration with that factor, and the solution is the
least-norm least-squares one. Such a row is flagged, unless the null space touches nothing that the user sees or moves (`Visible`):
canonical auxiliaries that are free, or constraints that are redundant whatever the parameters, do no harm.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import qdldl
import scipy.sparse as sp
import torch
from torch import Tensor

from convlayer.cones import ProductSpectrum
from convlayer.program import Data, Operators

SHIFT = 1e-11  # delta, relative to the equilibrated matrix
SUSPECT = 1e-9  # a pivot below this may be the sign of a null vector
NULL = 1e-12  # |K z| below this share of |z| (times the size) makes z one
REFINEMENTS = 6
CERTIFIED = 1e-10  # relative residual that a solve must reach, or the row is flagged
DENSE_SIZE = 160  # at most this many unknowns: dense always; more: dense only if a good part of K is nonzero
DENSE_SHARE = 0.15


class Visible(NamedTuple):
    """The entries of x and rows of A where a null vector of K would make an output or a gradient ambiguous."""

    x: Tensor  # (n,) bool
    y: Tensor  # (m,) bool


def factorise(operators: Operators, spectrum: ProductSpectrum, visible: Visible, units: Tensor | None) -> DenseSystem | SparseSystem:
    """The system at one point, by dense or sparse factorisation, whichever is expected to be cheaper."""
    program = operators.data.program
    active = int((spectrum.values > 0).sum(-1).max()) if spectrum.values.numel() else 0
    size = program.n + active
    share = (2 * program.nnz + program.n + active) / max(size, 1) ** 2
    if operators.dense and (size <= DENSE_SIZE or share > DENSE_SHARE):
        return DenseSystem(operators, spectrum, visible, units, active)
    return SparseSystem(operators.data, spectrum, visible, units)


class DenseSystem:
    """Batched LU of the equilibrated matrix."""

    def __init__(self, operators: Operators, spectrum: ProductSpectrum, visible: Visible, units: Tensor | None, active: int):
        A = operators.A_dense
        batch, m, n = len(spectrum.values), A.shape[1], A.shape[2]
        d = spectrum.values
        A = spectrum.to_basis(A.expand(batch, -1, -1), columns=True) if not spectrum.is_diagonal else A.expand(batch, -1, -1)
        self.n, self.m, self.spectrum = n, m, spectrum
        # The rows with d > 0, gathered to the front; a batch row with fewer is padded by rows with d = 0, which are decoupled.
        self.active = None if active == m else torch.topk((d > 0).to(torch.uint8), active, dim=1, sorted=True).indices
        if self.active is not None:
            d = d.gather(1, self.active)
            A = A.gather(1, self.active.unsqueeze(-1).expand(-1, -1, n))
        self.root = d.clamp(min=0).sqrt()
        B = A * self.root.unsqueeze(-1)
        size = n + active
        P = operators.P_dense
        B_size = B.abs()
        upper, lower = P.abs().amax(2).expand(batch, -1), 1 - d
        if active:
            upper, lower = torch.maximum(upper, B_size.amax(1)), torch.maximum(lower, B_size.amax(2))
        largest = torch.cat([upper, lower], 1)
        self.scale = torch.where(largest > 0, largest.rsqrt(), 1.0)
        primal, dual = self.scale[:, :n], self.scale[:, n:]
        B = B * dual.unsqueeze(2) * primal.unsqueeze(1)
        # K is kept with the shift on its diagonal; `_product` takes it off again.
        self.shift = torch.cat([P.new_full((n,), SHIFT), P.new_full((active,), -SHIFT)])
        K = P.new_zeros(batch, size, size)
        K[:, :n, :n] = P * primal.unsqueeze(1) * primal.unsqueeze(2)
        K[:, n:, :n] = B
        K[:, :n, n:] = B.mT
        K.diagonal(dim1=1, dim2=2)[:, n:] = (d - 1) * dual.square()
        K.diagonal(dim1=1, dim2=2).add_(self.shift)
        self.K = K
        self.lu, self.pivots, _ = torch.linalg.lu_factor_ex(K)
        self.singular = torch.zeros(batch, dtype=torch.bool)
        pivots = self.lu.diagonal(dim1=1, dim2=2).abs()
        self.suspects = torch.nonzero(pivots.amin(1) <= SUSPECT).flatten() if size else torch.zeros(0, dtype=torch.int64)
        if len(self.suspects):
            self._find_null_space(visible, units)

    def solve(self, a: Tensor, c: Tensor, *, refine: bool = True) -> tuple[Tensor, Tensor]:
        """a (B, n), c (B, m) -> w (B, n), e (B, m); without `refine` to the accuracy of the shifted factor, for Newton."""
        c_active = c if self.active is None else c.gather(1, self.active)
        right = self._off_null(torch.cat([a, self.root * c_active], 1), -1)
        scaled = (right * self.scale).unsqueeze(-1)
        solution = torch.linalg.lu_solve(self.lu, self.pivots, scaled)
        if refine and scaled.numel():
            solution = self._refined(scaled, solution)
        solution = self._off_null(solution.squeeze(-1) * self.scale, 1)
        w, eta = solution[:, :self.n], solution[:, self.n:] * self.root
        if self.active is not None:
            eta = c.new_zeros(len(c), self.m).scatter_(1, self.active, eta)
        return w, eta

    def _refined(self, right: Tensor, solution: Tensor) -> Tensor:
        """Iterative refinement against K itself; a row that stays inaccurate is flagged."""
        goal = right.abs().amax(1, keepdim=True)
        error = right - self._product(solution)
        for _ in range(REFINEMENTS):
            trial = solution + torch.linalg.lu_solve(self.lu, self.pivots, error)
            trial_error = right - self._product(trial)
            before, after = error.abs().amax(1, keepdim=True), trial_error.abs().amax(1, keepdim=True)
            better = after < before
            solution, error = torch.where(better, trial, solution), torch.where(better, trial_error, error)
            if not bool((better & (after < 0.5 * before) & (after > 1e-15 * goal)).any()):
                break
        self.singular |= (error.abs().amax(1, keepdim=True) > CERTIFIED * goal).flatten()
        return solution

    def _product(self, x: Tensor) -> Tensor:
        """K x for x (B, size, k), or of some rows' matrix."""
        return self.K @ x - self.shift.unsqueeze(-1) * x

    def _find_null_space(self, visible: Visible, units: Tensor | None) -> None:
        """Null vectors of the matrix in x's own units, for the rows with a small pivot."""
        rows = self.suspects
        size, width = self.K.shape[1], 4
        while True:
            width = min(width, size)
            vectors = self._null_vectors(rows, width)
            if width == size or not bool((vectors.abs().amax(1) > 0).all(1).any()):
                break
            width *= 4
        self.units = self.scale.new_ones(len(rows), size)
        if units is not None:
            self.units[:, :self.n] = units.expand(len(self.scale), -1)[rows]
        null = (self.units * self.scale[rows]).unsqueeze(-1) * vectors
        gram = null.mT @ null
        empty = gram.diagonal(dim1=1, dim2=2) == 0
        gram.diagonal(dim1=1, dim2=2).add_(empty.to(gram.dtype))
        self.null, self.gram = null, torch.linalg.cholesky(gram)
        unit = null / null.norm(dim=1, keepdim=True).clamp(min=1e-300)
        dual = unit[:, self.n:] * self.root[rows].unsqueeze(-1)
        if self.active is not None:
            place = self.active[rows].unsqueeze(-1).expand_as(dual)
            dual = dual.new_zeros(len(rows), self.m, dual.shape[2]).scatter_(1, place, dual)
        dual = self.spectrum.index_select(rows).from_basis(dual, columns=True)
        self.singular[rows] = _harmful(unit[:, :self.n], dual, visible)

    def _null_vectors(self, rows: Tensor, width: int) -> Tensor:
        """Orthonormal null vectors of K among `width` Ritz vectors of inverse iteration, (rows, size, width); other columns are zero."""
        K, lu, pivots = self.K[rows], self.lu[rows], self.pivots[rows]
        size = K.shape[1]
        basis = torch.randn(size, width, dtype=K.dtype, generator=torch.Generator().manual_seed(0)).expand(len(K), -1, -1)
        for _ in range(2):
            basis, _ = torch.linalg.qr(torch.linalg.lu_solve(lu, pivots, basis))
        image = K @ basis - self.shift.unsqueeze(-1) * basis
        values, mixing = torch.linalg.eigh(image.mT @ image)
        zero = values.clamp(min=0).sqrt() <= NULL * size ** 0.5
        return torch.where(zero.unsqueeze(1), basis @ mixing, 0.0)

    def _off_null(self, vector: Tensor, power: int) -> Tensor:
        """The part of (B, size) orthogonal to the null spaces found, in x's own units: a solution is in units^1, a right-hand side in units^-1."""
        if not len(self.suspects):
            return vector
        units = self.units ** power
        part = vector[self.suspects] * units
        coordinates = torch.cholesky_solve(self.null.mT @ part.unsqueeze(-1), self.gram)
        return vector.index_copy(0, self.suspects, (part - (self.null @ coordinates).squeeze(-1)) / units)


def _harmful(primal: Tensor, dual: Tensor, visible: Visible) -> Tensor:
    """(rows,) whether unit null vectors, (rows, n, k) and (rows, m, k), touch what the user sees or moves."""
    touched = torch.cat([primal[:, visible.x].flatten(1), dual[:, visible.y].flatten(1), primal.new_zeros(len(primal), 1)], 1)
    return touched.abs().amax(1) > 1e-7


class SparseSystem:
    """One sparse LDL' a row, regularised and refined."""

    def __init__(self, data: Data, spectrum: ProductSpectrum, visible: Visible, units: Tensor | None):
        self.n, self.m = data.program.n, data.program.m
        self.rows = [_SparseRow(data, spectrum, visible, None if units is None else units[row % len(units)].numpy(), row) for row in range(len(spectrum.values))]

    @property
    def singular(self) -> Tensor:
        return torch.tensor([row.singular for row in self.rows], dtype=torch.bool)

    def solve(self, a: Tensor, c: Tensor, *, refine: bool = True) -> tuple[Tensor, Tensor]:
        """a (B, n), c (B, m) -> w (B, n), e (B, m); always refined."""
        w, e = np.empty((len(a), self.n)), np.zeros((len(a), self.m))
        for k, row in enumerate(self.rows):
            w[k], e[k, row.active] = row.solve(a[k].numpy(), c[k].numpy())
        return torch.from_numpy(w), torch.from_numpy(e)


class _SparseRow:
    def __init__(self, data: Data, spectrum: ProductSpectrum, visible: Visible, units: np.ndarray | None, row: int):
        program = data.program
        n, m = program.n, program.m
        d = spectrum.values[row].numpy()
        P = sp.csc_array((data.P[row % len(data.P)].numpy(), program.P_rows, program.P_indptr), shape=(n, n))
        order, columns, indptr = program.A_by_row
        A = sp.csr_array((data.A[row % len(data.A)].numpy()[order], columns, indptr), shape=(m, n))
        basis = None if spectrum.is_diagonal else _basis(spectrum, row, m)
        if basis is not None:
            A = sp.csr_array(basis.T @ A)
        self.n, self.m = n, m
        self.active = np.flatnonzero(d > 0)
        self.root = np.sqrt(d[self.active])
        B = sp.diags_array(self.root) @ A[self.active]
        corner = sp.diags_array(d[self.active] - 1)
        upper = sp.csr_array(sp.block_array([[P, B.T], [None, corner]], format="csr")) if len(self.active) else sp.csr_array(P)
        K = sp.csr_array(upper + sp.triu(upper, 1).T)
        largest = abs(K).max(axis=1).toarray().ravel()
        self.scale = 1 / np.sqrt(np.where(largest > 0, largest, 1.0))
        scale = sp.diags_array(self.scale)
        self.K = sp.csr_array(scale @ K @ scale)
        # A larger shift than in the dense case: there is no pivoting here, and refinement is cheap.
        shift = 100 * SHIFT * np.concatenate([np.ones(n), -np.ones(len(self.active))])
        self.factor = qdldl.Solver(sp.csc_matrix(sp.triu(self.K) + sp.diags_array(shift)), upper=True)
        self.units = np.concatenate([np.ones(n) if units is None else units, np.ones(len(self.active))])
        self.null: np.ndarray | None = None
        self.singular = False
        if np.abs(self.factor.factors()[1]).min(initial=1.0) <= 100 * SUSPECT:
            self._find_null_space(visible, basis)

    def solve(self, a: np.ndarray, c: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        right = self._off_null(np.concatenate([a, self.root * c[self.active]]) / self.units) * self.units
        scaled = right * self.scale
        size = np.abs(scaled).max(initial=0.0)
        solution, error = np.zeros_like(scaled), scaled
        for _ in range(5 * REFINEMENTS):
            if np.abs(error).max(initial=0.0) <= 1e-15 * size:
                break
            trial = solution + self.factor.solve(error)
            trial_error = scaled - self.K @ trial
            if not np.abs(trial_error).max() < 0.9 * np.abs(error).max():
                break
            solution, error = trial, trial_error
        if np.abs(error).max(initial=0.0) > CERTIFIED * size:
            self.singular = True
        solution = self._off_null(solution * self.scale * self.units) / self.units
        return solution[:self.n], solution[self.n:] * self.root

    def _find_null_space(self, visible: Visible, rotation: sp.csr_array | None) -> None:
        size = self.K.shape[0]
        start = np.random.default_rng(0)
        width = 4
        while True:
            width = min(width, size)
            basis = start.standard_normal((size, width))
            for _ in range(3):
                basis, _ = np.linalg.qr(np.column_stack([self.factor.solve(column) for column in basis.T]))
            image = self.K @ basis
            values, mixing = np.linalg.eigh(image.T @ image)
            zero = np.sqrt(np.maximum(values, 0)) <= 100 * NULL * size ** 0.5
            if width == size or not zero.all() or width >= 256:
                break
            width *= 4
        if zero.any():
            self.null, _ = np.linalg.qr((self.units * self.scale)[:, None] * (basis @ mixing[:, zero]))
            dual = np.zeros((self.m, self.null.shape[1]))
            dual[self.active] = self.root[:, None] * self.null[self.n:]
            dual = dual if rotation is None else rotation @ dual
            self.singular = bool(_harmful(torch.from_numpy(self.null[None, :self.n]), torch.from_numpy(dual[None]), visible)[0])

    def _off_null(self, right: np.ndarray) -> np.ndarray:
        return right if self.null is None else right - self.null @ (self.null.T @ right)


def _basis(spectrum: ProductSpectrum, row: int, m: int) -> sp.csr_array:
    """The block-diagonal orthogonal matrix U of one row, sparse."""
    i, j, values, covered = [], [], [], np.zeros(m, dtype=bool)
    for index, basis in spectrum.bases:
        count, k = basis.shape[-3], basis.shape[-1]
        positions = np.arange(m)[index] if isinstance(index, slice) else index.numpy()
        positions = positions.reshape(count, k)
        i.append(np.repeat(positions, k, axis=1).ravel())
        j.append(np.tile(positions, (1, k)).ravel())
        values.append(basis[row].numpy().reshape(-1))
        covered[positions.ravel()] = True
    rest = np.flatnonzero(~covered)
    i.append(rest), j.append(rest), values.append(np.ones(len(rest)))
    return sp.csr_array((np.concatenate(values), (np.concatenate(i), np.concatenate(j))), shape=(m, m))

"""The symmetric linear system of the residual map's Jacobian: factored once, solved for polish and adjoint alike.

With DPi_K*(v) = U diag(d) U', the Jacobian of F reduces to

    K = [ P          B'      ]        B = sqrt(d) U'A,  restricted to rows with d > 0
        [ B   -(1 - d)       ]

Rows with d = 0 (inactive) leave the system, rows with d = 1 are equalities. `solve(a, c)` returns (w, e) with
K (w, eta) = (a, sqrt(d) c) and e = sqrt(d) eta, both in U's coordinates: what Newton and the adjoint need of it.

A numerically singular K gets the least-norm least-squares solution, and is flagged.
"""

from __future__ import annotations

import numpy as np
import qdldl
import scipy.sparse as sp
import torch
from torch import Tensor

from convlayer.cones import ProductSpectrum
from convlayer.program import Data, Operators

SUSPECT = 1e-9  # a smallest pivot below this share of the largest is examined by an eigenvalue decomposition
RANK = 1e-12  # eigenvalues below this share of the largest count as zero
REGULARISATION = 1e-9  # static, sparse factorisation only; refinement works against the unregularised matrix
DENSE_SIZE = 160  # at most this many unknowns: dense always; more: dense only if a good part of K is nonzero
DENSE_SHARE = 0.15


def factorise(operators: Operators, spectrum: ProductSpectrum) -> DenseSystem | SparseSystem:
    """The system at one point, by dense or sparse factorisation, whichever is expected to be cheaper."""
    program = operators.data.program
    active = int((spectrum.values > 0).sum(-1).max()) if spectrum.values.numel() else 0
    size = program.n + active
    share = (2 * program.nnz + program.n + active) / max(size, 1) ** 2
    if operators.dense and (size <= DENSE_SIZE or share > DENSE_SHARE):
        return DenseSystem(operators, spectrum, active)
    return SparseSystem(operators.data, spectrum)


class DenseSystem:
    """Batched LU of the equilibrated matrix."""

    def __init__(self, operators: Operators, spectrum: ProductSpectrum, active: int):
        A = operators.A_dense
        batch, m, n = len(spectrum.values), A.shape[1], A.shape[2]
        d = spectrum.values
        A = spectrum.to_basis(A.expand(batch, -1, -1), columns=True) if not spectrum.is_diagonal else A.expand(batch, -1, -1)
        self.n, self.m = n, m
        # The rows with d > 0, gathered to the front; a batch row with fewer is padded by rows with d = 0, which are decoupled.
        self.active = None if active == m else torch.topk((d > 0).to(torch.uint8), active, dim=1, sorted=True).indices
        if self.active is not None:
            d = d.gather(1, self.active)
            A = A.gather(1, self.active.unsqueeze(-1).expand(-1, -1, n))
        self.root = d.clamp(min=0).sqrt()
        B = A * self.root.unsqueeze(-1)
        size = n + active
        K = A.new_zeros(batch, size, size)
        K[:, :n, :n] = operators.P_dense
        K[:, n:, :n] = B
        K[:, :n, n:] = B.mT
        K[:, n:, n:].diagonal(dim1=1, dim2=2).copy_(d - 1)
        largest = K.abs().amax(2) if size else K.new_zeros(batch, 0)
        self.scale = torch.where(largest > 0, largest.rsqrt(), 1.0)
        self.K = K.mul_(self.scale.unsqueeze(1)).mul_(self.scale.unsqueeze(2))
        self.lu, self.pivots, _ = torch.linalg.lu_factor_ex(self.K)
        pivots = self.lu.diagonal(dim1=1, dim2=2).abs()
        suspect = pivots.amin(1) <= SUSPECT * pivots.amax(1) if size else torch.zeros(batch, dtype=torch.bool)
        self.singular = torch.zeros(batch, dtype=torch.bool)
        self.inverse: dict[int, Tensor] = {}
        for row in torch.nonzero(suspect).flatten().tolist():
            inverse, rank_deficient = _pseudoinverse(self.K[row], self.scale[row])
            self.singular[row] = rank_deficient
            self.inverse[row] = inverse

    def solve(self, a: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """a (B, n), c (B, m) -> w (B, n), e (B, m)."""
        c_active = c if self.active is None else c.gather(1, self.active)
        right = torch.cat([a, self.root * c_active], 1)
        scaled = (right * self.scale).unsqueeze(-1)
        solution = torch.linalg.lu_solve(self.lu, self.pivots, scaled)
        solution = solution + torch.linalg.lu_solve(self.lu, self.pivots, scaled - self.K @ solution)
        solution = solution.squeeze(-1) * self.scale
        for row, inverse in self.inverse.items():
            solution[row] = inverse @ right[row]
        w, eta = solution[:, :self.n], solution[:, self.n:] * self.root
        if self.active is not None:
            eta = c.new_zeros(len(c), self.m).scatter_(1, self.active, eta)
        return w, eta


def _pseudoinverse(K: Tensor, scale: Tensor) -> tuple[Tensor, bool]:
    """Least-norm least-squares inverse of the unscaled matrix S^-1 K S^-1, S = diag(scale): (matrix, whether it is singular)."""
    values, vectors = torch.linalg.eigh(K)
    zero = values.abs() <= RANK * len(values) * values.abs().max()
    inverse = torch.where(zero, 0.0, 1 / torch.where(zero, 1.0, values))
    inverse = scale.unsqueeze(1) * ((vectors * inverse) @ vectors.mT) * scale
    if bool(zero.any()):
        # The null space of the unscaled matrix is S times that of K.
        null, _ = torch.linalg.qr(scale.unsqueeze(1) * vectors[:, zero])
        inverse = inverse - null @ (null.mT @ inverse)
        inverse = inverse - (inverse @ null) @ null.mT
    return inverse, bool(zero.any())


class SparseSystem:
    """One sparse LDL' a row, regularised and refined."""

    def __init__(self, data: Data, spectrum: ProductSpectrum):
        batch = len(spectrum.values)
        self.n, self.m = data.program.n, data.program.m
        self.spectrum = spectrum
        self.rows = [_SparseRow(data, spectrum, row) for row in range(batch)]
        self.singular = torch.tensor([row.singular for row in self.rows], dtype=torch.bool)

    def solve(self, a: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """a (B, n), c (B, m) -> w (B, n), e (B, m)."""
        w, e = np.empty((len(a), self.n)), np.zeros((len(a), self.m))
        for k, row in enumerate(self.rows):
            w[k], e[k, row.active] = row.solve(a[k].numpy(), c[k].numpy())
        self.singular = torch.tensor([row.singular for row in self.rows], dtype=torch.bool)
        return torch.from_numpy(w), torch.from_numpy(e)


class _SparseRow:
    def __init__(self, data: Data, spectrum: ProductSpectrum, row: int):
        program = data.program
        n, m = program.n, program.m
        d = spectrum.values[row].numpy()
        P = sp.csc_array((data.P[row % len(data.P)].numpy(), program.P_rows, program.P_indptr), shape=(n, n))
        order, columns, indptr = program.A_by_row
        A = sp.csr_array((data.A[row % len(data.A)].numpy()[order], columns, indptr), shape=(m, n))
        if not spectrum.is_diagonal:
            A = sp.csr_array(_basis(spectrum, row, m).T @ A)
        self.active = np.flatnonzero(d > 0)
        self.root = np.sqrt(d[self.active])
        B = sp.diags_array(self.root) @ A[self.active]
        corner = sp.diags_array(d[self.active] - 1)
        upper = sp.csc_array(sp.block_array([[P + sp.csc_array((n, n)), B.T], [None, corner]], format="csc")) if n + len(self.active) else None
        self.n = n
        full = upper + sp.triu(upper, 1).T
        largest = abs(full).max(axis=1).toarray().ravel()
        self.scale = np.where(largest > 0, 1 / np.sqrt(np.where(largest > 0, largest, 1.0)), 1.0)
        scale = sp.diags_array(self.scale)
        self.K = sp.csr_array(scale @ full @ scale)
        shift = np.concatenate([np.full(n, REGULARISATION), np.full(len(self.active), -REGULARISATION)])
        self.factor = qdldl.Solver(sp.csc_matrix(sp.triu(self.K) + sp.diags_array(shift)), upper=True)
        self.singular = bool(np.abs(self.factor.factors()[1]).min() < 100 * REGULARISATION)
        self.inverse: np.ndarray | None = None

    def solve(self, a: np.ndarray, c: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        right = np.concatenate([a, self.root * c[self.active]])
        scaled = right * self.scale
        size = np.abs(scaled).max() if len(scaled) else 0.0
        solution, error = np.zeros_like(scaled), scaled
        for _ in range(20):
            if np.abs(error).max(initial=0.0) <= 1e-14 * size:
                break
            trial = solution + self.factor.solve(error)
            trial_error = scaled - self.K @ trial
            if not np.abs(trial_error).max() < 0.9 * np.abs(error).max():
                break
            solution, error = trial, trial_error
        solution = solution * self.scale
        if np.abs(error).max(initial=0.0) > 1e-9 * size:
            self.singular = True
            solution = _least_norm(self.K, self.scale, right)
        return solution[:self.n], solution[self.n:] * self.root


def _least_norm(K: sp.csr_array, scale: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Least-norm least-squares solution where regularised refinement does not converge: by eigenvalues, or LSMR when large."""
    if K.shape[0] <= 3000:
        inverse, _ = _pseudoinverse(torch.from_numpy(K.toarray()), torch.from_numpy(scale))
        return inverse.numpy() @ right
    return scale * sp.linalg.lsmr(K, right * scale, atol=1e-14, btol=1e-14, conlim=1e14, maxiter=20 * K.shape[0])[0]


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

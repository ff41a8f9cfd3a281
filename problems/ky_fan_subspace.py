"""Leading eigenspace, as a semidefinite program."""

import cvxpy as cp
import numpy as np

from ._prebuilt import DeclaredProblem, prebuilt


@prebuilt()
def ky_fan_subspace(n: int = 5, k: int = 2) -> DeclaredProblem:
    """The projector on the eigenspace of the k largest eigenvalues; their sum is Ky Fan's.

        maximise    <X, Z>
        subject to  0 <= Z <= I as symmetric matrices,  tr(Z) = k

    Solution:    Z = U_k U_k', U_k the first k columns of the eigenvectors U, for eigenvalues l_1 >=
                 ... >= l_n of X.
    Derivative:  dZ = U (K o (U'dX U)) U'  with  K_ij = 1 / |l_i - l_j| where one of i and j is at most k; 0 elsewhere.
    Shapes:      X (*batch, n, n) symmetric  ->  Z (*batch, n, n).
    Cost:        one symmetric eigendecomposition, about 9 n^3 flops; its factors serve the backward
                 pass.
    At a kink:   where l_k = l_{k+1}, Z is not unique; other ties are harmless.
    Source:      Fan (1949); Overton and Womersley (1992).
    """
    X, Z = cp.Parameter((n, n), symmetric=True, name="X"), cp.Variable((n, n), PSD=True, name="Z")
    return cp.Problem(cp.Maximize(cp.trace(X @ Z)), [cp.trace(Z) == k, Z << np.eye(n)]), [X], [Z]


@ky_fan_subspace.sampled_by
def _sample(draw, n, k):
    W = draw.normal(n, n)
    return (W + W.mT,)


@ky_fan_subspace.solved_by
def _oracle(X, *, k):
    U = np.linalg.eigh(X)[1][:, -k:]
    return U @ U.T

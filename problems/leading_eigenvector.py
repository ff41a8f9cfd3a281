"""Leading eigenvector, as a semidefinite program."""

import cvxpy as cp
import numpy as np

from ._prebuilt import DeclaredProblem, prebuilt


@prebuilt()
def leading_eigenvector(n: int = 4) -> DeclaredProblem:
    """The projector on the leading eigenvector.

        maximise    <X, Z>
        subject to  Z positive semidefinite,  tr(Z) = 1

    Solution:    Z = v v', v the unit eigenvector of the largest eigenvalue, l, of X; the value is
                 l.
    Derivative:  dZ = dv v' + v dv'  with  dv = pinv(l I - X) dX v.
    Shapes:      X (*batch, n, n) symmetric  ->  Z (*batch, n, n).
    Cost:        one symmetric eigendecomposition, about 9 n^3 flops; its factors serve the backward
                 pass.
    At a kink:   where the largest eigenvalue is multiple, Z is not unique.
    Source:      Overton and Womersley (1992).
    """
    X, Z = cp.Parameter((n, n), symmetric=True, name="X"), cp.Variable((n, n), PSD=True, name="Z")
    return cp.Problem(cp.Maximize(cp.trace(X @ Z)), [cp.trace(Z) == 1]), [X], [Z]


@leading_eigenvector.sampled_by
def _sample(draw, n):
    W = draw.normal(n, n)
    return (W + W.mT,)


@leading_eigenvector.solved_by
def _oracle(X):
    v = np.linalg.eigh(X)[1][:, -1]
    return np.outer(v, v)

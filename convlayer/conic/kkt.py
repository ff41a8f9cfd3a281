"""The symmetric linear system of the residual map's Jacobian: factored once, solved for polish and
adjoint alike.

With DPi_K*(v) = U diag(d) U', the Jacobian of F reduces to

    K = [ P          B'      ]        B = sqrt(d) U'A,  restricted to rows with d > 0
        [ B   -(1 - d)       ]

Rows with d = 0 (inactive) leave the system, rows with d = 1 are equalities. `solve(a, c)` returns
(w, e) with K (w, eta) = (a, sqrt(d) c) and e = sqrt(d) eta, both in U's coordinates: what Newton
and the adjoint need of it.

What is factored is K + delta J with J = diag(1, -1), which is quasidefinite and so never singular;
iterative refinement against K removes the shift again. Where K itself is singular, a right-hand
side is taken out of the null space, and so is the solution. That needs no basis: K (x, y) = 0
means Px = 0, Bx = 0, B'y = 0 and (1 - d) y = 0, so that the null space is one of x beside one of
y, and delta (K + delta J)^-1 J is one on it and shrinks all else. Whether a null vector touches
something that the user sees or moves (`Visible`) two random vectors taken into the null space tell
with probability one: canonical auxiliaries that are free, or constraints that are redundant
whatever the parameters, do no harm. Any other such row is flagged, and its derivative is the
least-norm least-squares one in the user's units: for that alone a basis is found, by inverse
iteration, when it is asked for.

    kkt_base      null vectors, and when a solve is good
    kkt_dense     batched LU of the active rows
    kkt_sparse    LDL' of each row of the batch, all rows of A in it
"""

from __future__ import annotations

from torch import Tensor

from convlayer.cones import ProductSpectrum
from convlayer.conic.kkt_base import KKTSystem, Visible
from convlayer.conic.kkt_dense import DenseSystem
from convlayer.conic.kkt_sparse import SparseSystem
from convlayer.conic.program import Operators

__all__ = ["DenseSystem", "KKTSystem", "SparseSystem", "Visible", "factorise"]


def factorise(
    operators: Operators, spectrum: ProductSpectrum, visible: Visible, units: Tensor | None
) -> DenseSystem | SparseSystem:
    """The system at one point, dense or sparse as the operators are."""
    if operators.dense:
        return DenseSystem(operators, spectrum, visible, units)
    return SparseSystem(operators.data, spectrum, visible, units)

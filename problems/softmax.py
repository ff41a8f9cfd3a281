"""Softmax."""

import cvxpy as cp
import torch

from ._prebuilt import DeclaredProblem, prebuilt


@prebuilt()
def softmax(n: int = 4) -> DeclaredProblem:
    """Softmax, as the choice that trades score for entropy.

        maximise    y'x - sum_i x_i log x_i
        subject to  1'x = 1

    Solution:    x_i = exp(y_i) / sum_j exp(y_j).
    Derivative:  dx = (diag(x) - x x') dy.
    Shapes:      y (*batch, n)  ->  x (*batch, n).
    Cost:        a few passes over y.
    At a kink:   none.
    Source:      Gibbs's variational principle; Boyd and Vandenberghe (2004), section 3.3.
    """
    y, x = cp.Parameter(n, name="y"), cp.Variable(n, name="x")
    return cp.Problem(cp.Maximize(y @ x + cp.sum(cp.entr(x))), [cp.sum(x) == 1]), [y], [x]


@softmax.sampled_by
def _sample(draw, n):
    return (draw.normal(n),)


@softmax.solved_by
def _oracle(y):
    return torch.from_numpy(y).softmax(-1).numpy()

"""Cobb-Douglas demand."""

import cvxpy as cp
import numpy as np

from ._prebuilt import DeclaredProblem, prebuilt

SHARES = np.array([0.3, 0.7])


@prebuilt()
def cobb_douglas() -> DeclaredProblem:
    """Demand of a consumer with Cobb-Douglas utility, a program of the power cone.

        maximise    x_1^0.3 x_2^0.7
        subject to  p'x <= w

    Solution:    x = a w / p  with  a = (0.3, 0.7): a fixed share of the wealth is spent on each good.
    Derivative:  dx = a (dw / p - w dp / p^2).
    Shapes:      p (*batch, 2) prices, positive, w (*batch,) wealth, positive, in the same money  ->  x (*batch, 2).
    Cost:        an interior point method on one power cone, some 10 factorisations of a 5 by 5
                 matrix.
    At a kink:   none for positive prices and wealth.
    Source:      Cobb and Douglas (1928); Mas-Colell, Whinston and Green (1995), section 3.D.
    """
    p, w = cp.Parameter(2, pos=True, name="p"), cp.Parameter(pos=True, name="w")
    x, utility = cp.Variable(2, name="x"), cp.Variable(name="utility")
    constraints = [cp.PowCone3D(x[0], x[1], utility, SHARES[0]), p @ x <= w]
    return cp.Problem(cp.Maximize(utility), constraints), [p, w], [x]


@cobb_douglas.sampled_by
def _sample(draw):
    return draw.uniform(0.5, 2.0, 2), draw.uniform(1.0, 3.0)


@cobb_douglas.solved_by
def _oracle(p, w):
    return SHARES * w / p

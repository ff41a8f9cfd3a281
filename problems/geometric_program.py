"""The largest box, a geometric program."""

import cvxpy as cp
import numpy as np

from ._prebuilt import DeclaredProblem, prebuilt


@prebuilt(gp=True)
def geometric_program() -> DeclaredProblem:
    """The box of greatest volume, a geometric program.

        maximise    h w d
        subject to  2 h (w + d) <= wall,  w d <= floor,  d >= ratio w

    Solution:    for ratio >= 1:  w = sqrt(floor / ratio),  d = ratio w,  h = wall / (2 (w + d)).
    Derivative:  by logarithms:  dw/w = (dfloor/floor - dratio/ratio) / 2,  dd/d = (dfloor/floor + dratio/ratio) / 2,
                 dh/h = dwall/wall - (dw + dd) / (w + d).
    Shapes:      wall, floor (*batch,) areas, ratio (*batch,) pure, all positive  ->  h, w, d (*batch,) lengths.
    Cost:        an interior point method on a few exponential cones, some 10 factorisations of a
                 20-row matrix.
    At a kink:   at ratio = 1, below which the floor is a square, the derivative is one-sided and
                 the row is flagged.
    Source:      Boyd, Kim, Vandenberghe and Hassibi (2007), section 2.
    """
    wall, floor, ratio = (cp.Parameter(pos=True, name=name) for name in ("wall", "floor", "ratio"))
    h, w, d = (cp.Variable(pos=True, name=name) for name in ("h", "w", "d"))
    constraints = [2 * h * (w + d) <= wall, w * d <= floor, d >= ratio * w]
    return cp.Problem(cp.Maximize(h * w * d), constraints), [wall, floor, ratio], [h, w, d]


@geometric_program.sampled_by
def _sample(draw):
    return draw.uniform(5.0, 10.0), draw.uniform(1.0, 4.0), draw.uniform(1.2, 2.0)


@geometric_program.solved_by
def _oracle(wall, floor, ratio):
    w = np.sqrt(floor / ratio)
    d = ratio * w
    return wall / (2 * (w + d)), w, d

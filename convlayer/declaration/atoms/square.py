"""Squares: sum_i w_i z_i^2."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from convlayer.declaration.affine import Table
from convlayer.declaration.atoms.atom import Elementwise, Terms, along_axis, number_of
from convlayer.declaration.cvxpy_internals import (
    CvxpyAbsolute,
    NegExpression,
    Pnorm,
    Power,
    norm1,
    quad_over_lin,
)


class Square(Elementwise):
    """f(z) = z^2; spelt square(z), sum_squares(z), quad_over_lin(z, number), norm(z) ** 2."""

    name = "square"
    words = "squares"

    def recognises(self, expression: Any) -> bool:
        if isinstance(expression, Power):
            return number_of(expression.p) == 2
        return isinstance(expression, quad_over_lin) and bool(number_of(expression.args[1]))

    def read(self, expression: Any, weight: Table, terms: Terms) -> None:
        z = expression.args[0]
        if isinstance(expression, quad_over_lin):
            divisor = np.asarray(expression.args[1].value, dtype=float).item()
            weight = along_axis(weight, expression).scaled(1.0 / divisor)
        # Under a square a sign and an absolute value say nothing, and a Euclidean norm is a sum of
        # squares.
        while True:
            if isinstance(z, (CvxpyAbsolute, NegExpression)) or _is_absolute(z):
                z = z.args[0]
            elif isinstance(z, Pnorm) and z.p == 2:
                weight, z = along_axis(weight, z), z.args[0]
            else:
                break
        terms.keep(Square, weight, terms.reader.table(z))

    def of(self, argument: Tensor) -> Tensor:
        return argument.square()


def _is_absolute(z: Any) -> bool:
    """The 1-norm of one number."""
    return isinstance(z, norm1) and z.args[0].size == 1

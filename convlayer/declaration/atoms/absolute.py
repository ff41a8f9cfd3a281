"""Absolute values: sum_i w_i |z_i|."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from convlayer.declaration.affine import Table
from convlayer.declaration.atoms.atom import Elementwise, Terms, along_axis
from convlayer.declaration.cvxpy_internals import CvxpyAbsolute, Pnorm, norm1


class Absolute(Elementwise):
    """f(z) = |z|; spelt abs(z), norm1(z), pnorm(z, 1)."""

    name = "absolute"
    words = "absolute values"

    def recognises(self, expression: Any) -> bool:
        return isinstance(expression, CvxpyAbsolute) or _is_norm(expression)

    def read(self, expression: Any, weight: Table, terms: Terms) -> None:
        (z,) = expression.args
        if _is_norm(expression):
            weight = along_axis(weight, expression)
        terms.keep(Absolute, weight, terms.reader.table(z))

    def of(self, argument: Tensor) -> Tensor:
        return argument.abs()


def _is_norm(expression: Any) -> bool:
    return isinstance(expression, norm1) or (isinstance(expression, Pnorm) and expression.p == 1)

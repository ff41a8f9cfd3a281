"""Quadratic forms: 1/2 z'P z, each of its own matrix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from torch import Tensor

from convlayer.declaration.affine import NONE, Table, composed
from convlayer.declaration.atoms.atom import NormalAtom, Terms, Weighted
from convlayer.declaration.atoms.square import Square
from convlayer.declaration.cvxpy_internals import QuadForm


class QuadraticForm(NormalAtom):
    """f(z) = 1/2 z'P z; the weight of a term is P, whose rows are its entries, column-major."""

    name = "quadratic_form"
    words = "a quadratic form"

    def recognises(self, expression: Any) -> bool:
        return isinstance(expression, QuadForm)

    def read(self, expression: Any, weight: Table, terms: Terms) -> None:
        """weight z'P z: squares where P is a diagonal of numbers."""
        argument, matrix = (terms.reader.table(part) for part in expression.args)
        matrix, size = matrix.normal, argument.size
        scaled = replace(matrix, variable=np.zeros(len(matrix.row), dtype=np.int64))
        diagonal = (matrix.row % size == matrix.row // size).all()
        if diagonal and (matrix.parameter == NONE).all():
            entries = composed(scaled, weight)
            weights = replace(entries, size=size, row=entries.row % size)
            terms.keep(Square, weights, argument)
        else:
            terms.keep(QuadraticForm, composed(scaled, weight.scaled(2.0)).normal, argument)

    def gathered(self, terms: Sequence[Weighted]) -> list[Weighted]:
        """As they are."""
        return list(terms)

    def value(self, weight: Tensor, argument: Tensor) -> Tensor:
        size = argument.shape[1]
        P, z = weight.unflatten(1, (size, size)), argument
        return (z.unsqueeze(1) @ P @ z.unsqueeze(2)).flatten() / 2

    def matrix_entries(self, term: Weighted) -> int:
        return len(term.weight.row)

    def joined(self, term: Weighted) -> np.ndarray:
        return term.argument.linear().variable

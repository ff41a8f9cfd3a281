"""Negative entropies: sum_i w_i z_i log z_i, z >= 0."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from convlayer.declaration.affine import NONE, Table, UnsupportedError, weigh
from convlayer.declaration.atoms.atom import Elementwise, Terms
from convlayer.declaration.cvxpy_internals import entr, kl_div, rel_entr


class Entropy(Elementwise):
    """f(z) = z log z; spelt -entr(z), rel_entr(z, numbers), kl_div(z, numbers)."""

    name = "entropy"
    words = "entropies"
    restricts = True

    def recognises(self, expression: Any) -> bool:
        return isinstance(expression, (entr, rel_entr, kl_div))

    def read(self, expression: Any, weight: Table, terms: Terms) -> None:
        if isinstance(expression, entr):
            (z,) = expression.args
            _keep(terms.reader.table(z), weight.scaled(-1.0), terms)
        else:
            _keep_divergence(expression, weight, terms)

    def of(self, argument: Tensor) -> Tensor:
        """Its slope stays finite at zero, where every solution has a vanishing derivative."""
        tiny = torch.finfo(argument.dtype).tiny
        return argument * argument.clamp(min=tiny).log()

    def outside(self, argument: Tensor) -> Tensor:
        return -argument


def _keep(argument: Table, weight: Table, terms: Terms) -> None:
    """weight' f(argument); f(s z) = s f(z) + s log(s) z for a positive number s."""
    argument = argument.normal
    alone = (np.bincount(argument.row, minlength=argument.size) == 1).all()
    if alone and (argument.variable != NONE).all() and (argument.parameter == NONE).all():
        scale = argument.coefficient
        if (scale > 0).all() and (scale != 1).any():
            plain = replace(argument, coefficient=np.ones(len(scale)))
            terms.keep_linear(weigh(weight.scaled(scale * np.log(scale)), plain))
            argument, weight = plain, weight.scaled(scale)
    terms.keep(Entropy, weight, argument)


def _keep_divergence(expression: Any, weight: Table, terms: Terms) -> None:
    """z log(z / y), and - z + y in kl_div, with positive numbers y: f(z) - z log y."""
    z, y = expression.args
    if not terms.reader.contents.constant(y):
        raise UnsupportedError("its second argument is not a constant")
    number = np.broadcast_to(np.asarray(y.value, dtype=float), expression.shape).ravel(order="F")
    if (number <= 0).any():
        raise UnsupportedError("its second argument is not positive")
    # The first argument spans the expression: CVXPY promotes scalars only.
    argument = terms.reader.table(z)
    if argument.size != expression.size:
        raise UnsupportedError("its first argument is repeated")
    _keep(argument, weight, terms)
    slope = -np.log(number)
    if isinstance(expression, kl_div):
        slope = slope - 1.0
        terms.keep_linear(weigh(weight, Table.of_constant(number)))
    terms.keep_linear(weigh(weight.scaled(slope), argument))

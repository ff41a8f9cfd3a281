"""A CVXPY expression as the graph that it is: parts that are used twice are one part, however deep
they lie.

CVXPY's own walks write a shared part out at each use and recurse. What is asked here of every part
costs the graph's size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import cvxpy as cp

from convlayer.declaration.cvxpy_internals import scopes


def arguments(part: Any) -> list[Any]:
    """The arguments of an expression, a constraint, an objective or a problem; CVXPY has some in
    lists."""
    return [
        inner for given in part.args for inner in (given if isinstance(given, list) else [given])
    ]


def arguments_first(
    roots: Iterable[Any], opened: Callable[[Any], bool] = lambda part: True
) -> list[Any]:
    """Every part once, after its arguments; those of a part that is not `opened` are left out."""
    return _finished(roots, opened, lambda parts: reversed(list(parts)))


def uses_first(root: Any, opened: Callable[[Any], bool]) -> list[Any]:
    """Every part once, after all the parts that use it; an argument before those that follow it,
    where uses leave the choice."""
    return _finished([root], opened, iter)[::-1]


def _finished(
    roots: Iterable[Any],
    opened: Callable[[Any], bool],
    onto: Callable[[Iterable[Any]], Iterable[Any]],
) -> list[Any]:
    """Every part once, when all below it are done. onto: in which order arguments go onto the
    stack; the last is taken first."""
    order: list[Any] = []
    seen: set[int] = set()
    stack = [(root, False) for root in onto(roots)]
    while stack:
        part, done = stack.pop()
        if done:
            order.append(part)
        elif id(part) not in seen:
            seen.add(id(part))
            stack.append((part, True))
            if opened(part):
                stack.extend((argument, False) for argument in onto(arguments(part)))
    return order


def rewritten(
    roots: Sequence[Any],
    rule: Callable[[Any, list[Any]], Any],
    opened: Callable[[Any], bool],
) -> dict[int, Any]:
    """By id, what stands in the place of each part that a rule replaces, or that holds one that it
    does.

    rule: a part, and its arguments as they now are -> what it becomes; None: it stays as it is.
    """
    new: dict[int, Any] = {}
    for part in arguments_first(roots, opened):
        inner = [new.get(id(argument), argument) for argument in part.args]
        changed = rule(part, inner)
        if changed is None and any(
            now is not before for now, before in zip(inner, part.args, strict=True)
        ):
            changed = part.copy(inner)
        if changed is not None:
            new[id(part)] = changed
    return new


def is_affine(part: Any) -> bool:
    """In variables and parameters each."""
    with scopes.dpp_scope():
        return part.is_affine()


def is_curved(part: Any) -> bool:
    """An expression that is not affine in variables and parameters each; a constraint, which an
    indicator holds, is none."""
    return isinstance(part, cp.Expression) and not is_affine(part)


class Contents:
    """What stands in the parts of expressions: variables, parameters."""

    def __init__(self) -> None:
        self._held: dict[int, tuple[Any, bool, bool]] = {}  # with the part: its address is its key

    def variables(self, part: Any) -> bool:
        """Whether a variable stands in it."""
        return self._of(part)[1]

    def parameters(self, part: Any) -> bool:
        """Whether a Parameter stands in it."""
        return self._of(part)[2]

    def constant(self, part: Any) -> bool:
        """Neither does."""
        _, variables, parameters = self._of(part)
        return not (variables or parameters)

    def _of(self, part: Any) -> tuple[Any, bool, bool]:
        held = self._held.get(id(part))
        if held is None:
            for inner in arguments_first([part], lambda part: id(part) not in self._held):
                if id(inner) not in self._held:
                    self._held[id(inner)] = (inner, *self._look(inner))
            held = self._held[id(part)]
        return held

    def _look(self, part: Any) -> tuple[bool, bool]:
        if isinstance(part, cp.Variable):
            return True, False
        if isinstance(part, cp.Parameter):
            return False, True
        inner = [self._held[id(argument)] for argument in arguments(part)]
        return any(held[1] for held in inner), any(held[2] for held in inner)

"""Any part of a CVXPY problem as a short text, safely.

CVXPY prints an expression by walking it: a shared part is written out each time that it is used, so that a few lines of code can
stand for a text without end, a chain of some hundred operations meets Python's limit of recursion, and a few indices cannot be
printed at all. What is asked for words here gets them whatever it holds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cvxpy as cp
from cvxpy.atoms.affine.add_expr import AddExpression
from cvxpy.atoms.affine.binary_operators import DivExpression, MulExpression, multiply
from cvxpy.atoms.affine.index import index, special_index
from cvxpy.atoms.affine.promote import Promote
from cvxpy.atoms.affine.unary_operators import NegExpression
from cvxpy.constraints.constraint import Constraint
from cvxpy.constraints.nonpos import Inequality, NonNeg, NonPos
from cvxpy.constraints.psd import PSD
from cvxpy.constraints.zero import Equality, Zero
from cvxpy.problems.objective import Objective

WIDEST = 80  # characters
PARTS = 200  # of an expression, those that are used twice counted twice, up to which CVXPY prints it
DEEPEST = 60  # parts within each other
SHOWN = 3  # levels that are spelt out of what CVXPY does not print
ELLIPSIS = "..."


def short(item: Any, widest: int = WIDEST) -> str:
    """One line of at most so many characters for an expression, a constraint, an objective or anything else. It never fails."""
    text = " ".join(spelt(item).split())
    return text if len(text) <= widest else f"{text[: widest - len(ELLIPSIS)]}{ELLIPSIS}"


def spelt(item: Any) -> str:
    """As CVXPY prints it, or, where it cannot or the text would have no end, its outermost operations."""
    if isinstance(item, cp.Problem):
        return "; ".join(spelt(part) for part in (item.objective, *item.constraints))
    if not isinstance(item, (cp.Expression, Constraint, Objective)):
        return _printed(item, repr)
    if _is_printable(item):
        return _printed(item, lambda item: _outline(item, SHOWN))
    return _outline(item, SHOWN)


def _printed(item: Any, otherwise: Callable[[Any], str]) -> str:
    try:
        return str(item)
    except Exception:  # whatever it is that CVXPY meets: these are words about another matter
        try:
            return otherwise(item)
        except Exception:
            return type(item).__name__


def _is_printable(item: Any) -> bool:
    level, count = [item], 0
    for _ in range(DEEPEST):
        count += len(level)
        if count > PARTS:
            return False
        level = [argument for part in level for argument in getattr(part, "args", ())]
        if not level:
            return True
    return False


def _outline(item: Any, levels: int) -> str:
    """The outermost `levels` operations; what is further in is left out."""
    arguments = list(getattr(item, "args", ()))
    if not arguments:
        return _printed(item, lambda item: type(item).__name__)
    if levels == 0:
        return ELLIPSIS
    inner = [_outline(argument, levels - 1) for argument in arguments]
    wrapped = [
        f"({text})" if isinstance(argument, (AddExpression, NegExpression)) else text
        for argument, text in zip(arguments, inner, strict=True)
    ]
    if isinstance(item, Promote):
        return inner[0]
    if isinstance(item, (index, special_index)):
        return f"{wrapped[0]}[{ELLIPSIS}]"
    for kinds, sign, parts in _SIGNS:
        if isinstance(item, kinds):
            return sign.join(_without_repeats(wrapped if parts == "factors" else inner))
    if isinstance(item, NegExpression):
        return f"-{wrapped[0]}"
    for kinds, ending in _ENDINGS:
        if isinstance(item, kinds):
            return f"{inner[0]} {ending}"
    name = "minimize" if isinstance(item, cp.Minimize) else "maximize" if isinstance(item, cp.Maximize) else None
    if name is not None:
        return f"{name} {inner[0]}"
    return f"{type(item).__name__}({', '.join(inner)})"


def _without_repeats(texts: list[str]) -> list[str]:
    return [text for k, text in enumerate(texts) if text != ELLIPSIS or k == 0 or texts[k - 1] != ELLIPSIS]


_SIGNS: list[tuple[Any, str, str]] = [
    (Equality, " == ", "terms"),
    (Inequality, " <= ", "terms"),
    (AddExpression, " + ", "terms"),
    (multiply, " * ", "factors"),
    (DivExpression, " / ", "factors"),
    (MulExpression, " @ ", "factors"),
]
_ENDINGS: list[tuple[Any, str]] = [(Zero, "== 0"), (NonNeg, ">= 0"), (NonPos, "<= 0"), (PSD, ">> 0")]

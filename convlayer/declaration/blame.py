"""Which sub-expression breaks a rule: from the objective or a constraint down to the atom at fault.

A rule asks an expression to be convex, concave or affine (log-log convex and so on in a geometric
program). What it asks of an atom's argument follows: of an increasing convex atom a convex one, of
a decreasing one a concave one, else an affine one. Followed downwards this leads to `log(x)` in
`Minimize(sum_squares(x) + log(x))`, where the sum as a whole is what CVXPY refuses.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Any

import cvxpy as cp

from convlayer.declaration.cvxpy_internals import scopes

# What a rule asks of an expression, in the words that CVXPY's own questions end with: is_convex,
# is_atom_log_log_concave.
CONVEX, CONCAVE, AFFINE = "convex", "concave", "affine"
# The two sets of rules: of convex programs, and of log-log convex ones.
DCP, DGP = "dcp", "dgp"


@dataclass(frozen=True, eq=False)
class Fault:
    """A chain of expressions, each an argument of the one before; the last breaks the rule."""

    place: str  # "the objective", "constraints[2]"
    item: Any  # the objective or constraint
    side: int  # which argument of it
    path: list[Any]
    wanted: str  # of the last: convex, concave or affine
    rules: str  # DCP or DGP
    dpp: bool  # Parameters count as variables

    def scope(self) -> AbstractContextManager:
        """In which curvatures are those that the rules see."""
        return _scope(self.place, self.dpp)

    @property
    def culprit(self) -> Any:
        """The expression that breaks the rule."""
        return self.path[-1]

    @property
    def parent(self) -> Any:
        """What it is an argument of; None: it stands alone."""
        return self.path[-2] if len(self.path) > 1 else None


def faults(problem: cp.Problem, rules: str, dpp: bool) -> Iterator[Fault | tuple[str, Any]]:
    """Every part of the problem that CVXPY refuses: its fault, or where no single expression breaks
    a rule the part itself."""
    for place, item, expressions, wanted in _parts(problem):
        with _scope(place, dpp):
            if item.is_dcp() if rules == DCP else item.is_dgp():
                continue
            search = _Search(rules)
            paths = [search.path(e, asked) for e, asked in zip(expressions, wanted, strict=True)]
            chosen = next((side for side, path in enumerate(paths) if path is not None), None)
        if chosen is None:
            yield place, item
            continue
        path = paths[chosen]
        assert path is not None
        yield Fault(place, item, chosen, [e for e, _ in path], path[-1][1], rules, dpp)


def _scope(place: str, dpp: bool) -> ExitStack:
    stack = ExitStack()
    if dpp:
        stack.enter_context(scopes.dpp_scope())
        if place == "the objective":
            stack.enter_context(scopes.quad_form_dpp_scope())
    return stack


def _parts(problem: cp.Problem) -> Iterator[tuple[str, Any, list[Any], list[str]]]:
    """(where, the objective or constraint, its expressions, what is asked of each)."""
    objective = problem.objective
    yield (
        "the objective",
        objective,
        [objective.expr],
        [CONCAVE if isinstance(objective, cp.Maximize) else CONVEX],
    )
    for k, constraint in enumerate(problem.constraints):
        args = list(constraint.args)
        asked = (
            [CONVEX, CONCAVE]
            if isinstance(constraint, cp.constraints.Inequality)
            else [AFFINE] * len(args)
        )
        yield f"constraints[{k}]", constraint, args, asked


class _Search:
    """Downwards; an expression that is shared is looked at once for each thing asked of it."""

    def __init__(self, rules: str) -> None:
        self.of = "is_log_log_" if rules == DGP else "is_"
        self.of_atom = "is_atom_log_log_" if rules == DGP else "is_atom_"
        self.known: dict[tuple[int, str], list[tuple[Any, str]] | None] = {}

    def path(self, e: Any, wanted: str) -> list[tuple[Any, str]] | None:
        """(expression, what was asked of it) from here to the culprit; None where nothing is
        wrong."""
        key = (id(e), wanted)
        if key not in self.known:
            self.known[key] = None
            self.known[key] = self._path(e, wanted)
        return self.known[key]

    def _path(self, e: Any, wanted: str) -> list[tuple[Any, str]] | None:
        if getattr(e, self.of + wanted)():
            return None
        mine = (e, wanted)
        if not e.args:
            return [mine]
        curved = [c for c in (CONVEX, CONCAVE) if getattr(e, self.of_atom + c)()]
        unknown = not any(getattr(e, self.of + c)() for c in (CONVEX, CONCAVE))
        asked: list[str] = []
        if len(curved) == 2:  # an affine atom passes on what is asked of it
            asked = [self._asked(e, k, wanted) for k in range(len(e.args))]
        elif curved and (unknown or wanted in curved):
            asked = [self._asked(e, k, curved[0]) for k in range(len(e.args))]
        elif unknown:  # an atom without a curvature: perhaps since an argument has none
            asked = [CONVEX if not self._has_curvature(argument) else "" for argument in e.args]
        for argument, what in zip(e.args, asked, strict=bool(asked)):
            below = self.path(argument, what) if what else None
            if below is not None:
                return [mine, *below]
        return [mine]

    def _has_curvature(self, e: Any) -> bool:
        return any(getattr(e, self.of + c)() for c in (CONVEX, CONCAVE))

    def _asked(self, e: Any, k: int, wanted: str) -> str:
        if wanted == AFFINE:
            return AFFINE
        if e.is_incr(k):
            return wanted
        return {CONVEX: CONCAVE, CONCAVE: CONVEX}[wanted] if e.is_decr(k) else AFFINE

"""The problem as it was declared, and its cone program, made when it is first needed."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import cvxpy as cp

from convlayer.core.maps import Maps
from convlayer.declaration import domain
from convlayer.declaration.by_core import maps_of
from convlayer.declaration.canonical import Canonical
from convlayer.declaration.canonicalise import canonicalise
from convlayer.declaration.cvxpy_internals import lin_utils
from convlayer.declaration.hashing import digest_of_declaration
from convlayer.declaration.lean import lean
from convlayer.declaration.rewriting import Prepared, prepared
from convlayer.notices import quiet_cvxpy


def with_proximal_term(problem: cp.Problem, weight: float | cp.Parameter) -> cp.Problem:
    """The problem with weight/2 |x|^2 added to what is minimised, over all of its variables."""
    term = weight / 2 * sum(cp.sum_squares(variable) for variable in problem.variables())
    objective = problem.objective
    worse = -term if isinstance(objective, cp.Maximize) else term
    with quiet_cvxpy():
        return cp.Problem(type(objective)(objective.expr + worse), problem.constraints)


class Declaration:
    """What a layer was made from. It is never changed, so copies of a layer share it."""

    def __init__(
        self,
        problem: cp.Problem,
        parameters: list[cp.Parameter],
        variables: list[cp.Variable],
        gp: bool,
        owners: dict[int, Any],
        # of a proximal term in the cone program: a parameter after the others
        weight: cp.Parameter | None = None,
    ) -> None:
        self.problem, self.parameters, self.variables, self.gp, self.owners = (
            problem,
            parameters,
            variables,
            gp,
            owners,
        )
        self.weight = weight
        self._prepared: Prepared | None = None
        self._canonical: Canonical | None = None
        self._digest: str | None = None
        self._lock = threading.Lock()

    @classmethod
    def checked(
        cls,
        problem: cp.Problem,
        parameters: Sequence[cp.Parameter],
        variables: Sequence[cp.Variable],
        gp: bool,
    ) -> Declaration:
        """ProblemError or TypeError: what cannot be a layer."""
        with quiet_cvxpy():
            ready = prepared(problem, parameters, variables, gp)
        declared = cls(problem, list(parameters), list(variables), gp, ready.owners)
        declared._prepared = ready
        return declared

    def least_norm(self) -> Declaration:
        """The same with a small proximal term, whose weight is set at each call."""
        return Declaration(
            self.problem,
            self.parameters,
            self.variables,
            self.gp,
            self.owners,
            cp.Parameter(nonneg=True, name="least-norm weight"),
        )

    @property
    def canonical(self) -> Canonical:
        """The cone program. ProblemError or CanonicalisationError: there is none."""
        with self._lock:
            if self._canonical is None:
                problem, parameters = self.problem, self.parameters
                if self.weight is not None:
                    problem, parameters = (
                        with_proximal_term(problem, self.weight),
                        [*parameters, self.weight],
                    )
                self._canonical = canonicalise(
                    problem, parameters, self.variables, gp=self.gp, checked=self._prepared
                )
                self._prepared = None
            return self._canonical

    @cached_property
    def domains(self) -> list[frozenset[str]]:
        """Of each parameter, its declared properties that a call is to check."""
        return [domain.declared(parameter) for parameter in self.parameters]

    @cached_property
    def maps(self) -> Maps | None:
        """How the compiled core reads the parameters and writes the variables; None: it does not.

        ProblemError or CanonicalisationError: there is no cone program.
        """
        return None if self.weight is not None else maps_of(self.canonical, self.parameters)

    @cached_property
    def lean_maps(self) -> Maps | None:
        """The same of a program without what CVXPY adds for quadratic terms, where there is such:
        of the variables alone, not of the objective."""
        smaller = None if self.weight is not None else lean(self.canonical)
        maps = None if smaller is None else maps_of(smaller[0], self.parameters, smaller[1])
        return maps or self.maps

    @property
    def digest(self) -> str:
        """A name that only equal declarations have, in any process."""
        with self._lock:
            if self._digest is None:
                self._digest = digest_of_declaration(
                    self.problem, self.parameters, self.variables, self.gp
                )
            return self._digest

    def __deepcopy__(self, memo: dict) -> Declaration:
        return self

    def __getstate__(self) -> dict[str, Any]:
        # Neither our cone program nor CVXPY's own.
        with quiet_cvxpy():
            problem = cp.Problem(self.problem.objective, self.problem.constraints)
        made = {
            "problem": problem,
            "_canonical": None,
            "_prepared": None,
            "_lock": None,
            "_next": lin_utils.ID_COUNTER.count,
        }
        kept = {
            name: part for name, part in self.__dict__.items() if name not in ("maps", "lean_maps")
        }
        return {**kept, **made}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # CVXPY numbers variables and parameters by a counter of the process: those that
        # canonicalisation adds must not take the numbers of the ones that came with the pickle.
        lin_utils.ID_COUNTER.count = max(lin_utils.ID_COUNTER.count, state.pop("_next"))
        self.__dict__.update(state)
        self._lock = threading.Lock()

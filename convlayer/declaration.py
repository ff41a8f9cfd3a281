"""The problem as it was declared, and its cone program, made when it is first needed."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import cvxpy as cp
from cvxpy.lin_ops import lin_utils

from convlayer.canon import Canonical, canonicalise, check


class Declaration:
    """What a layer was made from. It is never changed, so copies of a layer share it."""

    def __init__(
        self,
        problem: cp.Problem,
        parameters: list[cp.Parameter],
        variables: list[cp.Variable],
        gp: bool,
        owners: dict[int, Any],
    ) -> None:
        self.problem, self.parameters, self.variables, self.gp, self.owners = problem, parameters, variables, gp, owners
        self._canonical: Canonical | None = None
        self._lock = threading.Lock()

    @classmethod
    def checked(
        cls, problem: cp.Problem, parameters: Sequence[cp.Parameter], variables: Sequence[cp.Variable], gp: bool
    ) -> Declaration:
        """ProblemError or TypeError: what cannot be a layer."""
        owners, _ = check(problem, parameters, variables, gp)
        return cls(problem, list(parameters), list(variables), gp, owners)

    @property
    def is_canonicalised(self) -> bool:
        return self._canonical is not None

    @property
    def canonical(self) -> Canonical:
        with self._lock:
            if self._canonical is None:
                self._canonical = canonicalise(self.problem, self.parameters, self.variables, gp=self.gp)
            return self._canonical

    def __deepcopy__(self, memo: dict) -> Declaration:
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_lock": None, "_next": lin_utils.ID_COUNTER.count}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # CVXPY numbers variables and parameters by a counter of the process: those that canonicalisation adds must not take
        # the numbers of the ones that came with the pickle.
        lin_utils.ID_COUNTER.count = max(lin_utils.ID_COUNTER.count, state.pop("_next"))
        self.__dict__.update(state)
        self._lock = threading.Lock()

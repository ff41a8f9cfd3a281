"""How a layer was asked to solve and to differentiate, checked."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from convlayer.declaration.canonical import Canonical
from convlayer.paths.dispatch import CHOICES, attempts
from convlayer.paths.gradients import Gradient, gradient_of
from convlayer.solvers import DEFAULT, SOLVERS, Attempt, ConeSolver

TOLERANCE = 1e-8


@dataclass(frozen=True, eq=False)
class Solving:
    """How the cone program is solved."""

    solver: ConeSolver
    named: bool  # the user named it
    tolerance: float
    options: Mapping[str, Any]  # of the solver

    @classmethod
    def of(cls, solver: str | ConeSolver | None, solver_args: Mapping[str, Any] | None) -> Solving:
        """ValueError: no such solver, or no tolerance."""
        options = dict(solver_args or {})
        tolerance = _tolerance(options)
        return cls(_solver(solver), solver is not None, tolerance, options)

    @property
    def alone(self) -> bool:
        """This solver and no other: the user named it, or options of it."""
        return self.named or bool(self.options)

    @property
    def described(self) -> str:
        """Its name, or that there is none: `explain` tells which one runs at a batch."""
        return self.solver.name if self.alone else "the cheapest"

    def with_args(self, solver_args: Mapping[str, Any] | None) -> Solving:
        """With these in addition."""
        if not solver_args:
            return self
        options = {"tolerance": self.tolerance, **self.options, **solver_args}
        return replace(self, tolerance=_tolerance(options), options=options)

    def by(self, solver: str | ConeSolver) -> Solving:
        """By another solver; of the options the tolerance alone is kept."""
        return Solving(_solver(solver), True, self.tolerance, {})

    def check(self, canonical: Canonical) -> None:
        """ValueError, TypeError: the solver does not take this program, or has no such option."""
        self.solver.check(canonical.program, self.options)

    def attempts(self, canonical: Canonical, batch: int, device: torch.device) -> list[Attempt]:
        """By the solver asked for, or by the cheapest one at this batch, with others behind it."""
        if self.alone:
            return self.solver.attempts(self.tolerance, self.options)
        elimination = canonical.elimination
        program = canonical.program if elimination is None else elimination.program
        return attempts(program, batch, self.tolerance, device)


@dataclass(frozen=True, eq=False)
class Settings:
    """What the constructor of a layer was given, but for what may be set later."""

    structure: str  # asked for
    solving: Solving
    gradient: Gradient
    regularise: float | str | None

    @classmethod
    def of(
        cls,
        structure: str,
        solver: str | ConeSolver | None,
        solver_args: Mapping[str, Any] | None,
        gradient: str | Gradient,
        gradient_args: Mapping[str, Any] | None,
        regularise: float | str | None,
        gp: bool,
    ) -> Settings:
        """ValueError, TypeError: what is no setting, or none of this kind of problem."""
        one_of("structure", structure, CHOICES)
        chosen = gradient_of(gradient, gradient_args)
        if regularise is not None and regularise != "least_norm":
            regularise = _proximal_weight(regularise, gp)
        return cls(structure, Solving.of(solver, solver_args), chosen, regularise)

    def changed(
        self,
        structure: str | None,
        solver: str | ConeSolver | None,
        solver_args: Mapping[str, Any] | None,
        gradient: str | Gradient | None,
        gradient_args: Mapping[str, Any] | None,
    ) -> Settings:
        """With some of them, those that are not None, changed."""
        if structure is not None:
            one_of("structure", structure, CHOICES)
        solving = self.solving if solver is None else self.solving.by(solver)
        mode = self.gradient
        if gradient is not None or gradient_args is not None:
            mode = gradient_of(gradient or self.gradient.name, gradient_args)
        return replace(
            self,
            structure=structure or self.structure,
            solving=solving.with_args(solver_args),
            gradient=mode,
        )

    @property
    def content(self) -> tuple[Any, ...]:
        """What of it tells one layer from another, whatever the process: see `hashing.digest`."""
        solver, gradient = self.solving.solver, self.gradient
        own = type(solver).__module__.startswith("convlayer.")
        how = (
            self.solving.alone,
            solver.name if own else solver,
            self.solving.tolerance,
            dict(self.solving.options),
        )
        return *how, type(gradient).__qualname__, vars(gradient), self.regularise

    @property
    def reason(self) -> str | None:
        """Why the cone program is taken whatever the problem's structure; None: it need not be."""
        if self.gradient.name != "exact":
            return f"gradient={self.gradient.name!r} is of the cone program"
        return "you named a solver, or its options" if self.solving.alone else None


def one_of(name: str, value: str, choices: Sequence[str]) -> None:
    """ValueError: it is none of them."""
    if value not in choices:
        raise ValueError(f"`{name}` must be one of {', '.join(map(repr, choices))}; got {value!r}.")


def _tolerance(options: dict[str, Any]) -> float:
    """Taken out of the options of a solver."""
    tolerance = options.pop("tolerance", TOLERANCE)
    if not isinstance(tolerance, (int, float)) or not 0 < tolerance < 1:
        raise ValueError(f"`tolerance` must be a number between 0 and 1; got {tolerance!r}.")
    return float(tolerance)


def _solver(solver: str | ConeSolver | None) -> ConeSolver:
    if solver is None:
        return SOLVERS[DEFAULT]
    if isinstance(solver, ConeSolver):
        return solver
    if isinstance(solver, str) and solver.lower() in SOLVERS:
        return SOLVERS[solver.lower()]
    raise ValueError(
        f"`solver` must be one of {', '.join(map(repr, SOLVERS))}, or a convlayer.Solver; got {solver!r}."
    )


def _proximal_weight(weight: Any, gp: bool) -> float:
    if (
        isinstance(weight, bool)
        or not isinstance(weight, (int, float))
        or not 0 < weight < math.inf
    ):
        raise ValueError(f"`regularise` must be a positive number or 'least_norm'; got {weight!r}.")
    if gp:
        raise ValueError(
            "`regularise` adds a square to the objective, which a log-log convex problem (gp=True) cannot have."
        )
    return float(weight)

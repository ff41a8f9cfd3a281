"""Which path a layer takes, and why."""

from __future__ import annotations

from dataclasses import dataclass, replace

from convlayer.declaration.declaration import Declaration
from convlayer.declaration.diagnose import ProblemError
from convlayer.declaration.normal_form import normal_form
from convlayer.paths.dispatch import Recognition, recognise
from convlayer.paths.settings import Settings
from convlayer.paths.specialised import Specialised
from convlayer.structures import STRUCTURES


@dataclass(frozen=True, eq=False)
class Choice:
    """The path that was chosen: a kernel, or none, which is the cone program."""

    # with the term that chooses a least norm, where the cone program needs one

    declared: Declaration
    recognition: Recognition
    structure: str  # its name, or "cone_program"
    kernel: Specialised | None
    why: str

    def cone_program(self, settings: Settings) -> Choice:
        """The cone program instead, of the same declaration."""
        return replace(self, structure="cone_program", kernel=None, why=settings.reason or self.why)


def choose(declared: Declaration, settings: Settings) -> Choice:
    """From the declaration and what was asked for; nothing is canonicalised.

    ProblemError: the structure that was asked for does not apply, or there is no least norm to
                  choose by.
    ValueError: settings that are none of a kernel's, and a structure that has one.
    """
    recognition = recognise(
        declared.problem,
        declared.parameters,
        declared.variables,
        declared.owners,
        gp=declared.gp,
        structure=settings.structure,
        reason=settings.reason,
    )
    chosen, form = recognition.chosen, recognition.form
    if settings.regularise == "least_norm":
        if chosen is None or not STRUCTURES[chosen.name].least_norm:
            _check_quadratic(declared, recognition)
            chosen = None
        if declared.weight is None:
            declared = declared.least_norm()
    kernel = None
    if chosen is not None and chosen.match is not None and chosen.match.build is not None:
        assert form is not None
        kernel = Specialised(form, chosen.name, chosen.match, declared.variables, declared.owners)
        if settings.reason is not None:
            raise ValueError(
                f"structure={settings.structure!r} runs a kernel, whose gradient is the exact one and which takes no "
                "solver and none of its options; leave them out."
            )
    structure = "cone_program" if chosen is None else chosen.name
    return Choice(declared, recognition, structure, kernel, settings.reason or recognition.why)


def _check_quadratic(declared: Declaration, recognition: Recognition) -> None:
    """ProblemError: neither a linear nor a quadratic program."""
    if declared.gp:
        reason: str | None = "it is log-log convex"
    else:
        form = recognition.form or normal_form(declared.problem, declared.parameters)
        reason = form.not_quadratic
    if reason:
        raise ProblemError(
            f"regularise='least_norm' is for linear and quadratic programs, and this is none: {reason}. Give the weight "
            "of a proximal term instead, such as regularise=1e-6."
        )

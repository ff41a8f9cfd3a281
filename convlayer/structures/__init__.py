"""The structures, by name; a file that defines a Structure is found by being there. The most
special come first."""

from __future__ import annotations

from collections.abc import Mapping

from convlayer.registry import found_in
from convlayer.structures.structure import (
    Cost,
    DeclaredProblem,
    Match,
    MismatchError,
    Structure,
    Wanted,
)

# What every structure refines in the end.
ROOT = "cone_program"


def in_order(structures: Mapping[str, Structure]) -> dict[str, Structure]:
    """The most special first. ValueError: a structure refines what is none."""
    for name, structure in structures.items():
        if structure.refines not in (ROOT, *structures):
            known = ", ".join(repr(one) for one in (ROOT, *sorted(structures)))
            raise ValueError(
                f"Structure `{name}` refines {structure.refines!r}, which is none; expected one of {known}."
            )

    def depth(name: str) -> int:
        return 0 if name == ROOT else 1 + depth(structures[name].refines)

    return {
        name: structures[name] for name in sorted(structures, key=lambda name: (-depth(name), name))
    }


STRUCTURES: dict[str, Structure] = in_order(
    {kind.name: kind() for kind in found_in(__name__, Structure)}
)

__all__ = [
    "ROOT",
    "STRUCTURES",
    "Cost",
    "DeclaredProblem",
    "Match",
    "MismatchError",
    "Structure",
    "Wanted",
]

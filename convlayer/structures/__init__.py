"""The structures, by name; a file that defines a Structure is found by being there. The most
special come first."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from importlib import import_module
from pkgutil import iter_modules

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


def _found() -> dict[str, Structure]:
    modules = [import_module(f"{__name__}.{module.name}") for module in iter_modules(__path__)]
    kinds = {
        kind
        for module in modules
        for kind in vars(module).values()
        if inspect.isclass(kind) and issubclass(kind, Structure) and not inspect.isabstract(kind)
    }
    return {kind.name: kind() for kind in kinds}


STRUCTURES: dict[str, Structure] = in_order(_found())

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

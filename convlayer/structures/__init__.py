"""The structures, by name; a file that defines a Structure is found by being there. The most special come first."""

from __future__ import annotations

import inspect
from importlib import import_module
from pkgutil import iter_modules

from convlayer.structures.structure import Cost, Declaration, Match, MismatchError, Structure, Wanted


def _found() -> dict[str, Structure]:
    modules = [import_module(f"{__name__}.{module.name}") for module in iter_modules(__path__)]
    kinds = {
        kind
        for module in modules
        for kind in vars(module).values()
        if inspect.isclass(kind) and issubclass(kind, Structure) and not inspect.isabstract(kind)
    }
    found = {kind.name: kind() for kind in kinds}

    def depth(name: str) -> int:
        return 1 + depth(found[name].refines) if name in found else 0

    return {name: found[name] for name in sorted(found, key=lambda name: (-depth(name), name))}


STRUCTURES: dict[str, Structure] = _found()

__all__ = ["STRUCTURES", "Cost", "Declaration", "Match", "MismatchError", "Structure", "Wanted"]

"""The atoms of the normal form, by name; a file with a NormalAtom is found by being there."""

from __future__ import annotations

import inspect
from importlib import import_module
from pkgutil import iter_modules

from convlayer.declaration.atoms.atom import NormalAtom


def _found() -> dict[str, NormalAtom]:
    """ValueError: two atoms of one name."""
    atoms: dict[str, NormalAtom] = {}
    for module in sorted(module.name for module in iter_modules(__path__)):
        for kind in vars(import_module(f"{__name__}.{module}")).values():
            if not inspect.isclass(kind) or not issubclass(kind, NormalAtom):
                continue
            if inspect.isabstract(kind) or type(atoms.get(kind.name)) is kind:
                continue
            if kind.name in atoms:
                raise ValueError(f"Two atoms of the normal form have the name `{kind.name}`.")
            atoms[kind.name] = kind()
    return atoms


ATOMS: dict[str, NormalAtom] = _found()

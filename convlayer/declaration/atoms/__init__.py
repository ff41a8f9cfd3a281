"""The atoms of the normal form, by name; a file with a NormalAtom is found by being there."""

from __future__ import annotations

from convlayer.declaration.atoms.atom import NormalAtom
from convlayer.registry import found_in


def _found() -> dict[str, NormalAtom]:
    """ValueError: two atoms of one name."""
    atoms: dict[str, NormalAtom] = {}
    for kind in found_in(__name__, NormalAtom):
        if kind.name in atoms:
            raise ValueError(f"Two atoms of the normal form have the name `{kind.name}`.")
        atoms[kind.name] = kind()
    return atoms


ATOMS: dict[str, NormalAtom] = _found()

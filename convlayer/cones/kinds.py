"""The kinds of cones there are, found by being there, and how CVXPY counts them."""

from __future__ import annotations

import inspect
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

import convlayer.cones as room
from convlayer.cones.cone import Cone
from convlayer.cones.product import Product


def _found() -> tuple[type[Cone], ...]:
    modules = [
        import_module(f"{room.__name__}.{module.name}") for module in iter_modules(room.__path__)
    ]
    kinds = {
        kind
        for module in modules
        for kind in vars(module).values()
        if inspect.isclass(kind) and issubclass(kind, Cone) and not inspect.isabstract(kind)
    }
    return tuple(sorted(kinds, key=lambda kind: kind.place))


# In CVXPY's order of their rows.
KINDS = _found()


def cones_of(dims: Any) -> Product:
    """The cones of CVXPY's summary of them, in the order of its rows."""
    return Product([cone for kind in KINDS for cone in kind.read(getattr(dims, kind.dims))])


def unknown_kinds(dims: Any) -> list[str]:
    """What CVXPY calls the kinds in its summary that there are none of here."""
    known = {kind.dims for kind in KINDS}
    return sorted(name for name, count in vars(dims).items() if name not in known and count)

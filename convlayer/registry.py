"""The kinds of something that a package has a file for each of: they are found by being there."""

from __future__ import annotations

import inspect
from importlib import import_module
from pkgutil import iter_modules
from typing import Any


def found_in(package: str, base: type) -> list[Any]:
    """The concrete subclasses of `base` that stand in the package's modules, in the order of the
    files; it imports them."""
    path = import_module(package).__path__
    modules = [
        import_module(f"{package}.{name}") for name in sorted(m.name for m in iter_modules(path))
    ]
    kinds = (
        kind
        for module in modules
        for kind in vars(module).values()
        if inspect.isclass(kind) and issubclass(kind, base) and not inspect.isabstract(kind)
    )
    return list(dict.fromkeys(kinds))

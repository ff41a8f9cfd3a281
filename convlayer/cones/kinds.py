"""The kinds of cones there are, found by being there, and how CVXPY counts them."""

from __future__ import annotations

from typing import Any

from convlayer.cones.cone import Cone
from convlayer.cones.product import Product
from convlayer.registry import found_in

# In CVXPY's order of their rows.
KINDS: tuple[type[Cone], ...] = tuple(
    sorted(found_in("convlayer.cones", Cone), key=lambda kind: kind.place)
)


def cones_of(dims: Any) -> Product:
    """The cones of CVXPY's summary of them, in the order of its rows."""
    return Product([cone for kind in KINDS for cone in kind.read(getattr(dims, kind.dims))])


def unknown_kinds(dims: Any) -> list[str]:
    """What CVXPY calls the kinds in its summary that there are none of here."""
    known = {kind.dims for kind in KINDS}
    return sorted(name for name, count in vars(dims).items() if name not in known and count)

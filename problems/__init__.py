"""The prebuilt problem library: one problem a file, each with a sampler and an independent
solution.

    from convlayer import problems

    layer = problems.ridge.layer(100, 50)                   # the ConvexLayer, for A (100, 50)
    A, b, lam = problems.ridge.sample(32, 0, 100, 50)       # a batch of 32 from seed 0, float64
    x, = layer(A, b, lam)                                   # (32, 50)
    x, = problems.ridge.oracle(A, b, lam)                   # the same by other means, without gradient
    problems.ridge(100, 50).problem                         # the CVXPY problem, to edit
    problems.PROBLEMS                                       # all of them, by name

A new problem is a new file, NAME.py, that defines NAME with `@prebuilt`; it is found by being
there.
"""

from importlib import import_module
from pkgutil import iter_modules
from typing import TYPE_CHECKING

from ._prebuilt import Declared, Draw, Prebuilt, prebuilt

PROBLEMS: dict[str, Prebuilt] = {
    name: getattr(import_module(f"{__name__}.{name}"), name)
    for name in sorted(module.name for module in iter_modules(__path__))
    if not name.startswith("_")
}
globals().update(PROBLEMS)

if TYPE_CHECKING:

    def __getattr__(name: str) -> Prebuilt:
        """Every problem, for what reads types and runs nothing."""


__all__ = ["PROBLEMS", "Declared", "Draw", "Prebuilt", "prebuilt", *PROBLEMS]

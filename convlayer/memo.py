"""What is worked out once: for each object (and device), or for each size (and device).

    @once_for_each                    its value for a program lives in the program, and goes with
    def pattern(program): ...         it; a pickle or a copy works it out again

    @once_for_each                    of a method, or of further arguments, one value for each
    def on(self, device): ...

    @constants                        of sizes, kinds and devices alone; the last are kept
    def identity(n, device): ...

Threads that ask for the same value at the same time wait for the first of them. Tensors made here
serve calls under `torch.inference_mode` and others alike.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, wraps
from threading import RLock
from typing import Any, ParamSpec, TypeVar, cast

import torch

Given = ParamSpec("Given")
Work = TypeVar("Work", bound=Callable)
Value = TypeVar("Value")

# Of one function of sizes and devices: so many values are kept, those of a program with cones of
# many sizes among them.
KEPT = 256


class _Known(dict):
    """The values of one function for one object, by its further arguments; empty in a copy."""

    def __init__(self) -> None:
        super().__init__()
        self.lock = RLock()

    def __reduce__(self) -> tuple[type[_Known], tuple[()]]:
        return _Known, ()


def once_for_each(work: Work) -> Work:
    """A function of an object, and of hashable arguments beside it, that is called once for
    each."""
    place = f"_known_{work.__module__}.{work.__qualname__}"

    def found(owner: Any, given: tuple) -> Any:
        # Atomic: two threads take the same one.
        mine = vars(owner).setdefault(place, _Known())
        with mine.lock:
            if given not in mine:
                with torch.inference_mode(False):
                    mine[given] = work(owner, *given)
            return mine[given]

    @wraps(work)
    def known(owner: Any, *given: Any) -> Any:
        try:  # what is there already, as nearly always, is to cost as little as it can
            return owner.__dict__[place][given]
        except KeyError:
            pass
        return found(owner, given)

    return cast(Work, known)


def constants(work: Callable[Given, Value]) -> Callable[Given, Value]:
    """A function of hashable arguments alone whose last values are kept."""

    @wraps(work)
    def made(*given: Given.args, **named: Given.kwargs) -> Value:
        with torch.inference_mode(False):
            return work(*given, **named)

    return cast(Callable[Given, Value], lru_cache(maxsize=KEPT)(made))

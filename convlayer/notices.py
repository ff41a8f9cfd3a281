"""Warnings: ours point at the user's line, and CVXPY's about its own ways are not passed on."""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import torch

BELOW = ("convlayer", "torch")  # packages whose frames are not the user's
# code that torch wrote, in no module
GENERATED = (
    "<eval_with_key>",
    str(Path(torch.__file__).parent),
)

# What CVXPY says of how it canonicalises, in problems that are ours or that it has seen before.
OF_CVXPY = (
    "Reading from a sparse CVXPY expression",
    r"(?s).*CPP backend",
    r"(?s).*backend for canonicalization",
    r"(?s).*contains too many subexpressions",
)


@contextmanager
def quiet_cvxpy() -> Iterator[None]:
    """Without the warnings that are about CVXPY's inside. What it says of the problem passes."""
    with warnings.catch_warnings():
        for message in OF_CVXPY:
            warnings.filterwarnings("ignore", message=message)
        yield


def tell(warning: Warning) -> None:
    """Warn at the user's line: the one that called a layer, whichever modules of torch it is in, or
    backward."""
    depth, frame = 2, sys._getframe(1)
    while frame.f_back and _is_below(frame):
        depth, frame = depth + 1, frame.f_back
    warnings.warn(warning, stacklevel=depth)


class OnceEach:
    """Warnings of one layer: once for each kind and cause."""

    def __init__(self) -> None:
        self._lock, self._told = threading.Lock(), set[tuple[type[Warning], Hashable]]()

    def __call__(self, warning: Warning, cause: Hashable = None) -> None:
        with self._lock:
            if (type(warning), cause) in self._told:
                return
            self._told.add((type(warning), cause))
        tell(warning)


def _is_below(frame: FrameType) -> bool:
    package = frame.f_globals.get("__name__", "").partition(".")[0]
    return package in BELOW or frame.f_code.co_filename.startswith(GENERATED)

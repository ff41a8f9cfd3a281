"""The compiled core's library: the one that runs on this processor, or why there is none."""

from __future__ import annotations

import ctypes
import os
from functools import cache
from pathlib import Path

VERSION = 2  # of the interface, as core.cpp has it
SWITCH = "CONVLAYER_CORE"
FOLDER = Path(__file__).parent
SUFFIX = ".dll" if os.name == "nt" else ".so"
AGAIN = (  # pip's cache may hold a wheel that was built without a compiler
    "`pip install --force-reinstall --no-deps --no-cache-dir` on what it was installed from"
)


def library() -> ctypes.CDLL | None:
    """The fastest library that this processor runs, None where there is none."""
    return _found()[0]


def state() -> str:
    """Which library runs, or why none does, in a sentence."""
    return _found()[1]


@cache
def _found() -> tuple[ctypes.CDLL | None, str]:
    if os.environ.get(SWITCH) == "0":
        return None, f"no compiled core: switched off by {SWITCH}=0"
    if not _path("_baseline").exists():
        return None, (
            "no compiled core: the package was installed without a compiler; "
            f"install one and run {AGAIN}"
        )
    try:
        baseline = ctypes.CDLL(str(_path("_baseline")))
        version, level = baseline.core_version(), baseline.core_level()
    except (OSError, AttributeError) as error:
        return None, f"no compiled core: its library does not load ({error}); run {AGAIN}"
    if version != VERSION:
        return None, (
            f"no compiled core: its library has version {version} of the interface, "
            f"the package {VERSION}; run {AGAIN}"
        )
    if level >= 3 and os.environ.get(SWITCH) != "baseline" and (faster := _faster()):
        return faster, "compiled core: x86-64-v3"
    return baseline, "compiled core: baseline"


def _faster() -> ctypes.CDLL | None:
    """The library for x86-64-v3, where one was built with this package."""
    try:
        faster = ctypes.CDLL(str(_path("_x86_64_v3")))
        return faster if faster.core_version() == VERSION else None
    except (OSError, AttributeError):
        return None


def _path(name: str) -> Path:
    return FOLDER / f"{name}{SUFFIX}"

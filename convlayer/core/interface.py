"""The compiled core's C interface, as core.cpp has it."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, Structure, c_double, c_int32, c_int64, c_void_p
from typing import Any

from convlayer.core.library import library

# Numbers of a row's report.
REPORT = 7


class PatternOf(Structure):
    """Of a program: core_plan."""

    _fields_ = [
        *((name, c_int32) for name in ("n", "m", "nnz_P", "nnz_A", "cones", "parts", "logs")),
        *((name, c_void_p) for name in ("P_rows", "P_cols", "A_rows", "A_cols")),
        *((name, c_void_p) for name in ("kinds", "sizes", "orders", "parameters")),
        *((name, c_void_p) for name in ("part_x", "part_y", "log_group")),
        *((name, c_void_p) for name in ("seen_x", "seen_y", "ignored", "log_seen", "log_valued")),
    ]


class Options(Structure):
    """Of a solve."""

    _fields_ = [
        ("tolerance", c_double),
        ("limit", c_int32),
        ("threads", c_int32),
        ("polish", c_int32),
    ]


class Values(Structure):
    """The data of a batch."""

    _fields_ = [
        *((name, c_void_p) for name in "PqAb"),
        *((f"{name}_stride", c_int64) for name in "PqAb"),
    ]


class MapsOf(Structure):
    """Of parameters and outputs: core_maps."""

    _fields_ = [
        *((name, c_int32) for name in ("parameters", "outputs", "nonzeros", "bounds")),
        *((name, c_int32) for name in ("tied", "ties", "empty", "objective_exp")),
        ("sign", c_double),
        *((name, c_void_p) for name in ("sizes", "domains", "orders", "logs", "limits")),
        *((name, c_void_p) for name in ("constant", "rows", "columns", "coefficients")),
        *((name, c_void_p) for name in ("output_sizes", "output_exps", "positions", "weights")),
        *((name, c_void_p) for name in ("bound_rows", "bound_columns", "bound_coefficients")),
        *((name, c_void_p) for name in ("tied_rows", "tie_groups", "tie_basis", "empty_rows")),
    ]


class TensorsAt(Structure):
    """Some tensors: addresses, strides from row to row, whether float32."""

    _fields_ = [("at", c_void_p), ("strides", c_void_p), ("single", c_void_p)]


class CallOf(Structure):
    """A call from parameters to outputs, or back."""

    _fields_ = [
        ("options", Options),
        *((name, c_int32) for name in ("validate", "keep")),
        *((name, c_int64) for name in ("first", "count")),
        *((name, TensorsAt) for name in ("thetas", "outputs")),
        *((name, c_void_p) for name in ("x", "s", "y", "value", "report", "kept")),
    ]


def core() -> ctypes.CDLL | None:
    """The library with the types of its functions; None: none runs."""
    found = library()
    if found is not None and found.core_plan.restype is not c_void_p:
        functions: tuple[tuple[Any, ...], ...] = (
            ("core_free", None, c_void_p),
            ("core_kept", c_int64, c_void_p),
            ("core_flops", c_double, c_void_p),
            ("core_solve", None, c_void_p, POINTER(Options), c_int64, POINTER(Values), *[c_void_p] * 5),
            ("core_adjoint", None, c_void_p, c_int32, c_int64, *[c_void_p] * 7),
            ("core_maps", c_void_p, c_void_p, POINTER(MapsOf)),
            ("core_maps_free", None, c_void_p),
            ("core_call", c_int64, c_void_p, POINTER(CallOf)),
            ("core_pull", c_int64, c_void_p, POINTER(CallOf), *[POINTER(TensorsAt)] * 2, *[c_void_p] * 2),
            ("core_plan", c_void_p, POINTER(PatternOf)),  # last: another thread looks at it
        )  # fmt: skip
        for name, result, *arguments in functions:
            function = getattr(found, name)
            function.argtypes, function.restype = arguments, result
    return found

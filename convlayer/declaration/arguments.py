"""What a call is given: parameters by position, by name or by their CVXPY object; numbers and
arrays; shapes and batch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any

import cvxpy as cp
import numpy as np
import torch
from torch import Tensor


def ordered(
    parameters: Sequence[cp.Parameter], given: tuple[Any, ...], named: Mapping[str, Any]
) -> tuple[Any, ...]:
    """The values in the order of the parameters. A dictionary alone may hold them by parameter, or
    by name."""
    by_place: dict[int, Any] = {}
    if len(given) == 1 and isinstance(given[0], Mapping):
        by_place, given = _by_key(parameters, given[0]), given[1:]
    elif not named:
        return given
    for name, value in named.items():
        place = _place(parameters, name)
        if place in by_place or place < len(given):
            raise TypeError(f"Parameter `{name}` was given twice.")
        by_place[place] = value
    missing = [k for k in range(len(given), len(parameters)) if k not in by_place]
    if missing:
        raise TypeError(
            f"The layer was not given {', '.join(f'`{parameters[k].name()}`' for k in missing)}."
        )
    return (*given, *(by_place[k] for k in range(len(given), len(parameters))))


def _by_key(parameters: Sequence[cp.Parameter], given: Mapping[Any, Any]) -> dict[int, Any]:
    by_place: dict[int, Any] = {}
    for key, value in given.items():
        places = [k for k, parameter in enumerate(parameters) if parameter is key]
        if not places and not isinstance(key, str):
            raise TypeError(
                f"{key!r} is no Parameter of the layer, which has {_listed(parameters)}."
            )
        place = places[0] if places else _place(parameters, key)
        if place in by_place:
            raise TypeError(f"Parameter `{parameters[place].name()}` was given twice.")
        by_place[place] = value
    return by_place


def _place(parameters: Sequence[cp.Parameter], name: str) -> int:
    places = [k for k, parameter in enumerate(parameters) if parameter.name() == name]
    if len(places) == 1:
        return places[0]
    if places:
        raise TypeError(
            f"{len(places)} parameters are called `{name}`: give them by position, or in a dictionary by their CVXPY objects."
        )
    raise TypeError(
        f"The layer has no parameter or option `{name}`; its parameters are {_listed(parameters)}."
    )


def _listed(parameters: Sequence[cp.Parameter]) -> str:
    return ", ".join(f"`{parameter.name()}`" for parameter in parameters) or "none"


def tensors(parameters: Sequence[cp.Parameter], given: tuple[Any, ...]) -> tuple[Any, ...]:
    """Numbers for scalar parameters and arrays of floating point as tensors, where the others are;
    the rest as it is.

    A number has no dtype of its own: it takes that of the tensors and arrays, or torch's default
                                      one.
    """
    if all(isinstance(value, Tensor) for value in given):
        return given
    mine = next((value for value in given if isinstance(value, Tensor)), None)
    device = torch.device("cpu") if mine is None else mine.device
    arrays = [
        torch.from_numpy(np.array(value)).to(device) if _is_array(value) else value
        for value in given
    ]
    floating = [
        value for value in arrays if isinstance(value, Tensor) and value.is_floating_point()
    ]
    dtype = _promoted(floating) if floating else torch.get_default_dtype()
    return tuple(
        torch.tensor(float(value), dtype=dtype, device=device)
        if not parameter.shape and _is_number(value)
        else value
        for parameter, value in zip(parameters, arrays, strict=False)
    ) + tuple(arrays[len(parameters) :])


def _is_array(value: Any) -> bool:
    return isinstance(value, np.ndarray) and value.dtype in (np.float16, np.float32, np.float64)


def _is_number(value: Any) -> bool:
    """Floating point, or an integer that is one without loss."""
    if isinstance(value, (int, np.integer)) and not isinstance(value, bool):
        return abs(int(value)) <= 2**53
    return isinstance(value, (float, np.floating))


def dtype_and_device(
    parameters: Sequence[cp.Parameter], given: Sequence[Tensor]
) -> tuple[torch.dtype, torch.device]:
    """Those of the outputs."""
    if not given:
        return torch.get_default_dtype(), torch.device("cpu")
    dtype, device = given[0].dtype, given[0].device
    if any(t.device != device for t in given):
        listed = ", ".join(
            f"`{p.name()}` on {t.device}" for p, t in zip(parameters, given, strict=True)
        )
        raise ValueError(f"The parameters are on different devices: {listed}. Move them to one.")
    return (dtype if all(t.dtype is dtype for t in given) else _promoted(given)), device


def _promoted(given: Sequence[Tensor]) -> torch.dtype:
    """As torch promotes: a tensor without dimensions has no say where there is one with."""
    return reduce(
        torch.promote_types, [t.dtype for t in given if t.ndim] or [t.dtype for t in given]
    )


def batch_shape(parameters: Sequence[cp.Parameter], given: Sequence[Any]) -> tuple[int, ...]:
    """The batch that the values of all parameters make. TypeError and ValueError for what is no
    value of its parameter."""
    if len(given) != len(parameters):
        raise ValueError(
            f"The layer takes {len(parameters)} tensors ({_listed(parameters)}); got {len(given)}."
        )
    shapes = [
        _own_batch(tensor, parameter) for tensor, parameter in zip(given, parameters, strict=True)
    ]
    batched: list[tuple[int, ...]] = []
    for shape in shapes:
        if shape and shape not in batched:
            batched.append(shape)
    if len(batched) <= 1:
        return batched[0] if batched else ()
    _refuse_columns(parameters, shapes, batched)
    try:
        if all(type(k) is int for shape in batched for k in shape):
            # torch's own loads a symbolic algebra package at its first call
            return np.broadcast_shapes(*batched)
        return tuple(torch.broadcast_shapes(*batched))
    except (ValueError, RuntimeError):
        listed = ", ".join(
            f"`{p.name()}` {shape}" for p, shape in zip(parameters, shapes, strict=True)
        )
        raise ValueError(
            f"The batch dimensions do not agree: {listed}. Each parameter has the batch dimensions in front, or none if it is shared."
        ) from None


def _refuse_columns(
    parameters: Sequence[cp.Parameter],
    shapes: Sequence[tuple[int, ...]],
    batched: Sequence[tuple[int, ...]],
) -> None:
    """A scalar for each row of a batch, as a column: a linear head returns it so, and it would make
    every row meet every scalar."""
    for parameter, shape in zip(parameters, shapes, strict=True):
        if not parameter.shape and len(shape) > 1 and shape[-1] == 1 and shape[:-1] in batched:
            name, batch = parameter.name(), shape[:-1]
            raise ValueError(
                f"Parameter `{name}` is a scalar and was given a tensor of shape {shape}, where others have the batch {batch}: each of its "
                f"numbers would meet every row. Write {name}.squeeze(-1) for one number a row."
            )


def _own_batch(tensor: Any, parameter: cp.Parameter) -> tuple[int, ...]:
    name = parameter.name()
    if not isinstance(tensor, Tensor):
        raise TypeError(_no_tensor(tensor, name, parameter.shape))
    if tensor.layout is not torch.strided or tensor.is_nested:
        kind, remedy = (
            ("nested", "to_padded_tensor(0.0)") if tensor.is_nested else ("sparse", "to_dense()")
        )
        raise TypeError(
            f"Parameter `{name}` was given a {kind} tensor; expected a dense one: write {name}.{remedy}."
        )
    if not tensor.is_floating_point():
        if tensor.is_complex():
            raise TypeError(
                f"Parameter `{name}` was given a complex tensor; pass real and imaginary parts apart."
            )
        raise TypeError(
            f"Parameter `{name}` was given a tensor of {tensor.dtype}; expected floating point: write {name}.double()."
        )
    shape, expected = tuple(tensor.shape), parameter.shape
    lead = len(shape) - len(expected)
    if lead < 0 or shape[lead:] != expected:
        raise ValueError(_wrong_shape(shape, expected, lead, name))
    return shape[:lead]


def _no_tensor(value: Any, name: str, shape: tuple[int, ...]) -> str:
    if value is None:
        return f"Parameter `{name}` was given None; expected a torch.Tensor."
    if isinstance(value, np.ndarray):
        remedy = (
            f"torch.as_tensor({name}.astype(float))"
            if value.dtype.kind in "iub"
            else "torch.as_tensor(value)"
        )
        return f"Parameter `{name}` was given an array of {value.dtype}; expected a torch.Tensor: write {remedy}."
    if isinstance(value, (int, float, np.number)) and not isinstance(value, bool):
        remedy = (
            f"torch.full({shape}, {float(value)!r})" if shape else f"torch.tensor({float(value)!r})"
        )
        return f"Parameter `{name}` of shape {shape} was given the number {value}; write {remedy}."
    return f"Parameter `{name}` was given a {type(value).__name__}; expected a torch.Tensor: write torch.as_tensor(value)."


def _wrong_shape(shape: tuple[int, ...], expected: tuple[int, ...], lead: int, name: str) -> str:
    wanted = ", ".join(map(str, expected))
    message = f"Parameter `{name}` was given a tensor of shape {shape}; expected ({wanted}) or (*batch{', ' * bool(wanted)}{wanted})."
    if len(expected) == 2 and expected[0] == expected[1] == shape[-1] and lead < 1:
        message += f"\nEach row needs its own {expected[0]} x {expected[1]} matrix: did you mean torch.diag_embed({name})?"
    elif len(expected) == 2 and shape[-2:] == expected[::-1]:
        message += f"\nIt is the transpose: did you mean {name}.mT?"
    elif math.prod(shape) == math.prod(expected):
        message += f"\nIt has the right number of entries: did you mean {name}.reshape({wanted})?"
    elif expected and shape[:-1] == expected:
        message += f"\nThe batch comes first: did you mean {name}.movedim(-1, 0)?"
    return message

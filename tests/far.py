"""A pretended device, for code that must run on any: tensors there refuse to meet tensors of the
host, as on an accelerator.

`Far` tensors say that they are on DEVICE (torch's "meta", which every build has) and compute on the
host; inside `far_device()` factories and copies with that device make such tensors. Only scalars,
and what is copied openly, may cross.
"""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

DEVICE = torch.device("meta")
MAY_CROSS = ("aten::copy_", "aten::_to_copy")


class Far(torch.Tensor):
    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=DEVICE,
        )

    def __init__(self, inner):
        self.inner = inner

    def __repr__(self):
        return f"Far({self.inner})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


class far_device(TorchDispatchMode):  # noqa: N801
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


def _run(func, args, kwargs):
    far, near = [], []

    def look(value):
        if isinstance(value, Far):
            far.append(value)
        elif isinstance(value, torch.Tensor) and value.ndim:
            near.append(tuple(value.shape))
        return value

    tree_map(look, (args, kwargs))
    name, device = func.name(), kwargs.get("device")
    if far and near and not name.startswith(MAY_CROSS):
        raise RuntimeError(
            f"{name}: tensors of the device meet tensors of the host, of shapes {near}"
        )
    args, kwargs = tree_map(
        lambda value: value.inner if isinstance(value, Far) else value, (args, kwargs)
    )
    if device is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    out = func(*args, **kwargs)
    there = bool(far) if device is None else torch.device(device) == DEVICE
    return (
        tree_map(lambda value: Far(value) if isinstance(value, torch.Tensor) else value, out)
        if there
        else out
    )


def send(tensor, requires_grad=False):
    """A leaf on the device with the values of a tensor."""
    return Far(tensor.detach().clone()).requires_grad_(requires_grad)

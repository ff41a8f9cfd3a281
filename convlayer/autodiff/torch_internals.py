"""What convlayer takes of torch beside its documented interface, all of it here: a new version of
torch is checked against this list.

`tests/test_architecture.py` holds that no other module reaches inside.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")

functorch: Any = torch._C._functorch
_PLAIN = (Tensor, torch.nn.Parameter)
# Inside an operator torch records nothing, whatever its grad mode: there the dispatcher passes
# autograd by. As it is here it does not.
_OUTSIDE = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()


def recording() -> AbstractContextManager:
    """Inside an operator: torch records as it does outside of one."""
    return torch._C._ForceDispatchKeyGuard(*_OUTSIDE)


def in_forward_mode() -> bool:
    """A dual level is open: any tensor may have a tangent."""
    return forward_ad._current_level >= 0


def is_transformed(tensors: Sequence[Tensor | None]) -> bool:
    """Inside a torch.func transform, or with a tangent of forward mode."""
    if not tensors:
        return False
    if functorch.peek_interpreter_stack() is not None:
        return True
    return in_forward_mode() and any(
        t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors
    )


def in_vmap_alone() -> bool:
    """Every transform that is under way is a vmap, and no tangent is."""
    levels = functorch.get_interpreter_stack() or ()
    return not in_forward_mode() and all(
        level.key() == functorch.TransformType.Vmap for level in levels
    )


def is_of_old_vmap(tensor: Tensor) -> bool:
    """Batched by the vmap that torch.func's replaced."""
    return functorch.is_legacy_batchedtensor(tensor)


def plain_gradients(
    outputs: tuple[Tensor, ...],
    inputs: tuple[Tensor, ...],
    bars: tuple[Tensor, ...],
    retain_graph: bool,
) -> tuple[Tensor | None, ...]:
    """torch.autograd.grad of plain tensors, None where no way leads to an input; its checks take as
    long as a small kernel."""
    return torch.autograd.graph._engine_run_backward(
        outputs, bars, retain_graph, False, inputs, True, accumulate_grad=False
    )


def keeps_graph() -> bool:
    """Inside a backward: whether the pass that is under way was asked to retain the graph."""
    return torch._C._autograd._get_current_graph_task_keep_graph()


def is_reached(tensor: Tensor) -> bool:
    """Inside a backward: whether the pass that is under way goes on to this tensor; torch does not
    say it of a leaf."""
    return tensor.grad_fn is None or torch._C._will_engine_execute_node(tensor.grad_fn)


def versions(tensors: Sequence[Tensor]) -> list[int]:
    """How often each was changed in place."""
    return [tensor._version for tensor in tensors]


def is_view(tensor: Tensor) -> bool:
    """It shares another tensor's memory."""
    return tensor._is_view()


def is_plain(tensor: Tensor) -> bool:
    """Numbers lie in its memory on the host, as they are: it is of no subclass, and not sparse."""
    return (
        type(tensor) in _PLAIN
        and tensor.is_cpu
        and tensor.layout is torch.strided
        and not (tensor.is_neg() or tensor.is_nested or tensor._is_zerotensor())
    )


def at_home() -> AbstractContextManager:
    """What the library makes for itself is made on the host, whatever the user's default device."""
    return torch.device("cpu") if torch._C._len_torch_function_stack() else nullcontext()


def made_at_home(function: Callable[P, R]) -> Callable[P, R]:
    """The whole of it `at_home`."""

    @wraps(function)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> R:
        with at_home():
            return function(*args, **kwargs)

    return guarded


def laid_out(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The same numbers one after the other in memory of this dtype."""
    if tensor.dtype is not dtype or not is_plain(tensor):
        tensor = torch.zeros(tensor.shape, dtype=dtype).copy_(tensor)
    return tensor.contiguous()


def softmax_backward(bar: Tensor, p: Tensor, out: Tensor | None = None) -> Tensor:
    """p * (bar - p'bar) along the last dimension, in one pass."""
    if out is None:
        return torch._softmax_backward_data(bar, p, -1, p.dtype)
    return torch._softmax_backward_data(bar, p, -1, p.dtype, grad_input=out)

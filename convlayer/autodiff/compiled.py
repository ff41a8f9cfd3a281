"""A layer inside torch.compile: an operator for its solution and one for its adjoint, which the
compiler takes whole.

Operators take and return tensors, and in the graph the layer is a string: the hash of its
declaration and of the options that matter. A graph that was exported, or kept on disk, finds a
layer of that content in the process where it runs, or says that there is none.

What the adjoint needs of a solution, its factor, stays here under a number; the number is a tensor
among the outputs, whose memory, once nothing holds it any more, takes what it stands for with it.
Should the compiler have kept a copy of the number alone, the adjoint solves again.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, ParamSpec, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from convlayer.autodiff.derivative import Local
from convlayer.autodiff.torch_internals import at_home, in_forward_mode, recording

P = ParamSpec("P")
R = TypeVar("R")


NO_SCRIPT = (
    "A ConvexLayer is no TorchScript: torch.jit.trace and torch.jit.script would freeze one solution into the graph. "
    "Use torch.compile, or torch.export to save the model."
)
PLAIN_IN_GRAPHS = (
    "Inside torch.compile a layer takes tensors alone, one at least: give `solver_args` to with_options, and `ids` as a "
    "tensor."
)


class Served(Protocol):
    """What the operators ask of a layer as it is now."""

    @property
    def graph_name(self) -> str:
        """The content of the layer, the same in every process."""

    def evaluated(
        self, thetas: Sequence[Tensor], ids: Tensor | None, differentiable: bool
    ) -> tuple[list[Tensor], Local]:
        """The outputs for plain parameters, apart from every graph, and their derivative."""

    def blank(self, thetas: Sequence[Tensor]) -> list[Tensor]:
        """Outputs of the right shape, dtype and device, without values."""


class Layer(Protocol):
    """A layer, whose options may change while graphs hold its name."""

    @property
    def _front(self) -> Served: ...


def _without_tangents() -> None:
    """An operator drops tangents without a word, and whether it is given any cannot be seen from
    inside."""
    if in_forward_mode():
        raise RuntimeError(
            "Inside torch.compile a layer has no forward mode: its tangent would be zero. Compile no function that takes jvp, jacfwd or "
            "hessian of the layer, and call no compiled model with dual tensors, or inside a dual level."
        )


class _Layers:
    """The layers of this process, for as long as they live; threads may build and look for them at
    once."""

    def __init__(self) -> None:
        self._lock, self._numbers = threading.RLock(), itertools.count(1)
        self._by_number: weakref.WeakValueDictionary[str, Layer] = weakref.WeakValueDictionary()
        # Those that a graph has asked for; of several of one content the last that was compiled.
        self._by_name: weakref.WeakValueDictionary[str, Layer] = weakref.WeakValueDictionary()

    def add(self, layer: Layer) -> str:
        """A number for it, of this process."""
        with self._lock:
            number = str(next(self._numbers))
            self._by_number[number] = layer
        return number

    def named(self, number: str) -> str:
        """The name of the layer with this number, which serves graphs that have the name from now
        on."""
        with self._lock:
            layer = self._by_number[number]
        # Made only now: building a layer does not wait for its name.
        name = layer._front.graph_name
        with self._lock:
            self._by_name[name] = layer
        return name

    def find(self, name: str) -> Layer | None:
        """A layer of this name: one that has served it, or else the one built last."""
        with self._lock:
            layer, alive = self._by_name.get(name), list(self._by_number.values())
        if layer is not None and layer._front.graph_name == name:
            return layer
        layer = next((layer for layer in reversed(alive) if layer._front.graph_name == name), None)
        if layer is not None:
            with self._lock:
                self._by_name[name] = layer
        return layer


_layers = _Layers()
# What adjoints need, by the numbers that stand for it in graphs. One operation of a dict, which
# threads do not part.
_kept: dict[int, Local] = {}
_numbers = itertools.count(1)


def registered(layer: Layer) -> str:
    """A number by which the layer's name is found, for as long as it lives."""
    return _layers.add(layer)


def name(number: str, on_failure: str, validate: bool) -> str:
    """The name in a graph of the layer with this number; told what of it may change, so that the
    compiler looks at it."""
    return _layers.named(number)


# As torch.compiler.assume_constant_result, which imports the compiler.
name._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _layer(wanted: str) -> Layer:
    """A layer of this content."""
    layer = _layers.find(wanted)
    if layer is None:
        raise RuntimeError(
            f"This graph holds a ConvexLayer (declaration {wanted}) that does not exist in this process. Build the layer first, of the same "
            "problem, parameters, variables and options as the one that was compiled or exported, and keep it while the graph is in use."
        )
    return layer


def _keep(local: Local) -> Tensor:
    """A number for what is kept, in memory that drops it when it is freed."""
    number = next(_numbers)
    memory = np.array([number])
    _kept[number] = local
    weakref.finalize(memory, _kept.pop, number, None).atexit = False
    return torch.from_numpy(memory)


@torch.library.custom_op("convlayer::solve", mutates_args=())
def _solve(
    thetas: Sequence[Tensor], ids: Tensor | None, layer: str, differentiable: bool
) -> list[Tensor]:
    _without_tangents()
    with recording(), at_home():
        outputs, local = _layer(layer)._front.evaluated(thetas, ids, differentiable)
    number = _keep(local) if differentiable else torch.zeros(1, dtype=torch.int64)
    return [*(output.clone(memory_format=torch.contiguous_format) for output in outputs), number]


@_solve.register_fake
def _(thetas, ids, layer, differentiable):
    _without_tangents()
    return [*_layer(layer)._front.blank(thetas), torch.empty(1, dtype=torch.int64)]


@torch.library.custom_op("convlayer::adjoint", mutates_args=())
def _adjoint(
    thetas: Sequence[Tensor],
    number: Tensor,
    bars: Sequence[Tensor],
    needed: Sequence[bool],
    layer: str,
) -> list[Tensor]:
    local = _kept.get(int(number))
    with recording(), at_home():
        if local is None:
            _, local = _layer(layer)._front.evaluated(thetas, None, True)
        cotangents = local.cotangent(thetas, bars, needed)
    return [part.clone(memory_format=torch.contiguous_format) for part in cotangents]


@_adjoint.register_fake
def _(thetas, number, bars, needed, layer):
    return [
        torch.empty_like(theta, memory_format=torch.contiguous_format)
        for theta, need in zip(thetas, needed, strict=True)
        if need
    ]


def _save(ctx: Any, inputs: tuple, output: list[Tensor]) -> None:
    thetas, _, ctx.layer, _ = inputs
    ctx.needed = [theta.requires_grad for theta in thetas]
    ctx.save_for_backward(output[-1], *thetas)


def _backward(ctx: Any, bars: Sequence[Tensor]) -> tuple:
    number, *thetas = ctx.saved_tensors
    cotangents = iter(_adjoint(thetas, number, list(bars[:-1]), ctx.needed, ctx.layer))
    return [next(cotangents) if need else None for need in ctx.needed], None, None, None


_solve.register_autograd(_backward, setup_context=_save)


def outside_graphs(function: Callable[P, R]) -> Callable[P, R]:
    """torch.compiler.disable, asked for when there is something to compile: as a decorator it loads
    the compiler at import."""

    @wraps(function)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> R:
        if not torch.compiler.is_compiling():
            return function(*args, **kwargs)
        return torch.compiler.disable(function)(*args, **kwargs)

    return guarded


def outputs(thetas: Sequence[Tensor], ids: Tensor | None, layer: str) -> tuple[Tensor, ...]:
    """The layer's outputs, as one operator of the graph."""
    differentiable = torch.is_grad_enabled() and any(theta.requires_grad for theta in thetas)
    return tuple(torch.ops.convlayer.solve(list(thetas), ids, layer, differentiable)[:-1])

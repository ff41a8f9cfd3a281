"""A solution map as torch sees it: every mode of differentiation, to second order, from four
numerical routines.

A path solves on plain tensors and leaves a `Local`: the solution near the parameters, which can
pull a cotangent back, push a tangent forward, and do both to second order. The functions here make
of that what torch composes: reverse mode twice, forward mode, forward over reverse, vmap over any
argument, nested. A third derivative is an error.

With z the solution and D its derivative in the parameters:

    Solved      z                       jvp: Tangent     vjp: Cotangent
    Tangent     D a                     jvp: Second      vjp: Mixed, Cotangent
    Cotangent   D' z_bar                jvp: Mixed       vjp: Mixed, Tangent
    Second      D^2[a, b]               refused
    Mixed       z_bar' D^2[a, .]        refused: it is the derivative of both Tangent and Cotangent in the parameters

vmap adds a batch dimension, which the paths take as they take any other, so that a vmapped layer is
one batched solve; `_Transformable.batched` shows what becomes of the shapes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from convlayer.autodiff.threads import few_threads_to_differentiate
from convlayer.autodiff.torch_internals import (
    in_vmap_alone,
    is_reached,
    is_view,
    made_at_home,
    plain_gradients,
)

Tensors = Sequence[Tensor]
# What a third derivative is answered with.
THIRD = "ConvexLayer can be differentiated twice, not three times: a third derivative is not implemented, and would be wrong."


class Local(ABC):
    """A solution near the parameters where it was found. Everything is plain; `thetas` are the
    parameters that were solved for, where derivatives are wanted for each row of the batch expanded
    to them."""

    @abstractmethod
    def cotangent(self, thetas: Tensors, bars: Tensors, needed: Sequence[bool]) -> list[Tensor]:
        """D' bars, for the parameters that are needed."""

    @abstractmethod
    def tangent(self, thetas: Tensors, a: Tensors) -> list[Tensor]:
        """D a."""

    @abstractmethod
    def second(self, thetas: Tensors, a: Tensors, b: Tensors) -> list[Tensor]:
        """D^2[a, b]."""

    @abstractmethod
    def mixed(
        self, thetas: Tensors, bars: Tensors, a: Tensors, needed: Sequence[bool]
    ) -> list[Tensor]:
        """bars' D^2[a, .], for the parameters that are needed."""


def _on_one_thread(method: Callable[..., list[Tensor]]) -> Callable[..., list[Tensor]]:
    """Small work runs on one torch thread."""

    @wraps(method)
    def guarded(self: Any, thetas: Tensors, *arguments: Any) -> list[Tensor]:
        with few_threads_to_differentiate(thetas):
            return method(self, thetas, *arguments)

    return guarded


class Recorded(Local):
    """From a graph that torch recorded on the way, and a function that says the solution again,
    twice differentiable."""

    def __init__(
        self,
        leaves: Tensors,
        outputs: Tensors,  # with their graph back to the leaves
        again: Callable[..., Tensors],  # leaves -> outputs
        guard: Callable[[Tensors], Tensors],  # of cotangents of the outputs,
        spoil: Callable[[Tensors], list[Tensor]],  # and of their tangents
    ) -> None:
        self.leaves, self.outputs, self.again, self.guard, self.spoil = (
            leaves,
            outputs,
            again,
            guard,
            spoil,
        )

    @_on_one_thread
    def cotangent(self, thetas: Tensors, bars: Tensors, needed: Sequence[bool]) -> list[Tensor]:
        # D' bars
        bars = self.guard(bars)
        if all(theta.shape == leaf.shape for theta, leaf in zip(thetas, self.leaves, strict=True)):
            return pulled(self.outputs, _only(self.leaves, needed), bars, retain_graph=True)
        with torch.enable_grad():
            leaves = _leaves(thetas)
            return pulled(self.again(*leaves), _only(leaves, needed), bars)

    @_on_one_thread
    def tangent(self, thetas: Tensors, a: Tensors) -> list[Tensor]:
        # D a is the gradient of <D' c, a> in c. torch's forward mode would do, but has one level
        # for all threads, and a second derivative in reverse mode, which comes here, is to be had
        # from any; nor does it nest inside a dual level of the user's.
        with torch.enable_grad():
            leaves = _leaves(thetas)
            outputs = self.again(*leaves)
            c = [torch.zeros_like(output, requires_grad=True) for output in outputs]
            return self.spoil(pulled(pulled(outputs, leaves, c, create_graph=True), c, a))

    @_on_one_thread
    def second(self, thetas: Tensors, a: Tensors, b: Tensors) -> list[Tensor]:
        def tangent(*at: Tensor) -> tuple[Tensor, ...]:
            """D a there."""
            return torch.func.jvp(lambda *x: tuple(self.again(*x)), at, tuple(a))[1]

        return self.spoil(
            torch.func.jvp(tangent, tuple(theta.detach() for theta in thetas), tuple(b))[1]
        )

    @_on_one_thread
    def mixed(
        self, thetas: Tensors, bars: Tensors, a: Tensors, needed: Sequence[bool]
    ) -> list[Tensor]:
        with torch.enable_grad():
            leaves = _leaves(thetas)
            # The gradient of <D' bars, a>.
            cotangents = pulled(self.again(*leaves), leaves, self.guard(bars), create_graph=True)
            return pulled(cotangents, _only(leaves, needed), a)


def _leaves(thetas: Tensors) -> list[Tensor]:
    return [theta.detach().requires_grad_() for theta in thetas]


def _only(tensors: Tensors, needed: Sequence[bool]) -> list[Tensor]:
    return [tensor for tensor, need in zip(tensors, needed, strict=True) if need]


def pulled(
    outputs: Tensors,
    inputs: Tensors,
    bars: Sequence[Tensor | None],
    plain: bool = False,
    **options: bool,
) -> list[Tensor]:
    """torch.autograd.grad, with zeros where no way leads from an output to an input; a cotangent of
    zero may be None. plain: without torch's checks, where all tensors are plain and retain_graph is
    the one option."""
    both = zip(outputs, bars, strict=True)
    pairs = [(output, bar) for output, bar in both if output.requires_grad and bar is not None]
    if not pairs or not inputs:
        return [torch.zeros_like(x) for x in inputs]
    ends, starts = zip(*pairs, strict=True)
    if plain:
        return _filled(plain_gradients(ends, tuple(inputs), starts, **options), inputs)
    return _filled(torch.autograd.grad(ends, inputs, starts, allow_unused=True, **options), inputs)


class EvaluationPoint:
    """One call: how it is solved, and what is known once it is."""

    def __init__(
        self,
        ranks: Sequence[int],  # dimensions of each parameter, without those of the batch
        solve: Callable[[Tensors, bool], tuple[Tensors, Tensors, Local | None]] | None = None,
        local: Local | None = None,
    ) -> None:
        """solve: plain parameters, and whether they will be differentiated -> the solution, what
        else there is to say of its rows, and the Local. It is left out where the Local is known."""
        self.ranks, self.solve = ranks, solve
        self._local = local
        self.recorded = True  # whether a Local is wanted whatever the parameters
        self.outputs = 0  # how many there are

    @property
    def local(self) -> Local:
        assert self._local is not None
        return self._local

    @local.setter
    def local(self, local: Local | None) -> None:
        self._local = local


def solved(point: EvaluationPoint, thetas: Tensors) -> tuple[Tensor, ...]:
    """The solution, and what else there is to say, differentiable in every way; for parameters that
    are transformed."""
    point.recorded = not in_vmap_alone()
    return _Solved.apply(point, None, *thetas)


def anew(
    solve: Callable[[Tensors, bool], tuple[Tensors, Tensors, Local | None]], thetas: Tensors
) -> tuple[Tensor, ...]:
    """What `solve` finds for these parameters, differentiable in every way; it is called outside of
    any transform."""
    # Views: of a leaf it cannot be told whether a backward pass goes on to it, see `is_reached`.
    return _Solved.apply(
        EvaluationPoint([t.ndim for t in thetas], solve), None, *(t.view_as(t) for t in thetas)
    )


def known(solution: Tensors, local: Callable[[], Local], thetas: Tensors) -> tuple[Tensor, ...]:
    """A solution that was found, as a function of its parameters."""
    return anew(lambda _, __: ([part.detach() for part in solution], (), local()), thetas)


def pulled_back(
    point: EvaluationPoint, thetas: Tensors, first: Tensor, bars: Tensors, needed: Sequence[bool]
) -> list[Tensor | None]:
    """Cotangents of the parameters from those of the solution, of which `first` is the first
    output; differentiable once more."""
    return (
        _spread(_Cotangent.apply(point, needed, *thetas, first, *bars), needed)
        if any(needed)
        else [None] * len(thetas)
    )


class _Transformable(Function):
    """A function of (point, needed, *tensors). The tensors are the parameters, the solution's first
    output, then the groups.

    needed: which parameters the result is for, if it is like the parameters.
    """

    groups: tuple[str, ...] = ()  # "parameters" or "solution": what the further tensors are like
    result = "solution"

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        ctx.point, ctx.needed, *tensors = inputs
        ctx.n = len(ctx.point.ranks)
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @classmethod
    def batched(
        cls, info: Any, in_dims: tuple, point: EvaluationPoint, needed: Any, *tensors: Tensor
    ) -> tuple[Any, Any]:
        """vmap of this function, over any of its tensors.

        Where the parameters are mapped, and the solution with them, it is one call for the whole of
        it: the paths take a batch dimension more. Where only tangents or cotangents are mapped, as
        by jacrev, the solution is one, and they go one by one, with its factor.

        Example. A layer of A (3, 2), b (3,), c (2,) with a solution x (2,) is called with a batch
        of 7 for A and b, and mapped five times over b; this is the cotangent, of which A's and b's
        gradients are needed:

            tensor   from vmap       to the call     why
            b        (7, 5, 3) at 1  (5, 7, 3)       what is mapped comes first, before the batch
            A        (7, 3, 2)       (5, 7, 3, 2)    a gradient is wanted for each of the five
            c        (2,)            (2,)            one serves all: the call broadcasts it
            x        (5, 7, 2) at 0  (5, 7, 2)       the solution, mapped since b is
            x_bar    (7, 2)          (5, 7, 2)       what is like the solution has its shape

        and the results are A_bar (5, 7, 3, 2) and b_bar (5, 7, 3), mapped at 0. Were c mapped, (5,
        2), and not b, it would become (5, 1, 2): without the one, its five would be taken for the
        batch.
        """
        dims, mapped = in_dims[2:], [dim is not None for dim in in_dims[2:]]
        fronts = [
            t if dim is None else t.movedim(dim, 0) for t, dim in zip(tensors, dims, strict=True)
        ]
        # The solution's first output follows the parameters; `_Solved` has none, since it is what
        # finds it.
        of_one = bool(cls.groups) and not mapped[len(point.ranks)]
        route = cls._one_by_one if of_one else cls._as_one_batch
        results = route(point, needed, info.batch_size, fronts, mapped)
        return tuple(results), (0,) * len(results)

    @classmethod
    def _one_by_one(
        cls,
        point: EvaluationPoint,
        needed: Any,
        size: int,
        fronts: list[Tensor],
        mapped: list[bool],
    ) -> list[Tensor]:
        if not size:  # of outputs without entries: one of zeros tells the shapes
            pairs = zip(fronts, mapped, strict=True)
            fronts = [t.new_zeros(1, *t.shape[1:]) if is_mapped else t for t, is_mapped in pairs]
        rows = []
        for k in range(max(size, 1)):
            row = [t[k] if is_mapped else t for t, is_mapped in zip(fronts, mapped, strict=True)]
            rows.append(cls.apply(point, needed, *row))
        return [torch.stack(parts)[:size] for parts in zip(*rows, strict=True)]

    @classmethod
    def _as_one_batch(
        cls,
        point: EvaluationPoint,
        needed: Any,
        size: int,
        fronts: list[Tensor],
        mapped: list[bool],
    ) -> list[Tensor]:
        ranks, kinds = point.ranks, cls._kinds(len(point.ranks), len(fronts))
        shapes = [t.shape[is_mapped:] for t, is_mapped in zip(fronts, mapped, strict=True)]
        # The dimensions of the batch that is under way already, before the one that vmap adds.
        lead = max(
            (len(shape) - rank for shape, rank in zip(shapes, ranks, strict=False)), default=0
        )
        # A parameter gets the new dimension where it or what is like it is mapped, or its gradient
        # is wanted.
        wide = [cls.result == "parameters" and need for need in needed or [False] * len(ranks)]
        for kind, is_mapped in zip(kinds, mapped, strict=True):
            if kind is not None:
                wide[kind] = wide[kind] or is_mapped

        def entered(t: Tensor, is_mapped: bool, kind: int | None, shape: torch.Size) -> Tensor:
            """As the call wants it."""
            if kind is None:
                return t if is_mapped else t.expand(size, *shape)
            if not wide[kind]:
                return t
            ones = [1] * (lead - len(shape) + ranks[kind])
            t = t.reshape(size if is_mapped else 1, *ones, *shape)
            return t.expand(size, *t.shape[1:])

        everything = zip(fronts, mapped, kinds, shapes, strict=True)
        results = cls.apply(point, needed, *(entered(*one) for one in everything))
        if cls.result == "solution":
            return list(results)
        # Without the ones that stood for dimensions which this parameter does not have.
        wanted = [shape for shape, need in zip(shapes, needed, strict=False) if need]
        both = zip(results, wanted, strict=True)
        return [part.reshape(size, *shape) for part, shape in both]

    @classmethod
    def _kinds(cls, n: int, total: int) -> list[int | None]:
        """Of each tensor the parameter that it is like; None: the solution."""
        kinds: list[int | None] = list(range(n))
        if not cls.groups:
            return kinds
        outputs = total - n - 1 - n * cls.groups.count("parameters")
        kinds.append(None)
        for group in cls.groups:
            kinds += list(range(n)) if group == "parameters" else [None] * outputs
        return kinds


class _Solved(_Transformable):
    """z, and what else there is to say of its rows."""

    @staticmethod
    @made_at_home
    def forward(point: EvaluationPoint, needed: None, *thetas: Tensor) -> tuple[Tensor, ...]:
        assert point.solve is not None
        differentiable = point.recorded or any(theta.requires_grad for theta in thetas)
        outputs, rest, point.local = point.solve(thetas, differentiable)
        point.outputs = len(outputs)
        return *_apart(outputs), *rest

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        ctx.point, _, *thetas = inputs
        ctx.n, ctx.total = len(thetas), len(output)
        ctx.mark_non_differentiable(*output[ctx.point.outputs :])
        ctx.save_for_backward(*thetas, output[0])
        ctx.save_for_forward(*thetas, output[0])

    @staticmethod
    def backward(ctx: Any, *bars: Tensor) -> tuple[Tensor | None, ...]:
        # theta_bar = D' z_bar
        point, needed = ctx.point, ctx.needs_input_grad[2:]
        return (
            None,
            None,
            *_spread(
                _Cotangent.apply(point, needed, *ctx.saved_tensors, *bars[: point.outputs]), needed
            ),
        )

    @staticmethod
    def jvp(ctx: Any, _: None, __: None, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        # dz = D dtheta
        *thetas, first = ctx.saved_tensors
        dz = _Tangent.apply(ctx.point, None, *thetas, first, *_filled(tangents, thetas))
        return *dz, *[None] * (ctx.total - len(dz))


class _Tangent(_Transformable):
    """D a."""

    groups = ("parameters",)

    @staticmethod
    @made_at_home
    def forward(point: EvaluationPoint, needed: None, *tensors: Tensor) -> tuple[Tensor, ...]:
        thetas, _, a = _split(len(point.ranks), tensors)
        return _apart(point.local.tangent(thetas, a))

    @staticmethod
    def backward(ctx: Any, *bars: Tensor) -> tuple[Tensor | None, ...]:
        thetas, first, a = _split(ctx.n, ctx.saved_tensors)
        _, _, by_a = _split(ctx.n, ctx.needs_input_grad[2:])
        # Of bar' D a:  theta_bar = bar' D^2[a, .],  a_bar = D' bar
        thetas_bar = _thetas_bar(ctx, thetas, first, bars, a)
        a_bar: Sequence[Tensor | None] = [None] * ctx.n
        if any(by_a):
            a_bar = _spread(_Cotangent.apply(ctx.point, by_a, *thetas, first, *bars), by_a)
        return None, None, *thetas_bar, None, *a_bar

    @staticmethod
    def jvp(ctx: Any, _: None, __: None, *tangents: Tensor | None) -> tuple[Tensor, ...]:
        thetas, first, a = _split(ctx.n, ctx.saved_tensors)
        d_thetas, _first, d_a = _split(ctx.n, tangents)
        # d(D a) = D^2[a, dtheta] + D da
        parts = []
        if _any(d_thetas):
            parts.append(
                _Second.apply(ctx.point, None, *thetas, first, *a, *_filled(d_thetas, thetas))
            )
        if _any(d_a):
            parts.append(_Tangent.apply(ctx.point, None, *thetas, first, *_filled(d_a, thetas)))
        return _summed(parts)


class _Cotangent(_Transformable):
    """D' z_bar."""

    groups = ("solution",)
    result = "parameters"

    @staticmethod
    @made_at_home
    def forward(
        point: EvaluationPoint, needed: Sequence[bool], *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        thetas, _, bars = _split(len(point.ranks), tensors)
        return _apart(point.local.cotangent(thetas, bars, needed))

    @staticmethod
    def backward(ctx: Any, *a: Tensor) -> tuple[Tensor | None, ...]:
        thetas, first, bars = _split(ctx.n, ctx.saved_tensors)
        _, _, by_bars = _split(ctx.n, ctx.needs_input_grad[2:])
        # Of a' D' z_bar:  theta_bar = z_bar' D^2[a, .],  the cotangent of z_bar = D a
        direction = _filled(_spread(a, ctx.needed), thetas)
        thetas_bar = _thetas_bar(ctx, thetas, first, bars, direction)
        bars_bar: Sequence[Tensor | None] = [None] * len(bars)
        if any(by_bars):
            bars_bar = _Tangent.apply(ctx.point, None, *thetas, first, *direction)
        return None, None, *thetas_bar, None, *bars_bar

    @staticmethod
    def jvp(ctx: Any, _: None, __: None, *tangents: Tensor | None) -> tuple[Tensor, ...]:
        thetas, first, bars = _split(ctx.n, ctx.saved_tensors)
        d_thetas, _first, d_bars = _split(ctx.n, tangents)
        # d(D' z_bar) = z_bar' D^2[dtheta, .] + D' dz_bar
        parts = []
        if _any(d_thetas):
            parts.append(
                _Mixed.apply(
                    ctx.point, ctx.needed, *thetas, first, *bars, *_filled(d_thetas, thetas)
                )
            )
        if _any(d_bars):
            parts.append(
                _Cotangent.apply(ctx.point, ctx.needed, *thetas, first, *_filled(d_bars, bars))
            )
        return _summed(parts)


def _thetas_bar(
    ctx: Any, thetas: Tensors, first: Tensor, bars: Tensors, direction: Tensors
) -> Sequence[Tensor | None]:
    """bars' D^2[direction, .], where a backward goes on to parameters: the second derivative in
    them is not to be worked out where only that in a tangent or cotangent is asked for."""
    needs, _, _ = _split(ctx.n, ctx.needs_input_grad[2:])
    wanted = [need and is_reached(theta) for need, theta in zip(needs, thetas, strict=True)]
    if not any(wanted):
        return [None] * ctx.n
    return _spread(_Mixed.apply(ctx.point, wanted, *thetas, first, *bars, *direction), wanted)


class _Last(_Transformable):
    """What has no derivative here."""

    @staticmethod
    def backward(ctx: Any, *bars: Tensor) -> None:
        raise RuntimeError(THIRD)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> None:
        raise RuntimeError(THIRD)


class _Second(_Last):
    """D^2[a, b]."""

    groups = ("parameters", "parameters")

    @staticmethod
    @made_at_home
    def forward(point: EvaluationPoint, needed: None, *tensors: Tensor) -> tuple[Tensor, ...]:
        n = len(point.ranks)
        thetas, _, directions = _split(n, tensors)
        return _apart(point.local.second(thetas, directions[:n], directions[n:]))


class _Mixed(_Last):
    """z_bar' D^2[a, .]."""

    groups = ("solution", "parameters")
    result = "parameters"

    @staticmethod
    @made_at_home
    def forward(
        point: EvaluationPoint, needed: Sequence[bool], *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        n = len(point.ranks)
        thetas, _, rest = _split(n, tensors)
        bars, a = rest[: len(rest) - n], rest[len(rest) - n :]
        return _apart(point.local.mixed(thetas, bars, a, needed))


for _kind in (_Solved, _Tangent, _Cotangent, _Second, _Mixed):
    _kind.vmap = _kind.batched  # type: ignore[method-assign]


def _apart(parts: Tensors) -> tuple[Tensor, ...]:
    """Each in memory of its own, which forward mode needs: a tangent is laid out as what it is the
    tangent of."""
    with few_threads_to_differentiate(parts):
        return tuple(
            part.clone(memory_format=torch.contiguous_format)
            if is_view(part) or not part.is_contiguous()
            else part
            for part in parts
        )


def _split(n: int, tensors: Sequence) -> tuple[Sequence, Any, Sequence]:
    """Parameters, the solution's first output, and what follows."""
    return tensors[:n], tensors[n], tensors[n + 1 :]


def _spread(parts: Tensors, needed: Sequence[bool]) -> list[Tensor | None]:
    """One for each parameter, None where it is not needed."""
    rest = iter(parts)
    return [next(rest) if need else None for need in needed]


def _filled(parts: Sequence[Tensor | None], like: Tensors) -> list[Tensor]:
    """Zeros where there is none."""
    return [
        torch.zeros_like(x) if part is None else part for part, x in zip(parts, like, strict=True)
    ]


def _any(parts: Sequence[Tensor | None]) -> bool:
    return any(part is not None for part in parts)


def _summed(parts: list[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    return tuple(sum(part[1:], part[0]) for part in zip(*parts, strict=True))

"""How a solution is differentiated: the layer's `gradient=`.

exact       the implicit function theorem; one-sided or least-norm where there is no derivative, and flagged
smoothed    the derivative of the solution on the central path, at complementarity kappa in the row's own units
lpgd        a secant of two perturbed solutions in place of the derivative, for any problem
perturbed   linear objectives: the derivative of the solution averaged over noise in the costs
blackbox    linear objectives: the gradient of an interpolation of the loss between vertices

All but the first are of the cone program, and the last three are first derivatives in reverse mode
and nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from convlayer.autodiff.derivative import Tensors
from convlayer.declaration.canonical import Canonical
from convlayer.declaration.diagnose import ProblemError
from convlayer.paths.cone_call import ConeFound
from convlayer.paths.cone_derivative import ConeDerivative, Term, not_finite, spoilt
from convlayer.paths.cone_solution import on_central_path, resolved
from convlayer.paths.surrogates import Solve, blackbox, lpgd, perturbed

SIDES = {"both": (1, -1), "right": (1,), "left": (-1,)}


class Gradient:
    """One way to differentiate; its fields are the layer's `gradient_args`."""

    name: ClassVar[str]

    def check(self, canonical: Canonical) -> None:
        """ProblemError: it does not apply to this problem, and why."""

    def __call__(self, found: ConeFound, exact: ConeDerivative) -> ConeDerivative:
        raise NotImplementedError


@dataclass(frozen=True)
class Exact(Gradient):
    """The derivative of the solution map; where there is none, by rule and flagged."""

    name = "exact"

    def __call__(self, found: ConeFound, exact: ConeDerivative) -> ConeDerivative:
        return exact


@dataclass(frozen=True)
class Smoothed(Gradient):
    """The derivative of the solution with a logarithmic barrier.

        (x_k, s_k, y_k):   Px + q + A'y = 0,   Ax + s = b,   s o y = k e   (y = -k grad f(s) where the cone is not symmetric)

    Smooth in every parameter, and nearly the exact derivative where every |s - y| is far above
    sqrt(kappa). The solution itself stays exact, and so does the derivative of the optimal value.

    kappa: without a unit. s and y above are those of the row in its own units, in which the largest
           entries of its solution and of its multipliers are of size one (where a solution is all
           but zero, the data say what one is); in the user's units the product is kappa times both
           sizes. So it means the same whatever the units, and rows of one batch differ in what it
           is in theirs.
    """

    name = "smoothed"
    kappa: float = 1e-3

    def __post_init__(self) -> None:
        _positive(self, "kappa")

    def __call__(self, found: ConeFound, exact: ConeDerivative) -> ConeDerivative:
        point, adjoint = on_central_path(found, exact, self.kappa)
        return _SmoothedDerivative(
            exact.canonical, exact.make_data, exact.solution, point, adjoint, None
        )


@dataclass(frozen=True)
class Lpgd(Gradient):
    """Lagrangian proximal gradient descent, see `surrogates.lpgd`.

    tau: size of the perturbation relative to the costs; rho: of the proximal term 1/(2 rho) |x -
         x*|^2, inf for none.
    side: "both", or "right" or "left" for one perturbed solution and the solution itself.
    absolute: tau multiplies the loss's gradient as it is, whatever the costs.
    """

    name = "lpgd"
    tau: float = 1.0
    rho: float = math.inf
    side: str = "both"
    absolute: bool = False

    def __post_init__(self) -> None:
        _positive(self, "tau")
        if not self.rho > 0:
            raise ValueError(f"`rho` must be positive; got {self.rho!r}.")
        if self.side not in SIDES:
            raise ValueError(
                f"`side` must be one of {', '.join(map(repr, SIDES))}; got {self.side!r}."
            )

    def __call__(self, found: ConeFound, exact: ConeDerivative) -> ConeDerivative:
        solve, options = (
            resolved(found.request),
            (self.tau, self.rho, SIDES[self.side], self.absolute),
        )

        def pull(x_bar: Tensor, y_bar: Tensor) -> Term:
            return Term(*lpgd(exact.data, exact.x, exact.y, x_bar, y_bar, solve, *options))

        return _Surrogate(exact, self.name, pull)


class _OfCosts(Gradient):
    """A derivative in the costs of a linear objective, and in nothing else."""

    def check(self, canonical: Canonical) -> None:
        if len(canonical.program.P_rows):
            raise ProblemError(
                f"gradient={self.name!r} is for linear objectives, and this one is quadratic: take 'lpgd' or 'smoothed'."
            )
        if any(canonical.maps[name].back for name in ("A", "b")):
            raise ProblemError(
                f"gradient={self.name!r} differentiates in the costs of a linear objective; here a parameter enters the constraints "
                "(or a term of the objective that is not linear): take 'lpgd' or 'smoothed'."
            )

    def bar(self, exact: ConeDerivative, x_bar: Tensor, solve: Solve, moving: Tensor) -> Tensor:
        """The cotangent of q; moving (n,): where parameters enter it."""
        raise NotImplementedError

    def __call__(self, found: ConeFound, exact: ConeDerivative) -> ConeDerivative:
        moving = torch.zeros(exact.x.shape[1], dtype=torch.bool)
        for back in exact.canonical.maps["q"].back.values():
            moving[torch.from_numpy(back.read)] = True
        solve = resolved(found.request)

        def pull(x_bar: Tensor, y_bar: Tensor) -> Term:
            if bool(y_bar.any()):
                raise _refused(self.name, "derivative of multipliers")
            q_bar = self.bar(exact, x_bar, solve, moving)
            return Term(exact.x, exact.y, -q_bar, torch.zeros_like(y_bar))

        return _Surrogate(exact, self.name, pull)


@dataclass(frozen=True)
class Perturbed(_OfCosts):
    """The derivative of the solution averaged over Gaussian noise in the costs, see
    `surrogates.perturbed`.

    sigma: of the noise, relative to the costs; samples: an even number; seed: of the noise, the
           same in every call.
    """

    name = "perturbed"
    sigma: float = 0.5
    samples: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        _positive(self, "sigma")
        if not isinstance(self.samples, int) or self.samples < 2 or self.samples % 2:
            raise ValueError(
                f"`samples` must be an even number, as noise comes in pairs; got {self.samples!r}."
            )

    def bar(self, exact: ConeDerivative, x_bar: Tensor, solve: Solve, moving: Tensor) -> Tensor:
        return perturbed(exact.data, x_bar, solve, self.sigma, self.samples, self.seed, moving)


@dataclass(frozen=True)
class Blackbox(_OfCosts):
    """The gradient of an interpolation between vertices, see `surrogates.blackbox`. lam: size of
    the step, relative to the costs."""

    name = "blackbox"
    lam: float = 1.0

    def __post_init__(self) -> None:
        _positive(self, "lam")

    def bar(self, exact: ConeDerivative, x_bar: Tensor, solve: Solve, moving: Tensor) -> Tensor:
        return blackbox(exact.data, exact.x, x_bar, solve, self.lam, moving)


GRADIENTS: dict[str, type[Gradient]] = {
    kind.name: kind for kind in (Exact, Smoothed, Lpgd, Perturbed, Blackbox)
}


def gradient_of(gradient: str | Gradient, arguments: Mapping[str, Any] | None) -> Gradient:
    """By its name, or as it is. TypeError, ValueError: no gradient, or what is no argument of this
    one."""
    if isinstance(gradient, Gradient) and not arguments:
        return gradient
    if gradient not in GRADIENTS:
        raise ValueError(
            f"`gradient` must be one of {', '.join(map(repr, GRADIENTS))}; got {gradient!r}."
        )
    kind = GRADIENTS[gradient]
    known = kind.__dataclass_fields__.keys()  # type: ignore[attr-defined]
    unknown = (arguments or {}).keys() - known
    if unknown:
        takes = ", ".join(known) or "none"
        raise TypeError(
            f"gradient={gradient!r} has no argument {', '.join(map(repr, sorted(unknown)))}; it takes: {takes}."
        )
    return kind(**(arguments or {}))


def _positive(gradient: Any, name: str) -> None:
    value = getattr(gradient, name)
    if not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ValueError(f"`{name}` must be a positive number; got {value!r}.")


class _SmoothedDerivative(ConeDerivative):
    def second(self, entries: Tensors, a: Tensors, b: Tensors) -> list[Tensor]:
        raise _refused("smoothed", "second derivatives")

    def mixed(
        self, entries: Tensors, bars: Tensors, a: Tensors, needed: Sequence[bool]
    ) -> list[Tensor]:
        raise _refused("smoothed", "second derivatives")


class _Surrogate(ConeDerivative):
    """Cotangents alone, by what `pull` makes of those of x and y."""

    def __init__(
        self, exact: ConeDerivative, name: str, pull: Callable[[Tensor, Tensor], Term]
    ) -> None:
        super().__init__(
            exact.canonical, exact.make_data, exact.solution, exact.point, exact.adjoint, None
        )
        self._name, self._pull = name, pull

    def term(self, x_bar: Tensor, y_bar: Tensor) -> Term:
        self.check_unchanged()
        lost = not_finite(x_bar, y_bar)
        if lost is None:
            return self._pull(x_bar, y_bar)
        x, y, w, u = self._pull(x_bar.masked_fill(lost, 0.0), y_bar.masked_fill(lost, 0.0))
        return Term(x, y, *spoilt((w, u), lost))

    def tangent(self, entries: Tensors, a: Tensors) -> list[Tensor]:
        raise _refused(self._name, "forward mode")

    def second(self, entries: Tensors, a: Tensors, b: Tensors) -> list[Tensor]:
        raise _refused(self._name, "second derivatives")

    def mixed(
        self, entries: Tensors, bars: Tensors, a: Tensors, needed: Sequence[bool]
    ) -> list[Tensor]:
        raise _refused(self._name, "second derivatives")


def _refused(name: str, what: str) -> RuntimeError:
    return RuntimeError(
        f"gradient={name!r} is a first derivative, and has no {what}: gradient='exact' does."
    )

"""Derivatives of a cone program's solution in its data, to second order, by solves with the factor
of the first.

With F(x, v) = 0 the residual map at the solution, a direction `a` of the data moves it by

    J (x_a, v_a) = -(dP x + dA'y + dq ; dA x - db),   y_a = Dv_a,   s_a = y_a - v_a,

and as (x, -y) is the gradient of the optimal value in (q, b), the map (x_bar, y_bar) -> (w, u) of
the adjoint is symmetric and is this map too. Once more, in a direction b, with k = Pi_K*''(v)[v_a,
v_b] the curvature of the cone:

    J (x_ab, v_ab) = -(r + A'k ; t + k),   y_ab = Dv_ab + k,
    r = dP_a x_b + dP_b x_a + dA_a'y_b + dA_b'y_a,   t = dA_a x_b + dA_b x_a.

y may be 1e16 times as large as s, which v = y - s would not tell any more. Cones are cones in all
units: k is of v' = alpha y - beta s, numbers of a cone's own, and moves y by k / alpha and s by k /
beta.

The optimal value moves by its Lagrangian's derivative, x'dP x/2 + dq'x + y'(dA x - db) + dd.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from convlayer.autodiff.derivative import Local, Tensors
from convlayer.autodiff.torch_internals import versions
from convlayer.conic.adjoint import pull_back, pull_back_whole
from convlayer.conic.program import DENSE_ENTRIES, Data, Operators
from convlayer.conic.residual import in_groups, largest
from convlayer.declaration.canonical import Canonical

NOISE = 1e-12  # share of the largest entry below which one of y or s is rounding
WHOLE_ENTRIES = 16 * DENSE_ENTRIES  # numbers that dense matrices of a whole batch may hold


class Term(NamedTuple):
    """What a cotangent of P and A is made of: dA = -(y w' + u x'), dP = -(w x' + x w')/2."""

    x: Tensor
    y: Tensor
    w: Tensor
    u: Tensor


def entries_bar(
    canonical: Canonical,
    lengths: Sequence[int],  # rows of each parameter, B or 1
    wanted: Sequence[int],
    terms: Sequence[Term],
    vectors: dict[str, Tensor],  # cotangents of q, b and d, (B, .)
) -> dict[int, Tensor]:
    """Cotangents of the data -> those of the entries of the parameters that are wanted, (B or 1,
    size)."""
    program, batch = canonical.program, len(terms[0].x)
    maps, bars = {name: canonical.maps[name] for name in ("P", "A", *vectors)}, dict(vectors)
    for name in ("P", "A"):
        if not any(k in canonical.maps[name].back for k in wanted):
            del maps[name]
            continue
        entries = program.n * (program.n if name == "P" else program.m)
        if 4 * len(canonical.moving[name]) >= entries and batch * entries <= WHOLE_ENTRIES:
            maps[name] = canonical.dense_maps[name]
            parts = [pull_back_whole(name, *term) for term in terms]
        else:
            moving = torch.from_numpy(canonical.moving[name])
            parts = [pull_back(name, program, moving, *term) for term in terms]
        bars[name] = sum(parts[1:], parts[0])
    found: dict[int, Tensor] = {}
    for k in wanted:
        for name, mapping in maps.items():
            if k in mapping.back:
                part = mapping.back[k](
                    bars[name] if lengths[k] == batch else bars[name].sum(0, keepdim=True)
                )
                found[k] = found[k] + part if k in found else part
    return found


@dataclass(frozen=True, eq=False)
class _Moved:
    """A direction of the data, and where it moves the solution."""

    operators: Operators  # dP and dA
    q: Tensor
    b: Tensor
    d: Tensor
    r: Tensor  # dP x + dA'y + dq, the derivative of the value's own in x,
    t: Tensor  # dA x - db, and in y
    x: Tensor
    y: Tensor
    s: Tensor


class ConeDerivative(Local):
    """The solution (x, y, value) as a function of the entries of the parameters, (B or 1, size)
    each."""

    def __init__(
        self,
        canonical: Canonical,
        data: Callable[[], Data],  # made anew where it is needed: the first derivative does without
        solution: tuple[Tensor, Tensor, Tensor],  # (x, y, value)
        # (x, s, y) whose derivative is taken for the solution's
        point: tuple[Tensor, Tensor, Tensor],
        adjoint: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
        tell: Callable[[Tensor, Tensor, dict[int, Tensor]], None] | None,
    ) -> None:
        """adjoint: (x_bar, y_bar) -> (w, u), zero in rows that failed. tell: asked, with the
        cotangents of x, the rows in use (B,) and what was found for each parameter, whether to
        warn.
        """
        self.canonical, self.solution, self.point = canonical, solution, point
        self.make_data, self._adjoint, self._tell = data, adjoint, tell
        self.x, self.s, self.y = point
        self._versions = versions([*solution, *point])

    @cached_property
    def data(self) -> Data:
        return self.make_data()

    @cached_property
    def operators(self) -> Operators:
        return Operators(self.data)

    def check_unchanged(self) -> None:
        if versions([*self.solution, *self.point]) != self._versions:
            raise RuntimeError(
                "An output of the layer was changed in place; its derivative needs it as it was."
            )

    def adjoint(self, x_bar: Tensor, y_bar: Tensor) -> tuple[Tensor, Tensor]:
        """NaN in rows whose cotangents are not finite: these have no part in a solve, and are no
        fault of its system."""
        self.check_unchanged()
        lost = not_finite(x_bar, y_bar)
        if lost is None:
            return self._adjoint(x_bar, y_bar)
        return spoilt(
            self._adjoint(x_bar.masked_fill(lost, 0.0), y_bar.masked_fill(lost, 0.0)), lost
        )

    def cotangent(
        self, entries: Tensors, bars: Tensors, needed: Sequence[bool], failed: Tensor | None = None
    ) -> list[Tensor]:
        """`failed` (B,) rows get NaN."""
        x_bar, y_bar, value_bar = bars
        term = self.term(x_bar, y_bar)
        if failed is not None:
            term.w[failed], term.u[failed] = torch.nan, torch.nan
        (x, y, w, u), v = term, value_bar.unsqueeze(1)
        if not bool(value_bar.any()):
            found = self._to_entries(entries, needed, [term], {"q": -w, "b": u, "d": v})
            self._told(x_bar, y_bar, dict(zip(_wanted(needed), found, strict=True)))
            return found
        # The optimal value's derivative is that of the Lagrangian: half of it has the form of an
        # adjoint of its own.
        x_value, y_value, _ = self.solution
        vectors = {"q": v * x_value - w, "b": u - v * y_value, "d": v}
        if x is x_value:
            terms = [Term(x, y, w - v * x / 2, u - v * y / 2)]
        else:
            terms = [term, Term(x_value, y_value, -v * x_value / 2, -v * y_value / 2)]
        self._told(x_bar, y_bar, {})
        return self._to_entries(entries, needed, terms, vectors)

    def _told(self, x_bar: Tensor, y_bar: Tensor, found: dict[int, Tensor]) -> None:
        if self._tell is not None:
            self._tell(x_bar, (x_bar != 0).any(1) | (y_bar != 0).any(1), found)

    def term(self, x_bar: Tensor, y_bar: Tensor) -> Term:
        """What the cotangents of the data are made of: dq = -w, db = u, and those of P and A."""
        return Term(self.x, self.y, *self.adjoint(x_bar, y_bar))

    def tangent(self, entries: Tensors, a: Tensors) -> list[Tensor]:
        moved, (x, y, _) = self._moved(a), self.solution
        self._told(moved.r, moved.t, {})
        value = ((moved.operators.P(x) / 2 + moved.q) * x).sum(1) + moved.d.squeeze(1)
        return [moved.x, moved.y, value + (y * (moved.operators.A(x) - moved.b)).sum(1)]

    def second(self, entries: Tensors, a: Tensors, b: Tensors) -> list[Tensor]:
        one, two = self._moved(a), self._moved(b)
        alpha, beta = self._units
        k = self._curvature(one, alpha * two.y - beta * two.s)
        of_y, of_s = k / alpha, k / beta
        r, t = (
            sum(parts)
            for parts in zip(
                _image(one.operators, two.x, two.y),
                _image(two.operators, one.x, one.y),
                strict=True,
            )
        )
        x, y = self.adjoint(-(r + self.operators.At(of_y)), -(t + of_s))
        return [x, y + of_y, (two.x * one.r).sum(1) + (two.y * one.t).sum(1)]

    def mixed(
        self, entries: Tensors, bars: Tensors, a: Tensors, needed: Sequence[bool]
    ) -> list[Tensor]:
        x_bar, y_bar, value_bar = bars
        w, u = self.adjoint(x_bar, y_bar)
        moved, v = self._moved(a), value_bar.unsqueeze(1)
        # <bars, D^2[a, b]> = -w'r - u't + (y_bar - Aw)'k / alpha - u'k / beta + value_bar dvalue,
        # for every direction b: first what it has of x_b and y_b, through whose adjoint it reaches
        # the data, then what it has of dP_b and dA_b.
        alpha, beta = self._units
        by_v = self._curvature(moved, (y_bar - self.operators.A(w)) / alpha - u / beta)
        by_y, by_s = alpha * by_v, beta * by_v
        r, t = _image(moved.operators, w, u)
        w_next, u_next = self.adjoint(
            v * moved.r - r + self.operators.At(by_s), v * moved.t - t + by_y
        )
        u_next = u_next - by_s
        terms = [Term(self.x, self.y, w_next, u_next), Term(moved.x, moved.y, w, u)]
        vectors = {"q": -w_next, "b": u_next, "d": torch.zeros_like(v)}
        return self._to_entries(entries, needed, terms, vectors)

    def _moved(self, a: Tensors) -> _Moved:
        """The data and the solution in a direction of the entries."""
        change = {name: mapping.linear(a, self.x) for name, mapping in self.canonical.maps.items()}
        P, q, A, b = (change[name] for name in ("P", "q", "A", "b"))
        batch = len(self.x)
        operators = Operators(Data(self.canonical.program, P, q, A, b))
        r, t = _image(operators, self.x, self.y)
        r, t = (r + q).expand(batch, -1), (t - b).expand(batch, -1)
        x, y = self.adjoint(-r, -t)
        return _Moved(operators, q, b, change["d"], r, t, x, y, -t - self.operators.A(x))

    def _curvature(self, moved: _Moved, h: Tensor) -> Tensor:
        """Pi_K*''(v')[v'_a, h]."""
        if self.canonical.program.is_polyhedral:
            return torch.zeros_like(h)
        alpha, beta = self._units
        v, v_a = alpha * self.y - beta * self.s, alpha * moved.y - beta * moved.s
        return self.canonical.program.cones.curvature_dual(v, v_a, h)

    @cached_property
    def _units(self) -> tuple[Tensor, Tensor]:
        """(alpha, beta), (B, m): y and s are of size one where their product, entry by entry, is
        the largest of their cone."""
        program, y, s = self.canonical.program, self.y.abs(), self.s.abs()
        ones = torch.ones_like(y)
        if program.is_polyhedral:
            return ones, ones
        group = program.on(y.device)["scale_group"]
        most = (
            (y * s == in_groups(y * s, group, program.m))
            & (y > NOISE * largest(y))
            & (s > NOISE * largest(s))
        )
        at = [in_groups(torch.where(most, part, 0.0), group, program.m) for part in (y, s)]
        both = (at[0] > 0) & (at[1] > 0)
        alpha, beta = (torch.where(both, 1 / torch.where(both, part, 1.0), 1.0) for part in at)
        return alpha, beta

    def _to_entries(
        self,
        entries: Tensors,
        needed: Sequence[bool],
        terms: Sequence[Term],
        vectors: dict[str, Tensor],
    ) -> list[Tensor]:
        wanted = _wanted(needed)
        found = entries_bar(self.canonical, [len(part) for part in entries], wanted, terms, vectors)
        return [found[k] if k in found else torch.zeros_like(entries[k]) for k in wanted]


def not_finite(x_bar: Tensor, y_bar: Tensor) -> Tensor | None:
    """(B, 1) the rows, if there are any."""
    if math.isfinite((x_bar.sum() + y_bar.sum()).item()):  # a finite sum has finite terms
        return None
    lost = ~(torch.isfinite(x_bar).all(1) & torch.isfinite(y_bar).all(1)).unsqueeze(1)
    return lost if bool(lost.any()) else None


def spoilt(parts: tuple[Tensor, Tensor], rows: Tensor) -> tuple[Tensor, Tensor]:
    """NaN in the rows whose adjoint is not to be trusted."""
    w, u = parts
    return w.masked_fill(rows, torch.nan), u.masked_fill(rows, torch.nan)


def _wanted(needed: Sequence[bool]) -> list[int]:
    return [k for k, need in enumerate(needed) if need]


def _image(operators: Operators, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """(Px + A'y, Ax)."""
    return operators.P(x) + operators.At(y), operators.A(x)

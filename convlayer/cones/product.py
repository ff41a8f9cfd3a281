"""A product of cones: blocks in row order, and blocks of a kind served by one batched call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from convlayer.cones.cone import Cone, from_basis, to_basis


class Block(NamedTuple):
    """One cone of a product, and where its rows begin."""

    cone: Cone
    start: int

    @property
    def name(self) -> str:
        return self.cone.name

    @property
    def size(self) -> int:
        return self.cone.size

    @property
    def parameter(self) -> float | int | None:
        """n of a psd cone, alpha of a power cone."""
        return self.cone.parameter

    @property
    def elementwise(self) -> bool:
        return self.cone.elementwise

    @property
    def rows(self) -> slice:
        return slice(self.start, self.start + self.cone.size)


class _Group(NamedTuple):
    """Blocks that one call serves, as (*batch, count, size)."""

    cone: Cone
    copies: int
    rows: slice | Tensor  # Tensor: (count * size,), on the CPU

    def take(self, x: Tensor) -> Tensor:
        """The rows of this group, (*batch, m) -> (*batch, count, size)."""
        return _rows_of(x, self.rows, -1).unflatten(-1, (self.copies, -1))

    def shaped(self, device: torch.device) -> slice | Tensor:
        """Where its rows are, block by block: a slice, or (count, size)."""
        return (
            self.rows
            if isinstance(self.rows, slice)
            else self.rows.to(device).unflatten(0, (self.copies, -1))
        )


class ProductSpectrum:
    """The derivative of a product's projection, D = U diag(values) U', with U orthogonal and block
    diagonal.

    Shapes:      values (*batch, m); `bases` lists (rows, basis) with basis (*batch, count, k, k),
                 or (*batch, count, k, 2) where two vectors stand for it (see `from_basis`), and
                 rows the slice, or the (count, k) tensor of indices, of the rows it acts on; rows
                 in no basis have U = I.
    """

    def __init__(self, values: Tensor, bases: Sequence[tuple[slice | Tensor, Tensor]] = ()) -> None:
        self.values = values
        self.bases = list(bases)

    @property
    def is_diagonal(self) -> bool:
        return not self.bases

    def to_basis(self, x: Tensor, columns: bool = False) -> Tensor:
        """U' x for x (*batch, m), or for every column of x (*batch, m, c) with `columns`; batches
        broadcast."""
        return self._rotate(x, columns, to_basis)

    def from_basis(self, x: Tensor, columns: bool = False) -> Tensor:
        """U x, with the shapes of `to_basis`."""
        return self._rotate(x, columns, from_basis)

    def index_select(self, rows: Tensor) -> ProductSpectrum:
        """The spectrum of a subset of a flattened batch, values (B, m) -> (len(rows), m)."""
        return ProductSpectrum(
            self.values[rows], [(where, basis[rows]) for where, basis in self.bases]
        )

    def put(self, rows: Tensor, other: ProductSpectrum) -> ProductSpectrum:
        """This one, with that of some rows of a flattened batch replaced."""
        bases = [
            (where, basis.index_copy(0, rows, new))
            for (where, basis), (_, new) in zip(self.bases, other.bases, strict=True)
        ]
        return ProductSpectrum(self.values.index_copy(0, rows, other.values), bases)

    def _rotate(self, x: Tensor, columns: bool, turn: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        if not self.bases:
            return x
        x = x if columns else x.unsqueeze(-1)
        batch = self.values.shape[:-1]
        if x.shape[:-2] != batch:
            x = x.expand(*torch.broadcast_shapes(batch, x.shape[:-2]), -1, -1)
        out = x.clone(memory_format=torch.contiguous_format)
        for rows, basis in self.bases:
            part = _rows_of(x, rows, -2).unflatten(-2, basis.shape[-3:-1])
            turned = turn(basis, part).flatten(-3, -2)
            if isinstance(rows, slice):
                out.narrow(-2, rows.start, rows.stop - rows.start).copy_(turned)
            else:
                out.index_copy_(-2, rows.flatten().to(x.device), turned)
        return out if columns else out.squeeze(-1)


class Product:
    """K = K_1 x ... x K_k, blocks in the order given; adjacent zero or nonnegative blocks become
    one.

    Dual:        Pi_K*(v) = v + Pi_K(-v) (Moreau), DPi_K*(v) = I - DPi_K(-v): the same basis, values
                 1 - values.
    Shapes:      v (*batch, m), m = size; m = 0 and empty batches included.
    """

    def __init__(self, cones: Sequence[Cone]) -> None:
        self.cones = tuple(_joined(cones))
        self.size = sum(cone.size for cone in self.cones)
        starts = [0]
        for cone in self.cones:
            starts.append(starts[-1] + cone.size)
        self.blocks = [Block(cone, start) for cone, start in zip(self.cones, starts)]
        members: dict[object, list[tuple[Cone, int]]] = {}
        for cone, start in zip(self.cones, starts):
            members.setdefault(cone.group, []).append((cone, start))
        self._groups: list[_Group] = []
        order: list[int] = []
        for pairs in members.values():
            rows = [row for cone, start in pairs for row in range(start, start + cone.size)]
            merged, count = type(pairs[0][0]).merge([cone for cone, _ in pairs])
            order += rows
            contiguous = rows[-1] - rows[0] == len(rows) - 1
            self._groups.append(
                _Group(
                    merged,
                    count,
                    slice(rows[0], rows[-1] + 1) if contiguous else torch.tensor(rows),
                )
            )
        self._restore = None if order == sorted(order) else torch.argsort(torch.tensor(order))

    def rows_of(self, kind: type[Cone]) -> Tensor:
        """(m,) bool, the rows of the cones of this kind."""
        return self._rows_where(lambda cone: isinstance(cone, kind))

    @property
    def curved(self) -> Tensor:
        """(m,) bool, the rows of the cones whose boundary is not made of flat faces."""
        return self._rows_where(lambda cone: cone.curved)

    def _rows_where(self, chosen: Callable[[Cone], bool]) -> Tensor:
        rows = torch.zeros(self.size, dtype=torch.bool)
        for block in self.blocks:
            if chosen(block.cone):
                rows[block.rows] = True
        return rows

    @property
    def inside(self) -> Tensor:
        """(m,) a point inside every cone; ones in the zero cone, which has none."""
        return torch.cat(
            [torch.zeros(0, dtype=torch.float64), *(cone.inside() for cone in self.cones)]
        )

    def project(self, v: Tensor) -> Tensor:
        """Pi_K(v)."""
        return self._assemble(
            v, [group.cone.project(group.take(v)).flatten(-2) for group in self._groups]
        )

    def project_dual(self, v: Tensor) -> Tensor:
        """Pi_K*(v)."""
        return v + self.project(-v)

    def linearise_dual(
        self, v: Tensor, tolerance: float = 0.0
    ) -> tuple[Tensor, Tensor, ProductSpectrum]:
        """y = Pi_K*(v), s = y - v = Pi_K(-v), and DPi_K*(v).

        s is the projection itself, not a difference, so its small components keep their accuracy.
        At a kink the branch is the one with the larger derivative of Pi_K at -v, the smaller of
        Pi_K* at v: rows count as free slack.
        """
        mirrored = -v
        slack, values = [], []
        bases: list[tuple[slice | Tensor, Tensor]] = []
        for group in self._groups:
            p, spectrum = group.cone.linearise(group.take(mirrored), tolerance)
            slack.append(p.flatten(-2))
            values.append(spectrum.values.flatten(-2))
            if spectrum.basis is not None:
                bases.append((group.shaped(v.device), spectrum.basis))
        s = self._assemble(v, slack)
        return v + s, s, ProductSpectrum(1 - self._assemble(v, values), bases)

    def straddle_dual(self, v: Tensor, tolerance: float) -> tuple[Tensor, ProductSpectrum, Tensor]:
        """Both branches of DPi_K* within `tolerance` of a kink: (weak, spectrum, known).

        weak (*batch, m): the directions, in the spectrum's basis, in which y and s may both begin
        to move: there one branch has the eigenvalue 0 and the other 1. The spectrum has their mean,
        1/2. known (*batch,): false where a cone whose branches have no common basis is as near to a
        kink.
        """
        mirrored = -v
        free, tight = [], []
        bases: list[tuple[slice | Tensor, Tensor]] = []
        known = torch.ones(v.shape[:-1], dtype=torch.bool, device=v.device)
        for group in self._groups:
            part = group.take(mirrored)
            p, spectrum = group.cone.linearise(part, tolerance)
            other = (
                group.cone.linearise(part, -tolerance)[1] if group.cone.two_branched else spectrum
            )
            if not group.cone.two_branched:
                known = known & (group.cone.margin(part, p) >= tolerance).all(-1)
            free.append(spectrum.values.flatten(-2))
            tight.append(other.values.flatten(-2))
            if spectrum.basis is not None:
                bases.append((group.shaped(v.device), spectrum.basis))
        above, below = 1 - self._assemble(v, tight), 1 - self._assemble(v, free)
        return above - below > 0.5, ProductSpectrum((above + below) / 2, bases), known

    def smooth_dual(self, v: Tensor, kappa: Tensor) -> tuple[Tensor, Tensor, ProductSpectrum]:
        """The smoothed `linearise_dual`: y inside K*, s inside K with y - s = v and y = -kappa grad
        f(s), and dy/dv.

        In a symmetric cone s o y = kappa e; rows of the zero cone, which has no inside, keep s = 0
        and y = v. kappa (*batch,) or (), positive.
        """
        mirrored, kappa = -v, kappa.unsqueeze(-1)
        slack, dual, values = [], [], []
        bases: list[tuple[slice | Tensor, Tensor]] = []
        for group in self._groups:
            p, r, spectrum = group.cone.smooth(group.take(mirrored), kappa)
            slack.append(p.flatten(-2))
            dual.append(r.flatten(-2))
            values.append(spectrum.values.flatten(-2))
            if spectrum.basis is not None:
                bases.append((group.shaped(v.device), spectrum.basis))
        y, s, d = (self._assemble(v, parts) for parts in (dual, slack, values))
        return y, s, ProductSpectrum(d, bases)

    def curvature_dual(self, v: Tensor, h: Tensor, g: Tensor) -> Tensor:
        """Pi_K*''(v)[h, g] = Pi_K''(-v)[h, g], (*batch, m)."""
        mirrored, parts = -v, []
        for group in self._groups:
            parts.append(
                group.cone.curvature(group.take(mirrored), group.take(h), group.take(g)).flatten(-2)
            )
        return self._assemble(v, parts)

    def margin(self, v: Tensor, s: Tensor) -> Tensor:
        """The least margin of the blocks at -v, the distance to the nearest kink of Pi_K*,
        (*batch,). s = Pi_K(-v)."""
        mirrored = -v
        margins = [
            group.cone.margin(group.take(mirrored), group.take(s)).amin(-1)
            for group in self._groups
        ]
        return torch.stack(margins, -1).amin(-1) if margins else v.new_full(v.shape[:-1], torch.inf)

    def describe(self) -> str:
        """In words, such as `2 zero, 10 nonnegative, 3 second-order (sizes 3, 4)`."""
        kinds: dict[type[Cone], list[Cone]] = {}
        for cone in self.cones:
            kinds.setdefault(type(cone), []).append(cone)
        parts = [kind.describe(cones) for kind, cones in kinds.items()]
        return ", ".join(parts) or "no rows"

    def __eq__(self, other: object) -> bool:
        return self.cones == other.cones if isinstance(other, Product) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.cones)

    def __reduce__(self) -> tuple[type[Product], tuple[tuple[Cone, ...]]]:
        return Product, (self.cones,)

    def __repr__(self) -> str:
        return f"Product({self.describe()})"

    def _assemble(self, v: Tensor, parts: list[Tensor]) -> Tensor:
        """Group results in row order."""
        if not parts:
            return torch.zeros_like(v)
        joined = torch.cat(parts, -1) if len(parts) > 1 else parts[0]
        return joined if self._restore is None else joined[..., self._restore.to(v.device)]


def _joined(cones: Sequence[Cone]) -> list[Cone]:
    """Adjacent elementwise blocks joined, empty ones dropped, cones that serve several blocks taken
    apart."""
    out: list[Cone] = []
    for _, members in groupby((cone for cone in cones if cone.size), key=type):
        run = list(members)
        if run[0].elementwise:
            out.append(run[0].merge(run)[0])
        else:
            out += [single for cone in run for single in cone.apart()]
    return out


def _rows_of(x: Tensor, rows: slice | Tensor, dim: int) -> Tensor:
    if isinstance(rows, slice):
        return x.narrow(dim, rows.start, rows.stop - rows.start)
    return x.index_select(dim, rows.flatten().to(x.device))

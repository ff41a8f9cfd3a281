"""Kinks that nobody feels: rows whose solution has a derivative in all that parameters move and
outputs read, though the cone program is degenerate there.

At a solution let W be the directions of the cones in which y and s are both zero (weakly active).
In a direction of the parameters the solution moves by a complementarity problem on W,

    P dx + A'dy = -r,   A dx + ds = -t,   (dx, dy, ds) linear outside W,
    0 <= ds_W  _|_  dy_W >= 0  (or W's own cones),

which is linear in the direction where dy_W = ds_W = 0 solves it: an epigraph that is squared, min
t^2 with t >= |z| at z = 0, stays at its apex to first order. Such a solution is one of the linear
system with D = 1/2 on W, where dy_W = -ds_W, and if that system is regular its only one. So one
factorisation, and one solve in a random direction of the parameters, decides with probability one.

A null vector of the system is felt only if some direction of the parameters works against it, or
some output reads it, or if it turns a direction of the parameters into another one for the
outputs: with multipliers y + eta the same dA exerts the force dA'(y + eta), the boundary of a cone
has another curvature, and a direction chooses among the multipliers. Two that are felt leave a
derivative all the same:

- Equalities with constant coefficients that depend on each other, as both marginals of a plan do.
  Parameters that move them apart leave the feasible set; along those that do not there is a
  derivative, and what the gradient says across is of no account. Their multipliers are not unique,
  and one that is an output stays flagged.
- A norm |z| that is zero at the solution, its z not free to stay there: the least |dz| is taken,
  which is linear if the norm's multiplier lies in the span of the z that the constraints ask for.
  With D = 1/2 on that cone the system says so.

Source: Robinson (1980); Bonnans and Shapiro (2000) for the problem of the directional derivative.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy.optimize import nnls
from torch import Tensor

from convlayer.cones import Product, ProductSpectrum, Zero
from convlayer.conic.kkt import DenseSystem, SparseSystem, factorise
from convlayer.conic.polish import MARGIN, Root, units_of
from convlayer.conic.program import Operators

# The share of a right-hand side along null vectors from which it works against them.
FELT = 1e-7
# The share of a response from which a weakly active direction takes part in it.
MOVED = 1e-6
# An eigenvalue of D from which it is an equality's.
ACTIVE = 1 - 1e-9
# A singular value below this share of the largest is no direction.
RANK = 1e-9


@dataclass(frozen=True, eq=False)
class Sides:
    """Right-hand sides (a (R, n), c (R, m)) of the adjoint system, of some rows."""

    moved: tuple[Tensor, ...]  # of a random direction of the parameters
    read: tuple[Tensor, ...]  # random cotangents of the outputs
    constant: Tensor  # (m,) equalities whose coefficients no parameter moves
    # What other points than the solution, (some of the rows, dx, dy), would add to the first, for
    # each parameter that moves P or A.
    turned: Callable[[Tensor, Tensor, Tensor], list[tuple[Tensor, Tensor]]]


@dataclass(frozen=True, eq=False)
class _Part:
    """Some rows of a root, with the system that straddles their kinks."""

    operators: Operators
    spectrum: ProductSpectrum
    system: DenseSystem | SparseSystem
    units: Tensor | None
    # (R, n + m, k) orthonormal null vectors in x's units and the spectrum's basis; zeros fill up
    null: Tensor | None
    known: Tensor  # (R,) all null vectors were found


def judged(root: Root, rows: Tensor, sides: Sides) -> Root:
    """The root with those of its degenerate `rows` acquitted that have a derivative, and
    differentiated by the system which gives it."""
    # The system with D = 1/2 on W; a kink that only the root's error makes near is not straddled
    # by it.
    v = (root.y - root.s)[rows]
    weak, spectrum, known = root.cones.straddle_dual(v, MARGIN)
    known = known & ~(root.turning | (root.near & (root.margin >= MARGIN)))[rows]
    part = _factorised(root, rows, spectrum, again=bool(weak.any()))

    # No null vector is worked against or read; or one that is, is that of a norm which is let go.
    unread = _unfelt(part, sides.read, None)
    unmoved = _unfelt(part, sides.moved, sides.constant)
    released = _released(root, rows, part, unread & ~unmoved)
    if released is not None:
        part = _factorised(root, rows, released)
        unread = _unfelt(part, sides.read, None)
        unmoved = _unfelt(part, sides.moved, sides.constant)

    # The response to a direction of the parameters leaves W where it is: dy_W = ds_W = 0.
    w, e = part.system.solve(sides.moved[0], part.spectrum.to_basis(sides.moved[1]))
    size = torch.cat([w, e], 1).abs().amax(1) + _size(sides.moved)
    still = (torch.where(weak, e.abs(), 0.0).amax(1) <= MOVED * size) if e.shape[1] else known
    good = known & part.known & unread & unmoved & still & ~part.system.poor

    # No null vector turns that direction into another one for the outputs, and none is free on one
    # side.
    across = part.operators.A(w) - sides.moved[1] + part.spectrum.from_basis(e)
    response = _response(part, sides, v, across)
    if part.null is not None and bool(good.any()):
        good = good & ~_turns(root.cones, part, part.null, response)[1]
    good = good & _unique(root, rows, good, weak, v, sides, response)
    return _acquitted(root, rows, good, part)


def _factorised(
    root: Root, rows: Tensor, spectrum: ProductSpectrum, *, again: bool = True
) -> _Part:
    """The system of some rows; unless `again`, that of the root, where it is of just these."""
    assert root.operators is not None
    operators, units = root.operators.rows(rows), units_of(root.units, rows)
    system = root.last
    if again or system is None or len(rows) < len(root.x):
        system = factorise(operators, spectrum, root.visible, units)
    else:
        spectrum = root.spectrum
    system.judge()
    return _Part(operators, spectrum, system, units, *_null_vectors(system, len(rows), root.x))


def _null_vectors(
    system: DenseSystem | SparseSystem, count: int, like: Tensor
) -> tuple[Tensor | None, Tensor]:
    """(null vectors of the system's rows (count, n + m, k), whether these are all (count,)), as in
    `_Part`."""
    n, m, device = system.n, system.m, like.device
    known = torch.ones(count, dtype=torch.bool, device=device)
    if isinstance(system, SparseSystem) and system.dense is not None:
        known[system.dense[0]] = False
    if system.null_space is not None:
        known[system.null_space.rows] = False

    # A variable that nothing holds is a null vector by itself.
    loose = torch.nonzero((~system.held).any(0)).flatten()
    null = like.new_zeros(count, n + m, len(loose))
    unheld = (~system.held[:, loose]).to(null.dtype)
    null[:, loose, torch.arange(len(loose), device=device)] = unheld
    if system.projector is None:
        return null if len(loose) else None, known

    # The others in the rows' places, orthonormal.
    vectors, found = system.projector.unit, system.projector.rows
    known[found] &= ~((vectors.abs().amax(1) > 0).all(1) & (vectors.shape[2] < vectors.shape[1]))
    if system.active is not None:
        place = (n + system.active[found]).unsqueeze(-1).expand(-1, -1, vectors.shape[2])
        whole = vectors.new_zeros(len(found), n + m, vectors.shape[2])
        whole[:, :n] = vectors[:, :n]
        vectors = whole.scatter_(1, place, vectors[:, n:])
    left, size, _ = torch.linalg.svd(vectors, full_matrices=False)
    left = left * (size > RANK * size[:, :1].clamp(min=1e-300)).unsqueeze(1)
    spread = left.new_zeros(count, n + m, left.shape[2]).index_copy_(0, found, left)
    return torch.cat([null, spread], 2), known


def _unfelt(part: _Part, side: tuple[Tensor, ...], constant: Tensor | None) -> Tensor:
    """(R,) whether a right-hand side works against no null vector but those of the `constant` rows
    alone."""
    if part.null is None:
        return torch.ones(len(side[0]), dtype=torch.bool, device=side[0].device)
    return ~_felt(part, side, constant)[2]


def _felt(
    part: _Part, side: tuple[Tensor, ...], constant: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(null vectors but those of the `constant` rows alone (R, n + m, k), the right-hand side
    along them (R, k), whether it works against one (R,))."""
    # (a, sqrt(d) U'c), a in the user's units
    a = side[0] if part.units is None else side[0] / part.units
    right = torch.cat([a, part.spectrum.values.sqrt() * part.spectrum.to_basis(side[1])], 1)
    assert part.null is not None
    null = part.null if constant is None else _beyond(part.null, constant)
    along = (null.mT @ right.unsqueeze(-1)).squeeze(-1)
    return null, along, along.norm(dim=1) > FELT * right.norm(dim=1)


def _beyond(null: Tensor, constant: Tensor) -> Tensor:
    """The null vectors (R, n + m, k) that are orthogonal to those of the `constant` rows alone."""
    n = null.shape[1] - len(constant)
    outside = torch.cat([torch.ones(n, dtype=torch.bool, device=null.device), ~constant])
    _, size, mixing = torch.linalg.svd(null[:, outside], full_matrices=False)
    return (null @ mixing.mT) * (size > FELT).unsqueeze(1)


@dataclass(frozen=True, eq=False)
class _Response:
    """How a system answers to what is moved, and to what is read."""

    sides: Sides
    rows: Tensor  # (R,) of the sides
    v: Tensor  # (R, m) y - s
    across: Tensor  # (R, m) how the direction moves v
    w: Tensor  # (R, n) the adjoint of what is read
    u: Tensor  # (R, m) its dual part
    felt: Tensor  # (R, m) what it feels of a change of DPi: the cotangent of y, less A w, less u

    def only(self, index: Tensor) -> _Response:
        parts = (
            part[index] for part in (self.rows, self.v, self.across, self.w, self.u, self.felt)
        )
        return _Response(self.sides, *parts)


def _response(part: _Part, sides: Sides, v: Tensor, across: Tensor) -> _Response:
    w, e = part.system.solve(sides.read[0], part.spectrum.to_basis(sides.read[1]))
    u = part.spectrum.from_basis(e)
    felt = sides.read[1] - part.operators.A(w) - u
    return _Response(sides, torch.arange(len(v), device=v.device), v, across, w, u, felt)


def _turns(cones: Product, part: _Part, null: Tensor, response: _Response) -> tuple[Tensor, Tensor]:
    """(how much null vectors (R, n + m, k) change what the outputs feel of the direction (R, k),
    whether one does (R,)): by the force that dA exerts with other multipliers, and by the
    curvature that a cone's boundary has with them."""
    n, count = part.system.n, null.shape[2]
    x = null[:, :n] if part.units is None else null[:, :n] / part.units.unsqueeze(-1)
    sqrt_d = part.spectrum.values.sqrt().unsqueeze(-1)
    y = part.spectrum.from_basis(sqrt_d * null[:, n:], columns=True)
    columns = [(x[..., j], y[..., j]) for j in range(count)]
    changes = _changes_of_force(x, y, columns, response)
    if bool(cones.curved.any()):
        changes.append(_change_of_curvature(cones, part, columns, response))
    if not changes:
        return x.new_zeros(len(x), count), torch.zeros(len(x), dtype=torch.bool, device=x.device)
    felt = torch.stack([change.norm(dim=1) for change in changes], 1).amax(1) > FELT
    return torch.stack(changes).sum(0), felt


def _changes_of_force(
    x: Tensor, y: Tensor, columns: list[tuple[Tensor, Tensor]], response: _Response
) -> list[Tensor]:
    """w'(dP x + dA'y) + u'(dA x) for each parameter that moves P or A, (R, k).

    Beside what any vector of that length changes, not the null vectors alone: their images may be
    rounding.
    """
    n, m, rows, turned = x.shape[1], y.shape[1], response.rows, response.sides.turned
    generator = torch.Generator().manual_seed(2)
    probe = torch.randn(1, n + m, dtype=x.dtype, generator=generator).to(x.device)
    probe = probe.expand(len(x), -1)
    images = [turned(rows, *column) for column in columns]
    length = torch.cat([response.w, response.u], 1).norm(dim=1)
    changes = []
    for place, (a, c) in enumerate(turned(rows, probe[:, :n], probe[:, n:])):
        size = (length * torch.cat([a, c], 1).norm(dim=1)).clamp(min=torch.finfo(x.dtype).tiny)
        pairs = [of[place] for of in images]
        change = [(response.w * a).sum(1) + (response.u * c).sum(1) for a, c in pairs]
        changes.append(torch.stack(change, 1) / size.unsqueeze(1))
    return changes


def _change_of_curvature(
    cones: Product, part: _Part, columns: list[tuple[Tensor, Tensor]], response: _Response
) -> Tensor:
    """felt'Pi''(v)[A x + y, across], (R, k), relative to |felt| |across|."""
    size = response.felt.norm(dim=1) * response.across.norm(dim=1)
    size = size.clamp(min=torch.finfo(size.dtype).tiny)
    bent = [
        cones.curvature_dual(response.v, part.operators.A(x) + y, response.across)
        for x, y in columns
    ]
    change = torch.stack([(response.felt * k).sum(1) for k in bent], 1)
    return (change / size.unsqueeze(1)).nan_to_num(1.0)


def _unique(
    root: Root,
    rows: Tensor,
    asked: Tensor,
    weak: Tensor,
    v: Tensor,
    sides: Sides,
    response: _Response,
) -> Tensor:
    """(R,) of the rows `asked`: nothing that is read or moved, or turns what is moved, is free on
    one side.

    The system that straddles the kinks sees what may move both ways. The solutions are a face, on
    which x may leave a weakly active boundary (a null vector of the system without W, with ds_W in
    its cone), and multipliers may enter one (a null vector of that with W, dy_W in its cone):
    parameters that work along it choose among them by their sign.
    """
    unique = torch.ones_like(asked)
    for tolerance, doubtful in ((MARGIN, root.flagged[rows]), (-MARGIN, asked)):
        chosen = torch.nonzero(asked & weak.any(1) & doubtful).flatten()
        if not len(chosen):
            continue
        part = _factorised(root, rows[chosen], root.cones.linearise_dual(v[chosen], tolerance)[2])
        unique[chosen] &= part.known
        if part.null is None:
            continue
        turning = _turns(root.cones, part, part.null, response.only(chosen))
        for null, along, felt in (
            _felt(part, tuple(values[chosen] for values in sides.read), None),
            _felt(part, tuple(values[chosen] for values in sides.moved), sides.constant),
            (part.null, *turning),
        ):
            step = _steps(part, null) if tolerance > 0 else null[:, root.x.shape[1] :]
            for k in torch.nonzero(felt).flatten().tolist():
                spaces = _half_spaces(root.cones, weak[chosen[k]], step[k])
                unique[chosen[k]] &= not _one_sided(spaces.cpu().numpy(), along[k].cpu().numpy())
    return unique


def _steps(part: _Part, null: Tensor) -> Tensor:
    """How null vectors (R, n + m, k) move s, in the spectrum's basis, (R, m, k)."""
    x = null[:, : part.system.n]
    x = x if part.units is None else x / part.units.unsqueeze(-1)
    image = torch.stack([part.operators.A(column) for column in x.unbind(2)], 2)
    return -part.spectrum.to_basis(image, columns=True)


def _half_spaces(cones: Product, weak: Tensor, step: Tensor) -> Tensor:
    """The weakly active ones of directions (m, k) of y or s, in the spectrum's basis, as numbers
    (., k) of which none may be negative."""
    parts = [step[:0]]
    for block in cones.blocks:
        mine = weak[block.rows]
        if bool(mine.any()):
            parts += block.cone.half_spaces(mine, step[block.rows])
    return torch.cat(parts)


def _one_sided(spaces: np.ndarray, along: np.ndarray) -> bool:
    """Whether some c with spaces @ c >= 0 has along @ c != 0; by Farkas none has if `along` and
    its negative are combinations of the rows of `spaces` with weights >= 0."""
    if not len(spaces):
        return True
    size = np.linalg.norm(along)
    return any(nnls(spaces.T, sign * along)[1] > FELT * size for sign in (1.0, -1.0))


def _released(root: Root, rows: Tensor, part: _Part, wanted: Tensor) -> ProductSpectrum | None:
    """The spectrum with D = 1/2 on the cone of a norm that is zero, where it is the only
    inequality in the null vectors that are felt, and its multiplier in their span."""
    if part.null is None or not bool(wanted.any()):
        return None
    cones, n = root.cones, root.x.shape[1]
    values, changed = part.spectrum.values, False
    free = ~cones.rows_of(Zero).to(rows.device)
    for block in cones.blocks:
        if not block.cone.of_norm or block.size < 2:
            continue
        own = torch.zeros_like(free)
        own[block.rows] = True
        # Its apex is held: D is the identity, and the basis does not matter.
        mine = wanted & (values[:, own] >= ACTIVE).all(1)
        # No other inequality is in the null vectors.
        null = _beyond(part.null, ~free)
        mine = mine & (null[:, n:][:, free & ~own].abs().flatten(1).sum(1) <= FELT)
        # y_z is in the span N of what they are on z:  |y_z - N N'y_z| beside y_t
        span = part.spectrum.from_basis(null[:, n:], columns=True)[:, own][:, 1:]
        y = root.y[rows][:, own][:, 1:]
        left, size, _ = torch.linalg.svd(span, full_matrices=False)
        left = left * (size > FELT).unsqueeze(1)
        rest = y - (left @ (left.mT @ y.unsqueeze(-1))).squeeze(-1)
        spanned = rest.norm(dim=1) <= MOVED * root.y[rows][:, block.start]
        mine = mine & (size[:, 0] > FELT) & spanned
        if bool(mine.any()):
            values = torch.where(mine.unsqueeze(1) & own, 0.5, values)
            changed = True
    return ProductSpectrum(values, part.spectrum.bases) if changed else None


def _size(side: tuple[Tensor, ...]) -> Tensor:
    return torch.cat(side, 1).abs().amax(1)


def _acquitted(root: Root, rows: Tensor, good: Tensor, part: _Part) -> Root:
    """Where the system of the root was singular it gives way to the one that was found."""
    unfelt = root.unfelt.index_copy(0, rows, good)
    changed = good & root.flagged[rows]
    if not bool(changed.any()):
        return replace(root, unfelt=unfelt)
    where, found = rows[changed], torch.nonzero(changed).flatten()
    spectrum = root.spectrum.put(where, part.spectrum.index_select(found))
    last = part.system if len(where) == len(root.x) else None
    return replace(root, unfelt=unfelt, spectrum=spectrum, last=last)

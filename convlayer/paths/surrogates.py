"""Surrogates for derivatives that say nothing: at a vertex of a linear program the solution does
not move, and its derivative is zero.

Each takes cotangents (x_bar, y_bar) of a solution, solves perturbed programs, and returns
cotangents of the data. Perturbations are relative to the size of the program and of the cotangent,
row by row: a loss in other units gives the same gradient in those units.

lpgd        any cone program, cotangents of P, q, A, b     two solves      tends to the derivative where there is one
blackbox    linear objective, cotangent of q               one solve       an interpolation of the loss
perturbed   linear objective, cotangent of q               `samples`       an unbiased estimate of a smoothed solution's derivative
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from convlayer.conic.program import Data, Operators, Program
from convlayer.conic.residual import INFINITE

AT_ONCE = 16_000_000  # numbers in the programs handed to one call of `solve` (128 MB)
# of the matrix: a product below this, with a constant below it too, is a zero that was computed
ROUNDING = 1e-9

# Programs -> (x (B, n), y (B, m), failed (B,)). A row that has no solution, or whose data are not
# finite, is to be flagged, whatever x and y hold there. The patterns are those of the given data,
# except with `lpgd`'s rho.
Solve = Callable[[Data], tuple[Tensor, Tensor, Tensor]]


class Secant(NamedTuple):
    """What `pull_back` takes in place of a derivative's adjoint: (w, u) from two solutions, at
    their midpoint (x, y)."""

    x: Tensor  # (B, n)
    y: Tensor  # (B, m)
    w: Tensor  # (B, n)
    u: Tensor  # (B, m)


def lpgd(
    data: Data,
    x: Tensor,  # (B, n) a solution,
    y: Tensor,  # (B, m) and its dual
    x_bar: Tensor,  # (B, n)
    y_bar: Tensor,  # (B, m)
    solve: Solve,
    tau: float,
    rho: float = math.inf,
    sides: tuple[int, ...] = (1, -1),
    absolute: bool = False,  # t is tau
) -> Secant:
    """Lagrangian proximal gradient descent: the gradient of the average Lagrange-Moreau envelope of
    the linearised loss.

    With the Lagrangian L(x, y) = 1/2 x'Px + q'x + y'(Ax - b), y in K*, its saddle point (x*, y*),
    the loss linearised there, l(x, y) = x_bar'x + y_bar'y, and a step t:

        lower envelope    min_x max_y   l(x, y) + (L(x, y) - L(x*, y*) + |x - x*|^2 / (2 rho)) / t     at (x+, y+)
        upper envelope    max_x min_y   l(x, y) - (L(x, y) - L(x*, y*) + |x - x*|^2 / (2 rho)) / t     at (x-, y-)

    (x+-, y+-) solve the program with q +- t x_bar and b -+ t y_bar (and P + I/rho, q - x*/rho). The
    average's gradient, x* in the augmentation held fixed, is a difference of L's, and so the
    adjoint of `convlayer.conic.adjoint` with secants for its solution:

        (dL(x+, y+) - dL(x-, y-)) / 2t :  w = -(x+ - x-)/2t,   u = -(y+ - y-)/2t,   at the midpoint ((x+ + x-)/2, (y+ + y-)/2)

    When:        the derivative vanishes or jumps (linear programs, active sets that should change),
                 or is singular.
    Limit:       tau -> 0: the derivative, with an error of tau^2, where there is one; with rho,
                 that of the augmented program.
    Units:       t is such that the larger of |t x_bar| / max(|q|, |Px|) and |t y_bar| / max(|b|,
                 |Ax|) is tau, in largest entries; bounds at infinity do not count, and where both
                 terms vanish, x has units of one. rho is the program's own, 1/rho a curvature of
                 its objective (the authors' implementation in diffcp calls that curvature rho); inf
                 for none. It steadies what would jump from vertex to vertex, and bounds what a
                 perturbation would make unbounded.
    Sides:       1 for the lower envelope alone, -1 for the upper one: the other end of the secant
                 is then the solution itself.
    Shapes:      cotangents (B, .); data of 1 row are shared, their cotangents still one for each
                 row. w and u are the cotangents of -q and b; those of P and A are for
                 `convlayer.conic.adjoint.pull_back`, which gives the entries that are wanted.
    Cost:        two solves for each row that has a cotangent, in one call of `solve`. With rho the
                 program solved has a stored diagonal of P.
    At failure:  a row with one of its two programs unsolved has the other's one-sided envelope;
                 with both, NaN.
    Errors:      ValueError for tau or rho that are not positive.
    Source:      Paulus, Martius and Musil (2024), LPGD: a general framework for backpropagation
                 through embedded optimization layers.
    """
    _check_positive("tau", tau, "size of the perturbation")
    if not rho > 0:
        raise ValueError(f"rho is {rho}; expected a positive number, or inf for no augmentation.")
    w, u, x_mid, y_mid = torch.zeros_like(x_bar), torch.zeros_like(y_bar), x.clone(), y.clone()
    rows = torch.nonzero((x_bar != 0).any(1) | (y_bar != 0).any(1)).flatten()
    if len(rows):
        part, x, y, x_bar, y_bar = data.rows(rows), x[rows], y[rows], x_bar[rows], y_bar[rows]
        operators, finite_b = Operators(part), torch.where(part.b.abs() < INFINITE, part.b, 0.0)
        x_ratio = _largest(x_bar) / _size(part.q, operators.P(x), part.P)
        y_ratio = _largest(y_bar) / _size(finite_b, operators.A(x), part.A)
        t = torch.full_like(x_ratio, tau) if absolute else tau / torch.maximum(x_ratio, y_ratio)
        q, b = part.q, part.b
        if rho < math.inf:
            part, q = _with_curvature(part, 1 / rho), q - x / rho
        qs, bs = (
            torch.cat([c + side * step for side in sides])
            for c, step in ((q, t * x_bar), (b, -t * y_bar))
        )
        index = torch.arange(len(rows), device=rows.device).repeat(len(sides))
        found = zip(
            *(part.chunk(len(sides)) for part in _solved(solve, part, index, qs, bs)), strict=True
        )
        # A side that is unsolved, or not asked for, gives way to the middle; of none solved, zero
        # over zero.
        ends, width = {1: (x, y), -1: (x, y)}, torch.zeros_like(t)
        for side, (x_end, y_end, failed) in zip(sides, found, strict=True):
            failed = failed.unsqueeze(1)
            ends[side] = torch.where(failed, x, x_end), torch.where(failed, y, y_end)
            width = width + torch.where(failed, 0.0, t)
        (x_up, y_up), (x_low, y_low) = ends[1], ends[-1]
        w[rows], u[rows] = (x_low - x_up) / width, (y_low - y_up) / width
        x_mid[rows], y_mid[rows] = (x_up + x_low) / 2, (y_up + y_low) / 2
    return Secant(x_mid, y_mid, w, u)


def blackbox(
    data: Data,
    x: Tensor,  # (B, n) a solution
    x_bar: Tensor,  # (B, n)
    solve: Solve,
    lam: float,
    moving: Tensor,  # (n,) bool, entries of q that depend on parameters
) -> Tensor:
    """Differentiation of a black-box solver: the gradient of a continuous, piecewise affine
    interpolation of the loss.

        minimise  q'x  over the feasible set X,   the loss linearised at its solution x*:   l(x) = x_bar'x
        l_t(q) = min_X (q'x + t l(x)) / t  -  min_X q'x / t,     dl_t/dq = (x*(q + t x_bar) - x*(q)) / t

    When:        linear programs at a vertex, above all those whose vertices are a combinatorial
                 problem's solutions.
    Units:       t = lam |q| / |x_bar|, in largest entries, of q over `moving` only (one, where
                 those vanish). Too small, and the vertex stays and the cotangent is zero; of the
                 size of one is usual.
    Shapes:      the cotangent of q (B, n); P, A and b have none.
    Cost:        one solve for each row that has a cotangent.
    At failure:  NaN in the rows whose perturbed program is unsolved.
    Errors:      ValueError for a quadratic objective, or lam that is not positive.
    Source:      Vlastelica, Paulus, Musil, Martius and Rolinek (2020), Differentiation of blackbox
                 combinatorial solvers.
    """
    _check_positive("lam", lam, "relative size of the perturbation")
    _check_linear(data, "blackbox")
    q_bar = torch.zeros_like(x_bar)
    rows = torch.nonzero((x_bar != 0).any(1)).flatten()
    if len(rows):
        part, x_bar = data.rows(rows), x_bar[rows]
        t = lam * _moving_size(part, moving) / _largest(x_bar)
        x_up, _, failed = _solved(
            solve,
            part,
            torch.arange(len(rows), device=rows.device),
            part.q + t * x_bar,
            part.b.expand(len(rows), -1),
        )
        q_bar[rows] = torch.where(failed.unsqueeze(1), torch.nan, (x_up - x[rows]) / t)
    return q_bar


def perturbed(
    data: Data,
    x_bar: Tensor,  # (B, n)
    solve: Solve,
    sigma: float,
    samples: int,
    seed: int,
    moving: Tensor,  # (n,) bool, entries of q that depend on parameters
) -> Tensor:
    """The derivative of the solution smoothed by noise in its costs, by Monte Carlo.

        x_s(q) = E x*(q + s Z),   x*(q) = argmin q'x over the feasible set,   Z standard normal on `moving`
        (dx_s/dq)' x_bar = E [x_bar'x*(q + s Z) Z] / s  =  E [(x_bar'x*(q + s Z) - x_bar'x*(q - s Z)) Z] / 2s

    The pairs (Z, -Z) are what is sampled: the baseline x_bar'x*(q) that one would subtract cancels
    in each.

    When:        linear programs at a vertex, and a training that wants an unbiased derivative of
                 one fixed smoothing.
    Units:       s = sigma |q|, the largest entry of q over `moving` (one, where those vanish), held
                 fixed.
    Noise:       of its own for each row of the batch, so that a mean over the batch averages it;
                 the same in every call with this seed and batch size. Its standard error falls as
                 samples^(-1/2), and grows as the number that move.
    Shapes:      the cotangent of q (B, n), zero where nothing moves; P, A and b have none.
    Cost:        `samples` solves for each row that has a cotangent, as many in a call of `solve` as
                 memory takes.
    At failure:  NaN in the rows with an unsolved sample: an expectation that is not finite has no
                 estimate.
    Errors:      ValueError for a quadratic objective, sigma that is not positive, or samples that
                 are no pairs.
    Source:      Berthet, Blondel, Teboul, Cuturi, Vert and Bach (2020), Learning with
                 differentiable perturbed optimizers.
    """
    _check_positive("sigma", sigma, "relative size of the noise")
    if samples < 2 or samples % 2:
        raise ValueError(
            f"samples is {samples}; noise is drawn in pairs (Z, -Z): expected an even number, at least 2."
        )
    _check_linear(data, "perturbed")
    q_bar, batch, device = torch.zeros_like(x_bar), len(x_bar), x_bar.device
    rows, entries = (
        torch.nonzero(part).flatten() for part in ((x_bar != 0).any(1), moving.to(device))
    )
    if not len(rows) or not len(entries):
        return q_bar
    part, x_bar = data.rows(rows), x_bar[rows]
    s = sigma * _moving_size(part, moving)
    q, b = part.q.expand(len(rows), -1), part.b.expand(len(rows), -1)
    total = q.new_zeros(len(rows), len(entries))
    generator = torch.Generator().manual_seed(seed)
    at_once = max(1, _rows_at_once(part) // (2 * len(rows)))
    for first in range(0, samples // 2, at_once):
        pairs = min(at_once, samples // 2 - first)
        # Drawn pair by pair and for all rows: neither the memory at hand nor other rows' cotangents
        # change a row's noise.
        draws = [
            torch.randn(batch, len(entries), generator=generator, dtype=q.dtype)
            for _ in range(pairs)
        ]
        Z = torch.stack(draws).to(device)[:, rows]
        step = torch.zeros(pairs, *q.shape, dtype=q.dtype, device=device).index_copy_(
            2, entries, s * Z
        )
        index = torch.arange(len(rows), device=device).repeat(2 * pairs)
        xs, _, failed = _solved(
            solve,
            part,
            index,
            torch.cat([q + step, q - step]).flatten(0, 1),
            b.repeat(2 * pairs, 1),
        )
        loss = torch.where(
            failed.view(2, pairs, -1), torch.nan, (xs.view(2, *step.shape) * x_bar).sum(3)
        )
        total += ((loss[0] - loss[1]).unsqueeze(2) * Z).sum(0)
    q_bar[rows.unsqueeze(1), entries] = total / (samples * s)
    return q_bar


def _solved(
    solve: Solve, data: Data, index: Tensor, q: Tensor, b: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Solutions of the instances at `index` with these q and b for theirs, as many in a call as
    memory takes."""
    parts = [
        solve(replace(data.rows(rows), q=q_part, b=b_part))
        for rows, q_part, b_part in zip(
            *(values.split(_rows_at_once(data)) for values in (index, q, b)), strict=True
        )
    ]
    x, y, failed = (torch.cat(part) for part in zip(*parts, strict=True))
    return x, y, failed


def _rows_at_once(data: Data) -> int:
    numbers = sum(part[0].numel() for part in (data.P, data.q, data.A, data.b))
    return max(1, AT_ONCE // max(1, numbers))


def _with_curvature(data: Data, curvature: float) -> Data:
    """The same data with curvature * I added to P, on a pattern that stores P's diagonal."""
    program = data.program
    n, diagonal = program.n, np.arange(program.n)
    stored, every = program.P_cols * n + program.P_rows, diagonal * (n + 1)
    keys = np.union1d(stored, every)  # column by column
    columns, rows = np.divmod(keys, n)
    wider: Program = replace(program, P_rows=rows, P_cols=columns)
    if data.dense:
        return replace(data, program=wider, P=data.P + curvature * torch.eye(n).to(data.P))
    P = data.P.new_zeros(len(data.P), len(keys))
    P[:, torch.from_numpy(np.searchsorted(keys, stored)).to(P.device)] = data.P
    P[:, torch.from_numpy(np.searchsorted(keys, every)).to(P.device)] += curvature
    return replace(data, program=wider, P=P)


def _size(constant: Tensor, product: Tensor, matrix: Tensor) -> Tensor:
    """(B, 1) the larger of a constant term and a product with the matrix; of neither, the matrix by
    units of one; of none, one."""
    size, coefficient = (
        torch.maximum(_largest(constant), _largest(product)),
        _largest(matrix.flatten(1)),
    )
    size = torch.where(size > ROUNDING * coefficient, size, coefficient)
    return torch.where(size > 0, size, 1.0)


def _moving_size(data: Data, moving: Tensor) -> Tensor:
    """(B or 1, 1) the largest of the costs that move; one where they vanish."""
    size = _largest(data.q[:, moving.to(data.q.device)])
    return torch.where(size > 0, size, 1.0)


def _largest(values: Tensor) -> Tensor:
    """(B, k) -> (B, 1), zero where k is zero."""
    return (
        values.abs().amax(1, keepdim=True) if values.shape[1] else values.new_zeros(len(values), 1)
    )


def _check_positive(name: str, value: float, meaning: str) -> None:
    if not 0 < value < math.inf:
        raise ValueError(f"{name} is {value}; expected a positive number, the {meaning}.")


def _check_linear(data: Data, name: str) -> None:
    if bool(data.P.any()):
        raise ValueError(
            f"The objective is quadratic, and `{name}` gives a cotangent of linear costs only: those of its parameters in P "
            "would be missing. Use `lpgd`, which takes any objective."
        )

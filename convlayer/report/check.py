"""What a look at a solution's derivative found, row by row and by constraint, and what is to be
said of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from convlayer.display import Shown, counted, rows_of, spanned
from convlayer.paths.conflict import Conflict
from convlayer.solution import Status, batch_index, rows_in_words

ILL = 1e10  # a condition number above this is worth a word
POOR = 1e-8  # and so is an adjoint's relative residual
SHOWN = 5  # rows that are told one by one


@dataclass(frozen=True, eq=False)
class ConstraintCheck:
    """One of the user's constraints with the auxiliary rows that CVXPY made for its atoms, a
    declared property of a variable, or a term of the objective that is not smooth. Every tensor has
    shape (*batch)."""

    name: str
    # distance of y - s from a kink, in units where x and y are of size one; infinite for an
    # equality; NaN: no solution
    margin: Tensor
    active: Tensor  # bool, some entry holds with equality, or lies on the boundary of its cone
    weakly_active: Tensor  # bool, some entry does so without a multiplier
    # bool, some entry depends on other active constraints: multipliers can be shifted between them
    redundant: Tensor
    # int64, row-major index of the entry with this margin; -1 in a cone, or where it is an
    # auxiliary row's
    entry: Tensor


@dataclass(frozen=True, eq=False, repr=False)
class Check(Shown):
    """How far a layer's rows are from where its solution map is not differentiable. Every tensor
    has shape (*batch).

    Where a constraint is weakly active (margin 0), it counts as inactive: `unique` is then sure
    where it says so, and may be unjust where it does not. Rows that failed have NaN, rank and size
    0, and False.
    """

    status: Tensor  # int64, values of Status
    margin: Tensor  # the least of all constraints'
    # problem.constraints in order, then the variables' attributes, then auxiliaries
    constraints: tuple[ConstraintCheck, ...]
    rank: Tensor  # int64, of the active system K,
    size: Tensor  # int64, which has this many rows
    # of the equilibrated K on its range, in the 2-norm; a Lanczos estimate where it has more than
    # 800 rows
    condition: Tensor
    unique: Tensor  # bool, the variables that the layer returns
    unique_duals: Tensor  # bool, the multipliers of the user's constraints
    # bool, K has a null vector that an output or a parameter meets, or is singular to rounding: the
    # derivative there is the least-norm one
    ambiguous: Tensor
    # of y - s in a psd cone, about zero; infinite where one sign is missing. On the structure
    eigenvalue_gap: Tensor
    # leading_eigenspace: between the eigenvalues of its matrix at the cut, relative to the largest
    # the least margin of an inequality that stands alone: the entries' distance from changing
    # sides, as in sparsemax
    tie: Tensor
    adjoint_residual: Tensor  # relative, of a refined solve with random cotangents of the outputs
    # by parameter: bool, its gradient vanishes, whatever the cotangent
    zero_gradient: dict[str, Tensor]
    # by index into the batch, of the first infeasible rows: what contradicts itself
    conflicts: dict[tuple[int, ...], Conflict]
    _degenerate: Tensor
    _batch: tuple[int, ...]

    @property
    def differentiable(self) -> Tensor:
        """The rows where the layer's gradient is the derivative of its solution, in what parameters
        move and outputs read."""
        return (self.status < Status.INFEASIBLE) & ~self._degenerate

    def __str__(self) -> str:
        return "\n".join(_told(self))

    def __repr__(self) -> str:
        names = [Status(value).name for value in self.status.flatten().tolist()]
        text = f"Check of {rows_of(self._batch)}: {counted(names)}; {int(self.differentiable.sum())} differentiable"
        return f"{text}; margin {spanned(self.margin)}, condition {spanned(self.condition)}. print(...) names the constraints."


def _told(check: Check) -> Iterator[str]:
    batch, fine = check._batch, check.differentiable.flatten()
    solved = check.status.flatten() < Status.INFEASIBLE
    counts = f"{int(fine.sum())} differentiable, {int((solved & ~fine).sum())} not, {int((~solved).sum())} failed"
    if bool(solved.any()):
        margin, condition = (
            check.margin.flatten()[solved].min(),
            check.condition.flatten()[solved].max(),
        )
        counts += f". Least margin {float(margin):.1e}, greatest condition {float(condition):.1e}"
    yield f"{len(fine)} row{'s' * (len(fine) != 1)}: {counts}."
    remarks = {row: list(_remarks(check, row)) for row in range(len(fine))}
    rows = [row for row, said in remarks.items() if said]
    for row in rows[:SHOWN]:
        yield from (f"{_rows(batch, row)}: {text}" for text in remarks[row])
    if rows[SHOWN:]:
        yield f"{_rows(batch, *rows[SHOWN:])}: in need of attention too."
    for name, zero in check.zero_gradient.items():
        which = torch.nonzero(zero.flatten() & solved).flatten().tolist()
        if which:
            yield (
                f"{_rows(batch, *which)}: no gradient reaches `{name}`, as at a vertex of a linear program, or where a constraint is "
                'inactive. regularise= or gradient="smoothed" gives one.'
            )


def _rows(batch: tuple[int, ...], *rows: int) -> str:
    return rows_in_words(torch.tensor(rows), batch).capitalize()


def _remarks(check: Check, row: int) -> Iterator[str]:
    """What is to be said of a flat row, and what helps."""
    status = Status(int(check.status.flatten()[row]))
    if status.failed:
        yield f"{status.name}, {status.advice}"
        conflict = check.conflicts.get(batch_index(row, check._batch))
        if conflict is not None:
            yield str(conflict)
        return
    felt = bool(check._degenerate.flatten()[row])
    weak = [part for part in check.constraints if felt and bool(part.weakly_active.flatten()[row])]
    for part in weak[:SHOWN]:
        entry = int(part.entry.flatten()[row])
        where = f" at entry {entry}" if entry >= 0 else ""
        yield (
            f"{_subject(part.name)} is weakly active{where} (margin {float(part.margin.flatten()[row]):.0e}): the derivative is one-sided. "
            'Move the parameters away from it, or use gradient="smoothed" or "lpgd".'
        )
    if len(weak) > SHOWN:
        yield f"{len(weak) - SHOWN} more constraints are weakly active."
    if not bool(check.unique.flatten()[row]):
        yield (
            f"The solution is not unique{' unless a weakly active constraint makes it so' if weak else ''} "
            f"(rank {int(check.rank.flatten()[row])} of {int(check.size.flatten()[row])}): the derivative is the least-norm one. "
            "Add a proximal term (regularise=), or a constraint that chooses."
        )
    redundant = [part.name for part in check.constraints if bool(part.redundant.flatten()[row])]
    if redundant and bool(check.ambiguous.flatten()[row]) and bool(check.unique.flatten()[row]):
        yield (
            f"{'; '.join(redundant[:SHOWN])}: active and dependent on one another, so multipliers can be shifted between them and the "
            "derivative across what they allow is the least-norm one. Drop what the others imply."
        )
    condition, residual = (
        float(part.flatten()[row]) for part in (check.condition, check.adjoint_residual)
    )
    if condition > ILL or (bool(check.unique.flatten()[row]) and residual > POOR):
        yield (
            f"The active system is ill-conditioned (condition {condition:.0e}, relative residual of the adjoint {residual:.0e}). "
            "Scale the parameters so that rows of the constraints and variables are of one size, or add a proximal term (regularise=)."
        )


def _subject(name: str) -> str:
    """A name with an apposition closes it."""
    return f"{name}," if name.startswith(("constraint", "`")) else name

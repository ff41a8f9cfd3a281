"""Two ways side by side on the same parameters: value, feasibility and gradient, row by row."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from convlayer.declaration.declaration import Declaration
from convlayer.declaration.inputs import bad_rows
from convlayer.display import Shown
from convlayer.paths.dispatch import other_solver
from convlayer.paths.front import Front
from convlayer.paths.settings import one_of
from convlayer.paths.specialised import working_dtype
from convlayer.report import incumbent
from convlayer.report.incumbent import Answers
from convlayer.solution import Solution, Status

# added to the seed: a functional drawn like the user's own parameters may be a special one
WEIGHTS = 1_000_003
Answered = TypeVar("Answered", bound="Solution | Answers")
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}


@dataclass(frozen=True, eq=False, repr=False)
class Verification(Shown):
    """How far a layer's answers are from another way's. Every tensor has shape (*batch) and holds
    relative differences."""

    structure: str
    # the other way: the cone program, and by which solver; nothing: there is none that did not take
    # part in the first
    against: str
    solution: Tensor  # of the variables, relative to their size or one
    value: Tensor  # of the objective, relative to its size or one
    # of the gradients of a random functional of the variables, relative to the whole gradient
    gradient: Tensor
    infeasibility: Tensor  # violation of the user's constraints at the layer's own solution
    same_status: Tensor  # bool
    compared: Tensor  # bool; not where the other way came to no answer
    # bool, a derivative by rule on either path: gradients, and solutions that are not unique, may
    # rightly differ
    degenerate: Tensor
    tolerance: float
    remark: str = ""  # what else is to be known of the comparison

    @property
    def agrees(self) -> bool:
        """Rows were compared, and each has the same status, value and feasibility, and where it is
        not degenerate the same solution and gradient."""
        bound = self.tolerance
        always = self.same_status & (self.value <= bound) & (self.infeasibility <= bound)
        exact = (self.solution <= bound) & (self.gradient <= 10 * bound)
        compared = bool(self.compared.any()) or not self.compared.numel()
        return compared and bool((always & (self.degenerate | exact) | ~self.compared).all())

    def __str__(self) -> str:
        def worst(values: Tensor) -> str:
            return f"{float(values.max()):.1e}" if values.numel() else "0"

        if not self.against:
            return f"{self.structure}: there is nothing to compare with: every solver that takes this program takes part in it."
        flagged, missed = int(self.degenerate.sum()), int((~self.compared).sum())
        left = f" ({missed} not compared: the other way came to no answer)" if missed else ""
        rows = f"{self.structure} against {self.against}, {self.value.numel()} rows{left}"
        if missed and not bool(self.compared.any()):
            return f"{rows}.{self._remark}"
        return (
            f"{rows}: {'agree' if self.agrees else 'DISAGREE'}. "
            f"Worst relative difference of the solution {worst(self.solution)}, the value {worst(self.value)}, the gradient "
            f"{worst(self.gradient)}; infeasibility {worst(self.infeasibility)}; {flagged} degenerate rows.{self._remark}"
        )

    @property
    def _remark(self) -> str:
        return f" {self.remark}" if self.remark else ""

    def __repr__(self) -> str:
        return str(self)


def verified(
    front: Front,
    given: Sequence[Tensor],
    mine: Callable[..., Solution],
    # the same by the cone program and a solver by its name
    by_solver: Callable[[str], Callable[..., Solution]],
    seed: int,
    against: str | None,
) -> Verification:
    """The layer's own way beside another one that has no part in it: CVXPY's with diffcp if asked
    for, or a solver's."""
    dtype, _, batch = front.shapes(given)
    declared, structure, kernel = front.declared, front.choice.structure, front.choice.kernel
    leaves = [
        t.detach().expand((*batch, *p.shape))
        for t, p in zip(given, declared.parameters, strict=True)
    ]
    size, infeasibility = math.prod(batch), None
    if kernel is not None:
        with torch.no_grad():
            values = front.values(leaves, batch)
            bad = bad_rows(declared, values, size, front.validate)
            infeasibility = kernel.infeasibility(values, bad.which, working_dtype(dtype)).expand(
                size
            )
    if against is not None:
        one_of("against", against, (incumbent.NAME,))
        return _against_incumbent(
            declared, structure, mine, leaves, len(batch), infeasibility, seed
        )
    other: str | None = "clarabel"
    if kernel is None:
        taken = front.settings.solving.attempts(declared.canonical, size, torch.device("cpu"))
        other = other_solver(declared.canonical.program, size, taken)
    if other is None:
        return not_compared(structure, batch)
    named = f"cone_program by {other}"
    return verify(structure, mine, by_solver(other), leaves, len(batch), infeasibility, seed, named)


def _against_incumbent(
    declared: Declaration,
    structure: str,
    mine: Callable[..., Solution],
    leaves: Sequence[Tensor],
    lead: int,
    infeasibility: Tensor | None,
    seed: int,
) -> Verification:
    incumbent.check(declared)
    told: list[str] = []
    theirs = incumbent.solver(declared, lead, told)
    found = verify(structure, mine, theirs, leaves, lead, infeasibility, seed, "CVXPY with diffcp")
    remarks = [f"{why.rstrip('.')}." for why in dict.fromkeys(told)]
    canonical, reason = declared.canonical, ""
    if any(block.name == "power" for block in canonical.program.cones.blocks):
        reason = "diffcp's derivative of power cones is wrong"
    elif canonical.dependence is not None:
        reason = "equalities depend on each other, and across what they allow it is a choice"
    if reason:
        remarks.append(f"Gradients are not compared: {reason}.")
        found = replace(found, gradient=torch.zeros_like(found.gradient))
    return replace(found, remark=" ".join(remarks))


def verify(
    structure: str,
    mine: Callable[..., Solution],
    generic: Callable[..., Solution | Answers],
    leaves: Sequence[Tensor],  # every parameter with the whole batch
    lead: int,  # batch dimensions
    infeasibility: Tensor | None,  # None: the residual of the solution says it
    seed: int,
    against: str = "cone_program",
) -> Verification:
    """Solve and differentiate both ways."""
    ours, our_gradient = _solved(mine, leaves, lead, seed)
    theirs, their_gradient = _solved(generic, leaves, lead, seed)
    solved = (ours.status <= 1) & (theirs.status <= 1)
    batch = ours.status.shape
    x, y = (_joined([v.detach() for v in solution.variables], lead) for solution in (ours, theirs))
    g, h = (_joined(gradient, lead) for gradient in (our_gradient, their_gradient))
    value = (
        ours.objective - theirs.objective
    ).detach().abs() / theirs.objective.detach().abs().clamp(min=1.0)
    # A gradient far below what sizes suggest vanishes: its digits are rounding on either path.
    size = _joined([leaf.detach() for leaf in leaves], lead).norm(dim=-1).clamp(min=1e-300)
    vanishing = 1e-3 * y.norm(dim=-1) * y.shape[-1] ** 0.5 / size
    violation = ours.residual.nan_to_num(0.0) if infeasibility is None else infeasibility
    parts = (_relative(x, y, 1.0), value, _relative(g, h, vanishing), violation)
    solution, value, gradient, infeasibility = (
        part.cpu().double().reshape(batch).masked_fill(~solved, 0.0) for part in parts
    )
    return Verification(
        structure,
        against,
        solution,
        value,
        gradient,
        infeasibility,
        same_status=(ours.status == theirs.status) | solved,
        compared=(theirs.status != Status.NOT_CONVERGED) | (ours.status == Status.NOT_CONVERGED),
        degenerate=ours.degenerate | theirs.degenerate,
        tolerance=TOLERANCE.get(ours.objective.dtype, 1e-2),
    )


def not_compared(structure: str, batch: tuple[int, ...]) -> Verification:
    """Where there is no other way."""
    nothing, no = torch.zeros(batch, dtype=torch.float64), torch.zeros(batch, dtype=torch.bool)
    return Verification(
        structure, "", nothing, nothing, nothing, nothing, ~no, no, no, TOLERANCE[torch.float64]
    )


def _solved(
    path: Callable[..., Answered], leaves: Sequence[Tensor], lead: int, seed: int
) -> tuple[Answered, list[Tensor]]:
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        solution = path(*leaves)
        generator = torch.Generator().manual_seed(seed + WEIGHTS)
        # A failed row holds NaN, and would spread to shared parameters' gradients: none is shared
        # here.
        weights = [
            torch.randn(v.shape[lead:], generator=generator, dtype=torch.float64)
            .to(v.device, v.dtype)
            .expand_as(v)
            for v in solution.variables
        ]
        gradients = torch.autograd.grad(solution.variables, leaves, weights, allow_unused=True)
    return solution, [
        torch.zeros_like(leaf) if g is None else g
        for g, leaf in zip(gradients, leaves, strict=True)
    ]


def _joined(parts: Sequence[Tensor], lead: int) -> Tensor:
    """(*batch, .) of all entries."""
    return torch.cat([part.unsqueeze(-1).flatten(lead) for part in parts], -1)


def _relative(a: Tensor, b: Tensor, floor: float | Tensor) -> Tensor:
    return (a - b).norm(dim=-1) / b.norm(dim=-1).clamp(min=floor).clamp(min=1e-300)

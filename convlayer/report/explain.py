"""What runs, why, and what it costs, in words."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from convlayer.conic import costs
from convlayer.conic.kkt import prefers_dense
from convlayer.declaration.declaration import Declaration
from convlayer.paths.choice import Choice
from convlayer.paths.settings import Settings
from convlayer.solvers import Attempt, BatchSolver, ConeSolver
from convlayer.structures import Cost

POLISH, ADJOINT = 2, 4  # factorisations of a typical polish; solves of an adjoint, with its refinement
ENTROPIES = ("entr", "kl_div", "rel_entr")


def explained(choice: Choice, settings: Settings, executor: bool, batch: int) -> str:
    """The report of `ConvexLayer.explain`."""
    text, solving = _choice(choice, settings.regularise, batch), settings.solving
    if choice.kernel is not None:
        return text
    attempts = solving.attempts(choice.declared.canonical, batch, torch.device("cpu"))
    rest = _cone_program(choice.declared, attempts, solving.alone, solving.tolerance, executor, batch)
    return f"{text}\n{rest}"


def _choice(choice: Choice, regularise: float | str | None, batch: int) -> str:
    """The first part of the report: the path, why, and what every structure said.

    Where no kernel runs, what the cone program costs is told of it itself, and not estimated here.
    """
    recognition = choice.recognition
    lines = [("Path", f"{choice.structure}: {choice.why}")]
    if regularise == "least_norm":
        lines.append(("Regularised", "of all solutions the one of least norm"))
    elif regularise is not None:
        lines.append(
            ("Regularised", f"by a proximal term of weight {regularise:g} over all variables, part of the objective")
        )
    refused: dict[str, list[str]] = {}
    for finding in recognition.findings:
        if finding.match is None:
            refused.setdefault(str(finding.reason), []).append(finding.name)
            continue
        cost = f"; {_cost(finding.match.cost, batch)}" if finding.match.cost is not None else ""
        lines.append((f"  {finding.name}", f"yes: {finding.match.bound}{cost}"))
    if recognition.generic is not None and choice.kernel is not None:
        lines.append(
            ("  cone_program", f"always; about {_cost(recognition.generic, batch)}, estimated from its sparsity")
        )
    for reason, names in refused.items():
        lines.append(
            (f"  {names[0]}", f"no: {reason}") if len(names) == 1 else ("  no", f"{reason}: {', '.join(names)}")
        )
    return "\n".join(f"{name + ':':31}{value}" for name, value in lines)


def _cost(cost: Cost, batch: int) -> str:
    rows = f" for {batch} rows" if batch > 1 else ""
    return f"{_flops(batch * cost.flops)} and {_bytes(batch * cost.bytes)}{rows}, forward and backward"


def _bytes(count: float) -> str:
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= unit:
            return f"{count / unit:.3g} {name}"
    return f"{count:.0f} B"


def _cone_program(
    declared: Declaration, attempts: Sequence[Attempt], chosen: bool, tolerance: float, executor: bool, batch: int
) -> str:
    """The second part, where the cone program runs."""
    canonical = declared.canonical
    program, sizes, solver = canonical.program, canonical.sizes, attempts[0].solver
    moving = sum(len(rows) for rows in canonical.moving.values())
    left = program if chosen or canonical.elimination is None else canonical.elimination.program
    taken, (factor, solve) = solver.flops(left), costs.system_flops(left)
    others = [name for name in dict.fromkeys(attempt.solver.name for attempt in attempts) if name != solver.name]
    gone = program.n - left.n
    lines = [
        (
            "Problem",
            f"{sizes['variables']} variables and {sizes['constraints']} constraint rows; {sizes['parameters']} numbers in "
            f"{len(canonical.parameters)} parameter{'s' * (len(canonical.parameters) != 1)}"
            + (", log-log convex" if canonical.gp else ""),
        ),
        ("Cone program", f"{program.n} variables and {program.m} rows: {program.cones.describe()}"),
        *(
            [
                (
                    "Eliminated",
                    f"{gone} auxiliary variables and the rows that define them: {left.n} variables and {left.m} rows are left",
                )
            ]
            if gone
            else []
        ),
        (
            "Data",
            f"{'quadratic' if len(program.P_rows) else 'linear'} objective; {len(program.P_rows)} nonzeros in the upper triangle of P and "
            f"{len(program.A_rows)} in A, {moving} of them moved by parameters",
        ),
        (
            "Solver",
            f"{solver.name}, {_why(solver, chosen)}; relative tolerance {tolerance:g}, then Newton on the KKT residual map to rounding error"
            + (f"; {', '.join(others)} for rows that it does not settle" if others else ""),
        ),
        (
            "Runs on",
            "the parameters' device, in float64, all rows at once"
            if isinstance(solver, BatchSolver)
            else f"the host, in float64; rows on {'your executor' if executor else f'{os.cpu_count()} threads'}; "
            "other dtypes and devices are copied to and from",
        ),
        (
            "Forward",
            f"{_flops(batch * (taken + POLISH * factor))}{_for(batch)}: {_flops(taken)} a row in {solver.name}, the rest in the polish"
            if taken is not None
            else f"as many iterations as {solver.name} takes, and {_flops(batch * POLISH * factor)}{_for(batch)} in the polish",
        ),
        (
            "Backward",
            f"{_flops(ADJOINT * batch * solve)}{_for(batch)}: solves with the polish's last factor, "
            f"{'dense batched LU of the active rows' if gone or prefers_dense(left) else 'sparse LDL'}",
        ),
    ]
    text = "\n".join(f"{name + ':':14}{value}" for name, value in lines)
    hints = list(_hints(declared, batch))
    return "\n".join([text, *(f"{'Faster:' if not k else '':14}{hint}" for k, hint in enumerate(hints))])


def _for(batch: int) -> str:
    return f" for {batch} rows" if batch > 1 else " a row"


def _why(solver: ConeSolver, chosen: bool) -> str:
    if chosen:
        return "as you asked"
    if solver.manner:
        return f"{solver.manner}: the cheapest at this size and batch"
    return "which takes every cone"


def _hints(declared: Declaration, batch: int) -> Iterator[str]:
    kinds: dict[str, int] = {}
    for block in declared.canonical.program.cones.blocks:
        kinds[block.name] = max(kinds.get(block.name, 0), int(block.parameter or 0) if block.name == "psd" else 0)
    atoms = set() if declared.gp else _curved(declared.problem.objective.expr)
    if "second_order" in kinds and atoms & {"Pnorm", "PnormApprox"}:
        yield "a norm in the objective costs a second-order cone; its square (sum_squares) stays quadratic, if that serves you as well."
    if "psd" in kinds:
        yield f"a psd cone of size {kinds['psd']} costs about its sixth power; a factor model or a smaller block is the lever."
    if "exponential" in kinds and atoms & set(ENTROPIES):
        yield "an entropy costs exponential cones, which take more iterations than quadratic ones; a quadratic regulariser may serve instead."
    if batch == 1:
        yield "rows of a larger batch share the work that is done once a call."


def _curved(expression: Any) -> set[str]:
    """The atoms of an expression that hold a variable."""
    found: set[str] = set()
    seen, left = set(), [expression]
    while left:
        e = left.pop()
        if id(e) not in seen and not e.is_constant():
            seen.add(id(e))
            left += e.args
            found.add(type(e).__name__)
    return found


def _flops(count: float) -> str:
    for unit, name in ((1e12, "Tflop"), (1e9, "Gflop"), (1e6, "Mflop"), (1e3, "kflop")):
        if count >= unit:
            return f"{count / unit:.3g} {name}"
    return f"{count:.0f} flop"

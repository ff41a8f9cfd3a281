"""What runs, why, and what it costs, in words."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from convlayer.conic import costs
from convlayer.conic.costs import prefers_dense
from convlayer.conic.program import Program
from convlayer.core.rows import Plan
from convlayer.declaration.canonical import Canonical
from convlayer.declaration.declaration import Declaration
from convlayer.paths.choice import Choice
from convlayer.paths.dispatch import cheaper_core
from convlayer.paths.settings import Settings, Solving
from convlayer.paths.short import ShortWay
from convlayer.solvers import Attempt, BatchSolver, ConeSolver
from convlayer.structures import Cost

# factorisations of a typical polish; solves of an adjoint, with its refinement
POLISH, ADJOINT = (
    2,
    4,
)
ENTROPIES = ("entr", "kl_div", "rel_entr")


def described(choice: Choice, settings: Settings) -> str:
    """What a layer takes and returns, and what runs."""
    declared = choice.declared
    parameters = ", ".join(f"{p.name()}{tuple(p.shape)}" for p in declared.parameters)
    variables = ", ".join(f"{v.name()}{tuple(v.shape)}" for v in declared.variables)
    solver = f", solver={settings.solving.described}" if choice.kernel is None else ""
    return f"({parameters}) -> ({variables}), structure={choice.structure}{solver}"


def explained(choice: Choice, settings: Settings, executor: bool, batch: int) -> str:
    """The report of `ConvexLayer.explain`."""
    lines = list(_choice(choice, settings, batch))
    text = "\n".join(f"{name + ':':31}{value}" for name, value in lines)
    if choice.kernel is not None:
        return text
    attempts = settings.solving.attempts(choice.declared.canonical, batch, torch.device("cpu"))
    lines = _cone_program(choice.declared, attempts, settings.solving, executor, batch)
    rest = [f"{name + ':':14}{value}" for name, value in lines]
    for hint in _hints(choice.declared, batch):
        label = "Faster:" if len(rest) == len(lines) else ""
        rest.append(f"{label:14}{hint}")
    return "\n".join([text, *rest])


def _choice(choice: Choice, settings: Settings, batch: int) -> Iterator[tuple[str, str]]:
    """The first part: the path, why, and what every structure said.

    Where no kernel runs, what the cone program costs is told of it itself, and not estimated here.
    """
    regularise = settings.regularise
    yield "Path", f"{choice.structure}: {choice.why}"
    if regularise == "least_norm":
        yield "Regularised", "of all solutions the one of least norm"
    elif regularise is not None:
        yield (
            "Regularised",
            f"by a proximal term of weight {regularise:g} over all variables, part of the objective",
        )
    refused: dict[str, list[str]] = {}
    for finding in choice.recognition.findings:
        if finding.match is None:
            refused.setdefault(str(finding.reason), []).append(finding.name)
        elif finding.match.cost is None:
            yield f"  {finding.name}", f"yes: {finding.match.bound}"
        else:
            yield (
                f"  {finding.name}",
                f"yes: {finding.match.bound}; {_cost(finding.match.cost, batch)}",
            )
    short = None if choice.kernel is None else ShortWay.of(choice, settings)
    if short is not None:
        who = "the compiled core" if short.takes(batch) else "the kernel"
        yield "  at this batch", f"{who}, by their estimates; degenerate rows are the kernel's"
    if choice.recognition.generic is not None and choice.kernel is not None:
        cost = _cost(choice.recognition.generic, batch)
        yield "  cone_program", f"always; about {cost}, estimated from its sparsity"
    for reason, names in refused.items():
        if len(names) == 1:
            yield f"  {names[0]}", f"no: {reason}"
        else:
            yield "  no", f"{reason}: {', '.join(names)}"


def _cone_program(
    declared: Declaration, attempts: Sequence[Attempt], solving: Solving, executor: bool, batch: int
) -> list[tuple[str, str]]:
    """The second part, where the cone program runs."""
    canonical, solver = declared.canonical, attempts[0].solver
    program = canonical.program
    left = program  # after elimination
    if not solving.alone and canonical.elimination is not None:
        left = canonical.elimination.program
    lines = [
        ("Problem", _problem(canonical)),
        ("Cone program", f"{program.n} variables and {program.m} rows: {program.cones.describe()}"),
    ]
    if left.n < program.n:
        gone = f"{program.n - left.n} auxiliary variables and the rows that define them"
        lines.append(("Eliminated", f"{gone}: {left.n} variables and {left.m} rows are left"))
    lines.append(("Data", _data(canonical)))
    if canonical.stuffed:
        dense = "memory by CVXPY's own matrices, variables times parameter entries, for "
        lines.append(("Building", dense + "; ".join(f"`{part}`" for part in canonical.stuffed)))
    alone = solving.alone or declared.weight is not None
    core = None if alone else cheaper_core(canonical, solver, batch)
    if core is not None:
        lines.append(("Compiled", _compiled(core, batch)))
    lines.append(("Solver", _solver(attempts, solving)))
    lines.append(("Runs on", _where(solver, executor)))
    factor, solve = costs.system_flops(left)
    lines.append(("Forward", _forward(solver, left, factor, batch)))
    form = "sparse LDL"
    if left.n < program.n or prefers_dense(left):
        form = "dense batched LU of the active rows"
    backward = _flops(ADJOINT * batch * solve)
    lines.append(
        ("Backward", f"{backward}{_for(batch)}: solves with the polish's last factor, {form}")
    )
    return lines


def _compiled(core: Plan, batch: int) -> str:
    """What the compiled core does before the solver is asked."""
    taken = core.row_seconds * batch * 1e6
    time = f"{taken:.0f} us" if taken < 1000 else f"{taken / 1000:.1f} ms"
    return (
        "an interior point, Newton on the KKT residual map and the adjoint, sparse LDL', in compiled code: about "
        f"{time}{_for(batch)} on one core; the solver below gets the rows that are degenerate or not settled"
    )


def _problem(canonical: Canonical) -> str:
    sizes, count = canonical.sizes, len(canonical.parameters)
    numbers = f"{sizes['parameters']} numbers in {count} parameter{'' if count == 1 else 's'}"
    kind = ", log-log convex" if canonical.gp else ""
    return f"{sizes['variables']} variables and {sizes['constraints']} constraint rows; {numbers}{kind}"


def _data(canonical: Canonical) -> str:
    program = canonical.program
    objective = "quadratic" if len(program.P_rows) else "linear"
    moving = sum(len(rows) for rows in canonical.moving.values())
    return (
        f"{objective} objective; {len(program.P_rows)} nonzeros in the upper triangle of P and "
        f"{len(program.A_rows)} in A, {moving} of them moved by parameters"
    )


def _solver(attempts: Sequence[Attempt], solving: Solving) -> str:
    solver = attempts[0].solver
    if solving.alone:
        why = "as you asked"
    elif solver.manner:
        why = f"{solver.manner}: the cheapest at this size and batch"
    else:
        why = "which takes every cone"
    tolerance = f"relative tolerance {solving.tolerance:g}"
    text = (
        f"{solver.name}, {why}; {tolerance}, then Newton on the KKT residual map to rounding error"
    )
    others = [
        name
        for name in dict.fromkeys(attempt.solver.name for attempt in attempts)
        if name != solver.name
    ]
    return f"{text}; {', '.join(others)} for rows that it does not settle" if others else text


def _where(solver: ConeSolver, executor: bool) -> str:
    if isinstance(solver, BatchSolver):
        return "the parameters' device, in float64, all rows at once"
    workers = "your executor" if executor else f"{os.cpu_count()} threads"
    return (
        f"the host, in float64; rows on {workers}; other dtypes and devices are copied to and from"
    )


def _forward(solver: ConeSolver, program: Program, factor: float, batch: int) -> str:
    """factor: flops of a factorisation."""
    taken = solver.flops(program)
    if taken is None:
        polish = _flops(batch * POLISH * factor)
        return f"as many iterations as {solver.name} takes, and {polish}{_for(batch)} in the polish"
    total = _flops(batch * (taken + POLISH * factor))
    return f"{total}{_for(batch)}: {_flops(taken)} a row in {solver.name}, the rest in the polish"


def _cost(cost: Cost, batch: int) -> str:
    rows = f" for {batch} rows" if batch > 1 else ""
    return (
        f"{_flops(batch * cost.flops)} and {_bytes(batch * cost.bytes)}{rows}, forward and backward"
    )


def _bytes(count: float) -> str:
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= unit:
            return f"{count / unit:.3g} {name}"
    return f"{count:.0f} B"


def _for(batch: int) -> str:
    return f" for {batch} rows" if batch > 1 else " a row"


def _hints(declared: Declaration, batch: int) -> Iterator[str]:
    kinds: dict[str, int] = {}
    for block in declared.canonical.program.cones.blocks:
        kinds[block.name] = max(
            kinds.get(block.name, 0), int(block.parameter or 0) if block.name == "psd" else 0
        )
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

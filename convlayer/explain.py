"""What runs, why, and what it costs, in words."""

from __future__ import annotations

import os
from collections.abc import Sequence

from convlayer.canon import Canonical
from convlayer.dispatch import Recognition
from convlayer.kkt import prefers_dense
from convlayer.pattern import kkt_pattern
from convlayer.solvers import Attempt, Solver
from convlayer.structures import Cost

ITERATIONS = {
    "clarabel": 12,
    "interior_point": 10,
}  # a typical count; an interior-point method's hardly depends on the problem


CHEAPER = {"interior_point": "dense and batched", "daqp": "dense active sets, compiled, row by row"}


def explain_choice(
    recognition: Recognition, structure: str, why: str, regularise: float | str | None, batch: int
) -> str:
    """The first part of the report: the path, why, and what every structure said."""
    lines = [("Path", f"{structure}: {why}")]
    if regularise == "least_norm":
        lines.append(("Regularised", "of all solutions the one of least norm"))
    elif regularise is not None:
        lines.append(
            ("Regularised", f"by a proximal term of weight {regularise:g} over all variables, part of the objective")
        )
    for finding in recognition.findings:
        if finding.match is None:
            lines.append((f"  {finding.name}", f"no: {finding.reason}"))
            continue
        cost = f"; {_cost(finding.match.cost, batch)}" if finding.match.cost is not None else ""
        lines.append((f"  {finding.name}", f"yes: {finding.match.bound}{cost}"))
    if recognition.generic is not None:
        lines.append(
            ("  cone_program", f"always; about {_cost(recognition.generic, batch)}, estimated from its sparsity")
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


def explain_cone_program(
    canonical: Canonical, attempts: Sequence[Attempt], chosen: bool, tolerance: float, executor: bool, batch: int
) -> str:
    """The report of `ConvexLayer.explain` for the generic path."""
    program, sizes, solver = canonical.program, canonical.sizes, attempts[0].solver
    moving = sum(len(rows) for rows in canonical.moving.values())
    left = program if chosen or canonical.elimination is None else canonical.elimination.program
    pattern = kkt_pattern(left)
    factor, solve = pattern.flops, 4.0 * pattern.fill
    iterations = ITERATIONS.get(solver.name)
    others = [name for name in dict.fromkeys(attempt.solver.name for attempt in attempts) if name != solver.name]
    gone = program.n - left.n
    lines = [
        (
            "Problem",
            f"{sizes['variables']} variables and {sizes['constraints']} constraint rows; {sizes['parameters']} numbers in "
            f"{len(canonical.parameters)} parameters" + (", log-log convex" if canonical.gp else ""),
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
            if solver.batched
            else f"the host, in float64; rows on {'your executor' if executor else f'{os.cpu_count()} threads'}; "
            "other dtypes and devices are copied to and from",
        ),
        (
            "Forward",
            f"{_flops(batch * factor * (iterations + 2)) if iterations else 'as many iterations as the solver takes, and its polish,'}"
            f"{f' for {batch} rows' if batch > 1 else ' a row'}"
            + (
                f": about {iterations} factorisations of {_flops(factor)} in the solver, 1 or 2 in the polish"
                if iterations
                else ""
            ),
        ),
        (
            "Backward",
            f"{_flops(4 * batch * solve)}{f' for {batch} rows' if batch > 1 else ' a row'}: solves with the polish's last factor, "
            f"{'dense batched LU of the active rows' if gone or prefers_dense(left) else 'sparse LDL'}",
        ),
    ]
    text = "\n".join(f"{name + ':':14}{value}" for name, value in lines)
    hints = list(_hints(canonical, solver))
    return text + "\n" + "\n".join(f"{'Faster:' if not k else '':14}{hint}" for k, hint in enumerate(hints))


def _why(solver: Solver, chosen: bool) -> str:
    if chosen:
        return "as you asked"
    if solver.name in CHEAPER:
        return f"{CHEAPER[solver.name]}: the cheapest at this size and batch"
    return "the default (every cone, a quadratic objective, accurate)"


def _hints(canonical: Canonical, solver: Solver):
    program = canonical.program
    kinds = {block.name for block in program.cones.blocks}
    if "second_order" in kinds:
        yield "a norm in the objective costs a second-order cone; its square (sum_squares) stays quadratic, if that serves you as well."
    if "psd" in kinds:
        largest = max(int(block.parameter or 0) for block in program.cones.blocks if block.name == "psd")
        yield f"a psd cone of size {largest} costs about its sixth power; a factor model or a smaller block is the lever."
    if "exponential" in kinds or "power" in kinds:
        yield "exponential and power cones take more iterations than quadratic ones; a quadratic regulariser may serve instead of entropy."
    if not any(len(rows) for rows in canonical.moving.values()) and solver.name != "scs" and program.m:
        yield 'no parameter moves P or A: solver="scs" keeps one factorisation for all rows and starts warm (solve(..., warm_start=...)).'
    yield "larger batches share the work that is done once a call."


def _flops(count: float) -> str:
    for unit, name in ((1e12, "Tflop"), (1e9, "Gflop"), (1e6, "Mflop"), (1e3, "kflop")):
        if count >= unit:
            return f"{count / unit:.3g} {name}"
    return f"{count:.0f} flop"

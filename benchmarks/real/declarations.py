"""Forward and backward of every declaration at batch 1 and 16: ours against cvxpylayers and Moreau,
and how far the answers of each are from the truth."""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from benchmarks.accuracy import ROWS, differences, gradient_error
from benchmarks.programs.speed import SOLVED, over, solver
from benchmarks.real import control, design, finance, learning, networks, projections
from benchmarks.structures.rivals import CVXPYLAYERS, INCUMBENTS, MOREAU, incumbent
from benchmarks.structures.tasks import Layer, Variables
from benchmarks.structures.timing import Run, Timed, alternating, cell, errors, reason
from benchmarks.table import Family, Options, Row
from convlayer import ConvexLayer
from convlayer.problems import Declared, Prebuilt

CASES: dict[str, tuple[str, Prebuilt]] = {
    value.name: (module.__name__.rpartition(".")[2], value)
    for module in (finance, control, projections, networks, learning, design)
    for name, value in vars(module).items()
    if isinstance(value, Prebuilt) and name == value.name
}
BATCHES = (1, 16)
SECONDS, BRIEFLY = 0.8, 0.15  # a row
OURS, NAMES = "ours", ("ours", CVXPYLAYERS, MOREAU)
BATCH, VARIABLES, REFERENCE = "batch", "variables", "reference"
TOLERANCE = 1e-10
WANTED = {"ours solution": ("<=", 1e-6), "ours gradient": ("<=", 1e-5)}


def family(options: Options) -> Family:
    names = list(CASES)[::5] if options.quick and not options.cases else list(CASES)
    return Family(
        "declarations",
        "Forward and the gradient of all parameters, milliseconds: medians over calls that alternate, everything by default, float64. "
        f"`over PEER` is that peer over ours; a peer that fails, or whose solution is off by more than {SOLVED:.0%}, does not count "
        f"({MOREAU} drops, in silence, a cone that bare variables are in: `x >= 0`, `norm(x) <= 1`, `X >> 0`). "
        f"Errors are relative differences, the worst row, from our cone program by Clarabel at {TOLERANCE:g}; the gradient is that of "
        f"a fixed random weighting of the outputs. `{REFERENCE}` is how far the reference's own gradient is from 5-point differences, "
        f"on {ROWS} rows, kinks left out. Peers run on the host.",
        [(name, lambda name=name: measure(name, options)) for name in names],
        summary,
    )


@dataclass(frozen=True)
class Subject:
    """A declaration with the layers that take it, and why the others do not."""

    field: str
    case: Prebuilt

    @cached_property
    def declared(self) -> Declared:
        return self.case()

    def ours(self, **options: Any) -> ConvexLayer:
        declared = self.declared
        gp = not declared.problem.is_dcp()
        return ConvexLayer(
            declared.problem, declared.parameters, declared.variables, gp=gp, **options
        )

    @cached_property
    def reference(self) -> ConvexLayer:
        return self.ours(
            structure="generic", solver="clarabel", solver_args={"tolerance": TOLERANCE}
        )

    @cached_property
    def peers(self) -> dict[str, Layer | str]:
        return {name: self._peer(name) for name in INCUMBENTS}

    def _peer(self, name: str) -> Layer | str:
        try:
            return incumbent(name, self.declared)
        except Exception as error:  # a refusal is a finding
            return f"refused: {reason(error)}"


def measure(name: str, options: Options) -> Iterator[Row]:
    subject = Subject(*CASES[name])
    data, layer = subject.case.sample(max(BATCHES), 0), subject.ours()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for batch in BATCHES:
            yield row(subject, layer, tuple(t[:batch] for t in data), options)


def row(subject: Subject, layer: ConvexLayer, data: Variables, options: Options) -> Row:
    declared, batch = subject.declared, len(data[0])
    runs = {OURS: Run(layer, tuple(t.to(options.device) for t in data))}
    runs |= {
        name: Run(peer, data) for name, peer in subject.peers.items() if not isinstance(peer, str)
    }
    found: Mapping[str, Timed | str] = {
        name: peer for name, peer in subject.peers.items() if isinstance(peer, str)
    } | alternating(runs, BRIEFLY if options.quick else SECONDS)
    figures: dict[str, Any] = {
        "field": subject.field,
        VARIABLES: sum(x.size for x in declared.problem.variables()),
        BATCH: batch,
        "solver": solver(layer, batch),
        **{name: failed(found[name]) for name in NAMES},
    }
    reference, lost = Run(subject.reference, data), ""
    try:
        reference()
        off = {name: errors(reference, run, declared, declared) for name, run in runs.items()}
    except Exception as error:  # no row is left out because nobody knows its truth
        off, lost = {}, f"{REFERENCE}: {reason(error)}"
    wanted = dict(WANTED)
    for name in INCUMBENTS:
        mine, theirs = found[OURS], found[name]
        figures[over(name)] = None
        solved = bool(lost) or (name in off and off[name][0] is not None and off[name][0] <= SOLVED)
        if isinstance(mine, Timed) and isinstance(theirs, Timed) and solved:
            figures[over(name)] = theirs.total / mine.total
    if figures[over(CVXPYLAYERS)] is not None:
        wanted[over(CVXPYLAYERS)] = (">=", 1.0)
    for name in NAMES:
        solution, gradient = off.get(name, (None, None))
        figures |= {f"{name} solution": solution, f"{name} gradient": gradient}
    if not lost and batch >= ROWS:
        few = tuple(t[:ROWS] for t in data)
        weights, expected = differences(subject.case, subject.reference, few)[0]
        figures[REFERENCE] = gradient_error(subject.reference, few, weights, expected)
    return Row(f"{subject.case.name}, {batch}", figures, wanted, lost)


def failed(timed: Timed | str) -> float | str:
    words = cell(timed)
    told = isinstance(words, str) and not words.startswith("refused")
    return f"failed: {words}" if told else words


def summary(rows: list[Row]) -> Iterable[Row]:
    """By batch: geometric means of the ratios and the worst errors, how many of ours are slower, how
    many layers fail or are refused, and how many answers are off by more than 10 %."""
    ratios, of = tuple(map(over, INCUMBENTS)), ("solution", "gradient")
    columns = tuple(f"{name} {what}" for name in NAMES for what in of)
    for batch in BATCHES:
        those = [row.figures for row in rows if row.figures.get(BATCH) == batch]
        numbers = {
            c: [f[c] for f in those if isinstance(f.get(c), float)]
            for c in (*ratios, *columns, REFERENCE)
        }
        means = {c: statistics.geometric_mean(numbers[c]) for c in ratios if numbers[c]}
        worst = {c: max(numbers[c]) for c in (*columns, REFERENCE) if numbers[c]}
        middle = {c: statistics.median(numbers[c]) for c in (*columns, REFERENCE) if numbers[c]}
        slower = {c: f"{sum(x < 1 for x in numbers[c])} of {len(numbers[c])}" for c in ratios}
        missing = {name: sum(isinstance(f.get(name), str) for f in those) for name in NAMES}
        wrong = {c: sum(not x <= SOLVED for x in numbers[c]) for c in columns}
        yield Row(f"geometric mean of ratios, worst error, batch {batch}", means | worst)
        yield Row(f"median error, batch {batch}", middle)
        yield Row(f"ours slower, batch {batch}", slower)
        yield Row(f"failed or refused; off by {SOLVED:.0%}, batch {batch}", missing | wrong)

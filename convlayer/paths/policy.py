"""What becomes of rows that cannot be solved: `on_failure`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from convlayer.declaration.canonical import Canonical
from convlayer.declaration.declaration import Declaration
from convlayer.declaration.diagnose import ProblemError
from convlayer.declaration.inputs import BadRows
from convlayer.paths.closest import applies
from convlayer.paths.conflict import conflicts
from convlayer.paths.settings import one_of
from convlayer.paths.verdict import Verdict
from convlayer.solution import ParameterError, SolverError, Status, rows_in_words

CLOSEST = ("closest", "closest_few")
RAISING = ("raise", *CLOSEST)
POLICIES = ("raise", "nan", "keep", *CLOSEST)


def check_policy(on_failure: str, canonical: Callable[[], Canonical]) -> None:
    """ValueError: there is no such policy. ProblemError: there is no closest feasible problem to be
    had."""
    one_of("on_failure", on_failure, POLICIES)
    reason = applies(canonical()) if on_failure in CLOSEST else None
    if reason:
        raise ProblemError(
            f"on_failure={on_failure!r} takes zero, nonnegative and second-order cones; here {reason}."
        )


def refuse_bad(bad: BadRows, on_failure: str, batch: tuple[int, ...]) -> BadRows:
    """ParameterError, if that is the policy: rows whose parameters cannot be used."""
    if bad.which is not None and on_failure in RAISING:
        status = torch.where(bad.which, int(Status.BAD_INPUT), 0)
        raise ParameterError.of(status.view(batch), dict(bad.details))
    return bad


def refuse_failed(
    declared: Declaration,
    values: Sequence[Tensor],  # of each parameter, (B or 1, *shape)
    verdict: Verdict,
    details: Mapping[int, str],
    on_failure: str,
    batch: tuple[int, ...],
) -> None:
    """SolverError, if that is the policy: rows that failed, and which constraints contradict each
    other."""
    if on_failure not in RAISING or not bool(verdict.failed.any()):
        return
    reasons = dict(details)
    infeasible = torch.nonzero(verdict.status == Status.INFEASIBLE).flatten().tolist()
    for row, conflict in conflicts(declared, values, infeasible).items():
        name = f"{rows_in_words(torch.tensor([row]), batch)}: " if batch else ""
        reasons[row] = f"{reasons[row]} {name}{conflict}" if row in reasons else f"{name}{conflict}"
    raise SolverError.of(verdict.status.view(batch), reasons)

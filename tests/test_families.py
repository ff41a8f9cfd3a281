"""Quadratic programs that nobody here wrote, sparse by size and dense by condition: a row is
solved, by its optimality conditions, or says that it is not."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from convlayer import Status

# where `benchmarks` is, if pytest was not started there
sys.path.append(str(Path(__file__).parents[1]))

from benchmarks.programs.instances import DENSE, SPARSE, N, certificate, examine, instance

WITHIN, ROWS = 1e-8, 3
MODERATE = 1e4  # condition up to which every row is to be solved
BADLY_CONDITIONED = 20  # rows to be solved of the 24 beyond it
SIZES = {
    "random_quadratic_program": (4, 40),
    "equality_program": (10, 100),
    "predictive_control": (2, 12),
    "portfolio": (1, 20),
    "lasso": (2, 20),
    "huber": (1, 15),
    "support_vectors": (1, 30),
}
INSTANCES = [
    pytest.param(SPARSE[name], size, 1.0, id=f"{name}-{size}")
    for name in SPARSE
    for size in SIZES[name]
]
INSTANCES += [
    pytest.param(family, N, condition, id=name) for name, (family, condition) in DENSE.items()
]


@pytest.mark.filterwarnings("ignore::convlayer.AccuracyWarning")
@pytest.mark.parametrize(("family", "size", "condition"), INSTANCES)
def test_a_row_is_solved_as_its_optimality_conditions_say_or_is_marked(family, size, condition):
    these = instance(family, size, ROWS)
    findings = examine(these, these.layer().solve(*these.tensors()))
    for finding in findings:
        if finding.status is Status.SOLVED:
            assert finding.error <= WITHIN, finding
            assert finding.objective is None or finding.objective <= WITHIN, finding
    if condition <= MODERATE:
        assert all(
            finding.status is Status.SOLVED and finding.objective is not None
            for finding in findings
        )


@pytest.mark.filterwarnings("ignore::convlayer.AccuracyWarning")
def test_most_badly_conditioned_programs_are_solved_too():
    solved = 0
    for family, condition in DENSE.values():
        if condition > MODERATE:
            these = instance(family, N, ROWS)
            solved += int((these.layer().solve(*these.tensors()).status == Status.SOLVED).sum())
    assert solved >= BADLY_CONDITIONED


@pytest.mark.parametrize("name", SPARSE)
def test_the_certificate_sees_a_point_and_a_multiplier_that_are_off(name):
    """Otherwise the laws above would say nothing."""
    these = instance(SPARSE[name], SIZES[name][0], batch=1)
    these.set(these.batch[0])
    outputs = [x[0].detach().numpy() for x in these.layer().solve(*these.tensors()).variables]
    count, random = len(these.variables), np.random.default_rng(1)

    def violation(outputs):
        for variable, value in zip(these.variables, outputs[:count], strict=True):
            variable.value = value
        return max(certificate(these.problem, outputs[count:]).values())

    assert violation(outputs) <= WITHIN
    for k in range(len(outputs)):
        alike = outputs[:count] if k < count else outputs[count:]
        step = 1e-5 * max(np.abs(x).max() for x in alike)
        moved = [
            x + step * random.standard_normal(x.shape) if i == k else x
            for i, x in enumerate(outputs)
        ]
        assert violation(moved) > 10 * WITHIN, f"output {k}"


def test_the_batch_is_given_by_its_seed():
    first, again, other = (instance(SPARSE["lasso"], 4, seed=seed).tensors() for seed in (0, 0, 1))
    assert all(torch.equal(s, t) for s, t in zip(first, again, strict=True))
    assert not any(torch.equal(s, t) for s, t in zip(first, other, strict=True))

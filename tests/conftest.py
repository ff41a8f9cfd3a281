"""One torch thread, and how much of the product of laws, cases and modes a run takes.

`make test-all` (`--all`) takes all of it. Otherwise a law over many cases, or over cases times
modes, meets a Latin square of them: each mode and each combination of modes meets some cases, and
one law's cases are not the next one's. The files of WHOLE are not thinned: the laws that say what
right is meet every case in every run, so that no case goes without. A run that names its tests, by
`::` or `-k`, takes all that it names.
"""

import runpy
import sys
from collections import defaultdict
from pathlib import Path

import pytest
import torch

from convlayer.structures import STRUCTURES

torch.set_num_threads(1)  # the tensors here are small, and threads that share a core spin

EXAMPLES = Path(__file__).parent.parent / "examples"
KERNELS = Path(__file__).parent.parent / "convlayer" / "kernels"
LENGTHS = {False: "about 6 CPU-minutes, 4 minutes on two cores; `make test-all` for every law over every case: 9, or 5 on two cores",
           True: "every law over every case: about 9 CPU-minutes, 5 minutes on two cores"}  # fmt: skip
MANY, ENOUGH = 24, 6  # a law over so many combinations is thinned to about so many
WHOLE = (
    "test_gradient.py",  # residual, solution and gradient against CVXPY and differences: every case
    "test_structures.py",  # every spelling and near miss: a wrong match is the worst fault
    "test_mutants.py",
    "test_structure_mutants.py",
    # closed forms, at a hundredth of a second each
    *(f"test_kernel_{path.name}" for path in KERNELS.glob("*.py")),
    "test_refusals.py",  # each sentence is a case
)


# Laws of torch's own way through a cone program: they replace its parts, or look at them.
WITHOUT_CORE = (
    "test_mutants.py",
    "test_sparse.py",
    "test_retry.py",
    "test_kinks.py",
    "test_interior_point.py",
)


# Laws of kernels, whatever the batch: small ones of some structures would be the compiled core's.
OF_KERNELS = (
    "test_structures.py",
    "test_structure_mutants.py",
    "test_warm_start.py",
    "test_threads.py",
)


@pytest.fixture(autouse=True)
def _kernels_alone(request, monkeypatch):
    if request.path.name in OF_KERNELS or request.path.name.startswith("test_kernel_"):
        for structure in STRUCTURES.values():
            monkeypatch.setattr(type(structure), "compiled", False)


@pytest.fixture(autouse=True)
def _without_core(request, monkeypatch):
    if request.path.name in WITHOUT_CORE or request.node.get_closest_marker("without_core"):
        monkeypatch.setattr("convlayer.paths.cone_program.ConeProgram._core", lambda *_: None)
        monkeypatch.setattr("convlayer.paths.short.ShortWay.__call__", lambda *_: None)


def pytest_addoption(parser):
    parser.addoption(
        "--all", action="store_true", help="every law over every case, and the tests that take long"
    )


def pytest_configure(config):
    config.addinivalue_line(
        "markers",
        "dear: a law of a second or so a case, which meets a third of them however few they are",
    )
    config.addinivalue_line("markers", "without_core: of what torch does where there is no core")
    config.addinivalue_line(
        "markers",
        "long: takes ten CPU-seconds or so, for what shorter tests hold too; with --all only",
    )


def pytest_report_header(config):
    return LENGTHS[config.getoption("all")]


def pytest_collection_modifyitems(config, items):
    if config.getoption("all") or config.option.keyword or any("::" in arg for arg in config.args):
        return
    laws = defaultdict(lambda: defaultdict(list))
    for item in items:
        laws[item.path.name][item.originalname or item.name].append(item)
    left = set()
    for file, functions in laws.items():
        for turn, combinations in enumerate(functions.values()):
            if file not in WHOLE:
                left.update(outside_the_square(combinations, turn))
    left.update(item for item in items if item.get_closest_marker("long"))
    config.hook.pytest_deselected(items=[item for item in items if item in left])
    items[:] = [item for item in items if item not in left]


def outside_the_square(combinations: list[pytest.Function], turn: int) -> list[pytest.Function]:
    """Those of a law's combinations whose coordinates do not add up to `turn`, modulo a step no
    longer than the longest axis.

    So whatever the other coordinates are, some value on that axis is taken with them.
    """
    dear = combinations[0].get_closest_marker("dear") is not None
    if len(combinations) < MANY and not dear:
        return []
    places = [coordinates(item) for item in combinations]
    longest = max(map(len, map(set, zip(*places, strict=True))))
    step = min(max(len(combinations) // ENOUGH, 3 if dear else 1), longest)
    return [
        item for item, place in zip(combinations, places, strict=True) if (sum(place) - turn) % step
    ]


def coordinates(item: pytest.Function) -> tuple[int, ...]:
    """The place on each axis: of arguments that are given together the first counts, and a
    fixture's parameter is an axis too."""
    indices = dict(item.callspec.indices)
    for mark in item.iter_markers("parametrize"):
        names = mark.args[0]
        for name in (names.split(",") if isinstance(names, str) else names)[1:]:
            indices.pop(name.strip(), None)
    return tuple(indices.values())


@pytest.fixture
def run_example(tmp_path, monkeypatch, capsys):
    """Runs a script of `examples/` in this process and an empty folder, and returns what it
    prints."""

    def run(name: str, *arguments: str) -> str:
        monkeypatch.chdir(tmp_path)
        monkeypatch.syspath_prepend(EXAMPLES)  # as for a script, which imports its neighbours
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
        dtype = torch.get_default_dtype()
        try:
            with torch.random.fork_rng(devices=[]):
                runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        except SystemExit as ended:
            if ended.code:
                raise
        finally:
            torch.set_default_dtype(dtype)
        return capsys.readouterr().out

    return run

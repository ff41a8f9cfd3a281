"""The command line and the examples: they run, agree, and say what is wrong in words."""

import json
import os
import re
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import pytest
import torch

from convlayer.__main__ import main
from convlayer.command_line import doctor

ROOT = Path(__file__).parent.parent
OTHERS = ("demo", "sudoku", "distributed_training", "shortest_path")  # with tests of their own
EXAMPLES = sorted(
    path.stem
    for path in (ROOT / "examples").glob("*.py")
    if path.stem not in OTHERS and not path.stem.startswith("_")
)

MODEL = """
import cvxpy as cp
from convlayer import ConvexLayer, problems

b, x, k = cp.Parameter(3, name="b"), cp.Variable(3, name="x"), cp.Variable(integer=True)
problem = cp.Problem(cp.Minimize(cp.sum_squares(x - b)), [cp.sum(x) == 1, x >= 0])
layer = ConvexLayer(problem, [b], [x])
ridge = problems.ridge
whole = cp.Problem(cp.Minimize(cp.square(k)))
number = 3

def a_problem():
    return problem

def a_layer():
    return layer

def parts():
    return problem, [b], [x]

def with_arguments(n):
    return problem

u, v, w = cp.Variable(pos=True), cp.Variable(pos=True), cp.Parameter(pos=True)
log_convex = cp.Problem(cp.Minimize(u + v), [u * v >= w])
"""


@pytest.fixture
def model(tmp_path):
    path = tmp_path / "model.py"
    path.write_text(MODEL)
    return path


def command(*arguments, cwd):
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "MPLBACKEND": "Agg"},
    )


@pytest.mark.parametrize(
    ("dtype", "bound"), [("float64", 1e-6), pytest.param("float32", 1e-3, marks=pytest.mark.long)]
)
def test_the_comparison_writes_a_picture_and_its_figures_and_both_paths_agree(
    dtype, bound, tmp_path, capsys
):
    pytest.importorskip("matplotlib", reason="the comparison draws")
    pytest.importorskip("tqdm", reason="the comparison shows its progress")
    assert (
        main(["compare", "--quick", "--dtype", dtype, "--out", str(tmp_path / "new" / "folder")])
        == 0
    )
    said = capsys.readouterr().out
    figures = json.loads((tmp_path / "new" / "folder" / "compare.json").read_text())
    assert (tmp_path / "new" / "folder" / "compare.png").stat().st_size > 10_000
    assert [row["structure"] for row in figures["problems"]] == [
        "least_squares", "equality_constrained_qp", "entropic_optimal_transport", "leading_eigenspace", "total_variation", "quadratic_program",
    ]  # fmt: skip
    for row in figures["problems"]:
        assert max(row["value"], row["gradient"]) < bound, row
        assert row["title"] in said
    assert all(len(curve["specialised"]) == len(curve["sizes"]) for curve in figures["scaling"])
    ways = ("layer", "clarabel", "scs", "diffcp")
    for row in figures["small"]:  # in float64 either way
        assert max(row["value"], row["gradient"]) < 1e-6, row
        assert row["title"] in said
        assert min(row[way] for way in ways) > 0


@pytest.mark.parametrize("name", ["matplotlib", "tqdm"])
def test_without_its_optional_packages_the_comparison_says_what_to_install(
    name, monkeypatch, capsys
):
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "convlayer.command_line.compare", raising=False)
    monkeypatch.delitem(sys.modules, "convlayer.command_line.picture", raising=False)
    assert main(["compare", "--quick"]) == 2
    assert "pip install 'convlayer[examples]'" in capsys.readouterr().err


def test_a_device_that_is_not_there_is_refused_in_words(tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="the comparison draws")
    assert main(["compare", "--quick", "--device", "nowhere", "--out", str(tmp_path)]) == 2
    assert "The device 'nowhere' cannot be used" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["problem", "layer", "a_problem", "a_layer", "parts", "ridge"])
def test_a_problem_in_a_file_is_explained_whatever_object_it_is(model, name, capsys):
    assert main(["explain", f"{model}:{name}", "--batch", "7"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert f"Path: {'least_squares' if name == 'ridge' else 'sparsemax'}" in said
    assert "for 7 rows" in said


def test_a_log_log_convex_problem_is_explained_as_one(model, capsys):
    assert main(["explain", f"{model}:log_convex"]) == 0
    assert "log-log convex" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("model.py", r"Expected FILE:PROBLEM, such as model.py:problem; got 'model.py'"),
        ("absent.py:problem", r"There is no file absent.py"),
        ("model.py:nothing", r"model.py defines no `nothing`. It defines: .*problem, layer"),
        (
            "model.py:number",
            r"`number` is a int; expected a cvxpy.Problem, a ConvexLayer, or a function",
        ),
        (
            "model.py:with_arguments",
            r"`with_arguments\(\)` failed: TypeError: .* missing 1 required positional argument: 'n'",
        ),
        ("model.py:whole", r"integer"),
        (
            "broken.py:problem",
            r"broken.py could not be run: NameError: name 'cvxpy' is not defined",
        ),
        ("words.txt:problem", r"words.txt is not a Python file"),
    ],
)
def test_what_cannot_be_explained_is_refused_in_words(model, target, message, monkeypatch, capsys):
    monkeypatch.chdir(model.parent)
    Path("broken.py").write_text("problem = cvxpy.Problem()")
    Path("words.txt").write_text("problem")
    assert main(["explain", target]) == 2
    captured = capsys.readouterr()
    assert re.search(message, captured.err)
    assert not captured.out


def test_a_batch_of_none_is_refused(model, capsys):
    assert main(["explain", f"{model}:problem", "--batch", "0"]) == 2
    assert "--batch must be at least 1" in capsys.readouterr().err


def test_the_command_line_runs_as_a_module(model):
    run = command("-m", "convlayer", "explain", "model.py:problem", cwd=model.parent)
    assert run.returncode == 0, run.stderr[-2000:]
    assert "sparsemax" in run.stdout


def test_the_doctor_finds_everything_well(capsys):
    assert main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert all(words in said for words in ("torch", "device", "ok      cone_program"))
    assert "FAILED" not in said


def test_the_doctor_finds_what_is_wrong(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "TOLERANCE", 0.0)
    assert main(["doctor"]) == 1
    assert "FAILED  cone_program" in capsys.readouterr().out


def test_the_doctor_tells_every_dependency_blas_and_processor(capsys, monkeypatch):
    monkeypatch.setenv("MKL_CBWR", "COMPATIBLE")
    for name in ("STRUCTURES", "SOLVERS"):
        monkeypatch.setattr(doctor, name, {})
    monkeypatch.setattr(doctor, "_check_differences", lambda: True)
    assert main(["doctor"]) == 0
    lines = dict(re.findall(r"^(\S+) +(\S.*)$", capsys.readouterr().out, re.MULTILINE))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [
        wanted
        for name, extra in project["optional-dependencies"].items()
        if name != "dev"
        for wanted in extra
    ]
    needed = {re.match(r"[\w-]+", wanted).group() for wanted in (*project["dependencies"], *extras)}
    assert needed <= set(lines)
    assert (
        lines["torch"] == torch.__version__.partition("+")[0] or lines["torch"] == torch.__version__
    )
    assert torch.backends.cpu.get_cpu_capability() in lines["processor"]
    assert "MKL_CBWR=COMPATIBLE" in lines["environment"]
    assert "blas" in lines


def test_the_command_is_installed_and_tells_its_version(capsys):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    module, _, function = project["scripts"]["convlayer"].partition(":")
    command = getattr(import_module(module), function)
    with pytest.raises(SystemExit) as left:
        command(["--version"])
    assert left.value.code == 0
    assert capsys.readouterr().out == f"convlayer {project['version']}\n"
    assert command(["explain", "nothing"]) == 2


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_runs_agrees_with_the_cone_program_and_draws(name, run_example, tmp_path):
    pytest.importorskip("matplotlib", reason="examples draw")
    said = run_example(name)
    assert f"{name}: " in said
    assert "rows: agree." in said
    assert (tmp_path / "out" / f"{name}.png").stat().st_size > 10_000

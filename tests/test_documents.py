"""What the documents show runs: the README's code, the example."""

import ast
import re
import textwrap
from pathlib import Path

import cvxpy as cp
import pytest
import torch

from convlayer import ConvexLayer

ROOT = Path(__file__).parent.parent


def test_the_readmes_code_runs_and_does_what_its_comments_say(capsys):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    assert names["x_star"].shape == (32, 5)
    assert names["lam_t"].grad.shape == ()
    assert (names["solution"].status == 0).all()
    assert names["layer"].structure == "least_squares"
    printed = capsys.readouterr().out
    assert "least_squares: yes" in " ".join(printed.split())
    assert "agree." in printed


def test_the_readmes_recipe_for_rows_that_fail_learns_from_the_others():
    (recipe,) = re.findall(r"gets zero from it:\n\n((?:    .*\n)+)", (ROOT / "README.md").read_text())
    x, price, demand = cp.Variable(3), cp.Parameter(3, name="price"), cp.Parameter(name="demand")
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x) + price @ x), [cp.sum(x) == demand, x >= 0])
    inputs, target = torch.tensor([[0.1], [0.2]]), torch.zeros(2, 3)
    net = torch.nn.Linear(1, 3)
    names = {
        "net": net,
        "inputs": inputs,
        "target": target,
        "d": torch.tensor([1.0, -1.0]),
    }  # the second row is infeasible
    names["layer"] = ConvexLayer(problem, [price, demand], [x], on_failure="nan")
    exec(textwrap.dedent(recipe), names)
    names["loss"].backward()
    assert names["solved"].tolist() == [True, False]
    assert torch.isfinite(net.weight.grad).all()
    assert net.weight.grad.abs().max() > 0


@pytest.mark.parametrize("path", ["README.md", "CONTRIBUTING.md"])
def test_files_that_a_document_names_are_there(path):
    text = (ROOT / path).read_text()
    named = set(re.findall(r"`((?:convlayer|problems|tests|examples|benchmarks)/[\w./-]*)`", text))
    assert named
    assert not [name for name in named if not (ROOT / name).exists()]


def imported(module):
    """What a module of the package, or the modules of a folder of it, import from it when they are loaded."""
    folder = ROOT / "convlayer" / module
    for path in folder.glob("*.py") if folder.is_dir() else [folder.with_suffix(".py")]:
        for statement in ast.parse(path.read_text()).body:
            if isinstance(statement, ast.ImportFrom) and statement.module.split(".")[0] == "convlayer":
                inside = statement.module.split(".")[1:2]
                yield from inside or [name.name for name in statement.names]


def test_imports_run_in_the_order_in_which_modules_are_to_be_read():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    (listed,) = re.findall(r"in the order of the imports:(.*?)Imports run", text, re.DOTALL)
    order = re.findall(r"`(\w+)`", listed)
    assert len(order) == len(set(order)) > 40
    later = [(a, b) for k, a in enumerate(order) for b in imported(a) if b in order[k + 1 :]]
    assert not later


def test_the_example_learns_and_checks_its_gradient(run_example, tmp_path):
    pytest.importorskip("sklearn", reason="the example's data come with scikit-learn")
    assert "gradient check passed" in run_example("demo")
    assert (tmp_path / "out" / "demo.png").stat().st_size > 10_000


def test_the_sudoku_example_runs(run_example, tmp_path):
    for needed in ("matplotlib", "tqdm"):
        pytest.importorskip(needed, reason="the example draws a picture and shows its progress")
    assert "quadratic program, 40 learnt constraints" in run_example("sudoku", "--quick")
    assert (tmp_path / "out" / "sudoku.png").stat().st_size > 10_000

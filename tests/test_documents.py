"""What the documents show runs: the README's code, the example."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

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


@pytest.mark.parametrize("path", ["README.md", "CONTRIBUTING.md"])
def test_files_that_a_document_names_are_there(path):
    text = (ROOT / path).read_text()
    named = set(re.findall(r"`((?:convlayer|problems|tests|examples|benchmarks)/[\w./-]*)`", text))
    assert named
    assert not [name for name in named if not (ROOT / name).exists()]


def test_the_example_learns_and_checks_its_gradient(tmp_path):
    pytest.importorskip("sklearn", reason="the example's data come with scikit-learn")
    run = subprocess.run([sys.executable, ROOT / "examples" / "demo.py"], cwd=tmp_path, capture_output=True, text=True, check=False,
                         env={**os.environ, "MPLBACKEND": "Agg"})
    assert run.returncode == 0, run.stderr[-2000:]
    assert "gradient check passed" in run.stdout
    assert (tmp_path / "out" / "demo.png").stat().st_size > 10_000


def test_the_sudoku_example_runs(tmp_path):
    for needed in ("matplotlib", "tqdm"):
        pytest.importorskip(needed, reason="the example draws a picture and shows its progress")
    run = subprocess.run([sys.executable, ROOT / "examples" / "sudoku.py", "--quick"], cwd=tmp_path, capture_output=True, text=True,
                         check=False, env={**os.environ, "MPLBACKEND": "Agg"})
    assert run.returncode == 0, run.stderr[-2000:]
    assert "quadratic program, 40 learnt constraints" in run.stdout
    assert (tmp_path / "out" / "sudoku.png").stat().st_size > 10_000

"""What the package loads: all of its parts, wherever it is run, and nothing of torch's compiler
until something is compiled."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from importlib.machinery import PathFinder
from pathlib import Path

ROOT = Path(__file__).parent.parent

# sympy comes with torch.autograd.grad of a given cotangent
COMPILER = {
    "torch._dynamo",
    "torch._inductor",
}

# CVXPY tries solvers that are not ours, of which one loads the compiler itself: it counts as not
# installed here.
STAGES = """
import contextlib, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name == "moreau":
            raise ModuleNotFoundError(name, name=name)

def say(stage):
    print(stage, *sorted({compiler!r} & set(sys.modules)))

sys.meta_path.insert(0, Blocked())
import cvxpy as cp
import torch
import convlayer.__main__
say("import")
with contextlib.suppress(SystemExit), contextlib.redirect_stdout(sys.stderr):
    convlayer.__main__.main(["--help"])
say("help")
x, p = cp.Variable(3), cp.Parameter(3)
for constraints in ([x >= 0], [cp.norm(x) <= 1]):
    layer = convlayer.ConvexLayer(cp.Problem(cp.Minimize(cp.sum_squares(x - p)), constraints), [p], [x])
    theta = torch.ones(2, 3, requires_grad=True)
    layer(theta)[0].sum().backward()
    layer.solve(theta)
say("call")
"""


def test_the_compiler_is_not_loaded():
    code = STAGES.format(compiler=COMPILER)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["import", "help", "call"]


def test_a_command_in_the_root_finds_every_part_whatever_is_installed():
    """There the checkout's folder comes first, and what an installer knows of the others' places
    does not count."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = settings["tool"]["setuptools"]["packages"]
    folders = {
        path.parent.relative_to(ROOT) for path in (ROOT / "convlayer").glob("**/__init__.py")
    }
    assert {str(folder).replace(os.sep, ".") for folder in folders} <= set(packages)
    for package in packages:
        parent, _, name = package.rpartition(".")
        found = PathFinder.find_spec(name, [str(ROOT / parent.replace(".", os.sep))])
        assert getattr(found, "submodule_search_locations", None), package

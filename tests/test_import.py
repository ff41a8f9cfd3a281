"""What the package loads: torch's compiler is no part of it until something is compiled."""

from __future__ import annotations

import subprocess
import sys

COMPILER = {"torch._dynamo", "torch._inductor"}  # sympy comes with torch.autograd.grad of a given cotangent

# CVXPY tries solvers that are not ours, of which one loads the compiler itself: it counts as not installed here.
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

"""The compiled core says what torch's own way says, row by row, to the same bits in every batch."""

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import cvxpy as cp
import numpy as np
import pytest
import test_gradient
import torch
from cases import CASES

from convlayer import ConvexLayer, Status
from convlayer.cones import Exponential, Power, Psd, SecondOrder
from convlayer.cones.cone import rotate
from convlayer.core import rows
from convlayer.core.interface import core
from convlayer.core.library import SWITCH
from convlayer.core.rows import ConeRows, Outcome, solve_rows
from convlayer.paths.evaluation import evaluate
from convlayer.paths.short import Answered, ShortWay

ROOT = Path(__file__).parent.parent
D = torch.float64
pytestmark = pytest.mark.skipif(core() is None, reason="no compiled core was built")

CONES = {
    "second_order of 2": (ConeRows.SECOND_ORDER, SecondOrder(2)),
    "second_order of 5": (ConeRows.SECOND_ORDER, SecondOrder(5)),
    "psd of 2": (ConeRows.PSD, Psd(2)),
    "psd of 5": (ConeRows.PSD, Psd(5)),
    "exponential": (ConeRows.EXPONENTIAL, Exponential()),
    **{f"power {a}": (ConeRows.POWER, Power(a)) for a in (0.03, 0.3, 0.5, 0.9)},
}


@pytest.mark.parametrize("name", CONES)
def test_a_cone_projects_as_the_python_one(name):
    kind, cone = CONES[name]
    library, size = core(), cone.size
    generator = torch.Generator().manual_seed(1)
    points = torch.randn(2000, size, dtype=D, generator=generator)
    points[::2] *= 10.0 ** (4 * torch.randn(1000, size, dtype=D, generator=generator))
    s, spectrum = cone.linearise(-points)
    y, margin = points + s, cone.margin(-points, s)
    assert library is not None
    for k, v in enumerate(points):
        mine = [np.zeros(n) for n in (size, size, size * size, 1)]
        library.core_cone(
            ctypes.c_int32(kind),
            ctypes.c_int32(size),
            ctypes.c_int32(int(cone.parameter or 0) if kind is ConeRows.PSD else 0),
            ctypes.c_double(float(cone.parameter or 0)),
            *(ctypes.c_void_p(part.ctypes.data) for part in (v.numpy(), *mine)),
        )
        scale = float(v.abs().max())
        assert np.abs(mine[0] - y[k].numpy()).max() <= 1e-13 * scale
        assert np.abs(mine[1] - s[k].numpy()).max() <= 1e-13 * scale
        assert abs(mine[3][0] - float(margin[k])) <= 1e-12 * scale
        if float(margin[k]) > 1e-6 * scale:
            values = spectrum.values[k]
            eye = torch.eye(size, dtype=D)
            if spectrum.basis is None:
                expected = torch.diag(1 - values)
            else:
                basis = spectrum.basis[k]
                expected = torch.stack([rotate(basis, (1 - values) * (basis.mT @ e)) for e in eye])
            assert np.abs(mine[2].reshape(size, size) - expected.numpy()).max() <= 1e-9


def solved(layer, values, batch, threads=None):
    canonical = layer._canonical
    entries = [
        reader.read(value) for reader, value in zip(canonical.parameters, values, strict=True)
    ]
    data, _ = evaluate(canonical, entries, False, torch.zeros((), dtype=D))
    return solve_rows(canonical.core, batch, (data.P, data.q, data.A, data.b), 1e-8)


def taken():
    """The cases that the core takes."""
    return [
        name
        for name, case in CASES.items()
        if case.layer(structure="generic")._canonical.core is not None
    ]


@pytest.mark.parametrize("name", taken())
def test_the_core_settles_what_torch_settles_and_agrees(name):
    """x, visible multipliers and the adjoint are those of Clarabel and torch."""
    case = CASES[name]
    layer, tensors = case.layer(structure="generic"), case.sample(4, seed=3)
    canonical = layer._canonical
    values = layer._front.values(tensors, layer._front.shapes(tensors)[2])
    found = solved(layer, values, 4)
    reference = layer.with_options(solver="clarabel", on_failure="keep").solve(*tensors)
    settled = found.settled
    x, _, y = reference.iterate
    seen_x, seen_y = canonical.visible
    assert not (settled & (reference.status != Status.SOLVED)).any()
    for mine, theirs, seen in ((found.x, x, seen_x), (found.y, y, seen_y)):
        if len(seen):
            error = ((mine - theirs).abs() * seen)[settled & ~reference.degenerate]
            size = 1 + theirs.abs().amax(1, keepdim=True)[settled & ~reference.degenerate]
            assert bool((error <= 1e-7 * size).all())
    assert int(settled.sum()) >= 4 - int(reference.degenerate.sum())


@pytest.mark.parametrize("name", [name for name in taken() if not CASES[name].gp][::3])
def test_the_derivative_with_the_core_is_that_without(name):
    case = CASES[name]
    layer, tensors = case.layer(structure="generic"), case.sample(3, seed=5)
    other = layer.with_options(solver="clarabel")
    bars = []
    for one in (layer, other):
        inputs = [tensor.clone().requires_grad_() for tensor in tensors]
        outputs = one(*inputs)
        weights = [
            torch.linspace(-1, 2, out.numel(), dtype=D).reshape(out.shape) for out in outputs
        ]
        total = sum((out * weight).sum() for out, weight in zip(outputs, weights, strict=True))
        bars.append(torch.autograd.grad(total, inputs, allow_unused=True))
    for mine, theirs in zip(*bars, strict=True):
        assert (mine - theirs).abs().max() <= 1e-7 * (1 + theirs.abs().max())


def test_a_row_has_the_same_bits_in_every_batch():
    case = CASES["every_cone"] if "every_cone" in taken() else CASES["lasso"]
    layer, tensors = case.layer(structure="generic"), case.sample(40, seed=2)
    values = layer._front.values(tensors, layer._front.shapes(tensors)[2])
    whole = solved(layer, values, 40)
    for k in (0, 17, 39):
        alone = solved(layer, [v if len(v) == 1 else v[k : k + 1] for v in values], 1)
        assert torch.equal(alone.x[0], whole.x[k])
        assert torch.equal(alone.report[0], whole.report[k])


def test_what_is_degenerate_is_left_to_torch():
    c, x = cp.Parameter(2), cp.Variable(2)
    face = ConvexLayer(cp.Problem(cp.Minimize(c @ x), [x >= 0, cp.sum(x) == 1]), [c], [x])
    tied = solved(face, [torch.ones(1, 2, dtype=D)], 1)
    assert tied.report[0, 0] == Outcome.SINGULAR
    p = cp.Parameter(2)
    edge = ConvexLayer(
        cp.Problem(cp.Minimize(cp.sum_squares(x - p)), [x >= 0]), [p], [x], structure="generic"
    )
    kink = solved(edge, [torch.tensor([[0.0, 1.0]], dtype=D)], 1)
    assert kink.report[0, 0] != Outcome.SETTLED
    assert edge.solve(torch.tensor([0.0, 1.0], dtype=D)).degenerate


def test_a_solution_that_is_not_unique_is_left_to_torch_whichever_way_it_may_move():
    """The test's random vector is nearly orthogonal to some of these directions."""
    n = 40
    c, x = cp.Parameter(n), cp.Variable(n)
    layer = ConvexLayer(cp.Problem(cp.Minimize(c @ x), [x >= 0, cp.sum(x) == 1]), [c], [x])
    pairs = torch.combinations(torch.arange(n))
    costs = 1 + torch.rand(len(pairs), n, dtype=D, generator=torch.Generator().manual_seed(0))
    costs.scatter_(1, pairs, 0.5)  # two that are tied
    found = solved(layer, [costs], len(pairs))
    assert not found.settled.any()


def twice():
    """Curved constraints, each of them with two bounds that are equal: where they are active no
    multiplier is the only one."""
    x, r = cp.Variable(3), cp.Parameter(2)
    wall = cp.bmat([[1 + x[0], x[1], 0], [x[1], 1 - x[0], x[2]], [0, x[2], 0]])
    return {
        "second order": (x, r, [cp.norm(x) <= r[k] for k in range(2)]),
        "psd": (x, r, [wall + r[k] * np.eye(3) >> 0 for k in range(2)]),
        "exponential": (x, r, [cp.sum(cp.exp(x)) <= 1 + r[k] for k in range(2)]),
        "power": (x, r, [cp.norm(x, 3) <= r[k] for k in range(2)]),
    }


@pytest.mark.parametrize("kind", twice())
def test_multipliers_that_are_not_unique_are_left_to_torch(kind):
    x, r, rules = twice()[kind]
    q = cp.Parameter(3)
    objective = cp.Minimize(q @ x + 0.1 * cp.sum_squares(x))
    layer = ConvexLayer(cp.Problem(objective, rules), [q, r], [x], structure="generic")
    costs = torch.randn(16, 3, dtype=D, generator=torch.Generator().manual_seed(0)) * 3
    values = [costs, torch.ones(1, 2, dtype=D)]
    found = solved(layer, values, 16)
    reference = layer.with_options(solver="clarabel").solve(costs, values[1][0])
    assert reference.degenerate.any()
    assert not (found.settled & reference.degenerate).any()
    assert torch.equal(layer.solve(costs, values[1][0]).degenerate, reference.degenerate)


@pytest.mark.parametrize("status", [Status.INFEASIBLE, Status.UNBOUNDED, Status.BAD_INPUT])
def test_rows_without_a_solution_do_not_reach_the_others(status):
    a, x = cp.Parameter(2), cp.Variable(2)
    layer = ConvexLayer(
        cp.Problem(cp.Minimize(a @ x + cp.pos(x[0])), [x[1] >= 0, x[0] >= -1, cp.sum(x) >= a[1]]),
        [a],
        [x],
        on_failure="nan",
        structure="generic",
    )
    bad = {
        Status.INFEASIBLE: None,
        Status.UNBOUNDED: [0.1, -1.0],
        Status.BAD_INPUT: [float("nan"), 1.0],
    }[status]
    if bad is None:
        b, z = cp.Parameter(), cp.Variable()
        layer = ConvexLayer(
            cp.Problem(cp.Minimize(z**2), [z >= b, z <= 1]), [b], [z], on_failure="nan"
        )
        values = torch.tensor([0.5, 2.0, 0.2], dtype=D)
    else:
        values = torch.tensor([[0.3, 1.0], bad, [0.7, 2.0]], dtype=D)
    solution = layer.solve(values)
    assert solution.status.tolist() == [0, int(status), 0]
    alone = layer.solve(values[:1])
    assert torch.equal(alone.variables[0][0], solution.variables[0][0])


FAULTS = {
    "the sign": lambda w, u: (-w, -u),
    "the sign of u": lambda w, u: (w, -u),
    "the order of x": lambda w, u: (w.flip(1), u),
    "the units of u": lambda w, u: (w, u * 1.001),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_law_of_differences_catches_a_fault_of_the_core(fault, monkeypatch):
    """Where rows are solved one way and another, and the core's adjoint serves its own."""
    law = test_gradient.test_the_gradient_of_variables_duals_and_value_is_that_of_five_point_differences
    original = rows.Solved.adjoint

    def adjoint(self, places, x_bar, y_bar):
        w, u, good = original(self, places, x_bar, y_bar)
        return *FAULTS[fault](w, u), good

    monkeypatch.setattr(ShortWay, "__call__", lambda *_: None)
    law(CASES["quadratic_program"])
    monkeypatch.setattr(rows.Solved, "adjoint", adjoint)
    with pytest.raises(AssertionError):
        law(CASES["quadratic_program"])


SHORT_FAULTS = {
    "the sign": lambda bars: [-bar for bar in bars],
    "the order": lambda bars: [bar.flatten().flip(0).reshape(bar.shape) for bar in bars],
    "the units of one": lambda bars: [*bars[:-1], 1.001 * bars[-1]],
    "one row for another": lambda bars: [bar.roll(1, 0) for bar in bars],
}


@pytest.mark.parametrize("fault", SHORT_FAULTS)
def test_the_law_of_differences_catches_a_fault_of_the_short_way(fault, monkeypatch):
    law = test_gradient.test_the_gradient_of_variables_duals_and_value_is_that_of_five_point_differences
    original = Answered.cotangents
    monkeypatch.setattr(
        Answered, "cotangents", lambda self, *given: SHORT_FAULTS[fault](original(self, *given))
    )
    with pytest.raises(AssertionError):
        law(CASES["quadratic_program"])


def test_switched_off_the_answers_agree():
    script = (
        "import torch; from convlayer import problems\n"
        "layer = problems.portfolio.layer(8).with_options(structure='generic')\n"
        "t = [v.double().requires_grad_() for v in problems.portfolio.sample(3, 0, 8)]\n"
        "x = layer(*t)[0]; x.square().sum().backward()\n"
        "print(*[repr(v) for part in (x, *(p.grad for p in t)) for v in part.flatten().tolist()])"
    )
    found = []
    for switch in ("0", "baseline", "1"):
        done = subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, SWITCH: switch},
            capture_output=True,
            text=True,
            check=True,
            cwd=ROOT,
        )
        found.append(np.array([float(value) for value in done.stdout.split()]))
    for other in found[1:]:
        assert np.abs(found[0] - other).max() <= 1e-9 * (1 + np.abs(found[0]).max())

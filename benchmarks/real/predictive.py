"""Model predictive control: a controller at the size of a published comparison, and three families
of small quadratic programs, as robots solve them, to 1e-9 beside DAQP alone."""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import cvxpy as cp
import daqp
import numpy as np
import torch
from scipy.linalg import expm
from torch import Tensor

from benchmarks.programs.speed import SOLVED, over
from benchmarks.structures.rivals import CVXPYLAYERS, INCUMBENTS, incumbent
from benchmarks.structures.timing import Run, Timed, alternating, cell, errors
from benchmarks.table import Family, Options, Row
from convlayer import ConvexLayer
from convlayer.problems import Declared

HORIZON, STATES, INPUTS, BATCHES = 20, 8, 4, (1, 128)
# acados on four cores of a laptop, forward and adjoint, milliseconds: Frey et al. (2025),
# Differentiable nonlinear model predictive control.
PUBLISHED = {128: 12.2 + 41.4}
PROBLEMS, ACCURACY, REPEATS = 22, 1e-9, 15
EQUALITY, FREE = 5, -1e30
Program = tuple[np.ndarray, ...]  # P, q, G, h


def family(options: Options) -> Family:
    tasks: list[tuple[str, Callable[[], Iterator[Row]]]] = [("control", lambda: control(options))]
    tasks += [(name, lambda name=name: robots(name, options)) for name in ROBOTS]
    return Family(
        "predictive",
        f"`control`: horizon {HORIZON}, {STATES} states, {INPUTS} bounded inputs, declared stage by stage; forward and the gradient in the "
        "initial state, milliseconds; `published` is the sum of both by acados on four cores. "
        "The robots' families: forward alone, milliseconds, of dense programs one by one (medians over them) and of all in one call; "
        f"`solved` is the share whose primal and dual residual and gap, by their own formulas, are below {ACCURACY:g}; `over DAQP` is our time over "
        "that of DAQP alone on the same arrays.",
        tasks,
    )


def controller() -> tuple[Declared, Callable[[int], Tensor]]:
    """With a stable system, and inputs that are bounded on about a third of the horizon."""
    random = np.random.default_rng(0)
    A = expm(0.1 * (random.standard_normal((STATES, STATES)) - 1.5 * np.eye(STATES)))
    B = 0.3 * random.standard_normal((STATES, INPUTS))
    x, u = cp.Variable((HORIZON + 1, STATES)), cp.Variable((HORIZON, INPUTS))
    start, cost = cp.Parameter(STATES), 0
    limits = [x[0] == start, u <= 0.5, u >= -0.5]
    for t in range(HORIZON):
        cost += cp.sum_squares(x[t + 1]) + 0.1 * cp.sum_squares(u[t])
        limits.append(x[t + 1] == A @ x[t] + B @ u[t])
    problem = cp.Problem(cp.Minimize(cost), limits)
    generator = torch.Generator().manual_seed(1)

    def sample(batch: int) -> Tensor:
        return torch.randn(batch, STATES, dtype=torch.float64, generator=generator)

    return Declared("control", problem, (start,), (u, x)), sample


def control(options: Options) -> Iterator[Row]:
    declared, sample = controller()
    layer = ConvexLayer(declared.problem, declared.parameters, declared.variables)
    for batch in BATCHES:
        data = (sample(batch),)
        runs, found = {"ours": Run(layer, data)}, {}
        for name in INCUMBENTS:
            try:
                runs[name] = Run(incumbent(name, declared), data)
            except Exception as error:
                found[name] = f"refused: {type(error).__name__}"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found |= alternating(runs, 0.5 if options.quick else 3.0)
        reference = Run(layer.with_options(solver="clarabel"), data)
        reference()
        figures: dict[str, Any] = {"batch": batch, "ours": cell(found["ours"])}
        for name in INCUMBENTS:
            mine, theirs = found["ours"], found[name]
            figures[name] = cell(theirs)
            if isinstance(mine, Timed) and isinstance(theirs, Timed):
                off = errors(reference, runs[name], declared, declared)[0]
                if name == CVXPYLAYERS or (off is not None and off <= SOLVED):
                    figures[over(name)] = theirs.total / mine.total
        figures["published"] = PUBLISHED.get(batch)
        yield Row(
            f"control {batch}",
            figures,
            {"ours": ("<=", PUBLISHED[batch])} if batch in PUBLISHED else {},
        )


def walking(random: np.random.Generator) -> Program:
    """A walking robot's centre of mass, a triple integrator, whose pressure point is to stay on its
    feet. Wieber (2006)."""
    n, step, height = 16, 0.1, 0.8
    A = np.array([[1, step, step**2 / 2], [0, 1, step], [0, 0, 1]])
    B = np.array([step**3 / 6, step**2 / 2, step])
    pressure, speed = np.array([1, 0, -height / 9.81]), np.array([0.0, 1, 0])
    free, forced = _condensed(A, B[:, None], n)
    start = np.array([0.02, 0.1, 0.1]) * random.standard_normal(3)
    at, on = free @ start, forced.reshape(n, 3, n)
    feet = 0.15 * np.repeat(np.arange(4), 4) * random.uniform(0.8, 1.2)
    z, z_u = at.reshape(n, 3) @ pressure, np.einsum("k,tkj->tj", pressure, on)
    v, v_u = at.reshape(n, 3) @ speed, np.einsum("k,tkj->tj", speed, on)
    P = 1e-3 * np.eye(n) + v_u.T @ v_u
    q = v_u.T @ (v - 0.3)
    return P, q, np.vstack([z_u, -z_u]), np.r_[feet + 0.08 - z, z - feet + 0.08]


def balancing(random: np.random.Generator) -> Program:
    """A wheeled inverted pendulum that is to move its wheels, with bounded acceleration."""
    n, step, length = 50, 0.02, 0.6
    continuous = np.zeros((5, 5))
    continuous[0, 2], continuous[1, 3], continuous[3, 1] = 1, 1, 9.81 / length
    continuous[2, 4], continuous[3, 4] = 1, -1 / length
    both = expm(step * continuous)
    free, forced = _condensed(both[:4, :4], both[:4, 4:], n)
    start = np.array([0, 0.1, 0.3, 0.1]) * random.standard_normal(4)
    goal = np.tile(np.array([random.uniform(-0.5, 0.5), 0, 0, 0]), n)
    weight = np.tile(np.array([1.0, 1e-1, 1e-2, 1e-2]), n)
    weight[-4:] *= 100
    P = forced.T @ (weight[:, None] * forced) + 1e-3 * np.eye(n)
    q = forced.T @ (weight * (free @ start - goal))
    return P, q, np.vstack([np.eye(n), -np.eye(n)]), np.full(2 * n, 5.0)


def quadruped(random: np.random.Generator) -> Program:
    """The forces of two pairs of feet in turn, within friction pyramids, that move a body. Di Carlo
    et al. (2018)."""
    stages, step, mass, friction = 8, 0.05, 12.0, 0.6
    feet = np.array(
        [[0.2, 0.15, -0.3], [-0.2, -0.15, -0.3], [0.2, -0.15, -0.3], [-0.2, 0.15, -0.3]]
    )
    inertia = np.diag([0.07, 0.26, 0.24])
    A, B = np.eye(12), np.zeros((stages, 12, 6))
    A[:3, 3:6] = A[6:9, 9:12] = step * np.eye(3)
    for t in range(stages):
        for k, foot in enumerate(feet[:2] if t < stages // 2 else feet[2:]):
            arm = foot + 0.02 * random.standard_normal(3)
            cross = np.cross(np.eye(3), arm).T
            B[t, 3:6, 3 * k : 3 * k + 3] = step / mass * np.eye(3)
            B[t, 9:12, 3 * k : 3 * k + 3] = step * np.linalg.solve(inertia, cross)
    n = 6 * stages
    forced, free = np.zeros((12 * stages, n)), np.zeros((12 * stages, 12))
    power, columns = np.eye(12), np.zeros((12, n))
    fall, drop = np.zeros(12 * stages), np.zeros(12)
    for t in range(stages):
        power, columns = A @ power, A @ columns
        columns[:, 6 * t : 6 * t + 6] += B[t]
        drop = A @ drop - step * 9.81 * np.eye(12)[5]
        free[12 * t : 12 * t + 12], forced[12 * t : 12 * t + 12] = power, columns
        fall[12 * t : 12 * t + 12] = drop
    weight = np.tile(
        np.r_[np.full(3, 50.0), np.full(3, 1.0), np.full(3, 20.0), np.full(3, 0.1)], stages
    )
    start = 0.05 * random.standard_normal(12)
    P = forced.T @ (weight[:, None] * forced) + 1e-5 * np.eye(n)
    q = forced.T @ (weight * (free @ start + fall))
    pyramid = np.array(
        [
            [1, 0, -friction],
            [-1, 0, -friction],
            [0, 1, -friction],
            [0, -1, -friction],
            [0, 0, 1.0],
            [0, 0, -1.0],
        ]
    )
    G = np.kron(np.eye(2 * stages), pyramid)
    return P, q, G, np.tile([0, 0, 0, 0, 150.0, 0], 2 * stages)


ROBOTS = {"walking": walking, "balancing": balancing, "quadruped": quadruped}


def _condensed(A: np.ndarray, B: np.ndarray, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """The states from 1 on by the first, and by the inputs."""
    n, k = B.shape
    free, forced = np.zeros((n * steps, n)), np.zeros((n * steps, k * steps))
    power, columns = np.eye(n), np.zeros((n, k * steps))
    for t in range(steps):
        power, columns = A @ power, A @ columns
        columns[:, k * t : k * t + k] += B
        free[n * t : n * t + n], forced[n * t : n * t + n] = power, columns
    return free, forced


def robots(name: str, options: Options) -> Iterator[Row]:
    random = np.random.default_rng(0)
    programs = [ROBOTS[name](random) for _ in range(4 if options.quick else PROBLEMS)]
    (m, n) = programs[0][2].shape
    P, q = cp.Parameter((n, n), PSD=True), cp.Parameter(n)
    G, h, x = cp.Parameter((m, n)), cp.Parameter(m), cp.Variable(n)
    limits = [G @ x <= h]
    problem = cp.Problem(cp.Minimize(cp.quad_form(x, P) / 2 + q @ x), limits)
    layer = ConvexLayer(problem, [P, q, G, h], [x, limits[0].dual_variables[0]])
    batch = [torch.from_numpy(np.stack(part)) for part in zip(*programs, strict=True)]
    ours, theirs, worst = [], [], []
    repeats = 3 if options.quick else REPEATS
    for k, program in enumerate(programs):
        rows = [part[k] for part in batch]
        ours.append(_fastest(lambda rows=rows: layer(*rows), repeats))
        theirs.append(_fastest(lambda program=program: _by_daqp(*program), repeats))
        worst.append(_residual(program, *(part.numpy() for part in layer(*rows))))
    with torch.no_grad():
        together = _fastest(lambda: layer(*batch), repeats) / len(programs)
    all_by_daqp = statistics.fmean(theirs)
    figures = {
        "variables": n,
        "inequalities": m,
        "problems": len(programs),
        "solved": sum(r <= ACCURACY for r in worst) / len(programs),
        "worst residual": max(worst),
        "ours, one": 1e3 * statistics.median(ours),
        "DAQP": 1e3 * statistics.median(theirs),
        "one over DAQP": statistics.median(ours) / statistics.median(theirs),
        "ours, of all": 1e3 * together,
        "all over DAQP": together / all_by_daqp,
    }
    yield Row(name, figures, {"solved": (">=", 1.0), "all over DAQP": ("<=", 2.0)})


def _fastest(run: Callable[[], Any], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def _by_daqp(P: np.ndarray, q: np.ndarray, G: np.ndarray, h: np.ndarray) -> np.ndarray:
    return daqp.solve(P, q, G, h, np.full(len(h), FREE), np.zeros(len(h), dtype=np.int32))[0]


def _residual(program: Program, x: np.ndarray, y: np.ndarray) -> float:
    """The largest of primal residual, dual residual and gap, as they are."""
    P, q, G, h = program
    primal = max((G @ x - h).max(), 0.0)
    dual = max(np.abs(P @ x + q + G.T @ y).max(), (-y).max(), 0.0)
    return float(max(primal, dual, abs(x @ P @ x + q @ x + h @ y)))

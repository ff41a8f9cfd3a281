"""Laws of the smoothed zero: its equations, its derivative by differences, its limit, and what it
says where there is none."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from cases import CASES
from torch import Tensor

from convlayer.autodiff.threads import one_thread
from convlayer.cones import Cone, Nonnegative, Product, Psd, SecondOrder, Zero
from convlayer.conic.adjoint import adjoint, pull_back
from convlayer.conic.kkt import Visible
from convlayer.conic.polish import Root, polish
from convlayer.conic.program import Data, Operators, Program
from convlayer.conic.residual import normalise, recentre
from convlayer.conic.smoothing import smoothed
from convlayer.paths.evaluation import evaluate
from convlayer.solvers.clarabel import Clarabel
from convlayer.solvers.dealing import solve_batch

FOUND = 1e-12
NAMES = (
    "linear_program",
    "transport",
    "quadratic_program",
    "lasso",
    "raw_second_order",
    "norm_ball",
    "spectraplex",
    "nearest_correlation",
    "small_psd",
    "raw_exponential",
    "entropy",
    "relative_entropy",
    "raw_power",
    "p_norm",
    "every_cone",
    "many_cones_linear",
)
FIVE_POINT = {-2: 1 / 12, -1: -2 / 3, 1: 2 / 3, 2: -1 / 12}

every_name = pytest.mark.parametrize("name", NAMES)


@pytest.fixture(autouse=True)
def seed() -> Iterator[None]:
    torch.manual_seed(20263)
    with one_thread():
        yield


def solution(data: Data, visible: Visible | None = None, dense: bool = False) -> Root:
    """The zero of the residual map itself, in units where the data and the solution are of size
    one."""
    n, m = data.program.n, data.program.m
    visible = visible or Visible(torch.ones(n, dtype=torch.bool), torch.zeros(m, dtype=torch.bool))
    data, scaling = normalise(data)
    found = solve_batch(Clarabel(), 1e-9, {}, data, None, None)
    data, inner = recentre(data, scaling, found.x, found.y)
    point = inner.enter(*scaling.leave(found.x, found.s, found.y))
    return polish(Operators(data, dense), *point, visible, None)


@functools.cache
def case(name: str, dense: bool = False, batch: int = 2) -> Root:
    canonical = CASES[name].shared._canonical
    tensors = zip(canonical.parameters, CASES[name].sample(batch), strict=True)
    entries = [reader.read(tensor.double()) for reader, tensor in tensors]
    data, _ = evaluate(canonical, entries, False, torch.zeros((), dtype=torch.float64))
    return solution(data.widen(batch), canonical.visible, dense)


def smooth(zero: Root, kappa: float, data: Data | None = None, start: Root | None = None) -> Root:
    operators = zero.operators if data is None else Operators(data, zero.operators.dense)
    start = start or zero
    return smoothed(operators, start.x, start.s, start.y, kappa, zero.visible, zero.units)


def sparse_data(zero: Root) -> Data:
    data = zero.operators.data
    return replace(data, P=data.P_entries, A=data.A_entries)


def directions(data: Data) -> dict[str, Tensor]:
    """A random direction of each of the values, every row its own."""
    parts = {name: getattr(data, name) for name in ("q", "b", "A", "P")}
    return {
        name: torch.randn(data.batch, *part.shape[1:], dtype=part.dtype)
        for name, part in parts.items()
        if part.numel()
    }


def slope(zero: Root, name: str, direction: Tensor, x_bar: Tensor, y_bar: Tensor) -> Tensor:
    """The derivative of <x_bar, x> + <y_bar, y> along a direction of one of the values, by the
    adjoint."""
    w, u = adjoint(zero, x_bar, y_bar)
    program = zero.operators.data.program
    if name in "AP":
        moving = torch.arange(len(program.A_rows if name == "A" else program.P_rows))
        bar = pull_back(name, program, moving, zero.x, zero.y, w, u)
    else:
        bar = -w if name == "q" else u
    return (bar * direction).sum(1)


def difference(
    zero: Root, base: Root, kappa: float, name: str, direction: Tensor, x_bar: Tensor, y_bar: Tensor
) -> Tensor:
    """The same by differences of smoothed solutions."""
    data, step = sparse_data(zero), 2e-3 * kappa**0.5 / float(direction.norm(dim=1).amax())
    total = torch.zeros(len(zero.x), dtype=torch.float64)
    for k, weight in FIVE_POINT.items():
        near = smooth(
            zero, kappa, replace(data, **{name: getattr(data, name) + k * step * direction}), base
        )
        assert (near.residual <= FOUND).all()
        total += weight * ((x_bar * near.x).sum(1) + (y_bar * near.y).sum(1)) / step
    return total


@every_name
@pytest.mark.parametrize("kappa", [1.0, 1e-2, 1e-5, 1e-8])
def test_the_equations_hold_and_y_is_the_barriers(name: str, kappa: float) -> None:
    zero = case(name)
    found, data = smooth(zero, kappa), zero.operators.data
    assert (found.residual <= FOUND).all()
    assert not found.degenerate.any()
    size = torch.cat([found.x, found.y], 1).abs().amax(1, keepdim=True).clamp(min=1)
    dual = (zero.operators.P(found.x) + data.q + zero.operators.At(found.y)).abs() / size
    primal = (zero.operators.A(found.x) + found.s - data.b).abs() / size
    assert torch.cat([dual, primal], 1).amax() < 5e-12
    cones = data.program.cones
    y, s, _ = cones.smooth_dual(found.y - found.s, torch.tensor(kappa, dtype=torch.float64))
    assert torch.allclose(y, found.y, rtol=1e-9, atol=1e-12)
    assert torch.allclose(s, found.s, rtol=1e-9, atol=1e-12)
    degrees = {"zero": 0, "second_order": 1, "exponential": 3, "power": 3}
    degree = sum(degrees.get(block.name, block.parameter or block.size) for block in cones.blocks)
    gap = (found.s * found.y).sum(1)
    assert torch.allclose(gap, torch.full_like(gap, degree * kappa), rtol=1e-6)


@every_name
@pytest.mark.parametrize("kappa", [1e-1, 1e-4])
def test_the_adjoint_is_the_derivative_of_the_smoothed_solution(name: str, kappa: float) -> None:
    zero = case(name)
    base = smooth(zero, kappa)
    x_bar, y_bar = torch.randn_like(zero.x), torch.randn_like(zero.y)
    for value, direction in directions(sparse_data(zero)).items():
        expected = difference(zero, base, kappa, value, direction, x_bar, y_bar)
        got = slope(base, value, direction, x_bar, y_bar)
        assert ((got - expected).abs() <= 1e-6 * expected.abs()).all(), value


@pytest.mark.parametrize("name", ["linear_program", "every_cone"])
def test_dense_and_sparse_systems_agree(name: str) -> None:
    sparse, dense = case(name), case(name, dense=True)
    bars = torch.randn_like(sparse.x), torch.randn_like(sparse.y)
    for kappa in (1e-1, 1e-5):
        found = [smooth(sparse, kappa), smooth(sparse, kappa, dense.operators.data)]
        other = smooth(dense, kappa)
        assert (other.residual <= FOUND).all()
        assert torch.allclose(found[0].x, other.x, rtol=1e-9, atol=1e-9)
        for left, right in zip(adjoint(found[0], *bars), adjoint(other, *bars), strict=True):
            assert torch.allclose(left, right, rtol=1e-7, atol=1e-7 * float(right.norm()))


@every_name
def test_the_limit_is_the_exact_solution_and_its_derivative(name: str) -> None:
    """Of what the user sees and moves: auxiliaries and multipliers that are not unique have limits
    of their own."""
    zero = case(name)
    assert not zero.degenerate.any()
    (seen_x, seen_y), seen = zero.visible, torch.cat(zero.visible)
    x_bar, y_bar = torch.randn_like(zero.x) * seen_x, torch.randn_like(zero.y) * seen_y
    exact = torch.cat(adjoint(zero, x_bar, y_bar), 1) * seen
    gaps = []
    for kappa in (1e-4, 1e-6, 1e-8, 1e-10):
        found = smooth(zero, kappa)
        gaps.append(
            float((torch.cat(adjoint(found, x_bar, y_bar), 1) * seen - exact).norm() / exact.norm())
        )
        assert ((found.x - zero.x) * seen_x).norm() <= 1e3 * kappa
        assert ((found.y - zero.y) * seen_y).norm() <= 1e3 * kappa
    assert gaps[3] < 1e-4
    assert gaps[3] < 0.1 * gaps[2]


def program(P: np.ndarray, q: Sequence, A: np.ndarray, b: Sequence, cones: Sequence[Cone]) -> Data:
    """Dense arrays as stored entries; q and b one row, or one for each instance."""
    P, A = np.asarray(P, dtype=float), np.asarray(A, dtype=float)
    P_cols, P_rows = np.nonzero(np.tril(P))
    A_cols, A_rows = np.nonzero(A.T)
    shape = Program(A.shape[1], len(A), Product(cones), P_rows, P_cols, A_rows, A_cols)
    values = (P[P_rows, P_cols], q, A[A_rows, A_cols], b)
    data = Data(
        shape,
        *(torch.from_numpy(np.atleast_2d(np.asarray(value, dtype=float))) for value in values),
    )
    return data.widen(data.batch)


def test_a_linear_program_at_a_vertex_moves_with_its_costs() -> None:
    """Where the exact derivative is zero. Minimise q'x, 0 <= x <= 1: each coordinate has q =
    kappa/x - kappa/(1 - x)."""
    eye, q = np.eye(2), np.array([1.0, -0.5])
    data = program(np.zeros((2, 2)), q, np.concatenate([eye, -eye]), [1, 1, 0, 0], [Nonnegative(4)])
    zero = solution(data)
    ones, zeros = torch.ones_like(zero.x), torch.zeros_like(zero.y)
    assert slope(zero, "q", ones, ones, zeros).abs().amax() < 1e-12
    for kappa in (1e-1, 1e-3):
        found = smooth(zero, kappa)
        cost, bound, x = found.operators.data.q, found.operators.data.b[:, :2], found.x
        assert torch.allclose(cost, kappa / x - kappa / (bound - x), rtol=1e-9)
        expected = -1 / (kappa / x**2 + kappa / (bound - x) ** 2)
        got = -adjoint(found, torch.ones_like(x), torch.zeros_like(found.y))[0]
        assert torch.allclose(got, expected, rtol=1e-9)
        assert (got.abs() > 0.1 * kappa).all()


@pytest.mark.parametrize("kappa", [1e-1, 1e-4, 1e-8])
@pytest.mark.parametrize(
    "data",
    [
        # an equality as two inequalities
        program(np.eye(2), [1, 2], [[1, 1], [-1, -1], [-1, 0]], [1, -1, 3], [Nonnegative(3)]),
        # a half-line of solutions
        program(np.diag([1.0, 0]), [1, 0], [[-1, 0], [0, -1]], [0, 1], [Nonnegative(2)]),
        # matrices without trace
        program(np.eye(3), [1, 0.3, -1], [*-np.eye(3), [1, 0, 1]], [0] * 4, [Psd(2), Zero(1)]),
        # a line that touches a cone
        program(
            np.eye(2),
            [1, 0.3],
            [[-1, 0], [0, -1], [0, 0], [1, -1]],
            [0] * 4,
            [SecondOrder(3), Zero(1)],
        ),
    ],
    ids=["two-inequalities", "half-line", "no-trace", "tangent"],
)
def test_where_the_path_does_not_exist_the_residual_says_so(data: Data, kappa: float) -> None:
    zero = solution(data)
    assert (zero.residual <= FOUND).all()
    assert (smooth(zero, kappa).residual > 1e-3).all()


def test_a_row_without_a_path_leaves_the_others_untouched() -> None:
    """Minimise (x - 2)^2/2, -c <= x <= 1: the second row's interval is a point."""
    data = program([[1]], [[-2]] * 3, [[1], [-1]], [[1, 0], [1, -1], [1, 0.5]], [Nonnegative(2)])
    zero, kappa = solution(data), 1e-2
    found = smooth(zero, kappa)
    assert (found.residual <= FOUND).tolist() == [True, False, True]
    for row in (0, 2):
        alone = smoothed(
            zero.operators.rows(torch.tensor([row])),
            *(part[row : row + 1] for part in (zero.x, zero.s, zero.y)),
            kappa,
            zero.visible,
            None,
        )
        assert torch.allclose(found.x[row], alone.x[0], rtol=1e-12)
        bars = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 2, dtype=torch.float64)
        assert torch.allclose(
            adjoint(found, bars[0].expand(3, -1), bars[1].expand(3, -1))[0][row],
            adjoint(alone, *bars)[0][0],
        )


def test_a_face_of_solutions_has_one_point_and_a_weak_constraint_a_derivative() -> None:
    """The analytic centre of a face; and at a kink, where exact derivatives jump, a slope between
    theirs."""
    face = solution(
        program(np.zeros((2, 2)), [1, 0], [[-1, 0], [0, -1], [0, 1]], [0, 1, 1], [Nonnegative(3)])
    )
    found = smooth(face, 1e-6)
    assert (found.residual <= FOUND).all()
    assert abs(float(found.x[0, 1])) < 1e-9
    weak = solution(program([[1]], [0], [[-1]], [0], [Nonnegative(1)]))
    kappa = 1e-4
    found = smooth(weak, kappa)
    # x - kappa/x = -q = 0: dx/dq = -1/(1 + kappa/x^2) = -1/2
    assert torch.allclose(found.x, torch.full_like(found.x, kappa**0.5))
    w, _ = adjoint(found, torch.ones_like(found.x), torch.zeros_like(found.y))
    assert torch.allclose(-w, torch.full_like(w, -0.5))


def test_without_inequalities_nothing_is_smoothed() -> None:
    zero = case("equality_qp")
    found = smooth(zero, 1.0)
    assert torch.allclose(found.x, zero.x, rtol=1e-12)
    assert (found.steps == 0).all()
    free = case("free_quadratic")
    assert torch.allclose(smooth(free, 1.0).x, free.x, rtol=1e-12)

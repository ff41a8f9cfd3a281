"""Large second-order cones keep their rows sparse in sparse systems: projections, norms and paths
by formula; singular systems by numpy."""

import cvxpy as cp
import numpy as np
import pytest
import torch
from cases import close
from scipy.sparse import coo_array
from scipy.sparse.csgraph import dijkstra

import convlayer.paths.attempts
import convlayer.paths.cone_solution
import convlayer.paths.pieces
from convlayer import ConvexLayer
from convlayer.cones import Product, ProductSpectrum, SecondOrder, Zero
from convlayer.cones.cone import axes, from_basis, to_basis
from convlayer.cones.second_order import COMPACT
from convlayer.conic.kkt import Visible, factorise
from convlayer.conic.pattern import kkt_pattern
from convlayer.conic.program import Data, Operators, Program
from convlayer.declaration.canonical import Canonical

either_system = pytest.mark.parametrize("dense", [True, False], ids=["dense", "sparse"])


def choose(monkeypatch, dense):
    for module in (convlayer.paths.attempts, convlayer.paths.cone_solution):
        monkeypatch.setattr(module, "prefers_dense", lambda program: dense)
    monkeypatch.setattr(Canonical, "elimination", property(lambda self: None))


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("size", [COMPACT - 1, COMPACT, COMPACT + 9])
def test_the_derivative_of_the_projection_is_the_textbooks(size):
    v = random(40, size)
    v[:, 0] *= size**0.5
    v[0, 1:], v[1, 2:], v[2, 1] = 0.0, 0.0, 0.0
    identity = torch.eye(size, dtype=torch.float64)
    spectrum = SecondOrder(size).linearise(v)[1]
    D = from_basis(
        spectrum.basis, spectrum.values.unsqueeze(-1) * to_basis(spectrum.basis, identity)
    )
    U = from_basis(spectrum.basis, identity)
    assert (U.mT @ U - identity).abs().amax() < 1e-14
    assert torch.allclose(axes(spectrum.basis), U[..., :2], atol=1e-15)
    for k in range(len(v)):
        t, z = v[k, 0], v[k, 1:]
        if z.norm() <= t.abs():
            expected = identity * (t > 0)
        else:
            u, ratio = z / z.norm(), t / z.norm()
            expected = (
                torch.cat(
                    [
                        torch.cat([torch.ones(1, dtype=torch.float64), u]).unsqueeze(0),
                        torch.cat(
                            [
                                u.unsqueeze(1),
                                (1 + ratio) * identity[1:, 1:] - ratio * torch.outer(u, u),
                            ],
                            1,
                        ),
                    ]
                )
                / 2
            )
        assert close(D[k], expected, 1e-14)


@either_system
def test_groups_shrink_by_the_formula_and_so_do_two_derivatives(dense, monkeypatch):
    """argmin |x - a|^2/2 + sum of m |x_g| over groups is (1 - m/|a_g|)+ a_g; one group is at rest,
    one all but so."""
    choose(monkeypatch, dense)
    sizes, weight = (25, 25, 40, 3), 1.5
    a, x = cp.Parameter(sum(sizes)), cp.Variable(sum(sizes))
    m, ends = cp.Parameter(nonneg=True), np.cumsum(sizes)
    norms = sum(cp.norm(x[end - size : end]) for size, end in zip(sizes, ends, strict=True))
    layer = ConvexLayer(cp.Problem(cp.Minimize(cp.sum_squares(x - a) / 2 + m * norms)), [a, m], [x])
    values = random(2, sum(sizes))
    values[0, :25] *= 0.5 / values[0, :25].norm()
    values[1, 25:50] *= (weight + 1e-3) / values[1, 25:50].norm()

    def formula(a, m):
        parts = [
            part * (1 - m / part.norm(dim=1, keepdim=True)).clamp(min=0)
            for part in a.split(sizes, 1)
        ]
        return torch.cat(parts, 1)

    found = []
    for solve in (lambda *inputs: layer(*inputs)[0], formula):
        inputs = (
            values.clone().requires_grad_(),
            torch.tensor(weight, dtype=torch.float64, requires_grad=True),
        )
        y = solve(*inputs)
        first = torch.autograd.grad((y * random(*y.shape, seed=1)).sum(), inputs, create_graph=True)
        second = torch.autograd.grad((first[0] * random(*y.shape, seed=2)).sum() + first[1], inputs)
        found.append([y, *first, *second])
    for ours, theirs in zip(*found, strict=True):
        assert close(ours, theirs, 1e-8)


def grid(k):
    """Streets both ways between the crossings of a k x k grid: (incidence, from corner to
    corner)."""
    nodes = np.arange(k * k).reshape(k, k)
    ends = np.concatenate(
        [
            np.c_[nodes[:, :-1].ravel(), nodes[:, 1:].ravel()],
            np.c_[nodes[:-1].ravel(), nodes[1:].ravel()],
        ]
    )
    ends = np.concatenate([ends, ends[:, ::-1]])
    A, b = np.zeros((k * k, len(ends))), np.zeros(k * k)
    A[ends[:, 0], range(len(ends))], A[ends[:, 1], range(len(ends))], b[0], b[-1] = 1, -1, 1, -1
    return A, b


@either_system
def test_the_gradient_of_a_flow_with_a_norm_is_that_of_its_face(dense, monkeypatch):
    """min c'x + m |x|, Ax = b, x >= 0: on the face of x > 0, m (I - uu')/|x| dx + A'dy = -dc and A
    dx = 0; A has dependent rows."""
    choose(monkeypatch, dense)
    A, b = grid(5)
    c, x = cp.Parameter(A.shape[1]), cp.Variable(A.shape[1])
    layer = ConvexLayer(
        cp.Problem(cp.Minimize(c @ x + 0.8 * cp.norm(x)), [x >= 0, A @ x == b]), [c], [x]
    )
    costs = torch.from_numpy(
        np.random.default_rng(0).uniform(0.5, 1, (3, A.shape[1]))
    ).requires_grad_()
    solution = layer.solve(costs)
    (flow,) = solution.variables
    w = random(*flow.shape)
    (bar,) = torch.autograd.grad((flow * w).sum(), costs)
    assert not bool(solution.degenerate.any())
    for row in range(3):
        point = flow[row].detach().numpy()
        face = point > 1e-7
        assert face.sum() > 2 * 4
        z, F = point[face], A[:, face]
        H = 0.8 * (np.eye(len(z)) - np.outer(z, z) / (z @ z)) / np.linalg.norm(z)
        K = np.block([[H, F.T], [F, np.zeros((len(F), len(F)))]])
        right = np.concatenate([w[row].numpy()[face], np.zeros(len(F))])
        expected = np.zeros(len(point))
        expected[face] = -np.linalg.lstsq(K, right, rcond=1e-12)[0][: len(z)]
        assert close(bar[row], torch.from_numpy(expected), 1e-8)


def test_a_tiny_norm_leaves_the_shortest_path_where_it_is():
    """By scipy's shortest paths; a vertex does not move, and the rows of the cone are as sparse as
    they were."""
    A, b = grid(9)
    c, x = cp.Parameter(A.shape[1]), cp.Variable(A.shape[1])
    problem = cp.Problem(cp.Minimize(c @ x + 1e-6 * cp.norm(x)), [x >= 0, x <= 1, A @ x == b])
    layer = ConvexLayer(problem, [c], [x])
    costs = torch.from_numpy(
        np.random.default_rng(0).uniform(0.2, 2, (2, A.shape[1]))
    ).requires_grad_()
    (flow,) = layer(costs)
    start, end = (A == 1).argmax(0), (A == -1).argmax(0)
    for row in range(2):
        streets = coo_array((costs[row].detach().numpy(), (start, end)), shape=(len(b),) * 2)
        length = dijkstra(streets.tocsr(), indices=0)[-1]
        assert float(costs[row].detach() @ flow[row].detach()) == pytest.approx(length, rel=1e-9)
    (bar,) = torch.autograd.grad((flow * random(*flow.shape)).sum(), costs)
    assert bar.abs().max() < 1e-12


def test_only_where_it_saves_entries_is_a_cone_split():
    """A norm of variables is; a norm of dense combinations of few is not, nor are small cones."""
    x = cp.Variable(60)
    cases = {
        60 + 1: cp.norm(x),
        None: cp.norm(np.random.default_rng(0).normal(size=(60, 60)) @ x),
        0: cp.norm(x[:3]),
    }
    for size, term in cases.items():
        a = cp.Parameter(60)
        layer = ConvexLayer(
            cp.Problem(cp.Minimize(cp.sum_squares(x - a) + cp.sum(x)), [term <= 1.0]), [a], [x]
        )
        program = layer._canonical.program
        assert kkt_pattern(program).split.sizes == (frozenset([size]) if size else frozenset())


@either_system
def test_a_singular_system_is_solved_with_the_least_norm_in_the_users_units(dense):
    """w = S (S K S)^+ S (a, c) with S = diag(1/units, 1), by numpy; three null vectors."""
    n, m, rng = 8, 4, np.random.default_rng(0)
    R, A = rng.normal(size=(3, n)), rng.normal(size=(m, n))
    A[3] = A[0] + A[1]
    i, j = np.triu_indices(n)
    order = np.lexsort((i, j))
    rows, columns = (index.ravel(order="F") for index in np.indices((m, n)))
    program = Program(n, m, Product([Zero(m)]), i[order], j[order], rows, columns)
    P = R.T @ R
    parts = [P[i[order], j[order]], np.zeros(n), A.ravel(order="F"), np.zeros(m)]
    data = Data(program, *(torch.from_numpy(part).unsqueeze(0) for part in parts))
    units, a, c = (
        torch.from_numpy(part)
        for part in (rng.uniform(0.2, 5, (1, n)), rng.normal(size=(1, n)), rng.normal(size=(1, m)))
    )
    seen = Visible(torch.ones(n, dtype=torch.bool), torch.ones(m, dtype=torch.bool))
    system = factorise(
        Operators(data, dense), ProductSpectrum(torch.ones(1, m, dtype=torch.float64)), seen, units
    )
    w, e = system.solve(a, c)
    S = np.diag(np.concatenate([1 / units[0].numpy(), np.ones(m)]))
    K = np.block([[P, A.T], [A, np.zeros((m, m))]])
    expected = S @ np.linalg.pinv(S @ K @ S, rcond=1e-10) @ S @ torch.cat([a, c], 1)[0].numpy()
    assert bool(system.singular)
    assert close(torch.cat([w, e], 1)[0], torch.from_numpy(expected), 1e-9)


def test_a_cone_of_a_hundred_thousand_rows_takes_memory_in_proportion():
    """A square table of its rows would be 80 GB."""
    size = 100_000
    v, h = random(size), random(size, seed=1)
    v[0] = 0.3 * v[1:].norm()
    spectrum = SecondOrder(size).linearise(v)[1]
    along = to_basis(spectrum.basis, h.unsqueeze(-1))
    Dh = from_basis(spectrum.basis, spectrum.values.unsqueeze(-1) * along).squeeze(-1)
    u, ratio = v[1:] / v[1:].norm(), v[0] / v[1:].norm()
    inner = u @ h[1:]
    first = h[:1] + inner
    rest = h[0] * u + (1 + ratio) * h[1:] - ratio * inner * u
    assert (Dh - torch.cat([first, rest]) / 2).abs().amax() < 1e-12

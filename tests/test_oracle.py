"""The adjoint against oracles that share no code with it: diffcp's dense mode, and a QP's active
set in NumPy."""

import cvxpy as cp
import diffcp
import numpy as np
import pytest
import scipy.sparse as sp
import torch
from cases import CASES, leaves, names
from oracles import cone_program, qp_adjoint

import convlayer.paths.cone_program
from convlayer import ConvexLayer
from convlayer.paths.cone_solution import attached

# At these seeds an inactive norm leaves its canonical auxiliary variable free: harmless for the
# user, but x and s of the cone program are then not unique, and a cotangent of all of them has no
# one answer.
FREE = {"matrix_inequality": (0,), "many_cones_linear": (0,)}
LINEAR = names(
    lambda case: (
        not case.quadratic
        and "power" not in {b.name for b in case.shared._canonical.program.cones.blocks}
    )
)


def scs_order(blocks) -> np.ndarray:
    """For each of diffcp's rows, CVXPY's: a psd block is the lower triangle by columns there, the
    upper one here."""
    order, start = [], 0
    for name, size, k in blocks:
        if name == "psd":
            place = {(i, j): start + j * (j + 1) // 2 + i for j in range(k) for i in range(j + 1)}
            order += [place[j, i] for j in range(k) for i in range(j, k)]
        else:
            order += range(start, start + size)
        start += size
    return np.array(order)


def diffcp_cones(blocks) -> dict:
    def sizes(name):
        return [(size, k) for kind, size, k in blocks if kind == name]

    cones = {
        "z": sum(s for s, _ in sizes("zero")),
        "l": sum(s for s, _ in sizes("nonnegative")),
        "q": [s for s, _ in sizes("second_order")],
        "s": [k for _, k in sizes("psd")],
        "ep": len(sizes("exponential")),
    }
    return {key: value for key, value in cones.items() if value}


# where multipliers are not unique diffcp's own system is singular, and exact at the torch path's only
@pytest.mark.without_core
@pytest.mark.parametrize("name", LINEAR)
def test_cotangents_of_x_y_and_s_are_pulled_back_as_diffcp_does(name, monkeypatch):
    """All of the canonical x, y and s at once; the data move along CVXPY's own affine map of the
    parameters."""
    case, seen = CASES[name], []
    if case.gp:
        pytest.skip("the cone program is affine in the logarithms, not in the parameters")

    def recorded(found, thetas):
        # The layer records a graph of its own, from the parameters as the cone program takes them.
        outputs = attached(found, thetas)
        seen[:] = [*outputs, thetas]
        return outputs

    monkeypatch.setattr(convlayer.paths.cone_program, "attached", recorded)
    layer, declared = case.layer(), case.declare()
    for seed in (seed for seed in range(2) if seed not in FREE.get(name, ())):
        tensors, others = case.sample(seed=seed), case.sample(seed=seed + 100)
        inputs = leaves(tensors)
        solution = layer.solve(*inputs)
        x, y, _, thetas = seen
        program = cone_program(case, declared, tensors)
        moves = [b - a for a, b in zip(tensors, others, strict=True)]
        moved = cone_program(case, declared, [a + d for a, d in zip(tensors, moves, strict=True)])
        dA, db, dq = moved.A - program.A, moved.b - program.b, moved.q - program.q

        rng = np.random.default_rng(seed)
        gx, gy, gs = (
            rng.standard_normal(len(program.q)),
            rng.standard_normal(len(program.b)),
            rng.standard_normal(len(program.b)),
        )
        # s = b - A x: its cotangent reaches x, and b and A directly.
        x_bar, y_bar = torch.from_numpy(gx - program.A.T @ gs)[None], torch.from_numpy(gy)[None]
        found = torch.autograd.grad((x, y), thetas, (x_bar, y_bar))
        bars = [bar.reshape(move.shape) for bar, move in zip(found, moves, strict=True)]
        point = x[0].detach().numpy()
        got = sum(float((b * d).sum()) for b, d in zip(bars, moves, strict=True)) + gs @ (
            db - dA @ point
        )

        order = scs_order(program.blocks)
        A = sp.csc_matrix(program.A[order])
        start = tuple(part[0].numpy() for part in solution.iterate)
        start = (start[0], start[2][order], start[1][order])
        x_d, _, _, _, adjoint = diffcp.solve_and_derivative(
            A,
            program.b[order],
            program.q,
            diffcp_cones(program.blocks),
            mode="dense",
            solve_method="SCS",
            warm_start=start,
            eps=1e-12,
            max_iters=200_000,
        )
        assert np.abs(x_d - point).max() < 1e-7 * (1 + np.abs(point).max())
        A_bar, b_bar, q_bar = adjoint(gx, gy[order], gs[order])
        # diffcp sees no structural zeros of A, so those that move are left out of the comparison on
        # both sides.
        hidden = dA * (program.A == 0)
        expected = float((A_bar.toarray() * dA[order]).sum() + b_bar @ db[order] + q_bar @ dq)
        assert np.abs(hidden).max() == 0
        unit = max(
            abs(got),
            abs(expected),
            sum(float(b.norm() * d.norm()) for b, d in zip(bars, moves, strict=True)) * 1e-2,
        )
        assert abs(got - expected) <= 1e-6 * unit


def quadratic_layer(n, m):
    P, q, G, h = (
        cp.Parameter((n, n), PSD=True, name="P"),
        cp.Parameter(n, name="q"),
        cp.Parameter((m, n), name="G"),
        cp.Parameter(m, name="h"),
    )
    x = cp.Variable(n, name="x")
    below = G @ x <= h
    problem = cp.Problem(cp.Minimize(0.5 * cp.quad_form(x, P) + q @ x), [below])
    return ConvexLayer(problem, [P, q, G, h], [x, below.dual_variables[0]])


@pytest.mark.parametrize("condition", [1.0, 1e1, 1e2, 1e3, 1e4, 1e5, 1e6])
def test_the_gradient_of_a_quadratic_program_is_that_of_its_active_set(condition):
    """Where the incumbent's default is wrong by 1 % to 46 %: at most 1e-6 for every cond(P) up to
    1e6."""
    n, m, rows = 10, 8, 6
    rng = np.random.default_rng(int(np.log10(condition)))
    layer = quadratic_layer(n, m)
    data = []
    for _ in range(rows):
        Q = np.linalg.qr(rng.standard_normal((n, n)))[0]
        P = Q * np.logspace(0, -np.log10(condition), n) @ Q.T
        G, inside = rng.standard_normal((m, n)), rng.standard_normal(n)
        data.append(
            ((P + P.T) / 2, rng.standard_normal(n), G, G @ inside + rng.uniform(0.1, 1.0, m))
        )
    inputs = leaves([torch.from_numpy(np.stack(parts)) for parts in zip(*data, strict=True)])
    x, y = layer(*inputs)
    x_bar, y_bar = rng.standard_normal(x.shape), rng.standard_normal(y.shape)
    bars = torch.autograd.grad((x, y), inputs, (torch.from_numpy(x_bar), torch.from_numpy(y_bar)))
    for row, (P, q, G, h) in enumerate(data):
        point, multipliers = x[row].detach().numpy(), y[row].detach().numpy()
        assert np.abs(P @ point + q + G.T @ multipliers).max() < 1e-10 * (
            1 + np.abs(multipliers).max()
        )
        assert (G @ point - h).max() < 1e-10 * (1 + np.abs(point).max())
        assert abs(multipliers @ (G @ point - h)) < 1e-10 * (1 + np.abs(multipliers).max())
        expected = qp_adjoint(P, q, G, h, point, multipliers, x_bar[row], y_bar[row])
        for bar, reference in zip(bars, expected, strict=True):
            assert np.abs(bar[row].numpy() - reference).max() <= 1e-6 * np.abs(reference).max()


def test_closed_forms():
    """Projections whose derivative is known: simplex, ball, box, and the softmax of an entropy."""
    n, generator = 6, torch.Generator().manual_seed(0)
    value, w = (torch.randn(n, generator=generator, dtype=torch.float64) for _ in range(2))
    a, x = cp.Parameter(n, name="a"), cp.Variable(n, name="x")

    def gradient(problem):
        leaf = value.clone().requires_grad_()
        (out,) = ConvexLayer(problem, [a], [x])(leaf)
        return out.detach(), torch.autograd.grad(out, leaf, w)[0]

    out, bar = gradient(cp.Problem(cp.Minimize(cp.sum_squares(x - a)), [cp.sum(x) == 1, x >= 0]))
    support = out > 1e-9
    assert torch.allclose(bar, torch.where(support, w - w[support].mean(), 0.0), atol=1e-9)
    out, bar = gradient(cp.Problem(cp.Minimize(cp.sum_squares(x - a)), [cp.norm(x) <= 1]))
    u = value / value.norm()
    assert torch.allclose(out, u, atol=1e-10)
    assert torch.allclose(bar, (w - u * (u @ w)) / value.norm(), atol=1e-9)
    out, bar = gradient(cp.Problem(cp.Minimize(cp.sum_squares(x - a)), [x >= -0.5, x <= 0.5]))
    assert torch.allclose(bar, torch.where(value.abs() < 0.5, w, 0.0), atol=1e-9)
    for temperature in (1.0, 0.1, 0.05):
        out, bar = gradient(
            cp.Problem(cp.Maximize(a @ x + temperature * cp.sum(cp.entr(x))), [cp.sum(x) == 1])
        )
        s = torch.softmax(value / temperature, 0)
        assert torch.allclose(out, s, atol=1e-9)
        expected = s * (w - s @ w) / temperature
        assert float((bar - expected).norm()) < 1e-6 * float(expected.norm())


@pytest.mark.parametrize("eps", [1.0, 0.1, 0.05, 0.02])
def test_entropic_transport_is_that_of_its_optimality_conditions(eps):
    """Where both incumbents are wrong by more than a tenth at eps = 0.05: T = exp((f + g - C)/eps),
    differentiated by hand."""
    k, generator = 4, torch.Generator().manual_seed(2)
    C = torch.rand(k, k, generator=generator, dtype=torch.float64)
    a = torch.softmax(torch.randn(k, generator=generator, dtype=torch.float64), 0)
    b = torch.softmax(torch.randn(k, generator=generator, dtype=torch.float64), 0)
    W = torch.randn(k, k, generator=generator, dtype=torch.float64)
    C_p, a_p, b_p, T = (
        cp.Parameter((k, k), name="C"),
        cp.Parameter(k, name="a"),
        cp.Parameter(k, name="b"),
        cp.Variable((k, k), name="T"),
    )
    problem = cp.Problem(
        cp.Minimize(cp.sum(cp.multiply(C_p, T)) - eps * cp.sum(cp.entr(T))),
        [cp.sum(T, axis=1) == a_p, cp.sum(T, axis=0)[:-1] == b_p[:-1]],
    )
    inputs = leaves([C, a, b])
    (plan,) = ConvexLayer(problem, [C_p, a_p, b_p], [T])(*inputs)
    bars = torch.autograd.grad(plan, inputs, W)
    f, g = torch.zeros(k, dtype=torch.float64), torch.zeros(k, dtype=torch.float64)
    for _ in range(20_000):
        f = eps * (a.log() - torch.logsumexp((g - C) / eps, 1))
        g = eps * (b.log() - torch.logsumexp((f[:, None] - C) / eps, 0))
    expected = torch.exp((f[:, None] + g - C) / eps)
    assert torch.allclose(plan.detach(), expected, atol=1e-9)
    # dT = T (df + dg - dC)/eps with the marginals of dT given, dg of the last column zero.
    K = torch.zeros(2 * k - 1, 2 * k - 1, dtype=torch.float64)
    K[:k, :k], K[k:, k:] = torch.diag(expected.sum(1)), torch.diag(expected.sum(0)[:-1])
    K[:k, k:], K[k:, :k] = expected[:, :-1], expected[:, :-1].mT
    TW = expected * W
    z = torch.linalg.solve(K, torch.cat([TW.sum(1), TW.sum(0)[:-1]]))
    potentials = z[:k, None] + torch.cat([z[k:], torch.zeros(1, dtype=torch.float64)])
    references = [
        -(TW - expected * potentials) / eps,
        z[:k],
        torch.cat([z[k:], torch.zeros(1, dtype=torch.float64)]),
    ]
    for bar, reference in zip(bars, references, strict=True):
        assert float((bar - reference).norm()) <= 1e-6 * float(reference.norm())

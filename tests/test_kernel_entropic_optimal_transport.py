"""Laws of the entropic transport kernel, against closed forms, long log-domain Sinkhorn, KKT
systems and differences."""

import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from scipy.special import logsumexp

from convlayer.kernels import entropic_optimal_transport as module
from convlayer.kernels.entropic_optimal_transport import entropic_optimal_transport
from convlayer.solution import Status

INF = torch.inf


def instance(m, n, eps, seed, B=1, even=False):
    rng = np.random.default_rng(seed)
    M, r, c = rng.random((B, m, n)), rng.random((B, m)) + 0.1, rng.random((B, n)) + 0.1
    if even:
        r, c = np.ones((B, m)), np.ones((B, n)) * m / n
    else:
        c *= r.sum(1, keepdims=True) / c.sum(1, keepdims=True)
    return [torch.tensor(a) for a in (M, r, c, np.full(B, eps))]


def one(M, r, c, eps):
    return [torch.tensor(a, dtype=torch.float64)[None] for a in (M, r, c, eps)]


def leaves(inputs):
    return [t.detach().clone().requires_grad_() for t in inputs]


def gradients(inputs, weights):
    """Of sum_k <weights_k, output_k>; a weight of None leaves its output out."""
    x = leaves(inputs)
    outputs = entropic_optimal_transport(*x).outputs
    return torch.autograd.grad(
        sum((o * w).sum() for o, w in zip(outputs, weights) if w is not None), x
    )


def draw(inputs, seed, which=(0, 1, 2)):
    """Cotangents for the outputs chosen."""
    generator = torch.Generator().manual_seed(seed)
    outputs = entropic_optimal_transport(*inputs).outputs
    made = [torch.randn(o.shape, generator=generator, dtype=o.dtype) for o in outputs]
    return [w if k in which else None for k, w in enumerate(made)]


def sinkhorn(M, r, c, eps, sweeps=20000):
    """Plan, and potentials with sum f = sum g, by log-domain sweeps alone."""
    g = np.zeros(len(c))
    for _ in range(sweeps):
        f = eps * (np.log(r) - logsumexp((g - M) / eps, axis=1))
        new = eps * (np.log(c) - logsumexp((f[:, None] - M) / eps, axis=0))
        done, g = np.abs(new - g).max() < 1e-16, new
        if done:
            break
    P, f = np.exp((f[:, None] + g - M) / eps), f + eps
    shift = (g.sum() - f.sum()) / (len(f) + len(g))
    return P, f + shift, g - shift


def tangent(inputs, P, dM, dr, dc, deps):
    """Derivative of (P, f, g) along a direction with sum dr = sum dc, from the dense optimality
    conditions.

    eps dP / P + deps (log P + 1) + dM - df 1' - 1 dg' = 0,  dP 1 = dr,  dP' 1 = dc,  sum df = sum dg.
    """
    eps, (m, n) = inputs[3].item(), P.shape
    A = np.vstack([np.kron(np.eye(m), np.ones(n)), np.kron(np.ones(m), np.eye(n))])
    balance = np.concatenate([np.ones(m), -np.ones(n)])
    flow = -P.ravel() * (deps * (np.log(P) + 1) + dM).ravel() / eps
    H = A * P.ravel() @ A.T / eps + np.outer(balance, balance)
    potentials = np.linalg.solve(H, np.concatenate([dr, dc]) - A @ flow)
    return (
        (flow + P.ravel() * (A.T @ potentials) / eps).reshape(m, n),
        potentials[:m],
        potentials[m:],
    )


def relative(a, b):
    a, b = np.asarray(a), np.asarray(b)
    return np.abs(a - b).max() / np.abs(b).max()


SIZES = [(1, 1), (1, 5), (5, 1), (2, 2), (4, 6), (6, 4), (12, 12)]


@pytest.mark.parametrize(("m", "n"), SIZES)
@pytest.mark.parametrize("eps", [1.0, 0.1, 0.03])
def test_the_plan_and_its_potentials_are_those_of_long_log_domain_sinkhorn(m, n, eps):
    inputs = instance(m, n, eps, 3)
    answer = entropic_optimal_transport(*inputs)
    assert answer.status.tolist() == [Status.SOLVED]
    assert not answer.degenerate.any()
    expected = sinkhorn(*(t[0].numpy() for t in inputs[:3]), eps)
    for got, want in zip(answer.outputs, expected):
        assert relative(got[0], want) < 1e-10


@pytest.mark.parametrize("eps", [1e-1, 1e-2, 1e-3, 1e-4])
@pytest.mark.parametrize("even", [False, True])
def test_marginals_and_stationarity_hold_at_every_temperature(eps, even):
    for m, n in [(2, 2), (7, 5), (20, 20), (30, 17)]:
        M, r, c, e = instance(m, n, eps, 11, B=4, even=even)
        answer = entropic_optimal_transport(M, r, c, e)
        P, f, g = answer.outputs
        assert (answer.status == Status.SOLVED).all()
        assert (answer.residual < 1e-10).all()
        assert ((P.sum(2) - r).abs() / r).max() < 1e-12
        assert ((P.sum(1) - c).abs() / c).max() < 1e-12
        exponent = (f[:, :, None] + g[:, None] - M) / eps - 1
        assert ((P - exponent.exp()).abs() <= 1e-14 / eps * P + 1e-250).all()
        assert (f.sum(1) - g.sum(1)).abs().max() < 1e-12


def test_two_by_two_has_a_closed_form():
    # P = [p, q - p; s - p, 1 - q - s + p] with p (1 - q - s + p) = k (q - p) (s - p)
    eps, q, s, M = 0.07, 0.3, 0.45, np.array([[0.3, 0.1], [0.2, 0.25]])
    k = np.exp(-(M[0, 0] + M[1, 1] - M[0, 1] - M[1, 0]) / eps)
    p = min(
        np.roots([1 - k, 1 - q - s + k * (q + s), -k * q * s]),
        key=lambda p: 0 if 0 < p < min(q, s) else 1,
    )
    P = entropic_optimal_transport(*one(M, [q, 1 - q], [s, 1 - s], eps)).outputs[0][0]
    assert relative(P, [[p, q - p], [s - p, 1 - q - s + p]]) < 1e-13


def test_potentials_are_the_gradient_of_the_optimal_value():
    inputs = instance(5, 4, 0.2, 2)
    x = leaves(inputs)
    P, f, g = entropic_optimal_transport(*x).outputs
    value = (x[0] * P).sum() + (x[3] * torch.xlogy(P, P).sum((1, 2))).sum()
    dM, dr, dc, deps = torch.autograd.grad(value, x)
    assert relative(dM, P.detach()) < 1e-12
    assert relative(dr, f.detach()) < 1e-12
    assert relative(dc, g.detach()) < 1e-12
    assert relative(deps, torch.xlogy(P, P).sum((1, 2)).detach()) < 1e-12


@pytest.mark.parametrize(("m", "n"), SIZES)
@pytest.mark.parametrize("eps", [0.3, 0.02])
@pytest.mark.parametrize("which", [(0,), (1,), (2,), (0, 1, 2)])
def test_the_vjp_is_the_transpose_of_the_dense_kkt_derivative(m, n, eps, which):
    inputs = instance(m, n, eps, 5)
    weights = draw(inputs, 1, which)
    got = gradients(inputs, weights)
    P = entropic_optimal_transport(*inputs).outputs[0][0].numpy()
    rng = np.random.default_rng(0)
    directions = [rng.standard_normal((m, n)), rng.standard_normal(m), rng.standard_normal(n), 1.0]
    directions[2] += (directions[1].sum() - directions[2].sum()) / n
    for chosen in [(0,), (1, 2), (3,)]:
        d = [v if k in chosen else 0 * v for k, v in enumerate(directions)]
        moved = tangent(inputs, P, *d)
        want = sum((w[0].numpy() * dv).sum() for w, dv in zip(weights, moved) if w is not None)
        terms = [np.abs(got[k][0].numpy() * d[k]).sum() for k in range(4)]
        have = sum((got[k][0].numpy() * d[k]).sum() for k in range(4))
        assert abs(have - want) <= 1e-10 * max(sum(terms), 1e-3)


@pytest.mark.parametrize("eps", [0.3, 0.03])
@pytest.mark.parametrize(("m", "n"), [(4, 6), (6, 4), (3, 3)])
def test_every_gradient_is_that_of_five_point_differences(m, n, eps):
    inputs = instance(m, n, eps, 7)
    rng = np.random.default_rng(1)
    d = [torch.tensor(rng.standard_normal(t.shape)) for t in inputs]
    d[1], d[2] = d[1] * inputs[1], d[2] * inputs[2]
    d[2] -= (d[2].sum() - d[1].sum()) * inputs[2] / inputs[2].sum()
    d[3] = inputs[3] / 2
    for which in range(3):
        weights = draw(inputs, 4, (which,))
        got = gradients(inputs, weights)
        for chosen, h in [((0,), 2e-3 * eps), ((1, 2), 4e-4), ((3,), 1e-3)]:

            def at(t, chosen=chosen, weights=weights, which=which):
                moved = [
                    x + t * dx if k in chosen else x for k, (x, dx) in enumerate(zip(inputs, d))
                ]
                return (
                    (entropic_optimal_transport(*moved).outputs[which] * weights[which])
                    .sum()
                    .item()
                )

            difference = (8 * (at(h) - at(-h)) - (at(2 * h) - at(-2 * h))) / (12 * h)
            have = sum((got[k] * d[k]).sum().item() for k in chosen)
            assert abs(have - difference) < 1e-8 * max(
                abs(difference), sum((got[k] * d[k]).norm().item() for k in chosen)
            )


def test_gradients_at_low_temperature_agree_with_the_dense_kkt_derivative():
    for m, n in [(8, 12), (25, 25)]:
        inputs = instance(m, n, 1e-3, 21)
        answer = entropic_optimal_transport(*inputs)
        assert not answer.degenerate.any()
        weights = draw(inputs, 2)
        got = gradients(inputs, weights)
        rng = np.random.default_rng(3)
        dr, dc = rng.standard_normal(m), rng.standard_normal(n)
        dc += (dr.sum() - dc.sum()) / n
        P = np.maximum(answer.outputs[0][0].numpy(), 1e-300)
        moved = tangent(inputs, P, np.zeros((m, n)), dr, dc, 0.0)
        want = sum((w[0].numpy() * dv).sum() for w, dv in zip(weights, moved))
        have = (got[1][0].numpy() * dr).sum() + (got[2][0].numpy() * dc).sum()
        assert abs(have - want) < 1e-8 * np.abs(got[1][0].numpy() * dr).sum()


def test_gradients_of_the_marginals_lie_in_the_tangent_space():
    inputs = instance(6, 9, 0.1, 8)
    _, dr, dc, _ = gradients(inputs, draw(inputs, 0))
    assert (dr.sum() - dc.sum()).abs() < 1e-12 * (dr.abs().sum() + dc.abs().sum())


def test_a_transposed_problem_has_the_transposed_solution_and_gradient():
    M, r, c, eps = instance(5, 8, 0.05, 9, B=2)
    weights = draw((M, r, c, eps), 0)
    dM, dr, dc, deps = gradients((M, r, c, eps), weights)
    swapped = gradients((M.mT.contiguous(), c, r, eps), [weights[0].mT, weights[2], weights[1]])
    for a, b in zip((dM.mT, dc, dr, deps), swapped):
        assert relative(b, a) < 1e-10


@pytest.mark.parametrize("shared", [(0,), (1,), (2,), (3,), (0, 3), (1, 2), (0, 1, 2)])
def test_the_gradient_of_a_shared_input_is_the_sum_over_the_rows(shared):
    for m, n in [(4, 6), (6, 4)]:
        inputs = instance(m, n, 0.1, 4, B=3)
        inputs[2] *= inputs[1][:1].sum() / inputs[2].sum(1, keepdim=True)
        inputs[1] *= inputs[1][:1].sum() / inputs[1].sum(1, keepdim=True)
        some = [t[:1] if k in shared else t for k, t in enumerate(inputs)]
        every = [t.expand(3, *t.shape[1:]) if k in shared else t for k, t in enumerate(some)]
        weights = draw(every, 6)
        for k, (a, b) in enumerate(zip(gradients(some, weights), gradients(every, weights))):
            assert a.shape == some[k].shape
            assert relative(a, b.sum(0, keepdim=True) if k in shared else b) < 1e-11


def test_a_batch_equals_a_loop_whatever_each_row_needs():
    rows = [instance(7, 5, eps, seed) for seed, eps in enumerate([1.0, 0.1, 1e-2, 1e-3, 3e-2])]
    batch = [torch.cat(t) for t in zip(*rows)]
    weights = draw(batch, 3)
    together, answer = gradients(batch, weights), entropic_optimal_transport(*batch)
    for k, row in enumerate(rows):
        alone = entropic_optimal_transport(*row)
        assert all(relative(a[k], b[0]) < 1e-11 for a, b in zip(answer.outputs, alone.outputs))
        each = gradients(row, [w[k : k + 1] for w in weights])
        assert all(relative(a[k], b[0]) < 1e-8 for a, b in zip(together, each))


def test_float32_agrees_with_float64_to_its_precision():
    inputs = [t.float() for t in instance(9, 6, 0.05, 1, B=2)]
    answer = entropic_optimal_transport(*inputs)
    exact = entropic_optimal_transport(
        *(t.double() for t in inputs[:2]),
        inputs[2].double() * (inputs[1].double().sum(1) / inputs[2].double().sum(1))[:, None],
        inputs[3].double(),
    )
    weights = draw(inputs, 0)
    assert all(o.dtype == torch.float32 for o in answer.outputs)
    assert all(relative(a, b) < 1e-6 for a, b in zip(answer.outputs, exact.outputs))
    low = gradients(inputs, weights)
    high = gradients(
        [
            inputs[0].double(),
            inputs[1].double(),
            inputs[2].double() * (inputs[1].double().sum(1) / inputs[2].double().sum(1))[:, None],
            inputs[3].double(),
        ],
        [w.double() for w in weights],
    )
    assert all(a.dtype == torch.float32 for a in low)
    assert all(relative(a, b) < 1e-5 for a, b in zip(low, high))


@pytest.mark.parametrize("B", [1, 0])
def test_an_empty_batch_has_empty_solutions_and_zero_gradients(B):
    M, r, c, eps = instance(3, 4, 0.1, 0)
    x = leaves([M[:0], r[:B], c[:0], eps[:B]])
    answer = entropic_optimal_transport(*x)
    assert [o.shape for o in answer.outputs] == [(0, 3, 4), (0, 3), (0, 4)]
    for grad, t in zip(torch.autograd.grad(sum(o.sum() for o in answer.outputs), x), x):
        assert grad.shape == t.shape
        assert not grad.any()


@pytest.mark.parametrize("scale", [1e-200, 1e-8, 1e8, 1e200])
def test_units_of_mass_and_of_cost_do_not_matter(scale):
    M, r, c, eps = instance(5, 7, 0.05, 0)
    P, f, _ = entropic_optimal_transport(M, r, c, eps).outputs
    heavy = entropic_optimal_transport(M, r * scale, c * scale, eps)
    assert relative(heavy.outputs[0] / scale, P) < 1e-12
    dear = entropic_optimal_transport(M * scale, r, c, eps * scale)
    assert relative(dear.outputs[0], P) < 1e-12
    assert relative(dear.outputs[1] / scale, f) < 1e-12
    assert (heavy.status == Status.SOLVED).all()
    weights = draw((M, r, c, eps), 0, (0,))
    base, other = (
        gradients((M, r, c, eps), weights),
        gradients((M * scale, r, c, eps * scale), weights),
    )
    assert relative(other[0] * scale, base[0]) < 1e-10
    assert relative(other[1], base[1]) < 1e-10


def test_potentials_separate_masses_far_below_rounding():
    answer = entropic_optimal_transport(
        *one([[0.1, 0.2, 0.3], [0.5, 0.2, 0.9]], [1e-90, 1.0], [1e-80, 0.5, 0.5], 0.01)
    )
    P = answer.outputs[0][0]
    assert relative(P.sum(1)[:1], [1e-90]) < 1e-12
    assert relative(P.sum(0)[:1], [1e-80]) < 1e-12
    assert not answer.degenerate.any()


def test_a_large_offset_of_the_costs_changes_the_potentials_only():
    M, r, c, eps = instance(4, 5, 0.5, 0)
    rows = torch.tensor([[1e6, 0.0, -1e6, 3e6]]).double()
    near, far = (
        entropic_optimal_transport(A, r, c, eps).outputs for A in (M, M + rows[:, :, None])
    )
    assert relative(far[0], near[0]) < 1e-8


def test_zero_marginals_leave_the_rest_as_if_they_were_not_there():
    M, r, c, eps = instance(4, 5, 0.1, 12)
    keep_rows, keep_columns = [0, 1, 3], [0, 2, 3, 4]
    r[:, 2], c[:, 1] = 0.0, 0.0
    c *= r.sum() / c.sum()
    small = [M[:, keep_rows][:, :, keep_columns], r[:, keep_rows], c[:, keep_columns], eps]
    answer, reduced = (entropic_optimal_transport(*inputs) for inputs in ((M, r, c, eps), small))
    P, f, g = answer.outputs
    assert answer.status.tolist() == [Status.SOLVED]
    assert not answer.degenerate.any()
    assert not P[:, 2].any()
    assert not P[:, :, 1].any()
    assert (f[:, 2] == 0).all()
    assert (g[:, 1] == 0).all()
    assert relative(P[:, keep_rows][:, :, keep_columns], reduced.outputs[0]) < 1e-12
    assert relative(f[:, keep_rows], reduced.outputs[1]) < 1e-12
    weights = draw((M, r, c, eps), 1)
    some = [
        weights[0][:, keep_rows][:, :, keep_columns],
        weights[1][:, keep_rows],
        weights[2][:, keep_columns],
    ]
    full, part = gradients((M, r, c, eps), weights), gradients(small, some)
    assert all(g.isfinite().all() for g in full)
    assert relative(full[0][:, keep_rows][:, :, keep_columns], part[0]) < 1e-11
    assert not full[0][:, 2].any()
    assert not full[0][:, :, 1].any()
    assert relative(full[3], part[3]) < 1e-11


def test_the_derivative_at_a_zero_marginal_is_the_limit_from_the_right_and_flagged():
    M, r, c, eps = instance(4, 5, 0.1, 12)
    total = r.sum() - r[0, 2]
    c *= total / c.sum()
    weights = draw((M, r, c * r.sum() / total, eps), 1, (0,))

    def at(mass):
        moved = r.clone()
        moved[:, 2] = mass
        moved[:, 0] += -mass
        return gradients((M, moved, c, eps), weights)

    zero, tiny = at(0.0), at(1e-12)
    assert relative(zero[1], tiny[1]) < 1e-9
    assert relative(zero[2], tiny[2]) < 1e-9
    r[:, 2] = 0.0
    assert not entropic_optimal_transport(M, r, c, eps).degenerate.any()
    assert entropic_optimal_transport(M, r.requires_grad_(), c, eps).degenerate.all()


def test_no_mass_at_all_is_solved_by_nothing():
    answer = entropic_optimal_transport(*one([[0.1, 0.2], [0.3, 0.4]], [0.0, 0.0], [0.0, 0.0], 0.1))
    assert answer.status.tolist() == [Status.SOLVED]
    assert not any(o.any() for o in answer.outputs)


def test_forbidden_pairs_are_the_limit_of_dear_ones():
    M, r, c, eps = instance(4, 6, 0.1, 13)
    M[:, 0, 1] = M[:, 2, 3] = M[:, 3, 0] = 40.0
    weights = draw((M, r, c, eps), 0)
    dear, near = gradients((M, r, c, eps), weights), entropic_optimal_transport(M, r, c, eps)
    forbidden = M == 40.0
    M = M.masked_fill(forbidden, INF)
    got, answer = gradients((M, r, c, eps), weights), entropic_optimal_transport(M, r, c, eps)
    assert all(relative(a, b) < 1e-12 for a, b in zip(answer.outputs, near.outputs))
    assert all(relative(a, b) < 1e-10 for a, b in zip(got, dear))
    assert not answer.outputs[0][forbidden].any()
    assert not got[0][forbidden].any()
    assert not answer.degenerate.any()


def test_blocks_of_allowed_pairs_are_problems_of_their_own():
    a, b = instance(3, 4, 0.1, 1), instance(4, 3, 0.1, 2)
    M = torch.full((1, 7, 7), INF, dtype=torch.float64)
    M[:, :3, :4], M[:, 3:, 4:] = a[0], b[0]
    whole = [M, torch.cat([a[1], b[1]], 1), torch.cat([a[2], b[2]], 1), a[3]]
    order = torch.tensor([4, 0, 6, 2, 1, 5, 3])
    whole = [whole[0][:, order], whole[1][:, order], *whole[2:]]
    back = order.argsort()
    weights = draw(whole, 0)
    got, answer = gradients(whole, weights), entropic_optimal_transport(*whole)
    assert answer.status.tolist() == [Status.SOLVED]
    assert not answer.degenerate.any()
    deps = 0
    for part, rows, columns in ((a, back[:3], slice(0, 4)), (b, back[3:], slice(4, 7))):
        P, f, _ = entropic_optimal_transport(*part).outputs
        assert relative(answer.outputs[0][:, rows][:, :, columns], P) < 1e-12
        assert relative(answer.outputs[1][:, rows], f) < 1e-11
        each = gradients(
            part, [weights[0][:, rows][:, :, columns], weights[1][:, rows], weights[2][:, columns]]
        )
        assert relative(got[0][:, rows][:, :, columns], each[0]) < 1e-10
        assert relative(got[1][:, rows], each[1]) < 1e-10
        assert relative(got[2][:, columns], each[2]) < 1e-10
        deps = deps + each[3]
    assert relative(got[3], deps) < 1e-10


def test_forbidden_pairs_are_infeasible_exactly_where_a_linear_program_is():
    rng, found = np.random.default_rng(0), set()
    for _ in range(60):
        m, n = 5, 6
        M = np.where(rng.random((m, n)) < 0.5, np.inf, rng.random((m, n)))
        r, c = rng.dirichlet(np.ones(m)), rng.dirichlet(np.ones(n))
        A = np.vstack([np.kron(np.eye(m), np.ones(n)), np.kron(np.ones(m), np.eye(n))])
        bounds = [(0, None if np.isfinite(v) else 0) for v in M.ravel()]
        feasible = (
            linprog(np.zeros(m * n), A_eq=A, b_eq=np.concatenate([r, c]), bounds=bounds).status == 0
        )
        answer = entropic_optimal_transport(*one(M, r, c, 0.05))
        assert answer.status.item() == (Status.SOLVED if feasible else Status.INFEASIBLE)
        found.add(feasible)
    assert found == {True, False}


def test_a_pair_that_must_stay_empty_has_no_dual_and_is_flagged():
    answer = entropic_optimal_transport(*one([[0.1, INF], [0.5, 0.2]], [0.5, 0.5], [0.5, 0.5], 0.1))
    assert answer.status.tolist() == [Status.SOLVED]
    assert answer.degenerate.tolist() == [True]
    assert relative(answer.outputs[0][0], [[0.5, 0.0], [0.0, 0.5]]) < 1e-10
    assert all(o.isfinite().all() for o in answer.outputs)


def test_a_plan_near_a_permutation_is_flagged_and_its_gradient_vanishes():
    M = 1.0 - torch.eye(4, dtype=torch.float64)[None]
    even = torch.full((1, 4), 0.25, dtype=torch.float64)
    inputs = M, even, even, torch.tensor([1e-3], dtype=torch.float64)
    answer = entropic_optimal_transport(*inputs)
    assert answer.degenerate.tolist() == [True]
    assert relative(answer.outputs[0], torch.eye(4)[None] / 4) < 1e-12
    got = gradients(inputs, draw(inputs, 0, (0,)))
    assert got[0].abs().max() < 1e-10
    assert all(g.isfinite().all() for g in got)


def test_ties_and_copies_are_harmless():
    inputs = one([[1.0, 2, 2], [1, 2, 2], [0, 1, 1]], [0.2, 0.3, 0.5], [0.5, 0.25, 0.25], 1e-3)
    answer = entropic_optimal_transport(*inputs)
    assert not answer.degenerate.any()
    assert relative(answer.outputs[0], inputs[1][:, :, None] * inputs[2][:, None]) < 1e-12
    assert all(g.isfinite().all() for g in gradients(inputs, draw(inputs, 0)))


@pytest.mark.parametrize(
    ("change", "status"),
    [
        (lambda M, r, c, eps: r[1].__setitem__(0, -0.1), Status.BAD_INPUT),
        (lambda M, r, c, eps: c[1].__setitem__(2, -0.1), Status.BAD_INPUT),
        (lambda M, r, c, eps: eps.__setitem__(1, 0.0), Status.BAD_INPUT),
        (lambda M, r, c, eps: eps.__setitem__(1, -1.0), Status.BAD_INPUT),
        (lambda M, r, c, eps: M[1].__setitem__((0, 0), -INF), Status.BAD_INPUT),
        (lambda M, r, c, eps: r[1].mul_(1 + 1e-6), Status.INFEASIBLE),
        (lambda M, r, c, eps: r[1].zero_(), Status.INFEASIBLE),
        (lambda M, r, c, eps: M[1, 2].fill_(INF), Status.INFEASIBLE),
        (lambda M, r, c, eps: M[1].fill_(INF), Status.INFEASIBLE),
    ],
)
@pytest.mark.parametrize(("m", "n"), [(4, 5), (5, 4)])
def test_a_failed_row_is_zero_and_leaves_the_others_untouched(change, status, m, n):
    inputs = instance(m, n, 0.1, 6, B=3)
    weights = draw(inputs, 2)
    plain, clean = gradients(inputs, weights), entropic_optimal_transport(*inputs)
    spoilt = [t.clone() for t in inputs]
    change(*spoilt)
    answer = entropic_optimal_transport(*spoilt)
    assert answer.status.tolist() == [0, status, 0]
    assert not any(o[1].any() for o in answer.outputs)
    assert not answer.degenerate.any()
    for w in weights:
        w[1] = 0.0
    got = gradients(spoilt, weights)
    assert not any(g[1].any() for g in got)
    for k in (0, 2):
        assert all(relative(a[k], b[k]) < 1e-12 for a, b in zip(answer.outputs, clean.outputs))
        assert all(relative(a[k], b[k]) < 1e-10 for a, b in zip(got, plain))
    for w in weights:
        w[1] = torch.nan
    lost = gradients(spoilt, weights)
    assert all(g[1].isnan().any() for g in lost)
    assert all(relative(a[k], b[k]) < 1e-10 for a, b in zip(lost, plain) for k in (0, 2))


def test_totals_within_rounding_are_made_equal():
    M, r, c, eps = instance(4, 5, 0.1, 0)
    answer = entropic_optimal_transport(M, r, c * (1 + 1e-11), eps)
    assert answer.status.tolist() == [Status.SOLVED]
    assert relative(answer.outputs[0].sum(1), c) < 1e-13
    low = entropic_optimal_transport(M.float(), r.float(), c.float() * (1 + 2e-6), eps.float())
    assert low.status.tolist() == [Status.SOLVED]


@pytest.mark.parametrize("eps", [0.1, 1e-2])
def test_conjugate_gradients_give_what_the_factor_gives(eps, monkeypatch):
    a, b = instance(20, 24, eps, 0, B=2), instance(20, 24, eps, 0, B=2)
    b[0][:, :8, :10], b[0][:, 8:, 10:] = INF, INF
    for x, y, rows in ((b[1], b[2], 8), (b[2], b[1], 10)):
        x[:, :rows] *= y[:, {8: 10, 10: 8}[rows] :].sum(1, keepdim=True) / x[:, :rows].sum(
            1, keepdim=True
        )
    b[1] /= b[1].sum(1, keepdim=True)
    b[1][:, :8] *= b[2][:, 10:].sum(1, keepdim=True) / b[1][:, :8].sum(1, keepdim=True)
    b[1][:, 8:] *= b[2][:, :10].sum(1, keepdim=True) / b[1][:, 8:].sum(1, keepdim=True)
    for inputs in (a, b):
        weights = draw(inputs, 0)
        factor, direct = gradients(inputs, weights), entropic_optimal_transport(*inputs)
        assert (direct.status == Status.SOLVED).all()
        with monkeypatch.context() as patch:
            patch.setattr(module, "DENSE", 0)
            iterated, answer = gradients(inputs, weights), entropic_optimal_transport(*inputs)
        assert not answer.degenerate.any()
        assert all(relative(p, q) < 1e-11 for p, q in zip(answer.outputs, direct.outputs))
        assert all(relative(p, q) < 1e-10 for p, q in zip(iterated, factor))


def test_a_second_derivative_raises():
    x = leaves(instance(3, 4, 0.1, 0))
    P = entropic_optimal_transport(*x).outputs[0]
    (first,) = torch.autograd.grad((P * P).sum(), x[0], create_graph=True)
    with pytest.raises(RuntimeError, match="twice"):
        first.sum().backward()


@pytest.mark.parametrize("needed", range(4))
def test_only_the_gradient_that_is_asked_for_is_made(needed):
    inputs = instance(3, 4, 0.1, 0)
    full = gradients(inputs, draw(inputs, 0))
    x = [t.requires_grad_() if k == needed else t for k, t in enumerate(inputs)]
    outputs = entropic_optimal_transport(*x).outputs
    weights = draw([t.detach() for t in inputs], 0)
    sum((o * w).sum() for o, w in zip(outputs, weights)).backward()
    assert relative(x[needed].grad, full[needed]) < 1e-12
    assert all(t.grad is None for k, t in enumerate(x) if k != needed)

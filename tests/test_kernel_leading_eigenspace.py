"""Laws of the leading-eigenspace kernel; the oracle is LAPACK by another driver, and
differences."""

import numpy as np
import pytest
import scipy.linalg
import torch
from kernels import close, differences

from convlayer.kernels.leading_eigenspace import eigenvector, leading_eigenspace

D = torch.float64
EPS = torch.finfo(D).eps


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=D)


def with_eigenvalues(values, seed=0):
    """A symmetric matrix with these eigenvalues, and its eigenvectors."""
    values = torch.as_tensor(values, dtype=D)
    Q = torch.linalg.qr(draw(len(values), len(values), seed=seed))[0]
    X = (Q * values) @ Q.mT
    return ((X + X.mT) / 2)[None], Q


def reference(X, k, largest):
    S = (X + X.T) / 2
    l, U = scipy.linalg.eigh(S if largest else -S, driver="evr")
    U = U[:, len(l) - k :]
    return U @ U.T, l[len(l) - k] * (1 if largest else -1)


def loss(X, k, largest, C, c):
    Z, l = leading_eigenspace(X, k, largest).outputs
    return (C * Z).sum() + (c * l).sum()


def gradient(X, k, largest, C, c):
    leaf = X.clone().requires_grad_()
    return torch.autograd.grad(loss(leaf, k, largest, C, c), leaf)[0]


@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize(
    ("n", "k"), [(1, 1), (2, 1), (2, 2), (5, 1), (5, 3), (5, 5), (40, 1), (40, 7), (40, 39)]
)
def test_value(n, k, largest):
    X = draw(3, n, n)
    answer = leading_eigenspace(X, k, largest)
    Z, l = answer.outputs
    for i in range(3):
        projector, eigenvalue = reference(X[i].numpy(), k, largest)
        assert np.abs(Z[i].numpy() - projector).max() < 1e-11
        assert abs(l[i].item() - eigenvalue) < 1e-12
    assert answer.status is None
    assert answer.degenerate is None


@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (2, 1), (4, 1), (4, 2), (4, 3), (4, 4)])
def test_the_gradient_is_differences_and_symmetric(n, k, largest):
    X, C, c = draw(2, n, n), draw(2, n, n, seed=1), draw(2, seed=2)
    ours = gradient(X, k, largest, C, c)
    close(ours, differences(lambda A: loss(A, k, largest, C, c), [X], 0, 2e-4), 1e-8)
    assert torch.equal(ours, ours.mT)


@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("values", [[3, 3, 1, 0, -1], [3, 3, 1, 1, 1], [2, 2, 0, 0, 0]])
def test_eigenvalues_repeated_on_one_side_of_the_cut_are_harmless(values, largest):
    X, _ = with_eigenvalues(values if largest else [-v for v in values])
    C, zero = draw(1, 5, 5, seed=1), torch.zeros(1, dtype=D)
    assert leading_eigenspace(X, 2, largest).degenerate is None
    ours = gradient(X, 2, largest, C, zero)
    close(ours, differences(lambda A: loss(A, 2, largest, C, zero), [X], 0, 2e-4), 1e-8)


def test_the_eigenvalue_repeated_inside_the_block_shares_its_gradient():
    X, Q = with_eigenvalues([3, 2, 2, 0, -1])
    ours = gradient(X, 3, True, torch.zeros(1, 5, 5, dtype=D), torch.ones(1, dtype=D))
    close(ours[0], Q[:, 1:3] @ Q[:, 1:3].mT / 2, 1e-12)


@pytest.mark.parametrize("largest", [True, False])
def test_at_a_tie_the_solution_is_the_one_of_least_norm_and_flagged(largest):
    X, Q = with_eigenvalues([3, 1, 1, 1, -2])
    X, values = (X, [3, 1, 1, 1, -2]) if largest else (-X, [-3, -1, -1, -1, 2])
    both = torch.cat([X, draw(1, 5, 5, seed=4)])
    answer = leading_eigenspace(both, 2, largest)
    Z, l = answer.outputs
    assert answer.degenerate.tolist() == [True, False]
    weight = torch.tensor([1, 1 / 3, 1 / 3, 1 / 3, 0], dtype=D)
    close(Z[0], (Q * weight) @ Q.mT, 1e-13)
    assert abs(l[0].item() - values[1]) < 1e-14
    C, c = draw(2, 5, 5, seed=1), draw(2, seed=2)
    ours = gradient(both, 2, largest, C, c)
    step, gap = (
        weight[:, None] - weight,
        torch.tensor(values, dtype=D)[:, None] - torch.tensor(values, dtype=D),
    )
    K = torch.where(step == 0, 0, step / gap)
    by_hand = (
        Q @ (K * (Q.mT @ ((C[0] + C[0].mT) / 2) @ Q)) @ Q.mT + c[0] * Q[:, 1:4] @ Q[:, 1:4].mT / 3
    )
    close(ours[0], by_hand, 1e-12)
    close(ours[1:], gradient(both[1:], 2, largest, C[1:], c[1:]), 1e-12)
    alone = leading_eigenspace(both[1:], 2, largest).outputs[0]
    assert (Z[1:] - alone).abs().max() < 1e-13


def test_the_derivative_at_a_tie_is_that_of_keeping_the_tie():
    X, Q = with_eigenvalues([3, 1, 1, 1, -2])
    skew = draw(5, 5, seed=7)
    skew = skew - skew.mT

    def turned(t):
        R = torch.linalg.matrix_exp(t * skew)
        return R @ X @ R.mT

    C, h = draw(1, 5, 5, seed=1), 1e-3
    values = [loss(turned(t * h), 2, True, C, 0.0) for t in (-2, -1, 1, 2)]
    slope = (8 * (values[2] - values[1]) - values[3] + values[0]) / (12 * h)
    direction = skew @ X[0] - X[0] @ skew
    assert abs((gradient(X, 2, True, C, 0.0)[0] * direction).sum() / slope - 1) < 1e-8
    assert Q.shape == (5, 5)


@pytest.mark.parametrize("scale", [0.0, 1e-300, 1e-8, 1e8, 1e300])
def test_a_multiple_of_the_identity_is_all_tie(scale):
    X = scale * torch.eye(4, dtype=D)[None]
    answer = leading_eigenspace(X, 1)
    assert answer.degenerate.tolist() == [True]
    close(answer.outputs[0], torch.eye(4, dtype=D)[None] / 4, 1e-14)
    C = draw(1, 4, 4)
    assert (gradient(X, 1, True, C, torch.zeros(1, dtype=D)) == 0).all()
    close(gradient(X, 1, True, C, torch.ones(1, dtype=D)), torch.eye(4, dtype=D)[None] / 4, 1e-14)


@pytest.mark.parametrize("scale", [1e-300, 1e-150, 1e-8, 1e8, 1e150, 1e300])
def test_scaling_the_matrix_keeps_the_solution(scale):
    X, C, zero = draw(2, 5, 5), draw(2, 5, 5, seed=1), torch.zeros(2, dtype=D)
    answer = leading_eigenspace(scale * X, 2)
    assert answer.degenerate is None
    assert (answer.outputs[0] - leading_eigenspace(X, 2).outputs[0]).abs().max() < 1e-13
    if scale > 1e-200:
        close(gradient(scale * X, 2, True, C, zero) * scale, gradient(X, 2, True, C, zero), 1e-12)


def test_the_largest_floats():
    top = torch.finfo(D).max
    for X in ([[top, top], [-top, top]], [[top, top], [top, top]], [[top, 0], [0, -top]]):
        Z, l = leading_eigenspace(torch.tensor([X], dtype=D), 1).outputs
        assert Z.isfinite().all()
        assert not l.isnan().any()


@pytest.mark.parametrize("gap", [1e-6, 1e-10, 1e-12])
def test_a_small_gap_is_no_tie_and_its_gradient_is_large(gap):
    """It is flagged where rounding of X turns Z by more than half of its digits."""
    X = torch.diag(torch.tensor([1.0, 1.0 - gap, 0.0], dtype=D))[None]
    assert (leading_eigenspace(X, 1).degenerate is None) == (gap > 3 * EPS**0.5 / 2)
    C = torch.zeros(1, 3, 3, dtype=D)
    C[0, 0, 1] = 2.0
    ours = gradient(X, 1, True, C, torch.zeros(1, dtype=D))
    assert abs(ours[0, 0, 1].item() * (1 - X[0, 1, 1]).item() - 1) < 1e-13


def test_a_tie_is_relative_to_the_norm_of_the_matrix():
    X = torch.diag(torch.tensor([1e8, 0.0, 0.0], dtype=D))[None].repeat(2, 1, 1)
    X[0, 1, 1], X[1, 1, 1] = 1e8 - 1e8 * 20 * EPS, 1e8 - 1e8 * 40 * EPS
    Z, _ = leading_eigenspace(X, 1).outputs
    assert Z[:, 0, 0].tolist() == [0.5, 1.0]


def test_all_of_the_space():
    X = draw(2, 3, 3)
    answer = leading_eigenspace(X, 3)
    assert torch.equal(answer.outputs[0], torch.eye(3, dtype=D).repeat(2, 1, 1))
    assert (gradient(X, 3, True, draw(2, 3, 3), torch.zeros(2, dtype=D)) == 0).all()
    leaf = X.clone().requires_grad_()
    assert (torch.autograd.grad(leading_eigenspace(leaf, 3).outputs[0].sum(), leaf)[0] == 0).all()


@pytest.mark.parametrize("k", [0, -1, 4])
def test_more_or_fewer_vectors_than_there_are_is_an_error(k):
    with pytest.raises(ValueError, match=f"k = {k}; expected 1 <= k <= 3"):
        leading_eigenspace(draw(1, 3, 3), k)


def test_batch_equals_loop():
    X, C, c = draw(5, 6, 6), draw(5, 6, 6, seed=1), draw(5, seed=2)
    whole = gradient(X, 2, True, C, c)
    for i in range(5):
        close(whole[i : i + 1], gradient(X[i : i + 1], 2, True, C[i : i + 1], c[i : i + 1]), 1e-12)


def test_float32_agrees_with_float64():
    X, C, c = draw(3, 6, 6).float(), draw(3, 6, 6, seed=1), draw(3, seed=2)
    for ours, theirs in zip(
        leading_eigenspace(X, 2).outputs, leading_eigenspace(X.double(), 2).outputs, strict=True
    ):
        assert ours.dtype == torch.float32
        close(ours.double(), theirs, 1e-5)
    ours = gradient(X, 2, True, C.float(), c.float())
    assert ours.dtype == torch.float32
    close(ours.double(), gradient(X.double(), 2, True, C, c), 1e-4)


@pytest.mark.parametrize("tied", [False, True])
def test_a_nan_cotangent_stays_in_its_row(tied):
    X = draw(3, 4, 4)
    if tied:
        X[2] = torch.eye(4, dtype=D)
    X.requires_grad_()
    v, w = draw(3, 4, 4, seed=5), draw(3, seed=6)
    (clean,) = torch.autograd.grad(leading_eigenspace(X, 2).outputs, X, (v, w))
    v[1], w[1] = torch.nan, torch.nan
    (g,) = torch.autograd.grad(leading_eigenspace(X, 2).outputs, X, (v, w))
    assert g[1].isnan().all()
    assert torch.equal(g[[0, 2]], clean[[0, 2]])


@pytest.mark.parametrize("k", [1, 2, 3])
def test_an_empty_batch(k):
    X = draw(0, 3, 3).requires_grad_()
    Z, l = leading_eigenspace(X, k).outputs
    assert Z.shape == (0, 3, 3)
    assert l.shape == (0,)
    assert torch.autograd.grad(Z.sum() + l.sum(), X)[0].shape == (0, 3, 3)


def test_a_second_derivative_raises():
    X = draw(1, 3, 3).requires_grad_()
    Z = leading_eigenspace(X, 1).outputs[0]
    (g,) = torch.autograd.grad((Z * Z * draw(3, 3)).sum(), X, create_graph=True)
    with pytest.raises(RuntimeError, match="twice"):
        g.sum().backward()


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
def test_the_eigenvector_squares_to_the_projector_with_its_largest_entry_positive(batch):
    X = draw(*batch, 5, 5)
    Z = leading_eigenspace(X.reshape(-1, 5, 5), 1).outputs[0].view(*batch, 5, 5)
    v = eigenvector(Z)
    assert v.shape == (*batch, 5)
    assert (v.unsqueeze(-1) * v.unsqueeze(-2) - Z).abs().max() < 1e-14
    assert (v.gather(-1, v.abs().argmax(-1, keepdim=True)) > 0).all()


def test_the_gradient_of_the_eigenvector_is_differences():
    X, c = draw(2, 4, 4), draw(2, 4, seed=1)

    def f(A):
        return (c * eigenvector(leading_eigenspace(A, 1).outputs[0])).sum()

    leaf = X.clone().requires_grad_()
    close(torch.autograd.grad(f(leaf), leaf)[0], differences(f, [X], 0, 2e-4), 1e-8)

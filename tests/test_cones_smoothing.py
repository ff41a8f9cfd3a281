"""Laws of the smoothed projections: the barrier's optimality, the derivative, the limit, scales,
batching, the product."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from test_cones_curvature import SCATTERED
from torch import Tensor

from convlayer.autodiff.threads import one_thread
from convlayer.cones import (
    Cone,
    Exponential,
    Nonnegative,
    Power,
    Product,
    Psd,
    SecondOrder,
    Spectrum,
    Zero,
    smat,
)

CONES: list[Cone] = [
    Zero(3),
    Nonnegative(4),
    *(SecondOrder(size) for size in (1, 2, 3, 5)),
    *(Psd(n) for n in (1, 2, 3, 4)),
    Exponential(),
    *(Power(alpha) for alpha in (0.1, 0.3, 0.5, 0.9)),
]
KAPPAS = (1e-24, 1e-12, 1e-6, 1e-2, 1.0, 1e4)


def named(cone: Cone) -> str:
    return f"{cone.name}-{cone.size if cone.parameter is None else cone.parameter}"


every_cone = pytest.mark.parametrize("cone", CONES, ids=named)
every_inside = pytest.mark.parametrize(
    "cone", [cone for cone in CONES if cone.name != "zero"], ids=named
)
every_kappa = pytest.mark.parametrize("kappa", KAPPAS)


@pytest.fixture(autouse=True)
def seed() -> Iterator[None]:
    torch.manual_seed(20262)
    with one_thread():
        yield


def points(cone: Cone, count: int = 600) -> Tensor:
    """Random points: of one scale, of scales mixed from point to point and from row to row, next to
    the surfaces, and 0."""
    v = torch.randn(count, cone.size, dtype=torch.float64)
    part = count // 4
    v[part : 2 * part] *= 10 ** (8 * torch.rand(part, 1, dtype=torch.float64) - 4)
    v[2 * part : 3 * part] *= 10 ** (-8 * torch.rand(part, cone.size, dtype=torch.float64))
    p = cone.project(v[3 * part :])
    v[3 * part :] = torch.where(torch.rand(len(p), 1) < 0.5, p, v[3 * part :] - p)
    v[-1] = 0
    return v


def everywhere(kappa: float, v: Tensor) -> Tensor:
    return torch.full(v.shape[:-1], kappa, dtype=v.dtype)


def apply(spectrum: Spectrum, x: Tensor) -> Tensor:
    if spectrum.basis is None:
        return spectrum.values * x
    return (
        spectrum.basis
        @ (spectrum.values * (spectrum.basis.mT @ x.unsqueeze(-1)).squeeze(-1)).unsqueeze(-1)
    )[..., 0]


def barrier(cone: Cone, p: Tensor) -> Tensor:
    """f, as it is defined; half of -log det for a second-order cone, whose e has determinant one
    and degree two."""
    match cone:
        case Nonnegative():
            return -p.log().sum(-1)
        case SecondOrder(size=1):
            return -p[..., 0].log()
        case SecondOrder():
            return -(p[..., 0] ** 2 - p[..., 1:].square().sum(-1)).log() / 2
        case Psd():
            return -torch.logdet(smat(p))
        case Exponential():
            r, s, t = p.unbind(-1)
            return -(s * (t / s).log() - r).log() - s.log() - t.log()
        case Power():
            x, y, z = p.unbind(-1)
            a = cone.alphas[0]
            return -(x ** (2 * a) * y ** (2 - 2 * a) - z**2).log() - (1 - a) * x.log() - a * y.log()
    raise AssertionError(cone)


def size_of(v: Tensor, kappa: float) -> Tensor:
    return v.norm(dim=-1, keepdim=True) + kappa**0.5


@every_cone
@every_kappa
def test_the_two_parts_differ_by_v(cone: Cone, kappa: float) -> None:
    v = points(cone)
    p, r, _ = cone.smooth(v, everywhere(kappa, v))
    assert ((p - r - v) / size_of(v, kappa)).abs().amax() < 2e-14


@every_inside
@pytest.mark.parametrize("kappa", [1e-4, 1.0, 1e4])
def test_the_dual_part_is_minus_kappa_times_the_gradient_of_the_barrier(
    cone: Cone, kappa: float
) -> None:
    v = 3 * torch.randn(300, cone.size, dtype=torch.float64)
    p, r, _ = cone.smooth(v, everywhere(kappa, v))
    inside = p.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(barrier(cone, inside).sum(), inside)
    # p's coordinates hold its distance from the surface to |p| eps / distance only
    assert torch.allclose(r, -kappa * gradient, rtol=1e-6, atol=1e-6 * kappa**0.5)
    assert ((r + kappa * gradient).abs() / r.norm(dim=-1, keepdim=True)).median() < 1e-10


@every_inside
@every_kappa
def test_symmetric_cones_are_complementary_in_their_product(cone: Cone, kappa: float) -> None:
    v = points(cone)
    p, r, _ = cone.smooth(v, everywhere(kappa, v))
    degree = {
        "nonnegative": cone.size,
        "second_order": 1,
        "psd": cone.parameter,
        "exponential": 3,
        "power": 3,
    }[cone.name]
    size = size_of(v, kappa)
    assert (
        ((p * r).sum(-1, keepdim=True) - degree * kappa) / size**2
    ).abs().amax() < 1e-13  # f has this degree
    if cone.name == "psd":
        eye = kappa * torch.eye(cone.parameter, dtype=v.dtype)
        assert ((smat(p) @ smat(r) - eye).flatten(-2) / size**2).abs().amax() < 1e-13
    if cone.name == "nonnegative":
        assert torch.allclose(p * r, torch.full_like(p, kappa), rtol=1e-14, atol=0)
    if cone.name == "second_order" and cone.size > 1:
        crossed = p[:, :1] * r[:, 1:] + r[:, :1] * p[:, 1:]
        assert (crossed / size**2).abs().amax() < 1e-13


@every_inside
@every_kappa
def test_the_derivative_takes_the_sum_of_the_parts_to_one_of_them(cone: Cone, kappa: float) -> None:
    """f''(p) p = -f'(p), as f is logarithmically homogeneous, so (I - dp/dv)(p + r) = r: at any
    scale."""
    v = points(cone)
    p, r, rest = cone.smooth(v, everywhere(kappa, v))
    size = (p + r).norm(dim=-1, keepdim=True)
    assert ((apply(rest, p + r) - r) / size).abs().amax() < 1e-12


@every_inside
@pytest.mark.parametrize("kappa", [1e-6, 1e-2, 1.0, 1e4])
def test_the_derivative_agrees_with_differences(cone: Cone, kappa: float) -> None:
    v = points(cone)
    direction = torch.randn_like(v)
    direction /= direction.norm(dim=-1, keepdim=True)
    step = 2e-3 * kappa**0.5

    def at(k: int) -> Tensor:
        return cone.smooth(v + k * step * direction, everywhere(kappa, v))[0]

    difference = (8 * (at(1) - at(-1)) - (at(2) - at(-2))) / (12 * step)
    _, _, rest = cone.smooth(v, everywhere(kappa, v))
    error = (direction - apply(rest, direction) - difference).norm(dim=-1, keepdim=True)
    assert (error <= 1e-9 + 1e-14 * size_of(v, kappa) / step).all()
    assert error.median() < 1e-9
    assert ((rest.values > 0) & (rest.values <= 1)).all()


@every_cone
@every_kappa
def test_the_basis_is_orthogonal_and_every_scale_finite(cone: Cone, kappa: float) -> None:
    v = torch.cat([points(cone) * scale for scale in (1e-30, 1.0, 1e6, 1e30)])
    p, r, rest = cone.smooth(v, everywhere(kappa, v))
    assert p.isfinite().all()
    assert r.isfinite().all()
    assert ((rest.values >= 0) & (rest.values <= 1)).all()
    if rest.basis is not None:
        identity = torch.eye(cone.size, dtype=v.dtype)
        assert (rest.basis.mT @ rest.basis - identity).abs().amax() < 1e-13


@every_cone
def test_the_limit_is_the_projection_and_its_derivative(cone: Cone) -> None:
    v = points(cone)
    exact, spectrum = cone.linearise(v)
    x = torch.randn_like(v)
    x /= x.norm(dim=-1, keepdim=True)
    far = cone.margin(v, exact) > 1e-2 * v.norm(dim=-1)
    gaps = []
    for kappa in (1e-4, 1e-8, 1e-12):
        # kappa in units of v, and no further from Pi(v) than the barrier's degree allows
        p, _, rest = cone.smooth(v, kappa * v.square().sum(-1).clamp(min=1e-30))
        assert (
            (p - exact).norm(dim=-1) <= (cone.size * kappa) ** 0.5 * v.norm(dim=-1) + 2e-15
        ).all()
        gaps.append(
            float((x - apply(rest, x) - apply(spectrum, x)).norm(dim=-1)[far].quantile(0.9))
        )
    assert gaps[2] < 1e-6
    assert gaps[2] <= gaps[1] <= gaps[0]


@every_cone
def test_a_batch_equals_a_loop_and_each_row_has_its_kappa(cone: Cone) -> None:
    v = points(cone, 24)
    kappa = 10 ** (-8 * torch.rand(24, dtype=torch.float64))
    p, r, rest = cone.smooth(v.view(2, 3, 4, cone.size), kappa.view(2, 3, 4))
    x = torch.randn_like(v)
    image = apply(rest, x.view(2, 3, 4, cone.size)).view(24, -1)
    for row in range(24):
        q, u, alone = cone.smooth(v[row], kappa[row])
        size = float(v[row].norm() + kappa[row].sqrt())
        assert torch.allclose(p.view(24, -1)[row], q, rtol=0, atol=1e-14 * size)
        assert torch.allclose(r.view(24, -1)[row], u, rtol=0, atol=1e-14 * size)
        assert torch.allclose(image[row], apply(alone, x[row]), rtol=0, atol=1e-9)
    assert cone.smooth(v[:0], kappa[:0])[0].shape == (0, cone.size)


@every_inside
def test_a_block_that_is_not_a_number_leaves_the_others_untouched(cone: Cone) -> None:
    v = points(cone, 9)
    clean, _, _ = cone.smooth(v, everywhere(1e-3, v))
    v[4, -1] = float("nan")
    p, r, rest = cone.smooth(v, everywhere(1e-3, v))
    others = torch.arange(9) != 4
    assert p[4].isnan().any()
    assert r[4].isnan().any()
    assert torch.allclose(p[others], clean[others], rtol=1e-12, atol=1e-14)
    assert rest.basis is None or rest.basis.isfinite().all()


def test_the_dual_of_a_product_is_assembled_from_its_blocks() -> None:
    product = Product(SCATTERED)
    v, x = torch.randn(2, 2, 5, product.size, dtype=torch.float64)
    kappa = 10 ** (-4 * torch.rand(2, 5, dtype=torch.float64))
    y, s, spectrum = product.smooth_dual(v, kappa)
    assert torch.allclose(y - s, v, rtol=0, atol=1e-14 * float(v.norm()))
    image = spectrum.from_basis(spectrum.values * spectrum.to_basis(x))
    start = 0
    for cone in SCATTERED:
        rows = slice(start, start + cone.size)
        p, r, rest = cone.smooth(-v[..., rows], kappa)
        assert torch.allclose(s[..., rows], p, atol=1e-14)
        assert torch.allclose(y[..., rows], r, atol=1e-14)
        assert torch.allclose(image[..., rows], apply(rest, x[..., rows]), atol=1e-11)
        start += cone.size
    free = slice(12, 14)
    assert torch.equal(y[..., free], v[..., free])
    assert not s[..., free].any()
    step = 1e-5
    plus, minus = (product.smooth_dual(v + k * step * x, kappa)[0] for k in (1, -1))
    assert ((plus - minus) / (2 * step) - image).norm(dim=-1).amax() < 1e-6 * float(
        image.norm(dim=-1).amax()
    )


def test_the_dual_of_a_product_tends_to_the_exact_one() -> None:
    curved = [
        SecondOrder(3),
        SecondOrder(4),
        Psd(2),
        Psd(3),
        Exponential(),
        Exponential(),
        Power((0.3, 0.6)),
    ]
    product = Product([Zero(2), Nonnegative(3), *curved])
    v, x = torch.randn(2, 20, product.size, dtype=torch.float64)
    exact_y, exact_s, exact = product.linearise_dual(v)
    y, s, spectrum = product.smooth_dual(v, torch.tensor(1e-16, dtype=torch.float64))
    assert (y - exact_y).abs().amax() < 1e-7
    assert (s - exact_s).abs().amax() < 1e-7
    gap = spectrum.from_basis(spectrum.values * spectrum.to_basis(x)) - exact.from_basis(
        exact.values * exact.to_basis(x)
    )
    assert gap.norm(dim=-1).median() < 1e-8

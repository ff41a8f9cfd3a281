"""Laws of the second derivative of the projections: differences of the first, symmetry,
homogeneity, batching, the product."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
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
)

CONES: list[Cone] = [
    Zero(3),
    Nonnegative(4),
    *(SecondOrder(size) for size in (1, 2, 3, 4, 5, 6)),
    *(Psd(n) for n in (1, 2, 3, 4, 5)),
    Exponential(),
    *(Power(tenths / 10) for tenths in range(1, 10)),
]
SCATTERED: list[Cone] = [
    Power(0.3),
    Nonnegative(2),
    SecondOrder(4),
    Exponential(),
    Zero(2),
    Psd(3),
    Power(0.8),
    SecondOrder(4),
    Nonnegative(1),
    Exponential(),
]
FLAT = {"zero", "nonnegative", "second_order-1", "second_order-2", "psd-1"}


def named(cone: Cone) -> str:
    return f"{cone.name}-{cone.size if cone.parameter is None else cone.parameter}"


every_cone = pytest.mark.parametrize("cone", CONES, ids=named)


@pytest.fixture(autouse=True)
def seed() -> Iterator[None]:
    torch.manual_seed(20261)
    with one_thread():
        yield


def is_flat(cone: Cone) -> bool:
    return bool({cone.name, named(cone)} & FLAT)


def points(cone: Cone, count: int = 3000) -> Tensor:
    """Random points: of one scale, of scales mixed from point to point and from row to row, and
    close to faces."""
    v = torch.randn(count, cone.size, dtype=torch.float64)
    part = count // 4
    v[part : 2 * part] *= 10 ** (8 * torch.rand(part, 1, dtype=torch.float64) - 4)
    v[2 * part : 3 * part] *= 10 ** (-6 * torch.rand(part, cone.size, dtype=torch.float64))
    base = v[3 * part :]
    p = cone.project(base)
    away = 10 ** (-4 * torch.rand(len(base), 1, dtype=torch.float64))
    v[3 * part :] = torch.where(
        torch.rand(len(base), 1) < 0.5, p, base - p
    ) + away * torch.randn_like(base)
    return v


def directions(v: Tensor) -> tuple[Tensor, Tensor]:
    h, g = torch.randn(2, *v.shape, dtype=v.dtype)
    return h / h.norm(dim=-1, keepdim=True), g / g.norm(dim=-1, keepdim=True)


def floor(v: Tensor) -> Tensor:
    """A curvature that is all rounding, or has underflowed."""
    return 1e-12 / v.norm(dim=-1, keepdim=True)


def applied(spectrum: Spectrum, x: Tensor) -> Tensor:
    if spectrum.basis is None:
        return spectrum.values * x
    return (
        spectrum.basis
        @ (spectrum.values * (spectrum.basis.mT @ x.unsqueeze(-1)).squeeze(-1)).unsqueeze(-1)
    )[..., 0]


def difference(cone: Cone, v: Tensor, h: Tensor, g: Tensor, step: Tensor) -> Tensor:
    """Five-point central difference along g of the derivative applied to h."""

    def at(k: int) -> Tensor:
        return applied(cone.linearise(v + k * step * g)[1], h)

    return (8 * (at(1) - at(-1)) - (at(2) - at(-2))) / (12 * step)


@every_cone
def test_the_curvature_agrees_with_differences_of_the_derivative(cone: Cone) -> None:
    v = points(cone)
    h, g = directions(v)
    # A power cone's derivative changes within |z| next to z = 0, which is no kink.
    smooth = v[:, 2].abs() if cone.name == "power" else v.norm(dim=-1)
    reach = torch.minimum(
        torch.minimum(cone.margin(v, cone.project(v)), 1e-2 * v.norm(dim=-1)), smooth
    ).unsqueeze(-1)
    wide, narrow = (difference(cone, v, h, g, reach / parts) for parts in (20, 40))
    k = cone.curvature(v, h, g)
    size, error = k.norm(dim=-1), (k - narrow).norm(dim=-1)
    doubt = (wide - narrow).norm(dim=-1) + 1e-14 / reach[:, 0]  # truncation, and rounding
    assert (error <= 1e-7 * size + 5 * doubt).all()
    if is_flat(cone):
        assert not k.any()
        return
    told = doubt <= 2e-7 * size
    assert (error[told] <= 1e-6 * size[told]).all()
    assert error[told].div(size[told]).quantile(0.5) < 1e-8
    assert told.double().mean() > 0.8 * (size > 0).double().mean() > 0.3
    assert ((size > 0) | (narrow.norm(dim=-1) <= 5 * doubt)).all()


@every_cone
def test_the_curvature_is_symmetric_and_bilinear(cone: Cone) -> None:
    v = points(cone)
    h, g = directions(v)
    k = cone.curvature(v, h, g)
    unit = k.norm(dim=-1, keepdim=True) + floor(v)
    assert ((cone.curvature(v, g, h) - k) / unit).abs().amax() < 1e-12
    size = cone.curvature(v, h, h).norm(dim=-1, keepdim=True) + unit
    assert (
        (cone.curvature(v, 2 * g - 3 * h, h) - 2 * k + 3 * cone.curvature(v, h, h)) / size
    ).abs().amax() < 1e-11


@every_cone
def test_the_curvature_is_symmetric_in_three_arguments(cone: Cone) -> None:
    """Pi is the gradient of |Pi|^2/2."""
    v = points(cone)
    h, g = directions(v)
    f, _ = directions(v)
    k, other = cone.curvature(v, h, g), cone.curvature(v, h, f)
    size = k.norm(dim=-1) + other.norm(dim=-1) + floor(v)[:, 0]
    assert (((k * f).sum(-1) - (other * g).sum(-1)) / size).abs().amax() < 1e-11


@every_cone
@pytest.mark.parametrize("scale", [1e-100, 1e-12, 1e12, 1e100])
def test_the_curvature_is_homogeneous_of_degree_minus_one(cone: Cone, scale: float) -> None:
    """And, by Euler's relation, Pi''(v)[h, v] = 0."""
    v = points(cone)
    h, g = directions(v)
    k, scaled = cone.curvature(v, h, g), cone.curvature(scale * v, h, g) * scale
    unit = k.norm(dim=-1, keepdim=True) + floor(v)
    gap = ((scaled - k) / unit).norm(dim=-1)
    # v is rounded, and curvature at its smallest distances feels it
    assert gap.quantile(0.99) < 1e-6
    along = cone.curvature(v, h, v / v.norm(dim=-1, keepdim=True))
    assert (along / (unit + cone.curvature(v, h, h).norm(dim=-1, keepdim=True))).norm(
        dim=-1
    ).quantile(0.99) < 1e-6


@every_cone
def test_a_batch_equals_a_loop(cone: Cone) -> None:
    v = points(cone, 24)
    h, g = directions(v)
    k = cone.curvature(*(x.view(2, 3, 4, cone.size) for x in (v, h, g))).view(24, -1)
    for row in range(24):
        alone = cone.curvature(v[row], h[row], g[row])
        assert alone.shape == (cone.size,)
        assert torch.allclose(k[row], alone, rtol=1e-9, atol=1e-12 * float(alone.norm()))
    assert cone.curvature(v[:0], h[:0], g[:0]).shape == (0, cone.size)


@every_cone
def test_the_curvature_is_finite_on_kinks(cone: Cone) -> None:
    v = torch.randn(300, cone.size, dtype=torch.float64)
    p = cone.project(v)
    v = torch.cat(
        (
            torch.zeros(1, cone.size, dtype=torch.float64),
            p,
            p - v,
            v - p,
            torch.eye(cone.size).double(),
        )
    )
    assert cone.curvature(v, *directions(v)).isfinite().all()


@every_cone
def test_a_block_that_is_not_a_number_leaves_the_others_untouched(cone: Cone) -> None:
    v = points(cone, 9)
    h, g = directions(v)
    clean = cone.curvature(v, h, g)
    v[4, -1] = float("nan")
    k = cone.curvature(v, h, g)
    others = torch.arange(9) != 4
    assert k[4].isnan().any()
    assert torch.allclose(k[others], clean[others], rtol=1e-13, atol=0)


def test_the_dual_of_a_product_has_the_curvature_of_its_blocks_mirrored() -> None:
    product = Product(SCATTERED)
    v, h, g = torch.randn(3, 2, 5, product.size, dtype=torch.float64)
    k = product.curvature_dual(v, h, g)
    start = 0
    for cone in SCATTERED:
        rows = slice(start, start + cone.size)
        assert torch.allclose(
            k[..., rows], cone.curvature(-v[..., rows], h[..., rows], g[..., rows]), rtol=1e-12
        )
        start += cone.size
    step = 1e-4

    def at(step: float) -> Tensor:
        spectrum = product.linearise_dual(v + step * g)[2]
        return spectrum.from_basis(spectrum.values * spectrum.to_basis(h))

    gap = ((at(step) - at(-step)) / (2 * step) - k).norm(dim=-1) / k.norm(dim=-1)
    assert gap.median() < 1e-5
    assert Product([]).curvature_dual(v[..., :0], h[..., :0], g[..., :0]).shape == (2, 5, 0)

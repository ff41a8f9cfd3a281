"""Laws of the projections: optimality, derivative, scaling, batching, duality, and the product of
cones."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from decimal import Decimal, getcontext

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
    smat,
    svec,
)

ALPHAS = (0.01, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.99)
CONES: list[Cone] = [
    Zero(3),
    Nonnegative(4),
    *(SecondOrder(size) for size in (1, 2, 3, 4, 7)),
    *(Psd(n) for n in (1, 2, 3, 4, 6)),
    Exponential(),
    *(Power(alpha) for alpha in ALPHAS),
]
THREE = [cone for cone in CONES if cone.name in ("exponential", "power")]


def named(cone: Cone) -> str:
    return f"{cone.name}-{cone.size if cone.parameter is None else cone.parameter}"


every_cone = pytest.mark.parametrize("cone", CONES, ids=named)
every_three = pytest.mark.parametrize("cone", THREE, ids=named)


@pytest.fixture(autouse=True)
def seed() -> Iterator[None]:
    """A fixed seed, and one thread: tensors here are small, and threads that share a core spin."""
    torch.manual_seed(20260)
    with one_thread():
        yield


def points(cone: Cone, count: int = 4000) -> Tensor:
    """Random points: of one scale, of scales mixed from point to point and from row to row, and
    close to faces."""
    v = torch.randn(count, cone.size, dtype=torch.float64)
    third = count // 3
    v[third : 2 * third] *= 10 ** (8 * torch.rand(third, 1, dtype=torch.float64) - 4)
    v[2 * third :] *= 10 ** (-8 * torch.rand(count - 2 * third, cone.size, dtype=torch.float64))
    return v


def near_kinks(cone: Cone, count: int = 1000) -> Tensor:
    """Points 1e-2 to 1e-6 away from the boundaries of the cone and of its polar."""
    v = torch.randn(count, cone.size, dtype=torch.float64)
    p = cone.project(v)
    away = 10 ** (-2 - 4 * torch.rand(count, 1, dtype=torch.float64))
    return torch.cat((p, v - p)) + torch.cat((away, away)) * torch.randn(
        2 * count, cone.size, dtype=torch.float64
    )


def dense(spectrum: Spectrum) -> Tensor:
    if spectrum.basis is None:
        return torch.diag_embed(spectrum.values)
    return spectrum.basis * spectrum.values.unsqueeze(-2) @ spectrum.basis.mT


def violation(cone: Cone, p: Tensor) -> Tensor:
    """How far p is outside the cone by the formula of its definition, at most rounding inside:
    exactly, or the least move along an axis that brings p in, which is no less than the
    distance."""
    match cone:
        case Zero():
            return p.norm(dim=-1)
        case Nonnegative():
            return (-p).amax(-1)
        case SecondOrder():
            return p[..., 1:].norm(dim=-1) - p[..., 0]
        case Psd():
            return -torch.linalg.eigvalsh(smat(p)).amin(-1)
        case Exponential():
            r, s, t = p.unbind(-1)
            curved = torch.minimum(
                (r - s * torch.log(t / s)).nan_to_num(torch.inf), s * torch.exp(r / s) - t
            )
            face = torch.maximum(torch.maximum(r, -t), s.abs())
            return torch.where(s > 0, torch.minimum(curved, face), face)
        case Power():
            x, y, z = p[..., 0].clamp(min=0), p[..., 1].clamp(min=0), p[..., 2].abs()
            alpha, beta = cone.alphas[0], 1 - cone.alphas[0]
            along_x = (z / y**beta).nan_to_num(0.0) ** (1 / alpha) - x
            along_y = (z / x**alpha).nan_to_num(0.0) ** (1 / beta) - y
            least = torch.minimum(torch.minimum(along_x, along_y), z - x**alpha * y**beta)
            return torch.maximum(least, -p[..., :2].amin(-1))
    raise AssertionError(cone)


def polar_violation(cone: Cone, u: Tensor) -> Tensor:
    """How far u is outside -K*, likewise: every dual cone here is a linear image of a cone here."""
    match cone:
        case Zero():
            return torch.zeros(u.shape[:-1], dtype=u.dtype)
        case Exponential():
            r, s, t = u.unbind(-1)
            return violation(cone, torch.stack((s - r, r, -t), -1))
        case Power():
            alpha = cone.alphas[0]
            scale = torch.tensor([-1 / alpha, -1 / (1 - alpha), 1.0], dtype=u.dtype)
            return violation(cone, u * scale) * min(alpha, 1 - alpha)
    return violation(cone, -u)


def difference(cone: Cone, v: Tensor, direction: Tensor, step: Tensor) -> Tensor:
    """Five-point central difference of the projection along the direction."""

    def at(k: int) -> Tensor:
        return cone.project(v + k * step * direction)

    return (8 * (at(1) - at(-1)) - (at(2) - at(-2))) / (12 * step)


@every_cone
def test_the_projection_is_in_the_cone_and_the_rest_in_the_polar_and_they_are_orthogonal(
    cone: Cone,
) -> None:
    v = torch.cat((points(cone), near_kinks(cone)))
    p = cone.project(v)
    size = v.norm(dim=-1)
    assert (violation(cone, p) <= 2e-14 * size).all()
    rest = v - p
    assert (polar_violation(cone, rest) <= 2e-14 * size).all()
    assert ((p * rest).sum(-1).abs() <= 1e-14 * size**2).all()


@every_cone
def test_the_derivative_agrees_with_differences(cone: Cone) -> None:
    v = torch.cat((points(cone), near_kinks(cone)))
    direction = torch.randn_like(v)
    direction /= direction.norm(dim=-1, keepdim=True)
    reach = torch.minimum(cone.margin(v, cone.project(v)), 1e-2 * v.norm(dim=-1)).unsqueeze(-1)
    wide = difference(cone, v, direction, reach / 20)
    narrow = difference(cone, v, direction, reach / 40)
    # where the second derivative is unbounded (next to an edge, or to z = 0 of a power cone)
    # differences at two steps disagree, and say nothing; rounding is |v|/step
    doubt = (wide - narrow).norm(dim=-1) + 1e-14 * v.norm(dim=-1) / reach[:, 0]
    told = doubt < 1e-6
    assert told.double().mean() > 0.9
    product = (dense(cone.linearise(v)[1]) @ direction.unsqueeze(-1)).squeeze(-1)
    error = (product - narrow).norm(dim=-1)
    assert (error[told] <= 1e-9 + 10 * doubt[told]).all()
    assert error[told].quantile(0.5) < 1e-9
    if cone.name != "zero":
        assert product[told].norm(dim=-1).quantile(0.75) > 0.1


@every_cone
@pytest.mark.parametrize("tolerance", [0.0, 1e-3])
def test_the_spectrum_is_an_orthogonal_basis_with_values_between_0_and_1(
    cone: Cone, tolerance: float
) -> None:
    v = torch.cat((points(cone), near_kinks(cone), torch.zeros(1, cone.size, dtype=torch.float64)))
    p, spectrum = cone.linearise(v, tolerance)
    assert torch.equal(p, cone.project(v))
    assert spectrum.values.shape == v.shape
    assert ((spectrum.values >= 0) & (spectrum.values <= 1)).all()
    if spectrum.basis is not None:
        identity = torch.eye(cone.size, dtype=v.dtype)
        assert (spectrum.basis.mT @ spectrum.basis - identity).abs().amax() < 1e-12
        assert (spectrum.basis @ spectrum.basis.mT - identity).abs().amax() < 1e-12


@every_cone
def test_the_derivative_reproduces_the_projection(cone: Cone) -> None:
    """Pi is positively homogeneous, so DPi(v) v = p, and DPi(v) p = p."""
    v = points(cone)
    p, spectrum = cone.linearise(v)
    size = v.norm(dim=-1, keepdim=True)
    for u in (v, p):
        assert ((dense(spectrum) @ u.unsqueeze(-1)).squeeze(-1) - p).div(size).abs().amax() < 2e-12


@every_cone
@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_the_projection_is_positively_homogeneous(cone: Cone, scale: float) -> None:
    v = points(cone)
    p, spectrum = cone.linearise(v)
    scaled, scaled_spectrum = cone.linearise(scale * v)
    size = v.norm(dim=-1, keepdim=True)
    assert ((scaled / scale - p) / size).abs().amax() < 1e-13
    assert (dense(scaled_spectrum) - dense(spectrum)).abs().amax((-1, -2)).quantile(0.99) < 1e-8
    scaled = cone.margin(scale * v, cone.project(scale * v)) / scale
    assert torch.allclose(
        scaled, cone.margin(v, cone.project(v)), rtol=1e-6, atol=1e-13 * float(size.max())
    )


@every_cone
def test_a_batch_equals_a_loop(cone: Cone) -> None:
    v = points(cone, 24)
    p, spectrum = cone.linearise(v.view(2, 3, 4, cone.size))
    margin = cone.margin(v, cone.project(v))
    for row, point in enumerate(v):
        q, alone = cone.linearise(point)
        assert q.shape == (cone.size,)
        assert torch.allclose(p.view(24, -1)[row], q, rtol=1e-13, atol=1e-13)
        assert torch.allclose(row_of(spectrum, row, cone.size), dense(alone), rtol=1e-9, atol=1e-9)
        assert torch.allclose(margin[row], cone.margin(point, cone.project(point)), rtol=1e-9)
    empty, spectrum = cone.linearise(v[:0])
    assert empty.shape == spectrum.values.shape == (0, cone.size)


def row_of(spectrum: Spectrum, row: int, size: int) -> Tensor:
    basis = None if spectrum.basis is None else spectrum.basis.view(-1, size, size)[row]
    return dense(Spectrum(spectrum.values.view(-1, size)[row], basis))


@every_cone
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_a_block_that_is_not_finite_leaves_the_others_untouched(cone: Cone, poison: float) -> None:
    if cone.name in ("zero", "nonnegative") or cone.size == 1:
        pytest.skip("elementwise: an infinity is a number here")
    v = points(cone, 9)
    clean, spectrum = cone.linearise(v)
    v[4, -1] = poison
    p, poisoned = cone.linearise(v)
    if poison != poison:
        assert p[4].isnan().any()
    assert not p[4].isfinite().all()
    others = torch.arange(9) != 4
    assert torch.equal(p[others], clean[others])
    assert torch.allclose(dense(poisoned)[others], dense(spectrum)[others], rtol=0, atol=1e-14)
    assert poisoned.values.isfinite().all()
    assert poisoned.basis is None or poisoned.basis.isfinite().all()


@every_cone
def test_the_margin_is_zero_on_a_kink_and_the_derivative_constant_in_rank_within_it(
    cone: Cone,
) -> None:
    """Inside half the margin the number of free directions, those of value 1, does not change."""
    v = points(cone, 1000)
    margin = cone.margin(v, cone.project(v))
    assert (margin >= 0).all()
    rank = (cone.linearise(v)[1].values == 1).sum(-1)
    for _ in range(4):
        away = torch.randn_like(v)
        away *= (0.3 * margin.clamp(max=1e3) / away.norm(dim=-1)).unsqueeze(-1)
        moved = (cone.linearise(v + away)[1].values == 1).sum(-1)
        sure = margin > 1e-9 * v.norm(dim=-1)
        assert ((moved == rank) | ~sure).double().mean() > (0.98 if cone in THREE else 0.999)


@every_cone
def test_at_a_kink_the_larger_derivative_is_taken(cone: Cone) -> None:
    """On the surface of K, on that of -K*, and at the apex, from both sides and within the
    tolerance."""
    v = torch.randn(500, cone.size, dtype=torch.float64)
    p = cone.project(v)
    tolerance = 1e-6
    for base in (p, v - p, torch.zeros_like(v)):
        nudged = base + 1e-8 * torch.randn_like(base)
        chosen = dense(cone.linearise(nudged, tolerance)[1])
        trace = chosen.diagonal(dim1=-2, dim2=-1).sum(-1)
        for _ in range(4):
            near = base + 1e-8 * torch.randn_like(base)
            other = dense(cone.linearise(near)[1]).diagonal(dim1=-2, dim2=-1).sum(-1)
            # a few powers near 0 and 1 are smooth but turn within less than the nudge
            assert (trace >= other - 1e-2).double().mean() > 0.95
    apex = dense(cone.linearise(torch.zeros(cone.size, dtype=torch.float64))[1])
    whole = (
        torch.zeros_like(apex) if cone.name == "zero" else torch.eye(cone.size, dtype=apex.dtype)
    )
    assert torch.allclose(apex, whole, atol=1e-15)


def test_the_nonnegative_kink_is_within_the_tolerance() -> None:
    v = torch.tensor([-2e-3, -1e-3, 0.0, 1.0], dtype=torch.float64)
    assert Nonnegative(4).linearise(v, 1e-3)[1].values.tolist() == [0, 1, 1, 1]
    assert Nonnegative(4).linearise(v)[1].values.tolist() == [0, 0, 1, 1]


def test_svec_is_an_isometry_by_columns_of_the_upper_triangle() -> None:
    a, b = torch.randn(2, 5, 4, 4, dtype=torch.float64)
    a, b = a + a.mT, b + b.mT
    assert torch.allclose((svec(a) * svec(b)).sum(-1), (a * b).sum((-1, -2)))
    assert torch.allclose(smat(svec(a)), a)
    m = torch.arange(9, dtype=torch.float64).view(3, 3)
    order = [(0, 0), (0, 1), (1, 1), (0, 2), (1, 2), (2, 2)]
    expected = [float(m[i, j]) * (1 if i == j else 2**0.5) for i, j in order]
    assert torch.allclose(svec(m), torch.tensor(expected, dtype=torch.float64))


def oracle(r: float, s: float, t: float) -> tuple[Decimal, Decimal, Decimal]:
    """The projection onto the curved boundary of the exponential cone by bisection with many
    digits."""
    context = getcontext()
    context.prec, context.Emin, context.Emax = 60, -(10**17), 10**17
    r_, s_, t_ = Decimal(r), Decimal(s), Decimal(t)
    low = 1 - s_ / r_ if r > 0 else min(r_ / s_, Decimal(0)) - 10**4
    high = r_ / s_ if s > 0 else max(1 - s_ / r_, Decimal(0)) + 10**4

    def parts(rho: Decimal) -> tuple[Decimal, Decimal]:
        quadratic = rho * rho - rho + 1
        return ((rho - 1) * r_ + s_) / quadratic, (r_ - rho * s_) / quadratic

    for _ in range(240):
        rho = (low + high) / 2
        a, b = parts(rho)
        if a * rho.exp() - b * (-rho).exp() > t_:
            high = rho
        else:
            low = rho
    a, b = parts(rho)
    return a * rho, a, t_ + b * (-rho).exp() if t > 0 else a * rho.exp()


@pytest.mark.parametrize(
    "v",
    [
        (1.0, 1e-12, 0.0),
        (1.0, 1e-12, 1.0),
        (1.0, 1e-12, -0.3),
        (-1.0, 1e-12, -1.0),
        (-1.0, 1e-3, -1.0),
        (-1.0, 0.5, -1e12),
        (-1e-12, 1e-12, -1.0),
        (-0.1, 1e-9, -1e-3),
        (1e-12, -1e-12, 1.0),
        (1e-12, 1.0, -1.0),
        (1e-3, -1e-4, 1.0),
        (1.0, -1.0, 1e-12),
        (1e-250, 1e-252, 1e-3),
        (-1e-200, 1e-200, -1.0),
        (2.0, 3.0, -1.0),
        (3.0, 1.0, 2.0),
        (650.0, 1.0, 1e200),
        (30.0, 1.0, -1e5),
        (1e-9, 1e-9, -1e-9),
        (1e-6, 1.0, 1.0),
    ],
)
def test_extreme_points_of_the_exponential_cone_agree_with_many_digits(
    v: tuple[float, float, float],
) -> None:
    p = Exponential().project(torch.tensor(v, dtype=torch.float64))
    size = max(abs(x) for x in v)
    for ours, exact in zip(p.tolist(), oracle(*v)):
        assert abs(ours - float(exact)) <= 4e-15 * size
        if 1e-40 * size < abs(float(exact)):
            assert abs(ours / float(exact) - 1) < 1e-9


def test_entropy_at_its_edge_has_a_finite_derivative() -> None:
    """|rho| up to 700 and s down to 1e-12, where e^rho overflows in a naive formula."""
    rho = torch.linspace(-700, 700, 57, dtype=torch.float64)
    unit = torch.exp(-rho.clamp(min=0))
    p = torch.stack((rho * unit, unit, torch.exp(rho.clamp(max=0))), -1)
    normal = torch.stack(
        (torch.exp(rho.clamp(max=0)), (1 - rho) * torch.exp(rho.clamp(max=0)), -unit), -1
    )
    for scale in (1e-12, 1.0):
        v = p + scale * normal
        q, spectrum = Exponential().linearise(v)
        assert ((q - p).norm(dim=-1) <= 1e-14 * v.norm(dim=-1)).all()
        assert dense(spectrum).isfinite().all()


MIXED = Product(
    [Zero(2), Nonnegative(3), *map(SecondOrder, (3, 4, 1, 3, 2)), *map(Psd, (1, 3, 2, 3)), *[Exponential()] * 3,
     *map(Power, (0.3, 0.5, 0.9))]
)  # fmt: skip
SHUFFLED = Product(
    [Exponential(), Nonnegative(2), Psd(2), Zero(1), Power(0.2), SecondOrder(3), Psd(2), Exponential(), Nonnegative(1),
     Power((0.6, 0.7)), Zero(2), SecondOrder(3)]
)  # fmt: skip
products = pytest.mark.parametrize(
    "product", [MIXED, SHUFFLED, Product([]), Product([Zero(2), Nonnegative(3)])], ids=str
)


def pieces(product: Product) -> list[tuple[Cone, slice]]:
    return [
        (cone, slice(b.start, b.start + b.size)) for cone, b in zip(product.cones, product.blocks)
    ]


@products
@pytest.mark.parametrize("batch", [(), (5,), (2, 3), (0,)], ids=str)
def test_a_product_equals_its_parts(product: Product, batch: tuple[int, ...]) -> None:
    v = torch.randn(*batch, product.size, dtype=torch.float64)
    p = product.project(v)
    y, s, spectrum = product.linearise_dual(v)
    assert p.shape == y.shape == s.shape == spectrum.values.shape == v.shape
    margin = v.new_full(batch, torch.inf)
    x = torch.randn(*batch, product.size, 2, dtype=torch.float64)
    derivative = spectrum.from_basis(
        spectrum.values.unsqueeze(-1) * spectrum.to_basis(x, columns=True), columns=True
    )
    vector = spectrum.from_basis(spectrum.values * spectrum.to_basis(x[..., 0]))
    assert torch.allclose(vector, derivative[..., 0])
    for cone, rows in pieces(product):
        part = v[..., rows]
        assert torch.allclose(p[..., rows], cone.project(part), rtol=1e-12, atol=1e-13)
        slack, own = cone.linearise(-part)
        assert torch.allclose(s[..., rows], slack, rtol=1e-12, atol=1e-13)
        matrix = torch.eye(part.shape[-1], dtype=v.dtype) - dense(own)
        assert torch.allclose(derivative[..., rows, :], matrix @ x[..., rows, :], atol=1e-9)
        margin = torch.minimum(margin, cone.margin(-part, cone.project(-part)))
    assert torch.allclose(product.margin(v, product.project(-v)), margin)
    assert torch.allclose(y, product.project_dual(v))


@products
def test_the_dual_projection_is_moreaus(product: Product) -> None:
    v = torch.randn(400, product.size, dtype=torch.float64)
    y, s, _ = product.linearise_dual(v)
    assert torch.allclose(y - s, v)
    assert ((y * s).sum(-1).abs() <= 1e-12 * (1 + v.norm(dim=-1) ** 2)).all()
    for cone, rows in pieces(product):
        assert (polar_violation(cone, -y[:, rows]) <= 1e-13).all()
        assert (violation(cone, s[:, rows]) <= 1e-13).all()
    k = product.project(10 * torch.randn(400, product.size, dtype=torch.float64))
    assert (y @ k.mT >= -1e-11).all()


@products
def test_a_spectrum_rotates_back_and_broadcasts_and_selects(product: Product) -> None:
    v = torch.randn(6, product.size, dtype=torch.float64)
    spectrum = product.linearise_dual(v)[2]
    assert torch.allclose(spectrum.from_basis(spectrum.to_basis(v)), v)
    shared = torch.randn(product.size, 4, dtype=torch.float64)
    rotated = spectrum.to_basis(shared, columns=True)
    assert spectrum.is_diagonal or rotated.shape == (6, product.size, 4)
    chosen = torch.tensor([4, 1])
    fewer = spectrum.index_select(chosen)
    assert torch.equal(fewer.values, spectrum.values[chosen])
    assert torch.allclose(fewer.to_basis(v[chosen]), spectrum.to_basis(v)[chosen])
    assert spectrum.is_diagonal == all(
        cone.name in ("zero", "nonnegative") for cone in product.cones
    )


@products
def test_a_product_is_a_value(product: Product) -> None:
    again = pickle.loads(pickle.dumps(product))
    assert again == product
    assert hash(again) == hash(product)
    assert again.blocks == product.blocks
    v = torch.randn(product.size, dtype=torch.float64)
    assert torch.equal(again.project(v), product.project(v))
    assert product != Product([Zero(99)])


def test_a_product_describes_itself() -> None:
    norms = SecondOrder(3), SecondOrder(4), SecondOrder(4)
    product = Product([Zero(2), Nonnegative(10), *norms, Psd(3), Exponential(), Power(0.25)])
    assert product.describe() == (
        "2 zero, 10 nonnegative, 3 second-order (sizes 3, 4), 1 psd (n = 3), 1 exponential, 1 power (alpha = 0.25)"
    )
    assert Product([]).describe() == "no rows"
    assert Product([Zero(1), Zero(2)]) == Product([Zero(3)])


@pytest.mark.parametrize(
    "wrong", [lambda: Power(1.0), lambda: Power(()), lambda: SecondOrder(0), lambda: Psd(0)]
)
def test_a_cone_that_does_not_exist_is_refused(wrong: object) -> None:
    with pytest.raises(ValueError, match="expected"):
        wrong()  # type: ignore[operator]

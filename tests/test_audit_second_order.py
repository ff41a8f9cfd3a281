"""What second derivatives are made of: parameters that depend on one another, threads, and what a
graph leaves behind."""

from __future__ import annotations

import gc
import weakref
from concurrent.futures import ThreadPoolExecutor

import cvxpy as cp
import pytest
import torch
from cases import relative
from torch import Tensor
from torch.func import grad, jacrev

from convlayer import ConvexLayer
from convlayer.core.maps import Called
from convlayer.paths.cone_derivative import ConeDerivative

POINT = torch.tensor([0.3, -0.5, 0.8, 0.1], dtype=torch.float64)
DIRECTION = torch.tensor([0.7, 0.2, -0.4, 1.1], dtype=torch.float64)
STEP = 1e-3


def proximal(*, ball: bool = False, bounded: bool = False, **options) -> ConvexLayer:
    """The minimiser of |x - p|^2 + sum of x^2 k / 2 + q'x over all x, a ball or a half-space."""
    p, q, x = cp.Parameter(4, name="p"), cp.Parameter(4, name="q"), cp.Variable(4, name="x")
    weights = [0.5, 1.0, 1.5, 2.0]
    cost = cp.sum_squares(x - p) + cp.sum_squares(cp.multiply(weights, x)) + q @ x
    constraints = (
        [cp.norm(x) <= 0.2]
        if ball
        else [cp.sum(x) <= 0.05, x[0] >= -0.5]
        if bounded
        else [cp.sum(x) == 1]
    )
    return ConvexLayer(cp.Problem(cp.Minimize(cost), constraints), [p, q], [x], **options)


LAYERS = {
    "kernel": proximal,
    "quadratic program": lambda: proximal(bounded=True),
    "cone program": lambda: proximal(ball=True),
}
every_layer = pytest.mark.parametrize("build", LAYERS.values(), ids=LAYERS)
every_pair = pytest.mark.parametrize(
    "second", [lambda t: t, lambda t: t.square(), torch.sin], ids=["same", "square", "sine"]
)


def difference(f, t: Tensor) -> Tensor:
    """Five points along DIRECTION."""
    left, right = ([f(t + sign * k * STEP * DIRECTION) for k in (1, 2)] for sign in (-1, 1))
    return (8 * (right[0] - left[0]) - (right[1] - left[1])) / (12 * STEP)


@every_layer
@every_pair
def test_a_parameter_made_from_another_is_not_counted_twice(build, second):
    layer = build()

    def loss(t: Tensor) -> Tensor:
        return layer(t, second(t))[0].pow(3).sum()

    t = POINT.clone().requires_grad_()
    (first,) = torch.autograd.grad(loss(t), t)
    (recorded,) = torch.autograd.grad(loss(t), t, create_graph=True)
    assert relative(recorded.detach(), first) <= 1e-12
    assert relative(first @ DIRECTION, difference(loss, POINT)) <= 1e-8
    (product,) = torch.autograd.grad(recorded @ DIRECTION, t)
    assert relative(product, difference(grad(loss), POINT)) <= 1e-8


@every_layer
def test_a_second_derivative_is_the_same_from_every_thread(build):
    layer = build()

    def hessian(t: Tensor) -> Tensor:
        return jacrev(grad(lambda u: layer(u, u.square())[0].pow(3).sum()))(t)

    points = [POINT + 0.01 * k for k in range(6)]
    alone = [hessian(t) for t in points]
    with ThreadPoolExecutor(len(points)) as pool:
        for _ in range(3):
            together = list(pool.map(hessian, points))
            assert all(
                relative(got, expected) <= 1e-12
                for got, expected in zip(together, alone, strict=True)
            )


def vertex(gradient: str) -> ConvexLayer:
    c, x = cp.Parameter(4, name="c"), cp.Variable(4, name="x")
    problem = cp.Problem(cp.Minimize(c @ x), [x >= 0, cp.sum(x) == 1])
    return ConvexLayer(problem, [c], [x], gradient=gradient)


@pytest.mark.filterwarnings("ignore::convlayer.GradientWarning")
@pytest.mark.parametrize("gradient", ["exact", "smoothed", "lpgd", "perturbed", "blackbox"])
def test_a_factor_goes_with_its_graph(gradient, monkeypatch):
    """Without the help of the garbage collector, which knows nothing of how large a factor is."""
    made: weakref.WeakSet[object] = weakref.WeakSet()
    for kind in (ConeDerivative, Called):

        def watched(self, *args, initialise=kind.__init__):
            initialise(self, *args)
            made.add(self)

        monkeypatch.setattr(kind, "__init__", watched)
    layer, c = vertex(gradient), POINT.clone().requires_grad_()
    gc.collect()
    gc.disable()
    try:
        solution = layer.solve(c)
        (solution.variables[0].square().sum() + solution.objective).backward()
        assert len(made) >= 1
        del solution
        assert len(made) == 0
    finally:
        gc.enable()


def test_least_norm_is_that_of_every_path():
    A, b, x = cp.Parameter((2, 4), name="A"), cp.Parameter(2, name="b"), cp.Variable(4, name="x")
    layer = ConvexLayer(
        cp.Problem(cp.Minimize(cp.sum_squares(A @ x - b))), [A, b], [x], regularise="least_norm"
    )
    assert layer.structure == "least_squares"
    tensors = torch.stack([POINT, DIRECTION]), torch.tensor([1.0, -0.5], dtype=torch.float64)
    expected = torch.linalg.pinv(tensors[0]) @ tensors[1]
    assert relative(layer(*tensors)[0], expected) <= 1e-12
    for found in (
        layer(*tensors, solver_args={"max_iter": 60}),
        layer.with_options(solver="clarabel")(*tensors),
    ):
        assert relative(found[0], expected) <= 1e-5


@pytest.mark.parametrize("structure", ["auto", "generic"])
def test_the_jacobian_of_nothing_has_its_shape(structure):
    a, x = cp.Parameter(3), cp.Variable(3)
    layer = ConvexLayer(
        cp.Problem(cp.Minimize(cp.sum_squares(x - a)), [x >= 0]), [a], [x], structure=structure
    )
    value = torch.ones(3, dtype=torch.float64)
    assert torch.func.jacrev(lambda t: layer(t)[0][:0])(value).shape == (0, 3)
    assert torch.func.jacfwd(lambda t: layer(t)[0])(value.new_zeros(0, 3)).shape == (0, 3, 0, 3)

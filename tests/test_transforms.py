"""The transforms of torch, on every path: what they say of each other, of finite differences, and
of a loop.

A path is a case of the registry as a cone program, a structure, a spelling of one that gives
multipliers, or the batched interior point. The variables, the multipliers asked for and the optimal
value are differentiated together, as functions of parameters that `Path.entered` takes into their
domain, so that every direction is one that may be taken.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import cvxpy as cp
import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from cases import CASES, leaves, relative, weights
from structures import SPELLINGS
from test_structures import layer_of, sample
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils.checkpoint import checkpoint

from convlayer import ConvexLayer, ParameterError, SolverError, Status
from convlayer.declaration.domain import is_symmetric
from convlayer.structures import STRUCTURES

STEP = 2e-4  # of central differences, extrapolated once


@dataclass(frozen=True, eq=False)
class Path:
    name: str
    build: Callable[[], ConvexLayer]
    draw: Callable[[tuple[int, ...]], Sequence[Tensor]]

    @functools.cached_property
    def layer(self) -> ConvexLayer:
        return self.build().with_options(validate=False)

    @property
    def arity(self) -> int:
        return len(self.layer._declared.parameters)

    def sample(self, *batch: int) -> tuple[Tensor, ...]:
        return tuple(self.draw(batch))

    def directions(self, *batch: int, seed: int) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(seed)
        return tuple(
            torch.randn(t.shape, generator=generator, dtype=torch.float64)
            for t in self.sample(*batch)
        )

    def entered(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Matrices are symmetric where they are declared so, and the marginals of a transport sum
        to one."""
        inside = [
            (t + t.mT) / 2 if is_symmetric(p) else t
            for t, p in zip(tensors, self.layer._declared.parameters, strict=True)
        ]
        if self.layer.structure == "entropic_optimal_transport":
            inside[1:3] = (t / t.sum(-1, keepdim=True) for t in inside[1:3])
        return inside

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        solution = self.layer.solve(*self.entered(tensors))
        return *solution.variables, solution.objective

    def loss(self, *tensors: Tensor) -> Tensor:
        """Of one instance, or of a batch whose rows count differently."""
        outputs = self(*tensors)
        linear = sum(
            (torch.cos(torch.arange(1.0, o.numel() + 1)).reshape(o.shape) * o).sum()
            for o in outputs
        )
        return linear + sum(o.square().sum() for o in outputs) / 4

    def __repr__(self) -> str:
        return self.name


def paths() -> list[Path]:
    found = [Path(name, c.layer, c.sample) for name, c in CASES.items()]
    found += [Path(f"structure {name}", functools.partial(layer_of, name), functools.partial(sample, name))
              for name in STRUCTURES]  # fmt: skip
    for spelling in SPELLINGS:
        problem, _, variables = spelling.declare()
        if not {v.id for v in variables} <= {v.id for v in problem.variables()}:
            found.append(
                Path(str(spelling), spelling.layer, functools.partial(spelling.sample, seed=3))
            )
    for name in ("quadratic_program", "raw_second_order"):
        build = functools.partial(CASES[name].layer, solver="interior_point")
        found.append(Path(f"{name} interior_point", build, CASES[name].sample))
    return found


PATHS = {path.name: path for path in paths()}
# One of every kind of derivative: a polyhedral cone program, a curved one, a log-log convex one,
# the batched solver, and each kernel. The laws that differentiate once for every entry run on
# these; what they compose is looked at on every path.
KINDS = (
    "lasso",
    "every_cone",
    "posynomial",
    "quadratic_program interior_point",
    *(p for p in PATHS if p.startswith("structure")),
)
every_path = pytest.mark.parametrize("path", PATHS.values(), ids=str)
every_kind = pytest.mark.parametrize("path", [PATHS[name] for name in KINDS], ids=str)


def inner(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    return sum((a * b).sum() for a, b in zip(left, right, strict=True))


def size(tensors: Sequence[Tensor]) -> float:
    return float(torch.stack([t.norm() for t in tensors]).norm())


def agree(got: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float) -> bool:
    """In units of all that is expected."""
    return size([a - b for a, b in zip(got, expected, strict=True)]) <= tolerance * size(expected)


def gradient(path: Path, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """By plain reverse mode."""
    inputs = leaves(tensors)
    return torch.autograd.grad(path.loss(*inputs), inputs)


def product(path: Path, tensors: Sequence[Tensor], a: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The loss's Hessian times a direction, by reverse mode twice."""
    inputs = leaves(tensors)
    first = torch.autograd.grad(path.loss(*inputs), inputs, create_graph=True)
    return torch.autograd.grad(inner(first, a), inputs)


def every_gradient(path: Path) -> Callable[..., tuple[Tensor, ...]]:
    return grad(path.loss, argnums=tuple(range(path.arity)))


def forward_over_reverse(
    path: Path, tensors: Sequence[Tensor], a: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    return jvp(every_gradient(path), tuple(tensors), tuple(a))[1]


# First derivatives
# ------------------------------------------------------------------------------------------------------


@every_path
def test_forward_mode_is_the_transpose_of_reverse_mode(path):
    tensors, a = path.sample(2), path.directions(2, seed=1)
    outputs, pull = vjp(path, *tensors)
    c = tuple(weights(outputs))
    bars = pull(c)
    tangents = jvp(path, tensors, a)[1]
    assert abs(float(inner(c, tangents) - inner(bars, a))) <= 1e-9 * size(c) * size(tangents)
    assert size(tangents) > 1e-3
    inputs = leaves(tensors)
    assert agree(torch.autograd.grad(path(*inputs), inputs, c), bars, 1e-12)
    with forward_ad.dual_level():
        duals = path(*(forward_ad.make_dual(t, d) for t, d in zip(tensors, a, strict=True)))
        assert agree([forward_ad.unpack_dual(dual).tangent for dual in duals], tangents, 1e-12)


@every_path
def test_jacobians_of_both_modes_agree_with_a_loop_of_plain_backward(path):
    tensors = path.sample()
    every = tuple(range(len(tensors)))
    inputs = leaves(tensors)
    outputs = path(*inputs)
    found: dict[str, list[Tensor]] = {"loop": [], "batched": []}
    for output in outputs:

        def pulled(unit: Tensor, output: Tensor = output) -> tuple[Tensor, ...]:
            return torch.autograd.grad(
                output, inputs, unit.reshape(output.shape), retain_graph=True
            )

        units = torch.eye(output.numel(), dtype=torch.float64)
        for name, columns in (
            ("loop", zip(*map(pulled, units), strict=True)),
            ("batched", vmap(pulled)(units)),
        ):
            found[name] += [
                torch.stack([*c]).reshape(output.shape + t.shape)
                for c, t in zip(columns, tensors, strict=True)
            ]
    assert agree(found["batched"], found["loop"], 1e-12)
    for jacobian in (jacrev, jacfwd):
        assert agree(
            [part for row in jacobian(path, every)(*tensors) for part in row], found["loop"], 1e-9
        )


# Second derivatives
# -----------------------------------------------------------------------------------------------------


@every_path
def test_the_second_derivative_is_that_of_central_differences_in_every_combination_of_modes(path):
    tensors, a, b = path.sample(2), path.directions(2, seed=1), path.directions(2, seed=2)
    second = product(path, tensors, a)

    def slope(step: float) -> Tensor:
        ahead, behind = (
            inner(gradient(path, [t + sign * step * d for t, d in zip(tensors, b, strict=True)]), a)
            for sign in (1, -1)
        )
        return (ahead - behind) / (2 * step)

    expected = float((4 * slope(STEP / 2) - slope(STEP)) / 3)
    assert abs(expected) > 1e-6
    assert abs(float(inner(second, b)) - expected) <= 1e-5 * abs(expected)
    assert agree(forward_over_reverse(path, tensors, a), second, 1e-8)

    def tangent(*at: Tensor) -> Tensor:
        return jvp(path.loss, at, a)[1]

    assert abs(float(jvp(tangent, tensors, b)[1] - inner(second, b))) <= 1e-8 * abs(expected)
    assert agree(grad(tangent, tuple(range(len(tensors))))(*tensors), second, 1e-8)


@pytest.mark.dear
@every_kind
def test_the_hessian_of_a_loss_agrees_with_a_loop_of_double_backward_and_is_symmetric(path):
    tensors = path.sample()
    shapes, sizes = [t.shape for t in tensors], [t.numel() for t in tensors]

    def loss(point: Tensor) -> Tensor:
        return path.loss(
            *(part.view(shape) for part, shape in zip(point.split(sizes), shapes, strict=True))
        )

    point = torch.cat([t.flatten() for t in tensors])
    (leaf,) = leaves([point])
    (first,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
    loop = torch.stack([torch.autograd.grad(entry, leaf, retain_graph=True)[0] for entry in first])
    assert relative(loop, loop.mT) < 1e-8
    assert relative(hessian(loss)(point), loop) < 1e-8
    assert relative(jacrev(jacrev(loss))(point), loop) < 1e-8


@pytest.mark.dear
@every_kind
def test_gradcheck_in_both_modes_and_gradgradcheck(path):
    inputs = leaves(path.sample(1))
    assert gradcheck(path, inputs, check_forward_ad=True, fast_mode=True)
    assert gradgradcheck(path, inputs, check_fwd_over_rev=True, fast_mode=True)


@pytest.mark.dear
@every_kind
def test_a_third_derivative_is_an_error_and_never_zero(path):
    tensors, a = path.sample(), path.directions(seed=1)
    inputs = leaves(tensors)
    first = torch.autograd.grad(path.loss(*inputs), inputs, create_graph=True)
    second = torch.autograd.grad(inner(first, a), inputs, create_graph=True)
    assert all(part.requires_grad for part in second)
    with pytest.raises(RuntimeError, match="differentiated twice, not three times"):
        torch.autograd.grad(inner(second, a), inputs)

    def tangent(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *at: jvp(function, at, a)[1]

    for third in (
        grad(tangent(tangent(path.loss))),
        tangent(grad(tangent(path.loss))),
        tangent(tangent(tangent(path.loss))),
    ):
        with pytest.raises(RuntimeError, match="differentiated twice, not three times"):
            third(*tensors)


@every_kind
def test_the_old_vmap_of_torch_is_refused_and_told_what_to_write_instead(path):
    inputs = leaves(path.sample())
    output = path.loss(*inputs)
    with pytest.raises(RuntimeError, match=r"torch\.func"):
        torch.autograd.grad(
            output, inputs, torch.ones(2, dtype=torch.float64), is_grads_batched=True
        )


def test_a_layer_of_a_layer_is_differentiated_twice():
    outer, inside = PATHS["structure sparsemax"], PATHS["ridge"]
    A, b, lam = inside.sample()

    def loss(b: Tensor, temperature: Tensor) -> Tensor:
        x = inside.layer(A, b, lam)[0]
        (y,) = outer.layer(torch.cat([x, x.square()]), temperature)
        return y.square().sum()

    tensors = b, torch.tensor(0.7, dtype=torch.float64)
    a = inside.directions(seed=1)[1:]

    def slope(step: float) -> Tensor:
        ahead, behind = (
            torch.stack(
                [
                    p.sum()
                    for p in grad(loss, (0, 1))(
                        *(t + s * step * d for t, d in zip(tensors, a, strict=True))
                    )
                ]
            )
            for s in (1, -1)
        )
        return (ahead - behind) / (2 * step)

    second = jvp(grad(loss, (0, 1)), tensors, a)[1]
    found = torch.stack([p.sum() for p in second])
    assert float(found.norm()) > 1e-3
    assert relative(found, (4 * slope(STEP / 2) - slope(STEP)) / 3) < 1e-5

    # The outer layer's direction moves with the inner layer's solution: here forward mode is
    # differentiated in its tangent too.
    def tangent(*at: Tensor) -> Tensor:
        return jvp(loss, at, a)[1]

    assert agree(grad(tangent, (0, 1))(*tensors), second, 1e-9)
    assert abs(float(jvp(tangent, tensors, a)[1] - inner(second, a))) <= 1e-9 * size(second)
    inputs = leaves(tensors)
    assert agree(
        torch.autograd.grad(
            inner(torch.autograd.grad(loss(*inputs), inputs, create_graph=True), a), inputs
        ),
        second,
        1e-9,
    )


# vmap
# -------------------------------------------------------------------------------------------------------------------


def around(path: Path, count: int, seed: int) -> list[Tensor]:
    """For each parameter `count` values near one sample, in front."""
    moves = zip(path.sample(), path.directions(seed=seed), strict=True)
    return [torch.stack([t + 0.01 * k * d for k in range(1, count + 1)]) for t, d in moves]


def splits(path: Path) -> list[list[bool]]:
    """Which parameters are batched: each alone, all the others, and all."""
    n = path.arity
    alone = [[k == chosen for k in range(n)] for chosen in range(n)]
    return [[True] * n] + (
        alone + [[not one for one in row] for row in alone] if n > 2 else alone if n == 2 else []
    )


def looped(
    function: Callable, args: Sequence[Tensor], batched: Sequence[bool], count: int
) -> list[Tensor]:
    rows = [
        function(*(t[k] if one else t for t, one in zip(args, batched, strict=True)))
        for k in range(count)
    ]
    return [torch.stack(column) for column in zip(*rows, strict=True)]


@every_path
def test_vmap_over_any_parameters_at_any_dimension_is_a_loop(path):
    alone, many = path.sample(), around(path, 2, seed=1)
    for batched in splits(path):
        args = [stack if one else t for t, stack, one in zip(alone, many, batched, strict=True)]
        expected = looped(path, args, batched, 2)
        assert agree(
            vmap(path, tuple(0 if one else None for one in batched))(*args), expected, 1e-10
        )
        last = [t.movedim(0, -1) if one else t for t, one in zip(args, batched, strict=True)]
        assert agree(
            vmap(path, tuple(-1 if one else None for one in batched))(*last), expected, 1e-10
        )


@every_path
def test_vmap_inside_vmap_and_around_a_batch_is_a_loop(path):
    alone, many = path.sample(), around(path, 3, seed=1)
    pairs = [
        torch.stack([t, t + 0.01 * d]) for t, d in zip(alone, path.directions(seed=2), strict=True)
    ]
    n = len(alone)
    within = [k == 0 for k in range(n)]
    if n == 1:
        args, outer, inside = [torch.stack([many[0], many[0] + 0.01])], (0,), (0,)
    else:
        args = [many[0], *pairs[1:]]
        outer, inside = (None, *[0] * (n - 1)), (0, *[None] * (n - 1))
    expected = [
        torch.stack(column)
        for column in zip(
            *(looped(path, [t if dim is None else t[k] for t, dim in zip(args, outer, strict=True)], within, 3)
              for k in range(2)), strict=True)
    ]  # fmt: skip
    assert agree(vmap(vmap(path, inside), outer)(*args), expected, 1e-10)
    # The inner batch as the layer takes it itself, in front of the first parameter.
    assert agree(vmap(path, outer)(*args), expected, 1e-10)


@every_path
def test_each_sample_has_its_own_gradient_of_what_all_share(path):
    alone, many = path.sample(), around(path, 2, seed=1)
    for batched in splits(path):
        args = [stack if one else t for t, stack, one in zip(alone, many, batched, strict=True)]
        found = vmap(every_gradient(path), tuple(0 if one else None for one in batched))(*args)
        assert agree(found, looped(lambda *row: gradient(path, row), args, batched, 2), 1e-9)


@every_path
def test_vmap_of_a_second_derivative_over_samples_and_over_directions_is_a_loop(path):
    many = around(path, 2, seed=1)
    n, every = len(many), [True] * 2 * len(many)
    a = path.directions(2, seed=3)

    def function(*args: Tensor) -> tuple[Tensor, ...]:
        return forward_over_reverse(path, args[:n], args[n:])

    def plain(*args: Tensor) -> tuple[Tensor, ...]:
        return product(path, args[:n], args[n:])

    assert agree(vmap(function)(*many, *a), looped(plain, [*many, *a], every, 2), 1e-8)
    directions = [False] * n + [True] * n
    args = [*path.sample(), *a]
    assert agree(
        vmap(function, tuple(0 if one else None for one in directions))(*args),
        looped(plain, args, directions, 2),
        1e-8,
    )


@every_kind
def test_what_solve_says_of_a_row_is_said_of_each_sample_by_vmap(path):
    tensors = path.entered(path.sample(3))
    expected = path.layer.solve(*tensors)

    def told(*row: Tensor) -> tuple[Tensor, ...]:
        solution = path.layer.solve(*row)
        assert solution.status.shape == ()
        return (
            solution.status,
            solution.iterations,
            solution.degenerate,
            solution.residual,
            solution.objective,
        )

    status, iterations, degenerate, residual, objective = vmap(told)(*tensors)
    assert torch.equal(status, expected.status)
    assert torch.equal(iterations, expected.iterations)
    assert torch.equal(degenerate, expected.degenerate)
    assert torch.equal(residual, expected.residual)
    assert relative(objective, expected.objective) < 1e-12


# Failures
# ---------------------------------------------------------------------------------------------------------------


@every_path
def test_a_row_that_failed_is_nan_in_every_transform_and_leaves_the_others_untouched(path):
    lenient = Path(
        path.name, functools.partial(path.layer.with_options, on_failure="nan"), path.draw
    )
    tensors, a = path.sample(3), path.directions(3, seed=1)
    spoilt = [t.clone() for t in tensors]
    spoilt[-1][1] = torch.nan
    rows, n = [0, 2], len(tensors)

    def all_of_them(*args: Tensor) -> list[Tensor]:
        values, tangents = jvp(lenient, args[:n], args[n:])
        gradients, curvatures = jvp(every_gradient(lenient), args[:n], args[n:])
        _, pull = vjp(lenient, *args[:n])
        return [
            *values,
            *tangents,
            *gradients,
            *curvatures,
            *pull(tuple(torch.ones_like(value) for value in values)),
        ]

    found = vmap(all_of_them)(*spoilt, *a)
    clean = vmap(all_of_them)(*(t[rows] for t in (*tensors, *a)))
    assert agree([part[rows] for part in found], clean, 1e-9)
    outputs = 2 * len(lenient(*tensors))
    assert all(bool(part[1].isnan().all()) for part in found[:outputs])
    assert any(bool(part[1].isnan().any()) for part in found[outputs : outputs + n])
    assert any(bool(part[1].isnan().any()) for part in found[outputs + n : outputs + 2 * n])
    assert any(bool(part[1].isnan().any()) for part in found[outputs + 2 * n :])
    with pytest.raises(ParameterError, match="row 1: BAD_INPUT"):
        vmap(path)(*spoilt)


def test_a_row_without_a_solution_is_named_inside_vmap_or_nan():
    low, high, x = cp.Parameter(2), cp.Parameter(2), cp.Variable(2)
    layer = ConvexLayer(
        cp.Problem(cp.Minimize(cp.sum_squares(x)), [x >= low, x <= high]), [low, high], [x]
    )
    lows = torch.tensor([[0.1, 0.2], [3.0, 3.0], [0.3, 0.4]], dtype=torch.float64)
    high = torch.ones(2, dtype=torch.float64)
    with pytest.raises(SolverError, match="row 1: INFEASIBLE") as caught:
        vmap(layer, (0, None))(lows, high)
    assert caught.value.rows == [(1,)]
    lenient = layer.with_options(on_failure="nan")
    solution = vmap(lambda low: lenient.solve(low, high).status)(lows)
    assert solution.tolist() == [Status.SOLVED, Status.INFEASIBLE, Status.SOLVED]
    first = vmap(grad(lambda low: lenient(low, high)[0].sum()))(lows)
    assert first.isnan().any(1).tolist() == [False, True, False]
    unused = grad(lambda lows: lenient(lows, high)[0][[0, 2]].square().sum())(lows)
    assert torch.equal(unused[1], torch.zeros(2, dtype=torch.float64))
    assert relative(unused[[0, 2]], 2 * lows[[0, 2]]) < 1e-9
    second = vmap(hessian(lambda low: lenient(low, high)[0].square().sum()))(lows)
    assert second.flatten(1).isnan().any(1).tolist() == [False, True, False]
    assert relative(second[[0, 2]], 2 * torch.eye(2, dtype=torch.float64).expand(2, 2, 2)) < 1e-9


def test_a_warm_start_inside_a_transform_is_refused():
    path = PATHS["lasso"]
    tensors = path.sample(2)
    solution = path.layer.solve(*tensors)
    for option in ({"ids": [0, 1]}, {"warm_start": solution}):
        with pytest.raises(RuntimeError, match=r"cannot be used inside a torch\.func transform"):
            grad(lambda *args, option=option: path.layer.solve(*args, **option).objective.sum())(
                *tensors
            )
        with (
            forward_ad.dual_level(),
            pytest.raises(RuntimeError, match=r"cannot be used inside a torch\.func transform"),
        ):
            path.layer.solve(forward_ad.make_dual(tensors[0], tensors[0]), *tensors[1:], **option)


# Beside
# ---------------------------------------------------------------------------------------------------------------


@every_path
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_gives_the_same_gradient(path, reentrant):
    inputs = leaves(path.sample(2))
    outputs = checkpoint(path, *inputs, use_reentrant=reentrant)
    torch.autograd.backward(inner(weights(outputs), outputs))
    others = leaves(path.sample(2))
    outputs = path(*others)
    expected = torch.autograd.grad(inner(weights(outputs), outputs), others)
    assert all(torch.equal(t.grad, bar) for t, bar in zip(inputs, expected, strict=True))


@every_path
def test_float32_agrees_with_float64_to_its_precision(path):
    single = [t.float() for t in path.sample(2)]
    a = [d.float() for d in path.directions(2, seed=1)]
    found = []
    for dtype in (torch.float32, torch.float64):
        tensors, directions = (tuple(t.to(dtype) for t in group) for group in (single, a))
        tangents = jvp(path, tensors, directions)[1]
        curvatures = forward_over_reverse(path, tensors, directions)
        assert all(part.dtype is dtype for part in (*tangents, *curvatures))
        found.append(([t.double() for t in tangents], [t.double() for t in curvatures]))
    assert agree(found[0][0], found[1][0], 1e-4)
    assert agree(found[0][1], found[1][1], 1e-3)

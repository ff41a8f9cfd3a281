"""The ways to differentiate a layer: each by its own definition, the warnings, and what makes a
solution unique."""

import warnings
from dataclasses import dataclass, field, replace

import cvxpy as cp
import numpy as np
import pytest
import torch
from cases import CASES, relative

from convlayer import Cause, ConvexLayer, GradientWarning, ProblemError
from convlayer.conic.residual import normalise, recentre
from convlayer.paths.cone_solution import on_central_path

ONE_OF_EACH_CONE = (
    "linear_program", "quadratic_program", "lasso", "raw_second_order", "nearest_correlation", "entropy", "raw_exponential",
    "raw_power", "geometric_mean", "every_cone",
)  # fmt: skip
KAPPA = 1e-2


@dataclass
class Caught:
    """Takes the place of a gradient and keeps what it is given."""

    seen: list = field(default_factory=list)
    name = "exact"

    def __call__(self, call, exact):
        self.seen.append((call, exact))
        return exact


def smoothed_solution(layer, tensors, product=None):
    """(x, y) of the cone program with every complementarity product equal to `product` in its own
    units, by default that of KAPPA; and that product."""
    sibling = layer.with_options(validate=False)
    caught = Caught()
    sibling._take(sibling._choice, replace(sibling._settings, gradient=caught))
    leaves = [t.detach().requires_grad_() for t in tensors]
    torch.autograd.grad(sibling(*leaves)[0].sum(), leaves, allow_unused=True)
    ((call, exact),) = caught.seen
    x, s, y = exact.point
    data, scaling = normalise(exact.data.widen(1))
    x, s, y = scaling.enter(x, s, y)
    _, scaling = recentre(data, scaling, x, y)
    units = float(scaling.rho * scaling.tau)
    product = KAPPA / units if product is None else product
    (x, s, y), _ = on_central_path(call, exact, product * units)
    return torch.cat([x[0], y[0]]), product


def directions(layer, tensors, seed):
    generator = torch.Generator().manual_seed(seed)
    found = []
    for tensor, parameter in zip(tensors, layer._declared.parameters, strict=True):
        a = torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)
        square = parameter.ndim == 2 and any(
            parameter.attributes[name] for name in ("symmetric", "PSD", "NSD")
        )
        found.append((a + a.mT) / 2 if square else a)
    return found


@pytest.mark.parametrize("name", ONE_OF_EACH_CONE)
def test_a_smoothed_gradient_is_that_of_the_smoothed_solution(name):
    case = CASES[name]
    layer = case.layer(structure="generic")
    tensors = [t[0] for t in case.sample(1)]
    a = directions(layer, tensors, 0)
    base, product = smoothed_solution(layer, tensors)
    weights = torch.randn(
        len(base), generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )

    def along(step):
        moved = [t + step * d for t, d in zip(tensors, a, strict=True)]
        return float(weights @ smoothed_solution(layer, moved, product)[0])

    h = 1e-3
    expected = (8 * (along(h / 2) - along(-h / 2)) - (along(h) - along(-h))) / (6 * h)
    sibling = layer.with_options(validate=False)
    sibling = sibling.with_options(gradient="smoothed", gradient_args={"kappa": KAPPA})
    n = layer._canonical.program.n
    x_bar, y_bar = weights[:n].unsqueeze(0), weights[n:].unsqueeze(0)
    found = canonical_gradient(sibling, tensors, x_bar, y_bar)
    got = sum(float((bar * d).sum()) for bar, d in zip(found, a, strict=True))
    assert got == pytest.approx(expected, rel=1e-6, abs=1e-6 * float(weights.norm()) * 1e-2)


def canonical_gradient(layer, tensors, x_bar, y_bar):
    """Of a linear functional of the cone program's (x, y), by the layer's own way back."""
    mode, caught = layer._settings.gradient, Caught()
    layer._take(layer._choice, replace(layer._settings, gradient=caught))
    leaves = [t.detach().requires_grad_() for t in tensors]
    torch.autograd.grad(layer(*leaves)[0].sum(), leaves, allow_unused=True)
    ((call, exact),) = caught.seen
    derivative = mode(call, exact)
    readers = layer._canonical.parameters
    values = [t.detach().unsqueeze(0) for t in tensors]
    entries = [reader.read(value) for reader, value in zip(readers, values, strict=True)]
    bars = derivative.cotangent(entries, [x_bar, y_bar, x_bar.new_zeros(1)], [True] * len(values))
    return [
        reader.pull_back(bar, value)[0]
        for reader, bar, value in zip(readers, bars, values, strict=True)
    ]


@pytest.mark.parametrize(
    "name", ["quadratic_program", "raw_second_order", "nearest_correlation", "entropy", "raw_power"]
)
def test_a_smoothed_gradient_tends_to_the_exact_one(name):
    case = CASES[name]
    tensors = [t.requires_grad_() for t in case.sample(3)]
    exact = gradient_of(case.layer(structure="generic"), tensors)
    errors = [
        relative(
            *(
                torch.cat([g.flatten() for g in bars])
                for bars in (gradient_of(smooth(case, kappa), tensors), exact)
            )
        )
        for kappa in (1e-4, 1e-6, 1e-8)
    ]
    assert errors[2] < 1e-3
    assert errors[2] < errors[0] or errors[0] < 1e-6


def smooth(case, kappa):
    return case.layer(structure="generic", gradient="smoothed", gradient_args={"kappa": kappa})


def gradient_of(layer, tensors):
    outputs = layer(*tensors)
    generator = torch.Generator().manual_seed(2)
    bars = [torch.randn(o.shape, generator=generator, dtype=o.dtype) for o in outputs]
    return torch.autograd.grad(outputs, tensors, bars)


def test_forward_mode_of_a_smoothed_gradient_is_its_transpose():
    case = CASES["every_cone"]
    layer, tensors = smooth(case, 1e-3).with_options(validate=False), case.sample(2)
    a = directions(layer, tensors, 3)
    outputs, tangents = torch.func.jvp(lambda *t: layer(*t), tuple(tensors), tuple(a))
    leaves = [t.requires_grad_() for t in tensors]
    bars = [torch.ones_like(o) for o in outputs]
    pulled = torch.autograd.grad(layer(*leaves), leaves, bars)
    left = sum(float(t.sum()) for t in tangents)
    assert left == pytest.approx(
        sum(float((p * d).sum()) for p, d in zip(pulled, a, strict=True)), rel=1e-9
    )


@pytest.mark.parametrize("name", ["quadratic_program", "lasso", "raw_second_order", "entropy"])
def test_lpgd_with_a_small_step_is_the_derivative(name):
    case = CASES[name]
    tensors = [t.requires_grad_() for t in case.sample(2)]
    exact = gradient_of(case.layer(structure="generic"), tensors)
    surrogate = case.layer(structure="generic", gradient="lpgd", gradient_args={"tau": 1e-4})
    for got, expected in zip(gradient_of(surrogate, tensors), exact, strict=True):
        assert relative(got, expected) < 1e-4


@pytest.mark.parametrize("name", ["smoothed", "lpgd", "perturbed", "blackbox"])
def test_at_a_vertex_the_informative_gradients_are_not_zero_and_the_value_stays_exact(name):
    c, x = cp.Parameter(4, name="c"), cp.Variable(4)
    layer = ConvexLayer(
        cp.Problem(cp.Minimize(c @ x), [cp.sum(x) == 1, x >= 0]), [c], [x], gradient=name
    )
    assert layer.structure == "cone_program"
    costs = torch.tensor(
        [[0.3, 0.2, 0.9, 0.5], [0.1, 0.4, 0.3, 0.35]], dtype=torch.float64, requires_grad=True
    )
    wanted = torch.tensor([[1.0, 0, 0, 0], [0, 0, 1.0, 0]], dtype=torch.float64)
    solution = layer.solve(costs)
    assert torch.allclose(solution.variables[0].sum(1), torch.ones(2, dtype=torch.float64))
    (bar,) = torch.autograd.grad(
        (solution.variables[0] - wanted).square().sum(), costs, retain_graph=True
    )
    # Down the gradient the wanted entry gets cheaper beside the one that is chosen now.
    chosen = solution.variables[0].detach().argmax(1)
    for row, target in enumerate(wanted.argmax(1).tolist()):
        assert bar[row, target] - bar[row, chosen[row]] > 1e-6
    (value_bar,) = torch.autograd.grad(solution.objective.sum(), costs)
    assert torch.allclose(value_bar, solution.variables[0].detach(), atol=1e-9)
    (scaled,) = torch.autograd.grad(1e-9 * (layer(costs)[0] - wanted).square().sum(), costs)
    assert relative(1e9 * scaled, bar) < 1e-6


def test_gradients_of_costs_refuse_other_problems_and_multipliers():
    c, b, x = cp.Parameter(3), cp.Parameter(), cp.Variable(3)
    for name in ("perturbed", "blackbox"):
        with pytest.raises(ProblemError, match="quadratic"):
            ConvexLayer(
                cp.Problem(cp.Minimize(c @ x + cp.sum_squares(x)), [x >= 0]),
                [c],
                [x],
                gradient=name,
            )
        with pytest.raises(ProblemError, match="constraints"):
            ConvexLayer(
                cp.Problem(cp.Minimize(c @ x), [cp.sum(x) == b, x >= 0]), [c, b], [x], gradient=name
            )
        rule = cp.sum(x) == 1
        layer = ConvexLayer(
            cp.Problem(cp.Minimize(c @ x), [rule, x >= 0]),
            [c],
            [rule.dual_variables[0]],
            gradient=name,
        )
        costs = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64, requires_grad=True)
        with pytest.raises(RuntimeError, match="multipliers"):
            layer(costs)[0].backward()


def test_first_derivatives_say_that_they_are():
    c, x = cp.Parameter(3), cp.Variable(3)
    problem, costs = (
        cp.Problem(cp.Minimize(c @ x), [cp.sum(x) == 1, x >= 0]),
        torch.tensor([1.0, 2.0, 3.0]).double(),
    )
    for name in ("lpgd", "perturbed", "blackbox"):
        layer = ConvexLayer(problem, [c], [x], gradient=name)
        with pytest.raises(RuntimeError, match="forward mode"):
            torch.func.jvp(lambda t, layer=layer: layer(t)[0], (costs,), (costs,))
    for name in ("smoothed", "lpgd"):
        layer, leaf = ConvexLayer(problem, [c], [x], gradient=name), costs.clone().requires_grad_()
        (bar,) = torch.autograd.grad(layer(leaf)[0][0], leaf, create_graph=True)
        with pytest.raises(RuntimeError, match=r"second derivatives|forward mode"):
            torch.autograd.grad(bar.sum(), leaf)


def test_arguments_of_a_gradient_are_checked():
    c, x = cp.Parameter(3), cp.Variable(3)
    problem = cp.Problem(cp.Minimize(c @ x), [cp.sum(x) == 1, x >= 0])
    with pytest.raises(TypeError, match="it takes: kappa"):
        ConvexLayer(problem, [c], [x], gradient="smoothed", gradient_args={"tau": 1.0})
    for name, argument, value in (
        ("smoothed", "kappa", 0.0), ("lpgd", "tau", -1), ("lpgd", "rho", 0), ("perturbed", "samples", 3), ("blackbox", "lam", np.inf),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=argument):
            ConvexLayer(problem, [c], [x], gradient=name, gradient_args={argument: value})
    with pytest.raises(ValueError, match="kernel"):
        ConvexLayer(
            cp.Problem(cp.Minimize(cp.sum_squares(x - c))),
            [c],
            [x],
            structure="least_squares",
            gradient="lpgd",
        )


def test_perturbed_gradients_are_the_same_bits_each_time_and_follow_their_seed():
    c, x = cp.Parameter(5), cp.Variable(5)
    problem = cp.Problem(cp.Minimize(c @ x), [cp.sum(x) == 1, x >= 0])
    leaf = torch.randn(
        2, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    ).requires_grad_()
    bars = [
        torch.autograd.grad(
            ConvexLayer(problem, [c], [x], gradient="perturbed", gradient_args={"seed": seed})(
                leaf
            )[0][:, 0].sum(),
            leaf,
        )[0]
        for seed in (0, 0, 1)
    ]
    assert torch.equal(bars[0], bars[1])
    assert not torch.equal(bars[0], bars[2])


# Warnings
# ---------------------------------------------------------------------------------------------------------------------


def warned(layer, *tensors, calls=2):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(calls):
            layer(*(t.clone().requires_grad_() for t in tensors))[0].square().sum().backward()
    return [w.message for w in caught if isinstance(w.message, GradientWarning)]


def test_each_cause_is_told_once_with_its_remedy():
    c, b, x = cp.Parameter(2, name="c"), cp.Parameter(name="b"), cp.Variable(2)
    linear = ConvexLayer(cp.Problem(cp.Minimize(c @ x), [cp.sum(x) == b, x >= 0]), [c, b], [x])
    costs, total = torch.tensor([[1.0, 2.0]]).double(), torch.tensor([1.0]).double()
    (zero,) = warned(linear, costs, total)
    assert zero.cause is Cause.ZERO
    assert "`c`" in str(zero)
    assert "`b`" not in str(zero)
    assert "lpgd" in str(zero)
    (tied,) = warned(linear.with_options(), torch.ones(1, 2).double(), total)
    assert tied.cause is Cause.SINGULAR
    assert "regularise=" in str(tied)
    a = cp.Parameter(2)
    bound = ConvexLayer(
        cp.Problem(cp.Minimize(cp.sum_squares(x - a)), [x >= 0, cp.sum(x) <= 3]), [a], [x]
    )
    (weak,) = warned(bound, torch.tensor([[1.0, 0.0]]).double())
    assert weak.cause is Cause.ONE_SIDED
    kernel = ConvexLayer(
        cp.Problem(cp.Minimize(cp.sum_squares(x - a)), [x >= 0, cp.sum(x) == 1]), [a], [x]
    )
    assert kernel.structure == "sparsemax"
    (tie,) = warned(kernel, torch.tensor([[1.0, 0.0]]).double())
    assert tie.cause is Cause.ONE_SIDED


def test_a_filter_silences_one_cause():
    c, x = cp.Parameter(2, name="c"), cp.Variable(2)
    layer = ConvexLayer(cp.Problem(cp.Minimize(c @ x), [cp.sum(x) == 1, x >= 0]), [c], [x])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", ".*structurally zero", GradientWarning)
        leaf = torch.tensor([1.0, 2.0]).double().requires_grad_()
        layer(leaf)[0][0].backward()
    assert torch.equal(leaf.grad, torch.zeros(2).double())


def test_what_has_no_central_path_is_nan_and_told():
    c, x = cp.Parameter(2), cp.Variable(2)
    problem = cp.Problem(cp.Minimize(c @ x), [x[0] >= 1, x[0] <= 1, x >= 0, x <= 2])
    layer = ConvexLayer(problem, [c], [x], gradient="smoothed")
    (told,) = warned(layer, torch.tensor([[1.0, 2.0]]).double())
    assert told.cause is Cause.NO_PATH
    leaf = torch.tensor([1.0, 2.0]).double().requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layer(leaf)[0].sum().backward()
    assert bool(leaf.grad.isnan().any())


# What makes a solution unique
# ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 1e4, 1e-4])
def test_of_a_linear_programs_solutions_the_one_of_least_norm(scale):
    """min x_1 + x_2 + 3 x_3 on a simplex of total b: the edge x_1 + x_2 = b, whose point of least
    norm is its middle."""
    c, b, x = cp.Parameter(3), cp.Parameter(), cp.Variable(3)
    problem = cp.Problem(cp.Minimize(c @ x), [cp.sum(x) == b, x >= 0])
    layer = ConvexLayer(problem, [c, b], [x], regularise="least_norm")
    costs = scale * torch.tensor([1.0, 1.0, 3.0]).double()
    total = torch.tensor([2.0, 5.0]).double().requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GradientWarning)
        (found,) = layer(costs, total)
        (bar,) = torch.autograd.grad(found[:, 0].sum(), total)
    assert torch.allclose(
        found, total.detach()[:, None] * torch.tensor([0.5, 0.5, 0.0]).double(), atol=1e-9
    )
    assert torch.allclose(bar, torch.full((2,), 0.5).double(), atol=1e-9)
    assert bool(layer.solve(costs, total).degenerate.all()), (
        "a solution that is not unique is said to be none"
    )
    assert "least norm" in layer.explain()


def test_of_a_quadratic_programs_solutions_the_one_of_least_norm_to_its_accuracy():
    A, h, x = cp.Parameter((2, 4)), cp.Parameter(2), cp.Variable(4)
    problem = cp.Problem(cp.Minimize(cp.sum_squares(A @ x - h)), [x >= -10])
    layer = ConvexLayer(problem, [A, h], [x], regularise="least_norm")
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(5, 2, 4, generator=generator, dtype=torch.float64)
    right = torch.randn(5, 2, generator=generator, dtype=torch.float64)
    expected = (torch.linalg.pinv(matrix) @ right.unsqueeze(-1)).squeeze(-1)
    assert relative(layer(matrix, right)[0], expected) < 1e-5


def test_kernels_whose_solution_has_the_least_norm_stay():
    A, h, x = cp.Parameter((2, 4)), cp.Parameter(2), cp.Variable(4)
    layer = ConvexLayer(
        cp.Problem(cp.Minimize(cp.sum_squares(A @ x - h))), [A, h], [x], regularise="least_norm"
    )
    assert layer.structure == "least_squares"


def test_a_proximal_term_is_part_of_the_problem_and_explained():
    c, x = cp.Parameter(3), cp.Variable(3)
    problem = cp.Problem(cp.Maximize(c @ x), [cp.sum(x) == 1, x >= 0])
    layer = ConvexLayer(problem, [c], [x], regularise=0.5)
    assert layer.structure == "sparsemax"
    assert "weight 0.5" in layer.explain()
    value = torch.tensor([0.3, 0.1, 0.2]).double()
    solution = layer.solve(value)
    (found,) = solution.variables
    expected = ConvexLayer(
        cp.Problem(cp.Maximize(c @ x - 0.25 * cp.sum_squares(x)), problem.constraints), [c], [x]
    )
    assert torch.equal(found, expected(value)[0])
    assert float(solution.objective) == pytest.approx(float(value @ found - 0.25 * found @ found))


def test_what_cannot_be_regularised_is_refused():
    c, x, z = cp.Parameter(3), cp.Variable(3), cp.Variable(pos=True)
    with pytest.raises(ProblemError, match="linear and quadratic"):
        ConvexLayer(cp.Problem(cp.Minimize(cp.norm(x - c))), [c], [x], regularise="least_norm")
    for value in (0.0, -1.0, True, "norm", float("nan")):
        with pytest.raises(ValueError, match="regularise"):
            ConvexLayer(cp.Problem(cp.Minimize(c @ x), [x >= 0]), [c], [x], regularise=value)
    with pytest.raises(ValueError, match="log-log"):
        ConvexLayer(cp.Problem(cp.Minimize(z + 1 / z)), [], [z], gp=True, regularise=1.0)

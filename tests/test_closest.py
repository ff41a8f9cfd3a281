"""The closest feasible problem: against closed forms, and against the two programs as CVXPY solves
them, written on the user's constraints."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import cvxpy as cp
import numpy as np
import pytest
import torch
from cvxpy.constraints import Equality, Inequality
from torch import Tensor

from convlayer import ConvexLayer
from convlayer.declaration.declaration import Declaration
from convlayer.paths.closest import Closest, Relaxation, applies, closest
from convlayer.solution import SolverError, Status

TOLERANCE = 1e-8


@dataclass(eq=False)
class Relaxed:
    """A problem with its parameters, solved as closest feasible."""

    problem: cp.Problem
    parameters: list[cp.Parameter]
    outputs: list[cp.Variable]

    def __post_init__(self) -> None:
        declared = Declaration.checked(self.problem, self.parameters, self.outputs, False)
        self.canonical = declared.canonical
        assert applies(self.canonical) is None
        self.relaxation = Relaxation.of(declared)

    def entries(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Of tensors (R or 1, *shape)."""
        return [
            reader.read(t) for reader, t in zip(self.canonical.parameters, tensors, strict=True)
        ]

    def found(self, *tensors: Tensor) -> Closest:
        return closest(self.relaxation, self.entries(tensors), TOLERANCE)

    def said(self, x: Tensor, y: Tensor, value: Tensor, shift: Tensor) -> list[Tensor]:
        """Outputs, objective, and every constraint's shifts one after the other, flat."""
        shifts = [
            part
            for one in self.relaxation.by_constraint(shift)
            for part in (one if isinstance(one, tuple) else (one,))
            if part is not None
        ]
        variables = [recovery.value(x, y) for recovery in self.canonical.variables]
        return [
            *variables,
            self.canonical.objective(value),
            torch.cat([part.reshape(len(part), -1) for part in shifts], 1),
        ]

    def __call__(self, *tensors: Tensor) -> list[Tensor]:
        answer = self.found(*tensors)
        assert not answer.status.any(), answer.status
        return self.said(answer.x, answer.y, answer.value, answer.shift)


def solve_tightly(problem: cp.Problem) -> None:
    """To 1e-12, or as near as Clarabel comes to it."""
    for tolerance in (1e-13, 1e-12, 1e-11, 1e-10):
        tight = {name: tolerance for name in ("tol_gap_abs", "tol_gap_rel", "tol_feas")}
        with contextlib.suppress(cp.SolverError):
            problem.solve(solver=cp.CLARABEL, **tight)
        if problem.status == cp.OPTIMAL:
            return
    raise AssertionError(problem.status)


def two_programs(relaxed: Relaxed, values: Sequence[np.ndarray]) -> list[np.ndarray]:
    """What `Relaxed` says of one row, by CVXPY: least shifts of the constraints, then the objective
    within them.

    The second program has no interior. An affine constraint that the first one's multiplier says is
    tight is an equation in it, with the value at the first one's solution, so that dependent
    equations agree to rounding.
    """
    for parameter, value in zip(relaxed.parameters, values, strict=True):
        parameter.value = value
    shifts, held = [], []
    for constraint in relaxed.problem.constraints:
        assert isinstance(constraint, (Equality, Inequality))
        shift = cp.Variable(constraint.shape)
        shifts.append(shift)
        held.append(
            constraint.expr == shift
            if isinstance(constraint, Equality)
            else constraint.expr <= shift
        )
    first = cp.Problem(cp.Minimize(sum(cp.sum_squares(shift) for shift in shifts)), held)
    solve_tightly(first)
    least, second = [shift.value for shift in shifts], []
    for constraint, relaxation, shift in zip(relaxed.problem.constraints, held, least, strict=True):
        expression, at = cp.vec(constraint.expr, order="C"), np.ravel(constraint.expr.value)
        tight = np.abs(np.ravel(relaxation.dual_value)) > 1e-6
        for k in range(expression.size):
            if isinstance(constraint, Equality) or tight[k]:
                assert constraint.expr.is_affine()
                second.append(expression[k] == at[k])
            else:
                second.append(expression[k] <= np.ravel(shift)[k])
    problem = cp.Problem(relaxed.problem.objective, second)
    solve_tightly(problem)
    outputs = [np.asarray(v.value) for v in relaxed.outputs]
    return [
        *outputs,
        np.asarray(problem.value),
        np.concatenate([np.ravel(shift) for shift in least]),
    ]


def relative(found: Tensor, expected: Tensor | np.ndarray) -> float:
    found, expected = found.detach(), torch.as_tensor(expected).detach()
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-3))


def tensor(*values: float | Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def normal(seed: int) -> Callable[..., Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, dtype=torch.float64, generator=generator)


def gradients(
    outputs: Sequence[Tensor], leaves: Sequence[Tensor], seed: int = 0
) -> tuple[list[Tensor], list[Tensor]]:
    """Of one random functional of the outputs, and its weights."""
    draw = normal(seed)
    weights = [draw(*output.shape) for output in outputs]
    total = sum((weight * output).sum() for weight, output in zip(weights, outputs, strict=True))
    return list(torch.autograd.grad(total, leaves)), weights


def leaves(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [t.detach().clone().requires_grad_() for t in tensors]


# Closed forms: (problem, parameters, outputs), values (R, ...), and the answer as a torch function
# of them.


def interval() -> tuple:
    """x <= a, x >= b with a < b: both give way by (b - a)/2."""
    x, a, b = cp.Variable(2), cp.Parameter(2), cp.Parameter(2)

    def answer(a: Tensor, b: Tensor) -> list[Tensor]:
        x, shift = (a + b) / 2, (b - a) / 2
        return [x, x.square().sum(1), torch.cat([shift, shift], 1)]

    lower = tensor([-1.0, -3.0], [0.5, 1.0], [-2.0, 0.0])
    upper = tensor([1.0, 2.0], [0.75, 5.0], [7.0, 1.0])
    return (
        Relaxed(cp.Problem(cp.Minimize(cp.sum_squares(x)), [x <= a, x >= b]), [a, b], [x]),
        (lower, upper),
        answer,
    )


def equations() -> tuple:
    """Contradictory equations: least squares, and of its solutions the best."""
    x, A, b, p = cp.Variable(3), cp.Parameter((5, 3)), cp.Parameter(5), cp.Parameter(3)
    draw = normal(1)

    def answer(A: Tensor, b: Tensor, p: Tensor) -> list[Tensor]:
        x = torch.linalg.lstsq(A, b.unsqueeze(2)).solution.squeeze(2)
        shift = (A @ x.unsqueeze(2)).squeeze(2) - b
        return [x, (x - p).square().sum(1), shift]

    relaxed = Relaxed(cp.Problem(cp.Minimize(cp.sum_squares(x - p)), [A @ x == b]), [A, b, p], [x])
    return relaxed, (draw(3, 5, 3), draw(3, 5), draw(3, 3)), answer


def repeated_equation() -> tuple:
    """a'x == b_i: a'x is the mean of b, one equation is met, and the objective chooses x."""
    x, b, p = cp.Variable(3), cp.Parameter(3), cp.Parameter(3)
    a = np.array([1.0, 2.0, -1.0])
    draw = normal(2)

    def answer(b: Tensor, p: Tensor) -> list[Tensor]:
        normal_vector, mean = torch.tensor(a), b.mean(1, keepdim=True)
        x = p + (mean - (p @ normal_vector).unsqueeze(1)) / 6 * normal_vector
        return [x, -(x - p).square().sum(1), mean - b]

    relaxed = Relaxed(
        cp.Problem(
            cp.Maximize(-cp.sum_squares(x - p)), [a @ x == b[0], a @ x == b[1], a @ x == b[2]]
        ),
        [b, p],
        [x],
    )
    return relaxed, (tensor([1.0, 2.0, 3.0], [0.0, 5.0, -1.0]), draw(2, 3)), answer


def balls() -> tuple:
    """|x - a| <= r, |x - b| <= 1 apart: both radii grow until they touch."""
    x, a, b, r = cp.Variable(3), cp.Parameter(3), cp.Parameter(3), cp.Parameter(nonneg=True)
    draw = normal(3)

    def answer(a: Tensor, b: Tensor, r: Tensor) -> list[Tensor]:
        distance = (b - a).norm(dim=1)
        shift = (distance - r - 1) / 2
        x = a + ((r + shift) / distance).unsqueeze(1) * (b - a)
        return [x, x.sum(1), torch.stack([shift, shift], 1)]

    relaxed = Relaxed(
        cp.Problem(cp.Minimize(cp.sum(x)), [cp.norm(x - a) <= r, cp.norm(x - b) <= 1]),
        [a, b, r],
        [x],
    )
    return relaxed, (draw(3, 3), draw(3, 3) + 4, draw(3).abs()), answer


def ray() -> tuple:
    """x in the cone, c'x == -1 with c on its boundary: x + shift is on the opposite ray, and the
    objective chooses where.

    c moves along the boundary, c = (1, cos, sin): off it the shift has a kink.
    """
    x, c, p = cp.Variable(3), cp.Parameter(3), cp.Parameter(3)

    def answer(angle: Tensor, p: Tensor) -> list[Tensor]:
        c, r = circle(angle), circle(angle) * tensor(1.0, -1.0, -1.0)
        x = ((r * p).sum(1, keepdim=True) / 2).clamp(min=0) * r - c / 3
        return [x, (x - p).square().sum(1), torch.cat([c / 3, torch.full_like(c[:, :1], 1 / 3)], 1)]

    relaxed = Relaxed(
        cp.Problem(cp.Minimize(cp.sum_squares(x - p)), [cp.SOC(x[0], x[1:]), c @ x == -1]),
        [c, p],
        [x],
    )
    inner, relaxed.entries = relaxed.entries, lambda values: inner([circle(values[0]), values[1]])
    angle = tensor(0.3, 1.1, -2.0)
    return relaxed, (angle, circle(angle) * tensor(1.0, -2.0, -1.0) + 0.1 * normal(4)(3, 3)), answer


def circle(angle: Tensor) -> Tensor:
    return torch.stack([torch.ones_like(angle), angle.cos(), angle.sin()], 1)


def apex() -> tuple:
    """The same with c inside: x + shift is zero."""
    x, c = cp.Variable(3), cp.Parameter(3)

    def answer(c: Tensor) -> list[Tensor]:
        shift = 1 / (1 + c.square().sum(1, keepdim=True))
        return [-c * shift, -(c * shift).sum(1), torch.cat([c * shift, shift], 1)]

    relaxed = Relaxed(
        cp.Problem(cp.Minimize(cp.sum(x)), [cp.SOC(x[0], x[1:]), c @ x == -1]), [c], [x]
    )
    return relaxed, (tensor([2.0, 1.0, 0.5], [1.0, -0.2, 0.1]),), answer


def domain() -> tuple:
    """A declared sign stays: x >= 0 with 1'x == b < 0 is x = 0, and only the equation gives way."""
    x, b = cp.Variable(2, nonneg=True), cp.Parameter()

    def answer(b: Tensor) -> list[Tensor]:
        return [torch.zeros(len(b), 2, dtype=b.dtype) * b.unsqueeze(1), 0 * b, -b.unsqueeze(1)]

    relaxed = Relaxed(cp.Problem(cp.Minimize(cp.sum_squares(x)), [cp.sum(x) == b]), [b], [x])
    return relaxed, (tensor(-1.0, -0.01),), answer


def composite() -> tuple:
    """|x|_1 <= 1 and x == p outside: the shifts are those of the constraints as they are written,
    whatever became of them."""
    x, p = cp.Variable(2), cp.Parameter(2)

    def answer(p: Tensor) -> list[Tensor]:
        signs = p.sign()
        excess = (p.abs().sum(1, keepdim=True) - 1) / 3
        x = p - excess * signs
        return [x, x[:, 0], torch.cat([excess, x - p], 1)]

    relaxed = Relaxed(cp.Problem(cp.Minimize(x[0]), [cp.norm1(x) <= 1, x == p]), [p], [x])
    return relaxed, (tensor([2.0, -1.0], [-1.5, -3.0]),), answer


CLOSED_FORMS = [interval, equations, repeated_equation, balls, ray, apex, domain, composite]


@pytest.mark.parametrize("case", CLOSED_FORMS)
def test_closed_forms_in_value_and_derivative(case):
    relaxed, values, answer = case()
    mine, theirs = leaves(values), leaves(values)
    found, expected = relaxed(*mine), answer(*theirs)
    for one, other in zip(found, expected, strict=True):
        assert relative(one, other) < 1e-9
    for one, other in zip(gradients(found, mine)[0], gradients(expected, theirs)[0], strict=True):
        assert relative(one, other) < 1e-7


@pytest.mark.parametrize("case", [interval, equations, balls, composite])
def test_closed_forms_to_second_order(case):
    relaxed, values, answer = case()
    curved = []
    for function in (relaxed, answer):
        inputs, draw = leaves(values), normal(5)
        total = sum((output.square() * draw(*output.shape)).sum() for output in function(*inputs))
        bars = torch.autograd.grad(total, inputs, create_graph=True)
        curved.append(gradients(bars, inputs)[0])
    for one, other in zip(*curved, strict=True):
        assert relative(one, other) < 1e-6


def test_forward_mode_is_the_closed_forms():
    relaxed, values, answer = balls()
    known = relaxed.found(*values).outputs_at
    draw = normal(6)
    directions = tuple(draw(*t.shape) for t in values)
    _, tangents = torch.func.jvp(
        lambda *t: relaxed.said(*known(relaxed.entries(t))), tuple(values), directions
    )
    _, expected = torch.func.jvp(lambda *t: answer(*t), tuple(values), directions)
    for one, other in zip(tangents, expected, strict=True):
        assert relative(one, other) < 1e-8


# Programs without a closed form: (Relaxed, values (R, ...)).


def box_and_equation() -> tuple:
    x, a, p = cp.Variable(4), cp.Parameter(4), cp.Parameter(4)
    draw = normal(7)
    constraints = [a @ x == 10, x <= 1, x >= -1, x[0] + x[1] <= 0.3]
    return Relaxed(cp.Problem(cp.Minimize(cp.sum_squares(x - p)), constraints), [a, p], [x]), (
        draw(3, 4).abs() + 0.5,
        draw(3, 4),
    )


def linear_costs() -> tuple:
    x, G, h, c = cp.Variable(5), cp.Parameter((3, 5)), cp.Parameter(3), cp.Parameter(5)
    draw = normal(8)
    constraints = [G @ x <= h, G[0] @ x >= h[0] + 1, x <= 2, x >= -2]
    return Relaxed(cp.Problem(cp.Minimize(c @ x), constraints), [G, h, c], [x]), (
        draw(3, 3, 5),
        draw(3, 3),
        draw(3, 5),
    )


def quadratic_costs() -> tuple:
    """Two of six directions are held by what gives way; inequalities bind in the others."""
    x, P, G, h, q = (
        cp.Variable(6),
        cp.Parameter((6, 6), PSD=True),
        np.zeros((4, 6)),
        cp.Parameter(4),
        cp.Parameter(6),
    )
    G[0, :2], G[1, :2], G[2, 1:3], G[3, 1:3] = (1, 2), (-1, -2), (1, -1), (-2, 2)
    draw = normal(9)
    root = draw(3, 6, 6)
    constraints = [G @ x <= h, x[3:] >= 0.1, cp.sum(x[3:]) <= 1]
    objective = cp.Minimize(cp.quad_form(x, P) / 2 + q @ x)
    return Relaxed(cp.Problem(objective, constraints), [P, h, q], [x]), (
        root @ root.mT,
        -draw(3, 4).abs() - 0.2,
        draw(3, 6),
    )


PROGRAMS = [box_and_equation, linear_costs, quadratic_costs]


@pytest.mark.parametrize("case", PROGRAMS)
def test_the_two_programs_as_cvxpy_solves_them(case):
    relaxed, values = case()
    found = relaxed(*values)
    for k in range(len(values[0])):
        for one, other in zip(
            found, two_programs(relaxed, [t[k].numpy() for t in values]), strict=True
        ):
            assert relative(one[k], other) < 1e-7


@pytest.mark.parametrize("case", PROGRAMS)
def test_the_derivative_is_that_of_the_two_programs(case):
    """Along a direction of all parameters, for the first row."""
    relaxed, values = case()
    values = [t[:1] for t in values]
    inputs = leaves(values)
    bars, weights = gradients(relaxed(*inputs), inputs)
    draw, h = normal(10), 1e-3
    directions = [draw(*t.shape) for t in values]
    directions = [
        (d + d.mT) / 2 if d.ndim == 3 and d.shape[1] == d.shape[2] else d for d in directions
    ]

    def functional(step: float) -> float:
        at = [(t + step * d)[0].numpy() for t, d in zip(values, directions, strict=True)]
        return sum(
            float((w[0].numpy() * v).sum())
            for w, v in zip(weights, two_programs(relaxed, at), strict=True)
        )

    # Of fourth order, so that the step may be large beside the oracle's error.
    quotient = (8 * (functional(h) - functional(-h)) - (functional(2 * h) - functional(-2 * h))) / (
        12 * h
    )
    slope = sum(float((bar * d).sum()) for bar, d in zip(bars, directions, strict=True))
    assert abs(slope - quotient) < 1e-6 * abs(quotient)


@pytest.mark.parametrize("case", [*PROGRAMS, *CLOSED_FORMS])
def test_a_batch_is_its_rows(case):
    """Rows on different faces together, and parameters that rows share."""
    relaxed, values = case()[:2]
    last = leaves([t if k else t[:1] for k, t in enumerate(values)])
    together = relaxed(*last)
    alone = []
    pieces = leaves([t if k else t[:1] for k, t in enumerate(values)])
    for row in range(len(together[0])):
        alone.append(relaxed(*(t if len(t) == 1 else t[row : row + 1] for t in pieces)))
    alone = [torch.cat(parts) for parts in zip(*alone, strict=True)]
    for one, other in zip(together, alone, strict=True):
        assert relative(one, other) < 1e-9
    for one, other in zip(gradients(together, last)[0], gradients(alone, pieces)[0], strict=True):
        assert relative(one, other) < 1e-7


def test_rows_on_different_faces():
    """x <= a, x >= b, x <= c: which of the bounds is beyond the others differs from row to row."""
    x, a, b, c = cp.Variable(), cp.Parameter(), cp.Parameter(), cp.Parameter()
    relaxed = Relaxed(cp.Problem(cp.Minimize(x), [x <= a, x >= b, x <= c]), [a, b, c], [x])
    values = tensor(0.0, 4.0, 0.0), tensor(2.0, 2.0, 2.0), tensor(5.0, 1.0, 1.0)
    x, value, shift = relaxed(*values)
    # In the last row all three pull: x - 0 and x - 1 balance 2 - x at x = 1, where the third just
    # holds.
    assert relative(x, tensor(1.0, 1.5, 1.0)) < 1e-9
    assert relative(value, x) < 1e-9
    assert relative(shift, tensor([1.0, 1.0, 0.0], [0.0, 0.5, 0.5], [1.0, 1.0, 0.0])) < 1e-9


# What is no answer.


def test_a_feasible_row_is_not_answered():
    relaxed, _, _ = interval()
    a, b = tensor([1.0, 1], [1, 1], [-1, 2]), tensor([0.0, 0], [1, 1], [1, 0])
    assert relaxed.found(a, b).status.tolist() == [
        Status.NOT_CONVERGED,
        Status.NOT_CONVERGED,
        Status.SOLVED,
    ]


def test_what_may_not_give_way_stays_infeasible():
    """The objective wants x <= -1, the variable is x >= 0: no constraint can help."""
    x, b = cp.Variable(nonneg=True), cp.Parameter()
    relaxed = Relaxed(cp.Problem(cp.Maximize(cp.sqrt(-1 - x)), [x <= b]), [b], [x])
    assert relaxed.found(tensor(1.0, -1.0)).status.tolist() == [Status.INFEASIBLE] * 2


def test_an_unbounded_second_program():
    x, c, b = cp.Variable(2), cp.Parameter(), cp.Parameter()
    relaxed = Relaxed(
        cp.Problem(cp.Minimize(c * x[1]), [x[0] <= b, x[0] >= 1, x[1] <= 5]), [c, b], [x]
    )
    c, b = tensor(1.0, -1.0), tensor(0.0, 0.0)
    assert relaxed.found(c, b).status.tolist() == [Status.UNBOUNDED, Status.SOLVED]


def test_a_least_shift_that_is_not_attained():
    """x_0 >= |(x_1, 1)|, x_0 == x_1: any shift will do, none at all will not."""
    x, b = cp.Variable(2), cp.Parameter()
    relaxed = Relaxed(
        cp.Problem(
            cp.Minimize(cp.sum_squares(x)), [cp.SOC(x[0], cp.hstack([x[1], b])), x[0] == x[1]]
        ),
        [b],
        [x],
    )
    assert relaxed.found(tensor(1.0)).status.tolist() == [Status.UNATTAINED]


def test_multipliers_on_faces_are_nan_and_others_are_not():
    x, b, p = cp.Variable(2), cp.Parameter(), cp.Parameter(2)
    constraints = [x[0] <= b, x[0] >= 1, x[1] <= 2]
    relaxed = Relaxed(
        cp.Problem(cp.Minimize(cp.sum_squares(x - p)), constraints),
        [b, p],
        [x, *(c.dual_variables[0] for c in constraints)],
    )
    p = tensor([0.0, 5.0]).requires_grad_()
    answer = relaxed.found(tensor(-1.0), p)
    x, upper, lower, other, _, _ = relaxed.said(answer.x, answer.y, answer.value, answer.shift)
    assert answer.status.tolist() == [Status.SOLVED]
    assert not answer.verdict.degenerate.any()
    assert relative(x, tensor([0.0, 2.0])) < 1e-9
    assert upper.isnan().all()
    assert lower.isnan().all()
    assert relative(other, tensor(6.0)) < 1e-9
    (bar,) = torch.autograd.grad(other.sum(), p)
    assert relative(bar, tensor([0.0, 2.0])) < 1e-9


def test_a_weak_shift_is_flagged():
    """x <= 0, x >= 2, x <= 1: at the third bound the shift of it is zero, and its derivative
    one-sided."""
    x, a = cp.Variable(), cp.Parameter()
    relaxed = Relaxed(cp.Problem(cp.Minimize(cp.square(x)), [x <= 0, x >= 2, x <= a]), [a], [x])
    assert relaxed.found(tensor(1.0, 1.5)).verdict.degenerate.tolist() == [True, False]


def test_shifts_have_the_constraints_shapes():
    x, p, y = cp.Variable((2, 3)), cp.Parameter((2, 3)), cp.Variable(3)
    constraints = [x == p, x.T <= -1, cp.SOC(y, cp.vstack([y / 2, y / 2]), axis=0), cp.sum(y) <= 5]
    relaxed = Relaxed(
        cp.Problem(cp.Minimize(cp.sum_squares(x) + cp.sum_squares(y)), constraints), [p], [x]
    )
    p = normal(11)(2, 2, 3).abs()
    answer = relaxed.found(p)
    equal, upper, cone, free = relaxed.relaxation.by_constraint(answer.shift)
    found, *_ = relaxed.said(answer.x, answer.y, answer.value, answer.shift)
    assert relative(found - p, equal) < 1e-9
    assert relative(found.mT + 1, upper) < 1e-9
    assert [tuple(part.shape) for part in cone] == [(2, 3), (2, 2, 3)]
    assert max(part.abs().max() for part in (*cone, free)) < 1e-12


def test_a_problem_without_parameters():
    x = cp.Variable(2)
    relaxed = Relaxed(
        cp.Problem(cp.Minimize(cp.sum_squares(x - 3)), [x >= 1, cp.sum(x) <= 0]), [], [x]
    )
    x, value, shift = relaxed()
    third = 2 / 3
    assert relative(x, tensor([1 - third, 1 - third])) < 1e-9
    assert relative(value, tensor(2 * (2 + third) ** 2)) < 1e-9
    assert relative(shift, tensor([third, third, third])) < 1e-9


def test_a_bound_that_is_none_does_not_hide_a_shift():
    x, a = cp.Variable(), cp.Parameter(2)
    relaxed = Relaxed(
        cp.Problem(cp.Minimize(cp.square(x)), [x <= a[0], x >= 1, x <= a[1]]), [a], [x]
    )
    x, _, shift = relaxed(tensor([-1.0, 1e18]))
    assert float(x.abs()) < 1e-9
    assert relative(shift, tensor([1.0, 1.0, 0.0])) < 1e-9


def test_other_cones_are_refused_by_name():
    x, X = cp.Variable(pos=True), cp.Variable((2, 2), PSD=True)

    def reason(problem: cp.Problem, gp: bool = False) -> str | None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return applies(Declaration.checked(problem, [], problem.variables(), gp).canonical)

    assert reason(cp.Problem(cp.Minimize(cp.exp(x)))) == "its cone program has exponential cones"
    assert (
        reason(cp.Problem(cp.Minimize(cp.trace(X)), [X[0, 0] >= 1]))
        == "its cone program has psd cones"
    )
    assert reason(cp.Problem(cp.Minimize(x), [x >= 2]), gp=True) == "the problem is log-log convex"
    assert reason(cp.Problem(cp.Minimize(cp.norm(X - 1)))) is not None
    assert reason(cp.Problem(cp.Minimize(cp.norm(x - 1)))) is None


@pytest.mark.parametrize("on_failure", ["closest", "closest_few"])
def test_without_constraints_nothing_gives_way(on_failure):
    """Signs of variables stay, and what the objective is defined for."""
    x, p = cp.Variable(2, nonneg=True), cp.Parameter(2)
    objective = cp.sum_squares(x - p) - cp.sum(cp.sqrt(-1 - x))
    layer = ConvexLayer(cp.Problem(cp.Minimize(objective)), [p], [x], on_failure=on_failure)
    with pytest.raises(SolverError, match="INFEASIBLE"):
        layer(torch.zeros(2))

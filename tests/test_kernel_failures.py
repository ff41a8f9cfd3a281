"""What kernels owe where something is wrong: a failed row is NaN to whoever uses it, in every
parameter; a solution that rounding moves is told; what is not unique is flagged where someone sees
it; no choice of parameters to differentiate, and no empty part, crashes."""

from decimal import Decimal, localcontext
from fractions import Fraction
from itertools import combinations

import cvxpy as cp
import numpy as np
import pytest
import torch
from cases import close, leaves
from structures import SPELLINGS

from convlayer import ConvexLayer, ProblemError, Status
from convlayer.kernels.entropic_optimal_transport import entropic_optimal_transport
from convlayer.kernels.equality_constrained_qp import equality_constrained_qp
from convlayer.kernels.leading_eigenspace import leading_eigenspace
from convlayer.kernels.least_squares import least_squares
from convlayer.structures import STRUCTURES

D = torch.float64
KERNELS = [name for name in STRUCTURES if name != "quadratic_program"]
BAD, GOOD = 1, [0, 2]
every_kernel = pytest.mark.parametrize("name", KERNELS)


def sample(name, batch=(), seed=0):
    return list(STRUCTURES[name].sample(batch, torch.Generator().manual_seed(seed)))


def loss_of(outputs):
    """Curved, and different in every entry."""
    return sum(
        (
            output.square()
            * torch.arange(1.0, output[0].numel() + 1, dtype=D).view(output.shape[1:])
        ).sum()
        for output in outputs
    )


# Rows that failed
# -------------------------------------------------------------------------------------------------------


def failing(name, layer):
    """Parameters of three rows of which one fails: by NaN in each parameter, and by each
    parameter's negative where that is a failure."""
    tensors = sample(name, (3,))
    for k in range(len(tensors)):
        for spoil in (lambda row: torch.full_like(row, torch.nan), torch.neg):
            spoilt = [t.clone() for t in tensors]
            spoilt[k][BAD] = spoil(spoilt[k][BAD])
            if layer.solve(*spoilt).status.tolist()[BAD] >= Status.INFEASIBLE:
                yield spoilt, k


@pytest.mark.parametrize("policy", ["keep", "nan"])
@every_kernel
def test_a_loss_that_uses_a_failed_row_has_nan_for_its_gradient_in_every_parameter(name, policy):
    """To second order and forwards too; one that leaves it out has zero there, and elsewhere what
    it has without the row."""
    layer = ConvexLayer(*STRUCTURES[name].declare(), on_failure=policy, validate=False)
    ways = 0
    for tensors, k in failing(name, layer):
        for shared in {None, *range(len(tensors))} - {k}:
            ways += 1
            given = [t[0] if j == shared else t for j, t in enumerate(tensors)]
            inputs, clean = (
                leaves(given),
                leaves([t if j == shared else t[GOOD] for j, t in enumerate(given)]),
            )
            outputs, reference = layer(*inputs), layer(*clean)
            used = torch.autograd.grad(
                sum(o[BAD].sum() + o.sum() for o in outputs), inputs, retain_graph=True
            )
            assert all(
                (bar if j == shared else bar[BAD]).isnan().all() for j, bar in enumerate(used)
            )
            for order in (1, 2):
                bars, expected = (
                    _pulled(out, at, rows, order)
                    for out, at, rows in ((outputs, inputs, GOOD), (reference, clean, [0, 1]))
                )
                for j, (bar, theirs) in enumerate(zip(bars, expected, strict=True)):
                    assert close(bar if j == shared else bar[GOOD], theirs, 1e-9)
                    assert j == shared or (bar[BAD] == 0).all()
            if policy == "nan" and shared in (None, 0):
                _, tangents = torch.func.jvp(
                    layer, tuple(given), tuple(torch.ones_like(t) for t in given)
                )
                assert all(t[BAD].isnan().all() and t[GOOD].isfinite().all() for t in tangents)
    assert ways >= 1


def _pulled(outputs, inputs, rows, order):
    bars = torch.autograd.grad(loss_of([o[rows] for o in outputs]), inputs, create_graph=True)
    if order == 1:
        return [bar.detach() for bar in bars]
    return torch.autograd.grad(sum(bar.square().sum() for bar in bars), inputs, retain_graph=True)


@every_kernel
def test_where_all_rows_failed_a_loss_without_them_has_gradient_zero(name):
    layer = ConvexLayer(*STRUCTURES[name].declare(), on_failure="keep")
    inputs = leaves([torch.full_like(t, torch.nan) for t in sample(name, (2,))])
    outputs = layer(*inputs)
    none = torch.autograd.grad(
        [o for o in outputs], inputs, [torch.zeros_like(o) for o in outputs], create_graph=True
    )
    assert all((bar == 0).all() for bar in none)
    used = torch.autograd.grad([o for o in outputs], inputs, [torch.ones_like(o) for o in outputs])
    assert all(bar.isnan().all() for bar in used)


# Some parameters, and empty parts
# ---------------------------------------------------------------------------------------


SCALED = [
    s
    for s in SPELLINGS
    if s.structure in ("leading_eigenspace", "sparsemax") and len(s.declare()[1]) > 1
]


def second(layer, tensors, wanted):
    inputs = [t.clone().requires_grad_(k in wanted) for k, t in enumerate(tensors)]
    own = [inputs[k] for k in wanted]
    bars = torch.autograd.grad(loss_of(layer(*inputs)), own, create_graph=True)
    return lambda those: torch.autograd.grad(
        sum(bars[wanted.index(k)].square().sum() for k in those),
        [inputs[k] for k in those],
        retain_graph=True,
    )


@pytest.mark.parametrize(
    "declared",
    [
        *((n, STRUCTURES[n].declare, None) for n in KERNELS),
        *((str(s), s.declare, s) for s in SCALED),
    ],
    ids=lambda d: d[0],
)
def test_any_one_or_two_parameters_alone_have_their_second_derivatives(declared):
    name, declare, spelling = declared
    layer = ConvexLayer(*declare())
    tensors = sample(name, (2,)) if spelling is None else spelling.sample((2,), 0)
    everything = tuple(range(len(tensors)))
    whole = second(layer, tensors, everything)
    for size in (1, 2):
        for wanted in combinations(everything, size):
            for ours, theirs in zip(
                second(layer, tensors, wanted)(wanted), whole(wanted), strict=True
            ):
                assert close(ours, theirs, 1e-9)


def small_problems():
    x, y, z = cp.Variable(2), cp.Variable(1), cp.Variable(3)
    P, q, p, A, b = (
        cp.Parameter((2, 2), PSD=True),
        cp.Parameter(2),
        cp.Parameter(1),
        cp.Parameter((1, 3)),
        cp.Parameter(1),
    )
    s, t = cp.Parameter(), cp.Parameter(nonneg=True)
    return {
        "no equalities": (cp.Problem(cp.Minimize(cp.quad_form(x, P) + q @ x)), [P, q], [x]),
        "one variable": (
            cp.Problem(cp.Minimize(cp.square(y[0]) * t + p @ y), [y == b]),
            [p, b, t],
            [y],
        ),
        "one unknown": (
            cp.Problem(cp.Minimize(cp.sum_squares(y - p) + t * cp.sum_squares(y))),
            [p, t],
            [y],
        ),
        "one row": (
            cp.Problem(cp.Minimize(cp.sum_squares(A @ z - b) + t * cp.sum_squares(z))),
            [A, b, t],
            [z],
        ),
        "a simplex of one": (
            cp.Problem(cp.Minimize(cp.sum_squares(y - p)), [cp.sum(y) == t, y >= 0]),
            [p, t],
            [y],
        ),
        "an entropy of one": (
            cp.Problem(cp.Maximize(p @ y + t * cp.sum(cp.entr(y))), [cp.sum(y) == 1]),
            [p, t],
            [y],
        ),
        "a line of two": (
            cp.Problem(cp.Minimize(cp.sum_squares(x - q) / 2 + t * cp.tv(x))),
            [q, t],
            [x],
        ),
        "a shift of one": (cp.Problem(cp.Minimize(cp.square(y[0] - s)), [y >= s - 1]), [s], [y]),
    }


@pytest.mark.parametrize("which", small_problems())
def test_per_sample_gradients_equal_a_loop_whatever_is_shared(which):
    problem, parameters, variables = small_problems()[which]
    layer = ConvexLayer(problem, parameters, variables)
    generator = torch.Generator().manual_seed(2)

    def draw(parameter, *batch):
        value = torch.rand((*batch, *parameter.shape), generator=generator, dtype=D) + 0.5
        return (
            torch.eye(2, dtype=D) + value @ value.mT
            if parameter.is_psd() and parameter.ndim == 2
            else value
        )

    def loss(*at):
        return loss_of([o.unsqueeze(0) for o in layer(*at)])

    every = tuple(range(len(parameters)))
    for batched in (c for size in every for c in combinations(every, size + 1)):
        values = [draw(p, *([3] if k in batched else [])) for k, p in enumerate(parameters)]
        dims = tuple(0 if k in batched else None for k in every)
        for transform in (torch.func.grad, torch.func.hessian):
            found = torch.func.vmap(transform(loss, argnums=every), in_dims=dims)(*values)
            for row in range(3):
                alone = transform(loss, argnums=every)(
                    *(v[row] if k in batched else v for k, v in enumerate(values))
                )
                for a, b in zip(_flat(found), _flat(alone), strict=True):
                    assert (a[row] - b).abs().max() <= 1e-9 * (1 + b.abs().max())


def _flat(nested):
    return [t for part in nested for t in (_flat(part) if isinstance(part, tuple) else [part])]


@pytest.mark.parametrize("which", small_problems())
def test_an_empty_batch_has_empty_derivatives(which):
    problem, parameters, variables = small_problems()[which]
    inputs = [torch.ones(0, *p.shape, dtype=D).requires_grad_() for p in parameters]
    outputs = ConvexLayer(problem, parameters, variables)(*inputs)
    bars = torch.autograd.grad(sum(o.square().sum() for o in outputs), inputs, create_graph=True)
    again = torch.autograd.grad(sum(b.square().sum() for b in bars), inputs)
    assert [b.shape for b in again] == [t.shape for t in inputs]


# Solutions that rounding moves
# ------------------------------------------------------------------------------------------


def exactly(K, right):
    """The solution of K z = right in rational arithmetic."""
    rows = [
        [Fraction(float(v)) for v in row] + [Fraction(float(r))]
        for row, r in zip(K, right, strict=True)
    ]
    return _eliminated(rows)


def _eliminated(rows):
    for i in range(len(rows)):
        pivot = max(range(i, len(rows)), key=lambda j: abs(rows[j][i]))
        rows[i], rows[pivot] = rows[pivot], rows[i]
        rows[i] = [v / rows[i][i] for v in rows[i]]
        for j in range(len(rows)):
            if j != i and rows[j][i]:
                rows[j] = [a - rows[j][i] * b for a, b in zip(rows[j], rows[i], strict=True)]
    return np.array([float(row[-1]) for row in rows])


def fit_exactly(A, b):
    """Least squares by the normal equations, or of least norm if A is wide, in rational
    arithmetic."""
    A, b = [[Fraction(float(v)) for v in row] for row in A], [Fraction(float(v)) for v in b]
    wide = len(A) < len(A[0])
    columns = A if wide else list(zip(*A, strict=True))
    gram = [
        [sum(x * y for x, y in zip(one, other, strict=True)) for other in columns]
        for one in columns
    ]
    right = b if wide else [sum(x * y for x, y in zip(one, b, strict=True)) for one in columns]
    z = _eliminated([[*row, r] for row, r in zip(gram, right, strict=True)])
    if not wide:
        return z
    exact = _rational([[*row, r] for row, r in zip(gram, right, strict=True)])
    return np.array(
        [
            float(sum(a * y for a, y in zip(column, exact, strict=True)))
            for column in zip(*A, strict=True)
        ]
    )


def _rational(rows):
    rows = [list(row) for row in rows]
    _eliminated(rows)
    return [row[-1] for row in rows]


def nearly_dependent(m, n, gap, generator):
    A = generator.standard_normal((m, n))
    A[1] = 2 * A[0] + gap * A[1]
    return A


@pytest.mark.parametrize("rows", ["nearly dependent equalities", "a nearly flat cost"])
def test_an_equality_constrained_solution_is_right_or_told(rows):
    told = []
    for gap in (1e-3, 1e-5, 1e-7, 1e-9, 1e-10, 1e-11):
        for seed in range(4):
            generator = np.random.default_rng(seed)
            L, q, b = (
                generator.standard_normal((4, 4)),
                generator.standard_normal(4),
                generator.standard_normal(2),
            )
            if rows == "a nearly flat cost":
                Q, _ = np.linalg.qr(L)
                P, A = Q @ np.diag([1, 1, gap, gap]) @ Q.T, generator.standard_normal((2, 4))[:1]
                P, b = (P + P.T) / 2, b[:1]
            else:
                P, A = L @ L.T + np.eye(4), nearly_dependent(2, 4, gap, generator)
            truth = exactly(
                np.block([[P, A.T], [A, np.zeros((len(b), len(b)))]]), np.concatenate([-q, b])
            )[:4]
            answer = equality_constrained_qp(*(torch.tensor(t)[None] for t in (P, q, A, b)))
            error = np.abs(answer.outputs[0][0].numpy() - truth).max() / np.abs(truth).max()
            told.append((gap, bool(answer.status) or bool(answer.degenerate)))
            assert told[-1][1] or error < 1e-7
    assert not any(t for gap, t in told if gap >= 1e-5)
    assert all(t for gap, t in told if gap <= 1e-10)


@pytest.mark.parametrize("shape", [(6, 3), (3, 5)])
def test_a_least_squares_solution_is_right_or_told(shape):
    told = []
    for gap in (1e-3, 1e-5, 1e-7, 1e-9, 1e-10, 1e-11):
        for seed in range(4):
            generator = np.random.default_rng(seed)
            A = nearly_dependent(*(shape if shape[0] < shape[1] else shape[::-1]), gap, generator)
            A, b = A if shape[0] < shape[1] else A.T, generator.standard_normal(shape[0])
            answer = least_squares(
                torch.tensor(A.copy())[None],
                torch.tensor(b)[None, :, None],
                visible=_all_but_none(shape[1]),
            )
            truth = fit_exactly(A, b)
            error = np.abs(answer.outputs[0][0, :, 0].numpy() - truth).max() / np.abs(truth).max()
            told.append(
                (gap, bool(answer.status) or (shape[0] > shape[1] and bool(answer.degenerate)))
            )
            assert told[-1][1] or error < 1e-6
    assert not any(t for gap, t in told if gap >= 1e-5)
    assert all(t for gap, t in told if gap <= 1e-10)


def _all_but_none(n):
    return torch.ones(n, 1, dtype=D)


def test_an_eigenspace_is_right_or_told():
    for gap in (1e-3, 1e-5, 1e-7, 1e-9, 1e-11, 1e-13):
        for seed in range(4):
            U, _ = np.linalg.qr(np.random.default_rng(seed).standard_normal((4, 4)))
            X = U @ np.diag([1, 1 - gap, 0.3, -0.5]) @ U.T
            answer = leading_eigenspace(torch.tensor((X + X.T) / 2)[None], 1)
            error = np.abs(answer.outputs[0][0].numpy() - np.outer(U[:, 0], U[:, 0])).max()
            flagged = answer.degenerate is not None
            assert flagged or error < 1e-7
            assert flagged == (gap < 1e-8)


def test_a_transport_plan_is_right_or_told():
    """Between two points and two the cross-ratio of the plan is known, to any number of digits."""
    r, c = [0.3, 0.7], [0.6, 0.4]
    for eps in (1e-2, 1e-6, 1e-10, 1e-12):
        for seed in range(4):
            generator = np.random.default_rng(seed)
            M = (
                generator.standard_normal((2, 1))
                + generator.standard_normal((1, 2))
                + eps * generator.standard_normal((2, 2))
            )
            with localcontext() as context:
                context.prec = 60
                (a, b), (d, e) = ([Decimal(float(v)) for v in row] for row in M)
                ratio = ((b + d - a - e) / Decimal(eps)).exp()
                first, left, right = Decimal(r[0]), Decimal(c[0]), Decimal(c[1])
                second_order, slope = 1 - ratio, right - first + ratio * (first + left)
                root = (slope**2 + 4 * second_order * ratio * first * left).sqrt()
                corner = float(2 * ratio * first * left / (slope + root))
            answer = entropic_optimal_transport(
                *(torch.tensor(t, dtype=D)[None] for t in (M, r, c, eps))
            )
            error = abs(float(answer.outputs[0][0, 0, 0]) / corner - 1)
            assert bool(answer.degenerate) or (int(answer.status) == 0 and error < 1e-7)
            assert eps < 1e-6 or not bool(answer.degenerate)


# What is not unique, and who sees it
# ------------------------------------------------------------------------------------


def ambiguous():
    u, v, w, p, a = cp.Variable(), cp.Variable(), cp.Variable(), cp.Parameter(), cp.Parameter()
    z = cp.Variable(3)
    own = cp.square(w - p)
    return {
        "an equality": (own, [u == v + p], [p], {"u": u, "w": w}),
        "a square": (own + cp.square(u - v), [], [p], {"u": u, "w": w}),
        "a square that a parameter moves": (
            own + cp.square(a * u - v),
            [],
            [p, a],
            {"u": u, "w": w},
        ),
        "a cost that a parameter moves": (
            own + cp.square(u - v) + a * (u - v),
            [w == 2 * p],
            [p, a],
            {"u": u, "w": w},
        ),
        "too few rows": (cp.square(z[0] + z[1] - p) + cp.square(w - p), [], [p], {"z": z, "w": w}),
        "one row, and nothing seen": (cp.square(w + u - p), [], [p], {"w": w}),
        "a quadratic form of a difference": (
            own + cp.quad_form(cp.hstack([u - v, w]), np.eye(2)),
            [w + u == v + p],
            [p],
            {"u": u, "w": w},
        ),
    }


@pytest.mark.parametrize("which", ambiguous())
def test_a_kernel_flags_what_is_not_unique_where_the_cone_program_does(which):
    cost, rules, parameters, variables = ambiguous()[which]
    for variable in variables.values():
        ask = cp.Problem(cp.Minimize(cost), rules), parameters, [variable]
        kernel, cone = ConvexLayer(*ask), ConvexLayer(*ask, structure="generic")
        assert kernel.structure in ("least_squares", "equality_constrained_qp")
        values = [
            torch.full((), 0.7 + k, dtype=D, requires_grad=True) for k in range(len(parameters))
        ]
        ours, theirs = kernel.solve(*values), cone.solve(*values)
        # A kernel errs on the side of flagging: it asks which variables a parameter's cost reaches,
        # not what of them is felt.
        errs = which == "a cost that a parameter moves"
        assert bool(ours.degenerate) == (bool(theirs.degenerate) or errs)
        if not bool(ours.degenerate):
            for mine, other in zip(
                *(torch.autograd.grad(s.variables[0].sum(), values) for s in (ours, theirs)),
                strict=True,
            ):
                assert abs(float(mine - other)) < 1e-8


# What CVXPY cannot canonicalise
# -----------------------------------------------------------------------------------------


def test_an_exception_of_canonicalisation_names_the_atom():
    x, p = cp.Variable(2), cp.Parameter(3)
    x.value, p.value = np.ones(2), np.ones(3)
    problem = cp.Problem(cp.Minimize(cp.cvar(cp.hstack([x, p]), 0.7) + cp.sum_squares(x)))
    with pytest.raises(ProblemError, match="cannot canonicalise `sum_largest") as caught:
        ConvexLayer(problem, [p], [x])
    assert isinstance(caught.value.__cause__, TypeError)

"""Every structure of the registry: its declaration is matched, its near misses fall through, and it
is the generic path's equal."""

import copy
import pickle
import re
import warnings

import cvxpy as cp
import numpy as np
import pytest
import torch
from cases import FIVE_POINT, leaves, relative, weights
from hypothesis import given, settings
from hypothesis import strategies as st
from structures import SPELLINGS

from convlayer import (
    ConvexLayer,
    GradientWarning,
    ParameterError,
    ProblemError,
    SolverError,
    Status,
    problems,
)
from convlayer.structures import ROOT, STRUCTURES, in_order

KERNELS = {name: s for name, s in STRUCTURES.items() if name != "quadratic_program"}
NEAR_MISSES = {
    f"{name}: {miss}": (name, d)
    for name, s in STRUCTURES.items()
    for miss, d in s.near_misses().items()
}

every_structure = pytest.mark.parametrize("name", STRUCTURES)
every_kernel = pytest.mark.parametrize("name", KERNELS)
every_spelling = pytest.mark.parametrize("spelling", SPELLINGS, ids=str)


def layer_of(name, **options):
    return ConvexLayer(*STRUCTURES[name].declare(), **options)


def sample(name, batch=(), seed=0):
    return STRUCTURES[name].sample(batch, torch.Generator().manual_seed(seed))


@every_structure
def test_the_declaration_is_matched_and_nothing_is_canonicalised_for_a_kernel(name):
    layer = layer_of(name)
    assert layer.structure == name
    layer(*sample(name, (2,)))
    assert (layer._declared._canonical is None) == (name in KERNELS)


@pytest.mark.parametrize("miss", NEAR_MISSES)
def test_a_near_miss_falls_through_with_a_reason(miss):
    name, declaration = NEAR_MISSES[miss]
    layer = ConvexLayer(*declaration)
    assert layer.structure != name
    with pytest.raises(ProblemError, match=f"structure='{name}' does not apply: .+"):
        ConvexLayer(*declaration, structure=name)


def test_a_structure_that_refines_what_is_none_is_refused_in_words():
    misspelt = copy.copy(STRUCTURES["softmax"])
    misspelt.refines = "quadratic_programme"
    with pytest.raises(
        ValueError,
        match=r"`softmax` refines 'quadratic_programme', which is none; expected one of .*'quadratic_program'",
    ):
        in_order({**STRUCTURES, "softmax": misspelt})
    order = list(STRUCTURES)
    assert all(
        order.index(one.refines) > order.index(name)
        for name, one in STRUCTURES.items()
        if one.refines != ROOT
    )


@every_structure
def test_there_are_at_least_eight_spellings(name):
    assert sum(spelling.structure == name for spelling in SPELLINGS) >= 8


@every_spelling
def test_a_spelling_is_matched_and_agrees_with_the_cone_program(spelling):
    layer = spelling.layer()
    assert layer.structure == spelling.structure, layer.explain()
    found = layer.verify(*spelling.sample((4,), 3))
    assert found.agrees, found
    exact = ~found.degenerate
    assert bool((found.solution[exact] < 1e-9).all()), found
    assert bool((found.gradient[exact] < 1e-7).all()), found


@pytest.mark.parametrize("spelling", [s for s in SPELLINGS if s.structure in KERNELS], ids=str)
def test_a_layer_first_called_for_inference_can_be_trained_after_it(spelling):
    layer, tensors = spelling.layer(), spelling.sample((2,), 3)
    with torch.inference_mode():
        seen = [output.clone() for output in layer(*tensors)]
    inputs = leaves(tensors)
    outputs = layer(*inputs)
    assert all(torch.equal(a, b.detach()) for a, b in zip(seen, outputs, strict=True))
    assert all(g.isfinite().all() for g in torch.autograd.grad(outputs, inputs, weights(outputs)))


@pytest.mark.parametrize(
    "spelling", [s for s in SPELLINGS if s.structure == "quadratic_program"], ids=str
)
def test_the_batched_interior_point_agrees_with_the_other_solver(spelling):
    layer, tensors = spelling.layer(solver="interior_point"), spelling.sample((5,), 4)
    inputs, others = leaves(tensors), leaves(tensors)
    (mine, *_), (theirs, *_) = layer(*inputs), spelling.layer(solver="clarabel")(*others)
    assert relative(mine, theirs) < 1e-10
    (cotangent,) = weights([mine])
    for g, h in zip(
        torch.autograd.grad(mine, inputs, cotangent),
        torch.autograd.grad(theirs, others, cotangent),
        strict=True,
    ):
        assert float((g - h).norm()) <= 1e-8 * max(1.0, float(h.norm()))


def test_the_solver_of_a_quadratic_program_is_chosen_by_cost_and_named():
    layer = problems.quadratic_program.layer(60, 60, 10)
    assert layer.structure == "quadratic_program"
    for batch in (1, 64):
        (line,) = (
            line for line in layer.explain(batch=batch).splitlines() if line.startswith("Solver:")
        )
        assert "the cheapest at this size and batch" in line
        assert "clarabel for rows that it does not settle" in line
    tensors = problems.quadratic_program.sample(6, 0, 60, 60, 10)
    alone = problems.quadratic_program.layer(60, 60, 10, structure="generic").solve(*tensors)
    together = layer.solve(*(t.repeat(8, *[1] * (t.ndim - 1)) for t in tensors))
    assert relative(together.variables[0][:6], alone.variables[0]) < 1e-10


@every_structure
@settings(max_examples=12, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10_000), batch=st.sampled_from([(), (1,), (3,), (2, 2)]))
def test_it_agrees_with_the_cone_program_on_random_instances(name, seed, batch):
    found = layer_of(name).verify(*sample(name, batch, seed), seed=seed)
    assert found.agrees, found
    assert bool((found.solution < 1e-8).all()), found
    assert bool((found.value < 1e-9).all()), found
    # Least-norm conventions agree too where marginals are redundant.
    assert bool((found.gradient < 1e-6).all()), found


def functional(layer, cotangents):
    def value(tensors):
        solution = layer.solve(*tensors)
        outputs = [*solution.variables, solution.objective]
        return sum((w * o).sum() for w, o in zip(cotangents, outputs, strict=True))

    return value


@every_structure
def test_the_gradient_of_variables_and_value_is_that_of_five_point_differences(name):
    layer, step = layer_of(name), 2e-4
    tensors, others = sample(name, (), 5), sample(name, (), 6)
    solution = layer.solve(*tensors)
    cotangents = weights([*solution.variables, solution.objective])
    value = functional(layer, cotangents)
    inputs = leaves(tensors)
    gradients = torch.autograd.grad(value(inputs), inputs)
    whole = torch.stack([g.norm() for g in gradients]).norm()
    for k, gradient in enumerate(gradients):
        # Along the line to another sample, which keeps the domain; marginals and equalities stay
        # consistent together.
        move = [
            b - a if name in ("entropic_optimal_transport",) or j == k else torch.zeros_like(a)
            for j, (a, b) in enumerate(zip(tensors, others, strict=True))
        ]
        with torch.no_grad():
            moved = (
                sum(
                    c * value([t + i * step * d for t, d in zip(tensors, move, strict=True)])
                    for i, c in FIVE_POINT.items()
                )
                / step
            )
        expected = sum((g * d).sum() for g, d in zip(gradients, move, strict=True))
        assert abs(float(moved - expected)) < 1e-8 * float(whole) * max(
            1.0, max(float(d.norm()) for d in move)
        ), k
        assert float(gradient.norm()) > 1e-4, "a gradient that vanishes would test nothing"


@every_structure
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_a_cuda_device_agrees_with_the_host(name, dtype):
    layer, tensors = layer_of(name), rounded(name, dtype, (5,), 17)
    found = []
    for device in ("cpu", "cuda"):
        inputs = leaves([t.to(device) for t in tensors])
        (x,) = layer(*inputs)
        assert (x.device.type, x.dtype) == (device, dtype)
        (cotangent,) = weights([x.cpu()])
        found.append([x.detach(), *torch.autograd.grad(x, inputs, cotangent.to(device, dtype))])
    tolerance = 1e-9 if dtype is torch.float64 else 1e-3
    assert all(
        relative(there.cpu().double(), here.double()) < tolerance
        for here, there in zip(*found, strict=True)
    )


@every_structure
def test_a_batch_equals_a_loop(name):
    layer, tensors = layer_of(name), sample(name, (2, 3), 8)
    inputs = leaves(tensors)
    (whole,) = layer(*inputs)
    (cotangent,) = weights([whole])
    gradients = torch.autograd.grad(whole, inputs, cotangent)
    for i in range(2):
        for j in range(3):
            row = leaves([t[i, j] for t in tensors])
            (alone,) = layer(*row)
            assert relative(whole[i, j].detach(), alone.detach()) < 1e-11
            for g, h in zip(
                gradients, torch.autograd.grad(alone, row, cotangent[i, j]), strict=True
            ):
                assert float((g[i, j] - h).norm()) <= 1e-9 * max(1.0, float(h.norm()))


@every_structure
def test_the_gradient_of_a_shared_parameter_is_the_sum_over_rows(name):
    layer, tensors = layer_of(name), sample(name, (), 9)
    for shared in range(len(tensors)):
        inputs = leaves(
            [t if k == shared else t.expand(3, *t.shape) for k, t in enumerate(tensors)]
        )
        (x,) = layer(*inputs)
        if len(tensors) == 1:
            x = x.expand(3, *x.shape)
        cotangent = torch.randn(
            x.shape, generator=torch.Generator().manual_seed(10), dtype=torch.float64
        )
        (got,) = torch.autograd.grad(x, inputs[shared], cotangent)
        total = torch.zeros_like(got)
        for k in range(3):
            row = leaves(tensors)
            total += torch.autograd.grad(layer(*row)[0], row[shared], cotangent[k])[0]
        assert float((got - total).norm()) <= 1e-9 * max(1.0, float(total.norm()))


@every_kernel
def test_all_parameters_may_be_shared_by_a_batch_that_one_of_them_spans(name):
    layer, tensors = layer_of(name), sample(name, (), 11)
    (alone,) = layer(*tensors)
    for k in range(len(tensors)):
        (x,) = layer(*[t.expand(2, 1, *t.shape) if j == k else t for j, t in enumerate(tensors)])
        assert x.shape == (2, 1, *alone.shape)
        assert all(relative(row, alone) < 1e-12 for row in x.flatten(0, 1))


def rounded(name, dtype, batch, seed):
    """A sample that `dtype` holds; marginals have the same sum after rounding too."""
    tensors = [t.to(dtype) for t in sample(name, batch, seed)]
    if name == "entropic_optimal_transport":
        tensors[1:3] = (
            torch.tensor(m).expand(*batch, -1).to(dtype) for m in ([0.25] * 4, [0.5, 0.25, 0.25])
        )
    return tensors


@every_structure
def test_float32_agrees_with_float64_to_its_precision(name):
    layer, tensors = layer_of(name), rounded(name, torch.float32, (4,), 12)
    outputs, gradients = [], []
    for dtype in (torch.float64, torch.float32):
        inputs = leaves([t.to(dtype) for t in tensors])
        (x,) = layer(*inputs)
        assert x.dtype is dtype
        (cotangent,) = weights([x])
        bars = torch.autograd.grad(x, inputs, cotangent.to(dtype))
        assert all(bar.dtype is dtype for bar in bars)
        outputs.append(x.detach().double())
        gradients.append([bar.double() for bar in bars])
    assert relative(outputs[1], outputs[0]) < 1e-5
    assert all(relative(b, a) < 1e-3 for a, b in zip(*gradients, strict=True))


@every_structure
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_taken_and_given_back(name, dtype):
    (x,) = layer_of(name)(*rounded(name, dtype, (2,), 13))
    assert x.dtype is dtype
    assert bool(torch.isfinite(x).all())


@every_structure
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_a_row_of_nan_is_named_and_leaves_the_others_untouched(name, poison):
    tensors = sample(name, (3,), 14)
    spoilt = [t.clone() for t in tensors]
    spoilt[0][1] = poison
    with pytest.raises(ParameterError, match=r"row 1: BAD_INPUT"):
        layer_of(name)(*spoilt)
    layer = layer_of(name, on_failure="nan")
    inputs = leaves(spoilt)
    solution = layer.solve(*inputs)
    (x,) = solution.variables
    clean_inputs = leaves(tensors)
    (clean,) = layer(*clean_inputs)
    assert solution.status.tolist() == [Status.SOLVED, Status.BAD_INPUT, Status.SOLVED]
    assert bool(torch.isnan(x[1]).all())
    assert relative(x[[0, 2]].detach(), clean[[0, 2]].detach()) < 1e-12
    got = torch.autograd.grad(x[[0, 2]].square().sum(), inputs)
    expected = torch.autograd.grad(clean[[0, 2]].square().sum(), clean_inputs)
    for g, h in zip(got, expected, strict=True):
        assert float((g - h).norm()) <= 1e-9 * max(1.0, float(h.norm()))
        assert bool((g[1] == 0).all())


@every_structure
def test_a_loss_that_uses_a_failed_row_has_a_nan_gradient_there_and_only_there(name):
    tensors = sample(name, (3,), 15)
    tensors[0][1] = torch.nan
    inputs = leaves(tensors)
    (x,) = layer_of(name, on_failure="nan")(*inputs)
    gradients = torch.autograd.grad(x.square().sum(), inputs)
    assert any(bool(torch.isnan(g[1]).any()) for g in gradients)
    assert all(bool(torch.isfinite(g[[0, 2]]).all()) for g in gradients)


@every_structure
def test_an_empty_batch_is_an_empty_batch(name):
    tensors = sample(name, (0,))
    inputs = leaves(tensors)
    (x,) = layer_of(name)(*inputs)
    assert x.shape[0] == 0
    gradients = torch.autograd.grad(x.sum(), inputs, allow_unused=True)
    assert all(g is None or g.shape == t.shape for g, t in zip(gradients, inputs, strict=True))


@every_structure
def test_a_layer_is_copied_and_pickled(name):
    layer, tensors = layer_of(name), sample(name, (2,))
    (expected,) = layer(*tensors)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert twin.structure == name
        assert torch.equal(twin(*tensors)[0], expected)
        assert twin.verify(*tensors).agrees


@every_structure
def test_explain_says_what_every_structure_said(name):
    layer = layer_of(name)
    text = layer.explain(batch=32)
    assert all(other in text for other in STRUCTURES)
    assert f"Path: {name}" in " ".join(text.split())
    assert f"{name}: yes" in " ".join(text.split())
    generic = layer_of(name, structure="generic")
    assert generic.structure == "cone_program"
    assert "as you asked" in generic.explain()


@every_structure
def test_naming_a_solver_chooses_the_cone_program(name):
    assert layer_of(name, solver="clarabel").structure == "cone_program"
    assert layer_of(name, solver_args={"max_iter": 60}).structure == "cone_program"
    assert layer_of(name, solver_args={"tolerance": 1e-9}).structure == name
    sibling = layer_of(name).with_options(solver="clarabel")
    assert sibling.structure == "cone_program"
    assert "you named a solver" in sibling.explain()
    assert layer_of(name).with_options(solver_args={"tolerance": 1e-9}).structure == name


@every_kernel
def test_a_kernel_asked_for_by_name_takes_no_solver(name):
    with pytest.raises(ValueError, match="takes no solver"):
        layer_of(name, structure=name, solver="clarabel")


@every_kernel
def test_the_solution_has_a_row_of_everything(name):
    solution = layer_of(name).solve(*sample(name, (2, 2), 16))
    for field in ("status", "iterations", "residual", "degenerate", "objective"):
        assert getattr(solution, field).shape == (2, 2), field
    assert bool((solution.residual < 1e-9).all())
    assert bool((solution.status == Status.SOLVED).all())
    assert solution.iterate is None


@every_kernel
def test_a_warm_start_from_a_kernel_is_refused_in_words(name):
    layer, tensors = layer_of(name), sample(name)
    solution = layer.solve(*tensors)
    generic = layer_of(name, solver="scs")
    with pytest.raises(ValueError, match="specialised path"):
        generic.solve(*tensors, warm_start=solution)


def test_a_dense_least_squares_layer_of_two_million_entries_is_not_canonicalised():
    A, b, x = cp.Parameter((2000, 1000)), cp.Parameter(2000), cp.Variable(1000)
    layer = ConvexLayer(cp.Problem(cp.Minimize(cp.sum_squares(A @ x - b))), [A, b], [x])
    assert layer.structure == "least_squares"
    assert layer._declared._canonical is None
    A_t = torch.randn(2000, 1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    b_t = torch.ones(2000, dtype=torch.float64)
    (found,) = layer(A_t, b_t)
    expected = torch.linalg.lstsq(A_t, b_t.unsqueeze(-1)).solution.squeeze(-1)
    assert relative(found, expected) < 1e-10


def test_a_large_banded_least_squares_problem_does_not_go_to_the_dense_kernel():
    n = 3000
    b, x = cp.Parameter(n), cp.Variable(n)
    objective = cp.sum_squares(x - b) + cp.sum_squares(cp.diff(x))
    layer = ConvexLayer(cp.Problem(cp.Minimize(objective)), [b], [x])
    assert layer.structure == "cone_program"
    assert "sparse" in layer.explain()


def test_a_structure_with_a_multiplier_it_does_not_give_is_refused_with_the_constraint_named():
    Z, X = cp.Variable((3, 3), symmetric=True), cp.Parameter((3, 3), symmetric=True)
    rules = [cp.trace(Z) == 2, Z >> 0, np.eye(3) - Z >> 0]
    problem = cp.Problem(cp.Maximize(cp.trace(X @ Z)), rules)
    outputs = [Z, rules[0].dual_variables[0]]
    assert ConvexLayer(problem, [X], outputs).structure == "cone_program"
    with pytest.raises(ProblemError, match="gives no multiplier of `trace"):
        ConvexLayer(problem, [X], outputs, structure="leading_eigenspace")


def test_a_parameter_shared_by_two_inputs_of_a_kernel_collects_both_gradients():
    t, x = cp.Parameter(3), cp.Variable(3)
    A = np.arange(12.0).reshape(4, 3) + np.eye(4, 3)
    problem = cp.Problem(
        cp.Minimize(cp.sum_squares(A @ x - cp.hstack([t, 1])) + cp.sum_squares(x - 2 * t))
    )
    layer = ConvexLayer(problem, [t], [x])
    assert layer.structure == "least_squares"
    found = layer.verify(torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64))
    assert found.agrees, found


@pytest.mark.filterwarnings("error")
def test_constraints_repeated_by_constants_are_dropped_and_not_flagged():
    a, x = cp.Parameter(3), cp.Variable(3)
    rules = [cp.sum(x) == 1, 2 * cp.sum(x) == 2, x[0] == x[1]]
    layer = ConvexLayer(cp.Problem(cp.Minimize(cp.sum_squares(x - a)), rules), [a], [x])
    assert layer.structure == "equality_constrained_qp"
    (leaf,) = leaves([torch.tensor([0.1, 0.2, 0.9], dtype=torch.float64)])
    solution = layer.solve(leaf)
    solution.variables[0][0].backward()
    assert not solution.degenerate
    assert relative(leaf.grad, torch.tensor([1 / 6, 1 / 6, -1 / 3], dtype=torch.float64)) < 1e-12


def test_constraints_that_contradict_each_other_are_infeasible():
    a, x = cp.Parameter(3), cp.Variable(3)
    rules = [cp.sum(x) == 1, 2 * cp.sum(x) == 3]
    layer = ConvexLayer(cp.Problem(cp.Minimize(cp.sum_squares(x - a)), rules), [a], [x])
    assert layer.structure == "equality_constrained_qp"
    with pytest.raises(SolverError, match="INFEASIBLE"):
        layer(torch.zeros(3, dtype=torch.float64))


@pytest.mark.parametrize(
    "spelling", ["one triangle", "a trace that is an entry", "a bordered matrix"]
)
def test_the_gradient_of_a_symmetric_parameter_is_symmetric_however_it_is_read(spelling):
    X, Z = cp.Parameter((2, 2), symmetric=True), cp.Variable((2, 2), symmetric=True)
    Q, q, y = cp.Parameter((2, 2), PSD=True), cp.Parameter(2), cp.Variable(2)
    W = cp.psd_wrap(cp.bmat([[Q[0, 0], Q[0, 1]], [Q[0, 1], Q[1, 1]]]))
    declaration = {
        "one triangle": (cp.Problem(cp.Maximize(X[0, 1] * Z[0, 1] + Z[0, 0]), [cp.trace(Z) == 1, Z >> 0]), [X], [Z]),
        "a trace that is an entry": (
            cp.Problem(cp.Maximize(cp.trace(X @ Z)), [cp.trace(Z) == X[0, 1], Z >> 0]), [X], [Z]),
        "a bordered matrix": (cp.Problem(cp.Minimize(cp.quad_form(y, W) + q @ y), [cp.sum(y) == 1]), [Q, q], [y]),
    }[spelling]  # fmt: skip
    value = torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=torch.float64)
    tensors = [value, torch.tensor([1.0, 2.0], dtype=torch.float64)][: len(declaration[1])]
    layer = ConvexLayer(*declaration)
    assert layer.structure in ("leading_eigenspace", "equality_constrained_qp")
    inputs = leaves(tensors)
    (bar, *_) = torch.autograd.grad(layer.solve(*inputs).objective, inputs)
    assert torch.allclose(bar, bar.mT)
    assert layer.verify(*tensors).agrees


@pytest.mark.parametrize("structure", ["auto", "generic"])
def test_a_solution_that_no_parameter_moves_has_a_gradient_of_zero(structure):
    x, p = cp.Variable(3), cp.Parameter(3)
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x - 1) + cp.sum(p)), [cp.sum(x) == 1, x >= 0])
    (leaf,) = leaves([torch.ones(2, 3, dtype=torch.float64)])
    ConvexLayer(problem, [p], [x], structure=structure)(leaf)[0].sum().backward()
    assert torch.equal(leaf.grad, torch.zeros(2, 3, dtype=torch.float64))


@pytest.mark.filterwarnings("ignore::convlayer.GradientWarning")
def test_multipliers_of_a_transport_are_flagged_and_its_plan_is_not():
    spelling = next(s for s in SPELLINGS if s.name == "multiply_and_sum")
    problem, parameters, variables = spelling.declare()
    tensors = spelling.sample((3,), 5)
    assert not ConvexLayer(problem, parameters, variables).solve(*tensors).degenerate.any()
    outputs = [*variables, problem.constraints[0].dual_variables[0]]
    layer = ConvexLayer(problem, parameters, outputs)
    assert layer.structure == "entropic_optimal_transport"
    solution = layer.solve(*tensors)
    assert solution.degenerate.all()
    # Multipliers of the rows, differenced: what of them is unique.
    other = ConvexLayer(problem, parameters, outputs, structure="generic").solve(*tensors)
    mine, theirs = (
        s.variables[1] - s.variables[1].mean(-1, keepdim=True) for s in (solution, other)
    )
    assert relative(mine, theirs) < 1e-8


def test_a_transposed_parameter_is_told_so():
    with pytest.raises(ValueError, match=r"did you mean A\.mT"):
        problems.ridge.layer(8, 5)(torch.zeros(5, 8), torch.zeros(8), torch.ones(()))  # fmt: skip


@pytest.mark.parametrize("fault", ["indefinite", "asymmetric", "nan"])
def test_a_matrix_whose_definiteness_the_kernel_sees_for_itself_is_refused_in_the_same_words(fault):
    P, q, A, b = (t.clone() for t in sample("equality_constrained_qp", (3,), 18))
    if fault == "indefinite":
        P[1, 0, 0] = -5.0
    elif fault == "asymmetric":
        P[1, 0, 1] += 0.1
    else:
        P[1, 2, 2] = torch.nan
    said = []
    for structure in ("auto", "generic"):
        with pytest.raises(ParameterError) as error:
            layer_of("equality_constrained_qp", structure=structure)(P, q, A, b)
        said.append(re.sub(r"param\d+", "P", str(error.value)))
    assert said[0] == said[1]
    assert "Parameter `P`" in said[0]
    inputs = leaves((P, q, A, b))
    solution = layer_of("equality_constrained_qp", on_failure="nan").solve(*inputs)
    assert solution.status.tolist() == [Status.SOLVED, Status.BAD_INPUT, Status.SOLVED]
    (clean,) = layer_of("equality_constrained_qp")(P[[0, 2]], q[[0, 2]], A[[0, 2]], b[[0, 2]])
    assert relative(solution.variables[0][[0, 2]].detach(), clean) < 1e-12


def test_rows_that_a_kernel_does_not_settle_have_second_derivatives_too(monkeypatch):
    """Row 1 is taken for unsettled; the cone program answers it, and forward mode and second
    derivatives of all rows."""
    layer, tensors = layer_of("least_squares"), leaves(sample("least_squares", (3,)))
    expected = layer(*tensors)[0]
    directions = [torch.ones_like(t) for t in tensors]
    tangent = torch.func.jvp(
        lambda *t: layer(*t)[0], tuple(t.detach() for t in tensors), tuple(directions)
    )[1]
    first = torch.autograd.grad(expected.pow(3).sum(), tensors, create_graph=True)
    second = torch.autograd.grad(sum(g.sum() for g in first), tensors)
    run = layer._choice.kernel._run

    def unsettled(values, like, at=None):
        return run(values, like, at).unsettled(torch.tensor([False, True, False]))

    monkeypatch.setattr(layer._choice.kernel, "_run", unsettled)
    found = layer(*tensors)[0]
    assert relative(found, expected) < 1e-10
    again = torch.autograd.grad(found.pow(3).sum(), tensors, create_graph=True)
    assert all(relative(a, b) < 1e-9 for a, b in zip(again, first, strict=True))
    for a, b in zip(torch.autograd.grad(sum(g.sum() for g in again), tensors), second, strict=True):
        assert relative(a, b) < 1e-8
    got = torch.func.jvp(
        lambda *t: layer(*t)[0], tuple(t.detach() for t in tensors), tuple(directions)
    )[1]
    assert relative(got, tangent) < 1e-9
    assert "row 1" in " ".join(layer.solve(*tensors).notes)


def test_a_warning_about_a_rescued_row_names_it(monkeypatch):
    """Row 1 lies at a kink, and the cone program, which answers it alone, tells so."""
    y, x = cp.Parameter(3), cp.Variable(3)
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x - y)), [cp.sum(x) == 1, x >= 0])
    layer = ConvexLayer(problem, [y], [x])
    run = layer._choice.kernel._run

    def unsettled(values, like, at=None):
        return run(values, like, at).unsettled(torch.tensor([False, True, False]))

    monkeypatch.setattr(layer._choice.kernel, "_run", unsettled)
    rows = [[0.2, 0.3, 0.5], [0.5, 0.5, 0.0], [0.9, 0.4, -1.0]]
    values = torch.tensor(rows, dtype=torch.float64, requires_grad=True)
    with pytest.warns(GradientWarning, match=r"^Row 1: weakly active"):
        layer(values)[0][:, 0].sum().backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once a layer
        layer(values)[0][:, 0].sum().backward()

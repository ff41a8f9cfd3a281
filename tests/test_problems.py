"""Every prebuilt problem, by its kernel and by its cone program: agrees with the oracle, gradients
with differences, a batch with a loop."""

import pytest
import torch

from convlayer import problems

SECTIONS = ("Solution:", "Derivative:", "Shapes:", "Cost:", "At a kink:", "Source:")
BATCH = 3
STEP = 1e-3  # of the way to another sample: symmetry, and room inside the domain, are kept
FIVE_POINT = {-2: 1 / 12, -1: -2 / 3, 1: 2 / 3, 2: -1 / 12}
STRUCTURE = {
    "factor_portfolio": "quadratic_program",
    "huber_regression": "quadratic_program",
    "support_vector_machine": "quadratic_program",
    "ball_projection": "cone_program",
    "cobb_douglas": "cone_program",
    "constrained_least_squares": "equality_constrained_qp",
    "entropic_optimal_transport": "entropic_optimal_transport",
    "equality_constrained_qp": "equality_constrained_qp",
    "geometric_program": "cone_program",
    "ky_fan_subspace": "leading_eigenspace",
    "lasso": "quadratic_program",
    "leading_eigenvector": "leading_eigenspace",
    "least_squares": "least_squares",
    "linear_quadratic_control": "equality_constrained_qp",
    "logistic_regression": "cone_program",
    "nearest_correlation": "cone_program",
    "nonnegative_least_squares": "quadratic_program",
    "portfolio": "quadratic_program",
    "quadratic_program": "quadratic_program",
    "ridge": "least_squares",
    "robust_pooling": "quadratic_program",
    "simplex_projection": "sparsemax",
    "softmax": "softmax",
    "sparsemax": "sparsemax",
    "total_variation": "total_variation",
}
# The last marginal follows from the others: the cone program's multipliers are not unique, and it
# says so.
REDUNDANT = {
    "entropic_optimal_transport-generic": pytest.mark.filterwarnings(
        "ignore::convlayer.GradientWarning"
    )
}
PATHS = [
    pytest.param(problem, path, id=f"{name}-{path}", marks=REDUNDANT.get(f"{name}-{path}", ()))
    for name, problem in problems.PROBLEMS.items()
    for path in (("auto",) if STRUCTURE.get(name) == "cone_program" else ("auto", "generic"))
]

every_problem = pytest.mark.parametrize(
    "problem", problems.PROBLEMS.values(), ids=problems.PROBLEMS
)
every_path = pytest.mark.parametrize(("problem", "path"), PATHS)


def relative(got, expected, floor=1e-12):
    return float((got - expected).detach().norm() / expected.detach().norm().clamp_min(floor))


@every_problem
def test_the_docstring_states_solution_derivative_shapes_cost_kinks_and_source(
    problem: problems.Prebuilt,
):
    positions = [(problem.__doc__ or "").find(section) for section in SECTIONS]
    assert -1 not in positions, (
        f"missing: {[s for s, position in zip(SECTIONS, positions) if position < 0]}"
    )
    assert positions == sorted(positions)


@every_problem
def test_the_declaration_lists_all_parameters_of_the_problem_under_its_own_name(
    problem: problems.Prebuilt,
):
    declared = problem()
    assert declared.name == problem.name == problem.__module__.rpartition(".")[2]
    assert {p.id for p in declared.parameters} == {p.id for p in declared.problem.parameters()}
    assert {v.id for v in declared.variables} <= {v.id for v in declared.problem.variables()}


@every_problem
def test_a_sample_is_float64_batched_and_given_by_its_seed(problem: problems.Prebuilt):
    shapes = [p.shape for p in problem().parameters]
    for batch in ((), 2, (2, 3)):
        lead = (batch,) if isinstance(batch, int) else batch
        first, again, other = (
            problem.sample(batch, 1),
            problem.sample(batch, 1),
            problem.sample(batch, 2),
        )
        assert [t.shape for t in first] == [torch.Size(lead + shape) for shape in shapes]
        assert all(t.dtype == torch.float64 for t in first)
        assert all(torch.equal(s, t) for s, t in zip(first, again, strict=True))
        assert not any(torch.equal(s, t) for s, t in zip(first, other, strict=True))


@every_problem
def test_the_layer_recognises_the_structure_and_says_so(problem: problems.Prebuilt):
    expected = STRUCTURE[problem.name]
    for structure, layer in (
        (expected, problem.layer()),
        ("cone_program", problem.layer(structure="generic")),
    ):
        assert layer.structure == structure
        assert layer.explain().splitlines()[0].split()[:2] == ["Path:", f"{structure}:"]


def test_the_oracle_is_told_a_size_that_no_tensor_shows():
    X = problems.ky_fan_subspace.sample(2, 0, 6, 3)
    (Z,) = problems.ky_fan_subspace.oracle(*X, k=3)
    assert relative(torch.einsum("bii->b", Z), torch.full((2,), 3.0, dtype=torch.float64)) < 1e-12
    assert relative(problems.ky_fan_subspace.layer(6, 3)(*X)[0], Z) < 1e-8


@every_path
def test_the_layer_agrees_with_the_oracle(problem: problems.Prebuilt, path: str):
    for seed in range(3):
        tensors = problem.sample(BATCH, seed)
        for got, expected in zip(
            problem.layer(structure=path)(*tensors), problem.oracle(*tensors), strict=True
        ):
            assert got.shape == expected.shape
            assert relative(got, expected) < 1e-8


@every_path
def test_the_gradient_agrees_with_five_point_differences_of_the_oracle(
    problem: problems.Prebuilt, path: str
):
    """Along the way to another sample, for a random linear functional of the variables, one sum a
    row."""
    tensors, others = problem.sample(BATCH, 10), problem.sample(BATCH, 11)
    directions = [b - a for a, b in zip(tensors, others, strict=True)]
    weights = [
        torch.randn(x.shape, generator=torch.Generator().manual_seed(12), dtype=torch.float64)
        for x in problem.oracle(*tensors)
    ]

    def functional(variables):
        return sum(
            (w * x).reshape(BATCH, -1).sum(1) for w, x in zip(weights, variables, strict=True)
        )

    def moved(k):
        return functional(
            problem.oracle(*(t + k * STEP * d for t, d in zip(tensors, directions, strict=True)))
        )

    expected = sum(c * moved(k) for k, c in FIVE_POINT.items()) / STEP
    leaves = [t.clone().requires_grad_() for t in tensors]
    gradients = torch.autograd.grad(
        functional(problem.layer(structure=path)(*leaves)).sum(), leaves
    )
    got = sum((g * d).reshape(BATCH, -1).sum(1) for g, d in zip(gradients, directions, strict=True))
    assert expected.abs().max() > 1e-3, "the functional does not move: this would test nothing"
    assert relative(got, expected) < 1e-6


@every_path
def test_a_batch_equals_a_loop_in_value_and_gradient(problem: problems.Prebuilt, path: str):
    layer = problem.layer(structure=path)
    leaves = [t.requires_grad_() for t in problem.sample((2, 2), 20)]
    whole = layer(*leaves)
    weights = [
        torch.randn(x.shape, generator=torch.Generator().manual_seed(21), dtype=torch.float64)
        for x in whole
    ]
    gradients = torch.autograd.grad(whole, leaves, weights)
    for i in range(2):
        for j in range(2):
            row = [t[i, j].detach().requires_grad_() for t in leaves]
            alone = layer(*row)
            assert all(relative(x[i, j], y) < 1e-8 for x, y in zip(whole, alone, strict=True))
            of_row = torch.autograd.grad(alone, row, [w[i, j] for w in weights])
            # zero, or the rounding of another gradient
            floor = max(1e-12, *(1e-6 * float(h.norm()) for h in of_row))
            assert all(
                relative(g[i, j], h, floor) < 1e-7 for g, h in zip(gradients, of_row, strict=True)
            )

"""What cannot be a layer, or a call of one, is refused in the user's own names, with the remedy."""

import cvxpy as cp
import pytest
import torch
from cases import CASES

from convlayer import ConvexLayer, ProblemError

n = 3
x, y, z = (cp.Variable(n, name=name) for name in ("x", "y", "z"))
X = cp.Variable((n, n), symmetric=True, name="X")
t = cp.Variable(name="t")
price, demand = cp.Parameter(n, name="price"), cp.Parameter(n, name="demand")
alpha, beta = cp.Parameter(nonneg=True, name="alpha"), cp.Parameter(nonneg=True, name="beta")
free = cp.Parameter(name="free")
Sigma, L = cp.Parameter((n, n), PSD=True, name="Sigma"), cp.Parameter((n, n), name="L")
positive, volume = cp.Variable(pos=True, name="positive"), cp.Variable(pos=True, name="volume")
rate = cp.Parameter(pos=True, name="rate")


def minimise(expression, constraints=()):
    return cp.Problem(cp.Minimize(expression), list(constraints))


NOT_DPP = {
    "product of parameters": (
        minimise(alpha * beta * cp.sum_squares(x)),
        ["`alpha`", "`beta`", "product", "torch"],
    ),
    "product of parametrised factors": (
        minimise(cp.sum_squares(L @ (Sigma @ x)) + cp.sum_squares(x)),
        ["`L`", "`Sigma`", "variable of its own", "z == B @ x"],
    ),
    "quad_form in a constraint": (
        minimise(cp.sum(x), [cp.quad_form(x, Sigma) <= 1]),
        ["Sigma", "sum_squares(L.T @ x)", "constraints[0]"],
    ),
    "quadratic in a parameter": (
        minimise(cp.sum_squares(x) + cp.sum_squares(price) * t, [t >= 0]),
        ["`price`", "torch before the layer"],
    ),
    "division by parameters": (minimise(cp.sum_squares(x) * alpha / rate), ["rate", "reciprocal"]),
    "parameter times convex of unknown sign": (
        minimise(free * cp.sum_squares(x)),
        ["`free`", "nonneg=True"],
    ),
    "parameter inside an exponential": (
        minimise(cp.sum_squares(x - 1) + cp.exp(free) * t, [t >= 1]),
        ["`free`", "torch before the layer"],
    ),
    "product in the second constraint": (
        minimise(cp.sum_squares(x), [x >= 0, alpha * (beta * x) <= 1]),
        ["constraints[1]", "`alpha`", "`beta`"],
    ),
    "product inside an equality": (
        minimise(cp.sum_squares(x), [cp.multiply(price, demand) == x]),
        ["constraints[0]", "`price`", "`demand`"],
    ),
    "parameter in both factors": (
        minimise(cp.sum_squares(cp.multiply(price, cp.multiply(price, x)) - 1) + cp.sum_squares(x)),
        ["`price`"],
    ),
}


def refuse(problem, parameters=None, variables=None, error=ProblemError, words=(), **options):
    parameters = problem.parameters() if parameters is None else parameters
    variables = problem.variables()[:1] if variables is None else variables
    with pytest.raises(error) as caught:
        ConvexLayer(problem, parameters, variables, **options)
    message = str(caught.value)
    for word in words:
        assert word in message, message
    return message


@pytest.mark.parametrize("name", NOT_DPP)
def test_what_is_not_dpp_is_named_with_a_rewrite(name):
    problem, words = NOT_DPP[name]
    if name == "parameter times convex of unknown sign":
        refuse(problem, words=words)
        return
    assert problem.is_dcp(), "the case is about DPP alone"
    refuse(problem, words=["not DPP", *words])


@pytest.mark.parametrize(
    ("problem", "words"),
    [
        (
            minimise(-cp.sum_squares(x) + price @ x),
            ["not convex", "the objective", "Minimize", "convex"],
        ),
        (
            cp.Problem(cp.Maximize(cp.sum_squares(x) + price @ x)),
            ["not convex", "the objective", "Maximize", "concave"],
        ),
        (
            minimise(price @ x, [cp.sum_squares(x) >= 1]),
            ["not convex", "constraints[0]", "inequality"],
        ),
        (
            minimise(price @ x, [x >= 0, cp.sum_squares(x) == 1]),
            ["not convex", "constraints[1]", "equality"],
        ),
        (
            minimise(cp.sqrt(cp.sum_squares(x)) + price @ x),
            ["not convex", "sqrt(sum_squares(x))", "`norm(x)`"],
        ),
        (minimise(x[0] * x[1] + price @ x), ["not convex", "x[0]"]),
    ],
)
def test_what_is_not_convex_is_named(problem, words):
    refuse(problem, words=words)


def test_a_quasiconvex_problem_is_told_from_a_nonconvex_one():
    problem = cp.Problem(cp.Minimize(cp.ceil(x[0] - free)), [x >= 0])
    refuse(problem, words=["quasiconvex", "DQCP"])


def test_a_log_log_convex_problem_is_told_to_pass_gp():
    problem = cp.Problem(cp.Minimize(1 / (positive * volume)), [positive * rate <= 2, volume <= 3])
    refuse(problem, words=["log-log convex", "gp=True"])
    ConvexLayer(problem, [rate], [positive], gp=True)


def test_what_is_not_log_log_convex_is_named():
    refuse(
        cp.Problem(cp.Minimize(positive - volume), [positive >= rate]),
        gp=True,
        words=["not log-log convex", "the objective"],
    )
    refuse(
        cp.Problem(cp.Minimize(positive), [positive + volume == rate]),
        gp=True,
        words=["constraints[0]", "monomials"],
    )


@pytest.mark.parametrize("attributes", [{"integer": True}, {"boolean": True}])
def test_integer_and_boolean_variables_are_refused(attributes):
    k = cp.Variable(n, name="count", **attributes)
    refuse(
        minimise(cp.sum_squares(k - price)),
        words=["`count`", "integer or boolean", "derivative", "bounds=[0, 1]"],
    )


def test_a_choice_from_a_finite_set_is_refused():
    refuse(
        minimise(t * free, [cp.FiniteSet(t, [1, 2])]),
        words=["constraints[0]", "FiniteSet(t", "derivative", "interval"],
    )


def test_complex_variables_and_parameters_are_refused():
    w = cp.Variable(n, complex=True, name="wave")
    refuse(minimise(cp.sum_squares(w - price)), words=["`wave`", "complex", "real"])
    phase = cp.Parameter(n, complex=True, name="phase")
    refuse(minimise(cp.norm(x - phase)), words=["`phase`", "complex"])


GOOD = minimise(cp.sum_squares(x - price) + alpha * cp.norm1(x), [x >= demand])


def test_missing_foreign_and_duplicate_parameters_are_named():
    refuse(GOOD, [price, alpha], words=["lacks", "`demand`"])
    refuse(GOOD, [], words=["`price`", "`alpha`", "`demand`"])
    refuse(
        GOOD,
        [price, alpha, demand, cp.Parameter(name="stranger")],
        words=["`stranger`", "does not use"],
    )
    refuse(GOOD, [price, alpha, demand, price], words=["`price`", "more than once"])


def test_variables_that_are_not_the_problems_are_named():
    every = [price, alpha, demand]
    refuse(GOOD, every, [x, y], words=["`y`", "neither", "dual_variables"])
    refuse(GOOD, every, [], words=["`variables` is empty"])
    refuse(GOOD, every, [GOOD.constraints[0]], error=TypeError, words=["dual_variables[0]"])
    stranger = y >= 0
    refuse(GOOD, every, [stranger.dual_variables[0]], words=["neither"])


def test_a_problem_without_variables_is_refused():
    refuse(minimise(cp.sum_squares(price)), [price], [x], words=["no variables"])


def test_arguments_of_the_wrong_kind_are_named():
    every = [price, alpha, demand]
    with pytest.raises(TypeError, match=r"cvxpy\.Problem"):
        ConvexLayer(GOOD.objective, every, [x])
    refuse(GOOD, price, error=TypeError, words=["`parameters`", "list or tuple"])
    refuse(GOOD, every, x, error=TypeError, words=["`variables`", "list or tuple"])
    refuse(
        GOOD,
        [price, alpha, x],
        error=TypeError,
        words=["`parameters`", "Variable", "cvxpy.Parameter"],
    )
    refuse(GOOD, every, [price], error=TypeError, words=["`variables`", "cvxpy.Variable"])
    refuse(GOOD, every, [x + 1], error=TypeError, words=["`variables`", "cvxpy.Variable"])


def test_a_parametrised_exponent_of_a_power_cone_is_refused():
    exponent = cp.Parameter(name="exponent", bounds=[0.1, 0.9])
    a, b, c = cp.Variable(), cp.Variable(), cp.Variable()
    problem = None
    try:
        problem = minimise(a + b, [cp.constraints.PowCone3D(a, b, c, exponent), c >= 1])
    except (TypeError, ValueError, AttributeError):
        pytest.skip("this CVXPY refuses it by itself")
    refuse(problem, words=["constraints[0]", "exponent", "Parameter", "constant"])


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("structure", "magic"),
        ("structure", None),
        ("gradient", "smooth"),
        ("gradient", 1),
        ("on_failure", "ignore"),
        ("on_failure", True),
        ("solver", "GUROBI"),
        ("solver", 7),
        ("solver", cp.Parameter),
    ],
)
def test_an_option_that_does_not_exist_is_refused_with_those_that_do(option, value):
    message = refuse(GOOD, error=ValueError, words=[f"`{option}`"], **{option: value})
    assert {
        "structure": "'generic'",
        "gradient": "'exact'",
        "on_failure": "'nan'",
        "solver": "'scs'",
    }[option] in message


@pytest.mark.parametrize("solver", ["clarabel", "scs"])
def test_an_unknown_solver_option_is_an_error_that_names_it(solver):
    refuse(
        GOOD,
        error=TypeError,
        words=["`max_iterz`", "tolerance"],
        solver=solver,
        solver_args={"max_iterz": 3},
    )
    option = "max_iter" if solver == "clarabel" else "max_iters"
    refuse(
        GOOD, error=TypeError, words=[f"`{option}`"], solver=solver, solver_args={option: "many"}
    )
    layer = ConvexLayer(GOOD, [price, alpha, demand], [x], solver=solver)
    inputs = [torch.zeros(n), torch.tensor(1.0), torch.zeros(n)]
    with pytest.raises(TypeError, match="max_iterz"):
        layer(*inputs, solver_args={"max_iterz": 3})


@pytest.mark.parametrize("tolerance", [0, -1e-3, 1.5, "tight", None, float("nan"), True])
def test_a_tolerance_that_is_no_tolerance_is_refused(tolerance):
    refuse(
        GOOD,
        error=(ValueError, TypeError),
        words=["`tolerance`"],
        solver_args={"tolerance": tolerance},
    )


def test_a_problem_that_a_solver_cannot_take_is_refused_at_construction():
    case = CASES["free_quadratic"]
    with pytest.raises(ValueError, match="SCS needs at least one constraint"):
        case.layer(solver="scs")


# Calls
# ------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def layer():
    problem = minimise(cp.quad_form(x, Sigma) + cp.sum_squares(x) + price @ x, [x >= free])
    return ConvexLayer(problem, [Sigma, price, free], [x])


def ok():
    return [
        torch.eye(n, dtype=torch.float64),
        torch.zeros(n, dtype=torch.float64),
        torch.tensor(0.0, dtype=torch.float64),
    ]


def fails(layer, error, words, **replaced):
    inputs = ok()
    for name, value in replaced.items():
        inputs[["Sigma", "price", "free"].index(name)] = value
    with pytest.raises(error) as caught:
        layer(*inputs)
    for word in words:
        assert word in str(caught.value), str(caught.value)


def test_the_wrong_number_of_tensors(layer):
    for inputs in (ok()[:2], [*ok(), torch.zeros(1)], []):
        with pytest.raises(
            ValueError,
            match=r"takes 3 tensors \(`Sigma`, `price`, `free`\); got " + str(len(inputs)),
        ):
            layer(*inputs)


def test_wrong_shapes_are_named_with_what_they_usually_mean(layer):
    fails(
        layer,
        ValueError,
        ["`Sigma`", "(8, 3)", "(3, 3)", "(*batch, 3, 3)"],
        Sigma=torch.zeros(8, 3),
    )
    fails(layer, ValueError, ["`Sigma`", "torch.diag_embed(Sigma)"], Sigma=torch.zeros(3))
    fails(
        layer,
        ValueError,
        ["`price`", "(3, 4)", "(*batch, 3)", "batch comes first"],
        price=torch.zeros(3, 4),
    )
    fails(layer, ValueError, ["`price`", "(3, 1)", "price.reshape(3)"], price=torch.zeros(3, 1))
    fails(layer, ValueError, ["`price`", "()"], price=torch.tensor(1.0))


def test_a_batch_of_vectors_for_a_matrix_is_told_of_diag_embed(layer):
    fails(
        layer,
        ValueError,
        ["`Sigma`", "ach row needs its own 3 x 3 matrix", "diag_embed"],
        Sigma=torch.zeros(8, 3),
    )


def test_batches_that_do_not_agree_are_listed(layer):
    fails(
        layer,
        ValueError,
        ["batch", "`Sigma` (2,)", "`price` (3,)"],
        Sigma=torch.eye(n).expand(2, n, n),
        price=torch.zeros(3, n),
    )


def test_what_is_no_tensor_and_what_is_no_float_is_named(layer):
    fails(layer, TypeError, ["`price`", "list", "torch.as_tensor"], price=[0.0] * n)
    fails(layer, TypeError, ["`free`", "str", "torch.Tensor"], free="1.0")
    fails(
        layer,
        TypeError,
        ["`price`", "int64", "price.double()"],
        price=torch.zeros(n, dtype=torch.int64),
    )
    fails(layer, TypeError, ["`price`", "bool"], price=torch.zeros(n, dtype=torch.bool))
    fails(layer, TypeError, ["`price`", "complex"], price=torch.zeros(n, dtype=torch.complex128))


def test_devices_that_differ_are_listed(layer):
    fails(
        layer,
        ValueError,
        ["devices", "`price` on meta", "`Sigma` on cpu"],
        price=torch.zeros(n, device="meta"),
    )


def test_a_warm_start_that_does_not_fit_is_refused():
    plain, scs = CASES["quadratic_program"].shared, CASES["quadratic_program"].layer(solver="scs")
    tensors = CASES["quadratic_program"].sample(2)
    start = plain.solve(*tensors)
    with pytest.raises(ValueError, match="`ids` names 3 samples"):
        plain(*tensors, ids=[1, 2, 3])
    with pytest.raises(ValueError, match="batch shape"):
        scs.solve(*CASES["quadratic_program"].sample(3), warm_start=start)


def test_a_warm_start_of_another_problem_is_refused():
    scs = CASES["quadratic_program"].layer(solver="scs")
    other = CASES["lasso"].shared.solve(*CASES["lasso"].sample(2))
    with pytest.raises((ValueError, TypeError), match="warm_start"):
        scs.solve(*CASES["quadratic_program"].sample(2), warm_start=other)
    with pytest.raises((ValueError, TypeError), match="warm_start"):
        scs.solve(*CASES["quadratic_program"].sample(2), warm_start=torch.zeros(3))

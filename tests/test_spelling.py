"""An expression is spelt as its user writes it: what is read back as CVXPY is the same expression.
A remedy holds, taken at its word."""

from __future__ import annotations

import re

import cvxpy as cp
import numpy as np
import pytest

from convlayer import ConvexLayer, ProblemError
from convlayer.declaration.spelling import MOST_ATOMS, _Speller, short, spelled

x, y, w = (cp.Variable(3, name="x"), cp.Variable(3, name="y"), cp.Variable(3, name="w", pos=True))
t, u = cp.Variable(name="t"), cp.Variable(name="u")
X, Z = cp.Variable((3, 3), name="X"), cp.Variable((3, 3), PSD=True, name="Z")
p, g, h = cp.Parameter(3, name="p"), cp.Parameter(name="g"), cp.Parameter(nonneg=True, name="h")
a, Q = cp.Parameter(pos=True, name="a"), cp.Parameter((3, 3), PSD=True, name="Q")
Q0, K0 = np.array([[2.0, 1.0, 0.0], [1.0, 3.0, 0.5], [0.0, 0.5, 1.0]]), np.arange(9.0).reshape(3, 3)
S, K = cp.Constant(Q0, name="S"), cp.Constant(K0, name="K")
NAMES = {name: getattr(cp, name) for name in dir(cp) if not name.startswith("_")}
NAMES.update(x=x, y=y, w=w, t=t, u=u, X=X, Z=Z, p=p, g=g, h=h, a=a, Q=Q, S=S, K=K, eye=np.eye)
NAMES.update(abs=cp.abs, sum=cp.sum, max=cp.max, min=cp.min, norm1=cp.norm1, norm_inf=cp.norm_inf)


@pytest.fixture(autouse=True)
def values():
    rng = np.random.default_rng(0)
    for leaf in (x, y, w, t, u, X, p, g, h, a):
        leaf.value = rng.uniform(0.5, 2.0, size=leaf.shape)
    Z.value = Q.value = Q0


SPELLINGS = """
x @ x | t * t | 2 * x + 3 | K @ x - 1 | x - (y - p) | -(x + y) | 1 - 2 * x | 2 * (x + y) | x / 2 | x / t | g * x | multiply(p, x) | x - -y
quad_form(x, S) | quad_form(x, eye(3)) | sum_squares(x - p) | sum_squares(X, axis=0) | square(x) | sqrt(x) | inv_pos(x) | power(x, 1.5) | power(x, 0.3)
norm(x) | norm(X, 'fro') | norm(X, axis=1) | norm1(x) | norm_inf(x) | pnorm(x, 3) | pnorm(x, 1.5) | sigma_max(X) | square(norm(x - p))
abs(x) | pos(x) | neg(x) | maximum(x, p) | minimum(x, y) | max(x) | min(x) | max(X, axis=1) | huber(x) | huber(x, 2)
sum(x) | sum(X, axis=1) | sum(x, keepdims=True) | mean(x) | mean(X, axis=0) | var(x) | std(x) | cumsum(x) | sum_largest(x, 2) | sum_smallest(x, 2)
cvar(x, 0.5) | geo_mean(x) | harmonic_mean(x) | inv_prod(x) | prod(x) | entr(w) | kl_div(w, a) | rel_entr(w, x) | log(w) | exp(x) | xexp(w) | logistic(-x)
log1p(w) | log_sum_exp(x) | quad_over_lin(x, a) | matrix_frac(x, Z) | tr_inv(Z) | log_det(Z) | lambda_max(Z) | lambda_min(Z) | trace(X) | trace(X @ K)
lambda_sum_largest(Z, 2) | lambda_sum_smallest(Z, 2) | dotsort(x, p) | scalene(x, 1, 2) | x[0] | x[1:] | X[:, 0] | X[0:2, 1:] | x[[0, 2]] | X[1, 2]
X.T | (K @ x)[1] | diag(x) | diag(X) | vstack([x, y]) | hstack([x, t]) | bmat([[X, X], [X, X]]) | outer(x, p) | kron(K, X) | conv(p, K @ p)
upper_tri(X) | x[None] | x + 1 | sum(1 / (x - p)) | K @ X @ K | power(t, h) | ceil(x) | sign(t) | -x @ p | -entr(w) | 2 * x - 3 * y + p
"""


@pytest.mark.parametrize(
    "written", [part.strip() for part in SPELLINGS.replace("\n", "|").split("|") if part.strip()]
)
def test_what_is_spelt_is_read_back_as_the_same_expression(written):
    expression = eval(written, NAMES)
    _Speller().top(expression)  # `spelled` would hide a failure
    again = eval(spelled(expression), NAMES)
    assert again.shape == expression.shape
    if expression.value is not None:
        np.testing.assert_allclose(np.asarray(again.value), np.asarray(expression.value), rtol=2e-3)
    if "scalene" not in written:
        assert spelled(expression).replace(" ", "") == written.replace("0:2", ":2").replace(" ", "")


@pytest.mark.parametrize(
    ("constraint", "text"),
    [
        (x >= 0, "x >= 0"),
        (x <= p, "x <= p"),
        (cp.norm(x - p) <= 1, "norm(x - p) <= 1"),
        (K @ x == p, "K @ x == p"),
        (Z >> 0, "Z >> 0"),
        (X + X.T << S, "X + X.T << S"),
        (Z >> X, "Z >> X"),
        (cp.SOC(t, x), "SOC(t, x)"),
        (cp.Maximize(p @ x), "Maximize(p @ x)"),
        (x[None] >= 0, "x[None] >= 0"),
    ],
)
def test_constraints_and_objectives_are_spelt(constraint, text):
    assert spelled(constraint) == text


def test_the_words_of_cvxpy_itself_do_not_show():
    shown = " ".join(
        spelled(eval(part, NAMES))
        for part in SPELLINGS.replace("\n", "|").split("|")
        if part.strip()
    )
    for word in (
        "Promote",
        "Approx",
        "QuadForm",
        "None, False",
        "AddExpression",
        "reshape",
        "of shape",
    ):
        assert word not in shown


def test_no_text_is_long_however_large_the_expression():
    z = x
    for _ in range(14):
        z = z + K @ z  # 2**14 atoms, written out
    text = spelled(cp.sum_squares(z) <= 1)
    assert text.count("x") <= MOST_ATOMS
    assert "..." in text
    assert len(short(cp.sum_squares(z) <= 1)) <= 60


def test_what_cannot_be_spelt_is_named_by_its_kind():
    class Odd(cp.atoms.affine.affine_atom.AffAtom):
        def shape_from_args(self):
            return (2,)

        def numeric(self, values):
            return values[0]

    odd = Odd(x)
    odd.args = None
    assert spelled(odd) == "Odd of shape (2,)"


# Remedies
# ---------------------------------------------------------------------------------------------------------------

REWRITTEN = """
x @ x | t * t | (x - p) @ (x - p) | x * x | (x - p) @ S @ (x - p) | sqrt(x @ x) | sqrt(sum_squares(x - p)) | sqrt(1 + square(t))
sqrt(square(t) + square(u)) | sqrt(var(x)) | sum(multiply(x, x)) | trace(X.T @ X) | trace(Z @ Z) | 1 / w[0] | 1 / t | h / w[0] | sum(K[1] / w) | square(t) / u
sum_squares(x) / t | x @ x / t
multiply(w, log(w)) | t * log(t) | x @ log(x) | multiply(w, log(w / y)) | multiply(w, log(w) - log(y)) | w[0] * exp(w[0]) | log(sum(exp(x))) | log(1 + exp(t))
log(exp(t) + exp(u)) | sqrt(t * u) | log(t * u) | log(prod(w)) | quad_form(x, h * S)
"""


@pytest.mark.parametrize(
    "written", [part.strip() for part in REWRITTEN.replace("\n", "|").split("|") if part.strip()]
)
def test_a_rewriting_that_is_advised_is_convex_and_has_the_same_value(written):
    expression = eval(written, NAMES)
    total = cp.sum(expression)
    concave = written.startswith(("sqrt(t * u)", "log(t", "log(prod"))
    objective = cp.Maximize(total) if concave else cp.Minimize(total)
    problem = cp.Problem(objective, [x >= 0.1, t >= 0.1])
    parameters = problem.parameters()
    variables = [v for v in problem.variables() if v is not Z][:1] or [Z]
    with pytest.raises(ProblemError) as caught:
        ConvexLayer(problem, parameters, variables)
    message = str(caught.value)
    assert "in the objective" in message
    blamed, advised = re.search(r"`([^`]*)`.*(?:[Ww]rite|in front,) `([^`]*)`", message).groups()
    old, new = (eval(text, NAMES) for text in (blamed, advised))
    assert new.is_convex() or new.is_concave(), message
    np.testing.assert_allclose(np.asarray(new.value).sum(), np.asarray(old.value).sum(), rtol=1e-3)


def test_a_root_of_a_quadratic_form_is_a_norm_of_a_factor():
    problem = cp.Problem(cp.Minimize(p @ x), [cp.sqrt(cp.quad_form(x - 1, S)) <= h])
    with pytest.raises(ProblemError, match=re.escape("norm(L.T @ (x - 1))")) as caught:
        ConvexLayer(problem, [p, h], [x])
    L = np.linalg.cholesky(Q0)
    advised = cp.norm(L.T @ (x - 1))
    np.testing.assert_allclose(advised.value**2, cp.quad_form(x - 1, S).value)
    assert "bisection" not in str(caught.value)


half = cp.Parameter((3, 3), symmetric=True, name="half")
ALMOST = Q0 - np.linalg.eigvalsh(Q0)[0] * np.eye(3) - 1e-10 * np.eye(3)
CAUSES = {
    # The problem, what is said, and what would be beside the point.
    "symmetric": (cp.Minimize(cp.quad_form(x, half)), [], ["`half`", "PSD=True"], ["nonneg"]),
    "symmetric below": (cp.Minimize(cp.sum(x)), [cp.quad_form(x, half) <= 1], ["constraints[0]", "PSD=True"], ["nonneg"]),
    "symmetric, maximised": (cp.Maximize(cp.quad_form(x, half)), [], ["NSD=True"], ["nonneg"]),
    "psd but for rounding": (cp.Minimize(cp.quad_form(x, ALMOST) + p @ x), [], ["psd_wrap", "eigenvalue"], []),
    "nsd but for rounding": (cp.Maximize(cp.quad_form(x, -ALMOST) + p @ x), [], ["-quad_form(x, psd_wrap(", "eigenvalue"], []),
    "indefinite": (cp.Minimize(cp.quad_form(x, np.diag([1.0, -2.0, 1.0])) + p @ x), [], ["indefinite", "-2"], ["psd_wrap"]),
    "matrix of parameters": (cp.Minimize(cp.quad_form(x, Q + h * S)), [], ["PSD=True", "`h`", "`Q`", "torch"], []),
    "scale of no sign": (cp.Minimize(cp.quad_form(x, g * S)), [], ["`g * quad_form(x, S)`", "`g` declared nonneg=True"], []),
    "quad_over_lin": (cp.Minimize(cp.quad_over_lin(x, a)), [], ["reciprocal", "`r * sum_squares(x)`"], ["Declare the sign"]),
    "exponent": (cp.Maximize(cp.power(w[0], h) - w[0]), [], ["exponent", "`h`"], ["nonneg=True"]),
    "root of a parameter": (cp.Minimize(cp.sum_squares(x)), [x >= cp.sqrt(h)], ["`sqrt(h)`", "in torch"], ["Promote"]),
    "power of a parameter": (cp.Minimize(g**2 * cp.norm(x)), [], ["`square(g)`", "nonneg=True", "in torch"], ["Promote"]),
    "a sum's concave term": (cp.Minimize(cp.sum_squares(x) + cp.sum(cp.log(x)) + p @ x), [], ["`log(x)`", "concave"], ["sum_squares"]),
    "a sum's convex term": (cp.Maximize(p @ x - cp.sum_squares(x) + cp.norm(x)), [], ["`norm(x)`", "convex"], ["sum_squares"]),
    "maximised": (cp.Maximize(cp.sum_squares(x) + p @ x), [], ["`sum_squares(x)`", "Maximize", "concave"], []),
    "unknown sign": (cp.Minimize(g * cp.var(x)), [], ["`var(x)`", "`g`", "nonneg=True"], []),
    "both signs": (cp.Minimize(np.array([1, -1, 2]) @ cp.square(x) + p @ x), [], ["`square(x)`", "both signs"], []),
    "outside a ball": (cp.Minimize(p @ x), [cp.norm(x) >= 1], ["`norm(x) >= 1`", "greater side"], []),
    "on a sphere": (cp.Minimize(p @ x), [cp.sum_squares(x) == h], ["`sum_squares(x) == h`", "equality", "<="], []),
    "corners": (cp.Minimize(p @ x), [cp.abs(x) == 1], ["`abs(x) == 1`", "equality"], []),
    "bilinear": (cp.Minimize(t * u + p @ x), [], ["`t`, `u`", "Parameter", "gp=True"], []),
    "shifted": (cp.Minimize(x @ S @ (x - p)), [], ["Expand", "quad_form"], ["nonneg"]),
    "entries": (cp.Minimize(p @ x), [x[0] * x[1] <= 1], ["`x[0] * x[1]`", "Expand"], []),
    "unknown numerator": (cp.Minimize(cp.sum(p / w)), [], ["inv_pos(w)", "sign of `p`"], []),
    "ratio": (cp.Minimize(t / u + p @ x), [], ["ratio", "multiply through"], []),
    "logarithm": (cp.Minimize(p @ x), [cp.log(t) <= h], ["`t <= exp(h)`", "in torch"], ["bisection"]),
    "composition": (cp.Minimize(cp.square(cp.norm(x) - h)), [], ["`norm(x)`", "inside `square(norm(x) - h)`", "affine"], []),
    "Schur": (cp.Minimize(p @ x), [X @ X << np.eye(3)], ["Schur", "bmat"], []),
    "step": (cp.Minimize(cp.ceil(t - g)), [], ["step function", "quasiconvex"], ["nonneg"]),
}  # fmt: skip


@pytest.mark.parametrize("name", CAUSES)
def test_the_remedy_fits_the_cause(name):
    objective, constraints, words, beside = CAUSES[name]
    problem = cp.Problem(objective, constraints)
    with pytest.raises(ProblemError) as caught:
        ConvexLayer(problem, problem.parameters(), problem.variables()[:1])
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert not any(word in message for word in [*beside, "Approx", "Promote", "QuadForm"]), message


GEOMETRIC = {
    "variable": (cp.Minimize(t * a), [], ["Variable `t`", "pos=True"]),
    "parameter": (cp.Minimize(g * w[0]), [], ["Parameter `g`", "pos=True"]),
    "zero": (cp.Minimize(1 / w[0]), [0 * w[0] + w[1] <= a], ["zero", "positive", "`0 * w[0]`"]),
    "negative": (cp.Minimize(-2 * w[0] * a), [], ["negative", "positive"]),
    "zero among several": (cp.Minimize(np.array([1.0, 0, 2]) @ w * a), [], ["zero"]),
    "difference": (cp.Minimize(w[0]), [w[1] - w[0] <= a], ["`w[1] - w[0]`", "subtracts"]),
    "equality": (cp.Minimize(w[0]), [w[0] + w[1] == a], ["monomials on both sides", "<="]),
    "maximised": (cp.Maximize(w[0] + a * w[1]), [], ["Maximize", "monomial"]),
}  # fmt: skip


@pytest.mark.parametrize("name", GEOMETRIC)
def test_the_remedy_fits_the_cause_in_geometric_programs(name):
    objective, constraints, words = GEOMETRIC[name]
    problem = cp.Problem(objective, constraints)
    with pytest.raises(ProblemError) as caught:
        ConvexLayer(problem, problem.parameters(), problem.variables()[:1], gp=True)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_a_parameter_behind_a_callback_is_told_what_to_give():
    left, right = cp.Parameter((3, 2), name="left"), cp.Parameter((2, 3), name="right")
    both = cp.CallbackParam(callback=lambda: left.value @ right.value, shape=(3, 3), name="both")
    problem = cp.Problem(cp.Minimize(cp.norm(both @ x - p)))
    for given in ([left, right, p], [p], [left, p]):
        with pytest.raises(
            ProblemError, match=r"`both` is a CallbackParam.*cp\.Parameter\(\(3, 3\)"
        ):
            ConvexLayer(problem, given, [x])

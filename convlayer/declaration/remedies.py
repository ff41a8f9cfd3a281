"""What to write instead: for each usual way to leave disciplined convex programming a sentence that
names the cause and the remedy.

A rule is a function of a fault and of one expression on its path, which answers with a sentence or
None. `remedy` asks those that know an idiom first, then those that know a kind of atom, and last
says which rule was broken.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import cvxpy as cp
import numpy as np
import scipy.sparse as sp

from convlayer.declaration.blame import AFFINE, CONCAVE, CONVEX, DGP, Fault
from convlayer.declaration.spelling import exponent_of, is_scaled_squares, plain, spelled

# An eigenvalue of the wrong sign comes from rounding if it is below this share of the largest.
ROUNDING_OF_EIGENVALUES = 1e-6
# Of a larger matrix no eigenvalues are looked for.
LARGEST_LOOKED_AT = 2000
# Atoms whose values jump.
STEP_FUNCTIONS = ("ceil", "floor", "sign", "length")
# What to do with a function of Parameters alone, as a sentence ends.
IN_TORCH = "compute it in torch before the layer"

Rule = Callable[[Fault, Any], "str | None"]


def remedy(fault: Fault) -> tuple[str, bool]:
    """A sentence on the cause and one on what to write, and whether they are of this very case
    rather than of rules in general."""
    tiers = (_GEOMETRIC,) if fault.rules == DGP else (_IDIOMS, _ATOMS)
    for tier in tiers:
        for expression in reversed(fault.path):
            for rule in tier:
                said = rule(fault, expression)
                if said is not None:
                    return said, True
    return _by_the_rules(fault), False


def quoted(names: Sequence[str]) -> str:
    """Each name once, as code."""
    return ", ".join(f"`{name}`" for name in dict.fromkeys(names))


def _text(expression: Any) -> str:
    return f"`{spelled(expression)}`"


def _kind(expression: Any) -> str:
    return type(expression).__name__


def _parameters(expression: Any) -> list[Any]:
    return sorted(expression.parameters(), key=lambda p: p.id)


def _names(expression: Any) -> str:
    return quoted([p.name() for p in _parameters(expression)])


def _same(a: Any, b: Any) -> bool:
    """The same expression, or the same spelt twice."""
    a, b = plain(a), plain(b)
    return a is b or (
        {v.id for v in a.variables()} == {v.id for v in b.variables()} and spelled(a) == spelled(b)
    )


def _is_product(e: Any) -> bool:
    return _kind(e) in ("multiply", "MulExpression")


def _terms(e: Any) -> list[Any]:
    return [plain(term) for term in e.args] if _kind(e) == "AddExpression" else [plain(e)]


# Idioms
# -----------------------------------------------------------------------------------------------------------------


def _exponent(fault: Fault, e: Any) -> str | None:
    exponent = exponent_of(e)
    if not isinstance(exponent, cp.Expression):
        return None
    if not e.args[0].variables():
        return f"{_text(e)} is a nonlinear function of Parameters alone. Declare one Parameter for its value and {IN_TORCH}."
    return (
        f"the exponent of {_text(e)} is the Parameter {_names(exponent)}: the function itself would change with it. "
        "Make the exponent a number, one layer for each value."
    )


def _root_of_squares(fault: Fault, e: Any) -> str | None:
    if exponent_of(e) != 0.5 or not e.variables():
        return None
    inner, scale = plain(e.args[0]), ""
    if spelled(inner).startswith("var("):
        return f"{_text(e)} is the root of a square. Write `std({spelled(inner)[4:-1]})`, which is convex."
    if _kind(inner) in ("multiply", "DivExpression") and len(_varying(inner)) == 1:
        inner, scale = plain(_varying(inner)[0]), ", times the root of the factor"
    if is_scaled_squares(inner) or exponent_of(inner) == 2:
        instead = (
            f"norm({spelled(inner.args[0])})"
            if is_scaled_squares(inner)
            else f"abs({spelled(inner.args[0])})"
        )
    elif _is_product(inner) and _same(*inner.args):
        instead = (
            f"{'norm' if _kind(inner) == 'MulExpression' else 'abs'}({spelled(inner.args[0])})"
        )
    elif (
        form := inner.args if isinstance(inner, cp.QuadForm) else _as_quadratic_form(inner)
    ) is not None:
        base, matrix = form
        factor = "a Parameter L" if matrix.parameters() else "L = numpy.linalg.cholesky of it"
        return (
            f"{_text(e)} is the root of a square. Write `norm(L.T @ {_bracketed(base)})` where the matrix is L L' ({factor}); or square both sides "
            "of a constraint, and leave the root out of an objective that is nothing else."
        )
    elif _kind(inner) == "AddExpression" and all(_is_square(term) for term in _terms(inner)):
        parts = [_root(t) for t in _terms(inner)]
        instead = f"norm(hstack([{', '.join(parts)}]))"
    else:
        return None
    return f"{_text(e)} is the root of a square. Write `{instead}`{scale}, which is convex."


def _varying(e: Any) -> list[Any]:
    return [a for a in e.args if a.variables()]


def _is_square(term: Any) -> bool:
    return not term.variables() or is_scaled_squares(term) or exponent_of(term) == 2


def _root(term: Any) -> str:
    if term.variables():
        return spelled(term.args[0])
    return (
        f"sqrt({spelled(term)})"
        if term.parameters() or term.size > 1
        else f"{float(np.asarray(term.value)) ** 0.5:.4g}"
    )


def _bracketed(e: Any) -> str:
    return f"({spelled(e)})" if _kind(plain(e)) == "AddExpression" else spelled(e)


def _as_quadratic_form(e: Any) -> tuple[Any, Any] | None:
    """(y, S) of y @ S @ y."""
    if _kind(e) != "MulExpression" or _kind(e.args[0]) != "MulExpression":
        return None
    (left, matrix), right = e.args[0].args, e.args[1]
    transposed = left.args[0] if _kind(left) == "transpose" else left
    return (right, matrix) if not matrix.variables() and _same(transposed, right) else None


def _times_logarithm(fault: Fault, e: Any) -> str | None:
    if not _is_product(e) or any(not a.variables() for a in e.args):
        return None
    for x, other in (e.args, e.args[::-1]):
        other = plain(other)
        one = "-entr({0})" if _kind(e) == "multiply" else "-sum(entr({0}))"
        if _kind(other) == "log" and _same(x, other.args[0]):
            return f"{_text(e)} is a product of two functions of a variable. Write `{one.format(spelled(x))}`."
        if _kind(other) == "exp" and _same(x, other.args[0]):
            return f"{_text(e)} is a product of two functions of a variable. Write `xexp({spelled(x)})`, of a variable declared nonneg=True."
        ratio: Any = plain(other.args[0]) if _kind(other) == "log" else None
        if _kind(ratio) == "DivExpression" and _same(x, ratio.args[0]):
            under = spelled(ratio.args[1])
            return f"{_text(e)} is a product of two functions of a variable. Write `rel_entr({spelled(x)}, {under})`."
        terms = _terms(other)
        if (
            _kind(terms[0]) == "log"
            and _kind(terms[-1]) == "NegExpression"
            and _same(x, terms[0].args[0])
        ):
            inner = plain(terms[-1].args[0])
            if len(terms) == 2 and _kind(inner) == "log":
                under = spelled(inner.args[0])
                return f"{_text(e)} is a product of two functions of a variable. Write `rel_entr({spelled(x)}, {under})`."
    return None


def _log_of_exponentials(fault: Fault, e: Any) -> str | None:
    if _kind(e) != "log":
        return None
    inner = plain(e.args[0])
    if _kind(inner) == "Sum" and _kind(inner.args[0]) == "exp":
        return f"{_text(e)} is convex, though no rule says so. Write `log_sum_exp({spelled(inner.args[0].args[0])})`."
    terms = _terms(inner)
    powers = [t for t in terms if _kind(t) == "exp"]
    if (
        len(powers) == 1
        and len(terms) == 2
        and all(t.is_constant() for t in terms if t is not powers[0])
    ):
        return f"{_text(e)} is convex, though no rule says so. Write `logistic({spelled(powers[0].args[0])})`."
    if len(powers) == len(terms) > 1:
        parts = ", ".join(spelled(t.args[0]) for t in powers)
        return (
            f"{_text(e)} is convex, though no rule says so. Write `log_sum_exp(hstack([{parts}]))`."
        )
    if _is_product(inner) or _kind(inner) == "Prod":
        parts = " + ".join(f"log({spelled(a)})" for a in inner.args)
        instead = f"sum(log({spelled(inner.args[0])}))" if _kind(inner) == "Prod" else parts
        return f"{_text(e)} is the logarithm of a product. Write `{instead}`."
    return None


def _root_of_a_product(fault: Fault, e: Any) -> str | None:
    inner = plain(e.args[0]) if exponent_of(e) == 0.5 else None
    if inner is None or _kind(inner) != "multiply" or any(not a.variables() for a in inner.args):
        return None
    if _same(*inner.args) or inner.size > 1:
        return None
    a, b = (spelled(x) for x in inner.args)
    return f"{_text(e)} is concave, though no rule says so. Write `geo_mean(hstack([{a}, {b}]))`."


def _sum_of_squares(fault: Fault, e: Any) -> str | None:
    """sum(x * x); trace(X.T @ X), which CVXPY keeps as a sum too."""
    inner: Any = plain(e.args[0]) if _kind(e) == "Sum" else None
    if _kind(inner) != "multiply" or len(_varying(inner)) < 2:
        return None
    a, b = inner.args
    bare = [part.args[0] if _kind(part) == "transpose" else part for part in (a, b)]
    if not _same(*bare):
        return None
    if not _same(a, b) and not bare[0].is_symmetric():
        name = spelled(bare[0])
        return f"{_text(e)} is a sum of squares where `{name}` is symmetric, and else of no sign. Declare it symmetric=True and write `sum_squares({name})`."
    return f"{_text(e)} multiplies an expression by itself. Write `sum_squares({spelled(bare[0])})`{_if_concave(fault)}."


def _square_over_a_variable(fault: Fault, e: Any) -> str | None:
    if _kind(e) != "DivExpression" or not e.args[1].variables():
        return None
    over, below = plain(e.args[0]), spelled(e.args[1])
    doubled = _is_product(over) and _same(*over.args) and over.size == 1
    if not (is_scaled_squares(over) or exponent_of(over) == 2 or doubled):
        return None
    return f"{_text(e)} divides a square by a variable. Write `quad_over_lin({spelled(over.args[0])}, {below})`, for positive `{below}`."


def _bound_through_a_function(fault: Fault, e: Any) -> str | None:
    """log(x) <= c, exp(x) >= c."""
    item = fault.item
    if (
        e is not fault.culprit
        or fault.parent is not None
        or not isinstance(item, cp.constraints.Inequality)
    ):
        return None
    other, sign = item.args[1 - fault.side], ("<=", ">=")[fault.side]
    inverse = (
        "exp({0})"
        if _kind(e) == "log"
        else "log({0})"
        if _kind(e) == "exp"
        else "({0})**2"
        if exponent_of(e) == 0.5
        else None
    )
    if inverse is None or other.variables():
        return None
    side = inverse.format(spelled(other))
    how = (
        ", with a Parameter for its right-hand side, computed in torch before the layer"
        if other.parameters()
        else ""
    )
    return f"`{spelled(item)}` bounds {_text(e)} from the side on which it is not {fault.wanted}. Write `{spelled(e.args[0])} {sign} {side}`{how}."


# Atoms
# ------------------------------------------------------------------------------------------------------------------


def _product_of_variables(fault: Fault, e: Any) -> str | None:
    if not _is_product(e) or any(not a.variables() for a in e.args):
        return None
    a, b = e.args
    text, base = _text(e), spelled(b)
    if _same(a, b):
        square = "sum_squares" if _kind(e) == "MulExpression" and a.ndim == 1 else "square"
        if _kind(e) == "multiply" or a.ndim == 1:
            return f"{text} multiplies an expression by itself. Write `{square}({base})`{_if_concave(fault)}."
    if _kind(plain(a)) == "transpose" and _same(plain(a).args[0], b) and e.size == 1:
        return f"{text} multiplies an expression by itself. Write `sum_squares({base})`{_if_concave(fault)}."
    form = _as_quadratic_form(e)
    if form is not None:
        how = f" with a Parameter({tuple(form[1].shape)}, PSD=True)" if form[1].parameters() else ""
        return f"{text} is a quadratic form. Write `quad_form({base}, {_of_matrix(form[1])})`{how}{_if_concave(fault)}."
    shared = {v.id: v.name() for v in a.variables()}
    both = [v.name() for v in b.variables() if v.id in shared]
    if both and isinstance(fault.item, cp.constraints.PSD):
        return (
            f"{text} multiplies {quoted(both)} by itself inside a matrix inequality. Write it as its Schur complement: X.T @ X << B is "
            "bmat([[eye, X], [X.T, B]]) >> 0."
        )
    if both:
        return (
            f"{text} multiplies {quoted(both)} by itself in a product of different factors. Expand it: write all that is quadratic as one "
            "`quad_form(x, S)` with S positive semidefinite, and the rest as terms linear in the variable, with a Parameter for a coefficient that "
            "holds Parameters, computed in torch."
        )
    names = quoted([v.name() for v in (*a.variables(), *b.variables())])
    return (
        f"{text} multiplies variables with each other ({names}), which is neither convex nor concave. Make one of the factors a Parameter; "
        "where all variables are positive, pass gp=True if the rest is log-log convex too."
    )


def _if_concave(fault: Fault) -> str:
    return (
        ""
        if fault.wanted != CONCAVE
        else " (it is convex: what is maximised, or stands on the greater side, takes its negative)"
    )


def _quotient(fault: Fault, e: Any) -> str | None:
    if _kind(e) != "DivExpression":
        return None
    over, under = (plain(a) for a in e.args)
    text, below = _text(e), spelled(under)
    if not under.variables():
        if not fault.dpp or not under.parameters():
            return None
        return f"{text} divides by a Parameter. Declare a Parameter for the reciprocal, 1 / {_bracketed(under)}, and {IN_TORCH}."
    if not over.variables():
        number = (
            over.is_constant()
            and not over.parameters()
            and bool(np.all(np.asarray(over.value) == 1))
        )
        factor = "" if number else "multiply(" if over.size > 1 else f"{_bracketed(over)} * "
        written = f"{factor}{f'{spelled(over)}, ' if factor == 'multiply(' else ''}inv_pos({below})"
        written += ")" if factor == "multiply(" else ""
        signed = (
            ""
            if over.is_nonneg() or over.is_nonpos()
            else f", with the sign of `{spelled(over)}` declared, as in Parameter(nonneg=True)"
        )
        return f"{text} divides by a variable. Where `{below}` is positive, write `{written}`, which is convex{signed}."
    return (
        f"{text} is a ratio of variables, which is not convex. In a constraint multiply through by the denominator where it is positive "
        f"(`{spelled(over)} <= c * {_bracketed(under)}`); in an objective that is the same for x and for 2 x, set the denominator to one by a "
        "constraint; where all variables are positive, pass gp=True if the rest is log-log convex too."
    )


def _quadratic_form(fault: Fault, e: Any) -> str | None:
    if not isinstance(e, cp.QuadForm):
        return None
    base, matrix = e.args
    text = _text(e)
    shape = tuple(matrix.shape)
    sign = "NSD" if fault.wanted == CONCAVE else "PSD"
    if isinstance(matrix, cp.Parameter):
        name = matrix.name()
        if not (matrix.is_psd() or matrix.is_nsd()):
            return f"{text}: the matrix `{name}` is not declared semidefinite. Declare it as Parameter({shape}, {sign}=True, name={name!r})."
        if fault.dpp:
            return (
                f"{text} multiplies a Parameter by two variables. Write sum_squares(L.T @ {_bracketed(base)}) with a Parameter L such that {name} = L L'; "
                "in a Minimize objective, quad_form(x, P) with a Parameter(..., PSD=True) works too."
            )
        return None
    if matrix.parameters():
        scale = (
            next((a for a in matrix.args if plain(a).size == 1), None)
            if _kind(matrix) == "multiply"
            else None
        )
        other = (
            next((a for a in matrix.args if a is not scale), None) if scale is not None else None
        )
        if scale is not None and other is not None and not other.parameters():
            outside = f"{spelled(scale)} * quad_form({spelled(base)}, {_of_matrix(other)})"
            signed = "" if scale.is_nonneg() else f", with {_names(scale)} declared nonneg=True"
            return f"{text} has a Parameter inside its matrix. Write the scale in front, `{outside}`{signed}."
        return (
            f"{text} has Parameters inside its matrix ({_names(matrix)}). Declare one Parameter({shape}, {sign}=True) for the whole matrix and {IN_TORCH}; "
            "or write a sum of quad_forms, each with its nonnegative Parameter in front."
        )
    least, most = _eigenvalues(matrix)
    wrong, size = (most, -least) if fault.wanted == CONCAVE else (-least, most)
    if wrong <= 0 or e.is_convex() or e.is_concave():
        return None
    if wrong <= ROUNDING_OF_EIGENVALUES * size:
        minus, inside = (
            ("-", f"-{_of_matrix(matrix)}") if fault.wanted == CONCAVE else ("", _of_matrix(matrix))
        )
        return (
            f"the matrix of {text} is semidefinite but for rounding (eigenvalues from {least:.2g} to {most:.2g}). Write "
            f"`{minus}quad_form({spelled(base)}, psd_wrap({inside}))`, which takes your word for it, or the factor itself: sum_squares(F @ x) for F'F."
        )
    return (
        f"the matrix of {text} is indefinite (eigenvalues from {least:.2g} to {most:.2g}), so the form is neither convex nor concave. Look for a sign; or "
        "project the matrix on the semidefinite ones before, by clipping its eigenvalues."
    )


def _of_matrix(matrix: Any) -> str:
    text = spelled(matrix)
    return "S" if text.startswith("<") else text


def _eigenvalues(matrix: Any) -> tuple[float, float]:
    """The least and the greatest; (0, 0) where they cost too much."""
    if matrix.shape[0] > LARGEST_LOOKED_AT:
        return 0.0, 0.0
    value = matrix.value
    values = np.linalg.eigvalsh(value.toarray() if sp.issparse(value) else np.asarray(value))
    return float(values[0]), float(values[-1])


def _over_a_parameter(fault: Fault, e: Any) -> str | None:
    if (
        _kind(e) not in ("quad_over_lin", "MatrixFrac")
        or not e.args[1].parameters()
        or e.args[1].variables()
    ):
        return None
    if not fault.dpp or is_scaled_squares(e):
        return None
    under = spelled(e.args[1])
    return (
        f"{_text(e)} divides by a Parameter. Declare a nonnegative Parameter r for the reciprocal, 1 / {under} computed in torch before the layer, and write "
        f"`r * sum_squares({spelled(e.args[0])})`."
        if _kind(e) == "quad_over_lin"
        else f"{_text(e)} holds the inverse of a Parameter. Declare a Parameter L with L L' its inverse, computed in torch before the layer, and write "
        f"`sum_squares(L.T @ {_bracketed(e.args[0])})`."
    )


def _sign_of_a_factor(fault: Fault, e: Any) -> str | None:
    """Something curved, multiplied by what may be negative."""
    below = next((k + 1 for k, p in enumerate(fault.path) if p is e), 0)
    if below >= len(fault.path) or not (_is_product(e) or _kind(e) == "DivExpression"):
        return None
    curved = fault.path[below]
    factor = next((plain(a) for a in e.args if a is not curved), None)
    if factor is None or factor.variables() or factor.is_nonneg() or factor.is_nonpos():
        return None
    shape = "convex" if curved.is_convex() else "concave" if curved.is_concave() else None
    if shape is None:
        return None
    if not factor.parameters():
        return f"{_text(e)} multiplies {_text(curved)}, which is {shape}, by numbers of both signs: it is {shape} for some, and not for others."
    unsigned = [p.name() for p in _parameters(factor) if not (p.is_nonneg() or p.is_nonpos())]
    declare = (
        f"Declare the sign of {quoted(unsigned)}, as in Parameter(nonneg=True), or d"
        if unsigned
        else "D"
    )
    return (
        f"{_text(e)} multiplies {_text(curved)}, which is {shape}, by Parameters of unknown sign. "
        f"{declare}eclare one Parameter(nonneg=True) for the whole factor and {IN_TORCH}."
    )


def _product_of_entries(fault: Fault, e: Any) -> str | None:
    if _kind(e) != "Prod":
        return None
    of = spelled(e.args[0])
    return (
        f"{_text(e)} is neither convex nor concave. Where the entries are positive, take `geo_mean({of})`, its root, or `sum(log({of}))`, its "
        "logarithm; or pass gp=True if the rest is log-log convex too."
    )


def _of_parameters(fault: Fault, e: Any) -> str | None:
    """DPP: what holds Parameters in a way that is not affine."""
    if not fault.dpp or e is not fault.culprit or not e.parameters():
        return None
    text, names = _text(e), _names(e)
    if _is_product(e):
        if all(a.parameters() for a in e.args):
            if e.variables():
                return (
                    f"{text} multiplies two parametrised factors ({names}). Give the inner product a variable of its own, as in z == B @ x with A @ z, "
                    "or declare one Parameter for the product and compute it in torch before the layer."
                )
            return f"{text} multiplies Parameters with each other ({names}). Declare one Parameter for the product and {IN_TORCH}."
        factor = next(a for a in e.args if a.parameters())
        signed = "" if e.args[1 if factor is e.args[0] else 0].is_affine() else "(nonneg=True)"
        return (
            f"{text} multiplies {_text(factor)}, a nonlinear function of Parameters ({names}), by a variable. Declare one Parameter{signed} for the whole "
            f"factor and {IN_TORCH}."
        )
    if _kind(e) in ("kron", "conv", "convolve"):
        return f"{text}: CVXPY takes only constants there, not {names}. Declare a Parameter for the whole matrix and build it in torch before the layer."
    if not e.variables():
        return f"{text} is a nonlinear function of Parameters alone ({names}). Declare one Parameter for its value and {IN_TORCH}."
    return None


_IDIOMS: tuple[Rule, ...] = (
    _exponent,
    _root_of_squares,
    _sum_of_squares,
    _square_over_a_variable,
    _bound_through_a_function,
    _times_logarithm,
    _log_of_exponentials,
    _root_of_a_product,
)
_ATOMS: tuple[Rule, ...] = (
    _over_a_parameter,
    _quotient,
    _quadratic_form,
    _product_of_variables,
    _product_of_entries,
    _sign_of_a_factor,
    _of_parameters,
)


# Geometric programs
# -----------------------------------------------------------------------------------------------------


def _leaf(fault: Fault, e: Any) -> str | None:
    if e is not fault.culprit or e.args:
        return None
    if isinstance(e, cp.Constant):
        where = f" in {_text(fault.parent)}" if fault.parent is not None else ""
        value = np.asarray(e.value if not sp.issparse(e.value) else e.value.toarray())
        which = "negative" if (value < 0).any() else "zero"
        return (
            f"the coefficient {_text(e)}{where} is {which}, and a geometric program takes positive ones alone. "
            f"{'Leave that term out' if which == 'zero' else 'Bring that term to the other side'}."
        )
    kind = "Variable" if isinstance(e, cp.Variable) else "Parameter"
    return (
        f"{kind} `{e.name()}` is not declared positive, and a geometric program takes positive ones alone. Declare every variable and Parameter of it with "
        f"pos=True, as in {kind}({tuple(e.shape) if e.shape else ''}{', ' if e.shape else ''}pos=True, name={e.name()!r})."
    )


def _difference(fault: Fault, e: Any) -> str | None:
    if _kind(e) != "NegExpression":
        return None
    before = fault.path[: next(k for k, p in enumerate(fault.path) if p is e)]
    inside = next((p for p in reversed(before) if _kind(p) == "AddExpression"), e)
    return (
        f"{_text(inside)} subtracts, and a posynomial has positive terms alone. Bring the term to the other side of a constraint, divide by a "
        "monomial, or write one_minus_pos(x) for 1 - x and diff_pos(x, y) for x - y."
    )


def _sum_where_a_monomial_is_wanted(fault: Fault, e: Any) -> str | None:
    if e is not fault.culprit or not e.is_log_log_convex() or fault.wanted == CONVEX:
        return None
    said = f"{_text(e)} is log-log convex, as a sum of monomials is, and "
    if fault.wanted == AFFINE:
        return (
            said
            + "an equality takes monomials on both sides. Write <=, which holds with equality where the objective presses against it."
        )
    if fault.place == "the objective":
        return (
            said
            + "Maximize takes what is log-log concave, as a monomial is. Minimise its reciprocal, or bound it from below by a variable."
        )
    return (
        said
        + "the greater side of an inequality takes what is log-log concave, as a monomial is. Divide by a monomial, or turn the inequality round."
    )


_GEOMETRIC: tuple[Rule, ...] = (_leaf, _difference, _sum_where_a_monomial_is_wanted)


# The rules themselves
# ---------------------------------------------------------------------------------------------------


def _by_the_rules(fault: Fault) -> str:
    e, parent, log_log = fault.culprit, fault.parent, "log-log " if fault.rules == DGP else ""
    text = _text(e)
    shape = _shape(fault)
    if shape is None and _kind(e) in STEP_FUNCTIONS:
        return f"{text} is a step function: it is constant but for jumps, and no derivative tells of them. Relax it, or keep it out of the layer."
    if shape is None:
        return f"{text} is neither {log_log}convex nor {log_log}concave by the rules of disciplined programming."
    outer = next((p for p in reversed(fault.path[:-1]) if _curvature(p) is not None), None)
    if outer is not None:
        return (
            f"{text} is {log_log}{shape}, and inside {_text(outer)} it must be {fault.wanted}, or no rule tells the curvature of the whole. Look for "
            "an atom for the whole; or give the inner part a variable of its own and a constraint that bounds it, if the objective presses that way."
        )
    if fault.place == "the objective":
        sense = type(fault.item).__name__
        other = "Minimize" if sense == "Maximize" else "Maximize"
        whole = "it" if parent is None else "that term"
        return (
            f"{text} is {log_log}{shape}, and in this place {sense} needs what is {log_log}{fault.wanted}. If the sign is a slip, turn it ({other}, or "
            f"the negative of {whole}); else bound {whole} by a constraint, or replace it by its linearisation at a point that Parameters give."
        )
    item = spelled(fault.item)
    if isinstance(fault.item, cp.constraints.Inequality):
        side = ("lesser", "greater")[fault.side]
        return (
            f"{text} is {log_log}{shape}, and in `{item}` an inequality needs {log_log}convex <= {log_log}concave: on the {side} side it must be "
            f"{fault.wanted}. What lies outside a convex set is none itself: turn the inequality round, or replace the term by its linearisation at a point "
            "that Parameters give."
        )
    if isinstance(fault.item, cp.constraints.Equality):
        sign = "<=" if shape == CONVEX else ">="
        return (
            f"{text} is {log_log}{shape}, and in `{item}` an equality needs {log_log}affine == {log_log}affine. A {shape} function may be bounded by an "
            f"inequality ({sign}), which holds with equality where the objective presses against it."
        )
    return f"{text} is {log_log}{shape}, and `{item}` takes affine arguments. Give it a variable of its own, bounded by it."


def _shape(fault: Fault) -> str | None:
    e = fault.culprit
    of = "is_log_log_" if fault.rules == DGP else "is_"
    return next((c for c in (CONVEX, CONCAVE) if getattr(e, of + c)()), None)


def _curvature(e: Any) -> str | None:
    """Of an atom that is curved itself."""
    curved = [c for c in (CONVEX, CONCAVE) if getattr(e, f"is_atom_{c}")()] if e.args else []
    return curved[0] if len(curved) == 1 else None

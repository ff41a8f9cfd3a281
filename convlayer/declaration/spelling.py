"""CVXPY expressions and constraints as their user spells them: `sum_squares(x)`, not
`quad_over_lin(x, 1.0, None, False)`.

CVXPY rewrites what it is given while it is given, so some spellings are lost: `x**2` and
`square(x)` are one thing, and are written the shorter way. Names of leaves are kept. A constant
without a name is written out while it is short, else by its shape. Nothing here fails, whatever the
expression, and nothing takes long: a text has at most so many atoms, and dots for the rest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import cvxpy as cp
import numpy as np
import scipy.sparse as sp

from convlayer.declaration.cvxpy_internals import Constraint

# So many atoms of an expression are written out; dots stand for the rest.
MOST_ATOMS = 60
# The characters of a short text.
SHORT_LENGTH = 60
# The significant digits of a number.
DIGITS = 4
# A constant of more entries is said by its size.
MOST_ENTRIES = 4

# How tightly a text holds together, from the loosest: what is looser than its surroundings gets
# brackets.
SUM, PRODUCT, SIGN, POWER, ATOM = range(5)

# By CVXPY's class the user's function; nothing: its argument stands alone.
NAMED = {
    "Trace": "trace",
    "Prod": "prod",
    "MatrixFrac": "matrix_frac",
    "GeoMeanApprox": "geo_mean",
    "GeoMean": "geo_mean",
    "diag_vec": "diag",
    "diag_mat": "diag",
    "Concatenate": "concatenate",
    "QuadForm": "quad_form",
    "symmetric_wrap": "",
    "hermitian_wrap": "",
    "nonneg_wrap": "",
    "nonpos_wrap": "",
    "Promote": "",
    "broadcast_to": "",
    "conj": "",
    "Hstack": "hstack",
    "Vstack": "vstack",
}
# By the user's function the attributes that are written behind the arguments, where CVXPY would
# write others.
COUNTED = {
    "sum_largest": ("k",),
    "lambda_sum_largest": ("k",),
    "huber": ("M",),
    "kron": (),
    "perspective": (),
}


def spelled(item: Any) -> str:
    """An expression, an objective, a constraint or a leaf, whole."""
    try:
        return _Speller().top(item)
    # CVXPY's expressions may be anything, and a message about one must not be lost for that
    except Exception:
        return _plainly(item)


def short(item: Any) -> str:
    """The same, cut to one short line."""
    text = spelled(item)
    return text if len(text) <= SHORT_LENGTH else f"{text[: SHORT_LENGTH - 3]}..."


def is_scaled_squares(expression: Any) -> bool:
    """It is sum_squares(...), as CVXPY keeps it."""
    return (
        isinstance(expression, cp.quad_over_lin)
        and expression.args[1].is_constant()
        and not expression.args[1].parameters()
        and bool(np.all(np.asarray(expression.args[1].value) == 1))
    )


def exponent_of(expression: Any) -> Any:
    """Of a power: the number, or the user's expression where a Parameter enters it; None of
    anything else."""
    if type(expression).__name__ not in ("Power", "PowerApprox"):
        return None
    exponent = expression.p
    return exponent if getattr(exponent, "parameters", list)() else _scalar(exponent)


def plain(expression: Any) -> Any:
    """Without what CVXPY wraps around a scalar to give it a shape."""
    while type(expression).__name__ in ("Promote", "broadcast_to", "conj", "nonneg_wrap") or (
        type(expression).__name__ == "reshape" and expression.args[0].size == 1
    ):
        expression = expression.args[0]
    return expression


class _Speller:
    """One text: it counts what it has written."""

    def __init__(self) -> None:
        self.left = MOST_ATOMS

    def top(self, item: Any) -> str:
        if isinstance(item, (cp.Minimize, cp.Maximize)):
            return f"{type(item).__name__}({self.text(item.expr)})"
        return self.constraint(item) if isinstance(item, Constraint) else self.text(item)

    def constraint(self, c: Constraint) -> str:
        if isinstance(c, (cp.constraints.Inequality, cp.constraints.Equality)):
            left, right = c.args
            sign = "<=" if isinstance(c, cp.constraints.Inequality) else "=="
            if not _varies(left) and _varies(right):  # `x >= 0` is kept as 0 <= x
                left, right, sign = right, left, sign.replace("<", ">")
            return f"{self.text(left)} {sign} {self.text(right)}"
        sign = {"PSD": ">>", "NonNeg": ">=", "NonPos": "<=", "Zero": "=="}.get(type(c).__name__, "")
        if not sign:
            return f"{type(c).__name__}({', '.join(self.text(a) for a in c.args)})"
        terms = _terms(c.args[0])
        if sign == ">>" and len(terms) == 2 and type(terms[1]).__name__ == "NegExpression":
            first, second = terms[0], terms[1].args[0]
            if not _varies(first) and _varies(second):
                return f"{self.text(second)} << {self.text(first)}"
            return f"{self.text(first)} >> {self.text(second)}"
        shown = [term for term in terms if not _is_zero(term)]
        return f"{self.text(shown[0] if len(shown) == 1 else c.args[0])} {sign} 0"

    def text(self, expression: Any, least: int = SUM) -> str:
        """In brackets where it holds together less than it must."""
        written, tightness = self.written(expression)
        return written if tightness >= least else f"({written})"

    def written(self, expression: Any) -> tuple[str, int]:
        if self.left <= 0:
            return "...", ATOM
        self.left -= 1
        expression = plain(expression)
        if isinstance(expression, (cp.Variable, cp.Parameter)):
            return expression.name(), ATOM
        if isinstance(expression, cp.Constant):
            return _number(expression)
        kind = type(expression).__name__.removesuffix("Approx")
        special: Callable[[Any], tuple[str, int]] | None = getattr(self, f"of_{kind}", None)
        return special(expression) if special is not None else self.atom(expression)

    def atom(self, expression: Any) -> tuple[str, int]:
        kind = type(expression).__name__
        name = NAMED.get(kind, kind)
        if not name:
            return self.written(expression.args[0])
        return self.call(name, expression.args, *_settings(expression)), ATOM

    def call(self, name: str, args: Sequence[Any], *rest: str) -> str:
        return f"{name}({', '.join([*(self.text(a) for a in args), *rest])})"

    def stacked(self, args: Sequence[Any]) -> str:
        return f"[{', '.join(self.text(a) for a in args)}]"

    # Sums and products
    # ------------------------------------------------------------------------------------------------

    def of_AddExpression(self, e: Any) -> tuple[str, int]:
        parts = []
        for k, term in enumerate(e.args):
            term = plain(term)
            negative = type(term).__name__ == "NegExpression" and not _renamed(term)
            inner = term.args[0] if negative else term
            text = self.text(inner, PRODUCT if negative else SUM)
            if not negative and text.startswith("-"):
                negative, text = True, text[1:]
            parts.append(
                f"{'-' if negative else ''}{text}"
                if not k
                else f" {'-' if negative else '+'} {text}"
            )
            if self.left <= 0:
                break
        return "".join(parts), SUM

    def of_NegExpression(self, e: Any) -> tuple[str, int]:
        renamed = _renamed(e)
        if renamed is not None:
            name, args, rest = renamed
            return self.call(name, args, *rest), ATOM
        return f"-{self.text(e.args[0], SIGN)}", SIGN

    def of_multiply(self, e: Any) -> tuple[str, int]:
        a, b = e.args
        inner = plain(b)
        if type(inner).__name__ in ("Pnorm", "PnormApprox") and inner.p == -1:
            return self.call("harmonic_mean", inner.args), ATOM
        if plain(a).size > 1 and inner.size > 1:
            return self.call("multiply", e.args), ATOM
        return f"{self.text(a, PRODUCT)} * {self.text(b, SIGN)}", PRODUCT

    def of_MulExpression(self, e: Any) -> tuple[str, int]:
        a, b = e.args
        if all(type(part).__name__ == "reshape" for part in e.args) and a.shape[1:] == b.shape[
            :1
        ] == (1,):
            return self.call("outer", [a.args[0], b.args[0]]), ATOM
        return f"{self.text(a, PRODUCT)} @ {self.text(b, SIGN)}", PRODUCT

    def of_DivExpression(self, e: Any) -> tuple[str, int]:
        over, under = plain(e.args[0]), plain(e.args[1])
        if under.is_constant() and not under.parameters():
            named = _moment(over, _scalar(under))
            if named is not None:
                name, inner, rest = named
                return self.call(name, [inner], *rest), ATOM
        return f"{self.text(e.args[0], PRODUCT)} / {self.text(e.args[1], SIGN)}", PRODUCT

    def of_Sum(self, e: Any) -> tuple[str, int]:
        inner = plain(e.args[0])
        if type(inner).__name__ == "multiply" and e.axis is None and not e.keepdims:
            a, b = inner.args
            if type(b).__name__ == "transpose":  # the trace of a product is kept so
                return f"trace({self.text(a, PRODUCT)} @ {self.text(b.args[0], SIGN)})", ATOM
        return self.call("sum", e.args, *_axes(e)), ATOM

    # Powers and norms
    # -------------------------------------------------------------------------------------------------

    def of_Power(self, e: Any) -> tuple[str, int]:
        exponent = exponent_of(e)
        inner = plain(e.args[0])
        if isinstance(exponent, cp.Expression):
            return f"power({self.text(e.args[0])}, {self.text(exponent)})", ATOM
        if type(inner).__name__.startswith("GeoMean") and exponent == -inner.args[0].size:
            return self.call("inv_prod", inner.args), ATOM
        name = {2.0: "square", 0.5: "sqrt", -1.0: "inv_pos"}.get(exponent)
        return self.call(name, e.args) if name else self.call(
            "power", e.args, _figure(exponent)
        ), ATOM

    def of_Pnorm(self, e: Any) -> tuple[str, int]:
        inner, p = e.args[0], float(e.p)
        rest = _axes(e)
        if (
            type(inner).__name__ == "reshape"
            and inner.args[0].ndim == 2
            and inner.ndim == 1
            and p == 2
        ):
            return self.call("norm", inner.args, "'fro'"), ATOM
        return self.call("norm", [inner], *rest) if p == 2 else self.call(
            "pnorm", [inner], _figure(p), *rest
        ), ATOM

    def of_quad_over_lin(self, e: Any) -> tuple[str, int]:
        if is_scaled_squares(e):
            return self.call("sum_squares", e.args[:1], *_axes(e)), ATOM
        return self.call("quad_over_lin", e.args, *_axes(e)), ATOM

    def of_maximum(self, e: Any) -> tuple[str, int]:
        if len(e.args) == 2 and _is_zero(e.args[1]):
            return self.call("pos", e.args[:1]), ATOM
        return self.call("maximum", e.args), ATOM

    # Shapes
    # -----------------------------------------------------------------------------------------------------------

    def of_index(self, e: Any) -> tuple[str, int]:
        shape = e.args[0].shape
        keys = [_slice(key, size) for key, size in zip(e.key, shape, strict=True)]
        return f"{self.text(e.args[0], ATOM)}[{', '.join(keys)}]", ATOM

    def of_special_index(self, e: Any) -> tuple[str, int]:
        keys = e.key if isinstance(e.key, tuple) else (e.key,)
        words = []
        for key in keys:
            if key is None or key is Ellipsis:
                words.append("None" if key is None else "...")
            elif isinstance(key, slice):
                words.append(_slice(key, -1))
            else:
                array = np.asarray(key)
                words.append(
                    str(array.tolist()) if array.size <= MOST_ENTRIES else f"<{array.size} entries>"
                )
        return f"{self.text(e.args[0], ATOM)}[{', '.join(words)}]", ATOM

    def of_transpose(self, e: Any) -> tuple[str, int]:
        return f"{self.text(e.args[0], ATOM)}.T", ATOM

    def of_reshape(self, e: Any) -> tuple[str, int]:
        if e.shape == (e.args[0].size,):
            return (
                (self.call("vec", e.args), ATOM) if e.args[0].ndim > 1 else self.written(e.args[0])
            )
        return self.call("reshape", e.args, str(tuple(e.shape)).replace(" ", "")), ATOM

    def of_Hstack(self, e: Any) -> tuple[str, int]:
        return f"hstack({self.stacked(e.args)})", ATOM

    def of_Vstack(self, e: Any) -> tuple[str, int]:
        if e.args and all(type(a).__name__ == "Hstack" for a in e.args):
            return f"bmat([{', '.join(self.stacked(a.args) for a in e.args)}])", ATOM
        return f"vstack({self.stacked(e.args)})", ATOM

    def of_diag_vec(self, e: Any) -> tuple[str, int]:
        inner = e.args[0]
        return self.call("diag", inner.args if type(inner).__name__ == "reshape" else [inner]), ATOM


def _varies(expression: Any) -> bool:
    """It has variables; CVXPY's own list of them visits what is shared again and again."""
    seen, left = set(), [expression]
    while left:
        e = left.pop()
        if isinstance(e, cp.Variable):
            return True
        if id(e) not in seen:
            seen.add(id(e))
            left += e.args
    return False


def _renamed(e: Any) -> tuple[str, Sequence[Any], Sequence[str]] | None:
    """What is written with a minus by CVXPY alone: (function, arguments, settings)."""
    if type(e).__name__ != "NegExpression":
        return None
    inner = plain(e.args[0])
    kind = type(inner).__name__
    if kind == "minimum" and len(inner.args) == 2 and _is_zero(inner.args[1]):
        return "neg", inner.args[:1], ()
    opposite = {
        "sum_largest": "sum_smallest",
        "lambda_max": "lambda_min",
        "lambda_sum_largest": "lambda_sum_smallest",
    }.get(kind)
    argument: Any = plain(inner.args[0]) if opposite else None
    if opposite and type(argument).__name__ == "NegExpression":
        return opposite, argument.args, _settings(inner)
    return None


def _moment(over: Any, count: float) -> tuple[str, Any, Sequence[str]] | None:
    """Mean, variance or standard deviation: (function, of what, settings)."""
    kind = type(over).__name__
    if kind == "Sum" and over.size * count == over.args[0].size:
        return "mean", over.args[0], _axes(over)
    inner: Any = plain(over.args[0]) if over.args else None
    if kind == "sum_largest" and count == over.k:
        return "cvar", over.args[0], (_figure(1 - count / over.args[0].size),)
    if kind in ("quad_over_lin", "PnormApprox", "Pnorm") and type(inner).__name__ in (
        "AddExpression",
        "reshape",
    ):
        centred = inner.args[0] if type(inner).__name__ == "reshape" else inner
        terms = _terms(centred)
        if len(terms) == 2 and type(plain(terms[1])).__name__ == "NegExpression":
            mean = plain(plain(terms[1]).args[0])
            if type(mean).__name__ == "DivExpression" and plain(mean.args[0]).args[0] is terms[0]:
                return ("var" if kind == "quad_over_lin" else "std"), terms[0], ()
    return None


def _terms(expression: Any) -> list[Any]:
    return list(expression.args) if type(expression).__name__ == "AddExpression" else [expression]


def _settings(e: Any) -> list[str]:
    words = [
        _figure(_scalar(getattr(e, name)))
        for name in COUNTED.get(type(e).__name__, ())
        if hasattr(e, name)
    ]
    words = [word for word in words if not (type(e).__name__ == "huber" and word == "1")]
    return words + _axes(e)


def _axes(e: Any) -> list[str]:
    axis, keep = getattr(e, "axis", None), getattr(e, "keepdims", False)
    words = [f"axis={axis}"] if axis is not None and len(e.args[0].shape) > 1 else []
    return words + (["keepdims=True"] if keep is True else [])


def _slice(key: Any, size: int) -> str:
    if not isinstance(key, slice):
        return str(key)
    start, stop, step = key.start or 0, key.stop, key.step or 1
    if start == 0 and stop in (None, size) and step == 1:
        return ":"
    if step == 1 and stop is not None and stop - start == 1 and size >= 0:
        return str(start)
    words = f"{start or ''}:{'' if stop in (None, size) else stop}"
    return words if step == 1 else f"{words}:{step}"


def _is_zero(expression: Any) -> bool:
    inner = plain(expression)
    if type(inner).__name__ == "NegExpression":
        inner = plain(inner.args[0])
    return isinstance(inner, cp.Constant) and bool(np.all(_array(inner) == 0))


def _scalar(value: Any) -> float:
    """A number, or a constant expression that holds one."""
    return float(np.asarray(getattr(value, "value", value)))


def _array(constant: Any) -> np.ndarray:
    value = constant.value
    return value.toarray() if sp.issparse(value) else np.asarray(value)


def _number(constant: Any) -> tuple[str, int]:
    """A constant: by its name, its digits, or its shape."""
    # Without a name of its own CVXPY prints the numbers, which takes long where they are many.
    name = getattr(constant, "_name", None) or ""
    if name.isidentifier():
        return name, ATOM
    shape = tuple(constant.shape)
    if math.prod(shape) <= 10_000 and math.prod(shape) > 0:
        array = _array(constant)
        if bool((array == array.flat[0]).all()):
            text = _figure(array.flat[0])
            return text, SIGN if text.startswith("-") else ATOM
        if array.size <= MOST_ENTRIES and array.ndim == 1:
            return f"[{', '.join(_figure(v) for v in array.tolist())}]", ATOM
        if (
            array.ndim == 2
            and array.shape[0] == array.shape[1]
            and bool((array == np.eye(len(array))).all())
        ):
            return f"eye({len(array)})", ATOM
    return f"<constant of shape {shape}>", ATOM


def _figure(value: Any) -> str:
    return f"{value:.{DIGITS}g}"


def _plainly(item: Any) -> str:
    """What can be said of anything."""
    shape = getattr(item, "shape", None)
    return type(item).__name__ + (f" of shape {tuple(shape)}" if isinstance(shape, tuple) else "")

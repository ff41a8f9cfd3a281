"""A name for a declaration that is its content: the same in every process and on every machine, for
equal declarations alone.

The digest of a node of the expression graph is made of its type, its attributes and the digests of
what it holds. Parameters count by their place among the layer's, variables by their first
appearance, constants by their bytes; names, labels, values and CVXPY's numbers do not count. Every
node is read once, however often it is shared, and without recursion. What cannot be read as content
(an atom or a solver of the user's own, a callback) makes the declaration unlike any other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any
from uuid import uuid4

import cvxpy as cp
import numpy as np
import scipy.sparse as sp

from convlayer.declaration.cvxpy_internals import Leaf, Objective

# The number of this way of reading: what is read otherwise is to get other names.
FORMAT = 1
# What is read as a node of the graph, by its type, its attributes and its arguments.
NODES = (cp.Expression, cp.Constraint, Objective)
# Attributes of a node that are no content: what CVXPY numbers, derives from the rest, or found out
# before.
PASSING = frozenset(
    ("args", "id", "constr_id", "dual_variables", "_label", "_expr", "approx_error")
)
# How the names of attributes begin in which CVXPY keeps what it has worked out.
LAZY = ("_lazy", "_cached")


class UnreadableError(Exception):
    """An object that has no content to be read."""


def digest(*parts: Any) -> str:
    """Of plain values: numbers, strings, arrays and containers of them."""
    try:
        return hashlib.sha256(_encoded(list(parts), {})).hexdigest()[:32]
    except UnreadableError:
        return uuid4().hex


def digest_of_declaration(
    problem: cp.Problem,
    parameters: Sequence[cp.Parameter],
    variables: Sequence[cp.Variable],
    gp: bool,
) -> str:
    """Of the problem, the order of its parameters, and what is returned of its solution."""
    try:
        reader = _Reader(parameters)
        roots = [problem.objective, *problem.constraints]
        whole = [reader.read(root) for root in roots]
        ends = [_output(variable, problem, reader) for variable in variables]
        return digest(FORMAT, gp, whole, [reader.read(parameter) for parameter in parameters], ends)
    except UnreadableError:
        return uuid4().hex


def _output(variable: cp.Variable, problem: cp.Problem, reader: _Reader) -> Any:
    """A variable of the problem, or a multiplier by the place of its constraint."""
    for k, constraint in enumerate(problem.constraints):
        for place, dual in enumerate(constraint.dual_variables):
            if dual is variable:
                return "multiplier", k, place
    return "variable", reader.read(variable)


class _Reader:
    """The digests of nodes, each made once."""

    def __init__(self, parameters: Sequence[cp.Parameter]) -> None:
        self._done: dict[int, bytes] = {}
        self._numbers = {id(parameter): k for k, parameter in enumerate(parameters)}

    def read(self, root: Any) -> bytes:
        stack = [root]
        while stack:
            node = stack[-1]
            waiting = (
                []
                if id(node) in self._done
                else [c for c in _nodes(_content(node)) if id(c) not in self._done]
            )
            if waiting:
                stack.extend(reversed(waiting))
                continue
            stack.pop()
            if id(node) not in self._done:
                self._done[id(node)] = hashlib.sha256(self._record(node)).digest()
        return self._done[id(root)]

    def _record(self, node: Any) -> bytes:
        kind = type(node)
        if not kind.__module__.startswith("cvxpy."):
            raise UnreadableError(kind)
        number = None
        if isinstance(node, (cp.Variable, cp.Parameter)):
            number = self._numbers.setdefault(id(node), len(self._numbers))
        shape = getattr(node, "shape", None)
        return _encoded(
            [f"{kind.__module__}.{kind.__qualname__}", number, shape, _content(node)], self._done
        )


def _content(node: Any) -> Any:
    """What a node holds besides its type, nodes among it."""
    if isinstance(node, cp.CallbackParam):
        raise UnreadableError(type(node))
    if isinstance(node, cp.Constant):
        return node.value
    if isinstance(node, Leaf):
        return node.attributes, node.bounds
    own = {
        name: value
        for name, value in vars(node).items()
        if name not in PASSING and not _is_cache(name)
    }
    return node.args, own


def _is_cache(name: str) -> bool:
    return name.startswith(LAZY) or name.endswith("__cache__")


def _nodes(value: Any) -> Iterator[Any]:
    if isinstance(value, NODES):
        yield value
    elif isinstance(value, dict):
        for key, part in value.items():
            yield from _nodes(key)
            yield from _nodes(part)
    elif isinstance(value, (list, tuple, set, frozenset)):
        for part in value:
            yield from _nodes(part)


def _encoded(value: Any, done: dict[int, bytes]) -> bytes:
    """A value as bytes that no other value has; nodes by their digests."""
    if isinstance(value, NODES):
        return _framed(b"node", done[id(value)])
    if isinstance(value, np.generic):
        value = value.item()
    if (
        value is None
        or value is Ellipsis
        or isinstance(value, (bool, int, float, complex, str, bytes, Fraction))
    ):
        return _framed(type(value).__name__.encode(), repr(value).encode())
    if sp.issparse(value):
        return _framed(b"sparse", *_sparse(value))
    if isinstance(value, np.ndarray):
        return _framed(b"array", *_array(value))
    if isinstance(value, (list, tuple)):
        return _framed(b"list", *(_encoded(part, done) for part in value))
    if isinstance(value, (set, frozenset)):
        return _framed(b"set", *sorted(_encoded(part, done) for part in value))
    if isinstance(value, dict):
        return _framed(b"dict", *sorted(_encoded([key, part], done) for key, part in value.items()))
    if isinstance(value, slice):
        return _framed(b"slice", _encoded([value.start, value.stop, value.step], done))
    raise UnreadableError(type(value))


def _framed(kind: bytes, *parts: bytes) -> bytes:
    return b"".join([kind, b"(", *(b"%d:%b" % (len(part), part) for part in parts), b")"])


def _array(value: np.ndarray) -> tuple[bytes, bytes, bytes]:
    """Kind, shape and bytes; integers as the floating-point numbers that CVXPY makes of them."""
    if value.dtype.kind not in "biufc":
        raise UnreadableError(value.dtype)
    kind = "<c16" if value.dtype.kind == "c" else "<f8"
    return (
        kind.encode(),
        repr(value.shape).encode(),
        np.ascontiguousarray(value).astype(kind).tobytes(),
    )


def _sparse(value: Any) -> tuple[bytes, ...]:
    matrix = sp.coo_array(value, copy=True)
    matrix.sum_duplicates()
    where = [part for index in matrix.coords for part in _array(np.asarray(index))]
    return repr(matrix.shape).encode(), *where, *_array(matrix.data)

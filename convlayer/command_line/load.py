"""A layer out of a Python file, for the command line."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import cvxpy as cp

from convlayer.declaration.diagnose import ProblemError
from convlayer.declaration.reductions import CanonicalisationError
from convlayer.layer import ConvexLayer
from convlayer.problems import Declared

WANTED = "a cvxpy.Problem, a ConvexLayer, or a function of no arguments that returns one of them or (problem, parameters, variables)"


class LoadError(Exception):
    """What is wrong with FILE:PROBLEM, in one message."""


def load_layer(
    target: str,  # FILE:PROBLEM
) -> ConvexLayer:
    """The layer of the object PROBLEM in FILE; of a problem alone, with all its parameters and
    variables."""
    path, colon, name = target.rpartition(":")
    if not (colon and path and name):
        raise LoadError(f"Expected FILE:PROBLEM, such as model.py:problem; got {target!r}.")
    module = _module(Path(path))
    found = vars(module).get(name)
    if found is None:
        public = [
            key
            for key, value in vars(module).items()
            if not key.startswith("_") and _is_candidate(value, module)
        ]
        raise LoadError(
            f"{path} defines no `{name}`. It defines: {', '.join(public) or 'nothing that could be one'}."
        )
    if callable(found) and not isinstance(found, ConvexLayer):
        try:
            found = found()
        except Exception as error:
            raise LoadError(f"`{name}()` failed: {type(error).__name__}: {error}") from error
    try:
        return _layer(found, name)
    except (ProblemError, CanonicalisationError) as error:
        raise LoadError(str(error)) from error


def _module(path: Path) -> ModuleType:
    if not path.is_file():
        raise LoadError(f"There is no file {path}.")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise LoadError(f"{path} is not a Python file.")
    module = importlib.util.module_from_spec(spec)
    # as for a script, which may import its neighbours
    sys.path.insert(0, str(path.parent.resolve()))
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise LoadError(f"{path} could not be run: {type(error).__name__}: {error}") from error
    finally:
        sys.path.pop(0)
    return module


def _is_candidate(value: Any, module: ModuleType) -> bool:
    return (
        isinstance(value, (cp.Problem, ConvexLayer))
        or getattr(value, "__module__", None) == module.__name__
    )


def _layer(found: Any, name: str) -> ConvexLayer:
    if isinstance(found, ConvexLayer):
        return found
    if isinstance(found, cp.Problem):
        return _of_parts(found, found.parameters(), found.variables())
    if isinstance(found, Declared):
        return _of_parts(found.problem, found.parameters, found.variables)
    if isinstance(found, tuple) and len(found) == 3 and isinstance(found[0], cp.Problem):
        return _of_parts(*found)
    raise LoadError(f"`{name}` is a {type(found).__name__}; expected {WANTED}.")


def _of_parts(problem: cp.Problem, parameters: Any, variables: Any) -> ConvexLayer:
    return ConvexLayer(problem, parameters, variables, gp=problem.is_dgp() and not problem.is_dcp())

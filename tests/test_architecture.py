"""The rooms of the library, and what may be imported from where."""

import ast
from pathlib import Path

import pytest

import convlayer

ROOT = Path(convlayer.__file__).parent
# From the bottom up; a room imports from the levels below its own, and from itself.
LEVELS = (
    {"memo", "registry", "core"},
    {"cones", "autodiff", "solution", "shifts", "display", "notices", "progress"},
    {"conic", "kernels"},
    {"solvers"},
    {"declaration"},
    {"structures"},
    {"paths"},
    {"report"},
    {"layer"},
    {"compat", "problems", "__init__"},
    {"command_line"},
    {"__main__"},
)
# Modules at the bottom stand on these.
AMONG_EACH_OTHER = {("solution", "shifts"), ("solution", "display")}
# Where a problem is read or declared. Elsewhere it is a program, or tensors.
KNOW_CVXPY = {
    "declaration",
    "structures",
    "paths",
    "report",
    "layer",
    "compat",
    "command_line",
    "problems",
}
INTERNALS = {"cvxpy": "declaration/cvxpy_internals.py", "torch": "autodiff/torch_internals.py"}
FILES = sorted(
    path for path in ROOT.rglob("*.py") if "problems" not in path.relative_to(ROOT).parts
)


def name(path):
    return str(path.relative_to(ROOT))


def room(path):
    first = path.relative_to(ROOT).parts[0]
    return first.removesuffix(".py")


def node_name(node):
    return getattr(node, "name", "")


def imported(tree):
    """(module, name or None, node) of each import."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None, node) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.module, alias.name, node) for alias in node.names)


def rooms_of(tree):
    """The rooms that a module imports from."""
    for module, what, _ in imported(tree):
        parts = module.split(".")
        if parts[0] == "convlayer":
            yield (
                parts[1]
                if len(parts) > 1
                else what
                if (ROOT / f"{what}.py").exists() or (ROOT / what).is_dir()
                else "__init__"
            )


def level(of):
    return next(k for k, rooms in enumerate(LEVELS) if of in rooms)


@pytest.fixture(scope="module")
def trees():
    return {path: ast.parse(path.read_text()) for path in FILES}


def test_every_module_is_in_a_room_that_has_its_place(trees):
    assert {room(path) for path in trees} | {"problems"} == set().union(*LEVELS)


def test_imports_go_downwards(trees):
    wrong = [
        f"{name(path)} imports from {other}"
        for path, tree in trees.items()
        for other in rooms_of(tree)
        if other != room(path)
        and level(other) >= level(room(path))
        and (room(path), other) not in AMONG_EACH_OTHER
    ]
    assert not wrong


def test_rooms_import_each_other_in_no_circle(trees):
    above = {
        of: {other for path, tree in trees.items() if room(path) == of for other in rooms_of(tree)}
        - {of}
        for of in set().union(*LEVELS)
    }
    left = set(above)
    while left:
        free = {of for of in left if not above[of] & left}
        assert free, f"a circle among {sorted(left)}"
        left -= free


def test_only_rooms_that_read_problems_import_cvxpy(trees):
    wrong = {
        name(path)
        for path, tree in trees.items()
        for module, _, _ in imported(tree)
        if module.split(".")[0] == "cvxpy" and room(path) not in KNOW_CVXPY
    }
    assert not wrong


def test_cvxpy_is_entered_in_one_place(trees):
    inside = {
        name(path)
        for path, tree in trees.items()
        for module, what, _ in imported(tree)
        if module.startswith("cvxpy.")
    }
    assert inside <= {INTERNALS["cvxpy"]}


def test_torch_is_entered_in_one_place(trees):
    inside = set()
    for path, tree in trees.items():
        for node in ast.walk(tree):
            if (
                isinstance(node, ast.Attribute)
                and node.attr.startswith("_")
                and not node.attr.startswith("__")
            ):
                base = ast.unparse(node.value)
                if base.split(".")[0] in ("torch", "forward_ad") or node.attr in (
                    "_version",
                    "_is_view",
                ):
                    inside.add(name(path))
    assert inside <= {INTERNALS["torch"]}


def test_no_import_stands_inside_a_function(trees):
    wrong = [
        f"{name(path)}, {function.name}"
        for path, tree in trees.items()
        for function in ast.walk(tree)
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef))
        for node in ast.walk(function)
        if isinstance(node, (ast.Import, ast.ImportFrom))
    ]
    assert not wrong


def test_no_two_public_names_of_the_library_collide(trees):
    """But for a command's `main`, and the exceptions of the drop-in, whose names are another
    library's."""
    homes: dict[str, list[str]] = {}
    for path, tree in trees.items():
        for node in tree.body:
            if name(path) == "compat.py" and node_name(node).endswith("Error"):
                continue
            if (
                isinstance(node, (ast.FunctionDef, ast.ClassDef))
                and not node.name.startswith("_")
                and node.name != "main"
            ):
                homes.setdefault(node.name, []).append(name(path))
    twice = {public: places for public, places in homes.items() if len(places) > 1}
    assert not twice


def test_the_front_door_reads_on_a_few_pages():
    assert len((ROOT / "layer.py").read_text().splitlines()) < 350

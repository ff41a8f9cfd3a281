"""What the documents show runs: the code of every page, the examples; and what they name is
there."""

import ast
import re
import tomllib
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").glob("*.md"))
DOCUMENTS = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in (*ROOT.glob("*.md"), *PAGES, *(ROOT / ".github").glob("**/*.md"))
}
# documents whose code has a test of its own
BY_NAME = (
    "README.md",
    "docs/layers.md",
    "docs/promises.md",
)


def blocks(document: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", DOCUMENTS[document], re.DOTALL | re.MULTILINE)


def run(document: str) -> dict:
    """All Python code of a document in the order in which it stands there, as a reader would copy
    it; the names it leaves."""
    names: dict = {}
    with torch.random.fork_rng(devices=[]):
        exec(compile("\n".join(blocks(document, "python")), document, "exec"), names)
    return names


def test_the_readmes_code_prints_what_stands_below_it(capsys):
    names = run("README.md")
    assert names["x_star"].shape == (32, 5)
    assert names["lam_t"].grad.shape == ()
    (promised,) = blocks("README.md", "text")
    number = re.compile(r"\d+\.\d+(e[+-]\d+)?")  # rounding is not the same on every processor
    assert number.sub("#", capsys.readouterr().out) == number.sub("#", promised)


def test_the_code_that_declares_a_layer_does_what_its_comments_say(capsys):
    names = run("docs/layers.md")
    assert names["x_star"].shape == (32, 5)
    assert names["lam_t"].grad.shape == ()
    assert (names["solution"].status == 0).all()
    assert names["layer"].structure == "least_squares"
    printed = capsys.readouterr().out
    assert "least_squares: yes" in " ".join(printed.split())
    assert "agree." in printed


def test_the_recipe_for_rows_that_fail_learns_from_the_others():
    names = run("docs/promises.md")
    gradient = names["net"].weight.grad
    assert names["solved"].tolist() == [True, False]
    assert torch.isfinite(gradient).all()
    assert gradient.abs().max() > 0


@pytest.mark.parametrize(
    "document", [name for name in DOCUMENTS if name not in BY_NAME and blocks(name, "python")]
)
def test_the_code_of_every_document_runs(document):
    assert run(document)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_files_that_a_document_names_are_there(document):
    named = re.findall(
        r"`((?:convlayer|problems|tests|examples|benchmarks|docs)/[\w./-]*)`", DOCUMENTS[document]
    )
    assert not [name for name in named if not (ROOT / name).exists()]


def anchors(path: Path) -> set[str]:
    """The headings of a document as a link names them."""
    headings = (
        re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE) if path.suffix == ".md" else []
    )
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(document: str) -> list[tuple[Path, str]]:
    """The files that a document links to, and the place in each."""
    targets = re.findall(r"\]\(([^)\s]+)\)", DOCUMENTS[document])
    parts = [target.partition("#") for target in targets if "://" not in target]
    here = ROOT / document
    return [((here.parent / path).resolve() if path else here, anchor) for path, _, anchor in parts]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_link_leads_somewhere(document):
    for path, anchor in links(document):
        assert path.exists(), path
        assert not anchor or anchor in anchors(path), (path, anchor)


def test_the_readme_leads_to_every_page():
    assert PAGES
    assert set(PAGES) <= {path for path, _ in links("README.md")}


def test_the_citation_names_the_version():
    (version,) = re.findall(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert version == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


def tables():
    """The modules that the architecture names, by room, in their order; those at the top level
    under None."""
    found = {}
    for table in re.split(r"\n\n", DOCUMENTS["docs/architecture.md"]):
        if table.startswith("|"):
            heading = re.match(r"\| `convlayer/(\w+)/`", table)
            found.setdefault(heading and heading[1], []).extend(re.findall(r"`(\w+)\.py`", table))
    return found


def in_room(module):
    """The other modules of its room, or of the top level, that a module imports."""
    package = ".".join(("convlayer", *module.relative_to(ROOT / "convlayer").parts[:-1]))
    for statement in ast.parse(module.read_text()).body:
        if isinstance(statement, ast.ImportFrom) and (statement.module or "").startswith(package):
            inside = statement.module.removeprefix(package).strip(".").split(".")[0]
            yield from [inside] if inside else [name.name for name in statement.names]


def test_every_module_has_its_place_in_the_architecture():
    named, rooms = (
        tables(),
        [
            path
            for path in (ROOT / "convlayer").iterdir()
            if (path / "__init__.py").exists() and path.name != "problems"
        ],
    )
    assert named.keys() == {None} | {room.name for room in rooms if room.name != "command_line"}
    everything = {module for modules in named.values() for module in modules}
    for room in rooms:
        modules = {path.stem for path in room.glob("*.py")} - {"__init__"}
        one_a_file = {"cones", "kernels", "solvers", "structures"}
        assert modules <= set(named.get(room.name, everything)) or room.name in one_a_file, (
            room.name
        )
        assert set(named.get(room.name, ())) <= modules, room.name
    assert {path.stem for path in (ROOT / "convlayer").glob("*.py")} - {"__init__"} <= set(
        named[None]
    )


@pytest.mark.parametrize("room", [room for room in tables() if room])
def test_modules_are_named_after_those_that_they_import(room):
    order = tables()[room]
    later = [
        (module, other)
        for k, module in enumerate(order)
        for other in in_room(ROOT / "convlayer" / room / f"{module}.py")
        if other in order[k + 1 :]
    ]
    assert not later


def test_the_example_learns_and_checks_its_gradient(run_example, tmp_path):
    pytest.importorskip("sklearn", reason="the example's data come with scikit-learn")
    assert "gradient check passed" in run_example("demo")
    assert (tmp_path / "out" / "demo.png").stat().st_size > 10_000


def test_the_sudoku_example_runs(run_example, tmp_path):
    for needed in ("matplotlib", "tqdm"):
        pytest.importorskip(needed, reason="the example draws a picture and shows its progress")
    assert "quadratic program, 40 learnt constraints" in run_example("sudoku", "--quick")
    assert (tmp_path / "out" / "sudoku.png").stat().st_size > 10_000

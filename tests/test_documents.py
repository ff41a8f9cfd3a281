"""What the documents show runs: the code of every page, the examples; and what they name is there."""

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
BY_NAME = ("README.md", "docs/layers.md", "docs/promises.md")  # documents whose code has a test of its own


def blocks(document: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", DOCUMENTS[document], re.DOTALL | re.MULTILINE)


def run(document: str) -> dict:
    """All Python code of a document in the order in which it stands there, as a reader would copy it; the names it leaves."""
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


@pytest.mark.parametrize("document", [name for name in DOCUMENTS if name not in BY_NAME and blocks(name, "python")])
def test_the_code_of_every_document_runs(document):
    assert run(document)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_files_that_a_document_names_are_there(document):
    named = re.findall(r"`((?:convlayer|problems|tests|examples|benchmarks|docs)/[\w./-]*)`", DOCUMENTS[document])
    assert not [name for name in named if not (ROOT / name).exists()]


def anchors(path: Path) -> set[str]:
    """The headings of a document as a link names them."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE) if path.suffix == ".md" else []
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


def test_every_module_has_its_place_in_the_architecture():
    named = set(re.findall(r"`(?:convlayer/)?([\w/]+\.py)`", DOCUMENTS["docs/architecture.md"]))
    modules = {path.name for path in (ROOT / "convlayer").glob("*.py")} - {"__init__.py"}
    assert modules <= named
    assert named - modules <= {path.name for path in (ROOT / "convlayer").glob("*/*.py")}


def imported(module):
    """What a module of the package, or the modules of a folder of it, import from it when they are loaded."""
    folder = ROOT / "convlayer" / module
    for path in folder.glob("*.py") if folder.is_dir() else [folder.with_suffix(".py")]:
        for statement in ast.parse(path.read_text()).body:
            if isinstance(statement, ast.ImportFrom) and statement.module.split(".")[0] == "convlayer":
                inside = statement.module.split(".")[1:2]
                yield from inside or [name.name for name in statement.names]


def test_imports_run_in_the_order_in_which_modules_are_to_be_read():
    text = DOCUMENTS["CONTRIBUTING.md"]
    (listed,) = re.findall(r"in the order of the imports:(.*?)Imports run", text, re.DOTALL)
    order = re.findall(r"`(\w+)`", listed)
    assert len(order) == len(set(order)) > 40
    later = [(a, b) for k, a in enumerate(order) for b in imported(a) if b in order[k + 1 :]]
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

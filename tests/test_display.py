"""What stands at a prompt and in a notebook: short, in words, and whole in HTML."""

import re
from dataclasses import replace

import cvxpy as cp
import numpy as np
import pytest
import torch

import convlayer
from convlayer import Check, ConvexLayer, Solution, Verification, problems


def bounded(**options):
    """Infeasible where the parameter is above one."""
    x, low = cp.Variable(2, name="x"), cp.Parameter(2, name="low")
    return ConvexLayer(
        cp.Problem(cp.Minimize(cp.sum_squares(x)), [x >= low, x <= 1]), [low], [x], **options
    )


LOWS = torch.tensor([[0.5, 0.2], [2.0, 0.1], [0.9, 0.4], [3.0, 0.0]], dtype=torch.float64)


def test_a_solution_tells_statuses_by_name_counts_and_shapes():
    solution = bounded(on_failure="nan").solve(LOWS)
    text = repr(solution)
    assert text.startswith(
        "Solution of 4 rows: 2 SOLVED, 2 INFEASIBLE; variables (4, 2); objective 0.29 to 0.97"
    )
    assert len(text) < 300
    assert "tensor" not in text
    assert solution.statuses.tolist() == ["SOLVED", "INFEASIBLE", "SOLVED", "INFEASIBLE"]
    assert np.array_equal(solution.statuses == "SOLVED", solution.solved.numpy())


@pytest.mark.parametrize(
    ("shape", "words"),
    [((), "one instance: 1 SOLVED"), ((2, 3), "2 x 3 rows: 6 SOLVED"), ((0,), "0 rows: none")],
)
def test_so_it_does_for_every_batch_shape(shape, words):
    solution = bounded().solve(torch.zeros(*shape, 2, dtype=torch.float64))
    assert repr(solution).startswith(f"Solution of {words}")
    assert solution.statuses.shape == shape
    assert solution.solved.shape == shape
    assert solution._repr_html_().count("<tr>") == 1 + int(np.prod(shape))


def test_a_long_batch_is_cut_short_in_html_and_its_notes_are_told():
    solution = replace(
        bounded(on_failure="nan").solve(LOWS.repeat(10, 1)), notes=("row 1: took <another> way",)
    )
    html = solution._repr_html_()
    assert "and 30 more" in html
    assert "row 1: took &lt;another&gt; way" in html
    assert repr(solution).splitlines()[1] == "  row 1: took <another> way"


def test_a_check_and_a_verification_are_short_and_whole_in_html():
    layer = bounded()
    check, verification = layer.check(LOWS[::2]), layer.verify(LOWS[::2])
    assert isinstance(check, Check)
    assert isinstance(verification, Verification)
    assert repr(check).startswith("Check of 2 rows: 2 SOLVED; 2 differentiable; margin ")
    for shown in (check, verification):
        assert len(repr(shown)) < 400
        assert "tensor(" not in repr(shown)
        html = shown._repr_html_()
        assert re.fullmatch(r"<pre>.*</pre>", html, re.DOTALL)
        assert str(shown).splitlines()[0].replace("<", "&lt;").replace(">", "&gt;")[
            :40
        ] in html.replace("&#x27;", "'")


def test_an_explanation_is_a_string_that_prompts_show_as_it_prints():
    report = bounded().explain(batch=3)
    assert repr(report) == str(report)
    assert isinstance(report, str)
    assert report._repr_html_().startswith("<pre>Path: ")


def test_what_a_layer_offers_is_what_its_documentation_names():
    own = {name for name in vars(ConvexLayer) if not name.startswith("_")}
    assert own == {
        "forward",
        "solve",
        "verify",
        "check",
        "explain",
        "with_options",
        "forget",
        "extra_repr",
    }
    assert {"Check", "Verification", "Solution"} <= set(convlayer.__all__)


def test_the_table_of_problems_is_what_its_types_promise():
    assert all(getattr(problems, name) is problem for name, problem in problems.PROBLEMS.items())
    assert isinstance(
        problems.ridge.layer(3, 2).solve(*problems.ridge.sample(4, 0, 3, 2)), Solution
    )

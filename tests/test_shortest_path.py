"""The example of shortest paths: the exact gradient says nothing, the others learn."""

from pathlib import Path

import pytest
import torch

from convlayer import Cause, GradientWarning

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(scope="module")
def example():
    pytest.importorskip("matplotlib", reason="the example draws a picture")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        import shortest_path

        yield shortest_path


@pytest.fixture(scope="module")
def compared(example):
    with pytest.warns(GradientWarning) as caught:
        unseen, fixed, learnt = example.compare(seed=0, steps=30)
    return (
        unseen,
        fixed,
        learnt,
        [warning for warning in caught if warning.category is GradientWarning],
    )


def test_the_layers_paths_are_those_of_dynamic_programming(example):
    costs = torch.randn(
        20, len(example.STREETS), dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    for row, found in zip(
        costs.tolist(), (costs * example.paths(costs)).sum(1).tolist(), strict=True
    ):
        least = {(0, 0): 0.0}
        for cost, (start, end) in sorted(
            zip(row, example.STREETS, strict=True), key=lambda street: sum(street[1][0])
        ):
            least[end] = min(least.get(end, float("inf")), least[start] + cost)
        assert found == pytest.approx(
            least[example.SIDE - 1, example.SIDE - 1], rel=1e-12, abs=1e-12
        )


def test_the_exact_gradient_does_not_move_the_model_and_the_layer_says_so_once(compared):
    _, fixed, learnt, warned = compared
    start = fixed["random start"]
    # Adam moves by its rate for any gradient that is far above its epsilon of 1e-8, so this is a
    # gradient of rounding error.
    assert (learnt["exact"].model - start).abs().max() < 1e-6
    assert [w.message.cause for w in warned if w.message.cause is Cause.ZERO] == [Cause.ZERO]


@pytest.mark.parametrize("kind", ["smoothed", "lpgd", "perturbed", "blackbox"])
def test_the_other_gradients_learn(compared, kind):
    unseen, fixed, learnt, _ = compared
    before, after = unseen.judge(fixed["random start"])[0], unseen.judge(learnt[kind].model)[0]
    assert after < before / 2
    assert learnt["exact"].regrets[-1] == pytest.approx(before)


@pytest.mark.long
def test_the_script_prints_its_table_and_draws(run_example, tmp_path):
    pytest.importorskip("matplotlib", reason="the example draws a picture")
    with pytest.warns(GradientWarning) as caught:
        said = run_example("shortest_path", "--quick")
    assert "gradient='blackbox'" in said
    assert [w.message.cause for w in caught if w.category is GradientWarning].count(Cause.ZERO) == 1
    assert (tmp_path / "out" / "shortest_path.png").stat().st_size > 10_000

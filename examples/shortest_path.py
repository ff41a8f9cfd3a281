"""Shortest paths by predicted costs: an exact gradient that is zero, and four that learn.

Data:     a city of 5 x 5 crossings and 40 one-way streets, whose costs depend on five features of
          the day,

              cost = ((B features / sqrt 5 + 3) / 3.5)^8 + 1,    B of zeros and ones; on training days, up to 50 % more or less

Model:    costs linear in the features: it errs somewhere, and what counts is where.
Inner:    minimise c'x subject to: what flows into a crossing flows out, x >= 0; a linear program
          whose vertices are the paths.
Outer:    the least regret: the true cost of the path chosen by predicted costs, less that of the
          shortest. A vertex does not move with c, so the exact gradient is zero. The others go
          through the same solutions, by the same steps.
Rival:    in two stages: least squares of the costs, in closed form, then the shortest path. It
          learns nothing from paths.
Look at:  the regret on 500 unseen days, their costs without noise, as a share of what the shortest
          paths cost.
Warnings: the layer says itself that the exact gradient is zero, and that some of these solutions
          lie at a kink: it is what is shown.
Source:   data and regret: Elmachtoub and Grigas, Smart "predict, then optimize" (2022), section
          6.1.

    python examples/shortest_path.py [--seed S] [--quick]      prints a table, draws out/shortest_path.png
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from functools import cache
from typing import Any

import cvxpy as cp
import numpy as np
import torch
from _side_by_side import AFTER, BEFORE, TRUTH, plt, save
from threadpoolctl import threadpool_limits
from torch import Tensor
from torch.nn.functional import pad

from convlayer import ConvexLayer

SIDE, FEATURES, POWER, NOISE = 5, 5, 8, 0.5
DAYS, UNSEEN, BATCH, RATE, STEPS, LOOK = 500, 500, 32, 0.3, 150, 10
# A perturbation is of the size of the costs or some times that: for less, most paths stay.
KINDS: dict[str, dict[str, Any]] = {
    "exact": {},
    "smoothed": {"kappa": 0.01},
    "lpgd": {"tau": 3.0},
    "perturbed": {"sigma": 1.0, "samples": 16, "seed": 0},
    "blackbox": {"lam": 3.0},
}
COLOURS = dict(zip(KINDS, (BEFORE, "#7b5aa6", AFTER, "#5a9e4b", "#b0416b"), strict=True))
STREETS = [
    ((i, j), (i + d, j + 1 - d))
    for d in (0, 1)
    for i in range(SIDE - d)
    for j in range(SIDE - 1 + d)
]


@cache
def city(kind: str) -> ConvexLayer:
    """Costs (*batch, 40) -> paths (*batch, 40), one where a street is taken."""
    leaves = np.zeros((SIDE, SIDE, len(STREETS)))  # of crossing and street; -1: arrives
    for k, (start, end) in enumerate(STREETS):
        leaves[start][k], leaves[end][k] = 1.0, -1.0
    costs, x = cp.Parameter(len(STREETS), name="costs"), cp.Variable(len(STREETS), name="path")
    flow = leaves.reshape(SIDE * SIDE, -1)[:-1] @ x  # the last crossing's follows from the others
    problem = cp.Problem(cp.Minimize(costs @ x), [flow == np.eye(SIDE * SIDE - 1)[0], x >= 0])
    # Many bounds meet at a path. An active-set method ends on it; left to itself the layer would
    # look, and by a second solver, whether that makes multipliers ambiguous, which no one asks
    # here.
    return ConvexLayer(
        problem, [costs], [x], gradient=kind, gradient_args=KINDS[kind], solver="daqp"
    )


def paths(costs: Tensor) -> Tensor:
    with torch.no_grad():
        return city("exact")(costs)[0]


class Days:
    """Features (days, 6), the last of them one; costs and shortest paths (days, 40)."""

    def __init__(self, B: Tensor, days: int, noise: float, random: torch.Generator) -> None:
        features = torch.randn(days, FEATURES, dtype=torch.float64, generator=random)
        self.features = pad(features, (0, 1), value=1.0)
        factor = 1 + noise * (
            2 * torch.rand(days, len(STREETS), dtype=torch.float64, generator=random) - 1
        )
        self.costs = (((features @ B / FEATURES**0.5 + 3) / 3.5) ** POWER + 1) * factor
        self.shortest = paths(self.costs)

    def judge(self, model: Tensor) -> tuple[float, float]:
        """The model's regret as a share of the shortest paths' cost, and the share of days on which
        it has none."""
        chosen, least = (
            (self.costs * paths(self.features @ model)).sum(1),
            (self.costs * self.shortest).sum(1),
        )
        return (chosen.sum() / least.sum() - 1).item(), (
            chosen - least <= 1e-9 * least
        ).double().mean().item()


@dataclass
class Learnt:
    model: Tensor  # (6, 40)
    regrets: list[float]  # on unseen days, at the start and after every ten steps
    seconds: float  # of learning; time does not run while looking


def learn(kind: str, start: Tensor, training: Days, unseen: Days, steps: int, seed: int) -> Learnt:
    """Adam on the regret, its rate falling to zero along half a cosine."""
    layer, model, random = (
        city(kind),
        start.clone().requires_grad_(),
        torch.Generator().manual_seed(seed),
    )
    optimiser = torch.optim.Adam([model], RATE)
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    learnt = Learnt(model.detach(), [unseen.judge(start)[0]], 0.0)
    for step in range(1, steps + 1):
        begin = time.perf_counter()
        some = torch.randint(DAYS, (BATCH,), generator=random)
        (chosen,) = layer(training.features[some] @ model)
        optimiser.zero_grad()
        (training.costs[some] * (chosen - training.shortest[some])).sum(1).mean().backward()
        optimiser.step()
        rate.step()
        learnt.seconds += time.perf_counter() - begin
        if step % LOOK == 0:
            learnt.regrets.append(unseen.judge(model.detach())[0])
    return learnt


def compare(seed: int, steps: int) -> tuple[Days, dict[str, Tensor], dict[str, Learnt]]:
    """Unseen days, the models without a gradient, and what each kind of gradient learns."""
    random = torch.Generator().manual_seed(seed)
    B = torch.randint(2, (FEATURES, len(STREETS)), generator=random).double()
    training, unseen = Days(B, DAYS, NOISE, random), Days(B, UNSEEN, 0.0, random)
    start = torch.randn(FEATURES + 1, len(STREETS), dtype=torch.float64, generator=random)
    two_stages = torch.linalg.lstsq(training.features, training.costs).solution
    learnt = {kind: learn(kind, start, training, unseen, steps, seed) for kind in KINDS}
    return unseen, {"random start": start, "two stages, least squares": two_stages}, learnt


def draw_city(axes, days: Days, day: int, model: Tensor, colour: str, title: str) -> None:
    """One of these days; the wider a street, the dearer."""
    costs, shortest, chosen = days.costs[day], days.shortest[day], paths(days.features[day] @ model)
    for k, ((i, j), (i_end, j_end)) in enumerate(STREETS):
        lines = [(1.0, "#d5d5d0", float(1 + 14 * (costs[k] / costs.max()) ** 0.5))]
        lines += [(shortest[k].item(), "black", 7.0), (chosen[k].item(), colour, 3.5)]
        for layer, (taken, shade, width) in enumerate(lines):
            if taken > 0.5:
                axes.plot(
                    [j, j_end],
                    [i, i_end],
                    color=shade,
                    lw=width,
                    solid_capstyle="round",
                    zorder=layer,
                )
    axes.plot([0, SIDE - 1], [0, SIDE - 1], "o", color="black", ms=12, zorder=3)
    axes.set(aspect="equal", ylim=(SIDE - 0.7, -0.3), title=title)
    axes.axis("off")
    more = (costs @ chosen / (costs @ shortest) - 1).item()
    axes.text(
        (SIDE - 1) / 2, SIDE - 0.6, f"costs {more:.0%} more than the shortest (black)", ha="center"
    )


def draw(unseen: Days, two_stages: Tensor, learnt: dict[str, Learnt]) -> None:
    figure, (left, middle, right) = plt.subplots(
        1, 3, figsize=(17, 5), layout="constrained", width_ratios=(2, 2, 3)
    )
    lost = unseen.costs * (paths(unseen.features @ learnt["exact"].model) - unseen.shortest)
    day = int(lost.sum(1).argmax())
    for axes, kind, title in (
        (left, "exact", "Exact gradient, its worst day"),
        (middle, "lpgd", "LPGD, the same day"),
    ):
        draw_city(axes, unseen, day, learnt[kind].model, COLOURS[kind], title)
    for kind, result in learnt.items():
        steps = range(0, LOOK * len(result.regrets), LOOK)
        right.plot(steps, result.regrets, color=COLOURS[kind], lw=2.6, label=kind)
    right.axhline(
        unseen.judge(two_stages)[0], color=TRUTH, ls="--", label="two stages, least squares"
    )
    right.set(
        title="Regret on unseen days, share of the cost", xlabel="step of Adam", ylim=(0, None)
    )
    right.legend(loc="center right", bbox_to_anchor=(1, 0.6))
    save(figure, "shortest_path")


def main() -> None:
    parser = argparse.ArgumentParser(description="Shortest paths by predicted costs.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it runs")
    options = parser.parse_args()
    with threadpool_limits(1, user_api="openmp"):  # such small matrices are not worth sharing
        unseen, fixed, learnt = compare(options.seed, 20 if options.quick else STEPS)
        print(f"{'on 500 unseen days':<28}{'regret':>10}{'shortest':>10}{'seconds':>10}")
        rows = [(name, model, "") for name, model in fixed.items()]
        rows += [
            (f"gradient={kind!r}", result.model, f"{result.seconds:.1f}")
            for kind, result in learnt.items()
        ]
        for name, model, seconds in rows:
            regret, shortest = unseen.judge(model)
            print(f"{name:<28}{regret:>10.1%}{shortest:>10.1%}{seconds:>10}")
        draw(unseen, fixed["two stages, least squares"], learnt)


if __name__ == "__main__":
    main()

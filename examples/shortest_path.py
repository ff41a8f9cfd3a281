"""Shortest paths by predicted costs: an exact gradient that is zero, and four that learn.

Data:     a city of 5 x 5 crossings and 40 one-way streets. The cost of a street depends on five features of the day,

              cost = ((B features / sqrt 5 + 3) / 3.5)^8 + 1,    B of zeros and ones, in 500 days of training times noise of up to 50 %

Model:    costs linear in the features, too simple by design: no linear model is right everywhere, and what counts is where it errs.
Inner:    the shortest path from corner to corner, a linear program whose vertices are the paths,

              minimise    c'x
              subject to  what flows into a crossing flows out,  x >= 0

Outer:    the least regret: cost of the path that the model chooses, less that of the shortest, both in the true costs.
          A vertex does not move with c, so the exact gradient is zero, of which the layer warns once. The other kinds of gradient
          all go through the same solutions, with the same steps of Adam from the same random start.
Rival:    in two stages: least squares on the costs, in closed form, then the shortest path. It never sees a path.
Look at:  regret on 500 unseen days, as a share of the shortest paths' cost, by costs without noise.
Source:   data and regret: Elmachtoub and Grigas, Smart "predict, then optimize" (2022), section 6.1.

    python examples/shortest_path.py [--seed S] [--quick]      prints a table, draws out/shortest_path.png
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from functools import cache
from typing import Any

import cvxpy as cp
import torch
from _side_by_side import AFTER, BEFORE, TRUTH, plt, save
from threadpoolctl import threadpool_limits
from torch import Tensor
from torch.nn.functional import pad

from convlayer import ConvexLayer

SIDE, FEATURES, POWER, NOISE = 5, 5, 8, 0.5
DAYS, UNSEEN, BATCH, RATE = 500, 500, 32, 0.3
# The sizes of perturbations are relative to the costs: of their size or a few times that, so that paths change.
KINDS: dict[str, dict[str, Any]] = {
    "exact": {},
    "smoothed": {"kappa": 0.01},
    "lpgd": {"tau": 3.0},
    "perturbed": {"sigma": 1.0, "samples": 16, "seed": 0},
    "blackbox": {"lam": 3.0},
}
COLOURS = dict(zip(KINDS, (BEFORE, "#7b5aa6", AFTER, "#5a9e4b", "#b0416b"), strict=True))
STREETS = [((i, j), (i + d, j + 1 - d)) for d in (0, 1) for i in range(SIDE - d) for j in range(SIDE - 1 + d)]


@cache
def city(kind: str) -> ConvexLayer:
    """Costs (*batch, 40) -> paths (*batch, 40), one where a street is taken."""
    leaves = torch.zeros(SIDE, SIDE, len(STREETS), dtype=torch.float64)  # of crossing and street; -1: arrives
    for k, (start, end) in enumerate(STREETS):
        leaves[start][k], leaves[end][k] = 1.0, -1.0
    starts = torch.zeros(SIDE * SIDE - 1)
    starts[0] = 1.0
    costs, x = cp.Parameter(len(STREETS), name="costs"), cp.Variable(len(STREETS), name="path")
    flow = leaves.flatten(0, 1)[:-1].numpy() @ x == starts.numpy()  # the last crossing's follows from the others
    problem = cp.Problem(cp.Minimize(costs @ x), [flow, x >= 0])
    # An active-set method ends on a path itself. Proximal steps keep it from stalling where many bounds meet, as here, and
    # nearly tied paths want their limit, not a mixture that is nearly as short.
    proximal = {"eps_prox": 0.1, "eta_prox": 1e-12}
    return ConvexLayer(
        problem, [costs], [x], solver="daqp", solver_args=proximal, gradient=kind, gradient_args=KINDS[kind]
    )


class Days:
    """Features (days, 6), the last of them one; costs and shortest paths (days, 40)."""

    def __init__(self, B: Tensor, days: int, noise: float, random: torch.Generator) -> None:
        features = torch.randn(days, FEATURES, dtype=torch.float64, generator=random)
        self.features = pad(features, (0, 1), value=1.0)
        factor = 1 + noise * (2 * torch.rand(days, len(STREETS), dtype=torch.float64, generator=random) - 1)
        self.costs = (((features @ B / FEATURES**0.5 + 3) / 3.5) ** POWER + 1) * factor
        self.shortest = paths(self.costs)

    def regret(self, chosen: Tensor) -> Tensor:
        """Paths (days, 40) -> (days,)"""
        return (self.costs * (chosen - self.shortest)).sum(1)

    def judge(self, model: Tensor) -> tuple[float, float]:
        """The model's regret as a share of the shortest paths' cost, and the share of days on which it has none."""
        regret, cost = self.regret(paths(self.features @ model)), (self.costs * self.shortest).sum(1)
        return (regret.sum() / cost.sum()).item(), (regret <= 1e-9 * cost).double().mean().item()


def paths(costs: Tensor) -> Tensor:
    with torch.no_grad():
        return city("exact")(costs)[0]


@dataclass
class Learnt:
    model: Tensor  # (6, 40)
    steps: list[int]
    regrets: list[float]  # on unseen days, at these steps
    seconds: float  # of learning; time does not run while looking


def learn(kind: str, start: Tensor, training: Days, unseen: Days, steps: int, seed: int) -> Learnt:
    """Adam on the regret, its rate falling to zero along half a cosine."""
    layer, model = city(kind), start.clone().requires_grad_()
    optimiser = torch.optim.Adam([model], RATE)
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    random, learnt = torch.Generator().manual_seed(seed), Learnt(model.detach(), [0], [unseen.judge(start)[0]], 0.0)
    for step in range(1, steps + 1):
        begin = time.perf_counter()
        some = torch.randint(len(training.costs), (BATCH,), generator=random)
        (chosen,) = layer(training.features[some] @ model)
        optimiser.zero_grad()
        (training.costs[some] * (chosen - training.shortest[some])).sum(1).mean().backward()
        optimiser.step()
        rate.step()
        learnt.seconds += time.perf_counter() - begin
        if step % max(1, steps // 15) == 0 or step == steps:
            learnt.steps.append(step)
            learnt.regrets.append(unseen.judge(model.detach())[0])
    return learnt


def compare(seed: int, steps: int) -> tuple[Days, Tensor, Tensor, dict[str, Learnt]]:
    """Unseen days, the model at the start, that of two stages, and what each kind of gradient learns."""
    random = torch.Generator().manual_seed(seed)
    B = torch.randint(2, (FEATURES, len(STREETS)), generator=random).double()
    training, unseen = Days(B, DAYS, NOISE, random), Days(B, UNSEEN, 0.0, random)
    start = torch.randn(FEATURES + 1, len(STREETS), dtype=torch.float64, generator=random)
    two_stages = torch.linalg.lstsq(training.features, training.costs).solution
    learnt = {kind: learn(kind, start, training, unseen, steps, seed) for kind in KINDS}
    return unseen, start, two_stages, learnt


def draw_city(axes, day: Days, model: Tensor, colour: str, title: str) -> None:
    """The first of these days; the wider a street, the dearer."""
    costs, chosen = day.costs[0], paths(day.features[:1] @ model)[0]
    for k, ((i, j), (i_end, j_end)) in enumerate(STREETS):
        line = ([j, j_end], [i, i_end])
        axes.plot(*line, color="#d5d5d0", lw=float(1 + 14 * (costs[k] / costs.max()) ** 0.5), zorder=0)
        if day.shortest[0, k] > 0.5:
            axes.plot(*line, color="black", lw=7, solid_capstyle="round", zorder=1)
        if chosen[k] > 0.5:
            axes.plot(*line, color=colour, lw=3.5, solid_capstyle="round", zorder=2)
    axes.plot([0, SIDE - 1], [0, SIDE - 1], "o", color="black", ms=12, zorder=3)
    axes.set(aspect="equal", ylim=(SIDE - 0.7, -0.3), title=title)
    axes.axis("off")
    share = (costs @ chosen / (costs @ day.shortest[0]) - 1).item()
    axes.text((SIDE - 1) / 2, SIDE - 0.6, f"costs {100 * share:.0f} % more than the shortest (black)", ha="center")


def draw(unseen: Days, two_stages: Tensor, learnt: dict[str, Learnt]) -> None:
    figure, (left, middle, right) = plt.subplots(
        1, 3, figsize=(17, 5.6), layout="constrained", width_ratios=(1, 1, 1.5)
    )
    draw_city(left, unseen, learnt["exact"].model, COLOURS["exact"], "Exact gradient: as at the start")
    draw_city(middle, unseen, learnt["lpgd"].model, COLOURS["lpgd"], "Learnt with LPGD, a day not seen")
    for kind, result in learnt.items():
        right.plot(result.steps, result.regrets, color=COLOURS[kind], lw=2.6, label=kind)
    right.axhline(unseen.judge(two_stages)[0], color=TRUTH, ls="--", label="two stages, least squares")
    right.set(title="Regret on unseen days, share of the cost", xlabel="step of Adam", yscale="log")
    right.legend(loc="lower left", ncols=2)
    save(figure, "shortest_path")


def main() -> None:
    parser = argparse.ArgumentParser(description="Shortest paths by predicted costs.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it runs")
    options = parser.parse_args()
    with threadpool_limits(1, user_api="openmp"):  # such small matrices are not worth sharing
        unseen, start, two_stages, learnt = compare(options.seed, 20 if options.quick else 150)
        print(f"{'on 500 unseen days':<28}{'regret':>10}{'shortest':>10}{'seconds':>10}")
        models = {"random start": start, "two stages, least squares": two_stages}
        models |= {f"gradient={kind!r}": result.model for kind, result in learnt.items()}
        seconds = ["", "", *(f"{result.seconds:.1f}" for result in learnt.values())]
        for (name, model), spent in zip(models.items(), seconds, strict=True):
            regret, shortest = unseen.judge(model)
            print(f"{name:<28}{regret:>10.1%}{shortest:>10.1%}{spent:>10}")
        draw(unseen, two_stages, learnt)


if __name__ == "__main__":
    main()

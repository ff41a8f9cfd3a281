"""Inverse optimisation: a factory's limits are learnt from the plans that it makes.

Inner:  every day a factory of 40 products and 12 resources (hours of machines, tons of material)
        plans for the largest profit; prices fall with what is sold,

            maximise    price' plan - 1/2 plan' Q plan
            subject to  use @ plan <= limit,  plan >= 0

Outer:  `use` is known and the limits are not; from the plans of 96 days they are learnt, so that
        the layer plans alike. A limit that never binds cannot be learnt exactly, and one that does
        can.
"""

import warnings

import cvxpy as cp
import torch
from _side_by_side import AFTER, BEFORE, TRUTH, descend, plt, save, side_by_side

from convlayer import GradientWarning

PRODUCTS, RESOURCES, DAYS, NOISE = 40, 12, 96, 0.02


def main():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    price, limit = cp.Parameter(PRODUCTS), cp.Parameter(RESOURCES)
    use, plan = torch.rand(RESOURCES, PRODUCTS), cp.Variable(PRODUCTS)
    factor = torch.randn(PRODUCTS, PRODUCTS)
    Q = torch.eye(PRODUCTS) + factor @ factor.T / PRODUCTS
    objective = cp.Maximize(price @ plan - cp.quad_form(plan, Q.numpy()) / 2)
    problem = cp.Problem(objective, [use.numpy() @ plan <= limit, plan >= 0])

    wishes = 2 * torch.rand(DAYS, PRODUCTS)  # what would be planned without limits
    prices = wishes @ Q
    hidden = (use @ wishes.T).mean(1) * (0.75 + 0.2 * torch.rand(RESOURCES))
    start = torch.full((RESOURCES,), 12.0)
    layer = side_by_side(problem, [price, limit], [plan], prices, start)
    with torch.no_grad():
        seen = layer(prices, hidden)[0] + NOISE * torch.randn(DAYS, PRODUCTS)
        binds = ((hidden - layer(prices, hidden)[0] @ use.T) < 1e-6).double().mean(0)

    # A plan met on the way may lie at a kink, where a limit only just binds; its one-sided
    # derivative will do.
    warnings.simplefilter("ignore", GradientWarning)
    learnt = start.clone().requires_grad_()

    def error():
        return (layer(prices, learnt)[0] - seen).square().mean()

    errors = torch.tensor(descend(error, learnt, steps=80, rate=0.2)).sqrt()
    learnt = learnt.detach()
    often = binds > 0.1
    deviation = ((learnt - hidden).abs() / hidden)[often].max().item()
    print(
        f"error of a plan {errors[0]:.3f} -> {errors[-1]:.3f} (noise {NOISE}); limits that bind on a tenth of the days: to {100 * deviation:.1f} %"
    )

    figure, (left, right) = plt.subplots(
        1, 2, figsize=(14, 5.2), layout="constrained", width_ratios=(1.3, 1)
    )
    names = range(1, RESOURCES + 1)
    left.vlines(names, start, learnt, color=AFTER, lw=1.5, alpha=0.5)
    left.plot(names, start, "o", color=BEFORE, ms=8, label="start")
    left.plot(names, hidden, "o", mfc="none", mec="black", mew=1.8, ms=15, label="hidden truth")
    left.plot(names, learnt, "o", color=AFTER, ms=8, label="learnt from 96 plans")
    for k in range(RESOURCES):
        left.text(k + 1, 10.9, f"{100 * binds[k]:.0f} %", ha="center", color=TRUTH)
    left.text(0.4, 10.0, "days on which the limit binds", color=TRUTH)
    left.set(
        title="Limits are learnt where they bind",
        xlabel="resource",
        ylabel="limit (hours a day)",
        xticks=names,
        xlim=(0.3, 12.7),
        ylim=(9.5, 22),
    )
    left.legend(loc="upper center", ncols=3)
    right.semilogy(errors, color=AFTER, lw=2.6)
    right.axhline(NOISE, color=TRUTH, ls="--")
    right.text(0, 1.05 * NOISE, "noise of the plans", color=TRUTH, va="bottom")
    right.set(
        title="Plans agree down to their noise",
        xlabel="step of Adam",
        ylabel="error of a plan (tons of a product)",
    )
    save(figure, "quadratic_program")


if __name__ == "__main__":
    main()

"""What users wish for is learnt from what a network gave them, by a first-order solver.

Inner:  150 users share 120 links; their rates come close to what they wish for, and none is to be
        large alone,

            minimise    |rates - wish|^2 + 2 |rates|
            subject to  use @ rates <= capacity

Outer:  wishes follow from features of the hour, wish = features @ W; W is learnt from the rates of
        8 hours.

Why SCS: `use` is the same in all hours and all steps, and only vectors change. SCS factors one
matrix for a whole batch, where Clarabel, which the layer would choose here, factors one in every
iteration of every row. That pays where matrices are constant and dense; where they change from row
to row, or are small, or units are far apart, the layer's own choice is the better one.
"""

import statistics
import time

import cvxpy as cp
import torch
from _side_by_side import AFTER, BEFORE, TRUTH, descend, plt, save

from convlayer import ConvexLayer

USERS, LINKS, HOURS, FEATURES = 150, 120, 8, 3


def milliseconds(layer, *tensors):
    """Of a forward and a backward, the median."""
    leaves, times = [t.detach().requires_grad_() for t in tensors], []
    for _ in range(3):
        start = time.perf_counter()
        torch.autograd.grad(layer(*leaves)[0].square().sum(), leaves)
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times[1:])  # the first is a warm-up


def main():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    wish, capacity = cp.Parameter(USERS, name="wish"), cp.Parameter(LINKS, name="capacity")
    rates, use = cp.Variable(USERS, name="rates"), torch.rand(LINKS, USERS) / USERS**0.5
    objective = cp.Minimize(cp.sum_squares(rates - wish) + 2 * cp.norm(rates))
    problem = cp.Problem(objective, [use.numpy() @ rates <= capacity])
    layer = ConvexLayer(problem, [wish, capacity], [rates], solver="scs")

    features, truth = torch.rand(HOURS, FEATURES), 2 * torch.rand(FEATURES, USERS)
    capacities = (use @ (features @ truth).T).T * (0.7 + 0.3 * torch.rand(HOURS, LINKS))
    with torch.no_grad():
        seen = layer(features @ truth, capacities)[0]
    clarabel = layer.with_options(solver="clarabel")
    ours, theirs = (milliseconds(way, features @ truth, capacities) for way in (layer, clarabel))
    print(
        f"bandwidth: {HOURS} hours by SCS {ours:.0f} ms, by Clarabel {theirs:.0f} ms, "
        f"{theirs / ours:.1f} times as long (forward and backward, medians)"
    )
    print(layer.verify(features @ truth, capacities))

    W = torch.ones(FEATURES, USERS, requires_grad=True)

    def error():
        return (layer(features @ W, capacities)[0] - seen).square().mean()

    errors = torch.tensor(descend(error, W, steps=20, rate=0.2)).sqrt()
    W = W.detach()
    print(f"error of a rate {errors[0]:.3f} -> {errors[-1]:.4f}")

    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5), layout="constrained")
    left.plot(errors, color=AFTER, lw=2.6)
    left.set(title="Rates agree", xlabel="step of Adam", ylabel="error of a rate", ylim=(0, None))
    right.plot(truth.flatten(), torch.ones(FEATURES * USERS), ".", color=BEFORE, label="start")
    right.plot(truth.flatten(), W.flatten(), "o", color=AFTER, ms=5, alpha=0.6, label="learnt")
    right.plot([0, 2], [0, 2], color=TRUTH, ls="--", label="as it is")
    right.set(title="Wishes are learnt", xlabel="true weight", ylabel="learnt weight")
    right.legend()
    save(figure, "bandwidth")


if __name__ == "__main__":
    main()

"""Which costs explain the flows? The cost matrix of a transport problem is learnt from observed
plans.

20 days of shipping from 16 warehouses to 16 shops, other supplies and demands every day, one hidden
cost matrix M: distance along a street, and a river that is dear to cross. The layer solves

    minimise    <M, P> - eps sum_ij entr(P_ij)
    subject to  P 1 = supply,  P'1 = demand

and M is moved by the gradient until its plans are those observed. M is determined up to a constant
a row and a column.
"""

import cvxpy as cp
import torch
from _side_by_side import AFTER, descend, plt, save, side_by_side

PLACES, DAYS, EPS, RIVER = 16, 20, 0.3, 9


def hidden_cost():
    place = torch.arange(PLACES)
    distance = (place[:, None] - place).abs() / PLACES
    crossing = (place[:, None] < RIVER) != (place < RIVER)
    return distance + 0.5 * crossing


def centred(M):
    """Without what no plan can tell: a constant a row and a column."""
    return M - M.mean(0) - M.mean(1, keepdim=True) + M.mean()


def main():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    M, eps, P = (
        cp.Parameter((PLACES, PLACES)),
        cp.Parameter(nonneg=True),
        cp.Variable((PLACES, PLACES)),
    )
    supply, demand = cp.Parameter(PLACES, nonneg=True), cp.Parameter(PLACES, nonneg=True)
    objective = cp.Minimize(cp.sum(cp.multiply(M, P)) - eps * cp.sum(cp.entr(P)))
    problem = cp.Problem(objective, [cp.sum(P, axis=1) == supply, cp.sum(P, axis=0) == demand])

    days = torch.randn(2, DAYS, PLACES).softmax(-1)
    cost, learnt, temperature = (
        hidden_cost(),
        torch.zeros(PLACES, PLACES, requires_grad=True),
        torch.tensor(EPS),
    )
    layer = side_by_side(problem, [M, supply, demand, eps], [P], cost, *days, temperature)
    with torch.no_grad():
        (observed,) = layer(cost, *days, temperature)

    def divergence():
        """Of the observed plans from the layer's, Kullback and Leibler's, mean over the days."""
        (P,) = layer(learnt, *days, temperature)
        return (observed * (observed / P).log()).sum((1, 2)).mean()

    losses = descend(divergence, learnt, steps=120, rate=0.08)
    found, true = centred(learnt.detach()), centred(cost)
    deviation = ((found - true).norm() / true.norm()).item()
    print(
        f"divergence {losses[0]:.2e} -> {losses[-1]:.2e}; the cost is found to {100 * deviation:.1f} %"
    )

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(16, 5), layout="constrained")
    bound = true.abs().max()
    for axes, matrix, title in (
        (left, true, "Hidden cost"),
        (middle, found, f"Learnt from plans alone, to {100 * deviation:.1f} %"),
    ):
        image = axes.imshow(matrix.numpy(), cmap="PuOr", vmin=-bound, vmax=bound)
        axes.set(
            title=title,
            xlabel="shop",
            ylabel="warehouse",
            xticks=range(0, PLACES, 5),
            yticks=range(0, PLACES, 5),
        )
    figure.colorbar(
        image,
        ax=[left, middle],
        shrink=0.85,
        label="cost (euro a kg),\nrow and column means removed",
    )
    right.semilogy(losses, color=AFTER, lw=2.6)
    right.set(
        title="Plans become those observed",
        xlabel="step of Adam",
        ylabel="divergence of the plans (nat)",
    )
    save(figure, "entropic_optimal_transport")


if __name__ == "__main__":
    main()

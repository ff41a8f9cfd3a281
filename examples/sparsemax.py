"""Attention that looks at a few things only: sparsemax in place of softmax.

Sequences of 12 tokens; what is asked for is the mean value of those that match a query, between one
and three. Attention learns to score tokens; its weights are the layer's, the projection of the
scores on the simplex,

    minimise    |x - scores|^2
    subject to  x >= 0,  1'x = 1

which is exactly zero on the tokens that do not matter. Softmax, trained alike, keeps a little
weight on each.
"""

import cvxpy as cp
import torch
from _side_by_side import AFTER, BEFORE, descend, plt, save, side_by_side

TOKENS, FEATURES, SEQUENCES, COMPARED, SHOWN = 12, 6, 1000, 64, 12


def sequences():
    """Keys (SEQUENCES, TOKENS, FEATURES), values and whether they match (SEQUENCES, TOKENS),
    targets (SEQUENCES,)."""
    direction = torch.nn.functional.normalize(torch.randn(FEATURES), dim=0)
    order = torch.rand(SEQUENCES, TOKENS).argsort(-1)
    match = order < torch.randint(1, 4, (SEQUENCES, 1))
    keys = 0.2 * torch.randn(SEQUENCES, TOKENS, FEATURES) + match.unsqueeze(-1) * direction
    values = torch.randn(SEQUENCES, TOKENS)
    return keys, values, match, (values * match).sum(-1) / match.sum(-1)


def main():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    scores, x = cp.Parameter(TOKENS), cp.Variable(TOKENS)
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x - scores)), [x >= 0, cp.sum(x) == 1])
    keys, values, match, target = sequences()
    layer = side_by_side(problem, [scores], [x], torch.randn(COMPARED, TOKENS))

    def sparse(scores):
        return layer(scores)[0]

    def dense(scores):
        return scores.softmax(-1)

    found = {}
    for name, attention in (("softmax", dense), ("sparsemax", sparse)):
        query = (
            0.1 * torch.randn(FEATURES, generator=torch.Generator().manual_seed(1))
        ).requires_grad_()

        def error(attention=attention, query=query):
            return ((attention(keys @ query) * values).sum(-1) - target).square().mean()

        errors = descend(error, query, steps=200, rate=0.05)
        weights = attention(keys @ query.detach())
        outside = int((weights[~match] > 0).sum()) / int((~match).sum())
        found[name] = errors, weights, outside
        print(
            f"{name:<10} error {errors[0] ** 0.5:.2f} -> {errors[-1] ** 0.5:.2f}; weight on {100 * outside:.0f} % of the tokens that do not matter"
        )

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(16, 5), layout="constrained")
    for axes, (name, (_, weights, outside)) in zip((left, middle), found.items(), strict=True):
        shown = weights[:SHOWN].masked_fill(weights[:SHOWN] == 0, torch.nan)
        image = axes.imshow(shown.numpy(), cmap="viridis_r", vmin=0, vmax=1)
        rows, columns = match[:SHOWN].nonzero().T
        axes.plot(columns, rows, "s", mfc="none", mec="black", mew=1.8, ms=17)
        axes.set(
            title=f"{name}: {100 * outside:.0f} % of the others have weight",
            xlabel="token",
            ylabel="sequence",
            xticks=[],
            yticks=[],
        )
    figure.colorbar(
        image,
        ax=[left, middle],
        shrink=0.9,
        label="attention (white: exactly zero;\nframes: tokens that matter)",
    )
    for (name, (errors, *_)), colour in zip(found.items(), (BEFORE, AFTER), strict=True):
        right.semilogy(torch.tensor(errors).sqrt(), color=colour, lw=2.6, label=name)
    right.set(
        title="Both learn; sparsemax ends lower",
        xlabel="step of Adam",
        ylabel="error of the mean (unit of the values)",
    )
    right.legend()
    save(figure, "sparsemax")


if __name__ == "__main__":
    main()

"""A classifier that is too sure of itself is calibrated: the temperature of a softmax, learnt on
held-out points.

The layer is the softmax as the optimisation problem it is,

    maximise    theta'y + tau sum_i entr(y_i)
    subject to  1'y = 1

with the classifier's scores theta and one temperature tau for all, moved by the gradient of the
likelihood; the entropy, entr, asks for y >= 0 by itself. The scores here are three times too large,
so tau should become about 3.
"""

import cvxpy as cp
import torch
from _side_by_side import AFTER, BEFORE, TRUTH, descend, plt, save, side_by_side

CLASSES, POINTS, COMPARED, OVERCONFIDENCE = 5, 4000, 64, 3.0


def reliability(y, label):
    """Mean confidence and accuracy by tenths of confidence, where there are 40 points at least."""
    confidence, guess = y.max(-1)
    right, tenth = (guess == label).double(), (10 * confidence).long().clamp(max=9)
    bins = [tenth == k for k in range(10) if (tenth == k).sum() >= 40]
    return [float(confidence[b].mean()) for b in bins], [float(right[b].mean()) for b in bins]


def main():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    honest = 1.5 * torch.randn(POINTS, CLASSES)
    label = torch.distributions.Categorical(logits=honest).sample()
    scores = OVERCONFIDENCE * honest

    theta, tau, y = cp.Parameter(CLASSES), cp.Parameter(nonneg=True), cp.Variable(CLASSES)
    problem = cp.Problem(cp.Maximize(theta @ y + tau * cp.sum(cp.entr(y))), [cp.sum(y) == 1])
    log_temperature = torch.tensor(0.0, requires_grad=True)
    layer = side_by_side(problem, [theta, tau], [y], scores[:COMPARED], log_temperature.exp())

    def likelihood(log_temperature):
        """Negative log-likelihood of the labels."""
        (y,) = layer(scores, log_temperature.exp())
        return -y.gather(1, label[:, None]).log().mean()

    path = []

    def loss():
        path.append(log_temperature.item())
        return likelihood(log_temperature)

    losses = descend(loss, log_temperature, steps=60, rate=0.1)
    grid = torch.linspace(-0.2, 1.9, 50)
    with torch.no_grad():
        searched = [likelihood(level) for level in grid]
        before, after = (
            layer(scores, torch.tensor(level).exp())[0] for level in (path[0], path[-1])
        )
    print(
        f"temperature {log_temperature.exp().item():.2f} learnt; the scores are {OVERCONFIDENCE:g} times too large"
    )

    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5.4), layout="constrained")
    left.plot(grid.exp(), searched, color=TRUTH, lw=2, label="by search")
    left.plot(
        torch.tensor(path).exp(), losses, "o", color=AFTER, ms=5, label="steps of the gradient"
    )
    left.plot(1.0, losses[0], "o", color=BEFORE, ms=9, label="start")
    left.set(
        title="The gradient finds the temperature",
        xlabel="temperature (no unit)",
        ylabel="negative log-likelihood (nat a point)",
    )
    left.legend()
    right.plot([0, 1], [0, 1], color=TRUTH, ls="--")
    for y, colour, name in ((before, BEFORE, "before"), (after, AFTER, "after")):
        right.plot(*reliability(y, label), "o-", color=colour, lw=2.4, ms=7, label=name)
    right.text(0.23, 0.93, "dashed: as sure as right", color=TRUTH)
    right.set(
        title="Confidence becomes honest",
        xlabel="confidence of the guess",
        ylabel="share of guesses that are right",
        xlim=(0.2, 1),
        ylim=(0.2, 1),
        aspect="equal",
    )
    right.legend(loc="lower right")
    save(figure, "softmax")


if __name__ == "__main__":
    main()

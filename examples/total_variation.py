"""Denoising of a signal that jumps: the strength of total variation is learnt from clean examples.

32 piecewise-constant signals of 200 points with noise. The one weight that all share is moved by
the gradient of the error of the denoised signals, through the minimiser; then it is used on a
signal it has not seen.
"""

import cvxpy as cp
import torch
from _side_by_side import AFTER, BEFORE, TRUTH, descend, plt, save, side_by_side

LENGTH, SIGNALS, JUMPS, NOISE = 200, 33, 6, 0.4


def signals():
    """(SIGNALS, LENGTH), constant between random jumps."""
    jumps = torch.rand(SIGNALS, LENGTH).argsort(-1).lt(JUMPS)
    levels = 1.5 * torch.randn(SIGNALS, JUMPS + 1)
    return levels.gather(1, jumps.cumsum(1))


def main():
    torch.manual_seed(1)
    torch.set_default_dtype(torch.float64)
    clean = signals()
    noisy = clean + NOISE * torch.randn_like(clean)

    x, weight, u = cp.Parameter(LENGTH), cp.Parameter(nonneg=True), cp.Variable(LENGTH)
    problem = cp.Problem(cp.Minimize(cp.sum_squares(u - x) / 2 + weight * cp.tv(u)))
    log_weight = torch.tensor(-4.0, requires_grad=True)
    layer = side_by_side(problem, [x, weight], [u], noisy[1:], torch.tensor(0.5))

    def error(log_weight):
        (u,) = layer(noisy[1:], log_weight.exp())
        return (u - clean[1:]).square().mean().sqrt()

    path = []

    def loss():
        path.append(log_weight.item())
        return error(log_weight)

    errors = descend(loss, log_weight, steps=100, rate=0.1)
    grid = torch.linspace(-5, 3, 60)
    with torch.no_grad():
        searched = [error(level) for level in grid]
        (denoised,) = layer(noisy[0], log_weight.exp())
    fall = [(s - clean[0]).square().mean().sqrt().item() for s in (noisy[0], denoised)]
    print(
        f"weight {log_weight.exp().item():.2f} learnt; error of a new signal {fall[0]:.2f} -> {fall[1]:.2f}"
    )

    figure, (left, right) = plt.subplots(
        1, 2, figsize=(14, 5), layout="constrained", width_ratios=(1, 1.6)
    )
    left.plot(grid.exp(), searched, color=TRUTH, lw=2, label="by search")
    left.plot(
        torch.tensor(path).exp(), errors, "o", color=AFTER, ms=5, label="steps of the gradient"
    )
    left.plot(torch.tensor(path[0]).exp(), errors[0], "o", color=BEFORE, ms=9, label="start")
    left.set(
        title="The gradient finds the best weight",
        xscale="log",
        xlabel="weight of the total variation (log scale)",
        ylabel="error (unit of the signal)",
    )
    left.legend(loc="upper center")
    right.plot(noisy[0], ".", color=BEFORE, ms=5, alpha=0.7, label=f"noisy, error {fall[0]:.2f}")
    right.plot(clean[0], color="black", lw=1.2, ls="--", label="clean")
    right.plot(denoised, color=AFTER, lw=2.6, label=f"denoised, error {fall[1]:.2f}")
    right.set(title="A signal not learnt from", xlabel="sample", ylabel="signal", xlim=(0, LENGTH))
    right.legend(loc="best")
    save(figure, "total_variation")


if __name__ == "__main__":
    main()

"""Ridge regression whose penalty is learnt: the gradient of the validation error goes through the
fitted coefficients.

A smooth curve is fitted to 12 noisy points by 24 bumps, in 32 repetitions of the experiment, all
solved at once. One penalty, shared by all, is moved by its gradient until the fits are best on
points not used to fit; a grid search finds the same one.
"""

import cvxpy as cp
import torch
from _side_by_side import AFTER, BEFORE, TRUTH, descend, plt, save, side_by_side

POINTS, BUMPS, DRAWS, NOISE = 12, 24, 32, 0.25


def curve(t):
    return torch.sin(6 * t) + t


def bumps(t):
    """(*, k) -> (*, k, BUMPS)."""
    return torch.exp(-0.5 * ((t.unsqueeze(-1) - torch.linspace(-0.1, 1.1, BUMPS)) / 0.09).square())


def main():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    t_fit, t_val = torch.rand(DRAWS, POINTS), torch.rand(DRAWS, 4 * POINTS)
    b_fit, b_val = (curve(t) + NOISE * torch.randn_like(t) for t in (t_fit, t_val))
    A_fit, A_val = bumps(t_fit), bumps(t_val)

    A, b = cp.Parameter((POINTS, BUMPS)), cp.Parameter(POINTS)
    penalty, x = cp.Parameter(nonneg=True), cp.Variable(BUMPS)
    problem = cp.Problem(cp.Minimize(cp.sum_squares(A @ x - b) + penalty * cp.sum_squares(x)))
    log_penalty = torch.tensor(-7.0, requires_grad=True)
    layer = side_by_side(problem, [A, b, penalty], [x], A_fit, b_fit, log_penalty.exp())

    def validation_error(log_penalty):
        (x,) = layer(A_fit, b_fit, log_penalty.exp())
        return ((A_val @ x.unsqueeze(-1)).squeeze(-1) - b_val).square().mean().sqrt()

    path = []

    def loss():
        path.append(log_penalty.item())
        return validation_error(log_penalty)

    errors = descend(loss, log_penalty, steps=80, rate=0.25)
    grid = torch.linspace(-10, 4, 60)
    with torch.no_grad():
        searched = torch.stack([validation_error(level) for level in grid])
        fits = [
            layer(A_fit[:1], b_fit[:1], torch.tensor(level).exp())[0]
            for level in (path[0], path[-1])
        ]
    print(
        f"penalty {path[-1]:.2f} (log) learnt in {len(path)} steps, {grid[searched.argmin()]:.2f} by a search over {len(grid)}"
    )

    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5), layout="constrained")
    left.plot(grid.exp(), searched, color=TRUTH, lw=2, label="by search")
    left.plot(
        torch.tensor(path).exp(), errors, "o", color=AFTER, ms=5, label="steps of the gradient"
    )
    left.plot(torch.tensor(path[0]).exp(), errors[0], "o", color=BEFORE, ms=9, label="start")
    left.set(
        title="The gradient finds the best penalty",
        xscale="log",
        xlabel="penalty (log scale)",
        ylabel="validation error (same unit as the curve)",
    )
    left.legend()
    t = torch.linspace(0, 1, 300)
    right.plot(t, curve(t), color=TRUTH, lw=2, ls="--", label="truth")
    for fit, colour, label in zip(
        fits, (BEFORE, AFTER), ("fit at the start", "fit with the learnt penalty"), strict=True
    ):
        right.plot(t, bumps(t) @ fit[0], color=colour, lw=2.2, label=label)
    right.plot(t_fit[0], b_fit[0], "o", color="black", label="the points to fit")
    right.set(title="One of 32 experiments", xlabel="position", ylabel="height", ylim=(-1.2, 2.2))
    right.legend(loc="upper right")
    save(figure, "least_squares")


if __name__ == "__main__":
    main()

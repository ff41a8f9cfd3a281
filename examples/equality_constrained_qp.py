"""A path round obstacles: waypoints are learnt through the smoothest curve that passes through
them.

Inner:  the curve X (50 points in the plane) of least acceleration through a start, an end and three
        waypoints,

            minimise    sum_k |X_{k-1} - 2 X_k + X_{k+1}|^2
            subject to  X at five given times is where it should be

Outer:  the waypoints, moved by the gradient until the whole curve is clear of four discs and short.
        32 random starts are one batch.
"""

import cvxpy as cp
import torch
from _side_by_side import AFTER, BEFORE, descend, plt, save, side_by_side

STEPS, TIMES, STARTS = 50, [0, 12, 25, 37, 49], 32
CENTRES, RADII, MARGIN = (
    [[0.22, 0.05], [0.45, -0.22], [0.55, 0.25], [0.8, 0.02]],
    [0.14, 0.15, 0.16, 0.12],
    0.04,
)


def main():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    X, W = cp.Variable((STEPS, 2)), cp.Parameter((len(TIMES), 2))
    problem = cp.Problem(cp.Minimize(cp.sum_squares(cp.diff(X, 2, axis=0))), [X[TIMES] == W])

    ends = torch.tensor([[0.0, 0.0], [1.0, 0.0]]).expand(STARTS, 2, 2)
    line = torch.tensor([[0.25, 0.0], [0.5, 0.0], [0.75, 0.0]])
    between = (line + torch.tensor([0.03, 0.15]) * torch.randn(STARTS, 3, 2)).requires_grad_()
    centres, radii = torch.tensor(CENTRES), torch.tensor(RADII)

    def waypoints():
        return torch.cat([ends[:, :1], between, ends[:, 1:]], 1)

    layer = side_by_side(problem, [W], [X], waypoints())

    def parts():
        """Depth inside the discs, and length."""
        (curve,) = layer(waypoints())
        distance = (curve.unsqueeze(-2) - centres).norm(dim=-1)
        depth = (radii + MARGIN - distance).relu().square().sum((1, 2))
        return curve, depth, curve.diff(dim=1).square().sum((1, 2)) * STEPS

    with torch.no_grad():
        before, *_ = parts()
    history = descend(lambda: (100 * parts()[1] + parts()[2]).sum(), between, steps=150, rate=0.01)
    with torch.no_grad():
        after, depth, length = parts()
        clearance = ((after.unsqueeze(-2) - centres).norm(dim=-1) - radii).amin((1, 2))
    best = int((100 * depth + length).argmin())
    print(
        f"cost {history[0] / STARTS:.2f} -> {history[-1] / STARTS:.2f}; {int((clearance > 0).sum())} of {STARTS} paths clear of the discs"
    )

    figure, panels = plt.subplots(1, 2, figsize=(14, 5.2), layout="constrained", sharey=True)
    for axes, curves, title in (
        (panels[0], before, "Before: 32 random sets of waypoints"),
        (panels[1], after, "After: waypoints moved by the gradient"),
    ):
        for centre, radius in zip(CENTRES, RADII, strict=True):
            axes.add_patch(plt.Circle(centre, radius, color="#dddddd"))
        for k in range(STARTS):
            axes.plot(*curves[k].T, color=BEFORE if axes is panels[0] else AFTER, lw=1, alpha=0.45)
        axes.plot(*curves[best].T, color="black", lw=2.6)
        axes.plot(*curves[best, TIMES].T, "o", color="black", ms=8)
        axes.set(title=title, aspect="equal", xlim=(-0.05, 1.05), ylim=(-0.5, 0.55), xlabel="x (m)")
    panels[0].set_ylabel("y (m)")
    panels[1].text(0.02, -0.46, "black: the best of them, with its waypoints", fontsize=11)
    save(figure, "equality_constrained_qp")


if __name__ == "__main__":
    main()

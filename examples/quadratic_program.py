"""Inverse optimisation: the limits that somebody obeys are learnt from what they choose.

Inner:  a chooser who would like to be at `wish` goes to the nearest point of a polygon that we do not know,

            minimise    |x - wish|^2   subject to  G x <= h

Outer:  from 400 wishes and choices learn the polygon's six sides, normals G and offsets h, so that the layer chooses alike.
"""

import cvxpy as cp
import torch
from _side_by_side import AFTER, BEFORE, TRUTH, descend, plt, save, side_by_side

SIDES, CHOICES, LEVEL = 6, 400, 0.02


def sides(angle, h):
    return torch.stack([angle.cos(), angle.sin()], -1), h


def corners(angle, h):
    """Of the polygon, in order; sides are sorted by angle."""
    order = angle.argsort()
    G, h = sides(angle[order], h[order])
    crossings = torch.linalg.solve(torch.stack([G, G.roll(-1, 0)], 1), torch.stack([h, h.roll(-1)], 1))
    return torch.cat([crossings, crossings[:1]])


def main():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    wish, G, h, x = cp.Parameter(2), cp.Parameter((SIDES, 2)), cp.Parameter(SIDES), cp.Variable(2)
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x - wish)), [G @ x <= h])

    hidden = torch.tensor([0.1, 1.0, 2.2, 3.0, 4.3, 5.4]), torch.tensor([1.2, 1.0, 0.7, 1.1, 0.8, 1.3])
    angle = torch.linspace(0, 5 * torch.pi / 3, SIDES).requires_grad_()
    height = torch.full((SIDES,), 0.55, requires_grad=True)
    start = angle.detach().clone(), height.detach().clone()
    wishes = 1.6 * torch.randn(CHOICES, 2)
    layer = side_by_side(problem, [wish, G, h], [x], wishes, *sides(*start))
    with torch.no_grad():
        chosen = layer(wishes, *sides(*hidden))[0] + LEVEL * torch.randn(CHOICES, 2)

    def error():
        (x,) = layer(wishes, *sides(angle, height))
        return (x - chosen).square().sum(-1).mean()

    errors = descend(error, angle, height, steps=60, rate=0.04)
    learnt = angle.detach(), height.detach()
    print(f"error of a choice {errors[0] ** 0.5:.3f} -> {errors[-1] ** 0.5:.3f} (noise {LEVEL * 2**0.5:.3f})")

    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5.6), layout="constrained", width_ratios=(1.1, 1))
    left.plot(*wishes.T, ".", color="#cccccc", ms=5, label="wishes")
    left.plot(*chosen.T, ".", color="black", ms=5, label="choices (seen)")
    for polygon, colour, style, label in ((start, BEFORE, "-", "start"), (learnt, AFTER, "-", "learnt"), (hidden, TRUTH, "--", "hidden truth")):
        left.plot(*corners(*polygon).T, color=colour, ls=style, lw=2.6, label=label)
    left.set(title="The limits are learnt from choices", aspect="equal", xlim=(-2.6, 2.6), ylim=(-2.3, 2.3), xlabel="good 1 (kg)", ylabel="good 2 (kg)")
    left.legend(loc="upper left", bbox_to_anchor=(1, 1))
    right.semilogy(torch.tensor(errors).sqrt(), color=AFTER, lw=2.6)
    right.axhline(LEVEL * 2**0.5, color=TRUTH, ls="--")
    right.text(59, 0.95 * LEVEL * 2**0.5, "noise of the choices", color=TRUTH, va="top", ha="right")
    right.set(title="Down to the noise", xlabel="step of Adam", ylabel="error of a choice (kg)")
    save(figure, "quadratic_program")


if __name__ == "__main__":
    main()

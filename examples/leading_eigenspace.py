"""Principal components that matter: weights of the measurements are learnt through the components.

Twelve measurements of three groups. Two of them tell the groups apart, but others vary more, and so
principal components show noise. With S the covariance and w a weight for each measurement, the
layer's projector on the leading plane of diag(w) S diag(w),

    maximise    <diag(w) S diag(w), Z>
    subject to  tr Z = 2,  0 <= Z <= I

is differentiated: w is learnt until the groups are apart in that plane, on 16 resamplings at once.
"""

import cvxpy as cp
import torch
from _side_by_side import AFTER, BEFORE, descend, plt, save, side_by_side

MEASUREMENTS, MEMBERS, DRAWS = 12, 60, 16
COLOURS = ("#1f6f8b", "#c8763a", "#7a3b69")


def people():
    """Points (3 MEMBERS, 12) and their groups."""
    group = torch.arange(3).repeat_interleave(MEMBERS)
    centre = torch.zeros(3, MEASUREMENTS)
    centre[:, 3], centre[:, 8] = torch.tensor([0.0, 1.6, 0.8]), torch.tensor([0.0, 0.0, 1.5])
    spread = torch.linspace(2.2, 0.8, MEASUREMENTS)
    spread[[3, 8]] = 0.35
    return centre[group] + spread * torch.randn(len(group), MEASUREMENTS), group


def scatters(X, group):
    """Covariance within the groups and in all, (12, 12) each."""
    means = torch.stack([X[group == k].mean(0) for k in range(3)])
    return torch.cov((X - means[group]).T), torch.cov(X.T)


def main():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    S, Z = (
        cp.Parameter((MEASUREMENTS, MEASUREMENTS), symmetric=True),
        cp.Variable((MEASUREMENTS, MEASUREMENTS), symmetric=True),
    )
    rules = [cp.trace(Z) == 2, Z >> 0, torch.eye(MEASUREMENTS).numpy() - Z >> 0]
    problem = cp.Problem(cp.Maximize(cp.trace(S @ Z)), rules)

    X, group = people()
    resampled = [torch.randint(len(X), (len(X),)) for _ in range(DRAWS)]
    within, whole = (
        torch.stack(part)
        for part in zip(*(scatters(X[i], group[i]) for i in resampled), strict=True)
    )
    layer = side_by_side(problem, [S], [Z], whole)
    log_weight = torch.zeros(MEASUREMENTS, requires_grad=True)

    def share():
        """Of the variance in the leading plane, what is within the groups."""
        w = log_weight.exp()
        scale = w[:, None] * w
        (Z,) = layer(scale * whole)
        return ((Z * scale * within).sum((1, 2)) / (Z * scale * whole).sum((1, 2))).mean()

    shares = descend(share, log_weight, steps=120, rate=0.05)
    print(
        f"within-group share of the variance shown {100 * shares[0]:.0f} % -> {100 * shares[-1]:.0f} %"
    )

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(16, 5), layout="constrained")
    weight = log_weight.detach().exp()
    for axes, w, title in (
        (left, torch.ones(MEASUREMENTS), "Before: the plane shows noise"),
        (middle, weight, "After: it shows the groups"),
    ):
        plane = torch.linalg.eigh(torch.cov((w * X).T))[1][:, -2:]
        for k, colour in enumerate(COLOURS):
            axes.plot(
                *((w * X)[group == k] @ plane).T,
                "o",
                ms=5,
                alpha=0.75,
                color=colour,
                label=f"group {k + 1}",
            )
        axes.set(title=title, xlabel="second component", ylabel="first component")
    left.legend(loc="upper left")
    informative = [AFTER if k in (3, 8) else BEFORE for k in range(MEASUREMENTS)]
    right.bar(range(1, MEASUREMENTS + 1), weight.numpy(), color=informative)
    right.axhline(1, color="black", lw=1)
    right.text(0.4, 1.05, "start")
    right.set(
        title="Weights learnt (blue: the two that tell)",
        xlabel="measurement",
        ylabel="weight (no unit)",
        xticks=range(1, MEASUREMENTS + 1),
    )
    save(figure, "leading_eigenspace")


if __name__ == "__main__":
    main()

"""Which measurements of a patient deserve trust? Penalties of a constrained regression, learnt
through its solution.

Data:   442 diabetes patients, ten measurements each, and the progression of the disease a year
        later, a score between 25 and 346 (Efron, Hastie, Johnstone and Tibshirani, 2004; bundled
        with scikit-learn).
Inner:  from 30 patients only, fit the coefficients w of a linear model, some with a sign that
        medicine dictates:

            minimise    |X w - y|^2 / 30 + sum_j penalty_j w_j^2
            subject to  w >= 0 for body mass index, blood pressure and triglycerides;  w <= 0 for HDL cholesterol

Outer:  choose the ten penalties for which such models, fitted to sixteen draws of 30 patients, are
        best on the patients not drawn. The gradient goes through the solutions w.
Rival:  the best single penalty, by search.
Test:   100 patients, set aside before anything else. One test set is a matter of luck, so all of
        this is done for eight of them, at once: the batch of the layer is (8, 16), and it learns
        eight times ten penalties.

    python examples/demo.py      prints a table, draws out/demo.png, and fails if the gradient is not right
"""

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import cvxpy as cp
import matplotlib
import torch
from sklearn.datasets import load_diabetes
from threadpoolctl import threadpool_limits
from torch import Tensor
from tqdm import tqdm

from convlayer import ConvexLayer

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.layout_engine import ConstrainedLayoutEngine

MEASUREMENTS = (
    "age",
    "sex",
    "body mass index",
    "blood pressure",
    "total cholesterol",
    "LDL cholesterol",
    "HDL cholesterol",
    "cholesterol / HDL",
    "log triglycerides",
    "glucose",
)
SIGNS = {2: 1, 3: 1, 6: -1, 8: 1}
FEATURES, SPLITS, TEST, STUDIES, PATIENTS = len(MEASUREMENTS), 8, 100, 16, 30
STEPS, RATE = 60, 0.1
TOLERANCE = 1e-6  # of the gradient check
PICTURE = Path("out") / "demo.png"
SINGLE, LEARNT, GREY = "#c8763a", "#1f6f8b", "#777777"


class Diabetes:
    """The patients, standardised, and the part each plays in every study of every split."""

    def __init__(self) -> None:
        X, y = (torch.from_numpy(part) for part in load_diabetes(return_X_y=True, scaled=False))
        self.unit = y.std()
        self.X, self.y = (X - X.mean(0)) / X.std(0), (y - y.mean()) / self.unit  # (442, 10), (442,)
        generator = torch.Generator().manual_seed(0)
        orders = torch.stack([torch.randperm(len(y), generator=generator) for _ in range(SPLITS)])
        self.test = orders[:, None, :TEST].expand(-1, STUDIES, -1)  # (8, 16, 100)
        rest = orders[:, None, TEST:].expand(-1, STUDIES, -1)
        drawn = rest.gather(-1, torch.rand(rest.shape, generator=generator).argsort(-1))
        self.validation = drawn[..., PATIENTS:]  # (8, 16, 312)
        # (8, 16, 30, 10), (8, 16, 30)
        X_fit, y_fit = (
            self.X[drawn[..., :PATIENTS]],
            self.y[drawn[..., :PATIENTS]],
        )
        self.X_mean, self.y_mean = X_fit.mean(-2, keepdim=True), y_fit.mean(-1, keepdim=True)
        # |X w - y|^2 / 30 is |R w - b|^2 up to a constant: ten rows in place of thirty.
        Q, self.R = torch.linalg.qr((X_fit - self.X_mean) / PATIENTS**0.5)  # R (8, 16, 10, 10)
        self.b = (Q.mT @ (y_fit / PATIENTS**0.5).unsqueeze(-1)).squeeze(-1)  # (8, 16, 10)

    def error(self, w: Tensor, patients: Tensor) -> Tensor:
        """w (8, 16, 10), patients (8, 16, k) -> (8,), root mean squared error in points of the
        score."""
        prediction = ((self.X[patients] - self.X_mean) @ w.unsqueeze(-1)).squeeze(-1) + self.y_mean
        return self.unit * (prediction - self.y[patients]).square().mean((-2, -1)).sqrt()


def regression() -> ConvexLayer:
    R, b = cp.Parameter((FEATURES, FEATURES), name="R"), cp.Parameter(FEATURES, name="b")
    penalty, w = (
        cp.Parameter(FEATURES, nonneg=True, name="penalty"),
        cp.Variable(FEATURES, name="w"),
    )
    signs = [sign * w[j] >= 0 for j, sign in SIGNS.items()]
    problem = cp.Problem(cp.Minimize(cp.sum_squares(R @ w - b) + penalty @ cp.square(w)), signs)
    return ConvexLayer(problem, parameters=[R, b, penalty], variables=[w])


def best_single(losses: Callable[[Tensor], Tensor]) -> Tensor:
    """For each split the logarithm of the single penalty of least validation error, (8, 10)."""
    levels = torch.linspace(-9, 3, 25, dtype=torch.float64)
    errors = torch.stack([losses(level.expand(SPLITS, FEATURES)) for level in levels])
    return levels[errors.argmin(0)].unsqueeze(-1).repeat(1, FEATURES)


def check_gradient(loss: Callable[[Tensor], Tensor], at: Tensor, step: float = 1e-4) -> float:
    """The largest deviation of the gradient from central differences along twenty directions,
    relative to its norm."""
    leaf = at.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(leaf), leaf)
    directions = torch.randn(
        20, *at.shape, dtype=at.dtype, generator=torch.Generator().manual_seed(2)
    )
    with torch.no_grad():
        differences = torch.stack(
            [(loss(at + step * d) - loss(at - step * d)) / (2 * step) for d in directions]
        )
    return float(
        ((directions * gradient).sum((-2, -1)) - differences).abs().max() / gradient.norm()
    )


def time_layer(
    loss: Callable[[Tensor], Tensor], at: Tensor, repeats: int = 20
) -> tuple[float, float]:
    """Median milliseconds of a forward and of a backward pass."""
    forward, backward = [], []
    for _ in range(repeats):
        leaf = at.clone().requires_grad_()
        start = time.perf_counter()
        value = loss(leaf)
        middle = time.perf_counter()
        value.backward()
        forward.append(1e3 * (middle - start))
        backward.append(1e3 * (time.perf_counter() - middle))
    return statistics.median(forward), statistics.median(backward)


def draw_errors(axes, validation: Tensor, test: Tensor) -> None:
    for history, colour, label in (
        (test, GREY, "test, not used to learn"),
        (validation, LEARNT, "validation"),
    ):
        axes.plot(history, color=colour, lw=0.8, alpha=0.3)
        axes.plot(history.mean(1), color=colour, lw=2.8, label=label)
    axes.set(
        title="Error while learning",
        xlabel="step of Adam",
        xlim=(0, STEPS),
        ylabel="root mean squared error (points of the score)",
    )
    axes.grid(axis="y", alpha=0.25)
    axes.legend(title="bold: mean of 8 splits", loc="upper right", alignment="left")


def draw_penalties(axes, single: Tensor, learnt: Tensor) -> None:
    low, mean, high = learnt.amin(0).exp(), learnt.mean(0).exp(), learnt.amax(0).exp()
    level = float(single.mean().exp())
    axes.barh(MEASUREMENTS, mean - level, left=level, height=0.6, color=LEARNT)
    spread = torch.stack([mean - low, high - mean])
    axes.errorbar(mean, MEASUREMENTS, xerr=spread, fmt="none", ecolor="black", elinewidth=1.1)
    axes.axvline(level, color=SINGLE, lw=2)
    axes.text(1.15 * level, -0.95, f"best single penalty, {level:.2g}", color=SINGLE, va="center")
    axes.set(
        title="Penalties learnt (left: trusted, right: not)",
        xscale="log",
        xlabel="penalty (no unit, log scale)\n(bars: geometric mean of 8 splits; lines: their range)",
    )


def draw_coefficients(axes, w_single: Tensor, w_learnt: Tensor) -> None:
    for w, shift, colour, label in (
        (w_single, -0.16, SINGLE, "best single penalty"),
        (w_learnt, 0.16, LEARNT, "ten learnt penalties"),
    ):
        points, places = w.flatten(0, 1), torch.arange(FEATURES) + shift
        axes.errorbar(
            points.mean(0), places, xerr=points.std(0), fmt="o", color=colour, label=label
        )
    axes.axvline(0, color="black", lw=0.8)
    bounds = {1: "  (≥ 0)", -1: "  (≤ 0)", 0: ""}
    labels = [name + bounds[SIGNS.get(j, 0)] for j, name in enumerate(MEASUREMENTS)]
    axes.set(
        title="Coefficients",
        yticks=range(FEATURES),
        yticklabels=labels,
        xlabel="points of the score per standard deviation\n(mean and standard deviation of 128 fits)",
    )
    axes.legend(loc="upper right")


def draw(
    validation: Tensor,
    test: Tensor,
    single: Tensor,
    learnt: Tensor,
    w_single: Tensor,
    w_learnt: Tensor,
) -> None:
    plt.rcParams.update(
        {
            "font.size": 11,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "legend.frameon": False,
            "axes.titlelocation": "left",
            "axes.titlesize": 12,
            "axes.titleweight": "bold",
        }
    )
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1)
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(17, 6), layout=layout)
    figure.suptitle(
        "Diabetes progression from 30 patients: ten penalties learnt through the regression's solution",
        fontsize=15,
    )
    draw_errors(left, validation, test)
    draw_penalties(middle, single, learnt)
    draw_coefficients(right, w_single, w_learnt)
    for axes in (middle, right):
        axes.set_ylim(FEATURES + 0.2, -1.3)
        axes.tick_params(axis="y", length=0)
    PICTURE.parent.mkdir(exist_ok=True)
    figure.savefig(PICTURE, dpi=130)


def main() -> int:
    threadpool_limits(1, user_api="openmp")  # ten by ten matrices are too small to share
    data, layer = Diabetes(), regression()

    def coefficients(log_penalty: Tensor) -> Tensor:
        return layer(data.R, data.b, log_penalty.exp().unsqueeze(1))[0]  # (8, 16, 10)

    def losses(log_penalty: Tensor) -> Tensor:
        return data.error(coefficients(log_penalty), data.validation)  # (8,)

    def loss(log_penalty: Tensor) -> Tensor:
        return losses(log_penalty).sum()

    with torch.no_grad():
        single = best_single(losses)
    log_penalty = single.clone().requires_grad_()
    optimiser = torch.optim.Adam([log_penalty], lr=RATE)
    history = []
    for step in (bar := tqdm(range(STEPS + 1), desc="learning", unit="step")):
        w = coefficients(log_penalty)
        validation = data.error(w, data.validation)
        history.append((validation.detach(), data.error(w.detach(), data.test)))
        bar.set_postfix_str(f"validation error {validation.detach().mean():.2f}")
        if step < STEPS:
            optimiser.zero_grad()
            validation.sum().backward()
            optimiser.step()
    learnt, w_learnt = log_penalty.detach(), w.detach()

    with torch.no_grad():
        w_single, w_free = coefficients(single), coefficients(torch.full_like(single, -18.0))
    table = {
        "the mean of the 30 patients": torch.zeros_like(w_free),
        "no penalty": w_free,
        "before: best single penalty": w_single,
        "after:  ten learnt penalties": w_learnt,
    }
    print(f"\n{'error, points of the score (mean of 8 splits)':<48}{'validation':>10}{'test':>10}")
    for name, w in table.items():
        print(
            f"{name:<48}{data.error(w, data.validation).mean():>10.2f}{data.error(w, data.test).mean():>10.2f}"
        )
    fall = data.error(w_single, data.test) - data.error(w_learnt, data.test)
    print(
        f"\ntest error falls in {int((fall > 0).sum())} of {SPLITS} splits, "
        f"by {fall.mean():.2f} on average ({fall.min():.2f} to {fall.max():.2f})"
    )
    forward, backward = time_layer(loss, learnt)
    print(
        f"{SPLITS * STUDIES} problems: forward {forward:.1f} ms, backward {backward:.1f} ms (medians)"
    )
    deviation = check_gradient(loss, single)
    passed = deviation < TOLERANCE
    print(
        f"gradient check {'passed' if passed else 'FAILED'}: {deviation:.1e} from central differences, relative"
    )
    past, test = (torch.stack(part) for part in zip(*history, strict=True))
    draw(past, test, single, learnt, data.unit * w_single, data.unit * w_learnt)
    print(f"picture: {PICTURE}")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())

"""Which measurements of a patient deserve trust? Penalties of a constrained regression, learnt through its solution.

Data:   442 diabetes patients, ten measurements each, and the progression of the disease a year later, a score
        between 25 and 346 (Efron, Hastie, Johnstone and Tibshirani, 2004; bundled with scikit-learn).
Inner:  from 30 patients only, fit the coefficients w of a linear model, some with a sign that medicine dictates:

            minimise    |X w - y|^2 / 30 + sum_j lambda_j w_j^2
            subject to  w_bmi, w_pressure, w_triglycerides >= 0,  w_hdl <= 0

Outer:  choose the ten lambda_j that make such a model best on patients it has not seen. Its gradient goes through
        the solution w of the inner problem. Sixteen draws of 30 patients are the batch of one layer.

The rival is the best single lambda, found by search. 100 patients are set aside at the start and only measured at the end.

    python examples/demo.py            prints a table, writes out/demo.png, and fails if the gradient is not right
"""

import statistics
import sys
import time
from pathlib import Path

import cvxpy as cp
import matplotlib
import torch
from sklearn.datasets import load_diabetes
from torch import Tensor
from tqdm import tqdm

from convlayer import ConvexLayer

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

NAMES = ["age", "sex", "body mass index", "blood pressure", "total cholesterol", "LDL cholesterol", "HDL cholesterol",
         "cholesterol / HDL", "log triglycerides", "glucose"]
SIGNS = {2: 1, 3: 1, 6: -1, 8: 1}
FEATURES, TEST, STUDIES, PATIENTS, STEPS, RATE = len(NAMES), 100, 16, 30, 80, 0.1
PICTURE = Path("out") / "demo.png"
BEFORE, AFTER, GREY = "#c8763a", "#1f6f8b", "#8a8a8a"


class Data:
    """The patients, standardised, and who plays which part in each of the sixteen studies."""

    def __init__(self) -> None:
        X, y = (torch.from_numpy(part) for part in load_diabetes(return_X_y=True, scaled=False))
        generator = torch.Generator().manual_seed(0)
        order = torch.randperm(len(y), generator=generator)
        known = order[TEST:]
        self.unit = y[known].std()
        self.X = (X - X[known].mean(0)) / X[known].std(0)  # (442, 10)
        self.y = (y - y[known].mean()) / self.unit  # (442,)
        draws = torch.stack([known[torch.randperm(len(known), generator=generator)] for _ in range(STUDIES)])
        self.train, self.validation = draws[:, :PATIENTS], draws[:, PATIENTS:]  # (16, 30), (16, 312)
        self.test = order[:TEST].expand(STUDIES, -1)  # (16, 100)
        self.X_mean, self.y_mean = self.X[self.train].mean(1), self.y[self.train].mean(1)
        # |X w - y|^2 / 30 is |R w - b|^2 up to a constant, with R ten by ten.
        Q, R = torch.linalg.qr((self.X[self.train] - self.X_mean.unsqueeze(1)) / PATIENTS ** 0.5)
        self.R = R  # (16, 10, 10)
        self.b = (Q.mT @ (self.y[self.train] / PATIENTS ** 0.5).unsqueeze(-1)).squeeze(-1)  # (16, 10)

    def squared_errors(self, w: Tensor, patients: Tensor) -> Tensor:
        """w (16, 10), patients (16, k) -> (16, k), in squared points of the score."""
        centred = self.X[patients] - self.X_mean.unsqueeze(1)
        prediction = (centred @ w.unsqueeze(-1)).squeeze(-1) + self.y_mean.unsqueeze(1)
        return (self.unit * (prediction - self.y[patients])).square()

    def error(self, w: Tensor, patients: Tensor) -> Tensor:
        return self.squared_errors(w, patients).mean().sqrt()


def regression() -> ConvexLayer:
    R, b = cp.Parameter((FEATURES, FEATURES), name="R"), cp.Parameter(FEATURES, name="b")
    penalty, w = cp.Parameter(FEATURES, nonneg=True, name="penalty"), cp.Variable(FEATURES, name="w")
    signs = [sign * w[j] >= 0 for j, sign in SIGNS.items()]
    problem = cp.Problem(cp.Minimize(cp.sum_squares(R @ w - b) + penalty @ cp.square(w)), signs)
    return ConvexLayer(problem, parameters=[R, b, penalty], variables=[w])


def check_gradient(loss, at: Tensor, step: float = 1e-4) -> float:
    """The largest deviation of the gradient from central differences, relative to the gradient's largest entry."""
    at = at.clone().requires_grad_()
    gradient, = torch.autograd.grad(loss(at), at)
    with torch.no_grad():
        moves = step * torch.eye(len(at), dtype=at.dtype)
        differences = torch.stack([(loss(at + move) - loss(at - move)) / (2 * step) for move in moves])
    return float((gradient - differences).abs().max() / gradient.abs().max())


def time_layer(loss, at: Tensor, repeats: int = 30) -> tuple[float, float]:
    """Median milliseconds of a forward and of a backward pass over the sixteen studies."""
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


def standard_error(data: Data, w_before: Tensor, w_after: Tensor) -> float:
    """Of the fall in test error, by 2000 resamplings of the test patients."""
    before, after = (data.squared_errors(w, data.test).mean(0) for w in (w_before, w_after))
    draws = torch.randint(TEST, (2000, TEST), generator=torch.Generator().manual_seed(1))
    return float((before[draws].mean(1).sqrt() - after[draws].mean(1).sqrt()).std())


def draw(history: list[tuple[float, float]], start: Tensor, learnt: Tensor, w_before: Tensor, w_after: Tensor) -> None:
    plt.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False, "axes.titlelocation": "left",
                         "axes.titlesize": 12, "axes.titleweight": "bold", "legend.frameon": False})
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(16, 5.6), layout="constrained", width_ratios=[1.1, 1, 1])
    figure.suptitle("Ten penalties learnt through the solution of a constrained regression: diabetes, models fitted on 30 patients",
                    fontsize=14, x=0.01, ha="left")

    validation, test = zip(*history, strict=True)
    left.plot(validation, color=AFTER, lw=2.2)
    left.plot(test, color=GREY, lw=2.2)
    left.annotate("validation", (STEPS, validation[-1]), (0, 7), textcoords="offset points", ha="right", color=AFTER)
    left.annotate("test, never used to learn", (STEPS, test[-1]), (0, 7), textcoords="offset points", ha="right", color=GREY)
    left.set(title="Error along the way", xlabel="step of Adam", ylabel="root mean squared error (points of the score)", xlim=(0, STEPS))
    left.margins(y=0.12)
    left.grid(axis="y", alpha=0.25)

    rows = range(FEATURES)
    middle.barh(rows, learnt.exp(), color=AFTER, height=0.62)
    shared = float(start[0].exp())
    middle.axvline(shared, color=BEFORE, ls="--", lw=1.8)
    middle.annotate(f"best single\npenalty, {shared:.2g}", (shared, FEATURES - 0.4), (5, 0), textcoords="offset points", color=BEFORE, va="top")
    middle.set(title="Penalties learnt", xlabel="penalty (log scale, no unit)", xscale="log", yticks=rows, yticklabels=NAMES,
               ylim=(FEATURES + 0.6, -0.6))
    middle.tick_params(axis="y", length=0)

    for w, shift, colour, label in ((w_before, -0.16, BEFORE, "single penalty"), (w_after, 0.16, AFTER, "learnt penalties")):
        places = [row + shift for row in rows]
        points = w * 1.0
        right.errorbar(points.mean(0), places, xerr=points.std(0), fmt="o", ms=6, color=colour, elinewidth=1.6, label=label)
    right.axvline(0, color="black", lw=0.8)
    right.set(title="Coefficients, mean and spread of 16 fits", xlabel="points of the score per standard deviation", yticks=rows,
              yticklabels=[name + {1: "  [≥ 0]", -1: "  [≤ 0]"}.get(SIGNS.get(j, 0), "") for j, name in enumerate(NAMES)],
              ylim=(FEATURES + 0.6, -0.6))
    right.tick_params(axis="y", length=0)
    right.grid(axis="y", alpha=0.25)
    right.legend(loc="lower right")

    PICTURE.parent.mkdir(exist_ok=True)
    figure.savefig(PICTURE, dpi=130)


def main() -> int:
    data, layer = Data(), regression()

    def coefficients(log_penalty: Tensor) -> Tensor:
        return layer(data.R, data.b, log_penalty.exp())[0]

    def loss(log_penalty: Tensor) -> Tensor:
        return data.error(coefficients(log_penalty), data.validation)

    with torch.no_grad():
        single = [torch.full((FEATURES,), level, dtype=torch.float64) for level in torch.linspace(-9, 3, 49).tolist()]
        start = min(single, key=loss)
        w_none, w_before = coefficients(torch.full_like(start, -18.0)), coefficients(start)

    log_penalty, history = start.clone().requires_grad_(), []
    optimiser = torch.optim.Adam([log_penalty], lr=RATE)
    for step in (bar := tqdm(range(STEPS + 1), desc="learning ten penalties", unit="step")):
        w = coefficients(log_penalty)
        value = data.error(w, data.validation)
        history.append((float(value), float(data.error(w.detach(), data.test))))
        bar.set_postfix_str(f"validation error {float(value):.2f}")
        if step < STEPS:
            optimiser.zero_grad()
            value.backward()
            optimiser.step()
    learnt = log_penalty.detach()
    with torch.no_grad():
        w_after = coefficients(learnt)

    print(f"\n{'root mean squared error, points of the score':<46}{'validation':>12}{'test':>10}")
    nothing = torch.zeros_like(w_before)
    for name, w in (("predict the mean", nothing), ("no penalty", w_none), (f"before: best single penalty, {float(start[0].exp()):.2g}", w_before),
                    (f"after: ten penalties, {STEPS} steps of Adam", w_after)):
        print(f"{name:<46}{float(data.error(w, data.validation)):>12.2f}{float(data.error(w, data.test)):>10.2f}")
    fall = float(data.error(w_before, data.test) - data.error(w_after, data.test))
    print(f"\nfall in test error       {fall:.2f} points, standard error {standard_error(data, w_before, w_after):.2f} ({TEST} patients)")
    forward, backward = time_layer(loss, learnt)
    print(f"a step                   forward {forward:.1f} ms, backward {backward:.1f} ms (medians; {STUDIES} problems each)")
    deviation = check_gradient(loss, start)
    verdict = "passed" if deviation < 1e-6 else "FAILED"
    print(f"gradient check           {verdict}: off central differences by {deviation:.1e} of the largest entry")
    draw(history, start, learnt, w_before * data.unit, w_after * data.unit)
    print(f"picture                  {PICTURE}")
    return 0 if verdict == "passed" else 1


if __name__ == "__main__":
    sys.exit(main())

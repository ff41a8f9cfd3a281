"""Sudoku learnt from solved puzzles alone: gradient descent finds the constraints of a quadratic
program.

Problem:  a 4 x 4 Sudoku with up to ten of its sixteen cells blank and one solution. There are 288
          completed boards; 188 are for training, and the puzzles that are judged come from the
          other 100, so that no solution can be remembered.
Model:    a puzzle p and its solution z are 64 numbers, four a cell, 1 at the digit that is there
          and 0 elsewhere, and

              minimise    0.1 |z|^2 - p'z
              subject to  A z = b,  z >= 0

          with 40 constraints A, b that all puzzles share and that start at random. The loss is the
          squared error of z, and its gradient goes through the solution into A and b. b = A z0 with
          a positive z0, learnt too: there always is a feasible z. The model knows no rule: not that
          64 is sixteen cells of four, nor what a row or a block is. Forty is 64 less the 24
          dimensions that the training solutions span: fewer leave z too free, and more leave it too
          little room.
Rival:    a network of two hidden layers, on the same puzzles for as long.
Look at:  the share of unseen puzzles solved; and, in the picture, how A comes to contain the rules.
          They are written down in `rules`, which makes the boards and judges A, and in no line of
          the model.
Source:   Amos and Kolter, OptNet: differentiable optimization as a layer in neural networks (2017).

    python examples/sudoku.py [--seconds N] [--seed S] [--quick]      prints a table, draws out/sudoku.png
"""

from __future__ import annotations

import argparse
import itertools
import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field

import cvxpy as cp
import torch
from _side_by_side import AFTER, BEFORE, TRUTH, plt, save
from threadpoolctl import threadpool_limits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss, one_hot
from tqdm import tqdm

from convlayer import ConvexLayer, GradientWarning

CELLS, DIGITS = 16, 4
TRAINING_BOARDS, PUZZLES = 188, 12_000
# blank cells: while learning, on the way, in the table
BLANKS, HARDEST, JUDGED = (
    (4, 10),
    10,
    (6, 8, 10, 12),
)
# more curvature learns faster at first and is less sharp in the end
CONSTRAINTS, CURVATURE = (
    40,
    0.2,
)
STEPS, BATCH, RATE = 720, 24, 0.03
# Longer gradients are shortened to this. The usual one has length 0.04; a puzzle for which A z = b
# and the zeros of z all but determine z has, once in a while, one of length 7: exact, of no use
# further off, and Adam may not recover from the step.
LONGEST = 0.1
HIDDEN, NETWORK_BATCH, NETWORK_RATE = 512, 128, 1e-3


# --- the game: data, and the judgement of what was learnt ---


def rules() -> dict[str, Tensor]:
    """Each kind of rule as (16, 64): a rule's row picks the four entries of z that sum to one."""
    # Block row, row in it, block column, column in it, digit.
    place = torch.arange(CELLS * DIGITS).view(2, 2, 2, 2, DIGITS)
    return {
        "a cell has\none digit": place.reshape(CELLS, DIGITS),
        "a row has\nevery digit": place.permute(0, 1, 4, 2, 3).reshape(CELLS, DIGITS),
        "a column has\nevery digit": place.permute(2, 3, 4, 0, 1).reshape(CELLS, DIGITS),
        "a block has\nevery digit": place.permute(0, 2, 4, 1, 3).reshape(CELLS, DIGITS),
    }


def indicators(kind: Tensor) -> Tensor:
    """(16, 4) places -> (16, 64)"""
    return torch.zeros(CELLS, CELLS * DIGITS, dtype=torch.float64).scatter_(1, kind, 1.0)


def all_boards() -> Tensor:
    """(288, 64), one-hot"""
    # (24, 16)
    lines = (
        one_hot(torch.tensor(list(itertools.permutations(range(DIGITS)))), DIGITS)
        .double()
        .flatten(1)
    )
    every = torch.cat([indicators(kind) for kind in rules().values()])
    boards = lines.new_zeros(1, 0)
    for _ in range(4):  # a line more each time, as long as nothing stands twice
        boards = torch.cat(
            [boards.repeat_interleave(len(lines), 0), lines.repeat(len(boards), 1)], 1
        )
        boards = boards[(boards @ every[:, : boards.shape[1]].T <= 1).all(1)]
    return boards


@dataclass(frozen=True)
class Puzzles:
    given: Tensor  # (n, 64)
    solution: Tensor  # (n, 64)

    def __getitem__(self, rows: Tensor | slice) -> Puzzles:
        return Puzzles(self.given[rows], self.solution[rows])

    @classmethod
    def draw(
        cls,
        boards: Tensor,
        blanks: tuple[int, int],
        count: int,
        everything: Tensor,
        random: torch.Generator,
    ):
        """`count` puzzles of these boards; kept are those that agree with one board of everything,
        their own."""
        given, solution = boards[:0], boards[:0]
        while len(given) < count:
            board = boards[torch.randint(len(boards), (count,), generator=random)]
            blank = torch.randint(blanks[0], blanks[1] + 1, (count, 1), generator=random)
            # a random ranking of the cells
            order = torch.rand(count, CELLS, generator=random).argsort(1)
            puzzle = board * (order >= blank).repeat_interleave(DIGITS, 1)
            unique = (puzzle @ everything.T == CELLS - blank).sum(1) == 1
            given, solution = (
                torch.cat([given, puzzle[unique]]),
                torch.cat([solution, board[unique]]),
            )
        return cls(given[:count], solution[:count])


def right(z: Tensor, solution: Tensor) -> Tensor:
    """(n, 64) -> (n, 16), the cells whose largest entry is at the right digit."""
    return z.view(-1, CELLS, DIGITS).argmax(-1) == solution.view(-1, CELLS, DIGITS).argmax(-1)


def share_solved(z: Tensor, puzzles: Puzzles) -> float:
    return right(z, puzzles.solution).all(1).double().mean().item()


# --- the two models ---


class QuadraticProgram(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        n, m = CELLS * DIGITS, CONSTRAINTS
        self.A = nn.Parameter(torch.randn(m, n, dtype=torch.float64) / n**0.5)
        self.log_z0 = nn.Parameter(torch.full((n,), math.log(0.25), dtype=torch.float64))
        p, A, b, z = cp.Parameter(n), cp.Parameter((m, n)), cp.Parameter(m), cp.Variable(n)
        problem = cp.Problem(
            cp.Minimize(CURVATURE / 2 * cp.sum_squares(z) - p @ z), [A @ z == b, z >= 0]
        )
        self.layer = ConvexLayer(problem, [p, A, b], [z])

    def forward(self, given: Tensor) -> Tensor:
        return self.layer(given, self.A, self.A @ self.log_z0.exp())[0]


def network() -> nn.Module:
    n = CELLS * DIGITS
    first = (nn.Linear(n, HIDDEN), nn.ReLU(), nn.Dropout(0.3))
    return nn.Sequential(
        *first, nn.Linear(HIDDEN, HIDDEN), nn.ReLU(), nn.Dropout(0.3), nn.Linear(HIDDEN, n)
    ).double()


def network_loss(scores: Tensor, solution: Tensor) -> Tensor:
    """Told, unlike the quadratic program, that every cell has one of four digits."""
    return cross_entropy(scores.view(-1, DIGITS), solution.view(-1, DIGITS).argmax(-1))


# --- learning ---


@dataclass
class History:
    """What was seen on the way, on unseen puzzles; time does not run while looking."""

    steps: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    solved: list[float] = field(default_factory=list)
    shown: list[Tensor] = field(default_factory=list)  # z of the first of them

    def look(self, model: nn.Module, unseen: Puzzles, step: int, seconds: float) -> None:
        model.eval()
        with torch.no_grad():
            z = model(unseen.given)
        model.train()
        self.steps.append(step)
        self.seconds.append(seconds)
        self.solved.append(share_solved(z, unseen))
        self.shown.append(z[0])


def learn(
    model: nn.Module,
    loss: Callable[[Tensor, Tensor], Tensor],
    training: Puzzles,
    unseen: Puzzles,
    *,
    name: str,
    rate: float,
    batch: int,
    longest: float,  # gradient that is not shortened
    steps: float,  # at most
    seconds: float,  # at most
    looks: int,  # at the unseen puzzles
) -> History:
    """Adam, its rate falling to zero along half a cosine."""
    optimiser, history = torch.optim.Adam(model.parameters(), rate), History()
    progress, spent, step, value = 0.0, 0.0, 0, torch.tensor(math.nan)
    with tqdm(
        total=100, desc=name, bar_format="{desc} {percentage:3.0f}% |{bar:24}| {elapsed}{postfix}"
    ) as bar:
        while True:
            if progress * looks >= len(history.steps):
                history.look(model, unseen, step, spent)
            bar.set_postfix_str(
                f"loss {value.item():.4f}, unseen puzzles solved {history.solved[-1]:.0%}",
                refresh=False,
            )
            bar.update(100 * progress - bar.n)
            if progress >= 1:
                return history
            start = time.perf_counter()
            optimiser.param_groups[0]["lr"] = rate * (1 + math.cos(math.pi * progress)) / 2
            some = training[torch.randint(len(training.given), (batch,))]
            value = loss(model(some.given), some.solution)
            optimiser.zero_grad()
            value.backward()
            nn.utils.clip_grad_norm_(model.parameters(), longest)
            optimiser.step()
            step, spent = step + 1, spent + time.perf_counter() - start
            progress = min(max(step / steps, spent / seconds), 1.0)


def contained(A: Tensor) -> dict[str, Tensor]:
    """For each rule, (16,): the squared length of its direction within the rows of A. 1: A implies
    that the sum is constant."""
    basis = torch.linalg.qr(A.detach().T).Q  # (64, 40)
    return {
        name: (indicators(kind) @ basis).square().sum(1) / DIGITS for name, kind in rules().items()
    }


# --- the picture ---


def frame_board(axes, title: str, subtitle: str) -> None:
    axes.set(xlim=(-0.06, 4.06), ylim=(4.06, -0.06), aspect="equal")
    axes.axis("off")
    for k in range(5):
        for x, y in (([k, k], [0, 4]), ([0, 4], [k, k])):
            axes.plot(x, y, color="black", lw=0.7 if k % 2 else 2.2, solid_capstyle="round")
    axes.set_title(title, loc="center", pad=8)
    axes.text(2, 4.3, subtitle, ha="center", va="top", color="#444444")


def draw_board(axes, puzzle: Puzzles, z: Tensor, title: str, subtitle: str) -> None:
    """A digit's size is its entry of z; the largest of a cell is where it would be read off, the
    others around it."""
    frame_board(axes, title, subtitle)
    given, correct = puzzle.given.view(CELLS, DIGITS).sum(1) > 0, right(z, puzzle.solution)[0]
    for cell, entries in enumerate(z.view(CELLS, DIGITS).clamp(0, 1).tolist()):
        row, column = divmod(cell, 4)
        if given[cell]:
            axes.fill(
                [column, column + 1, column + 1, column],
                [row, row, row + 1, row + 1],
                color="#e9e9e6",
                zorder=0,
            )
        best = max(range(DIGITS), key=entries.__getitem__)
        for digit, value in enumerate(entries):
            if value < 0.02:
                continue
            away = 0.29 * (1 - value**3)  # in the middle when it is sure
            x, y = (
                column + 0.5 + away * (2 * (digit % 2) - 1),
                row + 0.5 + away * (2 * (digit // 2) - 1),
            )
            colour = (
                "#b0b0b0"
                if digit != best
                else BEFORE
                if not correct[cell]
                else "black"
                if given[cell]
                else AFTER
            )
            weight = "bold" if digit == best else "normal"
            axes.text(
                x,
                y,
                str(digit + 1),
                size=6 + 18 * value,
                color=colour,
                weight=weight,
                ha="center",
                va="center_baseline",
            )


def draw_boards(row, puzzle: Puzzles, history: History) -> None:
    blank = puzzle.given.view(CELLS, DIGITS).sum(1) == 0
    draw_board(row[0], puzzle, puzzle.given[0], "The puzzle", "not seen while learning")
    last = len(history.steps) - 1
    for axes, k in zip(row[1:], (0, max(1, round(last / 12)), max(1, round(last / 4)), last)):
        z, step = history.shown[k], history.steps[k]
        found = int(right(z, puzzle.solution)[0][blank].sum())
        title = "Before learning" if not k else f"After {step} steps"
        draw_board(axes, puzzle, z, title, f"{found} of {int(blank.sum())} blanks right")
    draw_board(row[5], puzzle, puzzle.solution[0], "The solution", "hidden from the model")


def draw_learning(axes, program: History, rival: History) -> None:
    for history, colour, label, drop in (
        (program, AFTER, "quadratic program", -36),
        (rival, BEFORE, "network", 9),
    ):
        axes.plot(
            history.seconds, history.solved, color=colour, lw=2.6, marker="o", ms=4, clip_on=False
        )
        x, y = history.seconds[-1], history.solved[-1]
        words = f"{label}: {100 * y:.0f} %"
        axes.annotate(
            words,
            (x, y),
            (0, drop),
            textcoords="offset points",
            color=colour,
            ha="right",
            weight="bold",
        )
    axes.set(
        title=f"Share of 100 unseen puzzles solved ({HARDEST} blanks of 16, every cell right)",
        xlabel="seconds of learning",
        xlim=(0, None),
        ylim=(0, 1.09),
        yticks=(0, 0.25, 0.5, 0.75, 1),
        yticklabels=("0", "25 %", "50 %", "75 %", "100 %"),
    )
    axes.grid(axis="y", alpha=0.25)


def draw_rules(axes, before: dict[str, Tensor], after: dict[str, Tensor]) -> None:
    for found, colour, label, shift in (
        (before, TRUTH, "before", -0.17),
        (after, AFTER, "after", 0.17),
    ):
        for k, shares in enumerate(found.values()):
            places = k + shift + torch.linspace(-0.13, 0.13, CELLS)
            axes.plot(
                places,
                shares,
                "o",
                color=colour,
                ms=5,
                alpha=0.75,
                clip_on=False,
                label=None if k else f"{label} learning",
            )
    axes.set(
        title="The 64 rules, which it was never told: how much of each is in A",
        xticks=range(len(after)),
        xticklabels=list(after),
        xlim=(-0.5, 3.5),
        ylim=(0, 1.09),
        yticks=(0, 0.5, 1),
        yticklabels=("none", "half", "all of it"),
    )
    axes.tick_params(axis="x", length=0)
    axes.grid(axis="y", alpha=0.25)
    axes.legend(loc="lower right", ncols=2, handletextpad=0.1)


def draw(
    puzzle: Puzzles,
    program: History,
    rival: History,
    before: dict[str, Tensor],
    after: dict[str, Tensor],
) -> None:
    figure = plt.figure(figsize=(17, 9))
    figure.text(
        0.03,
        0.945,
        "Sudoku from examples: a quadratic program learns its own constraints",
        size=20,
        weight="bold",
    )
    figure.text(
        0.03,
        0.905,
        "one unseen puzzle while the layer learns; the larger a digit, the larger its entry of the layer's solution z; "
        "blue: right, orange: wrong, grey cell: given",
        color="#444444",
    )
    boards = figure.subplots(
        1,
        6,
        gridspec_kw={"left": 0.025, "right": 0.98, "top": 0.845, "bottom": 0.52, "wspace": 0.12},
    )
    draw_boards(boards, puzzle, program)
    below = {"left": 0.065, "right": 0.975, "top": 0.42, "bottom": 0.08, "wspace": 0.19}
    left, beside = figure.subplots(1, 2, gridspec_kw=below)
    draw_learning(left, program, rival)
    draw_rules(beside, before, after)
    save(figure, "sudoku")


def print_table(models: dict[str, nn.Module], judged: dict[int, Puzzles]) -> None:
    title = f"unseen puzzles solved, {len(judged[HARDEST].given)} a column; blank cells:"
    print(f"\n{title:<56}" + "".join(f"{blanks:>8}" for blanks in judged))
    for name, model in models.items():
        model.eval()
        with torch.no_grad():
            shares = [share_solved(model(puzzles.given), puzzles) for puzzles in judged.values()]
        print(f"{name:<56}" + "".join(f"{share:>8.1%}" for share in shares))


def compare(options: argparse.Namespace) -> None:
    steps, batch, looks, count, tests = (
        (4, 8, 2, 200, 20) if options.quick else (STEPS, BATCH, 24, PUZZLES, 400)
    )
    torch.manual_seed(options.seed)
    random = torch.Generator().manual_seed(options.seed)

    everything = all_boards()
    boards = everything[torch.randperm(len(everything), generator=random)]
    training = Puzzles.draw(boards[:TRAINING_BOARDS], BLANKS, count, everything, random)
    judged = {
        k: Puzzles.draw(boards[TRAINING_BOARDS:], (k, k), tests, everything, random) for k in JUDGED
    }
    unseen = judged[HARDEST][: min(tests, 100)]

    # Once in some hundred thousand puzzles a solution lies within 1e-7 of a kink, where a digit is
    # only just excluded; its one-sided derivative will do.
    warnings.simplefilter("ignore", GradientWarning)
    program, rival = QuadraticProgram(), network()
    before = contained(program.A)
    ours = learn(
        program,
        mse_loss,
        training,
        unseen,
        name="quadratic program",
        rate=RATE,
        batch=batch,
        longest=LONGEST,
        steps=steps,
        seconds=options.seconds,
        looks=looks,
    )
    theirs = learn(
        rival,
        network_loss,
        training,
        unseen,
        name="network          ",
        rate=NETWORK_RATE,
        batch=NETWORK_BATCH,
        longest=math.inf,
        steps=math.inf,
        seconds=ours.seconds[-1],
        looks=looks,
    )
    after = contained(program.A)

    models = {
        f"quadratic program, {CONSTRAINTS} learnt constraints": program,
        f"network, two hidden layers of {HIDDEN}": rival,
    }
    print_table(models, judged)
    print(
        f"\n{ours.steps[-1]} and {theirs.steps[-1]} steps in {ours.seconds[-1]:.0f} s each; {BLANKS[0]} to {BLANKS[1]} blanks while learning\n"
        f"rules in A, least of 64: {float(torch.cat([*before.values()]).min()):.0%} before, {float(torch.cat([*after.values()]).min()):.0%} after"
    )
    draw(judged[HARDEST][:1], ours, theirs, before, after)


def main() -> None:
    parser = argparse.ArgumentParser(description="Sudoku learnt from solved puzzles alone.")
    parser.add_argument(
        "--seconds", type=float, default=80.0, help="at most so long for each model"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it runs")
    options = parser.parse_args()
    # the matrices of either model are too small to share
    with threadpool_limits(1, user_api="openmp"):
        compare(options)


if __name__ == "__main__":
    main()

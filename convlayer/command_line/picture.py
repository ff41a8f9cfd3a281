"""The picture of a comparison: bars by problem on the left, time against size on the right."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator
from PIL import Image

from convlayer.command_line.figures import Curve, Row

GENERIC, SPECIALISED, INK, GREY = "#c8763a", "#1f6f8b", "#222222", "#8a8a8a"
STYLE: Any = {
    "font.size": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 13,
    "axes.titleweight": "bold",
    "axes.edgecolor": GREY,
    "xtick.color": INK,
    "ytick.color": INK,
}
TITLE = "The same CVXPY problem, the same answer: kernel against cone program"
HEIGHT = 0.36  # of a bar, in units of the distance between problems
# two, grey, and their edges: a palette takes a third of the bytes, and the picture stands in the
# README
COLOURS = 64


def draw(rows: Sequence[Row], curves: Sequence[Curve], subtitle: str, path: Path) -> None:
    """Write the picture to `path`."""
    with plt.rc_context(STYLE):
        figure = plt.figure(figsize=(18, 8.2))
        halves: Any = figure.subfigures(1, 2, width_ratios=(1.0, 1.12))
        left, right = halves
        figure.text(0.022, 0.945, TITLE, fontsize=20, weight="bold")
        figure.text(0.022, 0.905, subtitle, fontsize=13, color="#555555")
        _bars(
            left.subplots(gridspec_kw={"left": 0.26, "right": 0.95, "bottom": 0.1, "top": 0.82}),
            rows,
        )
        grid = right.subplots(
            2,
            3,
            gridspec_kw={
                "left": 0.085,
                "right": 0.98,
                "bottom": 0.1,
                "top": 0.82,
                "hspace": 0.52,
                "wspace": 0.36,
            },
        )
        for k, (axes, curve) in enumerate(zip(grid.flat, curves)):
            _lines(axes, curve, first=k == 0, outer=k % 3 == 0)
        figure.savefig(path, dpi=110)
        plt.close(figure)
    Image.open(path).convert("RGB").quantize(COLOURS).save(path, optimize=True)


def _bars(axes: Any, rows: Sequence[Row]) -> None:
    """Two bars a problem, each with its time at its end; the speed-up at the right."""
    low = 0.4 * min(min(row.specialised, row.generic) for row in rows)
    high = max(max(row.specialised, row.generic) for row in rows)
    axes.set(
        xscale="log", xlim=(low, 30 * high), ylim=(len(rows) - 0.4, -0.75), yticks=range(len(rows))
    )
    axes.set_yticklabels([f"{row.title}\n{_two_lines(row.size)}" for row in rows])
    for k, row in enumerate(rows):
        for shift, seconds, colour, name in (
            (-0.5, row.generic, GENERIC, "cone program"),
            (0.5, row.specialised, SPECIALISED, "kernel"),
        ):
            place = k + shift * HEIGHT * 1.06
            axes.barh(place, seconds - low, left=low, height=HEIGHT, color=colour)
            axes.text(1.05 * seconds, place, _time(seconds), va="center", color=colour)
            if k == 0:
                axes.text(1.1 * low, place, name, va="center", color="white", weight="bold")
        axes.text(
            0.995,
            k,
            _times(row.speedup),
            transform=axes.get_yaxis_transform(),
            ha="right",
            va="center",
            fontsize=20,
            weight="bold",
            color=INK,
        )
    axes.text(
        0.995,
        -0.62,
        "speed-up",
        transform=axes.get_yaxis_transform(),
        ha="right",
        va="center",
        color="#555555",
    )
    axes.set_title(f"Time a call, batch of {rows[0].batch}", pad=8)
    axes.set_xlabel("forward and backward (log scale)", loc="left")
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.xaxis.set_major_locator(
        FixedLocator([10.0**e for e in range(-5, 3) if low <= 10.0**e <= 3 * high])
    )
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _time(value)))


def _lines(axes: Any, curve: Curve, *, first: bool, outer: bool) -> None:
    """Time against size, both logarithmic."""
    for seconds, colour in ((curve.generic, GENERIC), (curve.specialised, SPECIALISED)):
        axes.plot(
            curve.sizes[: len(seconds)],
            seconds,
            color=colour,
            lw=2.4,
            marker="o",
            ms=6,
            clip_on=False,
        )
    if first:
        axes.text(0.04, 0.9, "cone program", color=GENERIC, weight="bold", transform=axes.transAxes)
        axes.text(
            0.98,
            0.07,
            "kernel",
            color=SPECIALISED,
            weight="bold",
            ha="right",
            transform=axes.transAxes,
        )
    axes.set(xscale="log", yscale="log", xlabel=curve.axis, ylim=(2e-4, 4.0))
    axes.set_title(curve.title, pad=8)
    axes.xaxis.set_major_locator(FixedLocator(curve.sizes))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f}"))
    axes.yaxis.set_major_locator(LogLocator())
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _time(value)))
    axes.grid(axis="y", alpha=0.25)
    if outer:
        axes.set_ylabel(f"a call, batch of {curve.batch}")


def _two_lines(words: str) -> str:
    return words.replace(" and ", "\n")


def _time(seconds: float) -> str:
    if seconds < 0.9995e-3:
        return f"{1e6 * seconds:.2g} µs" if seconds < 9.95e-5 else f"{1e3 * seconds:.2f} ms"
    return (
        f"{1e3 * seconds:.2g} ms"
        if seconds < 0.0995
        else f"{1e3 * seconds:.0f} ms"
        if seconds < 0.9995
        else f"{seconds:.2g} s"
    )


def _times(ratio: float) -> str:
    return f"{ratio:.1f}×" if ratio < 9.95 else f"{ratio:.0f}×"

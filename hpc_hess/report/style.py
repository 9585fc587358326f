"""One look for every figure: colours that survive colour blindness and grey printing, a symmetric-log axis."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import (
    FixedFormatter,
    FixedLocator,
    FuncFormatter,
    LogLocator,
    MaxNLocator,
    NullFormatter,
    ScalarFormatter,
)
from numpy.typing import NDArray

from hpc_hess.console.words import minus, number
from hpc_hess.linalg.density import symlog

# Okabe and Ito (2008); negative curvature is always blue, positive always vermilion
NEGATIVE, POSITIVE, INK, MUTED = "#0072B2", "#D55E00", "#1a1a1a", "#6b6b6b"
CYCLE = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#1a1a1a"]
MARKERS = ["o", "s", "^", "D", "v", "P", "X"]

STYLE: dict[str, Any] = {
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e3e3e3",
    "grid.linewidth": 0.7,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.4,
    "lines.markersize": 4,
    "axes.unicode_minus": True,
    "axes.formatter.useoffset": False,
    "axes.formatter.use_mathtext": True,
    "svg.hashsalt": "hpc_hess",  # the same run gives the same file
    "svg.fonttype": "path",
}


_DPI = 160


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure of so many inches."""
    figure = Figure(figsize=(width, height), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Figure, png: Path, svg: Path | io.StringIO) -> None:
    """Write a figure of :func:`new_figure` in both formats. It is laid out here, and drawn once for each."""
    for axis in (axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)):
        if type(axis.get_major_formatter()) is ScalarFormatter:
            axis.set_major_formatter(_PlainNumbers())
    engine = figure.get_layout_engine()
    if engine is not None:
        engine.execute(figure)
    figure.set_layout_engine(None)  # with one, savefig draws everything twice
    figure.savefig(png, dpi=_DPI)
    figure.savefig(svg, format="svg", dpi=100, metadata={"Date": None})


class _PlainNumbers(ScalarFormatter):
    """Ticks in plain characters where matplotlib writes mathtext, whose parsing takes a quarter of a figure's time."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        return super().__call__(x, pos).removeprefix(r"$\mathdefault{").removesuffix("}$")


class DecadeTicks(NamedTuple):
    """Ticks of a symmetric-log axis, as eigenvalues: labelled ones, and small ones without a label."""

    values: list[float]
    labels: list[str]
    minor: list[float]


def decade_ticks(low: float, high: float, linear: float, most: int = 11) -> DecadeTicks:
    """Label zero and the powers of ten of both signs that lie clear of zero, thinned to about ``most`` in all.

    Small ticks are the powers left out, or 2 to 9 times each power where all have a label.
    """
    first = int(np.ceil(np.log10(linear) + 0.3))
    powers = []
    for sign, end in ((-1, -low), (1, high)):
        last = int(np.floor(np.log10(end))) if end > 0 else first - 1
        powers += [(sign, e) for e in range(first, last + 1) if low <= sign * 10.0**e <= high]
    stride = max(1, -(-len(powers) // max(most - 1, 1)))
    # thinned from one anchor, so that both signs show the same decades
    shown = [(sign, e) for sign, e in powers if (e - first) % stride == stride - 1]
    ticks = [(sign * 10.0**e, ("\u2212" if sign < 0 else "") + _power(e)) for sign, e in shown]
    if low <= 0 <= high:
        ticks.append((0.0, "0"))
    if len(ticks) < 2:  # less than a decade is in sight
        ends = MaxNLocator(6).tick_values(low, high)
        ticks = [(float(v), minus(number(float(v)))) for v in ends if low <= v <= high]
    ticks.sort()
    if stride > 1:
        minor = [sign * 10.0**e for sign, e in powers if (sign, e) not in shown]
    else:
        minor = [sign * k * 10.0**e for sign, e in powers for k in range(2, 10)]
    return DecadeTicks([v for v, _ in ticks], [t for _, t in ticks], [m for m in minor if low <= m <= high])


_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def _power(exponent: int) -> str:
    """Spell a power of ten in plain characters: mathtext takes a third of the time of a figure."""
    return str(10**exponent) if 0 <= exponent <= 2 else "10" + str(exponent).translate(_RAISED)


def label_powers(axes: Axes, most: int = 6) -> None:
    """Label powers of ten, and nothing between them, on a logarithmic y axis."""
    axes.yaxis.set_major_locator(LogLocator(numticks=most))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: _power(round(float(np.log10(y)))) if y > 0 else ""))
    axes.yaxis.set_minor_formatter(NullFormatter())


def set_symlog(axes: Axes, which: str, low: float, high: float, linear: float) -> Callable[[Any], NDArray[np.float64]]:
    """Label the ``which`` ("x" or "y") axis in eigenvalues and return the map to the positions to plot at."""
    ticks = decade_ticks(low, high, linear)
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_locator(FixedLocator(list(symlog(ticks.values, linear))))
    axis.set_major_formatter(FixedFormatter(ticks.labels))
    axis.set_minor_locator(FixedLocator(list(symlog(ticks.minor, linear)) if ticks.minor else []))
    return lambda x: symlog(x, linear)


def set_log(axes: Axes, low: float, high: float) -> None:
    """Make the y axis logarithmic over at least two decades around [low, high] (positive), powers labelled only."""
    a, b = np.log10(low), np.log10(high)
    pad = max(0.06 * (b - a), (2.0 - (b - a)) / 2)
    axes.set_yscale("log")
    axes.set_ylim(10 ** (a - pad), 10 ** (b + pad))
    label_powers(axes)


def probe_style(k: int, num_probes: int, num_points: int) -> dict[str, Any]:
    """Return line properties of probe ``k``: told apart while there are few, one thin colour when there are many."""
    if num_probes > len(CYCLE):
        return {"color": NEGATIVE, "linewidth": 0.8, "alpha": 0.5}
    width = 1.4 if num_probes == 1 else 1.0
    marker = MARKERS[k] if num_points <= 60 else ""
    return {"color": CYCLE[k], "marker": marker, "label": f"probe {k + 1}", "linewidth": width}


def say(axes: Axes, text: str) -> None:
    """Write in the middle of an empty panel why it is empty."""
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color=MUTED)
    axes.set_yticks([])


def linear_threshold(values: NDArray[np.float64], weights: NDArray[np.float64]) -> float:
    """Choose where a symmetric-log axis turns linear: a tenth of the bulk's radius (weighted median of |value|).

    At least 1e-6 of the largest, so that a value that is zero to rounding does not stretch the axis.
    """
    radius = np.abs(values)
    largest = float(radius.max(initial=0.0))
    if largest == 0:
        return 1.0
    order = np.argsort(radius)
    half = int(np.searchsorted(np.cumsum(weights[order]), 0.5 * weights.sum()))
    bulk = float(radius[order][min(half, len(radius) - 1)])
    return max(bulk / 10, 1e-6 * largest)

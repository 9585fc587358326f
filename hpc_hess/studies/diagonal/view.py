"""The diagonal as a study estimated it: how much of the trace each layer has."""

from __future__ import annotations

from collections.abc import Mapping
from math import sqrt
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hpc_hess.console.words import minus, number
from hpc_hess.report.style import NEGATIVE, POSITIVE

TITLE = "The diagonal, layer by layer"
HEADERS = ["Layer", "Entries", "Sum of the diagonal", "Standard error", "Mean of an entry"]
_METHODS = {"hutchinson": "Hutchinson's estimator with independent signs", "xdiag": "XDiag"}


def facts(found: Mapping[str, Any]) -> str:
    """Name the method, what it cost, and how far to trust an entry."""
    return (
        f"{_METHODS[found['method']]}, {found['products']} products: expect a relative error of the whole diagonal of "
        f"{number(100 * found['relative_error'], 2)} % in the 2-norm. Entries and their standard errors are rows 0 and 1 of "
        f"{found['store']}."
    )


def table(found: Mapping[str, Any]) -> list[list[str]]:
    """Return a row for each layer, in the order of the parameters."""
    return [
        [
            name,
            f"{group['entries']:,}",
            minus(number(group["sum"], 4)),
            number(sqrt(group["variance"]), 2),
            minus(number(group["sum"] / group["entries"], 3)),
        ]
        for name, group in found["groups"].items()
    ]


def size(found: Mapping[str, Any]) -> tuple[float, float]:
    """Return the figure's size in inches."""
    return 8.4, 1.6 + 0.2 * len(found["groups"])


def draw(figure: Figure, found: Mapping[str, Any], result: Mapping[str, Any]) -> str:
    """Draw a bar for each layer and return the caption."""
    draw_bars(figure.subplots(), found["groups"])
    return "What each layer adds to the trace, with standard errors (of independent entries)."


def draw_bars(axes: Axes, groups: Mapping[str, Mapping[str, float]]) -> None:
    """Draw a bar for each layer: its ``sum``, with the root of its ``variance``."""
    names = sorted(groups, key=_order)
    sums = [groups[name]["sum"] for name in names]
    errors = [sqrt(groups[name]["variance"]) for name in names]
    colours = [NEGATIVE if value < 0 else POSITIVE for value in sums]
    axes.barh(range(len(names)), sums, xerr=errors, color=colours, height=0.7, error_kw={"linewidth": 0.8})
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.invert_yaxis()
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(False, axis="y")
    axes.set_xlabel("sum of the diagonal: the layer's part of the trace")


def _order(name: str) -> tuple[bool, int]:
    return (not name.startswith("block"), int(name.split()[1]) if name.startswith("block") else 0)


def lines(found: Mapping[str, Any]) -> list[str]:
    """Return what the diagonal is worth, and where most of the trace is."""
    name, group = max(found["groups"].items(), key=lambda item: abs(item[1]["sum"]))
    return [
        f"|diag| {number(found['norm'], 4)}, relative error {number(100 * found['relative_error'], 2)} %; "
        f"the largest part of the trace is {number(group['sum'], 3)} in {name}"
    ]

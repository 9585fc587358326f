"""The density with the outliers taken out: exact lines for them, a smooth curve for the rest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from hpc_hess.console.words import minus, number
from hpc_hess.linalg.quadrature import ritz
from hpc_hess.report.densities import UNRESOLVED, Curve, draw_densities
from hpc_hess.report.spectrum import quadratures
from hpc_hess.report.style import INK, MUTED, NEGATIVE, POSITIVE, label_powers

TITLE = "Outliers taken out, the rest estimated"
HEADERS = ["Quantity", "Value"]


def facts(found: Mapping[str, Any]) -> str:
    """Say what was taken out and what is left."""
    rest = ritz(found["alpha"], found["beta"])
    return (
        f"{len(found['outliers'])} eigenpairs were taken out of the matrix; {found['steps']} Lanczos steps on the rest see "
        f"eigenvalues from {minus(number(rest.values[0]))} to {minus(number(rest.values[-1]))}. A probe's own weight of an "
        "outlier is random; here each counts as exactly one eigenvalue."
    )


def table(found: Mapping[str, Any]) -> list[list[str]]:
    """Return moments of the rest and the outliers' part of the trace."""
    rest = ritz(found["alpha"], found["beta"])
    outliers = np.array(found["outliers"])
    inside = found["size"] * float(rest.weights @ rest.values)
    squares = found["size"] * float(rest.weights @ rest.values**2)
    return [
        ["sum of the outliers", minus(number(float(outliers.sum()), 5))],
        ["trace of the rest (one probe: no error)", minus(number(inside, 5))],
        ["sum of squares of the outliers", number(float((outliers**2).sum()), 5)],
        ["sum of squares of the rest (one probe: no error)", number(squares, 5)],
    ]


def size(found: Mapping[str, Any]) -> tuple[float, float]:
    """Return the figure's size in inches."""
    return 8.4, 4.0


def draw(figure: Figure, found: Mapping[str, Any], result: Mapping[str, Any]) -> str:
    """Draw the density of the rest, the outliers at 1 / N, and the run's own density; return the caption."""
    axes, rest = figure.subplots(), ritz(found["alpha"], found["beta"])
    outliers = np.array(found["outliers"])
    whole = Curve(quadratures(result), MUTED, "of the whole, as the probes see it", 0.9)
    place, width, _ = draw_densities(axes, [whole, Curve([rest], INK, "of the rest")], rest, outliers)
    height = 1 / (found["size"] + len(outliers)) / (width * np.sqrt(2 * np.pi))  # a line's peak, as wide as the curve's
    colours = [NEGATIVE if value < 0 else POSITIVE for value in outliers]
    floor = height * 1e-3
    axes.vlines(place(outliers), floor, height, colors=colours, linewidth=1.4, label="outliers, one eigenvalue each")
    axes.set_ylim(floor, 10)
    label_powers(axes, 9)
    figure.legend(loc="outside upper right", ncols=3)
    return (
        "Black: the density of the matrix without its outliers (one probe). Lines: the outliers, each as high as exactly "
        "one eigenvalue smoothed like the curve. Grey: the density of the run's own probes, outliers and all. "
        f"{UNRESOLVED}"
    )


def lines(found: Mapping[str, Any]) -> list[str]:
    """Return one line."""
    rest = ritz(found["alpha"], found["beta"])
    return [
        f"without {len(found['outliers'])} outliers the spectrum reaches from {number(rest.values[0])} to "
        f"{number(rest.values[-1])}"
    ]

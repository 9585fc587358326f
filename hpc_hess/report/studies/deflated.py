"""The density with the outliers taken out: exact lines for them, a smooth curve for the rest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from hpc_hess.linalg.density import density_symlog, symlog
from hpc_hess.linalg.quadrature import ritz
from hpc_hess.report.spectrum import quadratures
from hpc_hess.report.style import INK, MUTED, NEGATIVE, POSITIVE, label_powers, linear_threshold, set_symlog
from hpc_hess.report.words import minus, number

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
    return [
        ["sum of the outliers", minus(number(float(outliers.sum()), 5))],
        ["trace of the rest", minus(number(inside, 5))],
        ["sum of squares of the outliers", number(float((outliers**2).sum()), 5)],
        ["sum of squares of the rest", number(found["size"] * float(rest.weights @ rest.values**2), 5)],
    ]


def size(found: Mapping[str, Any]) -> tuple[float, float]:
    """Return the figure's size in inches."""
    return 8.4, 4.0


def draw(figure: Figure, found: Mapping[str, Any], result: Mapping[str, Any]) -> str:
    """Draw the density of the rest, the outliers at 1 / N, and the run's own density; return the caption."""
    axes, rest = figure.subplots(), ritz(found["alpha"], found["beta"])
    whole, outliers = quadratures(result), np.array(found["outliers"])
    values = np.concatenate([rest.values, outliers, *[q.values for q in whole]])
    linear = linear_threshold(rest.values, rest.weights)
    span = float(np.ptp(symlog(values, linear)))
    width = float(np.clip(0.5 * span / max(len(rest.values), 1), 0.05, 0.3))
    place = set_symlog(axes, "x", float(values.min()) * 1.5, float(values.max()) * 1.5, linear)
    for parts, colour, label in ((whole, MUTED, "of the whole, as the probes see it"), ([rest], INK, "of the rest")):
        shape = density_symlog(parts, points=1200, width=width, linear=linear)
        axes.plot(symlog(shape.grid, linear), np.maximum(shape.mean, 1e-300), color=colour, label=label,
                  linewidth=0.9 if colour == MUTED else 1.4)  # fmt: skip
    height = 1 / (found["size"] + len(outliers)) / (width * np.sqrt(2 * np.pi))  # a line's peak, as wide as the curve's
    colours = [NEGATIVE if value < 0 else POSITIVE for value in outliers]
    floor = height * 1e-3
    axes.vlines(place(outliers), floor, height, colors=colours, linewidth=1.4, label="outliers, one eigenvalue each")
    axes.set_yscale("log")
    axes.set_ylim(floor, 10)
    label_powers(axes, 9)
    axes.set_xlim(float(place(values.min())) - 3 * width, float(place(values.max())) + 3 * width)
    axes.set_ylabel("density per decade of λ")
    axes.set_xlabel("eigenvalue λ, symmetric-log axis")
    figure.legend(loc="outside upper right", ncols=3)
    return (
        "Black: the density of the matrix without its outliers (one probe). Lines: the outliers, each as high as exactly "
        "one eigenvalue smoothed like the curve. Grey: the density of the run's own probes, outliers and all."
    )


def lines(found: Mapping[str, Any]) -> list[str]:
    """Return one line."""
    rest = ritz(found["alpha"], found["beta"])
    return [
        f"without {len(found['outliers'])} outliers the spectrum reaches from {number(rest.values[0])} to "
        f"{number(rest.values[-1])}"
    ]

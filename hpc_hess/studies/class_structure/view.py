"""The Gauss-Newton matrix with and without its class means."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from hpc_hess.console.words import number, plural
from hpc_hess.linalg.quadrature import ritz
from hpc_hess.report.densities import UNRESOLVED, Curve, draw_densities
from hpc_hess.report.spectrum import quadratures
from hpc_hess.report.style import CYCLE, INK, MUTED, label_powers

TITLE = "Class structure of the Gauss-Newton matrix"
HEADERS = ["Class", "Share of the targets"]


def facts(found: Mapping[str, Any]) -> str:
    """Say what removing the class means does to the largest eigenvalue."""
    count = len(found["shares"])
    unit, others = found.get("unit", "token"), found.get("others", True)
    classes = f"the {count - 1} most frequent {unit}s, and all others" if others else f"a class for each {unit}"
    return (
        f"Targets in {count} classes: {classes}. With the means of their loss "
        f"gradients projected out (a space of dimension {found['rank']}), the largest eigenvalue falls from "
        f"{number(found['lambda_max'])} to {number(found['lambda_max_without'])}; at least "
        f"{plural(found['outliers'], 'eigenvalue')} of the whole above that."
    )


def table(found: Mapping[str, Any]) -> list[list[str]]:
    """Return how frequent each class is."""
    names = [f"{found.get('unit', 'token')} {token}" for token in found["tokens"]]
    names += ["all others"] if found.get("others", True) else []
    return [[name, f"{100 * share:.3g} %"] for name, share in zip(names, found["shares"], strict=True)]


def size(found: Mapping[str, Any]) -> tuple[float, float]:
    """Return the figure's size in inches."""
    return 8.4, 3.8


def draw(figure: Figure, found: Mapping[str, Any], result: Mapping[str, Any]) -> str:
    """Draw both densities and the class means' own eigenvalues; return the caption."""
    axes, rest = figure.subplots(), ritz(found["alpha"], found["beta"])
    means = np.array(found["means"])
    curves = [Curve(quadratures(result), INK, "the whole"), Curve([rest], CYCLE[1], "without the class means")]
    place, _, peak = draw_densities(axes, curves, rest, means)
    floor = peak * 1e-11
    axes.plot(place(means), np.full(len(means), floor * 3), "v", color=MUTED, label="eigenvalues of the class means' part")
    axes.set_ylim(floor, peak * 4)
    label_powers(axes, 8)
    figure.legend(loc="outside upper right", ncols=3)
    return (
        "Densities of the Gauss-Newton matrix and of what is left of it outside the span of the class means; triangles: the "
        "eigenvalues of A1 + A2, the part that the means make. "
        f"{UNRESOLVED}"
    )


def lines(found: Mapping[str, Any]) -> list[str]:
    """Return one line."""
    last = "(the last class is all other tokens) " if found.get("others", True) else ""
    return [
        f"λ max {number(found['lambda_max'])}, without {plural(found['rank'], 'class mean')} "
        f"{last}{number(found['lambda_max_without'])}"
    ]

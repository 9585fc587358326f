"""The exact matrix of chosen entries: a heat map, and how a stochastic diagonal converges to its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.colors import SymLogNorm
from matplotlib.figure import Figure

from hpc_hess.console.words import minus, number, plural
from hpc_hess.report.style import INK, MUTED, label_powers

TITLE = "The exact matrix of chosen entries"
HEADERS = ["Quantity", "Value", "Meaning"]


def facts(found: Mapping[str, Any]) -> str:
    """Say which entries, and where the matrix is."""
    return (
        f"{found['entries']:,} entries of {plural(len(found['parameters']), 'parameter')}: {', '.join(found['selected'])}. "
        f"The matrix is {found['file']}."
    )


def table(found: Mapping[str, Any]) -> list[list[str]]:
    """Return what was measured of the matrix."""
    rows = [
        ["Frobenius norm", number(found["frobenius"], 5), ""],
        ["share of the diagonal", f"{100 * found['diagonal_share']:.3g} %", "of the squared Frobenius norm"],
        ["off-diagonal over diagonal", number(found["median_ratio"], 3), "medians of absolute values"],
        ["λ max", minus(number(found["lambda_max"], 5)), "of this matrix alone"],
        ["λ min", minus(number(found["lambda_min"], 5)), ""],
        ["asymmetry", number(found["asymmetry"], 2), minus("|B - Bᵀ| / |B| of the products: their error")],
        [
            "stochastic diagonal, 100 samples",
            f"{100 * found['diagonal_errors'][found['samples'].index(100)]:.3g} %",
            f"relative error; expected: {10 * found['diagonal_error_of_one']:.3g} %",
        ],
    ]
    names = found["parameters"]
    if 1 < len(names) <= 12:
        shares = np.array(found["shares"])
        within = float(np.trace(shares))
        rows.append(["within parameters", f"{100 * within:.3g} %", "of the squared norm; the rest couples parameters"])
    return rows


def size(found: Mapping[str, Any]) -> tuple[float, float]:
    """Return the figure's size in inches."""
    return 8.4, 4.2


def draw(figure: Figure, found: Mapping[str, Any], result: Mapping[str, Any]) -> str:
    """Draw the heat map and the convergence of the diagonal; return the caption."""
    map_, curve = figure.subplots(1, 2, width_ratios=[1.25, 1])
    heat = np.array(found["heat"])
    top = float(np.abs(heat).max()) or 1.0
    count = found["entries"]
    image = map_.imshow(
        heat,
        cmap="RdBu_r",
        norm=SymLogNorm(top * 1e-3, vmin=-top, vmax=top),
        interpolation="nearest",
        extent=(0, count, count, 0),
    )
    map_.grid(False)
    edges = np.cumsum(found["counts"])
    if len(edges) > 1:
        for edge in edges[:-1]:
            map_.axhline(edge, color=INK, linewidth=0.5)
            map_.axvline(edge, color=INK, linewidth=0.5)
        if len(edges) <= 12:
            middles = edges - np.array(found["counts"]) / 2
            map_.set_yticks(middles, [_short(name) for name in found["parameters"]], fontsize=7)
            map_.set_xticks([])
    map_.set_xlabel("entry")
    figure.colorbar(
        image,
        ax=map_,
        shrink=0.8,
        label="entry of the matrix",
        ticks=[-top, -top / 100, 0, top / 100, top],
        format=lambda x, _: minus(number(x, 2)),
    )
    samples = np.array(found["samples"])
    curve.loglog(samples, found["diagonal_errors"], color=INK, marker="o", label="measured")
    curve.loglog(
        samples, found["diagonal_error_of_one"] / np.sqrt(samples), color=MUTED, linestyle=(0, (4, 3)), label="expected"
    )
    label_powers(curve)
    curve.set_xlabel("samples")
    curve.set_ylabel("relative error of the diagonal")
    curve.legend()
    return (
        "Left: the matrix, red positive, blue negative, on a symmetric-log scale; cells show the root mean square of the "
        "entries they hold, lines part parameters. Right: Hutchinson's diagonal of this matrix with independent signs "
        "against the exact one; dashed: |off-diagonal part| / |diagonal| / √samples."
    )


def _short(name: str) -> str:
    return name.removeprefix("model.").removesuffix(".weight")


def lines(found: Mapping[str, Any]) -> list[str]:
    """Return one line."""
    return [
        f"{found['entries']:,} entries: the diagonal has {100 * found['diagonal_share']:.3g} % of the squared Frobenius "
        f"norm; eigenvalues in [{number(found['lambda_min'])}, {number(found['lambda_max'])}]"
    ]

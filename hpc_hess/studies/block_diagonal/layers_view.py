"""The spectra of the blocks: their union against the matrix's own, and each block's as a stand-in for the whole's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hpc_hess.console.words import minus, number
from hpc_hess.linalg.density import density_symlog, symlog
from hpc_hess.linalg.quadrature import Ritz
from hpc_hess.report.densities import UNRESOLVED, draw_curve
from hpc_hess.report.spectrum import quadratures
from hpc_hess.report.style import CYCLE, INK, label_powers, linear_threshold, set_symlog

TITLE = "Blocks on their own, and for the whole"
HEADERS = ["Block", "Entries", "λ max", "λ min", "Factor", "Error of the top eigenvalues", "of"]


def facts(found: Mapping[str, Any]) -> str:
    """Say how far the spectra are apart, and what the columns mean."""
    span = found["wasserstein"] / found["wasserstein_of_range"] if found["wasserstein_of_range"] else 1.0
    error = found.get("wasserstein_error")
    give = f", give or take {number(100 * error / span, 2)} % at most with 95 % probability" if error is not None else ""
    said = (
        f"The spectra of the matrix and of its blocks by {found['blocks']} are "
        f"{number(100 * found['wasserstein_of_range'], 2)} % of the range apart (Wasserstein distance{give}). "
    )
    most = max(part["top_count"] for part in found["parts"])
    if error is None or most < 2:  # of a run without errors: its top eigenvalues need not have converged
        return said + "Too few of the largest eigenvalues are known to compare a block with the whole: take more steps."
    best = min((part for part in found["parts"] if part["top_count"] == most), key=lambda part: part["top_error"])
    fewer = sum(part["top_count"] < most for part in found["parts"])
    return said + (
        f"If one block stands for the whole, its {most} largest eigenvalues, times the best factor, miss those of the "
        f"matrix by {number(100 * best['top_error'], 3)} % at best ({best['name']}, times {number(best['scale'], 3)}). "
        "Eigenvalues count whose residual is below 1 % of them"
        + (f"; blocks with fewer such ({fewer}) are left out." if fewer else ".")
    )


def table(found: Mapping[str, Any]) -> list[list[str]]:
    """Return a row for each block."""
    return [
        [
            part["name"],
            f"{part['size']:,}",
            minus(number(max(part["values"]))),
            minus(number(min(part["values"]))),
            *_compared(part),
        ]
        for part in sorted(found["parts"], key=lambda part: _order(part["name"]))
        if part["values"]
    ]


def _compared(part: Mapping[str, Any]) -> list[str]:
    count = part["top_count"]
    return [number(part["scale"], 3), f"{100 * part['top_error']:.0f} %", f"{count}"] if count > 1 else ["", "", f"{count}"]


def size(found: Mapping[str, Any]) -> tuple[float, float]:
    """Return the figure's size in inches."""
    return 8.4, 5.6


def draw(figure: Figure, found: Mapping[str, Any], result: Mapping[str, Any]) -> str:
    """Draw both densities and the range of every block; return the caption."""
    density, parts = figure.subplots(2, 1)
    _draw_density(density, found, quadratures(result))
    _draw_parts(parts, found)
    return (
        "Above: densities of the matrix and of its block-diagonal part. Below: the range of eigenvalues of each block, by "
        f"{found['steps']} Lanczos steps in it. {UNRESOLVED}"
    )


def _draw_density(axes: Axes, spectrum: Mapping[str, Any], whole: list[Ritz]) -> None:
    parts = [part for part in spectrum["parts"] if part["values"]]
    blocks = [Ritz(*(np.array(part[key]) for key in ("values", "weights", "residuals"))) for part in parts]
    sizes = np.array([part["size"] for part in parts], np.float64)
    together, equal = sizes / sizes.sum(), np.full(len(whole), 1 / len(whole))
    values = np.concatenate([q.values for q in [*blocks, *whole]])
    weights = np.concatenate([*[q.weights * n for q, n in zip(blocks, together, strict=True)], *[q.weights for q in whole]])
    linear = linear_threshold(values, weights)
    span = float(np.ptp(symlog(values, linear)))
    width = float(np.clip(0.5 * span / len(whole[0].values), 0.05, 0.3))
    peaks = []
    its_blocks = f"its blocks by {spectrum['blocks']}"
    for some, shares, colour, label in ((whole, equal, INK, "the matrix"), (blocks, together, CYCLE[1], its_blocks)):
        shape = density_symlog(some, points=1200, width=width, linear=linear, shares=shares)
        peaks.append(float(shape.mean.max()))
        draw_curve(axes, shape, some, linear, color=colour, label=label)
    set_symlog(axes, "x", float(values.min()), float(values.max()), linear)
    axes.set_yscale("log")
    axes.set_ylim(max(peaks) * 1e-11, max(peaks) * 4)
    label_powers(axes, 6)
    axes.set_ylabel("density per decade")
    axes.set_xlabel("eigenvalue λ, symmetric-log axis")
    axes.legend(fontsize=8)


def _draw_parts(axes: Axes, spectrum: Mapping[str, Any]) -> None:
    parts = [part for part in spectrum["parts"] if part["values"]]
    order = sorted(range(len(parts)), key=lambda k: _order(parts[k]["name"]))
    low, high = (np.array([pick(parts[k]["values"]) for k in order]) for pick in (min, max))
    every = np.concatenate([low, high])
    linear = max(float(np.median(np.abs(every))) / 10, 1e-6 * float(np.abs(every).max()))
    place = set_symlog(axes, "y", float(min(every.min(), 0.0)), float(max(every.max(), 0.0)), linear)
    axes.vlines(range(len(order)), place(low), place(high), color=CYCLE[1], linewidth=5, alpha=0.75)
    few = len(order) <= 40
    names = [parts[k]["name"] for k in order]
    axes.set_xticks(range(len(order)) if few else [], [n.removeprefix("block ") for n in names] if few else [], fontsize=8)
    for label, name in zip(axes.get_xticklabels(), names, strict=False):
        if not name.startswith("block"):
            label.set(rotation=30, ha="right", rotation_mode="anchor")
    axes.grid(False, axis="x")
    axes.set_ylabel("λ min to λ max")
    axes.set_xlabel("block")


def _order(name: str) -> tuple[bool, int]:
    return (not name.startswith("block"), int(name.split()[1]) if name.startswith("block") else 0)


def lines(found: Mapping[str, Any]) -> list[str]:
    """Return one line."""
    return [facts(found)]

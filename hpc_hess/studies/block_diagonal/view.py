"""How wrong block-diagonal approximations are: block(A) v against A v."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from math import isfinite
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from hpc_hess.console.words import minus, number
from hpc_hess.report.style import CYCLE, MUTED
from hpc_hess.studies.block_diagonal import layers_view

TITLE = "Block-diagonal approximations"
HEADERS = ["Direction v", "Blocks", "Number", "Relative error of block(A) v", "Cosine with A v", "Products"]


def facts(found: Mapping[str, Any]) -> str:
    """Say what is compared."""
    return (
        "A block-diagonal approximation keeps the entries of the matrix within each block and drops the others. Where there "
        "are more blocks than products, block(A) v is sampled without bias; errors are one standard error."
    )


def table(found: Mapping[str, Any]) -> list[list[str]]:
    """Return a row for each direction and partition."""
    return [
        [
            row["direction"],
            f"by {row['blocks']}",
            f"{found['counts'][row['blocks']]:,}",
            _with_error(row["relative_error"], row["relative_error_stderr"]),
            _with_error(row["cosine"], row["cosine_stderr"]),
            f"{row['num_products']:.0f}",
        ]
        for row in found["products"]
    ]


def _known(error: float | None) -> bool:
    """Whether a standard error is there: an old result.json may hold one that is not a number."""
    return error is not None and isfinite(error)


def _with_error(value: float, error: float | None) -> str:
    text = minus(f"{value:.3f}")
    if not _known(error):
        return f"{text} ± not known"
    return text + (f" ± {number(error, 2)}" if error else "")


def size(found: Mapping[str, Any]) -> tuple[float, float]:
    """Return the figure's size in inches."""
    return 8.4, 3.2


def draw(figure: Figure, found: Mapping[str, Any], result: Mapping[str, Any]) -> str:
    """Draw errors and cosines of every direction and partition; return the caption."""
    directions = list(dict.fromkeys(row["direction"] for row in found["products"]))
    kinds = list(found["counts"])
    panels = figure.subplots(1, 2)
    for axes, key, label in zip(panels, ("relative_error", "cosine"), ("relative error", "cosine"), strict=True):
        for k, kind in enumerate(kinds):
            rows = [row for row in found["products"] if row["blocks"] == kind]
            x = np.arange(len(rows)) + (k - (len(kinds) - 1) / 2) * 0.8 / len(kinds)
            stated = [row[f"{key}_stderr"] for row in rows]
            errors = [error if _known(error) else 0.0 for error in stated]
            axes.bar(
                x,
                [row[key] for row in rows],
                0.8 / len(kinds),
                yerr=errors,
                color=CYCLE[k],
                label=f"by {kind}",
                error_kw={"linewidth": 0.9},
            )
        axes.set_xticks(range(len(directions)), [d.replace(" ", "\n") for d in directions], fontsize=7.5)
        axes.grid(False, axis="x")
        axes.axhline(1.0 if key == "relative_error" else 0.0, color=MUTED, linewidth=0.8)
        axes.set_ylabel(label)
    low = min(0.0, *(row["cosine"] - 0.05 for row in found["products"]))
    panels[1].set_ylim(low, 1.05)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper right", ncols=len(kinds))
    missing = not all(_known(row["cosine_stderr"]) for row in found["products"])
    return (
        "Relative error and cosine of the block-diagonal product for each direction; bars: one standard error. An error "
        "of 1 is what zero would give." + (" With two samples no standard error is known." if missing else "")
    )


def lines(found: Mapping[str, Any]) -> list[str]:
    """Return a line for each partition: its worst and best direction."""
    said = []
    for kind in found["counts"]:
        rows = [row for row in found["products"] if row["blocks"] == kind]
        text = ", ".join(f"{row['relative_error']:.2f} ({row['direction']})" for row in rows)
        said.append(f"by {kind}: relative error {text}")
    return said


def parts(found: Mapping[str, Any]) -> Iterator[tuple[str, Any, Mapping[str, Any]]]:
    """Yield what is shown apart, each where it was asked for: the comparison of products, the spectra."""
    if found["products"]:
        yield "block_diagonal", sys.modules[__name__], found
    if found.get("spectrum"):
        yield "layers", layers_view, found["spectrum"]

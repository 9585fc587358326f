"""What ``hpc-hess sketch-check`` shows: correlation against dimension, as a table and as a page."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl

from hpc_hess.console.words import NONE, duration, minus, plural
from hpc_hess.report.comparison import drawn, write_comparison
from hpc_hess.report.style import CYCLE, INK, MARKERS, STYLE, new_figure

PAGE_NAME = "sketch_check.html"


def check_text(found: Mapping[str, Any]) -> str:
    """Return the screen's lines."""
    lines = [
        "",
        f"{found['model']}: {plural(found['pairs'], 'pair')} of gradients, one gradient {duration(found['gradient_s'])}",
        "",
        f"{'sketch':<12}{'D':>6}  {'r':>7}  {'norm':>14}  time of a sketch",
    ]
    for row in found["sketches"]:
        norm = f"{row['norm_mean']:.3f} ± {row['norm_spread']:.3f}"
        dimension = f"2^{row['bits']}"
        lines.append(f"{row['kind']:<12}{dimension:>6}  {row['r']:7.4f}  {norm:>14}  {duration(row['seconds'])}")
    known = [layer for layer in found["layers"].items() if layer[1] is not None]
    best = max(known, key=lambda layer: layer[1], default=None)
    if best and len(found["layers"]) > 1:
        lines += ["", f"of single layers {best[0]} does best: r = {best[1]:.3f}"]
    return "\n".join(lines)


def write_page(out: Path, found: Mapping[str, Any]) -> Path:
    """Write OUT/sketch_check.html and its figures. Local, one rank only."""
    kinds = list(dict.fromkeys(row["kind"] for row in found["sketches"]))
    with mpl.rc_context(STYLE):  # type: ignore[arg-type]  # a plain dictionary of rc names
        figure = new_figure(8, 3.6)
        left, right = figure.subplots(1, 2)
        for kind, colour, marker in zip(kinds, CYCLE * 2, MARKERS * 2, strict=False):
            rows = [row for row in found["sketches"] if row["kind"] == kind]
            bits = [row["bits"] for row in rows]
            left.plot(bits, [max(1 - row["r"], 1e-6) for row in rows], marker=marker, color=colour, label=kind.upper())
            right.plot(bits, [row["seconds"] for row in rows], marker=marker, color=colour)
        left.set(yscale="log", xlabel="log2 of the dimension", ylabel="1 \u2212 r")
        for r in (0.95, 0.98, 0.99):
            left.axhline(1 - r, color=INK, lw=0.6, ls=":")
            left.annotate(f"r = {r}", (0.01, 1 - r), xycoords=("axes fraction", "data"), ha="left", va="bottom", fontsize=8)
        left.legend()
        right.axhline(found["gradient_s"], color=INK, lw=0.8, ls=":")
        right.annotate("one gradient", (1, found["gradient_s"]), xycoords=("axes fraction", "data"), ha="right", va="bottom")
        right.set(yscale="log", xlabel="log2 of the dimension", ylabel="time of a sketch / s")
        plots = [
            drawn(
                figure,
                out,
                "sketches",
                "Scores from sketches against scores from whole gradients",
                "Left: what Pearson's r lacks to 1. Right: the time of one sketch beside that of one gradient.",
            )
        ]
        layers = {name: r for name, r in found["layers"].items() if r is not None}
        if len(layers) > 1:
            figure = new_figure(8, max(2.0, 0.22 * len(layers) + 0.8))
            axes = figure.add_subplot()
            axes.barh(list(layers), list(layers.values()), color=CYCLE[0])
            axes.invert_yaxis()
            axes.set(xlabel="r of its scores with the whole gradient's")
            plots.append(
                drawn(
                    figure,
                    out,
                    "layers",
                    "Scores from single layers",
                    "What becomes of attribution if only one layer's gradient is kept (Schioppa 2024, table 1).",
                )
            )
    rows = [
        (
            "",
            [
                row["kind"].upper(),
                f"2^{row['bits']}",
                minus(f"{row['r']:.4f}"),
                f"{row['norm_mean']:.3f} ± {row['norm_spread']:.3f}",
                duration(row["seconds"]),
            ],
        )
        for row in found["sketches"]
    ]
    rows += [("", [name, "", NONE if r is None else minus(f"{r:.4f}"), "", ""]) for name, r in found["layers"].items()]
    return write_comparison(
        out / PAGE_NAME,
        title=f"Sketches of gradients of {found['model']}",
        notes=[],
        plots=plots,
        rows=rows,
        story=f"{found['pairs']:,} pairs of examples: inner products of their gradients, whole and sketched.",
        columns=["Sketch", "Dimension", "r", "Norm", "Time"],
        legend="Norm: |Phi g| / |g|, mean and spread over examples. Time: of one sketch, the median. Below: single layers.",
    )

"""The figures of benchmarks.regimes, from the stored curves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from benchmarks.regimes_curves import CURVES, DTYPES, KRYLOV_CURVES, SMOLLM2, VECTORS, fit, truncation_of
from hpc_hess.report.style import CYCLE, INK, MUTED, STYLE

COLOURS = dict(zip(DTYPES[:5], (INK, CYCLE[0], CYCLE[1], CYCLE[4], CYCLE[2]), strict=True))
_LINES = dict(zip(COLOURS, ("o-", "o-", "o-", "o:", "o-"), strict=True))  # the dotted one lies on the one before
PRODUCTS = {
    "exact float64": INK,
    "exact float32": CYCLE[0],
    "exact bfloat16": CYCLE[1],
    "central float32, auto": CYCLE[2],
    "central float32, 0.001": CYCLE[3],
    "central float32, 0.01": CYCLE[4],
    "central float32, 0.1": CYCLE[5],
    "central bfloat16, auto": MUTED,
}


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def draw_sweep(curves: list[dict[str, Any]], folder: Path) -> None:
    """Error against step: a column for each model, a row for each vector."""
    models = list(dict.fromkeys(c["model"] for c in curves))
    figure = _figure(3.3 * len(models) + 0.4, 8.6)
    grid = figure.subplots(len(VECTORS), len(models), sharex=True, sharey=True, squeeze=False)
    for row, kind in zip(grid, VECTORS, strict=True):
        for axes, model in zip(row, models, strict=True):
            if not any((curve["model"], curve["vector"]) == (model, kind) for curve in curves):
                axes.set_visible(False)
                continue
            axes.axhline(0.01, color=MUTED, lw=0.8, ls=(0, (1, 2)), zorder=1)
            for curve in curves:
                if (curve["model"], curve["vector"]) == (model, kind) and curve["points"]:
                    _draw_curve(axes, curve, truncation_of(curves, curve))
            axes.set_xscale("log")
            axes.set_yscale("log")
            axes.set_xlim(5e-9, 60)
            axes.set_ylim(1e-11, 1e4)
        row[0].set_ylabel(
            f"{kind} vector\nrelative error of H v"
            if kind != "final norm"
            else "vector on the final norm\nrelative error of H v"
        )
    for axes, model in zip(grid[0], models, strict=True):
        axes.set_title(model if model == SMOLLM2 else f"toy, {model} parameters")
    for column in grid.T:
        lowest = [axes for axes in column if axes.get_visible()][-1]
        lowest.set_xlabel("step eps along the unit vector")
        lowest.tick_params(labelbottom=True)
    handles = [Line2D([], [], color=c, ls=_LINES[d][1:], marker="o", ms=3, label=d) for d, c in COLOURS.items()]
    handles += [
        Line2D([], [], color=MUTED, ls="--", lw=0.9, label="fits R / eps and T eps², extended"),
        Line2D([], [], color=MUTED, marker="x", ms=6, ls="", mew=1.4, label="where the two cross"),
        Line2D([], [], color=MUTED, marker="*", ms=12, ls="", mec=INK, mew=0.6, label='step chosen by step = "auto"'),
        Line2D([], [], color=MUTED, ls="-", lw=3, alpha=0.6, label="exact product (no step), right edge"),
        Line2D([], [], color=MUTED, ls=(0, (1, 2)), lw=0.8, label="1 %"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3)
    figure.savefig(folder / "regimes_eps.png", dpi=120)


def _draw_curve(axes: Axes, curve: dict[str, Any], truncation_constant: float | None) -> None:
    colour = COLOURS[curve["dtype"]]
    eps, error = (np.array([p[k] for p in curve["points"]]) for k in ("eps", "error"))
    axes.plot(eps, error, _LINES[curve["dtype"]], color=colour, ms=3, lw=1.3)
    found = fit(curve, truncation_constant)
    if "crossing" in found:
        crossing, truncation = float(found["crossing"] or 0), float(found["truncation"] or 0)
        across = np.geomspace(crossing / 30, crossing * 30, 2)  # both lines go on beyond the crossing
        axes.plot(across, float(found["rounding"] or 0) / across, "--", color=colour, lw=0.9, alpha=0.8)
        axes.plot(across, truncation * across**2, "--", color=colour, lw=0.9, alpha=0.8)
        axes.plot(crossing, truncation * crossing**2, "x", color=colour, ms=6, mew=1.4)
    if curve["auto"]:
        axes.plot(curve["auto"]["eps"], curve["auto"]["error"], "*", color=colour, ms=12, mec=INK, mew=0.6, zorder=5)
    if curve["exact_error"]:
        axes.axhline(curve["exact_error"], xmin=0.94, color=colour, lw=3, alpha=0.6)


def draw_krylov(runs: list[dict[str, Any]], folder: Path) -> None:
    """Six measures against the step; what they come from, last."""
    figure = _figure(12.4, 7.8)
    grid = figure.subplots(2, 3)
    hessian = [r for r in runs if r["matrix"] == "hessian"]
    _series(
        grid[0, 0],
        [r for r in hessian if r["reorthogonalise"] == "none"],
        "orthogonality",
        "Lost orthogonality, no reorthogonalisation",
        "max |⟨vᵢ, vⱼ⟩|",
    )
    _series(
        grid[0, 1],
        [r for r in hessian if r["reorthogonalise"] == "none"],
        "excess",
        "Ghosts, no reorthogonalisation",
        "Ritz values in excess",
        log=False,
    )
    _series(
        grid[0, 2],
        [r for r in hessian if r["reorthogonalise"] == "full"],
        "extreme",
        "Extreme Ritz values, full",
        "error of λ / range",
    )
    _series(
        grid[1, 0],
        [r for r in hessian if r["reorthogonalise"] == "full"],
        "wasserstein",
        "Spectral density, full",
        "W₁ to float64 / range",
    )
    axes = grid[1, 1]
    for run in (r for r in runs if (r["matrix"], r["product"]) == ("gauss_newton", "exact bfloat16")):
        below = -np.array(run["lowest"])
        full = run["reorthogonalise"] == "full"
        axes.plot(
            np.arange(1, run["steps"] + 1),
            np.where(below > 0, below, np.nan),
            "-" if full else "--",
            color=PRODUCTS[run["product"]],
            label=run["reorthogonalise"],
        )
    axes.legend(title="exact bfloat16 (float32 and\nfloat64: never below 0)", title_fontsize=9)
    axes.set_yscale("log")
    axes.set_title("Gauss-Newton, has no eigenvalue below 0")
    axes.set_ylabel("lowest Ritz value below 0 / λmax")
    axes.set_xlabel("Lanczos step")
    _scatter(grid[1, 2], hessian)
    handles = [Line2D([], [], color=c, label=p) for p, c in PRODUCTS.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=4)
    figure.savefig(folder / "regimes_krylov.png", dpi=120)


def _series(axes: Axes, runs: list[dict[str, Any]], key: str, title: str, label: str, log: bool = True) -> None:
    for run in runs:
        values = np.array(run[key])
        axes.plot(
            np.arange(1, len(values) + 1),
            np.where(values > 0, values, np.nan) if log else values,
            color=PRODUCTS[run["product"]],
        )
    if log:
        axes.set_yscale("log")
    axes.set_title(title)
    axes.set_ylabel(label)
    axes.set_xlabel("Lanczos step")


def _scatter(axes: Axes, runs: list[dict[str, Any]]) -> None:
    for run in runs:
        if run["product"] == "exact float64":
            continue
        full = run["reorthogonalise"] == "full"
        x = float(np.median(run["product_error"]))
        style = {"color": PRODUCTS[run["product"]], "ms": 7, "mfc": None if full else "white", "mew": 1.5}
        axes.plot(x, run["wasserstein"][-1], "o", **style)
        axes.plot(x, run["extreme"][-1], "^", **style)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_title("After the last step, against product error")
    axes.set_xlabel("median relative error of the run's products")
    axes.set_ylabel("error / range")
    shapes = [
        ("o", None, "W₁, full"),
        ("o", "white", "W₁, none"),
        ("^", None, "extreme λ, full"),
        ("^", "white", "extreme λ, none"),
    ]
    axes.legend(handles=[Line2D([], [], color=MUTED, marker=m, mfc=f, mew=1.5, ms=7, ls="", label=t) for m, f, t in shapes])


def draw(folder: Path) -> None:
    """Draw what has been measured."""
    with mpl.rc_context(STYLE):  # type: ignore[arg-type]  # a plain dictionary of rc names
        if (folder / CURVES).exists():
            draw_sweep(json.loads((folder / CURVES).read_text())["curves"], folder)
        if (folder / KRYLOV_CURVES).exists():
            draw_krylov(json.loads((folder / KRYLOV_CURVES).read_text())["runs"], folder)

"""The figures of one run, as PNG and SVG. Matplotlib without pyplot: nothing global is touched but rc, in a context."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator
from numpy.typing import NDArray

from hpc_hess.console.words import minus, number
from hpc_hess.linalg.density import Density, density, density_symlog, symlog
from hpc_hess.linalg.quadrature import Ritz, ritz
from hpc_hess.report.densities import draw_density, smoothing_width
from hpc_hess.report.spectrum import quadratures
from hpc_hess.report.style import (
    CYCLE,
    INK,
    MARKERS,
    MUTED,
    NEGATIVE,
    POSITIVE,
    STYLE,
    label_powers,
    linear_threshold,
    new_figure,
    probe_style,
    save_figure,
    say,
    set_log,
    set_symlog,
)
from hpc_hess.storage.run_files import step_events
from hpc_hess.studies import views
from hpc_hess.studies.quadrature import cumulative

Float = NDArray[np.float64]


class Plot(NamedTuple):
    """One saved figure: a short ``name`` (the files' stem), what it shows, its two files."""

    name: str
    title: str
    caption: str
    png: Path
    svg: Path


def write_figures(result: Mapping[str, Any], events: Sequence[Mapping[str, Any]], folder: Path) -> list[Plot]:
    """Draw what the data allows into ``folder`` (created) and return the plots in reading order. Local.

    Without Ritz values there are no spectra, without "step" events no timings.
    """
    plots = []
    folder.mkdir(parents=True, exist_ok=True)
    parts = quadratures(result)
    probes = [p for p in result.get("probes") or [] if p.get("alpha")]
    with mpl.rc_context(STYLE):  # type: ignore[arg-type]  # a plain dictionary of rc names
        if parts:
            size = int(result.get("num_params") or 0)
            plots += [_density_plot(parts, size, folder, kind) for kind in ("symlog", "linear")]
        if cumulative.recurrences(result):
            figure = new_figure(8.4, 5.4)
            caption = cumulative.draw(figure, result)
            plots.append(_save(figure, folder, "cumulative", cumulative.TITLE, caption))
        if probes:
            plots += [_convergence(probes, folder), _recurrence(probes, folder)]
        for name, view, found in views.parts(result):
            if inches := view.size(found):
                figure = new_figure(*inches)
                plots.append(_save(figure, folder, name, view.TITLE, view.draw(figure, found, result)))
        steps = step_events([dict(e) for e in events])
        if steps:
            plots.append(_timing(steps, folder))
    return plots


def _save(figure: Figure, folder: Path, name: str, title: str, caption: str) -> Plot:
    png, svg = folder / f"{name}.png", folder / f"{name}.svg"
    save_figure(figure, png, svg)
    return Plot(name, title, caption, png, svg)


# -- density -----------------------------------------------------------------------------------------------------------


def _density_plot(parts: list[Ritz], size: int, folder: Path, kind: str) -> Plot:
    values = np.concatenate([q.values for q in parts])
    weights = np.concatenate([q.weights for q in parts])
    figure = new_figure(8.4, 5.2)
    top, rug = figure.subplots(2, 1, sharex=True, height_ratios=[3.2, 1])
    over = f"mean of {len(parts)} probes" if len(parts) > 1 else "one probe"
    if kind == "linear":
        rug.xaxis.set_major_locator(MaxNLocator(7))
        shape = density(parts, points=1200)
        place: Callable[[Any], Float] = np.asarray
        top.set_ylabel("density per unit λ")
        rug.set_xlabel("eigenvalue λ (loss per squared parameter)")
        smoothing = f"Gaussian smoothing of width {number(shape.width, 2)}"
        title, note = "Spectral density, linear axis", "the axis is linear in λ"
        x = shape.grid
    else:
        linear = linear_threshold(values, weights)
        width = smoothing_width(values, linear, len(parts[0].values))
        shape = density_symlog(parts, points=1200, width=width, linear=linear)
        x = symlog(shape.grid, linear)
        place = set_symlog(rug, "x", float(shape.grid[0]), float(shape.grid[-1]), linear)
        top.set_ylabel("density per decade of λ")
        rug.set_xlabel("eigenvalue λ (loss per squared parameter), symmetric-log axis")
        smoothing = f"Gaussian smoothing of width {number(width, 2)} decades"
        title = "Spectral density, symmetric-log axis"
        note = f"the axis is linear for |λ| below {number(linear, 2)} and logarithmic beyond"
    draw_density(top, shape, x, parts, size)
    _draw_rug(rug, parts, place)
    _mark_ends(top, rug, float(values.min()), float(values.max()), place)
    figure.align_ylabels()
    caption = f"{over[0].upper()}{over[1:]}; {smoothing}; {note}. {_certainty(shape, size)} "
    caption += "Below: the Ritz values, height is the weight."
    return _save(figure, folder, "density" if kind == "linear" else "density_symlog", title, caption)


def _certainty(shape: Density, size: int) -> str:
    """Say what line, band and hatching of a density mean."""
    band = "between the edges of the band the smoothed density lies with 95 % probability at each place" if size else ""
    if shape.resolved.all():
        return f"{band[0].upper()}{band[1:]}." if band else ""
    hatched = "No line where the steps do not tell the density to a factor of two (hatched: up to its bound)"
    if not np.isfinite(shape.high).all():
        hatched = "No line: without the last residual norm nothing bounds the density (hatched)"
    return f"{hatched}; {band}." if band else f"{hatched}."


def _draw_rug(axes: Axes, parts: list[Ritz], place: Callable[[Any], Float]) -> None:
    values = np.concatenate([q.values for q in parts])
    weights = np.concatenate([q.weights for q in parts])
    shown = np.maximum(weights, 1e-16)
    floor = 10.0 ** np.floor(np.log10(shown.min()) - 0.7)
    colours = np.where(values < 0, NEGATIVE, POSITIVE)
    axes.vlines(place(values), floor, shown, colors=list(colours), linewidth=1.0, alpha=0.75)
    axes.scatter(place(values), shown, c=list(colours), s=11, zorder=3, linewidths=0)
    axes.set_yscale("log")
    axes.set_ylim(floor, 6.0)
    label_powers(axes, 4)
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_ylabel("weight")


def _mark_ends(top: Axes, rug: Axes, low: float, high: float, place: Callable[[Any], Float]) -> None:
    """Mark both extremes; their numbers stand at the corners above the axes, where they never collide."""
    for value, colour, side in ((low, NEGATIVE, 0.0), (high, POSITIVE, 1.0)):
        at = float(place(value))
        for axes in (top, rug):
            axes.axvline(at, color=colour, linestyle=(0, (4, 3)), linewidth=1.0, alpha=0.9)
        name, align = ("λ min", "left") if side == 0 else ("λ max", "right")
        label = f"{name} = {minus(number(value))}"
        top.text(side, 1.02, label, transform=top.transAxes, ha=align, va="bottom", color=colour)


# -- the Krylov process ------------------------------------------------------------------------------------------------


def _legend(figure: Figure, axes: Axes, num_probes: int) -> None:
    if 1 < num_probes <= len(CYCLE):
        figure.legend(*axes.get_legend_handles_labels(), loc="outside upper right", ncols=num_probes)


def _step_axis(axes: Axes, last: int) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set_xlim(1 - max(0.02 * last, 0.2), last + max(0.02 * last, 0.2))


def _recurrence(probes: Sequence[Mapping[str, Any]], folder: Path) -> Plot:
    figure = new_figure(8.4, 5.0)
    upper, lower = figure.subplots(2, 1, sharex=True)
    every = np.concatenate([np.asarray(p["alpha"], np.float64) for p in probes])
    every = every[np.isfinite(every)] if np.isfinite(every).any() else np.zeros(1)
    place: Callable[[Any], Float] = np.asarray
    if np.abs(every).max() > 100 * np.median(np.abs(every)) > 0:
        linear = max(float(np.median(np.abs(every))) / 10, float(np.abs(every).max()) * 1e-6)
        place = set_symlog(upper, "y", min(float(every.min()), 0.0), max(float(every.max()), 0.0), linear)
    positive = np.array([b for p in probes for b in p.get("beta") or [] if b > 0])
    for k, probe in enumerate(probes):
        alpha, beta = np.asarray(probe["alpha"], np.float64), np.asarray(probe.get("beta") or [], np.float64)
        look = probe_style(k, len(probes), len(alpha))
        upper.plot(np.arange(1, len(alpha) + 1), place(alpha), **look)
        lower.plot(np.arange(1, len(beta) + 1), np.where(beta > 0, beta, np.nan), **look)
    upper.axhline(0, color=MUTED, linewidth=0.8)
    upper.set_ylabel("\u03b1 (diagonal of T)")
    lower.set_ylabel("β (off-diagonal)")
    lower.set_xlabel("Lanczos step")
    if len(positive):
        set_log(lower, float(positive.min()), float(positive.max()))
    else:
        say(lower, "every β is zero: the process ended at once")
    _step_axis(lower, max(len(p["alpha"]) for p in probes))
    _legend(figure, upper, len(probes))
    figure.align_ylabels()
    caption = "The entries of the tridiagonal matrix T. A β that falls to rounding ends the process (breakdown)."
    return _save(figure, folder, "recurrence", "Recurrence coefficients", caption)


def _history(alpha: Sequence[float], beta: Sequence[float]) -> tuple[Float, Float]:
    """Return the steps j looked at and, for each, (theta_min, residual, theta_max, residual) of the leading j x j T."""
    m = len(alpha)
    # each look diagonalises T_j: at most sixty of them, all at first, where the values still move
    steps = np.unique(np.round(np.geomspace(1, m, min(m, 60))).astype(int)) if m > 60 else np.arange(1, m + 1)
    rows = []
    for j in map(int, steps):
        one = ritz(alpha[:j], beta[:j])
        rows.append((one.values[0], one.residuals[0], one.values[-1], one.residuals[-1]))
    return steps.astype(np.float64), np.array(rows, np.float64)


def _convergence(probes: Sequence[Mapping[str, Any]], folder: Path) -> Plot:
    figure = new_figure(8.4, 5.4)
    grid = figure.subplots(2, 2, sharex=True, height_ratios=[1.5, 1])
    histories = [_history(p["alpha"], p.get("beta") or []) for p in probes]
    for column, name in enumerate(("smallest Ritz value", "largest Ritz value")):
        values, misfit = grid[0][column], grid[1][column]
        seen = []
        for k, (steps, rows) in enumerate(histories):
            look = probe_style(k, len(probes), 2 * len(steps))
            theta, residual = rows[:, 2 * column], rows[:, 2 * column + 1]
            band = 0.2 / len(probes) ** 0.7
            values.fill_between(steps, theta - residual, theta + residual, color=look["color"], alpha=band, linewidth=0)
            values.plot(steps, theta, **look)
            with np.errstate(divide="ignore", invalid="ignore"):
                relative = residual / np.abs(theta)
            shown = np.where((relative > 1e-16) & np.isfinite(relative), relative, np.nan)  # below, it is rounding
            misfit.plot(steps, shown, **look)
            seen += list(shown[np.isfinite(shown)])
        values.set_title(name)
        misfit.set_xlabel("Lanczos step")
        if seen:
            set_log(misfit, min(*seen, 0.01), max(*seen, 0.01))
            misfit.axhline(0.01, color=MUTED, linewidth=0.9, linestyle=(0, (4, 3)))
        else:
            say(misfit, "no residual above rounding")
        _step_axis(misfit, max(len(p["alpha"]) for p in probes))
    grid[0][0].set_ylabel("eigenvalue λ")
    grid[1][0].set_ylabel("residual / |Ritz value|")
    _legend(figure, grid[0][1], len(probes))
    caption = (
        "Extreme Ritz values over the steps; an eigenvalue lies within the band (± residual norm). "
        "The dashed line marks a residual of 1 % of the value."
    )
    return _save(figure, folder, "convergence", "Convergence of the extreme eigenvalues", caption)


# -- time --------------------------------------------------------------------------------------------------------------


def _timing(steps: Sequence[Mapping[str, Any]], folder: Path) -> Plot:
    phases = _phases(steps)
    figure = new_figure(8.4, 3.6)
    if phases:
        axes, bars = figure.subplots(1, 2, width_ratios=[1.7, 1])
        _bars(bars, phases)
    else:
        axes = figure.subplots()
    x = np.arange(1, len(steps) + 1)
    series = (("hvp_s", "Hessian product"), ("lanczos_s", "Lanczos vectors"), ("checkpoint_s", "checkpoint"))
    seen: list[float] = []
    for k, (key, label) in enumerate(series):
        y = np.array([float(s[key]) if isinstance(s.get(key), int | float) else np.nan for s in steps])
        y = np.where(y > 0, y, np.nan)
        if np.isfinite(y).any():
            marker = MARKERS[k] if len(x) <= 60 else ""
            axes.plot(x, y, marker=marker, color=CYCLE[k], label=label, linewidth=1.0)
            seen += list(y[np.isfinite(y)])
    if seen:
        set_log(axes, min(seen), max(seen))
    axes.set_ylabel("time per step (s)")
    axes.set_xlabel("step, all probes in order")
    _step_axis(axes, len(steps))
    if axes.lines:
        axes.legend(ncols=3, loc="lower left", bbox_to_anchor=(0, 1.0))
    caption = "Wall time of the parts of each completed step, on the slowest rank; probes in lock-step share it equally."
    if phases:
        caption += (
            " Right: what ranks do in a step, in the mean over steps and ranks; the dot is the slowest rank's. Calibration "
            "counts with its gradients."
        )
    return _save(figure, folder, "timing", "Time per step", caption)


def _phases(steps: Sequence[Mapping[str, Any]]) -> dict[str, tuple[float, float]]:
    """Return the seconds of each phase of a step, largest and mean over ranks, in the mean over steps."""
    found = [step["phases"] for step in steps if step.get("phases")]
    names = {name for phases in found for name in phases}
    of = {name: np.array([phases.get(name, (0.0, 0.0)) for phases in found]).mean(0) for name in names}
    return {name: (float(values[0]), float(values[1])) for name, values in of.items()}


def _bars(axes: Axes, phases: Mapping[str, tuple[float, float]]) -> None:
    names = sorted(phases, key=lambda name: phases[name][1])
    axes.barh(names, [phases[name][1] for name in names], color=CYCLE[0], height=0.6)
    axes.plot([phases[name][0] for name in names], names, linestyle="", marker="o", markersize=3, color=INK)
    axes.set_xlabel("time of a step (s)")
    axes.grid(False, axis="y")

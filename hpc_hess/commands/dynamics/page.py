"""dynamics.html: spectra over checkpoints or sample sizes on one page that opens offline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, PercentFormatter

from hpc_hess.console.words import NONE, minus, number
from hpc_hess.linalg.density import density_symlog, inverse_symlog, symlog
from hpc_hess.report.comparison import Drawn, drawn, write_comparison
from hpc_hess.report.densities import smoothing_width
from hpc_hess.report.spectrum import quadratures
from hpc_hess.report.style import INK, MARKERS, MUTED, NEGATIVE, POSITIVE, STYLE, linear_threshold, new_figure, set_symlog

PAGE_NAME = "dynamics.html"
_DASHES = ["-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (5, 1.5, 1, 1.5))]
_DECADES = 6  # of the density, below its peak, that are coloured
_COLUMNS = ["Run", "Sequences", "Loss", "|g|", "λ max", "λ min", "R_NEG", "R₂", "Outliers", "Gradient mass", "Trace"]

Record = Mapping[str, Any]


class _Grid(NamedTuple):
    """The runs in rows of a series each, along an axis: checkpoints, or the sample sizes of one model."""

    axis: str
    ticks: list[str]
    series: list[tuple[str, list[int]]]  # label; for each tick the place of its run


def write_page(out: Path, record: Record, results: Sequence[Mapping[str, Any]]) -> Path:
    """Write OUT/dynamics.html and OUT/figures/*.png; ``results`` in the order of the record's runs. Local, one rank only."""
    runs, grid = record["runs"], _arranged(record["runs"])
    with mpl.rc_context(STYLE):  # type: ignore[arg-type]  # a plain dictionary of rc names
        plots = [
            _extremes(runs, grid, out),
            _negative(runs, grid, out),
            _ratios(runs, grid, record["outlier_above"], out),
            _outliers(runs, grid, record["outlier_above"], out),
            _densities(results, grid, out),
        ]
    percent = f"{100 * record['outlier_above']:g} %"
    return write_comparison(
        out / PAGE_NAME,
        title="Dynamics of the Hessian",
        story=_story(runs, grid),
        notes=record["notes"],
        plots=plots,
        columns=_COLUMNS,
        rows=[(quote(f"{run['name']}/report.html"), _cells(run)) for run in runs],
        legend=(
            "Each name leads to the report of that run. R_NEG = |λ min| / λ max. Rₙ = λₙ / λ₁, where λₙ is the n-th "
            f"largest eigenvalue. Outliers: eigenvalues above {percent} of λ₁, then those below \u2212{percent} of it; ≥ "
            "where every computed eigenvalue of that sign is one. Gradient mass: the share of |g|² in the space of their "
            "eigenvectors. All of it is in dynamics.json."
        ),
    )


def _arranged(runs: Sequence[Record]) -> _Grid:
    models = list(dict.fromkeys(run["model"] for run in runs))
    sizes = list(dict.fromkeys(run["sequences"] for run in runs))
    place = {(run["model"], run["sequences"]): k for k, run in enumerate(runs)}
    if len(models) == 1:
        sizes.sort()
        return _Grid("sequences", [f"{size:,}" for size in sizes], [(models[0], [place[models[0], s] for s in sizes])])
    steps = {run["model"]: run["step"] for run in runs}
    known = None not in steps.values() and len({*steps.values()}) == len(models)
    if known:
        models.sort(key=lambda model: steps[model])
    ticks = [f"{steps[model]:,}" if known else model for model in models]
    series = [(f"{size:,} sequences", [place[model, size] for model in models]) for size in sizes]
    return _Grid("training step" if known else "checkpoint", ticks, series)


def _story(runs: Sequence[Record], grid: _Grid) -> str:
    places = grid.series[0][1]
    first, last = runs[places[0]], runs[places[-1]]
    if len(places) == 1:
        return f"One spectrum: λ max = {minus(number(first['lambda_max']))}, λ min = {minus(number(first['lambda_min']))}."
    changes = [
        f"{label} goes from {minus(number(first[key]))} to {minus(number(last[key]))}"
        for key, label in (("lambda_max", "λ max"), ("lambda_min", "λ min"), ("r_neg", "R_NEG"))
        if first[key] is not None and last[key] is not None
    ]
    return f"From {first['name']} to {last['name']} " + ", ".join(changes) + "."


def _cells(run: Record) -> list[str]:
    counts = [_count(run[f"{sign}outliers"], run[f"{sign}outliers_known"]) for sign in ("", "negative_")]
    shares = [_percent(run[f"{sign}gradient_share"]) for sign in ("", "negative_")]
    second = run["r_n"][0] if run["r_n"] else None
    return [
        run["name"],
        f"{run['sequences']:,}",
        number(run["loss"], 5),
        *(minus(number(run[key])) for key in ("gradient_norm", "lambda_max", "lambda_min")),
        number(run["r_neg"], 3),
        number(second, 3),
        ", ".join(counts),
        ", ".join(shares),
        minus(number(run["trace"]["mean"])),
    ]


def _count(count: int | None, known: bool) -> str:
    return NONE if count is None else str(count) if known else f"≥ {count}"


def _percent(share: float | None) -> str:
    return NONE if share is None else f"{100 * share:.3g} %"


# -- figures -----------------------------------------------------------------------------------------------------------


def _axis(axes: Axes, grid: _Grid) -> None:
    """Label every tick while they fit, then every so many."""
    stride = max(1, -(-len(grid.ticks) // 12))
    slanted = max(map(len, grid.ticks)) * len(grid.ticks) / stride > 90
    axes.set_xticks(range(0, len(grid.ticks), stride), grid.ticks[::stride])
    if slanted:
        for label in axes.get_xticklabels():
            label.set(rotation=30, ha="right", rotation_mode="anchor")
    axes.set_xlim(-0.3, len(grid.ticks) - 0.7)
    axes.set_xlabel(grid.axis)


def _line(
    axes: Axes, runs: Sequence[Record], places: list[int], values: Sequence[float | None], look: int, colour: str, label: str
) -> None:
    shown = [np.nan if value is None else value for value in values]
    axes.plot(
        range(len(places)),
        shown,
        color=colour,
        marker=MARKERS[look % len(MARKERS)],
        label=label,
        linestyle=_DASHES[look % len(_DASHES)],
        clip_on=False,
    )


def _labelled(label: str, series: str, grid: _Grid) -> str:
    return label if len(grid.series) == 1 else f"{label}, {series}" if label else series


def _extremes(runs: Sequence[Record], grid: _Grid, out: Path) -> Drawn:
    figure = new_figure(8.4, 4.0)
    axes = figure.subplots()
    values = np.array([run[key] for run in runs for key in ("lambda_min", "lambda_max")])
    least, most = np.abs(values[values != 0]).min(initial=np.inf), np.abs(values).max()
    place: Any = np.asarray
    if most > 30 * least:
        place = set_symlog(axes, "y", min(values.min(), 0.0), max(values.max(), 0.0), max(least / 3, most * 1e-6))
    for look, (series, places) in enumerate(grid.series):
        for key, label, colour in (("lambda_max", "λ max", POSITIVE), ("lambda_min", "λ min", NEGATIVE)):
            _line(axes, runs, places, place([runs[k][key] for k in places]), look, colour, _labelled(label, series, grid))
    axes.axhline(0, color=MUTED, linewidth=0.8)
    axes.set_ylabel("eigenvalue λ")
    _axis(axes, grid)
    _legend(axes)
    return drawn(figure, out, "extremes", "The ends of the spectrum", "Each run's largest and smallest eigenvalue.")


def _legend(axes: Axes) -> None:
    axes.legend(ncols=4, loc="lower left", bbox_to_anchor=(0, 1.0), borderaxespad=0.2)


def _negative(runs: Sequence[Record], grid: _Grid, out: Path) -> Drawn:
    figure = new_figure(8.4, 3.4)
    axes = figure.subplots()
    for look, (series, places) in enumerate(grid.series):
        _line(axes, runs, places, [runs[k]["r_neg"] for k in places], look, INK, series)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("R_NEG = |λ min| / λ max")
    _axis(axes, grid)
    if len(grid.series) > 1:
        _legend(axes)
    caption = "The size of the most negative eigenvalue over the largest positive one: 0 is a minimum along every direction."
    return drawn(figure, out, "r_neg", "Negative curvature, R_NEG", caption)


def _ratios(runs: Sequence[Record], grid: _Grid, threshold: float, out: Path) -> Drawn:
    figure = new_figure(8.4, 3.4 * len(grid.series) + 0.4)
    panels = figure.subplots(len(grid.series), 1, squeeze=False, sharex=True)[:, 0]
    most = max((len(run["r_n"]) for run in runs), default=0)
    colours = mpl.colormaps["viridis"](np.linspace(0, 0.9, max(most, 2)))
    for axes, (series, places) in zip(panels, grid.series, strict=True):
        for n in range(most):
            values = [runs[k]["r_n"][n] if n < len(runs[k]["r_n"]) else np.nan for k in places]
            axes.plot(range(len(places)), values, color=colours[n], marker="o", label=f"n = {n + 2}", clip_on=False)
        axes.axhline(threshold, color=POSITIVE, linestyle=(0, (4, 3)), linewidth=1.1)
        axes.text(
            1.0, threshold, f" {100 * threshold:g} %", transform=axes.get_yaxis_transform(), color=POSITIVE, va="center"
        )
        axes.set_ylim(0, 1.03)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, 0, symbol=" %"))
        axes.set_ylabel("Rₙ = λₙ / λ₁")
        if len(grid.series) > 1:
            axes.set_title(series)
        _axis(axes, grid)
        axes.label_outer()
    if most:
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", ncols=1 + (most > 12))
    caption = f"The n-th largest eigenvalue over the largest, n = 2 to {most + 1}. Those above the dashed line are outliers."
    return drawn(figure, out, "r_n", "The largest eigenvalues over the first, Rₙ", caption)


def _outliers(runs: Sequence[Record], grid: _Grid, threshold: float, out: Path) -> Drawn:
    figure = new_figure(8.4, 3.8)
    counts, shares = figure.subplots(1, 2)
    for look, (series, places) in enumerate(grid.series):
        for sign, label, colour in (("", "positive", POSITIVE), ("negative_", "negative", NEGATIVE)):
            name = _labelled(label, series, grid)
            _line(counts, runs, places, [runs[k][f"{sign}outliers"] for k in places], look, colour, name)
            open_ended = [i for i, k in enumerate(places) if not runs[k][f"{sign}outliers_known"]]
            values = [runs[places[i]][f"{sign}outliers"] or 0 for i in open_ended]
            counts.plot(open_ended, values, "^", mfc="white", mec=colour, ms=8, zorder=3, clip_on=False)
            _line(shares, runs, places, [runs[k][f"{sign}gradient_share"] for k in places], look, colour, name)
    counts.yaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=2))
    shares.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=" %"))
    for axes, label in ((counts, "outliers"), (shares, "share of |g|² in their space")):
        axes.set_ylabel(label)
        axes.set_ylim(bottom=0)
        _axis(axes, grid)
    figure.legend(*counts.get_legend_handles_labels(), loc="outside upper left", ncols=4)
    percent = f"{100 * threshold:g} %"
    caption = (
        f"Outliers are eigenvalues above {percent} of the largest one, λ₁ itself included, and those below minus {percent} "
        "of it. A large open triangle: every eigenvalue computed is an outlier, so there may be more. Right: how much of "
        "the gradient's square lies in the space of their eigenvectors."
    )
    return drawn(figure, out, "outliers", "Outliers and the gradient", caption)


def _densities(results: Sequence[Mapping[str, Any]], grid: _Grid, out: Path) -> Drawn:
    """Draw a column of each run's density, on one symmetric-log axis of eigenvalues."""
    parts = [quadratures(result) for result in results]
    values = np.concatenate([q.values for part in parts for q in part])
    weights = np.concatenate([q.weights for part in parts for q in part])
    linear = linear_threshold(values, weights)
    width = smoothing_width(values, linear, max(len(part[0].values) for part in parts))
    ends = symlog(np.array([values.min(), values.max()]), linear)
    x = np.linspace(ends[0] - 3 * width, ends[1] + 3 * width, 400)
    columns = []
    for part in parts:
        one = density_symlog(part, points=1200, width=width, linear=linear)
        columns.append(np.interp(x, symlog(one.grid, linear), one.mean, left=0.0, right=0.0))
    peak = max(column.max() for column in columns)
    with np.errstate(divide="ignore"):
        logs = np.log10(np.array(columns) / peak)
    figure = new_figure(8.4, 4.6 * len(grid.series))
    panels = figure.subplots(len(grid.series), 1, squeeze=False, sharex=True)[:, 0]
    for axes, (series, places) in zip(panels, grid.series, strict=True):
        set_symlog(axes, "y", float(inverse_symlog(x[0], linear)), float(inverse_symlog(x[-1], linear)), linear)
        edges = np.arange(len(places) + 1) - 0.5
        shown = np.where(logs[places] < -_DECADES, np.nan, logs[places])
        image = axes.imshow(
            shown.T,
            extent=(edges[0], edges[-1], x[0], x[-1]),
            origin="lower",
            aspect="auto",
            interpolation="nearest",
            cmap="magma_r",
            vmin=-_DECADES,
            vmax=0,
        )
        axes.vlines(edges[1:-1], x[0], x[-1], color="white", linewidth=2)
        axes.grid(False)
        axes.set_ylabel("eigenvalue λ, symmetric-log axis")
        if len(grid.series) > 1:
            axes.set_title(series)
        _axis(axes, grid)
        axes.set_xlim(edges[0], edges[-1])
        axes.label_outer()
    bar = figure.colorbar(image, ax=list(panels), shrink=0.8 / len(grid.series), label="density per decade, of its peak")
    bar.set_ticks(range(-_DECADES, 1), labels=["1" if k == 0 else f"$10^{{{k}}}$" for k in range(-_DECADES, 1)])
    caption = (
        f"Each column is a run's spectral density, smoothed by Gaussians of {number(width, 2)} decades; the axis is linear "
        f"for |λ| below {number(linear, 2)}. Less than a millionth of the peak is white; gaps between Ritz values "
        "are not resolved."
    )
    return drawn(figure, out, "densities", "Spectral densities", caption)

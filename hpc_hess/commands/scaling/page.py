"""scaling.html: laws fitted to runs, what they predict of the largest, and efficiencies over ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from hpc_hess.console.words import NONE, duration, minus, number, plural, size
from hpc_hess.report.comparison import Drawn, drawn, write_comparison
from hpc_hess.report.style import CYCLE, INK, MARKERS, MUTED, STYLE, new_figure

PAGE_NAME = "scaling.html"
_COLUMNS = ["Run", "Operator", "Parameters", "Ranks", "Tokens", "Product", "Lanczos", "Memory", "Strong", "Weak"]

Record = Mapping[str, Any]


def write_scaling_page(out: Path, record: Record) -> Path:
    """Write OUT/scaling.html and its figures from the record of scale.fit_runs. Local, one rank only."""
    runs, operators = record["runs"], record["operators"]
    with mpl.rc_context(STYLE):  # type: ignore[arg-type]  # a plain dictionary of rc names
        plots = [
            _law(out, operators, "time", "Time of a step", "s"),
            _law(out, operators, "memory", "Memory of a rank", "GB"),
        ]
        strong, weak = _efficiencies(runs, _strong), _efficiencies(runs, _weak)
        if strong or weak:
            plots.append(_efficiency(out, runs, strong, weak))
    rows = [
        (
            "",
            [
                run["name"],
                run["operator"].partition(", ")[2],
                f"{run['num_params']:,}",
                str(run["ranks"]),
                f"{run['tokens']:,}",
                duration(run["hvp_s"]),
                duration(run["lanczos_s"]),
                size(run["memory_bytes"]),
                _share(strong, k),
                _share(weak, k),
            ],
        )
        for k, run in enumerate(runs)
    ]
    return write_comparison(
        out / PAGE_NAME,
        title="Scaling laws",
        story=_story(operators),
        notes=_notes(operators),
        plots=plots,
        columns=_COLUMNS,
        rows=rows,
        legend=(
            "Product and Lanczos: median seconds of a step of all probes in lock-step. Strong: efficiency against the "
            "fewest ranks with the same model and tokens; weak: with the same model and tokens of a rank. All of it, and "
            "the coefficients with their intervals, are in scaling.json."
        ),
    )


def _story(operators: Record) -> str:
    parts = []
    for name, found in operators.items():
        errors = found["time"]["hold_out"].get("errors")
        fit = np.abs(np.array(found["time"]["predicted"]) / np.array(found["time"]["measured"]) - 1)
        runs = plural(len(found["runs"]), "run")
        text = f"{name}: the law fits the steps of {runs} to {100 * float(np.median(fit)):.3g} % (median)"
        if errors:
            text += f" and, fitted without the largest, predicts these to {100 * float(np.median(np.abs(errors))):.3g} %"
        parts.append(text + ".")
    return " ".join(parts)


def _notes(operators: Record) -> list[str]:
    return [
        f"{name}: {found[part]['hold_out']['note']}."
        for name, found in operators.items()
        for part in ("time",)
        if "note" in found[part]["hold_out"]
    ]


def _law(out: Path, operators: Record, part: str, title: str, unit: str) -> Drawn:
    """Draw predicted over measured, and what each term has."""
    scale = 1e9 if unit == "GB" else 1.0
    figure = new_figure(8.4, 3.8)
    scatter, terms = figure.subplots(1, 2, width_ratios=[1, 1.15])
    low, high = np.inf, 0.0
    for k, (name, found) in enumerate(operators.items()):
        measured, predicted = (np.array(found[part][key]) / scale for key in ("measured", "predicted"))
        scatter.plot(
            measured,
            predicted,
            linestyle="",
            marker=MARKERS[k % len(MARKERS)],
            markersize=4,
            alpha=0.7,
            color=CYCLE[k % len(CYCLE)],
            label=name,
        )
        low, high = min(low, measured.min(), predicted[predicted > 0].min()), max(high, measured.max(), predicted.max())
    scatter.plot([low, high], [low, high], color=MUTED, linewidth=0.8)
    if high > 10 * low:
        scatter.set_xscale("log")
        scatter.set_yscale("log")
        for axis in (scatter.xaxis, scatter.yaxis):
            axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,)))
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.set_minor_formatter(NullFormatter())
    else:
        scatter.locator_params(nbins=5)
    scatter.set_xlabel(f"measured ({unit})")
    scatter.set_ylabel(f"predicted ({unit})")
    _coefficients(terms, operators, part)
    figure.legend(*scatter.get_legend_handles_labels(), loc="outside upper left", ncols=2)
    caption = (
        "Left: the fitted law over what was measured; on the line both agree. Right: its coefficients with 95 % intervals "
        "(runs resampled), each over its own estimate; terms that the fit leaves out are empty."
    )
    return drawn(figure, out, part, title, caption)


def _coefficients(axes: Axes, operators: Record, part: str) -> None:
    count = len(operators)
    names: Sequence[str] = next(iter(operators.values()))[part]["terms"]
    for k, found in enumerate(operators.values()):
        values, low, high = (np.array(found[part][key]) for key in ("coefficients", "low", "high"))
        y = np.arange(len(names)) + 0.5 * (k - (count - 1) / 2) / max(count, 1)
        there = values > 0
        ends = np.array([1 - low[there] / values[there], high[there] / values[there] - 1])
        axes.errorbar(
            np.ones(there.sum()),
            y[there],
            xerr=np.clip(ends, 0, None),
            linestyle="",
            marker="o",
            markersize=3,
            color=CYCLE[k % len(CYCLE)],
        )
        for place, value in zip(y[there], values[there], strict=True):
            axes.annotate(
                minus(number(float(value), 3)),
                (1, place),
                textcoords="offset points",
                xytext=(0, 4),
                fontsize=7,
                ha="center",
                color=INK,
            )
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlim(-0.1, 3)
    axes.set_xlabel("coefficient over its estimate")


def _strong(run: Record) -> tuple[Any, ...]:
    return run["operator"], run["num_params"], run["tokens"]


def _weak(run: Record) -> tuple[Any, ...]:
    return run["operator"], run["num_params"], round(run["tokens"] / run["ranks"], -1)


def _efficiencies(runs: Sequence[Record], kind: Any) -> dict[int, float]:
    """Return the efficiency of each run that has one to be compared with: the same ``kind`` on the fewest ranks."""
    found: dict[int, float] = {}
    for key in {kind(run) for run in runs}:
        same = sorted((run["ranks"], k) for k, run in enumerate(runs) if kind(run) == key)
        if len({ranks for ranks, _ in same}) < 2:
            continue
        first, base = same[0]
        for ranks, k in same:
            seconds, before = (run["hvp_s"] + run["lanczos_s"] for run in (runs[k], runs[base]))
            found[k] = before / seconds * (first / ranks if kind is _strong else 1.0)
    return found


def _efficiency(out: Path, runs: Sequence[Record], strong: Mapping[int, float], weak: Mapping[int, float]) -> Drawn:
    figure = new_figure(8.4, 3.4)
    panels = figure.subplots(1, 2, sharey=True)
    for axes, title, found, kind in zip(panels, ("strong", "weak"), (strong, weak), (_strong, _weak), strict=True):
        for n, key in enumerate(sorted({kind(runs[k]) for k in found})):
            points = sorted((runs[k]["ranks"], value) for k, value in found.items() if kind(runs[k]) == key)
            label = f"{key[0].split(',')[1].strip()}, {key[1] / 1e6:.4g} M"
            axes.plot(*zip(*points, strict=True), marker=MARKERS[n % len(MARKERS)], color=CYCLE[n % len(CYCLE)], label=label)
        axes.axhline(1, color=MUTED, linewidth=0.8)
        axes.set_xlabel("ranks")
        axes.set_title(f"{title} scaling")
        axes.set_ylim(0, 1.1 * max(1.1, *strong.values(), *weak.values()))
        if found:
            axes.set_xticks(sorted({runs[k]["ranks"] for k in found}))
            axes.legend(fontsize=7)
        else:
            axes.set_xticks([])
            axes.text(0.5, 0.5, NONE, transform=axes.transAxes, ha="center", color=MUTED)
    panels[0].set_ylabel("efficiency of a step")
    return drawn(
        figure,
        out,
        "efficiency",
        "Efficiency over ranks",
        "Strong: the same tokens on more ranks; weak: as many tokens for each rank.",
    )


def _share(found: Mapping[int, float], k: int) -> str:
    return number(found[k], 3) if k in found else NONE

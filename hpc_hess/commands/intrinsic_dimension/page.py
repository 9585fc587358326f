"""What a search for an intrinsic dimension shows: a few lines on the screen, and a page with the metric's curves."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np

from hpc_hess.console.words import count, minus, number
from hpc_hess.report.comparison import drawn, write_comparison
from hpc_hess.report.style import CYCLE, INK, MUTED, STYLE, new_figure

PAGE_NAME = "intrinsic_dimension.html"


def result_text(record: Mapping[str, Any]) -> str:
    """Return the screen's lines."""
    asked = record["asked"]
    steps, dimension, metric = record["search"][-1]
    lines = [
        "",
        f"{record['model']}: {count(record['num_params'])} parameters",
        f"{_metric(record):<22}{number(record['start'])} at theta_0, target {number(record['threshold'])}",
    ]
    if record["baseline"]:
        best = max(value for _, value in record["baseline"])
        lines.append(f"{'ordinary training':<22}{number(best)} within {record['baseline'][-1][0]} steps")
    if record["dimension"] is None:
        lines.append(
            f"{'intrinsic dimension':<22}above {dimension}: {number(metric)} after {steps} steps; raise --largest "
            f"({asked['largest']})"
        )
        return "\n".join(lines)
    bits = int(np.log2(record["dimension"]))
    lines.append(f"{'intrinsic dimension':<22}{record['dimension']:,} = 2^{bits}, reached after {steps} steps")
    if record["half_reached"] is not None:
        best = max(value for _, value in record["half"])
        lines.append(f"{'at half of it':<22}{number(best)} in as many steps: {_verdict(record)}")
    return "\n".join(lines)


def _verdict(record: Mapping[str, Any]) -> str:
    return "the target too, so the dimension is smaller still" if record["half_reached"] else "not the target"


def _metric(record: Mapping[str, Any]) -> str:
    return "accuracy, %" if record["asked"]["metric"] == "accuracy" else "minus the loss"


def write_page(out: Path, record: Mapping[str, Any]) -> Path:
    """Write OUT/intrinsic_dimension.html and its figure. Local, one rank only."""
    with mpl.rc_context(STYLE):  # type: ignore[arg-type]  # a plain dictionary of rc names
        figure = new_figure(8, 4)
        axes = figure.add_subplot()
        start = (0, record["start"])
        if record["baseline"]:
            axes.plot(*zip(start, *record["baseline"], strict=True), "-", color=MUTED, label="ordinary training")
        steps, dimensions, values = (list(column) for column in zip(*record["search"], strict=True))
        axes.plot([0, *steps], [record["start"], *values], "-", color=CYCLE[0], lw=1, zorder=1)
        for number_of, dimension in enumerate(dict.fromkeys(dimensions)):
            at = [(s, v) for s, d, v in record["search"] if d == dimension]
            axes.plot(*zip(*at, strict=True), "o", ms=5, color=_shade(number_of, len({*dimensions})), label=f"{dimension:,}")
        if record["half"]:
            axes.plot(
                *zip(start, *record["half"], strict=True), "--", color=CYCLE[1], label=f"{record['dimension'] // 2:,}, anew"
            )
        axes.axhline(record["threshold"], color=INK, lw=0.8, ls=":")
        axes.annotate("target", (1, record["threshold"]), xycoords=("axes fraction", "data"), ha="right", va="bottom")
        axes.set(xlabel="training step", ylabel=f"held out: {_metric(record)}")
        axes.legend(title="dimensions", loc="center left", bbox_to_anchor=(1, 0.5))
        dashed = " Dashed: training anew in half the dimensions, for as many steps." if record["half"] else ""
        plots = [
            drawn(
                figure,
                out,
                "intrinsic_dimension",
                "The search, and the check at half the dimension",
                "Points: one training run in a subspace whose dimension doubles where the metric stalls." + dashed,
            )
        ]
    found = record["dimension"]
    story = (
        f"No dimension up to {dimensions[-1]:,} reaches the target."
        if found is None
        else (f"{found:,} of {record['num_params']:,} dimensions reach the target.")
    )
    rows = [("", ["search", str(step), f"{d:,}", minus(number(value))]) for step, d, value in record["search"]]
    rows += [("", ["half", str(step), f"{(found or 2) // 2:,}", minus(number(value))]) for step, value in record["half"]]
    rows += [("", ["ordinary", str(step), f"{record['num_params']:,}", minus(number(v))]) for step, v in record["baseline"]]
    asked, sketch = record["asked"], record["asked"]["sketch"]
    return write_comparison(
        out / PAGE_NAME,
        title=f"Intrinsic dimension of fine-tuning {record['model']}",
        story=story,
        notes=[],
        plots=plots,
        columns=["Training", "Step", "Dimensions", _metric(record).capitalize()],
        rows=rows,
        legend=(
            f"Subspace: {sketch['kind'].upper()}, seed {sketch['seed']}. Every {asked['every']} steps the dimension doubles "
            f"if less than {asked['delta']:g} was gained. Target: {number(record['threshold'])}. All of it is in "
            "intrinsic_dimension.json."
        ),
    )


def _shade(place: int, of: int) -> Any:
    return mpl.colormaps["viridis"](0.9 * place / max(1, of - 1))

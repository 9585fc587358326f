"""What a query of an attribution shows: a table on the screen, and a page with the texts."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.ticker import StrMethodFormatter
from numpy.typing import NDArray

from hpc_hess.commands.arguments import OF_SKETCHES
from hpc_hess.console.words import minus, number
from hpc_hess.registry.operators import OPERATORS
from hpc_hess.report.comparison import drawn, write_comparison
from hpc_hess.report.style import NEGATIVE, POSITIVE, STYLE, new_figure

PAGE_NAME = "attribution.html"
_WIDTH = 60  # characters of a text on the screen
_METHODS = {
    "none": "inner products of sketched gradients",
    OF_SKETCHES: "inner products preconditioned with the Fisher matrix of the sketches",
}


def answer_text(record: Mapping[str, Any]) -> str:
    """Return the screen's lines: the examples that speak most for the query, and most against it."""
    lines = ["", f"query: {_short(record['query'][0])}", f"scores: {method(record)}, {record['examples']} examples"]
    for title, key in (("for it", "top"), ("against it", "bottom")):
        if not record[key]:
            continue
        lines += ["", f"{title:<12}{'example':>8}  {'score':>10}  {'cosine':>7}  text"]
        lines += [
            f"{'':<12}{row['id']:>8}{'' if is_known(row) else '~':1} {number(row['score'], 3):>10}  {row['cosine']:>7.3f}  "
            + (f"[{row['place']}] " if row.get("place") else "")
            + _short(row["text"])
            for row in record[key]
        ]
    lines += ["", trust(record)] if "score_error" in record else []
    return "\n".join(lines)


def is_known(row: Mapping[str, Any]) -> bool:
    """Whether a score is larger than twice the error that its sketch may have."""
    return abs(row["score"]) > 2 * row.get("error", 0.0)


def trust(record: Mapping[str, Any]) -> str:
    """Say how far the scores can be trusted for the dimension of the sketch."""
    return (
        f"A score is known to about ± {number(record['score_error'], 2)} (|g| |G| / sqrt(D)): scores closer than that have "
        f"no certain order; {number(100 * record['told_apart'], 2)} % of them differ from 0 by twice that much"
        + ("; ~ marks listed ones that do not." if not all(map(is_known, [*record["top"], *record["bottom"]])) else ".")
    )


def method(record: Mapping[str, Any]) -> str:
    """Say how scores were computed."""
    damping = "" if record["damping"] is None else f", damping {number(record['damping'], 2)}"
    sketch = record["sketch"]
    name = record["precondition"]
    matrix = OPERATORS[name].matrix if name in OPERATORS else name
    how = _METHODS.get(name, f"inner products preconditioned with the {matrix} in sketch space")
    return f"{how} ({sketch['kind'].upper()}, D = {sketch['dimension']:,}{damping})"


def _short(text: str) -> str:
    return textwrap.shorten(text.replace("\n", " "), _WIDTH, placeholder=" ...")


def write_page(out: Path, record: Mapping[str, Any], scores: NDArray[np.float64], cosines: NDArray[np.float64]) -> Path:
    """Write OUT/attribution.html with the texts, and where their scores lie among all. Local, one rank only."""
    with mpl.rc_context(STYLE):  # type: ignore[arg-type]  # a plain dictionary of rc names
        figure = new_figure(8, 3.2)
        left, right = figure.subplots(1, 2)
        left.hist(scores, bins=60, color="#b8bcc2")
        if "score_error" in record:
            left.axvspan(-2 * record["score_error"], 2 * record["score_error"], color="#b8bcc2", alpha=0.25, lw=0)
        for key, colour in (("top", POSITIVE), ("bottom", NEGATIVE)):
            values = [row["score"] for row in record[key]]
            left.plot(values, np.zeros(len(values)), "|", ms=14, mew=1.6, color=colour, clip_on=False)
        left.set(xlabel="score", ylabel="examples", yscale="symlog")
        left.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        right.plot(cosines, scores, ".", ms=3, color="#8a8f96", rasterized=True)
        right.set(xlabel="cosine with the query's gradient", ylabel="score")
        plots = [
            drawn(
                figure,
                out,
                "attribution",
                "Scores of all examples",
                "Left: how many examples have which score; strokes mark those listed below; grey: scores that the sketch "
                "does not tell from 0. Right: score against cosine; far "
                "from a line, long gradients or the preconditioner decide.",
            )
        ]
    rows = [
        (
            "",
            [
                f"{sign}{place}",
                f"{row['id']} {row.get('place', '')}".strip(),
                minus(number(row["score"], 3)),
                minus(f"{row['cosine']:.3f}"),
                number(row["loss"], 4),
                row["text"],
            ],
        )
        for sign, key in (("+", "top"), ("\u2212", "bottom"))
        for place, row in enumerate(record[key], 1)
    ]
    best = record["top"][0]
    return write_comparison(
        out / PAGE_NAME,
        title="Attribution",
        notes=[],
        plots=plots,
        text_columns=1,
        story=f"Which of {record['examples']:,} examples speak for this text? Most of all example {best['id']}.",
        quotation="\n".join(record["query"]),
        rows=rows,
        columns=["Rank", "Example", "Score", "Cosine", "Loss", "Text"],
        legend=(
            f"Scores: {method(record)}. Positive: a step down this example's gradient lowers the loss of the query. + lists "
            "the largest scores, \u2212 the smallest. Numbers are in attribution.json, all sketches in sketches.h5. "
            + (minus(trust(record)) if "score_error" in record else "")
        ),
    )

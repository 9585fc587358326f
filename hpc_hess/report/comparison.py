"""A page that compares runs: figures, a table with a line for each run, one file that opens offline."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib.figure import Figure

from hpc_hess.report.style import save_figure
from hpc_hess.report.template import render_template
from hpc_hess.storage.run_files import write_aside


class Drawn(NamedTuple):
    """One figure of the page; ``source`` is its SVG as a data address."""

    name: str
    title: str
    caption: str
    source: str


def drawn(figure: Figure, out: Path, name: str, title: str, caption: str) -> Drawn:
    """Write OUT/figures/NAME.png and return the figure for the page."""
    (out / "figures").mkdir(parents=True, exist_ok=True)
    text = io.StringIO()
    save_figure(figure, out / "figures" / f"{name}.png", text)
    return Drawn(name, title, caption, "data:image/svg+xml;base64," + base64.b64encode(text.getvalue().encode()).decode())


def write_comparison(
    path: Path,
    *,
    title: str,
    story: str,
    notes: Sequence[str],
    plots: Sequence[Drawn],
    columns: Sequence[str],
    rows: Sequence[tuple[str, Sequence[str]]],
    legend: str,
    quotation: str = "",
    text_columns: int = 0,
) -> Path:
    """Write the page.

    ``rows``: a link, or "", and the cells; ``legend``: what the columns mean; ``quotation``: a text that the page is about;
    ``text_columns``: so many columns at the end hold running text.
    """
    text = render_template(
        "comparison.html",
        title=title,
        story=story,
        notes=notes,
        plots=plots,
        columns=columns,
        rows=rows,
        legend=legend,
        quotation=quotation,
        text_columns=text_columns,
    )
    write_aside(path, text)
    return path

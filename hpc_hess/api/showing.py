"""What a notebook shows of operators and results: a few lines, and a figure."""

from __future__ import annotations

import html
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hpc_hess.studies.figures import Axes


class Shown:
    """Shows itself by a few lines, not by all its numbers."""

    def _lines(self) -> list[str]:
        raise NotImplementedError

    def __repr__(self) -> str:
        """Show what it is."""
        return "\n  ".join(self._lines())

    def _repr_html_(self) -> str:
        """Show the same in a notebook."""
        head, *rest = (html.escape(line) for line in self._lines())
        return f'<div style="margin-bottom: 0.4em"><b>{head}</b><br>{"<br>".join(rest)}</div>'


class Drawn(Shown):
    """Has a figure besides, and a caption where its look does not tell everything."""

    _caption = ""

    @property
    def _inches(self) -> tuple[float, float]:
        return 7.0, 3.4

    def _draw(self, axes: Axes) -> None:
        raise NotImplementedError

    def _repr_html_(self) -> str:
        """Show the lines and the figure in a notebook."""
        from hpc_hess.studies import figures  # late: matplotlib takes a second

        caption = f'<div style="font-size: 0.85em">{html.escape(self._caption)}</div>' if self._caption else ""
        return super()._repr_html_() + figures.inline(self._draw, self._inches) + caption

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw on ``ax``, or on the axes of a new figure of pyplot; return the axes."""
        from hpc_hess.studies import figures

        return figures.on_axes(self._draw, self._inches, ax)

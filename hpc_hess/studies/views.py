"""What the report shows of each study: a sentence, a table, a figure. A module a study, all with the same functions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, Protocol

from matplotlib.figure import Figure

from hpc_hess.registry.studies import STUDIES
from hpc_hess.registry.table import load

Found = Mapping[str, Any]


class View(Protocol):
    """How one study is shown; ``found`` is what it found, ``result`` the whole of result.json."""

    TITLE: str
    HEADERS: list[str]

    def facts(self, found: Found) -> str:
        """Say in one or two sentences what was done and what it came to."""
        ...

    def table(self, found: Found) -> list[list[str]]:
        """Return the rows under HEADERS."""
        ...

    def size(self, found: Found) -> tuple[float, float] | None:
        """Return the figure's width and height in inches; None where there is nothing to draw."""
        ...

    def draw(self, figure: Figure, found: Found, result: Mapping[str, Any]) -> str:
        """Draw into an empty figure and return its caption."""
        ...

    def lines(self, found: Found) -> list[str]:
        """Return what the terminal shows."""
        ...


class Part(NamedTuple):
    """One study of a result, or a part of one that is shown by itself."""

    name: str
    view: View
    found: Found


def parts(result: Mapping[str, Any]) -> Iterator[Part]:
    """Yield the studies that a result has, in reading order; a view's own ``parts`` may show one as several."""
    found = {"eigenpairs": result.get("eigenpairs"), **(result.get("studies") or {})}
    for name, spec in STUDIES.items():
        if some := found.get(name):
            view = load(spec.view)
            split = getattr(view, "parts", None)
            yield from (Part(*part) for part in split(some)) if split else [Part(name, view, some)]

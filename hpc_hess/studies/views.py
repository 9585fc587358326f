"""What the report shows of each study: a sentence, a table, a figure. One module a study, all with the same functions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, Protocol

from matplotlib.figure import Figure

from hpc_hess.studies.block_diagonal import layers_view as layers
from hpc_hess.studies.block_diagonal import view as block_diagonal
from hpc_hess.studies.class_structure import view as class_structure
from hpc_hess.studies.deflated import view as deflated
from hpc_hess.studies.diagonal import view as diagonal
from hpc_hess.studies.eigenpairs import view as eigenpairs
from hpc_hess.studies.inverse import view as inverse
from hpc_hess.studies.sub_block import view as sub_block
from hpc_hess.studies.trace import view as trace

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


VIEWS: dict[str, View] = {
    "eigenpairs": eigenpairs, "deflated": deflated, "trace": trace, "diagonal": diagonal, "inverse": inverse,
    "block_diagonal": block_diagonal, "layers": layers, "class_structure": class_structure, "sub_block": sub_block,
}  # fmt: skip


class Part(NamedTuple):
    """One study of a result."""

    name: str
    view: View
    found: Found


def parts(result: Mapping[str, Any]) -> Iterator[Part]:
    """Yield the studies that a result has, in reading order."""
    found = {"eigenpairs": result.get("eigenpairs"), **(result.get("studies") or {})}
    found["layers"] = (found.get("block_diagonal") or {}).get("spectrum")
    for name, view in VIEWS.items():
        if found.get(name):
            yield Part(name, view, found[name])

"""What a report shows of the eigenpairs that were searched for: a table, and a picture of where the vectors live."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import NullFormatter

from hpc_hess.console.words import minus, number, plural
from hpc_hess.report.style import NEGATIVE, POSITIVE

TITLE = "Where the eigenvectors live"
HEADERS = ["Eigenvalue", "Residual", "Entries", "Parameters with the largest share"]
_CAPTION = (
    "Each row is an eigenvector, each column a block or a module outside the blocks; the colour is the share of the "
    "vector's squared entries there (0.1 % and less is white). Right: on how many entries the vector lives, its "
    "participation ratio."
)
_LEAST = 1e-3  # share of a vector that is still coloured
_MOST_ROWS = 40


def table(found: Mapping[str, Any]) -> list[list[str]]:
    """Return rows of eigenvalue, residual, participation and the largest parameters, from the largest value down."""
    rows = []
    for pair in sorted(found["pairs"], key=lambda p: -p["value"]):
        largest = ", ".join(f"{name} {100 * share:.3g} %" for name, share in list(pair["parameters"].items())[:3])
        mark = "" if pair["converged"] else " (not converged)"
        rows.append(
            [
                minus(number(pair["value"], 7)) + mark,
                minus(number(pair["residual"], 3)),
                f"{pair['participation']:,.0f}",
                largest,
            ]
        )
    return rows


def facts(found: Mapping[str, Any]) -> str:
    """Return one sentence on the search."""
    done = sum(pair["converged"] for pair in found["pairs"])
    return (
        f"{done} of {len(found['pairs'])} pairs converged to {number(found['tolerance'])} of the largest |λ|, after "
        f"{plural(found['products'], 'product')} and {plural(found['restarts'], 'restart')} of a basis of "
        f"{found['vectors']} vectors. The eigenvectors are orthonormal to {number(found['orthogonality'], 2)} (a copy of "
        f"one would show as 1); they are rows of {found['store']}."
    )


def size(found: Mapping[str, Any]) -> tuple[float, float]:
    """Return the figure's size in inches."""
    return 8.4, 2.2 + 0.22 * min(len(found["pairs"]), _MOST_ROWS)


def draw(figure: Figure, found: Mapping[str, Any], result: Mapping[str, Any]) -> str:
    """Draw the picture into an empty figure and return its caption."""
    pairs = sorted(found["pairs"], key=lambda p: -p["value"])[:_MOST_ROWS]
    heat, bars = figure.subplots(1, 2, sharey=True, width_ratios=[4, 1])
    image = draw_heat(heat, [pair["value"] for pair in pairs], [pair["groups"] for pair in pairs])
    bars.barh(
        range(len(pairs)),
        [pair["participation"] for pair in pairs],
        height=0.7,
        color=[NEGATIVE if pair["value"] < 0 else POSITIVE for pair in pairs],
    )
    ends = np.log10([pair["participation"] for pair in pairs])
    bars.set(xscale="log", xlim=(10 ** np.floor(ends.min() - 0.1), 10 ** np.ceil(ends.max())))  # labels at both ends
    bars.xaxis.set_minor_formatter(NullFormatter())
    bars.set_xlabel("entries")
    bars.tick_params(axis="y", length=0, labelleft=False)
    figure.colorbar(image, ax=heat, location="top", shrink=0.5, aspect=30, label="share of the vector")
    return _CAPTION


def draw_heat(axes: Axes, values: Sequence[float], groups: Sequence[Mapping[str, float]]) -> AxesImage:
    """Draw a row for each eigenvector: its eigenvalue, and its ``groups``, name -> share of the squared entries."""
    names = list(groups[0])
    names.sort(key=lambda name: (not name.startswith("block"), int(name.split()[1]) if name.startswith("block") else 0))
    shares = np.array([[group[name] for name in names] for group in groups])
    image = axes.imshow(
        np.where(shares < _LEAST, np.nan, shares),
        aspect="auto",
        cmap="viridis_r",
        norm=LogNorm(_LEAST, 1.0),
        interpolation="nearest",
    )
    axes.grid(False)
    _name_columns(axes, names)
    axes.set_yticks(range(len(values)), [minus(number(value, 4)) for value in values])
    axes.set_ylabel("eigenvalue λ")
    for label, value in zip(axes.get_yticklabels(), values, strict=True):
        label.set_color(NEGATIVE if value < 0 else POSITIVE)
    return image


def lines(found: Mapping[str, Any]) -> list[str]:
    """Return one line for each pair: value, residual, and the parameter it lives on most."""
    said = []
    for pair in sorted(found["pairs"], key=lambda p: -p["value"]):
        name, share = next(iter(pair["parameters"].items()))
        mark = "" if pair["converged"] else ", not converged"
        residual = f"residual {number(pair['residual'], 2)}{mark}"
        said.append(f"{number(pair['value'], 6)}  ({residual}; {100 * share:.3g} % in {name})")
    return said


def _name_columns(axes: Axes, groups: list[str]) -> None:
    """Label every so many blocks by number, and every other module by name."""
    blocks = [k for k, name in enumerate(groups) if name.startswith("block")]
    shown = blocks[:: max(1, len(blocks) // 10)]
    outside = [k for k in range(len(groups)) if k not in blocks]
    axes.set_xticks([*shown, *outside], [groups[k].removeprefix("block ") for k in shown] + [groups[k] for k in outside])
    for label, k in zip(axes.get_xticklabels(), [*shown, *outside], strict=True):
        if k in outside:
            label.set(rotation=40, ha="right", rotation_mode="anchor")
    axes.set_xlabel("block" if blocks else "module")

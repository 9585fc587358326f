"""Several spectral densities on one symmetric-logarithmic axis."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

from hpc_hess.linalg.density import Density, density_symlog, symlog
from hpc_hess.linalg.quadrature import Ritz
from hpc_hess.report.style import INK, MUTED, NEGATIVE, POSITIVE, label_powers, linear_threshold, set_symlog

Float = NDArray[np.float64]
_FLOOR = 1e-12  # smallest density shown, relative to the peak


class Curve(NamedTuple):
    """The density of some quadratures, and how it is drawn."""

    parts: list[Ritz]
    colour: str
    label: str
    linewidth: float = 1.4


def smoothing_width(values: Float, linear: float, count: int) -> float:
    """Return a Gaussian's width in decades: about the gap between ``count`` Ritz values.

    A finer one would draw the quadrature, not the spectrum.
    """
    span = float(np.ptp(symlog(values, linear)))
    return float(np.clip(0.5 * span / max(count, 1), 0.05, 0.3))


def draw_unresolved(axes: Axes, x: Float, low: Float, high: Float, where: NDArray[np.bool_], colour: str = MUTED) -> None:
    """Hatch what the density may be where it is not resolved."""
    axes.fill_between(x, low, high, where=where, facecolor="none", edgecolor=colour, hatch="////", alpha=0.35, linewidth=0)


def told(shape: Density, parts: Sequence[Ritz]) -> NDArray[np.bool_]:
    """Return where a line tells something: stretches of resolved places that hold a Ritz value.

    One without any is a tail of the smoothing, so thin that nothing else is there: a stray line beyond the spectrum.
    """
    stretch = np.cumsum(np.diff(shape.resolved, prepend=False))
    after = np.searchsorted(shape.grid, np.concatenate([q.values for q in parts]))
    beside = np.clip([after - 1, after], 0, len(stretch) - 1)
    return np.asarray(shape.resolved & np.isin(stretch, stretch[beside]))


def draw_density(axes: Axes, shape: Density, x: Float, parts: Sequence[Ritz], size: int) -> None:
    """Draw a density at places ``x`` of its axis: coloured by sign, with its band for ``size`` eigenvalues (0: without)."""
    peak, line, nodes = float(shape.mean.max()), told(shape, parts), np.concatenate([q.values for q in parts])
    # every Ritz value stays in sight, unless its weight is rounding
    floor = float(np.interp(nodes, shape.grid, shape.mean).min()) / 10
    floor = min(max(floor, peak * _FLOOR), peak * 1e-3)
    under = floor * 1e-3  # out of sight, so that steep flanks are drawn to the axis
    curve = np.where(line, np.maximum(shape.mean, under), np.nan)
    axes.set_yscale("log")
    for colour, side in ((NEGATIVE, shape.grid <= 0), (POSITIVE, shape.grid >= 0)):
        shade = colour if nodes.min() < 0 else POSITIVE  # smoothing alone makes no negative curvature
        axes.fill_between(x, under, curve, where=side & line, color=shade, alpha=0.16, linewidth=0)
    low, high = shape.band(size, everywhere=False) if size else (shape.low, shape.high)
    low, high = (np.clip(edge, under, peak * 1e3) for edge in (low, high))
    draw_unresolved(axes, x, low, high, ~line)
    if size:
        axes.fill_between(x, low, high, where=line, color=MUTED, alpha=0.28, linewidth=0)
    axes.plot(x, curve, color=INK)
    axes.set_ylim(floor, peak * 4)
    label_powers(axes, 9)
    axes.set_xlim(float(x[0]) + 2 * shape.width, float(x[-1]) - 2 * shape.width)  # three widths beyond the ends


def draw_curve(axes: Axes, shape: Density, parts: Sequence[Ritz], linear: float, **look: Any) -> None:
    """Draw a density on a symmetric-log axis: a line where it is told, elsewhere hatched up to its bound."""
    x, peak, line = symlog(shape.grid, linear), float(shape.mean.max()), told(shape, parts)
    axes.plot(x, np.where(line, np.maximum(shape.mean, 1e-300), np.nan), **look)
    low, high = (np.clip(edge, peak * 1e-30, peak * 1e3) for edge in (shape.low, shape.high))
    draw_unresolved(axes, x, low, high, ~line, look["color"])


UNRESOLVED = (
    "Hatched, without a line: the steps do not tell the density to a factor of two; it lies within the hatching, but for "
    "the scatter of random probes."
)  # of captions


def draw_densities(
    axes: Axes, curves: Sequence[Curve], scale: Ritz, others: Float
) -> tuple[Callable[[Any], Float], float, float]:
    """Draw curves; ``scale`` sets axis and smoothing, ``others`` are further values that must be on the axis.

    Returns where values lie on the axis, the smoothing's width in decades, and the highest peak.
    """
    values = np.concatenate([scale.values, others, *[q.values for curve in curves for q in curve.parts]])
    linear = linear_threshold(scale.values, scale.weights)
    width = smoothing_width(values, linear, len(scale.values))
    place = set_symlog(axes, "x", float(values.min()) * 1.5, float(values.max()) * 1.5, linear)
    peak = 0.0
    for curve in curves:
        shape = density_symlog(curve.parts, points=1200, width=width, linear=linear)
        peak = max(peak, float(shape.mean.max()))
        draw_curve(axes, shape, curve.parts, linear, color=curve.colour, label=curve.label, linewidth=curve.linewidth)
    axes.set_yscale("log")
    axes.set_ylabel("density per decade of λ")
    axes.set_xlabel("eigenvalue λ, symmetric-log axis")
    axes.set_xlim(float(place(values.min())) - 3 * width, float(place(values.max())) + 3 * width)
    return place, width, peak

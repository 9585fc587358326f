"""Figures of single results, for notebooks: on axes of the user's or on new ones, in the look of the report."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping, Sequence

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes as Axes  # for the types of api/, which knows no matplotlib
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from hpc_hess.console.words import minus, number
from hpc_hess.linalg.density import density_symlog, symlog
from hpc_hess.linalg.quadrature import Ritz
from hpc_hess.report.densities import draw_density, smoothing_width
from hpc_hess.report.style import CYCLE, INK, MUTED, NEGATIVE, POSITIVE, STYLE, linear_threshold, new_figure, set_symlog
from hpc_hess.studies.eigenpairs.view import draw_heat

Draw = Callable[[Axes], None]
Size = tuple[float, float]  # inches


def on_axes(draw: Draw, size: Size, ax: Axes | None) -> Axes:
    """Draw on ``ax``, or else on the axes of a new figure of pyplot, which a notebook shows; return the axes."""
    with mpl.rc_context(STYLE):  # type: ignore[arg-type]  # a plain dictionary of rc names
        if ax is None:
            from matplotlib import pyplot  # late: it chooses how figures are shown

            ax = pyplot.subplots(figsize=size, layout="constrained")[1]
        draw(ax)
    return ax


def inline(draw: Draw, size: Size) -> str:
    """Return the figure as an element of HTML that holds its image."""
    with mpl.rc_context(STYLE):  # type: ignore[arg-type]  # a plain dictionary of rc names
        figure, png = new_figure(*size), io.BytesIO()
        draw(figure.subplots())
        figure.savefig(png, format="png")
    data = base64.b64encode(png.getvalue()).decode()
    return f'<img alt="figure" width="{round(96 * size[0])}" src="data:image/png;base64,{data}">'


def draw_spectrum(axes: Axes, parts: Sequence[Ritz], size: int) -> None:
    """Draw the density of ``size`` eigenvalues on a symmetric-log axis, the Ritz values as ticks, and name both ends."""
    values = np.concatenate([q.values for q in parts])
    linear = linear_threshold(values, np.concatenate([q.weights for q in parts]))
    width = smoothing_width(values, linear, len(parts[0].values))
    shape = density_symlog(list(parts), points=1200, width=width, linear=linear)
    place = set_symlog(axes, "x", float(shape.grid[0]), float(shape.grid[-1]), linear)
    draw_density(axes, shape, symlog(shape.grid, linear), parts, size)
    axes.set_xlabel("eigenvalue λ, symmetric-log axis")
    axes.set_ylabel("density per decade of λ")
    for low, high, colour in ((-np.inf, 0.0, NEGATIVE), (0.0, np.inf, POSITIVE)):
        ticks = place(values[(values >= low) & (values < high)])
        axes.vlines(ticks, 0, 0.03, transform=axes.get_xaxis_transform(), colors=colour, linewidth=0.8)
    for name, value, corner, side in (("λ min", values.min(), 0.0, "left"), ("λ max", values.max(), 1.0, "right")):
        text, colour = f"{name} = {minus(number(float(value)))}", NEGATIVE if value < 0 else POSITIVE
        axes.text(corner, 1.02, text, transform=axes.transAxes, ha=side, va="bottom", color=colour)


def draw_pairs(axes: Axes, values: Sequence[float], groups: Sequence[Mapping[str, float]]) -> None:
    """Draw a row for each eigenvector, from the largest eigenvalue down: its share in each block or module."""
    order = np.argsort(values)[::-1]
    image = draw_heat(axes, [float(values[k]) for k in order], [groups[k] for k in order])
    figure = axes.get_figure()
    if figure is not None:
        figure.colorbar(image, ax=axes, label="share of the vector", aspect=30)


def draw_residuals(axes: Axes, residuals: NDArray[np.float64], tolerance: float) -> None:
    """Draw relative residuals against products."""
    axes.semilogy(range(len(residuals)), np.where(residuals > 0, residuals, np.nan), color=INK, marker="o")
    if tolerance > 0:
        axes.axhline(tolerance, color=MUTED, linestyle=(0, (4, 3)), label="tolerance")
        axes.legend()
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("products")
    axes.set_ylabel("relative residual")


def draw_parts(axes: Axes, parts: Mapping[str, NDArray[np.float64]]) -> None:
    """Draw the eigenvalues of each part, a row each, on a logarithmic axis."""
    everything = np.concatenate(list(parts.values()))
    floor = 1e-12 * float(everything.max(initial=0.0))
    for row, (values, colour) in enumerate(zip(parts.values(), CYCLE, strict=False)):
        shown = values[values > floor]
        axes.plot(shown, np.full(len(shown), row), "|", color=colour, markersize=16, markeredgewidth=1.4)
    axes.set_xscale("log")
    axes.set_yticks(range(len(parts)), list(parts))
    axes.set_ylim(len(parts) - 0.5, -0.5)
    axes.grid(False, axis="y")
    axes.set_xlabel("nonzero eigenvalues")

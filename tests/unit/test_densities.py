"""Where a density is drawn as a line: not in a tail of the smoothing beyond the last Ritz value."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.figure import Figure

from hpc_hess.linalg.density import Density, density_symlog, symlog
from hpc_hess.linalg.quadrature import Ritz, ritz
from hpc_hess.report.densities import draw_curve, told
from hpc_hess.report.style import linear_threshold


def quadrature(share: float, steps: int) -> Ritz:
    """Lanczos on a bulk and an outlier, 50, of which the start vector has the squared component ``share``."""
    values = np.r_[np.linspace(-1, 1, 299) ** 3, 50.0]
    v = np.random.default_rng(0).choice([-1.0, 1.0], 300)
    v[-1] = np.sqrt(300 * share)
    basis, alpha, beta = [v / np.linalg.norm(v)], list[float](), list[float]()
    for _ in range(steps):
        w = values * basis[-1]
        alpha.append(float(w @ basis[-1]))
        for _ in range(2):
            for u in basis:
                w = w - (w @ u) * u
        beta.append(float(np.linalg.norm(w)))
        basis.append(w / beta[-1])
    return ritz(alpha, beta)


def shape_of(q: Ritz) -> Density:
    return density_symlog([q], points=1200, width=0.3, linear=linear_threshold(q.values, q.weights))


@pytest.mark.parametrize("share", [1e-9, 1e-10])
def test_a_tail_without_a_ritz_value_has_no_line(share: float) -> None:
    q = quadrature(share, 6)
    assert q.values[-1] == pytest.approx(50, rel=1e-3)
    shape = shape_of(q)
    beyond = shape.grid > q.values[-1]
    assert shape.resolved[beyond].any()  # the outlier's own tail, beyond what else may be there
    assert not shape.resolved[np.searchsorted(shape.grid, q.values[-1])]
    assert not told(shape, [q]).any()
    axes = Figure().subplots()
    draw_curve(axes, shape, [q], float(shape.linear or 0), color="black")
    (line,) = axes.lines
    assert np.isnan(np.asarray(line.get_ydata(), float)).all()


def test_an_outlier_that_is_told_has_its_line() -> None:
    q = quadrature(1e-3, 8)
    shape = shape_of(q)
    line = told(shape, [q])
    assert line[np.searchsorted(shape.grid, q.values[-1])]
    assert (line <= shape.resolved).all()
    x, at = symlog(shape.grid, float(shape.linear or 0)), symlog(q.values, float(shape.linear or 0))
    for stretch in np.split(np.arange(len(x)), np.flatnonzero(np.diff(line)) + 1):
        if line[stretch[0]]:
            assert ((x[stretch[0]] - 0.1 <= at) & (at <= x[stretch[-1]] + 0.1)).any()


def test_a_spectrum_that_is_known_is_one_line() -> None:
    q = Ritz(np.array([-1.0, 2.0, 30.0]), np.array([0.5, 0.4, 0.1]), np.zeros(3))
    shape = shape_of(q)
    assert shape.resolved.all()
    assert told(shape, [q]).all()

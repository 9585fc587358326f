"""Smoothed spectral densities from quadratures, each with the width it was smoothed by.

Gaussian kernels on a linear axis (Lin, Saad, Yang 2016), a symmetric-log axis, or log |lambda| (Papyan 2019); Chebyshev
polynomials with Jackson damping (Weisse, Wellein, Alvermann, Fehske, Rev. Mod. Phys. 78, 2006).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import chdtri

from hpc_hess.linalg.quadrature import Ritz

Float = NDArray[np.float64]


@dataclass(frozen=True)
class Density:
    """A smoothed spectral density: ``mean`` and ``spread`` (standard deviation over probes; None for one) on ``grid``.

    ``square`` is the mean of the weighted squared kernel, which :meth:`band` needs.

    On the symmetric-log axis the density is per unit of the axis variable x = sign(l) log10(1 + |l| / linear), and
    ``grid`` still holds eigenvalues l.
    """

    grid: Float
    mean: Float
    spread: Float | None
    square: Float
    width: float
    axis: str
    linear: float | None = None
    probes: int = 1

    def band(self, size: int, *, risk: float = 0.05, everywhere: bool = True) -> tuple[Float, Float]:
        """Return a band that holds the smoothed density of ``size`` eigenvalues with probability 1 - ``risk``.

        Everywhere at once, or else at each place.

        What probes scatter by is known: each eigenvalue's weight in a probe is a squared normal number over N. So the
        estimate over the truth is about chi^2_k / k, where k counts the eigenvalues under the kernel, (sum phi)^2 over
        sum phi^2 (Satterthwaite 1946), times the probes. One of its own has k = 1 a probe, a bulk thousands. The count is
        taken at 0.7 of its estimate, at least 1, and the risk shared by as many places as there are widths.
        """
        ends = self.grid[[0, -1]]
        span = float(np.ptp(ends if self.linear is None else symlog(ends, self.linear)))
        share = risk / (max(1.0, span / self.width) if everywhere else 1.0) / 2
        with np.errstate(divide="ignore", invalid="ignore"):
            count = np.nan_to_num(size * self.mean**2 / self.square)
        k = self.probes * np.maximum(1.0, 0.7 * count)
        return self.mean * k / chdtri(k, share), self.mean * k / chdtri(k, 1 - share)


def _averaged(kernels: list[Float], quadratures: list[Ritz]) -> tuple[Float, Float | None, Float]:
    """Return mean and spread over probes of the densities, and the mean of sum w phi^2; kernels are (point, node)."""
    curves = np.array([phi @ q.weights for phi, q in zip(kernels, quadratures, strict=True)])
    squares = np.array([phi**2 @ q.weights for phi, q in zip(kernels, quadratures, strict=True)])
    return curves.mean(0), curves.std(0, ddof=1) if len(curves) > 1 else None, squares.mean(0)


def _smooth(quadratures: list[Ritz], nodes: list[Float], points: Float, width: float) -> tuple[Float, Float | None, Float]:
    def gaussian(x: Float) -> Float:
        return np.exp(-0.5 * ((points[:, None] - x) / width) ** 2) / (width * np.sqrt(2 * np.pi))

    return _averaged([gaussian(x) for x in nodes], quadratures)


def density(quadratures: list[Ritz], *, points: int = 2000, width: float | None = None) -> Density:
    """Gaussian-smoothed density on a linear axis.

    The width is 1/100 of the range unless given. One Gaussian per Ritz value, weighted (Lin, Saad, Yang 2016).
    """
    nodes = [q.values for q in quadratures]
    low, high = min(x.min() for x in nodes), max(x.max() for x in nodes)
    span = (high - low) or max(abs(high), 1.0) * 1e-3
    width = width or span / 100
    grid = np.linspace(low - 5 * width, high + 5 * width, points)
    smoothed = _smooth(quadratures, nodes, grid, width)
    return Density(grid, *smoothed, width, "linear", probes=len(quadratures))


def symlog(values: ArrayLike, linear: float) -> Float:
    """Return sign(l) log10(1 + |l| / linear): linear below ``linear``, decades above."""
    x = np.asarray(values, np.float64)
    return np.sign(x) * np.log10(1 + np.abs(x) / linear)


def inverse_symlog(values: ArrayLike, linear: float) -> Float:
    """Inverse of :func:`symlog`."""
    x = np.asarray(values, np.float64)
    return np.sign(x) * linear * (10 ** np.abs(x) - 1)


def density_symlog(
    quadratures: list[Ritz], *, points: int = 2000, width: float = 0.05, linear: float | None = None
) -> Density:
    """Gaussian-smoothed density on a symmetric-log axis; ``width`` in decades, ``linear`` the axis' linear threshold.

    ``linear`` defaults to 1e-5 of the largest |Ritz value|, so that five decades either side of zero are resolved.
    """
    nodes = [q.values for q in quadratures]
    largest = max(np.abs(x).max() for x in nodes) or 1.0
    linear = linear or largest * 1e-5
    mapped = [symlog(x, linear) for x in nodes]
    low, high = min(x.min() for x in mapped), max(x.max() for x in mapped)
    grid = np.linspace(low - 5 * width, high + 5 * width, points)
    smoothed = _smooth(quadratures, mapped, grid, width)
    return Density(inverse_symlog(grid, linear), *smoothed, width, "symlog", linear, len(quadratures))


def papyan_width(span: float, steps: int, kappa: float = 3.0) -> float:
    """Return the Gaussian width at which each of ``steps`` evenly spread nodes falls to 1 / kappa midway to the next.

    Papyan, "Traces of class/cross-class structure pervade deep learning spectra", JMLR 21 (2020), section D.2:
    sigma = h / sqrt(8 ln kappa), h = span / (steps - 1).
    """
    return span / (steps - 1) / float(np.sqrt(8 * np.log(kappa)))


def density_log(
    quadratures: list[Ritz], *, points: int = 2000, width: float | None = None, epsilon: float | None = None
) -> Density:
    """Gaussian-smoothed density of log10(|lambda| + epsilon) per decade; ``grid`` holds those logarithms (Papyan 2019).

    ``epsilon`` defaults to 1e-6 of the largest |Ritz value|, the width to :func:`papyan_width` of the logarithms' span.
    """
    largest = max(float(np.abs(q.values).max()) for q in quadratures) or 1.0
    epsilon = epsilon or 1e-6 * largest
    nodes = [np.log10(np.abs(q.values) + epsilon) for q in quadratures]
    low, high = np.log10(epsilon), np.log10(largest + epsilon)
    width = width or papyan_width(high - low, max(len(x) for x in nodes) + 1)
    grid = np.linspace(low - 5 * width, high + 5 * width, points)
    smoothed = _smooth(quadratures, nodes, grid, width)
    return Density(grid, *smoothed, width, "log", probes=len(quadratures))


def density_chebyshev(quadratures: list[Ritz], *, points: int = 2000, moments: int | None = None) -> Density:
    """Chebyshev expansion with Jackson damping: never negative, and as fine as its moments are exact.

    m steps give 2 m - 1 exact moments; ``moments`` defaults to as many. ``width`` is that of the kernel in the middle of the
    range, pi / moments of its half; it falls to zero towards the ends.
    """
    low = min(float(q.values[0]) for q in quadratures)
    high = max(float(q.values[-1]) for q in quadratures)
    centre, half = 0.5 * (low + high), 0.5 * (high - low) * 1.02 or 1.0
    count = moments or 2 * min(len(q.values) for q in quadratures) - 1
    n = np.arange(count)
    angle = np.pi / (count + 1)
    jackson = ((count - n + 1) * np.cos(angle * n) + np.sin(angle * n) / np.tan(angle)) / (count + 1)
    x = np.linspace(-1, 1, points + 2)[1:-1]
    rows = np.cos(n[:, None] * np.arccos(x)) * np.where(n == 0, 1, 2)[:, None] / (np.pi * np.sqrt(1 - x**2) * half)
    kernels = []
    for q in quadratures:
        at_nodes = np.cos(n[:, None] * np.arccos(np.clip((q.values - centre) / half, -1, 1)))
        kernels.append(rows.T @ (jackson[:, None] * at_nodes))
    smoothed = _averaged(kernels, quadratures)
    return Density(centre + half * x, *smoothed, np.pi * half / count, "chebyshev", probes=len(quadratures))

"""Smoothed spectral densities from quadratures, each with the width it was smoothed by.

Gaussian kernels on a linear axis (Lin, Saad, Yang 2016), a symmetric-log axis, or log |lambda| (Papyan 2019); Chebyshev
polynomials with Jackson damping (Weisse, Wellein, Alvermann, Fehske, Rev. Mod. Phys. 78, 2006).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import chdtri

from hpc_hess.linalg.measure import Radau
from hpc_hess.linalg.quadrature import Ritz

Float = NDArray[np.float64]
Share = Callable[[Radau, float], tuple[float, float]]  # bounds of a probe's measure up to a place on the axis
_PLACES = 2000  # where cumulative measures are bounded, of all probes together: an eigenvalue problem of T each


@dataclass(frozen=True)
class Density:
    """A smoothed spectral density: ``mean`` and ``spread`` (standard deviation over probes; None for one) on ``grid``.

    ``low`` and ``high`` bound the smoothed mean of the probes' own measures, of which the quadratures know some moments
    only (Gauss-Radau rules); they are 0 and infinite where the last residual is not known. ``peak`` is the kernel's largest
    value at each place.

    On the symmetric-log axis the density is per unit of the axis variable x = sign(l) log10(1 + |l| / linear), and
    ``grid`` still holds eigenvalues l.
    """

    grid: Float
    mean: Float
    spread: Float | None
    low: Float
    high: Float
    peak: Float
    width: float
    axis: str
    linear: float | None = None
    probes: int = 1

    @property
    def resolved(self) -> NDArray[np.bool_]:
        """Where the steps tell the density to a factor of two: elsewhere ``mean`` shows the quadrature's own nodes."""
        return np.asarray(self.high <= 2 * self.low)

    def band(self, size: int, *, risk: float = 0.05, everywhere: bool = True) -> tuple[Float, Float]:
        """Return a band that holds the smoothed density of ``size`` eigenvalues with probability 1 - ``risk``.

        Everywhere at once, or else at each place.

        What the steps do not tell is bounded (``low``, ``high``). What probes scatter by is known: each eigenvalue's weight
        in a probe is a squared normal number over N. So the estimate over the truth is about chi^2_k / k, where k counts the
        eigenvalues under the kernel, (sum phi)^2 over sum phi^2 (Satterthwaite 1946), times the probes. The count of a
        density f is at least 1 and at least N f / peak. The band holds every f that is not refuted by what is known. The
        risk is shared by as many places as there are widths.
        """
        ends = self.grid[[0, -1]]
        span = float(np.ptp(ends if self.linear is None else symlog(ends, self.linear)))
        share = risk / (max(1.0, span / self.width) if everywhere else 1.0) / 2
        known = np.isfinite(self.high)
        lower = self._limit(self.low, size, share)
        upper = self._limit(np.where(known, self.high, 0.0), size, 1 - share)
        return lower, np.where(known, upper, np.inf)

    def _limit(self, edge: Float, size: int, tail: float) -> Float:
        """Return the density f at which a probes' mean beyond ``edge`` has the probability ``tail``.

        f q(k) / k = edge for the quantile q of chi^2_k at the count k of f. The left side rises with f: bisection.
        """
        one = edge * self.probes / chdtri(self.probes, tail)  # with a count of 1
        near, far = np.minimum(edge, one), np.maximum(edge, one)
        for _ in range(30):
            f = 0.5 * (near + far)
            k = self.probes * np.maximum(1.0, size * f / self.peak)
            less = f * chdtri(k, tail) < edge * k
            near, far = np.where(less, f, near), np.where(less, far, f)
        return near if tail < 0.5 else far


def _averaged(kernels: list[Float], quadratures: list[Ritz], shares: Float | None = None) -> tuple[Float, Float | None]:
    """Return mean and spread over probes of the densities; kernels are (point, node)."""
    curves = np.array([phi @ q.weights for phi, q in zip(kernels, quadratures, strict=True)])
    return np.average(curves, axis=0, weights=shares), curves.std(0, ddof=1) if len(curves) > 1 else None


def _smooth(
    quadratures: list[Ritz],
    points: Float,
    width: float,
    to_axis: Callable[[Float], Float],
    share: Share,
    shares: Float | None = None,
) -> tuple[Float, Float | None, Float, Float, Float]:
    """Return mean, spread, bounds and the kernel's peak at ``points`` of an axis on which Ritz values lie at ``to_axis``."""
    kernels = [_gaussian(points[:, None] - to_axis(q.values), width) for q in quadratures]
    places = int(np.clip(3 * np.ptp(points) / width, 60, max(60, _PLACES / len(quadratures))))
    edges = np.array([_bounds(q, points, width, to_axis, share, places) for q in quadratures])
    low, high = np.average(edges, axis=0, weights=shares)
    peak = np.full(len(points), float(_gaussian(np.zeros(1), width)[0]))
    return *_averaged(kernels, quadratures, shares), np.maximum(low, 0.0), high, peak


def _gaussian(x: Float, width: float) -> Float:
    return np.asarray(np.exp(-0.5 * (x / width) ** 2) / (width * np.sqrt(2 * np.pi)))


def _bounds(
    q: Ritz, points: Float, width: float, to_axis: Callable[[Float], Float], share: Share, places: int
) -> tuple[Float, Float]:
    """Bound the smoothed measure of one probe from both sides, by the bounds of its cumulative measure at some places.

    The smoothed density is the integral of F times minus the kernel's derivative. Between two places F lies between the
    bound from below at the left one and that from above at the right one. The kernel rises up to its middle, then falls.
    """
    if np.isnan(q.residuals).any():
        return np.zeros(len(points)), np.full(len(points), np.inf)
    rule, nodes = Radau(q), to_axis(q.values)
    if rule.exhausted:
        exact = _gaussian(points[:, None] - nodes, width) @ q.weights
        return exact, exact
    reach = np.abs(to_axis(q.values + q.residuals) - to_axis(q.values - q.residuals))
    sharp = nodes[reach < 0.1 * width]  # the jump of F at a Ritz value that has converged, from both of its sides
    beside = np.maximum(2 * reach[reach < 0.1 * width], 0.01 * width)
    x = np.unique(np.concatenate([np.linspace(points[0], points[-1], places), sharp - beside, sharp + beside]))
    found = np.array([share(rule, float(at)) for at in x])
    low = np.maximum.accumulate(np.append(0.0, found[:, 0]))  # of the cells (-inf, x0), (x0, x1), ..., (xn, inf)
    high = np.minimum.accumulate(np.append(found[:, 1], 1.0)[::-1])[::-1]
    outer = [points[0] - 40 * width, *x, points[-1] + 40 * width]
    left, right = (_gaussian(points[:, None] - edge, width) for edge in (np.array(outer[:-1]), np.array(outer[1:])))
    middle = _gaussian(points[:, None] - np.clip(points[:, None], outer[:-1], outer[1:]), width)
    rise, fall = middle - left, middle - right
    return fall @ low - rise @ high, fall @ high - rise @ low


def density(quadratures: list[Ritz], *, points: int = 2000, width: float | None = None) -> Density:
    """Gaussian-smoothed density on a linear axis.

    The width is 1/100 of the range unless given. One Gaussian per Ritz value, weighted (Lin, Saad, Yang 2016).
    """
    nodes = [q.values for q in quadratures]
    low, high = min(x.min() for x in nodes), max(x.max() for x in nodes)
    span = (high - low) or max(abs(high), 1.0) * 1e-3
    width = width or span / 100
    grid = np.linspace(low - 5 * width, high + 5 * width, points)
    smoothed = _smooth(quadratures, grid, width, np.asarray, Radau.bounds)
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
    quadratures: list[Ritz],
    *,
    points: int = 2000,
    width: float = 0.05,
    linear: float | None = None,
    shares: Float | None = None,
) -> Density:
    """Gaussian-smoothed density on a symmetric-log axis; ``width`` in decades, ``linear`` the axis' linear threshold.

    ``shares`` of the quadratures in the mean, where they are of blocks: the band and ``spread`` are of probes only.

    ``linear`` defaults to 1e-5 of the largest |Ritz value|, so that five decades either side of zero are resolved.
    """
    nodes = [q.values for q in quadratures]
    largest = max(np.abs(x).max() for x in nodes) or 1.0
    linear = linear or largest * 1e-5
    mapped = [symlog(x, linear) for x in nodes]
    low, high = min(x.min() for x in mapped), max(x.max() for x in mapped)
    grid = np.linspace(low - 5 * width, high + 5 * width, points)

    def share(rule: Radau, x: float) -> tuple[float, float]:
        return rule.bounds(float(inverse_symlog(x, linear)))

    smoothed = _smooth(quadratures, grid, width, lambda values: symlog(values, linear), share, shares)
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

    def to_axis(values: Float) -> Float:
        return np.asarray(np.log10(np.abs(values) + epsilon))

    def share(rule: Radau, x: float) -> tuple[float, float]:
        radius = 10**x - epsilon
        if radius < 0:
            return 0.0, 0.0
        (below, at_most), (inside, all_inside) = rule.bounds(-radius), rule.bounds(radius)
        return inside - at_most, all_inside - below

    low, high = np.log10(epsilon), np.log10(largest + epsilon)
    width = width or papyan_width(high - low, max(len(q.values) for q in quadratures) + 1)
    grid = np.linspace(low - 5 * width, high + 5 * width, points)
    smoothed = _smooth(quadratures, grid, width, to_axis, share)
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
    mean, spread = _averaged(kernels, quadratures)
    exact = all(count <= 2 * len(q.values) or Radau(q).exhausted for q in quadratures)  # its moments, so that it is too
    low_edge, high_edge = (mean, mean) if exact else (np.zeros(points), np.full(points, np.inf))
    peak = (rows * jackson[:, None] * np.cos(n[:, None] * np.arccos(x))).sum(0)
    width = np.pi * half / count
    return Density(centre + half * x, mean, spread, low_edge, high_edge, peak, width, "chebyshev", probes=len(quadratures))

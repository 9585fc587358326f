"""From alpha and beta to Ritz values, weights, traces and densities. NumPy only."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.linalg import eigh_tridiagonal

Float = NDArray[np.float64]


@dataclass(frozen=True)
class Ritz:
    """Gauss quadrature of one probe (Golub and Meurant): nodes theta, weights tau, residuals |A y - theta y|."""

    values: Float
    weights: Float
    residuals: Float


def ritz(alpha: ArrayLike, beta: ArrayLike) -> Ritz:
    """Diagonalise T. ``alpha`` has m entries, ``beta`` m (the last one is the residual norm) or m - 1.

    Residual of Ritz pair i: beta_m |last component of its eigenvector of T|; NaN where beta_m is not given.
    """
    a, b = np.asarray(alpha, np.float64), np.asarray(beta, np.float64)
    values, vectors = eigh_tridiagonal(a, b[: len(a) - 1])
    last = b[len(a) - 1] if len(b) >= len(a) else np.nan
    return Ritz(values, vectors[0] ** 2, np.abs(last * vectors[-1]))


@dataclass(frozen=True)
class Estimate:
    """A mean over probes and its standard error (None for one probe)."""

    mean: float
    stderr: float | None


def estimate(samples: ArrayLike) -> Estimate:
    """Return mean and standard error of independent samples."""
    x = np.asarray(samples, np.float64)
    return Estimate(float(x.mean()), float(x.std(ddof=1) / np.sqrt(len(x))) if len(x) > 1 else None)


def trace(quadratures: list[Ritz], size: int) -> Estimate:
    """Hutchinson's estimate of tr A: size times <v, A v>, which is each probe's first moment (exact: alpha_1)."""
    return estimate([size * float(q.weights @ q.values) for q in quadratures])


@dataclass(frozen=True)
class Density:
    """A smoothed spectral density: ``mean`` and ``spread`` (standard deviation over probes; None for one) on ``grid``.

    On the symmetric-log axis the density is per unit of the axis variable x = sign(l) log10(1 + |l| / linear), and
    ``grid`` still holds eigenvalues l.
    """

    grid: Float
    mean: Float
    spread: Float | None
    width: float
    axis: str
    linear: float | None = None


def _smooth(nodes: list[Float], weights: list[Float], points: Float, width: float) -> tuple[Float, Float | None]:
    curves = []
    for x, w in zip(nodes, weights, strict=True):
        z = (points[:, None] - x[None, :]) / width
        curves.append(np.exp(-0.5 * z**2) @ w / (width * np.sqrt(2 * np.pi)))
    curve = np.array(curves)
    return curve.mean(0), curve.std(0, ddof=1) if len(curve) > 1 else None


def density(quadratures: list[Ritz], *, points: int = 2000, width: float | None = None) -> Density:
    """Gaussian-smoothed density on a linear axis.

    The width is 1/100 of the range unless given. One Gaussian per Ritz value, weighted (Lin, Saad, Yang 2016).
    """
    nodes = [q.values for q in quadratures]
    low, high = min(x.min() for x in nodes), max(x.max() for x in nodes)
    span = (high - low) or max(abs(high), 1.0) * 1e-3
    width = width or span / 100
    grid = np.linspace(low - 5 * width, high + 5 * width, points)
    mean, spread = _smooth(nodes, [q.weights for q in quadratures], grid, width)
    return Density(grid, mean, spread, width, "linear")


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
    mean, spread = _smooth(mapped, [q.weights for q in quadratures], grid, width)
    return Density(inverse_symlog(grid, linear), mean, spread, width, "symlog", linear)

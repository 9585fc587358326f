"""From alpha and beta to Ritz values, weights and traces. NumPy only."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.linalg import eigh_tridiagonal
from scipy.special import ndtri, stdtrit

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
    """A mean over ``count`` samples and its standard error (None for one).

    ``deviation``: of one sample, at most, where that is known better than by their scatter.
    """

    mean: float
    stderr: float | None
    count: int = 0
    deviation: float | None = None

    def half_width(self, risk: float = 0.05) -> float | None:
        """Return the half width of the mean's interval, with Student's factor for few samples; None where not known."""
        if self.deviation is not None:
            return float(ndtri(1 - risk / 2) * self.deviation / np.sqrt(self.count))
        if self.stderr is None or self.count < 2:
            return None
        return float(stdtrit(self.count - 1, 1 - risk / 2) * self.stderr)


def estimate(samples: ArrayLike) -> Estimate:
    """Return mean and standard error of independent samples."""
    x = np.asarray(samples, np.float64)
    return Estimate(float(x.mean()), float(x.std(ddof=1) / np.sqrt(len(x))) if len(x) > 1 else None, len(x))


def trace(quadratures: list[Ritz], size: int) -> Estimate:
    """Hutchinson's estimate of tr A, by each probe's first two moments (exact: alpha_1 and alpha_1^2 + beta_1^2)."""
    return of_forms([size * float(q.weights @ q.values) for q in quadratures], squared_norms(quadratures, size))


def squared_norms(quadratures: list[Ritz], size: int) -> list[float]:
    """Return each probe's estimate of ||A||_F^2: size times its second moment, alpha_1^2 + beta_1^2 (NaN: not known)."""
    beyond = [float(q.residuals[0]) ** 2 if len(q.values) == 1 else 0.0 for q in quadratures]  # beta_1, not in T
    return [size * (float(q.weights @ q.values**2) + more) for q, more in zip(quadratures, beyond, strict=True)]


def of_forms(forms: ArrayLike, squares: ArrayLike) -> Estimate:
    """Return the trace by w^T A w and |A w|^2 of probes w with entries of mean 0 and variance 1.

    The variance of w^T A w is at most 2 ||A||_F^2 (Avron, Toledo 2011), and |A w|^2 estimates that norm: few probes tell it
    far better than they tell their own scatter.
    """
    deviation = float(np.sqrt(2 * np.asarray(squares, np.float64).mean()))
    return replace(estimate(forms), deviation=deviation if np.isfinite(deviation) else None)

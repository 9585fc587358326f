"""What quadratures prove about the spectral measure: cumulative density, mass of an interval, distance bounds.

A probe v has the measure mu_v = sum_i <u_i, v>^2 delta(lambda_i), whose mean over probes is the spectral measure (every
eigenvalue 1/N). Two errors are kept apart: that of the quadrature of mu_v, which Gauss-Radau rules bound on both sides
(Golub and Meurant, "Matrices, Moments and Quadrature", 2010, section 6), and that of the mean over few probes (Chen, Trogdon
and Ubaru, "Analysis of stochastic Lanczos quadrature for spectrum approximation", ICML 2021).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hpc_hess.linalg.quadrature import Ritz, ritz

Float = NDArray[np.float64]
Recurrence = tuple[ArrayLike, ArrayLike]  # alpha and beta of a probe, m entries each, the last the residual norm
Probe = Recurrence | Ritz  # what a probe saw


@dataclass(frozen=True)
class Cumulative:
    """Share of the eigenvalues at or below each of ``points``: the quadratures' (``mean``) and bounds of the truth."""

    points: Float
    low: Float
    mean: Float
    high: Float


@dataclass(frozen=True)
class Interval:
    """A share of the spectrum with bounds."""

    low: float
    mean: float
    high: float


def sampling_error(size: int, probes: int, risk: float) -> float:
    """Return t with P(|mean over probes of mu_v(-inf, x] - spectral measure| > t) < ``risk`` for one x.

    Chen, Trogdon, Ubaru 2021: n_v > (N + 2)^-1 t^-2 ln(2 / risk), for probes uniform on the sphere. Independent signs vary
    no more than that in the mean square (Hutchinson 1990).
    """
    return math.sqrt(math.log(2 / risk) / ((size + 2) * probes))


class Radau:
    """Bounds of one probe's measure up to any point: Chebyshev, Markov, Stieltjes with a node put there.

    In the basis of the Ritz vectors T with one row more is an arrow: the Ritz values, and beta_m times the last components
    of their eigenvectors, whose signs alternate against those of the first components. Without beta_m nothing is known.
    """

    def __init__(self, gauss: Ritz) -> None:
        signs = np.where(np.arange(len(gauss.values)) % 2, -1.0, 1.0)
        self.gauss, self._first = gauss, signs * np.sqrt(gauss.weights)
        self._arrow = np.zeros((len(signs) + 1,) * 2)
        self._arrow[:-1, :-1] = np.diag(gauss.values)
        self._arrow[-1, :-1] = self._arrow[:-1, -1] = gauss.residuals
        last = float(np.linalg.norm(gauss.residuals))
        self._tiny = 1e-13 * float(np.abs(gauss.values).max() + last)
        self.exhausted = last <= self._tiny  # the Krylov space is: the measure is known

    def bounds(self, x: float) -> tuple[float, float]:
        """Return bounds of mu_v((-inf, x)) from below and of mu_v((-inf, x]) from above."""
        values, weights = self.gauss.values, self.gauss.weights
        if not math.isfinite(self._tiny):
            return 0.0, 1.0
        if self.exhausted:
            return float(weights[values < x].sum()), float(weights[values <= x].sum())
        if np.abs(values - x).min() > self._tiny:  # else the Gauss rule has the node already
            values, weights = self._with_node(x)
        at = int(np.argmin(np.abs(values - x)))
        return float(weights[:at].sum()), float(weights[: at + 1].sum())

    def _with_node(self, x: float) -> tuple[Float, Float]:
        """Return nodes and weights of the rule with a node at ``x`` (Golub 1973): one more row of T, chosen for that."""
        self._arrow[-1, -1] = x + float((self.gauss.residuals**2 / (self.gauss.values - x)).sum())
        values, vectors = np.linalg.eigh(self._arrow)
        return values, (self._first @ vectors[:-1]) ** 2


def cumulative(recurrences: Sequence[Probe], points: ArrayLike, size: int, *, risk: float = 0.05) -> Cumulative:
    """Return the cumulative spectral density at ``points`` with bounds that hold for all of them together."""
    x, rules = np.asarray(points, np.float64), [Radau(_gauss(r)) for r in recurrences]
    bounds = np.array([[rule.bounds(float(p)) for p in x] for rule in rules])  # (probe, point, 2)
    mean = np.mean([[_share(rule.gauss, p) for p in x] for rule in rules], axis=0)
    t = sampling_error(size, len(rules), risk / max(len(x), 1))
    low, high = bounds[:, :, 0].mean(0) - t, bounds[:, :, 1].mean(0) + t
    rising = np.argsort(x, kind="stable")
    falling = rising[::-1]
    low[rising], high[falling] = np.maximum.accumulate(low[rising]), np.minimum.accumulate(high[falling])  # it never falls
    return Cumulative(x, low.clip(0, 1), mean, high.clip(0, 1))


def mass(
    recurrences: Sequence[Probe], size: int, *, above: float = -math.inf, below: float = math.inf, risk: float = 0.05
) -> Interval:
    """Return the share of eigenvalues in [``above``, ``below``], with bounds: negative mass, mass near zero."""
    ends = [x for x in (above, below) if math.isfinite(x)]
    rules = [Radau(_gauss(r)) for r in recurrences]
    t = sampling_error(size, len(recurrences), risk / max(len(ends), 1))
    low, mean, high = 1.0, 1.0, 1.0
    for x in ends:
        under = [rule.bounds(x) for rule in rules]
        strictly, at_most = (float(np.mean([u[k] for u in under])) for k in (0, 1))
        gauss = float(np.mean([_share(rule.gauss, x, strict=x == above) for rule in rules]))
        if x == above:  # without what lies below
            low, mean, high = low - at_most - t, mean - gauss, high - strictly + t
        else:  # without what lies above
            low, mean, high = low - (1 - strictly) - t, mean - (1 - gauss), high - (1 - at_most) + t
    return Interval(max(0.0, low), mean, min(1.0, high))


def _gauss(recurrence: Probe) -> Ritz:
    return recurrence if isinstance(recurrence, Ritz) else ritz(*recurrence)


def _share(q: Ritz, x: float, *, strict: bool = False) -> float:
    return float(q.weights[q.values < x if strict else q.values <= x].sum())


def wasserstein_a_priori(size: int, probes: int, steps: int, *, risk: float = 0.05) -> float:
    """Return t with P(W1(spectral measure, quadrature) > t (lambda_max - lambda_min)) < ``risk``, whatever the matrix.

    Chen, Trogdon, Ubaru 2021: n_v > 4 (N + 2)^-1 t^-2 ln(2 N / risk) and k > 12 / t.
    """
    return max(12 / steps, math.sqrt(4 * math.log(2 * size / risk) / ((size + 2) * probes)))


def wasserstein_a_posteriori(recurrences: Sequence[Probe], size: int, *, points: int = 100, risk: float = 0.05) -> float:
    """Bound W1 between the spectral measure and the mean quadrature, in units of the eigenvalues, from this run alone.

    The area between the cumulative density's bounds and its mean, over the range of the Ritz values: an eigenvalue beyond
    the outermost Ritz value by more than that one's residual is not accounted for.
    """
    quadratures = [_gauss(r) for r in recurrences]
    low = min(q.values[0] - np.nan_to_num(q.residuals[0]) for q in quadratures)
    high = max(q.values[-1] + np.nan_to_num(q.residuals[-1]) for q in quadratures)
    nodes = np.concatenate([q.values for q in quadratures])
    x = np.unique(np.concatenate([np.linspace(low, high, points), nodes]))
    band = cumulative(recurrences, x, size, risk=risk)
    # between two points the mean stays, as every node is one of them, and the truth only rises
    widest = np.maximum(band.high[1:] - band.mean[:-1], band.mean[:-1] - band.low[:-1])
    return float((widest * np.diff(x)).sum())

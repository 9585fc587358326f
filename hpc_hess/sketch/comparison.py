"""How well sketches keep inner products: correlations of scores, and eigenvalue errors after a common scale.

Schioppa 2024, tables 1, 5, 6 and 7.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike


def correlation(exact: ArrayLike, estimated: ArrayLike) -> float:
    """Return Pearson's r over all pairs."""
    return float(np.corrcoef(np.ravel(exact), np.ravel(estimated))[0, 1])


def eigenvalue_error(exact: ArrayLike, estimated: ArrayLike, *, rescale: bool = False) -> float:
    """Return mean |estimated - exact| / |exact| over eigenvalues; ``rescale``: after the best positive factor."""
    a, b = np.asarray(exact, np.float64), np.asarray(estimated, np.float64)
    if rescale:
        b = b * max(float(a @ b) / float(b @ b), 0.0)
    return float(np.mean(np.abs(a - b) / np.abs(a)))


def bits_for(correlations: dict[int, float], wanted: float) -> int | None:
    """Return the smallest dimension from which on all tried correlations exceed ``wanted``; None where none does."""
    good = None
    for dimension in sorted(correlations, reverse=True):
        if correlations[dimension] <= wanted:
            break
        good = dimension
    return good

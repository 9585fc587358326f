"""Scores of training examples for a query, from sketches alone. Numbers in, numbers out.

Schioppa 2024, section 5.1: the influence of z on x is <grad L(x), grad L(z)>, estimated by the inner product of sketches.
Preconditioned: <s_x, (F + damping I)^-1 s_z> with F the empirical Fisher matrix of the sketches, mean of s s^T (as in
Park et al., "TRAK", ICML 2023, whose F has no damping).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_factor, cho_solve

Float64 = NDArray[np.float64]


def scores(queries: NDArray, examples: NDArray) -> Float64:
    """Return inner products (queries, examples) of sketches (queries, D) and (examples, D)."""
    return np.asarray(queries, np.float64) @ np.asarray(examples, np.float64).T


def default_damping(examples: NDArray) -> float:
    """Return a tenth of the mean eigenvalue of F on the span of the n sketches: trace(F) / min(n, D) / 10."""
    s = np.asarray(examples, np.float64)
    return float(np.square(s).sum() / len(s)) / min(s.shape) / 10


def fisher_preconditioned(queries: NDArray, examples: NDArray, damping: float) -> Float64:
    """Return (F + damping I)^-1 q for each query (queries, D), by Woodbury where there are fewer examples than D."""
    q, s = np.asarray(queries, np.float64), np.asarray(examples, np.float64)
    n, dimension = s.shape
    if n >= dimension:
        return cho_solve(cho_factor(s.T @ s / n + damping * np.eye(dimension)), q.T).T
    inner = s @ s.T / n + damping * np.eye(n)
    return (q - cho_solve(cho_factor(inner), s @ q.T).T @ s / n) / damping


def cosines(queries: NDArray, examples: NDArray) -> Float64:
    """Return the cosines (queries, examples) between sketches, 0 where one is zero."""
    q, s = np.asarray(queries, np.float64), np.asarray(examples, np.float64)
    norms = np.linalg.norm(q, axis=1)[:, None] * np.linalg.norm(s, axis=1)[None]
    return np.divide(scores(q, s), norms, out=np.zeros_like(norms), where=norms > 0)


def top(values: Float64, count: int) -> list[int]:
    """Return the indices of the ``count`` largest values, the largest first; equal ones in their order."""
    return np.argsort(-values, kind="stable")[:count].tolist()

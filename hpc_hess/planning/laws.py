"""The published cost model of a Lanczos iteration and a memory law, fitted to runs with coefficients that are not negative.

    T(r) = T_HVP + (2 + r) T_scalar + c (1 + r) P / R          Granziol and Juarev 2026

r: vectors of the reorthogonalisation; P: parameters; R: ranks. The product's own time is taken apart as

    T_HVP = a P t + b P / R + d m P (R - 1) / R + e m

with t tokens of a rank in m micro-batches: arithmetic, vectors, gathered parameters, what a micro-batch costs however
small. Memory above the program's own:  M = f P / R + g w k P / R + h P + i q + j  with k rows of basis for each of w probes,
what lies unsharded for a moment, q tokens of a micro-batch, and what every run takes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

from hpc_hess.errors import ConfigError
from hpc_hess.planning.sweep import Measured

Float = NDArray[np.float64]
_RESAMPLES = 400

TIME_TERMS = ("P t", "P / R", "m P (R - 1) / R", "m", "2 + r", "(1 + r) P / R")
MEMORY_TERMS = ("P / R", "w k P / R", "P", "q", "1")


@dataclass(frozen=True)
class Law:
    """A fitted law.

    ``coefficients``, ``low``, ``high``: of each term, with 95 % intervals (runs resampled); ``measured`` and ``predicted``
    of each observation, which belongs to run ``run``.
    """

    terms: tuple[str, ...]
    coefficients: Float
    low: Float
    high: Float
    run: list[int]
    measured: Float
    predicted: Float


def _time_terms(run: Measured, r: int) -> list[float]:
    """Return the terms of T(r) for a run."""
    p, ranks, m = run.num_params, run.ranks, run.micro_batches
    tokens = m * run.micro_batch_tokens
    return [p * tokens, p / ranks, m * p * (ranks - 1) / ranks, m, 2 + r, (1 + r) * p / ranks]


def _memory_terms(run: Measured) -> list[float]:
    """Return the terms of the memory law for a run."""
    share = run.num_params / run.ranks
    return [share, run.width * run.rows * share, run.num_params, run.micro_batch_tokens, 1.0]


class Observed(NamedTuple):
    """Observations of a law: its terms, what was measured, and the run of each."""

    design: Float
    values: Float
    run: list[int]


def times(runs: Sequence[Measured]) -> Observed:
    """Return the steps of ``runs`` in seconds: without the first of each, which warms up."""
    rows = [(k, run, step) for k, run in enumerate(runs) for step in run.steps[1:] or run.steps]
    return Observed(
        np.array([_time_terms(run, r) for _, run, (r, _, _) in rows]),
        np.array([hvp_s + lanczos_s for _, _, (_, hvp_s, lanczos_s) in rows]),
        [k for k, _, _ in rows],
    )


def memories(runs: Sequence[Measured]) -> Observed:
    """Return the peak memory of ``runs`` in bytes."""
    return Observed(
        np.array([_memory_terms(run) for run in runs]),
        np.array([float(run.memory_bytes) for run in runs]),
        list(range(len(runs))),
    )


def fitted_and_predicted(runs: Sequence[Measured]) -> tuple[list[Measured], list[Measured]]:
    """Return the runs to fit, and those of the largest model (of one model: of the most ranks), to be predicted.

    Raises ConfigError where all are alike.
    """
    sizes = {run.num_params for run in runs}

    def key(run: Measured) -> int:
        return run.num_params if len(sizes) > 1 else run.ranks

    largest = max(map(key, runs))
    small = [run for run in runs if key(run) < largest]
    if not small:
        raise ConfigError("all runs are of one model and one number of ranks: nothing smaller to fit, nothing to predict")
    return small, [run for run in runs if key(run) == largest]


def fit(terms: tuple[str, ...], observed: Observed, seed: int = 0) -> Law:
    """Return the law with the least squares of relative errors: it must hold for the small as for the large."""
    design, values, of = observed
    rng, number = np.random.default_rng(seed), max(of) + 1
    members = [np.flatnonzero(np.array(of) == k) for k in range(number)]
    drawn = []
    for _ in range(_RESAMPLES):
        rows = np.concatenate([members[k] for k in rng.integers(number, size=number)])
        drawn.append(_solve(design[rows], values[rows]))
    low, high = np.quantile(np.array(drawn), [0.025, 0.975], axis=0)
    best = _solve(design, values)
    return Law(terms, best, low, high, of, values, design @ best)


def _solve(design: Float, values: Float) -> Float:
    scaled = design / values[:, None]
    norms = np.linalg.norm(scaled, axis=0)
    norms[norms == 0] = 1.0
    return nnls(scaled / norms, np.ones(len(values)))[0] / norms

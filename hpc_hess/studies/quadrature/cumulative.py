"""The cumulative density with what a run proves about it, as a picture and in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from hpc_hess.console.words import minus, number
from hpc_hess.linalg.density import inverse_symlog, symlog
from hpc_hess.linalg.measure import Interval, Recurrence, cumulative, mass, wasserstein_a_posteriori, wasserstein_a_priori
from hpc_hess.report.spectrum import pooled
from hpc_hess.report.style import INK, MUTED, NEGATIVE, POSITIVE, label_powers, linear_threshold, set_symlog

TITLE = "Cumulative density and what is certain of it"
_POINTS = 120


def recurrences(result: Mapping[str, Any]) -> list[Recurrence]:
    """Return (alpha, beta) of the probes that have them; none where the number of parameters is not known."""
    if not result.get("num_params"):
        return []
    return [(p["alpha"], p["beta"]) for p in result.get("probes") or [] if p.get("alpha") and p.get("beta")]


def draw(figure: Figure, result: Mapping[str, Any]) -> str:
    """Draw the picture into an empty figure and return its caption."""
    found, size = recurrences(result), int(result["num_params"])
    values, weights, _ = pooled(result)
    linear = linear_threshold(values, weights)
    ends = symlog(np.array([values.min(), values.max()]), linear)
    margin = 0.04 * float(np.ptp(ends)) or 0.1
    x = np.linspace(ends[0] - margin, ends[1] + margin, _POINTS)
    band = cumulative(found, inverse_symlog(x, linear), size)
    share, rest = figure.subplots(2, 1, sharex=True)
    colour = {"low": NEGATIVE, "high": POSITIVE}
    share.fill_between(x, band.low, band.high, color=MUTED, alpha=0.25, linewidth=0, step=None)
    share.plot(x, band.mean, color=INK, drawstyle="steps-post")
    share.set_ylabel("share of eigenvalues ≤ λ")
    # both tails at once, on a logarithmic axis: what is below a negative λ, what is above a positive one
    floor = 1e-12
    for side, upper, lower, mean, where in (
        ("low", band.high, band.low, band.mean, x <= 0),
        ("high", 1 - band.low, 1 - band.high, 1 - band.mean, x >= 0),
    ):
        rest.fill_between(
            x, np.maximum(lower, floor), np.maximum(upper, floor), where=where, color=colour[side], alpha=0.2, linewidth=0
        )
        rest.plot(x[where], np.maximum(mean, floor)[where], color=colour[side], drawstyle="steps-post")
    rest.set_yscale("log")
    label_powers(rest, 9)
    seen = np.concatenate([band.mean[x <= 0], 1 - band.mean[x >= 0]])
    rest.set_ylim(max(floor, float(seen[seen > 1e-11].min(initial=1.0)) / 10), 2)
    rest.set_ylabel("share beyond λ")
    set_symlog(rest, "x", float(inverse_symlog(x[0], linear)), float(inverse_symlog(x[-1], linear)), linear)
    rest.set_xlim(x[0], x[-1])
    rest.set_xlabel("eigenvalue λ (loss per squared parameter), symmetric-log axis")
    lines = "the quadrature" if len(found) == 1 else f"the mean of {len(found)} quadratures"
    return (
        f"Above: the share of eigenvalues up to λ; below: the share beyond λ, on either side of zero. Lines: {lines}. "
        f"Shaded: where the truth lies with 95 % probability (Gauss-Radau rules of each probe; "
        f"the probes' own spread by Chen, Trogdon and Ubaru 2021). {distance(result)}"
    )


def distance(result: Mapping[str, Any]) -> str:
    """Say how far the quadrature is from the spectrum at most, known beforehand and known now."""
    found, size = recurrences(result), int(result["num_params"])
    span = float(np.ptp(pooled(result)[0]))
    before = wasserstein_a_priori(size, len(found), min(len(np.asarray(alpha)) for alpha, _ in found))
    after = wasserstein_a_posteriori(found, size) / span if span else 0.0
    return (
        f"The Wasserstein distance to the true spectrum is at most {number(100 * after, 2)} % of the range (known "
        f"beforehand: {number(100 * before, 2)} %)."
    )


def shares(result: Mapping[str, Any]) -> list[tuple[str, Interval]]:
    """Return what share of the eigenvalues is negative, tiny, and positive, with bounds; the threshold is in the names."""
    found = recurrences(result)
    if not found:
        return []
    size = int(result["num_params"])
    tiny = 1e-3 * float(np.abs(pooled(result)[0]).max())
    text = number(tiny, 2)
    return [
        (minus(f"below -{text}"), mass(found, size, below=-tiny)),
        (f"within ±{text}", mass(found, size, above=-tiny, below=tiny)),
        (f"above {text}", mass(found, size, above=tiny)),
    ]

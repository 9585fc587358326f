"""What the measured curves of regimes say: fits, crossings, usable steps; and where they are kept."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np

from benchmarks.regimes_emulated import EMULATED

SMOLLM2 = "SmolLM2-135M"
DTYPES = ("float64", "float32", "bfloat16", "bfloat16, weights too", *EMULATED)
VECTORS = ("random", "Ritz", "final norm")
CURVES, KRYLOV_CURVES = "regimes_curves.json", "regimes_krylov_curves.json"  # files beside the tables


def fit(curve: dict[str, Any], truncation: float | None = None) -> dict[str, float | None]:
    """Fit error = T eps^2 beyond the best step and R / eps before it, and cross them.

    A side is the points, going away from the best step, while each has over 1.5 times the error of the last (further
    out the step is lost when it is stored) and, beyond the best step, the error is below 0.3 (the leading term rules).
    ``truncation``: T where it is known better (it belongs to the function, not to the number format). ``optimum``
    minimises (T eps^2)^2 + (R / eps)^2.
    """
    points = sorted(curve["points"], key=lambda p: p["eps"])
    i = min(range(len(points)), key=lambda k: points[k]["error"])
    found: dict[str, float | None] = {}
    for side, power, way in (("truncation", 2, points[i:]), ("rounding", -1, points[i::-1])):
        kept = _rising(way)
        if side == "truncation":
            kept = [p for p in kept if p["error"] < 0.3]
        x, y = (np.log([p[key] for p in kept]) for key in ("eps", "error"))
        found[f"{side}_slope"] = float(np.polyfit(x, y, 1)[0]) if len(x) >= 3 else None
        found[side] = float(np.exp(np.median(y - power * x))) if len(x) >= 2 else None
    found["truncation"] = truncation or found["truncation"]
    if found["truncation"] and found["rounding"]:
        found["crossing"] = (found["rounding"] / found["truncation"]) ** (1 / 3)
        found["optimum"] = found["crossing"] * 2 ** (-1 / 6)
    return found


def _rising(points: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the points after the first whose error is over twice its error and 1.5 times that of the one before."""
    kept: list[dict[str, Any]] = []
    for before, point in pairwise(points):
        rises = point["error"] > 1.5 * before["error"]
        if kept and not rises:
            break
        if rises and point["error"] > 2 * points[0]["error"]:
            kept.append(point)
    return kept


def truncation_of(curves: list[dict[str, Any]], like: dict[str, Any]) -> float | None:
    """Return T of the float64 curve of the same model and vector, if there is one."""
    for c in curves:
        if (c["model"], c["vector"], c["dtype"]) == (like["model"], like["vector"], "float64"):
            return fit(c)["truncation"]
    return None


def usable(curve: dict[str, Any], bound: float = 0.01) -> tuple[float | None, float | None]:
    """Return the steps between which the error is below ``bound``, interpolated; None where the sweep ends first."""
    points = sorted(curve["points"], key=lambda p: p["eps"])
    good = [i for i, p in enumerate(points) if p["error"] < bound]
    if not good:
        return math.nan, math.nan

    def cross(inside: int, outside: int) -> float | None:
        if not 0 <= outside < len(points):
            return None
        a, b = points[inside], points[outside]
        share = math.log(bound / a["error"]) / math.log(b["error"] / a["error"])
        return a["eps"] * (b["eps"] / a["eps"]) ** share

    return cross(good[0], good[0] - 1), cross(good[-1], good[-1] + 1)


def summary(curve: dict[str, Any], truncation: float | None) -> dict[str, Any]:
    """One row of the table."""
    common = {
        "model": curve["model"],
        "format": curve["dtype"],
        "vector": curve["vector"],
        "participation": curve["participation"],
    }
    if not curve["points"]:
        return common | {"exact product's error": curve["exact_error"]}
    best, auto, fitted = min(curve["points"], key=lambda p: p["error"]), curve["auto"], fit(curve, truncation)
    low, high = usable(curve)
    ends = [curve["points"][0]["eps"], curve["points"][-1]["eps"]]
    span = (
        "none"
        if low is not None and math.isnan(low)
        else (f"{'<' if low is None else ''}{low or ends[0]:.1e} to {'>' if high is None else ''}{high or ends[1]:.1e}")
    )
    return common | {
        "error < 1 %, eps": span,
        "best eps": best["eps"],
        "best error": best["error"],
        "slope near": _round(fitted["rounding_slope"]),
        "slope far": _round(fitted["truncation_slope"]),
        "crossing": fitted.get("crossing"),
        "optimum of the fit": fitted.get("optimum"),
        "auto eps": auto["eps"] if auto else None,
        "auto error": auto["error"] if auto else None,
        "auto predicted": auto["predicted"] if auto else None,
        "auto / best": auto["error"] / best["error"] if auto else None,
        "exact product's error": curve["exact_error"],
    }


def _round(x: float | None) -> float | None:
    return None if x is None else round(x, 2)

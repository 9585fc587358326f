"""What a result says about the spectrum: its quadratures, its ends, one sentence, and reasons for caution."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpc_hess.console.words import count, number, residual_text
from hpc_hess.linalg.quadrature import Ritz, ritz
from hpc_hess.registry.operators import OPERATORS

Float = NDArray[np.float64]
_COMPARISONS = ("gt", "lt", "ge", "le", "eq", "ne")


def quadratures(result: Mapping[str, Any]) -> list[Ritz]:
    """Return each probe's Ritz values, weights and residuals as stored, else from its alpha and beta.

    Probes without finite numbers are left out; missing residuals are NaN.
    """
    found = []
    for probe in result.get("probes") or []:
        if probe.get("ritz_values") and probe.get("ritz_weights"):
            values = np.asarray(probe["ritz_values"], np.float64)
            residuals = probe.get("ritz_residuals") or [np.nan] * len(values)
            one = Ritz(values, np.asarray(probe["ritz_weights"], np.float64), np.asarray(residuals, np.float64))
        elif probe.get("alpha"):
            one = ritz(probe["alpha"], probe.get("beta") or [])
        else:
            continue
        if len(one.values) == len(one.weights) == len(one.residuals) and np.isfinite(one.values).all():
            found.append(one)
    return found


def pooled(result: Mapping[str, Any]) -> tuple[Float, Float, Float]:
    """Return all probes' Ritz values ascending, their weights (summing to 1) and residuals, each float64 (n,)."""
    parts = quadratures(result)
    if not parts:
        return np.empty(0), np.empty(0), np.empty(0)
    theta = np.concatenate([q.values for q in parts])
    order = np.argsort(theta, kind="stable")
    weights = np.concatenate([q.weights for q in parts]) / len(parts)
    return theta[order], weights[order], np.concatenate([q.residuals for q in parts])[order]


def model_name(model: Any) -> str:
    """Return the model's short name from a string or from a dictionary with ``name`` or ``source``."""
    if isinstance(model, Mapping):
        model = model.get("name") or model.get("source")
    return str(model) if model else "a model"


def sketch_text(result: Mapping[str, Any]) -> str:
    """Return what a matrix was seen through: ``AFFD to 8,192 dimensions``, or nothing."""
    sketch = (result.get("operator") or {}).get("sketch")
    return f"{sketch['kind'].upper()} to {sketch['dimension']:,} dimensions" if sketch else ""


def size_text(result: Mapping[str, Any]) -> str:
    """Return the number of parameters, and of dimensions where they are sketched."""
    if sketch := sketch_text(result):
        return f"{count(result.get('num_params_model'))} parameters, through {sketch}"
    return f"{count(result.get('num_params'))} parameters"


def extremes(result: Mapping[str, Any]) -> tuple[float | None, float | None]:
    """Return (lambda_min, lambda_max) as stored, else from the Ritz values; None where neither is there."""
    theta = pooled(result)[0]
    low, high = result.get("lambda_min"), result.get("lambda_max")
    if low is None and len(theta):
        low = float(theta[0])
    if high is None and len(theta):
        high = float(theta[-1])
    return low, high


def extreme_residuals(result: Mapping[str, Any]) -> tuple[float | None, float | None]:
    """Return the residuals of the smallest and the largest Ritz value: an eigenvalue lies that close to each."""
    theta, _, residual = pooled(result)
    if not len(theta):
        return None, None
    ends = residual[0], residual[-1]
    return tuple(float(r) if math.isfinite(r) else None for r in ends)  # type: ignore[return-value]


def interval_text(result: Mapping[str, Any], value: float | None, residual: float | None, scale: float) -> str:
    """Say how far an eigenvalue may be from an extreme Ritz value: Lanczos residual plus the product's error."""
    product = product_error(result, value)
    if value is None or residual is None or product is None:
        return residual_text(residual, scale)
    return f"± {number(residual + product, 2)}: residual {number(residual, 2)}, product {number(product, 2)}"


def product_error(result: Mapping[str, Any], value: float | None) -> float | None:
    """Return how far a product may move an eigenvalue near ``value``; None where it is not known."""
    errors = result.get("errors") or {}
    absolute, relative = errors.get("hvp_absolute"), errors.get("hvp_relative")
    if isinstance(absolute, int | float):
        return float(absolute)
    return abs(value) * relative if value is not None and isinstance(relative, int | float) else None


def story(result: Mapping[str, Any]) -> str:
    """Say in one sentence, from the data alone, what the spectrum looks like."""
    low, high = extremes(result)
    if low is None or high is None or not (math.isfinite(low) and math.isfinite(high)):
        return "No Ritz values are stored in this run."
    scale = max(abs(low), abs(high))
    if scale == 0:
        probes = len(quadratures(result))
        along = "the random vector" if probes == 1 else f"each of the {probes} random vectors"
        return (
            f"Every Ritz value is zero: the product with {along} of this run vanishes; a larger lanczos.probes tells more."
        )
    tiny = 1e-6 * scale
    if low >= -tiny:
        head = f"No negative curvature was found; the largest eigenvalue is {number(high)}"
    elif high <= tiny:
        head = f"No positive curvature was found; the smallest eigenvalue is {number(low)}"
    else:
        sign, other = ("negative", "positive") if -low > high else ("positive", "negative")
        top, rest = (low, high) if -low > high else (high, low)
        ratio = abs(top / rest)
        relation = f"{other} ones are negligible"
        if ratio < 1e4:
            relation = f"{number(ratio, 2)} times the largest {other} one"
        head = f"The largest eigenvalue in magnitude is {sign} ({number(top)}; {relation})"
    return head + _bulk_clause(result, scale) + "."


def _bulk_clause(result: Mapping[str, Any], scale: float) -> str:
    theta, weight, _ = pooled(result)
    if len(theta) < 4:
        return ""
    order = np.argsort(np.abs(theta))
    radius = np.abs(theta[order])
    inside = int(np.searchsorted(np.cumsum(weight[order]), 0.99))
    bulk = float(radius[min(inside, len(radius) - 1)])
    if bulk > 0.5 * scale:
        return ", without outliers far from the bulk"
    return f", while 99 % of the spectral weight lies within |λ| ≤ {number(bulk, 2)}"


def warnings(result: Mapping[str, Any]) -> list[str]:
    """Return what a reader should know before quoting the numbers: unconverged ends, product error, asymmetry."""
    found = []
    spec = OPERATORS.get(str((result.get("operator") or {}).get("name")))
    positive = spec is not None and spec.positive
    for name, value, residual in zip(("λ min", "λ max"), extremes(result), extreme_residuals(result), strict=True):
        semidefinite = name == "λ min" and positive  # its end is 0, which no residual is a share of
        if value and residual is not None and residual > 0.01 * abs(value) and not semidefinite:
            share = 100 * residual / abs(value)
            found.append(
                f"{name} has not converged to 1 %: its residual is {number(share, 2)} % of it; more lanczos.steps help."
            )
    low, high = extremes(result)
    error = (result.get("errors") or {}).get("hvp_relative")
    if isinstance(error, int | float) and error > 0.01:
        rounded = (result.get("operator") or {}).get("dtype") in ("bfloat16", "tf32")
        mended = 'operator.scheme = "fourth" or operator.method = "exact"'
        found.append(
            f"A product is off by {number(100 * error, 2)} %: features of the spectrum finer than that are not real; "
            + ('model.compute_dtype = "float32"' if rounded else mended)
            + " mends it."
        )
    found += _choices(result)
    if (text := _asymmetry(result, max(abs(low or 0.0), abs(high or 0.0)))) is not None:
        found.append(text)
    if positive and low is not None and high is not None and low < -1e-4 * abs(high):
        found.append(f"λ min = {number(low)} is negative, which a positive semi-definite matrix rules out.")
    return found


def _choices(result: Mapping[str, Any]) -> list[str]:
    """Name discrete choices that changed within a step as the likely cause of a product's error."""
    errors = result.get("errors") or {}
    error: float = errors.get("hvp_relative") or 0.0
    changed: Mapping[str, int] = errors.get("choices_changed") or {}
    measured = errors.get("hvp_relative_is") == "measured"
    if not measured:
        changed = {name: times for name, times in changed.items() if name not in _COMPARISONS}  # which may be mere kinks
    if not changed or (measured and error <= 0.01):
        return []
    ops = ", ".join(f"{times:,} of {name}" for name, times in changed.items())
    return [
        f"Discrete choices of the model changed within one step of a difference ({ops}), and operator.routing does not "
        f"hold them: {'the likely cause of that error' if measured else 'the products may hold their jumps'}; "
        'operator.method = "exact" mends it.'
    ]


# An exact product's rounding moves symmetry by less than this, relative to the largest |eigenvalue|.
_ROUNDING = {"float64": 1e-5, "float32": 1e-3, "tf32": 0.03, "bfloat16": 0.3}


def _asymmetry(result: Mapping[str, Any], scale: float) -> str | None:
    """Return a caution where the products are less symmetric than their own error explains."""
    asymmetry, error = (result.get("errors") or {}).get("symmetry"), product_error(result, scale)
    explained = _ROUNDING.get(str((result.get("operator") or {}).get("dtype")), 1e-3)
    if error is not None and scale > 0:
        explained += 2 * error / scale
    if not isinstance(asymmetry, int | float) or asymmetry <= explained:
        return None
    return (
        f"The products are not symmetric: u·Hv and v·Hu differ by {number(100 * asymmetry, 2)} % of the largest |λ|, more "
        "than the products' error explains. What is multiplied is no Hessian, or the loss has kinks: see hpc-hess check."
    )


def caution_count(cautions: list[str]) -> str:
    """Return the line that ends a run."""
    if not cautions:
        return "no cautions"
    return "1 caution: see above" if len(cautions) == 1 else f"{len(cautions)} cautions: see above"

"""Numbers, durations and sizes as people read them, and what each measured error means."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import IO, Any

NONE = "n/a"


def number(value: float | None, digits: int = 4) -> str:
    """Format a scalar with ``digits`` significant digits: ``-1396``, ``0.2641``, ``3.2e-05``; ``n/a`` for None."""
    if value is None:
        return NONE
    value = float(value)
    if not math.isfinite(value):
        return str(value)
    if value.is_integer() and abs(value) < 1e6:
        return f"{value:,.0f}" if abs(value) >= 1e5 else f"{value:.0f}"
    short = f"{value:.{digits}g}"
    # %g writes 130 to two digits as 1.3e+02
    return f"{float(short):.0f}" if "e+" in short and abs(float(short)) < 1e4 else short


def minus(text: str) -> str:
    """Replace hyphens by true minus signs, for figures."""
    return text.replace("-", "\u2212")


def duration(seconds: float | None) -> str:
    """Format seconds: ``0.8 ms``, ``12.3 s``, ``4 min 05 s``, ``3 h 07 min``, ``2 d 04 h``."""
    if seconds is None or not math.isfinite(seconds):
        return NONE
    if seconds < 0.9995:
        return f"{seconds * 1e3:.3g} ms"
    if seconds < 99.95:
        return f"{seconds:.3g} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 2 * 86400:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86400} d {whole % 86400 // 3600:02d} h"


def roughly(seconds: float) -> str:
    """Format seconds of which the last digits mean nothing: ``40 s``, ``6 min``, ``3 h 07 min``, ``2 d 04 h``."""
    if seconds < 99.5:
        return f"{max(1, round(seconds))} s"
    return f"{round(seconds / 60)} min" if seconds < 3570 else duration(max(seconds, 3600))


def size(num_bytes: float | None) -> str:
    """Format bytes in binary units: ``512 B``, ``1.25 GiB``."""
    if num_bytes is None or not math.isfinite(num_bytes):
        return NONE
    value, units = float(num_bytes), ["B", "KiB", "MiB", "GiB", "TiB", "PiB"]
    while abs(value) >= 1023.5 and len(units) > 1:
        value, units = value / 1024, units[1:]
    return f"{value:.0f} B" if units[0] == "B" else f"{value:.3g} {units[0]}"


def rates(timing: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Say which share of its machine a rank used: (at what, share). ``timing``: of result.json."""
    limits = timing.get("limits_per_s")
    if not limits:
        return []
    found = [("products", f"{_share(timing['product_flops_per_s'], limits['flops_per_s'], 'FLOP/s')} of a matrix product")]
    if moved := timing.get("orthogonalisation_bytes_per_s"):
        found.append(("reorthogonalisation", f"{_share(moved, limits['bytes_per_s'], 'B/s')} of a copy"))
    return found


def _share(reached: float, limit: float, unit: str) -> str:
    """Format a share of a limit: ``21 % (4.5 of 21 GFLOP/s)``."""
    scale, prefix = next((s, p) for s, p in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (0.0, "")) if limit >= s)
    scale = scale or 1.0
    return f"{100 * reached / limit:.2g} % ({reached / scale:.2g} of {limit / scale:.2g} {prefix}{unit})"


def count(value: int | None) -> str:
    """Format a number of parameters in full and short: ``134,515,008 (134.5 M)``."""
    if value is None:
        return NONE
    for scale, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if value >= scale:
            return f"{value:,} ({value / scale:.4g} {letter})"
    return f"{value:,}"


def trace_text(trace: Mapping[str, Any] | None) -> str:
    """Return the trace with its 95 % interval, or say that one probe gives no estimate of it."""
    if not trace or trace.get("mean") is None:
        return NONE
    return f"{number(trace['mean'])} {spread_text(trace) or '(one probe: no error estimate)'}"


def spread_text(trace: Mapping[str, Any]) -> str:
    """Return what is known about a trace's error, or ""."""
    if trace.get("half_width_95") is not None:
        return f"± {number(trace['half_width_95'], 2)} (95 %)"
    if trace.get("stderr") is not None:  # a run from before intervals were kept
        return f"± {number(trace['stderr'], 2)} (standard error over probes)"
    return ""


def residual_text(residual: float | None, scale: float) -> str:
    """Say how well a Ritz value has converged; ``scale`` is the largest |eigenvalue|. Empty when not known."""
    if residual is None:
        return ""
    return "converged to rounding" if residual < 1e-14 * scale else f"residual {number(residual, 2)}"


def plural(number_of: int | None, word: str) -> str:
    """``1 probe``, ``2 probes``; ``n/a`` for None."""
    return NONE if number_of is None else f"{number_of:,} {word}" + "s" * (number_of != 1)


_SPELLED = {"λ": "lambda", "±": "+-", "≤": "<=", "\u2212": "-"}


def probes_text(probes: Sequence[int]) -> str:
    """Name probes counted from 0 as people count: "probe 1", "probes 1 to 3", "probes 1, 3"."""
    first, last = probes[0] + 1, probes[-1] + 1
    if len(probes) == 1:
        return f"probe {first}"
    if len(probes) == 2 or last - first >= len(probes):
        return f"probes {', '.join(str(k + 1) for k in probes)}"
    return f"probes {first} to {last}"


def printable(text: str, stream: IO[str]) -> str:
    """Return ``text`` in what ``stream`` can encode: batch jobs often run in a locale without Greek."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        for character, spelled in _SPELLED.items():
            text = text.replace(character, spelled)
        text = text.encode(encoding, errors="replace").decode(encoding)
    return text


#: key in ``errors`` -> (label, what it means)
ERROR_TERMS: dict[str, tuple[str, str]] = {
    "hvp_relative": ("Product, relative error", "‖error of Hv‖ / ‖Hv‖, largest of those below"),
    "hvp_absolute": (
        "Product, absolute error",
        "largest measured |error of Hv| for |v| = 1; it widens every eigenvalue's interval",
    ),
    "ritz_ends.lowest": ("Lowest Ritz pair (θ, y)", "yᵀHy and ‖Hy - θy‖ with the exact product"),
    "ritz_ends.highest": ("Highest Ritz pair (θ, y)", "yᵀHy and ‖Hy - θy‖ with the exact product"),
    "hvp_relative_is": (
        "How it is known",
        "measured against the exact product (of bfloat16 and tf32: in float32), or predicted from measured noise",
    ),
    "hvp_relative_probe": ("Product on the first probe", "relative error, against that product"),
    "hvp_relative_ritz": ("Product on the extreme Ritz vector", "relative error, against that product"),
    "hvp_relative_predicted": ("Product, predicted error", "largest over the run, from measured noise and curvature"),
    "ritz": ("Extreme Ritz pair (θ, y)", "yᵀHy and ‖Hy - θy‖ with the exact product: the latter bounds θ's error"),
    "symmetry": ("Asymmetry", "largest |u·Hv - v·Hu| over Krylov vectors, relative to the largest |λ|; exact: 0"),
    "linearity": ("Nonlinearity", "‖H(u + v) - Hu - Hv‖ relative to the products; exact: 0"),
    "repeat": ("Repeatability", "relative difference of two gradients at the same point; 0: bitwise equal"),
    "realised_step": ("Step not realised", "largest |realised step / asked step - 1|; products divide by the realised one"),
    "step": ("Step", "length ε of the finite-difference step in θ₀ + ε v/‖v‖"),
    "step_min": ("Shortest step", "smallest ε in θ₀ + ε v/‖v‖ over the products"),
    "step_max": ("Longest step", "largest ε in θ₀ + ε v/‖v‖ over the products"),
    "truncation": ("Truncation error", "part of the product's error from the finite step, seen by comparing two steps"),
    "rounding": ("Rounding error", "part of the product's error from rounding inside the gradients, over the step"),
    "gradient_noise": ("Gradient noise", "rounding noise of the gradient, relative to its norm"),
    "orthogonality": ("Lost orthogonality", "largest |u·v| between different Krylov vectors; 0 is ideal"),
    "expert_flips": ("Expert flips", "tokens whose experts changed between the ends of a step; 0 if routing is frozen"),
}

"""The solution of (A + damping I) x = gradient: how its residual fell."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from hpc_hess.console.words import minus, number
from hpc_hess.report.style import INK, MUTED, set_log

TITLE = "The inverse on the gradient"
HEADERS = ["Quantity", "Value", "Meaning"]
_METHODS = {"minres": "MINRES", "cg": "Conjugate gradients"}


def facts(found: Mapping[str, Any]) -> str:
    """Say whether it converged, and with which damping."""
    done = "converged" if found["converged"] else "has not converged"
    why = ", suggested by the spectrum" if found["suggested"] else ""
    return (
        f"{_METHODS[found['method']]} {done} after {len(found['residuals']) - 1} products with a damping of "
        f"{number(found['damping'])}{why}. The solution is row 0 of {found['store']}."
    )


def table(found: Mapping[str, Any]) -> list[list[str]]:
    """Return the numbers that matter of the solution."""
    return [
        ["|gradient|", number(found["gradient_norm"]), "right-hand side"],
        ["|x|", number(found["norm"]), "solution"],
        ["⟨gradient, x⟩", minus(number(found["self_influence"])), "twice the fall of the damped quadratic model"],
        [
            "relative residual",
            number(found["true_residual"], 2),
            "by one more product; asked for: " + number(found["tolerance"], 2),
        ],
    ]


def size(found: Mapping[str, Any]) -> tuple[float, float]:
    """Return the figure's size in inches."""
    return 8.4, 3.0


def draw(figure: Figure, found: Mapping[str, Any], result: Mapping[str, Any]) -> str:
    """Draw the residuals and return the caption."""
    axes = figure.subplots()
    residuals = [max(r, 1e-16) for r in found["residuals"]]
    axes.plot(range(len(residuals)), residuals, color=INK, marker="o" if len(residuals) < 60 else "")
    axes.axhline(found["tolerance"], color=MUTED, linestyle=(0, (4, 3)), linewidth=1)
    set_log(axes, min(*residuals, found["tolerance"]), 1.0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("products")
    axes.set_ylabel("relative residual")
    return "The residual of the recurrence after each product; dashed: what was asked for."


def lines(found: Mapping[str, Any]) -> list[str]:
    """Return one line."""
    done = "converged" if found["converged"] else "not converged"
    return [
        f"{_METHODS[found['method']]}, {len(found['residuals']) - 1} products, damping {number(found['damping'])}: relative "
        f"residual {number(found['true_residual'], 2)} ({done})"
    ]

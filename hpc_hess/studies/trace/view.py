"""The trace and the Frobenius norm as a study estimated them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure

from hpc_hess.console.words import minus, number

TITLE = "Trace"
HEADERS = ["Quantity", "Estimate", "Standard error"]
_METHODS = {"hutchinson": "Hutchinson's estimator", "hutch++": "Hutch++", "xtrace": "XTrace"}


def facts(found: Mapping[str, Any]) -> str:
    """Name the method and what it cost."""
    return f"{_METHODS[found['method']]}, {found['products']} products."


def table(found: Mapping[str, Any]) -> list[list[str]]:
    """Return the trace and, if it was estimated, the Frobenius norm."""
    names = {"trace": "trace", "frobenius": "Frobenius norm"}
    return [
        [name, minus(number(found[key], 5)), number(found[f"{key}_stderr"], 2)]
        for key, name in names.items()
        if key in found
    ]


def size(found: Mapping[str, Any]) -> None:
    """Nothing is drawn."""


def draw(figure: Figure, found: Mapping[str, Any], result: Mapping[str, Any]) -> str:
    """Draw nothing."""
    return ""


def lines(found: Mapping[str, Any]) -> list[str]:
    """Return one line for each quantity."""
    return [f"{name} {value} ± {error} ({_METHODS[found['method']]})" for name, value, error in table(found)]

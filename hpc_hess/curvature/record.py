"""What one product did, for the log and the report."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class ProductRecord:
    """One product.

    Finite differences: ``step`` along the unit vector, the ``realised`` share of it, ``gradients`` of the product and
    of a ``calibration`` before it with its seconds, expert ``flips``, and the ``predicted_error`` relative to the
    product's norm (None for a step given by number); ``choices``: discrete choices that changed within the first product's
    step, by operation. Exact products leave the defaults, but for the seconds in which they were compiled.
    """

    step: float | None = None
    realised: float = 1.0
    gradients: int = 0
    calibration: int = 0
    calibration_s: float = 0.0
    flips: int = 0
    predicted_error: float | None = None
    choices: dict[str, int] | None = None

"""The search for an intrinsic dimension: when to double, when to stop. Numbers in, decisions out.

Schioppa 2024, section 5.3 (after Li et al., "Measuring the intrinsic dimension of objective landscapes", ICLR 2018): one
training run in a subspace of D_max dimensions, of which the first d move. After every c steps: done where the metric has
reached the threshold; where it has gained less than delta over these steps, d doubles.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

Decision = Literal["go on", "double", "found", "failed"]


@dataclass
class DoublingRule:
    """The state of a search. ``metric``: larger is better. ``history``: (d, metric) after every c steps."""

    threshold: float
    delta: float
    dimension: int
    largest: int
    before: float  # the metric c steps ago
    history: list[tuple[int, float]] = field(default_factory=list)

    def decide(self, metric: float) -> Decision:
        """Take the metric after c more steps and say what to do; ``dimension`` is doubled where it has to be."""
        self.history.append((self.dimension, metric))
        gain, self.before = metric - self.before, metric
        if metric >= self.threshold:
            return "found"
        if gain >= self.delta:
            return "go on"
        if 2 * self.dimension > self.largest:
            return "failed"
        self.dimension *= 2
        return "double"


def threshold_of(start: float, best: float, share: float) -> float:
    """Return the metric that has made ``share`` of the gain from ``start`` to ``best``."""
    return start + share * (best - start)


def spread_in_bits(found: Sequence[int]) -> float:
    """Return the range of dimensions in doublings: how stable a search is over seeds."""
    return math.log2(max(found) / min(found))

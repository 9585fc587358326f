"""Means of random samples: how many are enough, and what the mean is worth."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtrit  # scipy.stats takes a second to import, in every rank

_FIRST_LOOK, _GROWTH = 8, 1.5


@dataclass(frozen=True)
class StoppingRule:
    """Stop sampling once the mean is known to ``relative`` of itself with probability 1 - ``risk``.

    A rule that looks after every sample stops early by luck: some confidence interval will be narrow sooner or later.
    This one looks after 8, 12, 18, 27, ... samples only, and at look k allows itself the share 6 / (pi k)^2 of the risk,
    so that all looks together (union bound) fail with the probability asked for, as far as samples are Gaussian.
    """

    relative: float = 0.05
    risk: float = 0.05
    most: int = 1000

    def looks(self) -> list[int]:
        """Return the sample counts at which the rule looks."""
        counts = [_FIRST_LOOK]
        while counts[-1] < self.most:
            counts.append(min(self.most, math.ceil(counts[-1] * _GROWTH)))
        return counts

    def half_width(self, samples: Sequence[float], look: int) -> float:
        """Return the half width of the mean's confidence interval at look ``look`` (1, 2, ...)."""
        n = len(samples)
        share = self.risk * 6 / (math.pi * look) ** 2
        return float(stdtrit(n - 1, 1 - share / 2) * np.std(samples, ddof=1) / math.sqrt(n))

    def enough(self, samples: Sequence[float]) -> bool:
        """Whether to stop: ``most`` samples are there, or this is a look and the mean is known well enough."""
        n, looks = len(samples), self.looks()
        if n >= self.most:
            return True
        if n not in looks:
            return False
        return self.half_width(samples, looks.index(n) + 1) <= self.relative * abs(float(np.mean(samples)))

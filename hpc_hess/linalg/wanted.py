"""Which Ritz values are wanted, which survive a restart, and whether one may be missing: arithmetic without vectors."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Which = Literal["largest", "smallest", "both", "magnitude"]
Float = NDArray[np.float64]


def num_wanted(count: int, which: Which) -> int:
    """Return how many pairs ``count`` stands for: so many of each end with "both"."""
    return 2 * count if which == "both" else count


def least_basis(count: int, which: Which) -> int:
    """Return the smallest basis that the pairs can be found in: themselves, and three vectors to search with."""
    return num_wanted(count, which) + 3


@dataclass(frozen=True)
class Wanted:
    """``count`` values at the end ``which`` ("both": of each end) of a matrix of ``dimension`` rows."""

    count: int
    which: Which
    dimension: int

    @property
    def number(self) -> int:
        """Values that are wanted, of both ends together."""
        return min(num_wanted(self.count, self.which), self.dimension)

    def of(self, values: Float) -> list[int]:
        """Return which Ritz values are wanted, ascending."""
        if self.which != "both":
            return sorted(_first(values, self.count, self.which).tolist())
        low, high = range(min(self.count, len(values))), range(max(0, len(values) - self.count), len(values))
        return sorted({*low, *high})

    def most_kept(self, size: int) -> int:
        """Return how many vectors of a basis of ``size`` survive a restart at most."""
        wanted = num_wanted(self.count, self.which)
        return wanted + (size - wanted) // 2

    def kept(self, values: Float, going: NDArray[np.bool_], size: int) -> list[int]:
        """Choose the Ritz values that survive a restart: more as pairs converge, so that the search does not stall.

        As ARPACK (Lehoucq, Sorensen, Yang 1998, section 5.1.2): one for each that has converged, up to half of the room of
        a basis of ``size``; at least a fifth of it. With both ends, the one that has more pairs to go keeps more.
        ``going``: which wanted pairs have not converged.
        """
        room = size - self.number
        extra = max(room // 5, min(int((~going).sum()), room // 2))
        if self.which != "both":
            return sorted(_first(values, self.number + extra, self.which).tolist())
        below, above = int(going[: self.count].sum()), int(going[self.count :].sum())
        low = round(extra * (below + 0.5) / (below + above + 1))
        return [*range(self.count + low), *range(len(values) - self.count - (extra - low), len(values))]

    def ends(self, last: Float, number: int) -> list[int]:
        """Choose Ritz values of a direction, from the ends that are wanted in turn, the less known first."""
        up, down = [*range(len(last))][::-1], [*range(len(last))]
        if self.which in ("largest", "smallest"):
            return sorted((up if self.which == "largest" else down)[:number])
        pair = (up, down) if last[-1] > last[0] else (down, up)
        return sorted([*dict.fromkeys(k for both in zip(*pair, strict=True) for k in both)][:number])

    def edges(self, found: Float) -> list[tuple[int, float]]:
        """Return (sign, edge) of each end: sign * value beyond it would be wanted too."""
        count = self.count
        ends = {
            "largest": [(1, found[0])],
            "smallest": [(-1, -found[-1])],
            "both": [(1, found[-count]), (-1, -found[count - 1])],
            "magnitude": [(sign, np.abs(found).min()) for sign in (1, -1)],
        }
        return [(sign, float(edge)) for sign, edge in ends[self.which]]


def risk_of_missing(share: float, steps: int, dimension: int) -> float:
    """Bound the probability that ``steps`` Lanczos steps from a random start miss an end by over ``share`` of the spread.

    1.648 sqrt(N) exp(-sqrt(share) (2 steps - 1)): Kuczynski and Wozniakowski, SIAM J. Matrix Anal. Appl. 13 (1992).
    """
    return 1.648 * math.sqrt(dimension) * math.exp(-math.sqrt(max(share, 0)) * (2 * steps - 1))


def _first(values: Float, count: int, which: Which) -> NDArray[np.int64]:
    """Return the indices of the ``count`` values that matter most."""
    keys = {"largest": -values, "smallest": values, "magnitude": -np.abs(values)}
    return np.argsort(keys[which], kind="stable")[:count]

"""What an algorithm has computed so far, for a run that is stopped and goes on.

An algorithm that is a sequence of costly pieces asks a Keep for each of them, always in the same order. A run that goes on
answers from what was kept; all between the pieces is computed again, and comes out the same. Pieces may be made of pieces:
once the outer one is kept, those inside are forgotten.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from hpc_hess.parallel.vector import Vector


class Keep(Protocol):
    """Answers with a piece that was kept, or makes it and keeps it. ``make`` is called on every rank or on none."""

    def numbers(self, make: Callable[[], Sequence[float]]) -> list[float]:
        """Return some numbers, the same on every rank. Collective: yes."""
        ...

    def vector(self, make: Callable[[], Vector]) -> Vector:
        """Return a vector; it may be changed. Collective: yes."""
        ...

    def vectors(self, make: Callable[[], Sequence[Vector]]) -> list[Vector]:
        """Return several vectors, which are kept together; they may be changed. Collective: yes."""
        ...


class KeepNothing:
    """Makes every piece: for one process that will not be stopped."""

    def numbers(self, make: Callable[[], Sequence[float]]) -> list[float]:
        """Return what ``make`` gives."""
        return list(make())

    def vector(self, make: Callable[[], Vector]) -> Vector:
        """Return what ``make`` gives."""
        return make()

    def vectors(self, make: Callable[[], Sequence[Vector]]) -> list[Vector]:
        """Return what ``make`` gives."""
        return list(make())

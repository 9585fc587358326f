"""Sums over micro-batches as someone may watch them: to keep what has been summed, take it up, or give up."""

from __future__ import annotations

from typing import Any, Protocol

import torch


class Watch(Protocol):
    """Follows the evaluations of one product: each adds micro-batches 0, 1, ... to flat local vectors, in order.

    Whatever raises from here ends the evaluation between two micro-batches, on every rank.
    """

    def begin(self, sums: list[torch.Tensor], count: int) -> int:
        """Begin an evaluation over ``count`` micro-batches; return the first one to add. Collective: yes.

        ``sums`` are zero, and hold the sums of the micro-batches before that one afterwards.
        """

    def added(self, index: int, sums: list[torch.Tensor], *, more: bool = True) -> None:
        """Note that micro-batch ``index`` is in ``sums``. ``more``: the product may evaluate again. Collective: yes."""

    def milestone(self, state: dict[str, Any]) -> None:
        """Note that ``state`` stands for all evaluations so far: a resumed product begins with the next one."""


class Unwatched:
    """Nobody watches."""

    def begin(self, sums: list[torch.Tensor], count: int) -> int:
        """Return 0."""
        return 0

    def added(self, index: int, sums: list[torch.Tensor], *, more: bool = True) -> None:
        """Do nothing."""

    def milestone(self, state: dict[str, Any]) -> None:
        """Do nothing."""

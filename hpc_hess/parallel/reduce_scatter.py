"""Reduce-scatter among CPU ranks: gloo has none of its own and sums everything everywhere, which sends twice as much.

Each rank sends every other its part, and sums what it gets in rank order: the same bits whatever arrives first.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

# torch 2.13 renamed them
all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


class _Parts:
    """An exchange under way, with the interface of a collective's work."""

    def __init__(self, work: Any, parts: torch.Tensor, out: torch.Tensor) -> None:
        self._work, self._parts, self._out = work, parts, out

    def wait(self) -> None:
        """Wait for the other ranks and write the sum."""
        self._work.wait()
        torch.sum(self._parts, 0, out=self._out)


def start_reduce_scatter(out: torch.Tensor, everyone: torch.Tensor, group: Any, *, gloo: bool) -> Any:
    """Start summing ``everyone`` (flat, a part of ``out``'s size for each rank) into ``out``; return what to wait for.

    Both must live until then. ``gloo``: see World.gloo. Collective: yes.
    """
    if not gloo:
        return _reduce_scatter(out, everyone, group=group, async_op=True)
    parts = torch.empty_like(everyone)
    work = dist.all_to_all_single(parts, everyone, group=group, async_op=True)
    return _Parts(work, parts.view(dist.get_world_size(group), -1), out)

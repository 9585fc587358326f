"""All-gather and reduce-scatter among the ranks that share the parameters: what FSDP and exact products send.

The collectives of GPUs have both. CPU ranks of one node exchange through memory that they share (shared_memory.py), those of
several by gloo, which has no reduce-scatter of its own and sums everything everywhere, twice the traffic: here each rank
sends every other its part, and sums what it gets in rank order, so that it gets the same bits whatever arrives first.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.distributed as dist

# torch 2.13 renamed them
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


class Work(Protocol):
    """A collective under way."""

    def wait(self) -> Any:
        """Wait until its result is there."""


class Done:
    """A collective that has ended."""

    def wait(self) -> None:
        """Return at once."""


class ShardCollectives(Protocol):
    """Both collectives over the ranks that share the parameters. Tensors are flat and live until the work is done."""

    def start_all_gather(self, out: torch.Tensor, mine: torch.Tensor) -> Work:
        """Start to write every rank's ``mine``, in rank order, to ``out``. Collective: yes."""
        ...

    def start_reduce_scatter(self, out: torch.Tensor, everyone: torch.Tensor) -> Work:
        """Start to sum ``everyone``, a part like ``out`` for each rank; this rank's goes to ``out``. Collective: yes."""
        ...


class TorchCollectives:
    """As torch's backends make them. ``gloo``: on CPUs."""

    def __init__(self, group: Any, *, gloo: bool) -> None:
        self._group, self._gloo = group, gloo

    def start_all_gather(self, out: torch.Tensor, mine: torch.Tensor) -> Work:
        """See ShardCollectives."""
        # as bytes: not every backend knows every dtype
        return _all_gather(out.view(torch.uint8), mine.view(torch.uint8), group=self._group, async_op=True)

    def start_reduce_scatter(self, out: torch.Tensor, everyone: torch.Tensor) -> Work:
        """See ShardCollectives."""
        if not self._gloo:
            return _reduce_scatter(out, everyone, group=self._group, async_op=True)
        parts = torch.empty_like(everyone)
        work = dist.all_to_all_single(parts, everyone, group=self._group, async_op=True)
        return _Parts(work, parts.view(dist.get_world_size(self._group), -1), out)


class _Parts:
    """Parts on their way, to be summed."""

    def __init__(self, work: Any, parts: torch.Tensor, out: torch.Tensor) -> None:
        self._work, self._parts, self._out = work, parts, out

    def wait(self) -> None:
        self._work.wait()
        torch.sum(self._parts, 0, out=self._out)

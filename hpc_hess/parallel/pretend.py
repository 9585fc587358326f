"""A world of which only rank 0 exists: the program runs as that rank, and what it sends arrives nowhere.

For planning. Collectives return at once and leave their buffers as they are; objects that ranks exchange are rank 0's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist

from hpc_hess.parallel.launcher import Launch
from hpc_hess.parallel.shard_collectives import ShardCollectives, TorchCollectives
from hpc_hess.parallel.world import World

T = TypeVar("T")


class PretendWorld(World):
    """Rank 0 of ``size`` ranks. ``gloo``: as on CPUs; else collectives are made as on GPUs."""

    def __init__(self, size: int, local_size: int, *, gloo: bool) -> None:
        launch = Launch("pretended", 0, size, 0, min(local_size, size), 0, -(-size // local_size))
        super().__init__(launch, torch.device("cpu"), connected=size > 1)
        self._by_gloo = gloo

    @property
    def gloo(self) -> bool:
        """Whether tensors travel through gloo."""
        return self._by_gloo

    def _open_collectives(self) -> ShardCollectives:
        """On one node, a reduce-scatter without buffers, as through shared memory."""
        return TorchCollectives(self._shard_group, gloo=self.gloo and self.launch.num_nodes > 1)

    def max_over_ranks(self, value: float, name: str) -> float:
        """Return this rank's value."""
        return value

    def broadcast(self, value: T, name: str) -> T:
        """Return this rank's value."""
        return value

    def gather(self, value: T, name: str) -> list[T]:
        """Return this rank's value for each rank."""
        return [value] * self.size


@contextmanager
def pretending(size: int, local_size: int, *, gloo: bool, replicate: int = 1) -> Iterator[PretendWorld]:
    """Start a world of ``size`` ranks, ``local_size`` of them on a node, in this process; none may be there already."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    world = PretendWorld(size, local_size, gloo=gloo)
    if size > 1:
        dist.init_process_group("fake", rank=0, world_size=size, store=FakeStore())
    try:
        if size > 1:
            world.make_mesh(replicate)
        yield world
    finally:
        if size > 1:
            dist.destroy_process_group()

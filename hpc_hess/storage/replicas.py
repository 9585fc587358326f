"""HSDP: what replica 0 reads from files, the other replicas receive."""

from __future__ import annotations

import torch
import torch.distributed as dist
from numpy.typing import NDArray

from hpc_hess.parallel.world import World

_MAX_BYTES = 256 << 20


def share_with_replicas(world: World, values: NDArray) -> None:
    """Overwrite ``values`` (flat, contiguous) on replicas 1.. with replica 0's, in bounded pieces. Collective: yes."""
    if world.num_replicas == 1:
        return
    group = world.replica_group
    flat = torch.from_numpy(values)
    for piece in flat.split(_MAX_BYTES // values.dtype.itemsize):
        if piece.numel():
            with world.guard("share a basis row"), world.carried(piece) as carried:
                dist.broadcast(carried, group_src=0, group=group)

"""Vector: my shard of one vector. Reductions happen here and in basis.py, so algorithms see none."""

from __future__ import annotations

import math
from typing import Any

import torch

from hpc_hess.parallel import kernels
from hpc_hess.parallel.layout import Layout, Shard
from hpc_hess.parallel.world import World


class VectorSpace:
    """R^N as it lies over the ranks: who holds which entries, in which dtype, on which device."""

    def __init__(self, world: World, layout: Layout, dtype: torch.dtype = torch.float32) -> None:
        self.world, self.layout = world, layout
        self.shard: Shard = layout.shard(world.shard_rank)
        self.dtype, self.device = dtype, world.device
        self.size_local, self.size = self.shard.size, layout.num_params

    def zeros(self) -> Vector:
        """Return the zero vector."""
        return Vector(self, torch.zeros(self.size_local, dtype=self.dtype, device=self.device))

    def empty(self) -> Vector:
        """Return a vector of any values, in memory that nothing has touched."""
        return Vector(self, torch.empty(self.size_local, dtype=self.dtype, device=self.device))

    def wrap(self, data: torch.Tensor) -> Vector:
        """Return a Vector over an existing flat local tensor, without copying."""
        if data.shape != (self.size_local,):
            raise ValueError(f"expected a local tensor of shape ({self.size_local},), got {tuple(data.shape)}")
        return Vector(self, data)

    def sum(self, values: torch.Tensor, name: str) -> torch.Tensor:
        """Sum float64 ``values`` over the shards. Collective: yes."""
        return self.world.sum_over_shards(values, name)

    def agreed(self, value: Any, name: str) -> Any:
        """Return rank 0's ``value`` on every rank: each one's own may differ in its last bits. Collective: yes."""
        return self.world.broadcast(value, name)


class Vector:
    """One vector; ``data`` is this rank's flat part, in the order of Layout's pieces."""

    def __init__(self, space: VectorSpace, data: torch.Tensor) -> None:
        self.space, self.data = space, data

    def dot(self, other: Vector) -> float:
        """Return <self, other> in float64. Collective: yes."""
        return float(self.space.sum(kernels.dot(self.data, other.data), "dot product"))

    def norm(self) -> float:
        """Return the Euclidean norm in float64. Collective: yes."""
        return math.sqrt(self.dot(self))

    def copy(self) -> Vector:
        """Return an independent copy."""
        return Vector(self.space, self.data.clone())

    def copy_(self, other: Vector) -> Vector:
        """Overwrite with ``other``; return self."""
        self.data.copy_(other.data)
        return self

    def scale_(self, a: float) -> Vector:
        """Multiply by ``a`` in place; return self."""
        self.data.mul_(a)
        return self

    def difference_(self, x: Vector, factor: float) -> float:
        """Overwrite with ``factor`` (self - x); return the norm in float64. Collective: yes."""
        return math.sqrt(float(self.space.sum(kernels.difference(self.data, x.data, factor), "difference")))

    def axpy_(self, a: float, x: Vector) -> Vector:
        """Add ``a`` times ``x`` in place; return self."""
        self.data.add_(x.data, alpha=a)
        return self

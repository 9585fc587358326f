"""Vector: my shard of one vector. Basis: my shards of several. Reductions happen here, so algorithms see none."""

from __future__ import annotations

import math

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

    def wrap(self, data: torch.Tensor) -> Vector:
        """Return a Vector over an existing flat local tensor, without copying."""
        if data.shape != (self.size_local,):
            raise ValueError(f"expected a local tensor of shape ({self.size_local},), got {tuple(data.shape)}")
        return Vector(self, data)

    def sum(self, values: torch.Tensor, name: str) -> torch.Tensor:
        """Sum float64 ``values`` over the shards. Collective: yes."""
        return self.world.sum_over_shards(values, name)


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

    def axpy_(self, a: float, x: Vector) -> Vector:
        """Add ``a`` times ``x`` in place; return self."""
        self.data.add_(x.data, alpha=a)
        return self


class Basis:
    """Up to ``capacity`` vectors of a space, kept as a ring: vector j lies in row j % capacity."""

    def __init__(self, space: VectorSpace, capacity: int, device: torch.device | None = None) -> None:
        self.space, self.capacity = space, capacity
        self.rows = torch.empty((capacity, space.size_local), dtype=space.dtype, device=device or space.device)

    def __getitem__(self, index: int) -> Vector:
        """Return vector ``index`` (a view where the basis lies on the vectors' device)."""
        return Vector(self.space, self.rows[index % self.capacity].to(self.space.device))

    def __setitem__(self, index: int, vector: Vector) -> None:
        self.rows[index % self.capacity].copy_(vector.data)

    def _window(self, first: int, stop: int) -> tuple[torch.Tensor, list[int]]:
        """Rows that hold vectors first..stop-1 as one slice, and for each row the vector it holds."""
        if stop - first > self.capacity:
            raise ValueError(f"vectors {first}..{stop - 1} do not fit a basis of {self.capacity} rows")
        low, high = first % self.capacity, (stop - 1) % self.capacity + 1
        if low < high:
            return self.rows[low:high], list(range(first, stop))
        order = sorted(range(first, stop), key=lambda j: j % self.capacity)
        if stop - first == self.capacity:
            return self.rows, order
        return self.rows[[j % self.capacity for j in order]], order

    def orthogonalise_(self, w: Vector, first: int, stop: int) -> tuple[torch.Tensor, float]:
        """Make ``w`` orthogonal to vectors first..stop-1 in place, by classical Gram-Schmidt with two passes.

        Returns the summed coefficients <v_j, w> in the order first..stop-1 (float64, CPU) and the norm of what is left.
        Three all-reduces whatever the number of vectors. Collective: yes. (Giraud, Langou, Rozloznik, "The loss of
        orthogonality in the Gram-Schmidt orthogonalization process", 2005: twice is enough.)
        """
        rows, order = self._window(first, stop)
        c1 = self.space.sum(kernels.project(rows, w.data), "first projection")
        c1 = c1.to(self.space.dtype).double()  # what is subtracted, so that the sum below is <v_j, w>
        c2 = self.space.sum(kernels.subtract_then_project(rows, w.data, c1), "second projection")
        square = self.space.sum(kernels.subtract_then_square(rows, w.data, c2), "norm")
        total = (c1 + c2).cpu()
        coefficients = torch.empty_like(total)
        coefficients[[j - first for j in order]] = total
        return coefficients, math.sqrt(float(square))

    def combine(self, coefficients: torch.Tensor, first: int = 0) -> Vector:
        """Return sum_j coefficients[j] v_(first + j), as a Ritz vector needs. Local."""
        rows, order = self._window(first, first + len(coefficients))
        out = self.space.zeros()
        kernels.combine(rows, coefficients.double()[[j - first for j in order]].to(out.data.device), out.data)
        return out

"""Sketch: Phi of one kind, applied to parts of a vector wherever they lie; and to whole Vectors over the ranks.

Each rank sketches the entries it holds, then D numbers are summed: the same result, up to rounding, on any number of ranks.
A block that several ranks share is transformed by each of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from hpc_hess.linalg.operator import LinearOperator, products
from hpc_hess.parallel.layout import Layout
from hpc_hess.parallel.vector import Vector, VectorSpace
from hpc_hess.sketch.kinds import SketchSettings, chain

_BATCH = 1 << 20  # entries transformed at a time: they should stay in cache


class _Batch(NamedTuple):
    """Consecutive blocks, and where their entries lie: (first entry of the batch, of the data, length)."""

    blocks: range
    parts: list[tuple[int, int, int]]


class Sketch:
    """A random linear map Phi from R^N to R^D with E |Phi x|^2 = |x|^2, known by its settings.

    ``size`` is N, the entries of the global index.
    """

    def __init__(self, size: int, settings: SketchSettings) -> None:
        self.size, self.settings, self.dimension = size, settings, settings.dimension
        self._chain = chain(settings, size)
        self._at_a_time = max(2, _BATCH // self._chain.block)  # cores share the products of two blocks better

    # -- parts of a vector: local ------------------------------------------------------------------------------------

    def begin(self, device: torch.device) -> torch.Tensor:
        """Return an empty collection for :meth:`add`: float64, the same whatever the order of what is added."""
        return torch.zeros(self._chain.collected, dtype=torch.float64, device=device)

    def add(self, collection: torch.Tensor, data: torch.Tensor, starts: Sequence[int], lengths: Sequence[int]) -> None:
        """Add the flat ``data``, which lies on the given ascending intervals of the global index. Local."""
        chain = self._chain
        for batch in self._batches(starts, lengths):
            z = data.new_zeros(len(batch.blocks) * chain.block)
            for there, here, length in batch.parts:
                z[there : there + length] = data[here : here + length]
            z = z.view(len(batch.blocks), chain.block)
            for factor in chain.factors:
                z = factor.forward(z, batch.blocks)
            collection += chain.collect.collect(z, batch.blocks)

    def end(self, collection: torch.Tensor) -> torch.Tensor:
        """Return the sketch [D] of all that was added, float64. Local."""
        tail = self._chain.tail
        y = collection if tail is None else tail.forward(collection.unsqueeze(0))[0]
        return y * self._chain.scale

    def lift(self, y: torch.Tensor, out: torch.Tensor, starts: Sequence[int], lengths: Sequence[int]) -> None:
        """Write the entries of Phi^T y on the given ascending intervals to the flat ``out``. Local. ``y`` [D]."""
        chain = self._chain
        y = y.to(dtype=torch.float64, device=out.device) * chain.scale
        spread = (y if chain.tail is None else chain.tail.adjoint(y.unsqueeze(0))[0]).to(out.dtype)
        for batch in self._batches(starts, lengths):
            z = chain.collect.spread(spread, batch.blocks)
            for factor in reversed(chain.factors):
                z = factor.adjoint(z, batch.blocks)
            z = z.reshape(-1)
            for there, here, length in batch.parts:
                out[here : here + length] = z[there : there + length]

    def _batches(self, starts: Sequence[int], lengths: Sequence[int]) -> Iterator[_Batch]:
        """Cut intervals into batches of consecutive blocks that hold something of them."""
        M, here = self._chain.block, 0
        batch: _Batch | None = None
        for start, length in zip(starts, lengths, strict=True):
            done = 0
            while done < length:
                block = (start + done) // M
                if batch is None or block >= batch.blocks.start + self._at_a_time or block > batch.blocks.stop:
                    if batch is not None:
                        yield batch
                    batch = _Batch(range(block, block), [])
                first = batch.blocks.start * M
                take = min(length - done, first + self._at_a_time * M - (start + done))
                last = (start + done + take - 1) // M
                batch.parts.append((start + done - first, here, take))
                batch = batch._replace(blocks=range(batch.blocks.start, max(batch.blocks.stop, last + 1)))
                here, done = here + take, done + take
        if batch is not None:
            yield batch

    # -- whole vectors over the ranks --------------------------------------------------------------------------------

    def apply(self, x: Vector) -> torch.Tensor:
        """Return Phi x [D], float64, the same on every rank. Collective: yes."""
        collection = self.begin(x.data.device)
        self.add(collection, x.data, *intervals(x.space))
        return self.end(x.space.sum(collection, "sketch"))

    def transpose(self, y: torch.Tensor, space: VectorSpace) -> Vector:
        """Return Phi^T y as a Vector; ``y`` [D] is the same on every rank. Collective: no."""
        out = space.zeros()
        self.lift(y, out.data, *intervals(space))
        return out


def intervals(space: VectorSpace) -> tuple[list[int], list[int]]:
    """Return (starts, lengths) of this rank's entries in the global index."""
    starts, lengths = space.shard.global_intervals
    return starts.tolist(), lengths.tolist()


def sketch_space(sketch: Sketch, inner: VectorSpace) -> VectorSpace:
    """Return R^D over the ranks that share the vectors of ``inner``."""
    layout = Layout({"sketch": (sketch.dimension,)}, inner.layout.num_shards)
    return VectorSpace(inner.world, layout, inner.dtype)


def part_of(whole: torch.Tensor, space: VectorSpace) -> Vector:
    """Return D numbers, alike on all ranks, as a Vector of :func:`sketch_space`. Collective: no."""
    return space.wrap(whole[_mine(space)].to(space.dtype))


def whole_of(v: Vector) -> torch.Tensor:
    """Return a Vector of :func:`sketch_space` as D numbers on every rank, float64. Collective: yes."""
    whole = torch.zeros(v.space.size, dtype=torch.float64, device=v.data.device)
    whole[_mine(v.space)] = v.data.double()
    return v.space.sum(whole, "sketched vector")


def _mine(space: VectorSpace) -> slice:
    starts, lengths = intervals(space)
    return slice(starts[0], starts[0] + lengths[0]) if starts else slice(0)


class SketchedOperator:
    """Phi A Phi^T, symmetric on R^D, whose vectors are shared among the ranks: Krylov methods run on it as on A."""

    def __init__(self, operator: LinearOperator, sketch: Sketch) -> None:
        self._operator, self._sketch = operator, sketch
        self.space = sketch_space(sketch, operator.space)

    def matvec(self, v: Vector) -> Vector:
        """Return Phi A Phi^T v as a new Vector. Collective: yes."""
        return self.matmat([v])[0]

    def matmat(self, vectors: Sequence[Vector]) -> list[Vector]:
        """Return the products with several vectors; A's may share work. Collective: yes."""
        lifted = [self._sketch.transpose(whole_of(v), self._operator.space) for v in vectors]
        return [part_of(self._sketch.apply(product), self.space) for product in products(self._operator, lifted)]

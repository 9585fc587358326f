"""Partition: the entries of a space in numbered blocks. Reductions by block happen here, so algorithms see none."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hpc_hess.parallel.vector import Vector, VectorSpace

_CHUNK = 1 << 22


class Partition:
    """Blocks 0..count-1 of a space's entries.

    Parameters
    ----------
    ids : for each piece of this rank's shard the block of every entry, int64, in a shape that broadcasts to the piece's.
    sizes : entries of each block, over all ranks.
    names : of the blocks, where they have some.

    """

    def __init__(
        self, space: VectorSpace, ids: Sequence[torch.Tensor], sizes: Sequence[int], names: Sequence[str] = ()
    ) -> None:
        self.space, self.sizes, self.names = space, list(sizes), list(names)
        self._ids = [i.to(space.device) for i in ids]

    @property
    def count(self) -> int:
        """Number of blocks."""
        return len(self.sizes)

    def scaled(self, v: Vector, factors: torch.Tensor) -> Vector:
        """Return ``v`` with the entries of block b times ``factors[b]``. Collective: no."""
        out, factors = self.space.zeros(), factors.to(self.space.device, self.space.dtype)
        for piece, ids in zip(self.space.shard.pieces, self._ids, strict=True):
            if piece.stop > piece.start:
                part = v.data[piece.start : piece.stop].view(piece.local_shape)
                torch.mul(part, factors[ids], out=out.data[piece.start : piece.stop].view(piece.local_shape))
        return out

    def only(self, v: Vector, block: int) -> Vector:
        """Return ``v`` with zeros outside ``block``. Collective: no."""
        mask = torch.zeros(self.count)
        mask[block] = 1.0
        return self.scaled(v, mask)

    def dots(self, x: Vector, y: Vector) -> torch.Tensor:
        """Return the inner product of ``x`` and ``y`` within each block, float64 (count,). Collective: yes."""
        total = torch.zeros(self.count, dtype=torch.float64, device=self.space.device)
        for piece, ids in zip(self.space.shard.pieces, self._ids, strict=True):
            a, b = x.data[piece.start : piece.stop], y.data[piece.start : piece.stop]
            if ids.numel() == 1:
                for p, q in zip(a.split(_CHUNK), b.split(_CHUNK), strict=True):
                    total[ids.flatten()[0]] += p.double().dot(q.double())
            elif a.numel():
                product = (a.double() * b.double()).view(piece.local_shape)
                others = [d for d in range(product.ndim) if ids.shape[d] == 1]
                total.index_add_(0, ids.flatten(), (product.sum(others) if others else product).flatten())
        return self.space.sum(total, "inner products by block").cpu()

"""What sketches are made of: linear maps of blocks of a vector, each with its adjoint, and the sum over blocks.

A sketch cuts R^N into blocks of M entries of the global index. z [k, M] holds k of them; ``blocks`` are their numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Protocol

import torch

from hpc_hess.sketch import streams
from hpc_hess.sketch.streams import Use
from hpc_hess.sketch.transforms import Transform


class Factor(Protocol):
    """A linear map of each block. ``forward`` and ``adjoint`` may overwrite what they are given."""

    def forward(self, z: torch.Tensor, blocks: range) -> torch.Tensor:
        """Return the images [k, outputs] of z [k, inputs]."""
        ...

    def adjoint(self, z: torch.Tensor, blocks: range) -> torch.Tensor:
        """Return the images [k, inputs] of z [k, outputs] under the adjoint."""
        ...


class Collect(Protocol):
    """The linear map from all blocks together to one vector."""

    def collect(self, z: torch.Tensor, blocks: range) -> torch.Tensor:
        """Return what these blocks add to it: flat."""
        ...

    def spread(self, y: torch.Tensor, blocks: range) -> torch.Tensor:
        """Return what it gives these blocks under the adjoint: [k, entries]."""
        ...


class Signs:
    """Independent random signs: B."""

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def forward(self, z: torch.Tensor, blocks: range) -> torch.Tensor:
        return streams.flip_signs_(z.contiguous(), self._seed, blocks)

    adjoint = forward


class Gaussians:
    """A diagonal of standard normals: G_v. Blocks take windows of one table, each its own.

    The entries of a block are independent. Those of different blocks are too, but where windows overlap; the signs that
    come before keep their images uncorrelated there.
    """

    def __init__(self, seed: int, size: int, blocks: int) -> None:
        self._seed, self._size = seed, size
        self._windows = 1 << max(14, (blocks - 1).bit_length())  # each block's window begins elsewhere
        self._table: torch.Tensor | None = None

    def forward(self, z: torch.Tensor, blocks: range) -> torch.Tensor:
        if self._table is None or (self._table.dtype, self._table.device) != (z.dtype, z.device):
            long = streams.normals(self._seed, Use.TABLE, [0], self._windows + self._size, z.dtype, z.device)
            self._table = long[0]
        for row, block in enumerate(blocks):
            first = block * 0x9E3779B1 % self._windows  # an odd multiplier: distinct for distinct blocks
            z[row] *= self._table[first : first + self._size]
        return z

    adjoint = forward


class Permutations:
    """An independent random permutation of each block: Pi."""

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def forward(self, z: torch.Tensor, blocks: range) -> torch.Tensor:
        return z.gather(1, self._order(z, blocks))

    def adjoint(self, z: torch.Tensor, blocks: range) -> torch.Tensor:
        return torch.empty_like(z).scatter_(1, self._order(z, blocks), z)

    def _order(self, z: torch.Tensor, blocks: range) -> torch.Tensor:
        return streams.permutation(self._seed, Use.PERMUTATION, blocks, z.shape[1], z.device)


class Same:
    """The same transform of every block."""

    def __init__(self, transform: Transform) -> None:
        self._transform = transform

    def forward(self, z: torch.Tensor, blocks: range) -> torch.Tensor:
        return self._transform.forward(z)

    def adjoint(self, z: torch.Tensor, blocks: range) -> torch.Tensor:
        return self._transform.adjoint(z)


class Sum:
    """The plain sum of the blocks."""

    def collect(self, z: torch.Tensor, blocks: range) -> torch.Tensor:
        return z.sum(0)

    def spread(self, y: torch.Tensor, blocks: range) -> torch.Tensor:
        return y.expand(len(blocks), -1).clone()


class Mix:
    """A matrix [d, blocks] along the blocks: the outermost factor of a Kronecker product over the whole vector."""

    def __init__(self, matrix: torch.Tensor) -> None:
        self._matrix = matrix

    def collect(self, z: torch.Tensor, blocks: range) -> torch.Tensor:
        return (self._columns(z, blocks) @ z).flatten()

    def spread(self, y: torch.Tensor, blocks: range) -> torch.Tensor:
        return self._columns(y, blocks).T @ y.view(len(self._matrix), -1)

    def _columns(self, like: torch.Tensor, blocks: range) -> torch.Tensor:
        return self._matrix[:, blocks.start : blocks.stop].to(dtype=like.dtype, device=like.device)


class Sparse:
    """A sparse Gaussian matrix [D, M] for each block, with ``entries`` non-zero ones in expectation: G_s."""

    def __init__(self, seed: int, dimension: int, size: int, entries: int) -> None:
        self._seed, self._dimension, self._size, self._entries = seed, dimension, size, entries

    def collect(self, z: torch.Tensor, blocks: range) -> torch.Tensor:
        out = z.new_zeros(self._dimension)
        for row, block in enumerate(blocks):
            rows, columns, values = self._drawn(z, block)
            out.index_add_(0, rows, values.mul_(z[row, columns]))
        return out

    def spread(self, y: torch.Tensor, blocks: range) -> torch.Tensor:
        out = y.new_zeros((len(blocks), self._size))
        for row, block in enumerate(blocks):
            rows, columns, values = self._drawn(y, block)
            out[row].index_add_(0, columns, values.mul_(y[rows]))
        return out

    def _drawn(self, like: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        both = streams.words(self._seed, Use.SPARSE, [block], 2 * self._entries, like.device)[0]
        values = streams.normals(self._seed, Use.SPARSE_VALUES, [block], self._entries, like.dtype, like.device)[0]
        values *= math.sqrt(self._dimension * self._size / self._entries)  # so that entries have variance 1
        return both[: self._entries] % self._dimension, both[self._entries :] % self._size, values


class Dense:
    """A dense matrix [D, M] of random signs or normals for each block, made when it is needed (as TRAK does)."""

    _ENTRIES = 1 << 22  # made at a time

    def __init__(self, seed: int, dimension: int, size: int, *, gaussian: bool) -> None:
        self._seed, self._dimension, self._size, self._gaussian = seed, dimension, size, gaussian

    def collect(self, z: torch.Tensor, blocks: range) -> torch.Tensor:
        out = z.new_zeros(self._dimension)
        for row, block in enumerate(blocks):
            for first, part in self._parts(z, block):
                out += z[row, first : first + len(part)] @ part
        return out

    def spread(self, y: torch.Tensor, blocks: range) -> torch.Tensor:
        out = y.new_empty((len(blocks), self._size))
        for row, block in enumerate(blocks):
            for first, part in self._parts(y, block):
                torch.mv(part, y, out=out[row, first : first + len(part)])
        return out

    def _parts(self, like: torch.Tensor, block: int) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield the matrix's transpose in parts: (first row, rows [width, D])."""
        width = min(self._size, max(1, self._ENTRIES // self._dimension))
        for first in range(0, self._size, width):
            which = [block * self._size + first]
            if self._gaussian:
                drawn = streams.normals(self._seed, Use.DENSE, which, width * self._dimension, like.dtype, like.device)
                yield first, drawn.view(width, self._dimension)
            else:
                ones = torch.ones((1, width * self._dimension), dtype=like.dtype, device=like.device)
                yield first, streams.flip_signs_(ones, self._seed, which).view(width, self._dimension)

"""Random bits, normals and permutations of a sketch: functions of (seed, what for, block), the same on every rank."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum

import torch

from hpc_hess.linalg.probes import Purpose, box_muller, philox

_MASK = 0xFFFFFFFF


class Use(IntEnum):
    """Third counter word: keeps the streams of a sketch apart."""

    SIGNS = 0
    TABLE = 1
    HAAR = 2
    ROWS = 3
    COLUMNS = 4
    PERMUTATION = 5
    SPARSE = 6
    SPARSE_VALUES = 7
    DENSE = 8
    DIRECTIONS = 9


def words(seed: int, use: Use, blocks: Sequence[int] | range, count: int, device: torch.device) -> torch.Tensor:
    """Return 32-bit words as int64 [len(blocks), count]; ``count`` is a multiple of four, or cut from one."""
    quads = -(-count // 4)
    index = torch.arange(quads, dtype=torch.int64, device=device).repeat(len(blocks))
    block = torch.tensor(list(blocks), dtype=torch.int64, device=device).repeat_interleave(quads)
    counter = (index, block & _MASK, int(use) | (block >> 32) << 8, int(Purpose.SKETCH))
    found = torch.stack(philox(counter, (seed & _MASK, (seed >> 32) & _MASK)), dim=1)
    return found.view(len(blocks), 4 * quads)[:, :count]


def normals(
    seed: int, use: Use, blocks: Sequence[int] | range, count: int, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """Return standard normals [len(blocks), count]."""
    return box_muller(words(seed, use, blocks, count + count % 2, device), dtype)[:, :count]


def permutation(seed: int, use: Use, blocks: Sequence[int] | range, length: int, device: torch.device) -> torch.Tensor:
    """Return random permutations [len(blocks), length], int64."""
    return torch.argsort(words(seed, use, blocks, length, device), dim=1, stable=True)


def flip_signs_(z: torch.Tensor, seed: int, blocks: Sequence[int] | range) -> torch.Tensor:
    """Multiply z [len(blocks), M] by random signs in place. M a power of two, float32 or float64.

    Entry i takes bit i // (M / 32) of word i % (M / 32): the sign bits of whole rows are flipped at a time.
    """
    count, size = z.shape
    lanes = min(32, size)
    drawn = words(seed, Use.SIGNS, blocks, size // lanes, z.device).unsqueeze(1)
    shifts = torch.arange(lanes, device=z.device).view(1, lanes, 1)
    kind = torch.int64 if z.dtype == torch.float64 else torch.int32
    # multiplication shifts, modulo the width: products are vectorised where shifts are not
    up = torch.ones((), dtype=kind, device=z.device) << (torch.iinfo(kind).bits - 1 - shifts).to(kind)
    bits = drawn.to(kind) * up
    bits &= torch.iinfo(kind).min
    z.view(kind).view(count, lanes, -1).bitwise_xor_(bits)
    return z

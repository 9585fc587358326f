"""Bounded transfers between a rank's flat local vector and its intervals of a row in a file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from h5py import h5s
from numpy.typing import NDArray

from hpc_hess.parallel.layout import Int64

MAX_BYTES = 256 << 20  # one call; HDF5 over MPI fails beyond 2 GiB


@dataclass(frozen=True)
class Block:
    """``count`` intervals of ``length`` entries, ``stride`` apart from ``start`` on; ``local`` is their place here."""

    local: int
    start: int
    stride: int
    count: int
    length: int

    @property
    def size(self) -> int:
        """Number of entries."""
        return self.count * self.length


def regular_blocks(starts: Int64, lengths: Int64) -> list[Block]:
    """Join runs of equal, equally spaced intervals: a parameter sharded on an inner dimension becomes one block.

    Regular blocks are also all that HDF5 1.10 can store beyond 2**32 entries: an irregular union fails there.
    """
    if len(starts) == 0:
        return []
    locals_ = np.cumsum(lengths) - lengths
    gap = np.diff(starts)
    blocks, i, n = [], 0, len(starts)
    while i < n:
        j = i + 1
        if j < n and lengths[j] == lengths[i]:
            # the first place where the length or the gap changes ends the run
            step = min(n, i + 1 + 64)
            while True:
                bad = np.flatnonzero((lengths[j:step] != lengths[i]) | (gap[j - 1 : step - 1] != gap[i]))
                if len(bad):
                    j += int(bad[0])
                    break
                j = step
                if step == n:
                    break
                step = min(n, i + 2 * (step - i))
        stride = int(gap[i]) if j - i > 1 else int(lengths[i])
        blocks.append(Block(int(locals_[i]), int(starts[i]), stride, j - i, int(lengths[i])))
        i = j
    return blocks


def bounded(blocks: list[Block], itemsize: int, max_bytes: int = MAX_BYTES) -> list[Block]:
    """Split blocks so that none moves more than ``max_bytes``."""
    most = max(1, max_bytes // itemsize)
    out = []
    for b in blocks:
        if b.length > most:
            for k in range(b.count):
                for at in range(0, b.length, most):
                    n = min(most, b.length - at)
                    out.append(Block(b.local + k * b.length + at, b.start + k * b.stride + at, n, 1, n))
            continue
        per_call = most // b.length
        for k in range(0, b.count, per_call):
            n = min(per_call, b.count - k)
            out.append(Block(b.local + k * b.length, b.start + k * b.stride, b.stride, n, b.length))
    return out


def clipped(blocks: list[Block], start: int, stop: int) -> list[Block]:
    """Return what of ``blocks`` holds the local entries start..stop-1; their places count from ``start``."""
    out = []
    for b in blocks:
        low, high = max(start, b.local), min(stop, b.local + b.size)
        while low < high:
            k, inside = divmod(low - b.local, b.length)
            first = b.start + k * b.stride + inside
            if inside == 0 and high - low >= b.length:
                n = (high - low) // b.length
                out.append(Block(low - start, first, b.stride, n, b.length))
                low += n * b.length
            else:  # a part of an interval
                n = min(b.length - inside, high - low)
                out.append(Block(low - start, first, n, 1, n))
                low += n
    return out


def write_blocks(dataset: Any, row: int, blocks: list[Block], values: NDArray) -> None:
    """Write ``values`` (flat, contiguous) into row ``row`` of an open h5py data set. Independent of other ranks."""
    space = dataset.id.get_space()
    for b in blocks:
        space.select_hyperslab((row, b.start), (1, b.count), (1, b.stride), (1, b.length))
        dataset.id.write(h5s.create_simple((b.size,)), space, values[b.local : b.local + b.size])


def read_blocks(dataset: Any, row: int, blocks: list[Block], out: NDArray) -> None:
    """Read row ``row`` of an open h5py data set into ``out`` (flat, contiguous). Independent of other ranks."""
    space = dataset.id.get_space()
    for b in blocks:
        space.select_hyperslab((row, b.start), (1, b.count), (1, b.stride), (1, b.length))
        dataset.id.read(h5s.create_simple((b.size,)), space, out[b.local : b.local + b.size])


def overlaps(mine: tuple[Int64, Int64], theirs: tuple[Int64, Int64]) -> list[tuple[int, int, int]]:
    """Return (local place here, local place there, length) of every stretch two ascending interval lists share."""
    (a_start, a_len), (b_start, b_len) = mine, theirs
    a_local, b_local = np.cumsum(a_len) - a_len, np.cumsum(b_len) - b_len
    out: list[tuple[int, int, int]] = []
    j = 0
    for i in range(len(a_start)):
        low, high = int(a_start[i]), int(a_start[i] + a_len[i])
        j = max(j, int(np.searchsorted(b_start, low, side="right")) - 1)
        k = j
        while k < len(b_start) and b_start[k] < high:
            begin, end = max(low, int(b_start[k])), min(high, int(b_start[k] + b_len[k]))
            if begin < end:
                here, there = int(a_local[i]) + begin - low, int(b_local[k]) + begin - int(b_start[k])
                if out and out[-1][0] + out[-1][2] == here and out[-1][1] + out[-1][2] == there:
                    out[-1] = (out[-1][0], out[-1][1], out[-1][2] + end - begin)
                else:
                    out.append((here, there, end - begin))
            k += 1
    return out

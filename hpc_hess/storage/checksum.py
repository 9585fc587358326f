"""The checksum of one row: independent of the number of ranks, so that it survives a resume on other ranks.

A row is read as a sequence of little-endian words (32 bits; 16 for 2-byte types), word w of the whole row lying on some
rank. Its checksum is ``sum_w word[w] * multiplier(w) mod 2**64`` with an odd multiplier hashed from w: every rank sums
its own words, one exact integer reduction joins the parts. A changed word always changes the sum, exchanged words and
blocks do with probability 1 - 2**-32 or better. Words of 64 bits would not do: the signs of two doubles would cancel.
A sum of 0, such as of a row of zeros, is kept as ``ZERO``: in a file 0 stands for a row that was never written.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from hpc_hess.parallel.layout import Int64

_MASK = (1 << 64) - 1
ZERO = _MASK
_BLOCK = 1 << 15  # words per table: 256 KiB of multipliers, which stay in cache
_GOLDEN = 0x9E3779B97F4A7C15
_SHORT = 2048  # words of an interval below which multipliers are looked up instead of sliced from the table
_BLOCK_SALT = 0x13198A2E03707344


def _mix(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Splitmix64's finalizer, elementwise."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _odd_hash(index: NDArray[np.int64], salt: int) -> NDArray[np.uint64]:
    return _mix(index.astype(np.uint64) * np.uint64(_GOLDEN) + np.uint64(salt)) | np.uint64(1)


_TABLE = _odd_hash(np.arange(_BLOCK, dtype=np.int64), 0x243F6A8885A308D3)


def _block_multipliers(first: int, count: int) -> NDArray[np.uint64]:
    return _odd_hash(np.arange(first, first + count, dtype=np.int64), _BLOCK_SALT)


def multiplier(word: int) -> int:
    """Return the multiplier of word index ``word``: an odd 64-bit integer. Local, no communication."""
    return int(_TABLE[word % _BLOCK]) * int(_block_multipliers(word // _BLOCK, 1)[0]) & _MASK


def partial_checksum(values: NDArray, starts: Int64, lengths: Int64) -> int:
    """Return this rank's part of a row's checksum, in 0..2**64-1. Local, no communication.

    Parameters
    ----------
    values : flat contiguous local entries, of 2, 4 or 8 bytes each, in interval order.
    starts, lengths : intervals of the row (in entries) they belong to.

    """
    size = values.dtype.itemsize
    words = np.ascontiguousarray(values).reshape(-1).view(np.uint16 if size == 2 else np.uint32)
    factor = size // words.dtype.itemsize
    starts, lengths = np.asarray(starts, np.int64) * factor, np.asarray(lengths, np.int64) * factor
    if int(lengths.sum()) != len(words):
        raise ValueError(f"{len(values)} values do not fill intervals of {int(lengths.sum()) // factor}")
    places = np.cumsum(lengths) - lengths
    short = lengths < _SHORT
    total = _sum_short(words, starts[short], lengths[short], places[short])
    for start, length, at in zip(*(a[~short].tolist() for a in (starts, lengths, places)), strict=True):
        total += _sum_interval(words[at : at + length], start)
    return total & _MASK


def combine(parts: list[int]) -> int:
    """Return a row's checksum, never 0, from the ranks' parts. Local, no communication."""
    return (sum(parts) & _MASK) or ZERO


def _sum_interval(words: NDArray, start: int) -> int:
    """Sum over one interval: a ragged head and tail, whole blocks of the table between them."""
    total, at, stop = 0, 0, len(words)
    while at < stop:
        block, inside = divmod(start + at, _BLOCK)
        if inside == 0 and stop - at >= _BLOCK:
            count = min((stop - at) // _BLOCK, 256)
            sums = np.einsum("ij,j->i", words[at : at + count * _BLOCK].reshape(count, _BLOCK), _TABLE, dtype=np.uint64)
            total += int(np.einsum("i,i->", sums, _block_multipliers(block, count)))
            at += count * _BLOCK
        else:
            count = min(_BLOCK - inside, stop - at)
            part = np.einsum("i,i->", words[at : at + count], _TABLE[inside : inside + count], dtype=np.uint64)
            total += int(part) * int(_block_multipliers(block, 1)[0])
            at += count
    return total


def _sum_short(words: NDArray, starts: Int64, lengths: Int64, places: Int64) -> int:
    """Sum over many short intervals, some 2**16 words at a time, with the multiplier of every word looked up."""
    total = 0
    ends = np.cumsum(lengths)
    first = 0
    while first < len(lengths):
        done = int(ends[first - 1]) if first else 0
        last = max(first + 1, int(np.searchsorted(ends, done + (1 << 16), side="right")))
        n = lengths[first:last]
        inside = np.arange(int(n.sum()), dtype=np.int64) - np.repeat(np.cumsum(n) - n, n)
        index = inside + np.repeat(starts[first:last], n)
        block = index >> 15
        low, span = (int(block[0]), int(block[-1] - block[0]) + 1) if len(block) else (0, 1)  # ascending
        outer = _block_multipliers(low, span)[block - low] if span < 1 << 16 else _odd_hash(block, _BLOCK_SALT)
        here = words[inside + np.repeat(places[first:last], n)]
        total += int(np.einsum("i,i,i->", here, _TABLE[index & (_BLOCK - 1)], outer, dtype=np.uint64))
        first = last
    return total

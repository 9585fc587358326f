"""Random vectors that are a function of (seed, stream, global index): the same on 1 or 512 ranks.

The generator is Philox4x32-10 (Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011),
checked in the tests against the test vectors its authors published. Key: the seed's low and high 32 bits. Counter:
(block low, block high, stream, purpose), where a block covers 128 signs (one bit each) or 4 normals.

* sign of entry i: bit ``i % 32`` of word ``(i // 32) % 4`` of block ``i // 128``; a set bit means -1;
* normal of entry i: Box-Muller in block ``i // 4``, on words (0, 1) for ``i % 4`` in (0, 1), on words (2, 3) else.

Signs are bitwise equal everywhere; normals are equal up to the rounding of log, cos and sin.
"""

from __future__ import annotations

import math
from enum import IntEnum

import numpy as np
import torch

from hpc_hess.parallel.vector import Vector, VectorSpace

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF
_CHUNK = 1 << 18  # blocks per pass: temporaries of 2 MiB stay in cache


class Purpose(IntEnum):
    """Fourth counter word: keeps streams for different uses apart."""

    SIGNS = 0
    NORMALS = 1
    WEIGHTS = 2
    SKETCH = 3


def philox(counter: tuple[torch.Tensor | int, ...], key: tuple[int, int]) -> list[torch.Tensor]:
    """Philox4x32-10 on int64 tensors that hold 32-bit words. Returns four tensors of words in [0, 2^32)."""
    words = [c if isinstance(c, torch.Tensor) else torch.tensor(c, dtype=torch.int64) for c in counter]
    device = max((w for w in words), key=lambda w: w.numel()).device
    words = [w.to(device) for w in words]
    k0, k1 = key
    for _ in range(10):
        p0, p1 = words[0] * _MULTIPLIERS[0], words[2] * _MULTIPLIERS[1]  # wraps to 64 bits, as wanted
        high0, high1 = (p0 >> 32) & _MASK, (p1 >> 32) & _MASK
        words = [high1 ^ words[1] ^ k0, p1 & _MASK, high0 ^ words[3] ^ k1, p0 & _MASK]
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return words


def box_muller(words: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return standard normals from pairs of 32-bit words: int64 [n, 2 k] to ``dtype`` [n, 2 k]."""
    # (word + 1/2) / 2^32 in float64 never is 0 or 1 before rounding; the float32 rounding of 1 gives log 1 = 0
    uniform = ((words.double() + 0.5) * 2.0**-32).to(dtype)
    radius, angle = torch.sqrt(-2.0 * torch.log(uniform[:, 0::2])), (2.0 * math.pi) * uniform[:, 1::2]
    return torch.stack([radius * torch.cos(angle), radius * torch.sin(angle)], dim=2).flatten(1)


def _blocks(seed: int, stream: int, purpose: Purpose, first: int, count: int, device: torch.device) -> torch.Tensor:
    """Return the words of ``count`` blocks from block ``first``: int64 (count, 4)."""
    index = torch.arange(first, first + count, dtype=torch.int64, device=device)
    counter = (index & _MASK, index >> 32, stream, int(purpose))
    words = philox(counter, (seed & _MASK, (seed >> 32) & _MASK))
    return torch.stack([w.expand(count) for w in words], dim=1)


def signs(
    seed: int,
    stream: int,
    start: int,
    length: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> torch.Tensor:
    """Return Rademacher entries [start, start + length) of a stream: +-1, shape (length,)."""
    device = torch.device(device)
    out = torch.empty(length, dtype=dtype, device=device)
    shifts = torch.arange(32, device=device)
    done = 0
    while done < length:
        first, skip = divmod(start + done, 128)
        count = min(_CHUNK, (skip + length - done + 127) // 128)
        words = _blocks(seed, stream, Purpose.SIGNS, first, count, device)
        bits = ((words.unsqueeze(-1) >> shifts) & 1).to(torch.int8).flatten()[skip : skip + length - done]
        out[done : done + bits.numel()] = 1 - 2 * bits
        done += bits.numel()
    return out


def normals(
    seed: int,
    stream: int,
    start: int,
    length: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    purpose: Purpose = Purpose.NORMALS,
) -> torch.Tensor:
    """Return standard normal entries [start, start + length) of a stream, shape (length,)."""
    device = torch.device(device)
    out = torch.empty(length, dtype=dtype, device=device)
    work = torch.float64 if dtype == torch.float64 else torch.float32
    done = 0
    while done < length:
        first, skip = divmod(start + done, 4)
        count = min(_CHUNK, (skip + length - done + 3) // 4)
        words = _blocks(seed, stream, purpose, first, count, device)
        values = box_muller(words, work).flatten()[skip : skip + length - done]
        out[done : done + values.numel()] = values
        done += values.numel()
    return out


def fill(out: torch.Tensor, starts: np.ndarray, lengths: np.ndarray, *, seed: int, probe: int, distribution: str) -> None:
    """Fill the flat local vector ``out`` with probe number ``probe`` on the given global intervals. Local.

    ``distribution`` is "rademacher" (entries +-1) or "gaussian" (standard normal); both have covariance I.
    """
    draw = signs if distribution == "rademacher" else normals
    position = 0
    for start, length in zip(starts.tolist(), lengths.tolist(), strict=True):
        out[position : position + length] = draw(seed, probe, start, length, dtype=out.dtype, device=out.device)
        position += length


def draw(space: VectorSpace, *, seed: int, probe: int, distribution: str) -> Vector:
    """Return probe number ``probe`` of a space, as :func:`fill` makes it. Collective: no."""
    v = space.zeros()
    fill(v.data, *space.shard.global_intervals, seed=seed, probe=probe, distribution=distribution)
    return v

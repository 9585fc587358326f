"""Local vector kernels: float64 sums over float32 data, in blocks small enough for cache.

Each sweep over the Krylov basis reads it once. Subtracting the first projection and computing the second share a
sweep, as do the second subtraction and the norm, so two passes of Gram-Schmidt cost three sweeps instead of four.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch

_CACHE_ENTRIES = 1 << 17  # float64 entries of a block: 1 MiB, half of a common second-level cache
_DEVICE_ENTRIES = 1 << 26  # on a GPU launches cost more than cache misses


def _blocks(rows: int, size: int, device: torch.device) -> Iterator[slice]:
    entries = _CACHE_ENTRIES if device.type == "cpu" else _DEVICE_ENTRIES
    width = max(1024, entries // (rows + 1))
    for start in range(0, size, width):
        yield slice(start, min(start + width, size))


def dot(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return sum a_i b_i as a float64 tensor of shape (1,)."""
    total = torch.zeros(1, dtype=torch.float64, device=a.device)
    for block in _blocks(1, a.numel(), a.device):
        total += torch.dot(a[block].double(), b[block].double())
    return total


def project(rows: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """Return rows @ w in float64; rows (k, n), w (n,)."""
    total = torch.zeros(rows.shape[0], dtype=torch.float64, device=w.device)
    for block in _blocks(rows.shape[0], w.numel(), w.device):
        total += torch.mv(rows[:, block].to(w.device).double(), w[block].double())
    return total


def subtract_then_project(rows: torch.Tensor, w: torch.Tensor, coefficients: torch.Tensor) -> torch.Tensor:
    """Do w -= rows^T coefficients in place and return rows @ w of the new w, in one sweep over ``rows``."""
    total = torch.zeros(rows.shape[0], dtype=torch.float64, device=w.device)
    for block in _blocks(rows.shape[0], w.numel(), w.device):
        part = rows[:, block].to(w.device).double()
        w[block] -= torch.mv(part.T, coefficients)
        total += torch.mv(part, w[block].double())
    return total


def subtract_then_square(rows: torch.Tensor, w: torch.Tensor, coefficients: torch.Tensor) -> torch.Tensor:
    """Do w -= rows^T coefficients in place and return |w|^2 (shape (1,)) of the new w, in one sweep over ``rows``."""
    total = torch.zeros(1, dtype=torch.float64, device=w.device)
    for block in _blocks(rows.shape[0], w.numel(), w.device):
        w[block] -= torch.mv(rows[:, block].to(w.device).double().T, coefficients)
        part = w[block].double()
        total += torch.dot(part, part)
    return total


def combine(rows: torch.Tensor, coefficients: torch.Tensor, out: torch.Tensor) -> None:
    """Write out = rows^T coefficients, accumulated in float64."""
    for block in _blocks(rows.shape[0], out.numel(), out.device):
        out[block] = torch.mv(rows[:, block].to(out.device).double().T, coefficients)


_LOW_BITS = 29  # of a float64 mantissa that a float32 has no place for


@functools.cache
def _dither(device: torch.device) -> torch.Tensor:
    """Uniform integers below 2**29, int64, the same in every process."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(1 << _LOW_BITS, (1 << 16,), generator=generator).to(device)


def displace(
    out: torch.Tensor, base: torch.Tensor, direction: torch.Tensor, step: float, *, dither: bool = False
) -> torch.Tensor:
    """Write out = base + step * direction and return <out - base, direction> as a float64 tensor of shape (1,).

    All flat. The sum is rounded once; with ``dither`` (float32 only) up or down at random, so that what is stored is
    right on average: to the nearest, steps below half a spacing of the stored numbers would all be lost.
    """
    total = torch.zeros(1, dtype=torch.float64, device=out.device)
    noise = _dither(out.device) if dither and out.dtype == torch.float32 else None
    for block in _blocks(1, out.numel(), out.device):
        along = direction[block].double()
        if noise is None:
            torch.add(base[block], direction[block], alpha=step, out=out[block])
        else:
            exact = base[block].double().add_(along, alpha=step)
            for part in exact.view(torch.int64).split(noise.numel()):
                part.add_(noise[: part.numel()]).bitwise_and_(-1 << _LOW_BITS)
            out[block] = exact
        total += torch.dot((out[block] - base[block]).double(), along)  # the difference is exact: near equals
    return total

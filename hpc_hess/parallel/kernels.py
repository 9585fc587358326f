"""Local vector kernels: float64 sums over float32 data, in blocks that stay in cache.

Each sweep over the Krylov basis reads it once. Subtracting the first projection and computing the second share a
sweep, as do the second subtraction and the norm, so two passes of Gram-Schmidt cost three sweeps instead of four.

On a CPU, where converting a float32 basis costs as much again as reading it, the projections are float32 within short
blocks and float64 over these. The second pass takes up what the first leaves, and norms and dots are float64 throughout:
on 34 M entries alpha is within 1.1e-9 of |w| and beta within 1.4e-8 of itself, whatever the vectors (all in float64
6e-12; plain float32 sums over 134 M entries moved alpha by 3e-3).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

import torch

_THREAD_ENTRIES = 1 << 20  # float64 entries of a block for each thread: 8 MiB; smaller ones cost more in starts of loops
_CPU_ENTRIES = 1 << 22  # at most: a block should stay in the last-level cache
# Fewer threads do the sweeps no service: two cores took 0.7 s with two threads, 0.92 s with one, and at random up to 4 s
# with two, waiting for each other at each of thousands of barriers while the host ran something else.
_FEW_THREADS = 4
_FLOAT32_WIDTH = 1 << 15  # columns summed in float32: shorter is slower, longer loses digits
_ROW = 1 << 12  # terms that are summed in float32: relative to the sum of their sizes 1e-9 is lost of 30 M terms
_DEVICE_ENTRIES = 1 << 26  # on a GPU launches cost more than cache misses


_pretending = False


@contextlib.contextmanager
def as_on_gpu() -> Iterator[None]:
    """Cut CPU tensors as a GPU's are cut: for a program that is traced as if it ran on one."""
    global _pretending
    before, _pretending = _pretending, True
    try:
        yield
    finally:
        _pretending = before


def _on_cpu(device: torch.device) -> bool:
    return device.type == "cpu" and not _pretending


def _width(rows: int, device: torch.device, threads: int) -> int:
    """Return how many columns of ``rows`` rows fit a block."""
    entries = _DEVICE_ENTRIES
    if _on_cpu(device):
        entries = min(_THREAD_ENTRIES * threads, _CPU_ENTRIES)
    return max(1024, entries // rows)


def _blocks(rows: int, size: int, device: torch.device) -> Iterator[slice]:
    """Cut ``size`` columns so that ``rows`` of them fit a block."""
    width = _width(rows, device, torch.get_num_threads())
    for start in range(0, size, width):
        yield slice(start, min(start + width, size))


@contextlib.contextmanager
def _few_threads_as_one() -> Iterator[None]:
    threads = torch.get_num_threads()
    if threads < _FEW_THREADS:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _doubled(rows: torch.Tensor, w: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
    """Yield block, rows[:, block] and w[block], the two as float64 in a buffer that the next block overwrites."""
    num_rows, buffer = rows.shape[0], torch.empty(0, dtype=torch.float64, device=w.device)
    with _few_threads_as_one():
        for block in _blocks(num_rows + 1, w.numel(), w.device):
            width = block.stop - block.start
            if not buffer.numel():  # the first block is the widest
                buffer = torch.empty((num_rows + 1) * width, dtype=torch.float64, device=w.device)
            part, x = buffer[width : (num_rows + 1) * width].view(num_rows, width), buffer[:width]
            yield block, part.copy_(rows[:, block]), x.copy_(w[block])


def _in_float32(num_rows: int, dtypes: set[torch.dtype], device: torch.device) -> bool:
    return _on_cpu(device) and dtypes == {torch.float32} and num_rows > 1  # a dot stays float64


def sweep_width(num_rows: int, dtypes: set[torch.dtype], device: torch.device) -> int:
    """Return the columns of one block of a sweep over ``num_rows`` rows; ``dtypes`` of rows and vector, ``device`` of it.

    Panels of whole blocks, swept one after the other with the same ``total``, give the sums of one sweep to the last bit.
    """
    if _in_float32(num_rows, dtypes, device):
        return _FLOAT32_WIDTH
    threads = torch.get_num_threads()
    return _width(num_rows + 1, device, 1 if threads < _FEW_THREADS else threads)


def _swept(rows: torch.Tensor, w: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
    """As ``_doubled``; two float32 rows or more on a CPU as they are, in short blocks."""
    if not _in_float32(rows.shape[0], {rows.dtype, w.dtype}, w.device):
        yield from _doubled(rows, w)
        return
    with _few_threads_as_one():
        for start in range(0, w.numel(), _FLOAT32_WIDTH):
            block = slice(start, min(start + _FLOAT32_WIDTH, w.numel()))
            yield block, rows[:, block], w[block]


def _zeros(count: int, like: torch.Tensor) -> torch.Tensor:
    return torch.zeros(count, dtype=torch.float64, device=like.device)


def dot(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return sum a_i b_i as a float64 tensor of shape (1,)."""
    return project(a.unsqueeze(0), b)


def project(rows: torch.Tensor, w: torch.Tensor, total: torch.Tensor | None = None) -> torch.Tensor:
    """Return rows @ w in float64; rows (k, n), w (n,). ``total``, if given, is added to in place: sums over panels."""
    total = _zeros(rows.shape[0], w) if total is None else total
    for _, part, x in _swept(rows, w):
        total += torch.mv(part, x)
    return total


def subtract_then_project(
    rows: torch.Tensor, w: torch.Tensor, coefficients: torch.Tensor, total: torch.Tensor | None = None
) -> torch.Tensor:
    """Do w -= rows^T coefficients in place and return rows @ w of the new w, in one sweep over ``rows``."""
    total = _zeros(rows.shape[0], w) if total is None else total
    for part, x in _subtracted(rows, w, coefficients):
        total += torch.mv(part, x)
    return total


def subtract_then_square(
    rows: torch.Tensor, w: torch.Tensor, coefficients: torch.Tensor, total: torch.Tensor | None = None
) -> torch.Tensor:
    """Do w -= rows^T coefficients in place and return |w|^2 (shape (1,)) of the new w, in one sweep over ``rows``."""
    total = _zeros(1, w) if total is None else total
    for _, x in _subtracted(rows, w, coefficients):
        x = x.double()
        total += torch.dot(x, x)
    return total


def _subtracted(
    rows: torch.Tensor, w: torch.Tensor, coefficients: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Do w -= rows^T coefficients block by block; yield each block of rows and of the new w, as stored."""
    for block, part, x in _swept(rows, w):
        torch.addmv(x, part.T, coefficients.to(x.dtype), alpha=-1, out=x)
        w[block] = x  # nothing where it is a view of just that
        if x.dtype != w.dtype:
            x.copy_(w[block])  # as rounded
        yield part, x


def combine(rows: torch.Tensor, coefficients: torch.Tensor, out: torch.Tensor) -> None:
    """Write out = rows^T coefficients, accumulated in float64."""
    for block, part, x in _doubled(rows, out):
        out[block] = torch.mv(part.T, coefficients, out=x)


def rotate_(rows: torch.Tensor, matrix: torch.Tensor) -> None:
    """Overwrite the first k of the m ``rows`` with matrix (k, m; float64) times rows, accumulated in float64."""
    count, m = matrix.shape
    with _few_threads_as_one():
        for block in _blocks(2 * m, rows.shape[1], rows.device):
            rows[:count, block] = matrix @ rows[:m, block].double()


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
    total = _zeros(1, out)
    noise = _dither(out.device) if dither and out.dtype == torch.float32 else None
    buffer = torch.empty(0, dtype=out.dtype, device=out.device)
    with _few_threads_as_one():
        for block in _blocks(2, out.numel(), out.device):
            buffer = buffer if buffer.numel() else out.new_empty(block.stop)  # the first block is the widest
            if noise is None:
                torch.add(base[block], direction[block], alpha=step, out=out[block])
            else:
                exact = base[block].double().add_(direction[block].double(), alpha=step)
                for part in exact.view(torch.int64).split(noise.numel()):
                    part.add_(noise[: part.numel()]).bitwise_and_(-1 << _LOW_BITS)
                out[block] = exact
            moved = torch.sub(out[block], base[block], out=buffer[: block.stop - block.start])  # exact: near equals
            total += _sum(moved.mul_(direction[block]))
    return total


def difference(a: torch.Tensor, b: torch.Tensor, factor: float) -> torch.Tensor:
    """Do a = factor * (a - b) in place, in one sweep, and return |a|^2 (shape (1,)) of the new a, as :func:`dot` would."""
    total, buffer = _zeros(1, a), torch.empty(0, dtype=torch.float64, device=a.device)
    with _few_threads_as_one():
        for block in _blocks(2, a.numel(), a.device):
            buffer = buffer if buffer.numel() else buffer.new_empty(block.stop)  # the first block is the widest
            part = buffer[: block.stop - block.start].copy_(a[block].sub_(b[block]).mul_(factor))
            total += torch.mv(part.unsqueeze(0), part)
    return total


def moments(v: torch.Tensor) -> torch.Tensor:
    """Return sum v_i^2 and sum v_i^4 as a float64 tensor of shape (2,)."""
    total, buffer = _zeros(2, v), torch.empty(0, dtype=v.dtype, device=v.device)
    with _few_threads_as_one():
        for block in _blocks(2, v.numel(), v.device):
            buffer = buffer if buffer.numel() else v.new_empty(block.stop)
            square = torch.square(v[block], out=buffer[: block.stop - block.start])
            total[0] += _sum(square)
            total[1] += _sum(square.square_())
    return total


def _sum(x: torch.Tensor) -> torch.Tensor:
    """Return the sum of ``x``: in its own dtype within short rows, in float64 over them."""
    whole = x.numel() - x.numel() % _ROW
    return x[:whole].view(-1, _ROW).sum(1).sum(dtype=torch.float64) + x[whole:].sum(dtype=torch.float64)

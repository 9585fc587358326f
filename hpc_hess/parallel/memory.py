"""Memory that a rank can still take, on the host and on its device, and what becomes of what it frees."""

from __future__ import annotations

import contextlib
import ctypes
import gc
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch

from hpc_hess.parallel.world import World


def host_bytes_free() -> int:
    """Bytes of host memory this node can still give, the control group's limit included."""
    free = psutil.virtual_memory().available
    limit, used, stat = (Path("/sys/fs/cgroup") / name for name in ("memory.max", "memory.current", "memory.stat"))
    with contextlib.suppress(OSError, ValueError, StopIteration):  # no control group, or "max"
        # file pages that can be dropped count as used
        droppable = next(int(line.split()[1]) for line in stat.read_text().splitlines() if line.startswith("inactive_file"))
        free = min(free, int(limit.read_text()) - int(used.read_text()) + droppable)
    return free


def device_bytes_free(world: World) -> int:
    """Bytes this rank can still take where it computes: on its GPU, or its share of the host. Differs between ranks."""
    if world.device.type == "cuda":
        cached = torch.cuda.memory_reserved(world.device) - torch.cuda.memory_allocated(world.device)
        return torch.cuda.mem_get_info(world.device)[0] + cached
    return host_bytes_free() // world.launch.local_size


# mallopt's parameters from glibc's malloc.h, and the values that it comes to by itself in a program like this
_MMAP_MAX, _MMAP_THRESHOLD, _TRIM_THRESHOLD = -4, -3, -1
_USUAL = {_MMAP_MAX: 1 << 16, _MMAP_THRESHOLD: 32 << 20, _TRIM_THRESHOLD: 64 << 20}


@contextlib.contextmanager
def reusing_freed_pages() -> Iterator[None]:
    """Inside, freed buffers of any size are kept for the next ones; all go back to the system at the end.

    Else each large buffer is mapped afresh and the system clears its pages: a third of a lock-step product's time on a
    CPU. Not for longer than a product: what outlives a buffer's neighbours would leave holes of the size of vectors.
    """
    try:
        libc = ctypes.CDLL(None)
        mallopt, trim = libc.mallopt, libc.malloc_trim
    except (OSError, AttributeError):  # glibc only
        yield
        return
    mallopt(_TRIM_THRESHOLD, -1)
    mallopt(_MMAP_MAX, 0)
    try:
        yield
    finally:
        for key, value in _USUAL.items():
            mallopt(key, value)
        trim(0)


def release_memory() -> None:
    """Give freed pages back to the system, so that loading does not count against the run."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # glibc only
        ctypes.CDLL(None).malloc_trim(0)


def gigabytes(count: float) -> str:
    """Return a number of bytes as messages show it."""
    count = max(count, 0)
    return f"{count / 1e6:.2f} MB" if 0 < count < 1e7 else f"{count / 1e9:.2f} GB"

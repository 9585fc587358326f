"""Memory that a rank can still take, on the host and on its device, and what becomes of what it frees."""

from __future__ import annotations

import contextlib
import ctypes
import gc
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


# mallopt's parameters, from glibc's malloc.h
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4


def reuse_freed_pages() -> None:
    """Let this process keep the pages it frees for what it allocates next.

    By default every weight-sized buffer is mapped afresh, and the system clears its pages once more: a third of a
    lock-step product's time on a CPU. The peak is what it was; what is free below it comes back with
    :func:`release_memory`.
    """
    with contextlib.suppress(OSError, AttributeError):  # glibc only
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, -1)
        libc.mallopt(_M_TOP_PAD, 64 << 20)


def release_memory() -> None:
    """Give freed pages back to the system, so that loading does not count against the run."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # glibc only
        ctypes.CDLL(None).malloc_trim(0)


def gigabytes(count: float) -> str:
    """Return a number of bytes as messages show it."""
    count = max(count, 0)
    return f"{count / 1e6:.2f} MB" if 0 < count < 1e7 else f"{count / 1e9:.2f} GB"

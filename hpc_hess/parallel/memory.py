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

# limit, usage, statistics, and there the file pages that can be dropped though they count as used
_VERSION_2 = ("memory.max", "memory.current", "memory.stat", "inactive_file")
_VERSION_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "memory.stat", "total_inactive_file")


def host_bytes_free() -> int:
    """Bytes of host memory this node can still give, the limits of this process's control groups included."""
    return min([psutil.virtual_memory().available, *_group_bytes_free(Path("/sys/fs/cgroup"), Path("/proc/self/cgroup"))])


def _group_bytes_free(root: Path, own: Path) -> Iterator[int]:
    """Yield what each control group around this process has left: version 2 at ``root`` itself, version 1 in memory/.

    ``own`` lists this process's groups; Slurm limits a job and a step in groups one within the other.
    """
    with contextlib.suppress(OSError):
        for line in own.read_text().splitlines():
            number, controllers, path = line.split(":", 2)
            if number == "0" or "memory" in controllers.split(","):
                top, names = (root, _VERSION_2) if number == "0" else (root / "memory", _VERSION_1)
                group = Path(path.lstrip("/"))
                for folder in (group, *group.parents):
                    with contextlib.suppress(OSError, ValueError, StopIteration):  # the root has none; "max" is none
                        yield _left(top / folder, *names)


def _left(folder: Path, limit: str, used: str, statistics: str, droppable: str) -> int:
    words = (line.split() for line in (folder / statistics).read_text().splitlines())
    can_go = next(int(value) for key, value in words if key == droppable)
    return int((folder / limit).read_text()) - int((folder / used).read_text()) + can_go


def device_bytes_free(world: World) -> int:
    """Bytes this rank can still take where it computes: on its GPU, or its share of the host. Differs between ranks."""
    if world.device.type == "cuda":
        cached = torch.cuda.memory_reserved(world.device) - torch.cuda.memory_allocated(world.device)
        return torch.cuda.mem_get_info(world.device)[0] + cached
    return host_bytes_free() // world.launch.local_size


def used_bytes(device: torch.device) -> int:
    """Memory of this process on its device now."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return psutil.Process().memory_info().rss


# mallopt's parameters from glibc's malloc.h, and the values that it comes to by itself in a program like this
_MMAP_MAX, _MMAP_THRESHOLD, _TRIM_THRESHOLD = -4, -3, -1
_USUAL = {_MMAP_MAX: 1 << 16, _MMAP_THRESHOLD: 32 << 20, _TRIM_THRESHOLD: 64 << 20}


@contextlib.contextmanager
def reusing_freed_pages() -> Iterator[None]:
    """Inside, freed buffers of any size are kept for the next ones; all go back to the system at the end.

    Else each large buffer is mapped afresh and the system clears its pages: a third of a lock-step product's time on a
    CPU, 13 to 25 % of a gradient's. Not for longer than a product: what outlives a buffer's neighbours would leave holes
    of the size of vectors.
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

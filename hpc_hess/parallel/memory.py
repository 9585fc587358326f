"""Memory that a rank can still take, on the host and on its device."""

from __future__ import annotations

import contextlib
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


def gigabytes(count: float) -> str:
    """Return a number of bytes as messages show it."""
    count = max(count, 0)
    return f"{count / 1e6:.2f} MB" if 0 < count < 1e7 else f"{count / 1e9:.2f} GB"

"""Memory that a rank can still take, on the host and on its device, and what becomes of what it frees."""

from __future__ import annotations

import gc

import psutil
import torch

from hpc_hess.parallel import devices
from hpc_hess.parallel.world import World
from hpc_hess.system import give_pages_back, group_bytes_free, peak_resident_bytes
from hpc_hess.system import reusing_freed_pages as reusing_freed_pages


def host_bytes_free() -> int:
    """Bytes of host memory this node can still give, the limits of this process's control groups included."""
    return min([psutil.virtual_memory().available, *group_bytes_free()])


def device_bytes_free(world: World) -> int:
    """Bytes this rank can still take where it computes: on its GPU, or its share of the host. Differs between ranks."""
    if devices.is_gpu(world.device):
        return devices.free_bytes(world.device)
    return host_bytes_free() // world.launch.local_size


def used_bytes(device: torch.device) -> int:
    """Memory of this process on its device now."""
    return devices.used_bytes(device) if devices.is_gpu(device) else psutil.Process().memory_info().rss


def peak_bytes(device: torch.device) -> int:
    """Peak memory of this process on its device: resident set on a CPU, allocated memory on a GPU."""
    return devices.peak_bytes(device) if devices.is_gpu(device) else peak_resident_bytes()


def release_memory() -> None:
    """Give freed pages back to the system, so that loading does not count against the run."""
    gc.collect()
    give_pages_back()


def gigabytes(count: float) -> str:
    """Return a number of bytes as messages show it."""
    count = max(count, 0)
    return f"{count / 1e6:.2f} MB" if 0 < count < 1e7 else f"{count / 1e9:.2f} GB"

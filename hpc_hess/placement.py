"""Where the Krylov basis lies, and whether it fits: decided before the first product."""

from __future__ import annotations

import contextlib
import resource
import sys
from pathlib import Path
from typing import Literal

import psutil
import torch

from hpc_hess.config import LanczosSection
from hpc_hess.errors import ConfigError
from hpc_hess.linalg.lanczos import basis_rows
from hpc_hess.parallel.vector import VectorSpace
from hpc_hess.parallel.world import World

_WORK_VECTORS = 4  # a product holds two gradients, its result is one of them, and the start vector is a third


def host_bytes_free() -> int:
    """Bytes of host memory this node can still give, the control group's limit included."""
    free = psutil.virtual_memory().available
    limit, used, stat = (Path("/sys/fs/cgroup") / name for name in ("memory.max", "memory.current", "memory.stat"))
    with contextlib.suppress(OSError, ValueError, StopIteration):  # no control group, or "max"
        # file pages that can be dropped count as used
        droppable = next(int(line.split()[1]) for line in stat.read_text().splitlines() if line.startswith("inactive_file"))
        free = min(free, int(limit.read_text()) - int(used.read_text()) + droppable)
    return free


def peak_bytes(device: torch.device) -> int:
    """Peak memory of this process on its device: resident set on a CPU, allocated memory on a GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def used_bytes(device: torch.device) -> int:
    """Memory of this process on its device now."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return psutil.Process().memory_info().rss


def place_basis(world: World, space: VectorSpace, lanczos: LanczosSection) -> torch.device:
    """Choose device or host memory for the basis. Collective: yes.

    Raises
    ------
    ConfigError : it fits nowhere; names the window, the steps and the number of ranks that would.

    """
    rows = basis_rows(lanczos.reorthogonalise, lanczos.steps)
    largest = int(world.max_over_ranks(space.size_local, "largest shard"))
    row_bytes = largest * torch.empty(0, dtype=space.dtype).element_size()
    host = host_bytes_free() // world.launch.local_size
    device = torch.cuda.mem_get_info(space.device)[0] if space.device.type == "cuda" else host
    free = {"device": device - _WORK_VECTORS * row_bytes, "host": host}
    if space.device.type == "cpu":
        free["host"] = free["device"]
    budget = {place: -int(world.max_over_ranks(-value, "free memory")) for place, value in free.items()}
    places: list[Literal["device", "host"]] = (
        ["device", "host"] if lanczos.basis_memory == "auto" else [lanczos.basis_memory]
    )
    for place in places:
        if rows * row_bytes <= budget[place]:
            return space.device if place == "device" else torch.device("cpu")
    most = max(budget[place] for place in places)
    raise ConfigError(
        f"the Krylov basis needs {rows} rows x {_gb(row_bytes)} = {_gb(rows * row_bytes)} on each rank, but only "
        f"{_gb(most)} are free; {_remedy(lanczos, rows, row_bytes, most, world.shard_size)}"
    )


def _remedy(lanczos: LanczosSection, rows: int, row_bytes: int, free: int, ranks: int) -> str:
    fitting = max(0, free // row_bytes)
    needed = ranks * -(-rows * row_bytes // free) if free > 0 else 0
    options = []
    if fitting >= 3:
        if lanczos.reorthogonalise == "full":
            options.append(f"lanczos.steps = {fitting}")
        options.append(f"lanczos.reorthogonalise = {fitting - 1}" if fitting > 3 else 'lanczos.reorthogonalise = "none"')
    options.append(f"about {needed} ranks" if needed else "more nodes")
    return " or ".join(options) + " would fit"


def _gb(count: int) -> str:
    return f"{max(count, 0) / 1e9:.2f} GB"

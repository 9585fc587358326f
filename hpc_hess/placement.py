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


def place_basis(
    world: World, space: VectorSpace, lanczos: LanczosSection, wanted: int = 1, at_least: int = 1
) -> tuple[int, torch.device]:
    """Choose for how many probes at a time there is room for a basis, and device or host memory. Collective: yes.

    Parameters
    ----------
    wanted : probes in lock-step; if lanczos.lock_step is "auto" fewer will do, on the device rather than on the host.
    at_least : as many as a group that is going on has.

    Raises
    ------
    ConfigError : it fits nowhere; names the window, the steps, the lock-step and the number of ranks that would.

    """
    most_wanted = max(wanted, at_least)
    widths = range(most_wanted, (at_least if lanczos.lock_step == "auto" else most_wanted) - 1, -1)
    rows = basis_rows(lanczos.reorthogonalise, lanczos.steps)
    largest = int(world.max_over_ranks(space.size_local, "largest shard"))
    row_bytes = largest * torch.empty(0, dtype=space.dtype).element_size()
    budget = _budget(world, space)
    places: list[Literal["device", "host"]] = (
        ["device", "host"] if lanczos.basis_memory == "auto" else [lanczos.basis_memory]
    )
    for place in places:
        for width in widths:
            if width * rows * row_bytes <= budget[place] - _work_bytes(width, row_bytes, space, place):
                return width, space.device if place == "device" else torch.device("cpu")
    width = widths[-1]
    most = max(budget[place] - _work_bytes(width, row_bytes, space, place) for place in places)
    what = f"{rows} rows" if width == 1 else f"{width} probes x {rows} rows"
    options = _remedy(lanczos, width, rows, row_bytes, most, world.shard_size)
    if width > at_least and (fewer := max(0, most) // (rows * row_bytes)) >= at_least:
        options.insert(0, f"lanczos.lock_step = {fewer}")
    raise ConfigError(
        f"the Krylov basis needs {what} x {_gb(row_bytes)} = {_gb(width * rows * row_bytes)} on each rank, but only "
        f"{_gb(most)} are free; {' or '.join(options)} would fit"
    )


def _budget(world: World, space: VectorSpace) -> dict[str, int]:
    """Return the bytes free for each rank on the device and on the host, the least over all ranks. Collective: yes."""
    host = host_bytes_free() // world.launch.local_size
    device = torch.cuda.mem_get_info(space.device)[0] if space.device.type == "cuda" else host
    free = {"device": device, "host": host}
    return {place: -int(world.max_over_ranks(-value, "free memory")) for place, value in free.items()}


def _work_bytes(width: int, row_bytes: int, space: VectorSpace, place: str) -> int:
    """Return the bytes of vectors beside the basis; they lie on the device, and each further probe has its product."""
    return (_WORK_VECTORS + width - 1) * row_bytes if place == "device" or space.device.type == "cpu" else 0


def _remedy(lanczos: LanczosSection, width: int, rows: int, row_bytes: int, free: int, ranks: int) -> list[str]:
    fitting = max(0, free // (width * row_bytes))
    needed = ranks * -(-width * rows * row_bytes // free) if free > 0 else 0
    options = []
    if fitting >= 3:
        if lanczos.reorthogonalise == "full":
            options.append(f"lanczos.steps = {fitting}")
        options.append(f"lanczos.reorthogonalise = {fitting - 1}" if fitting > 3 else 'lanczos.reorthogonalise = "none"')
    options.append(f"about {needed} ranks" if needed else "more nodes")
    return options


def _gb(count: int) -> str:
    return f"{max(count, 0) / 1e9:.2f} GB"

"""Where the Krylov basis lies, and whether it fits: decided before the first product."""

from __future__ import annotations

import resource
import sys
from typing import Literal

import psutil
import torch

from hpc_hess.config import Config, LanczosSection
from hpc_hess.errors import ConfigError
from hpc_hess.linalg.lanczos import basis_rows
from hpc_hess.model.blocklist import find_blocks
from hpc_hess.model.shard import ShardedModel
from hpc_hess.parallel.memory import gigabytes as _gb
from hpc_hess.parallel.memory import host_bytes_free
from hpc_hess.parallel.vector import VectorSpace
from hpc_hess.parallel.world import World
from hpc_hess.products import wants_reference

_WORK_VECTORS = 4  # a product holds two gradients, its result is one of them, and the start vector is a third
_CHECK_VECTORS = 2  # the exact product and its difference from the one it is compared with
# an exact product streams the parameters and the direction of a stage and of the next, as gathered and as unpacked;
# the gradient, its tangent, and the buffer it is sent in. Alone there is nothing to gather.
_STAGES, _STAGES_ALONE = 9, 3


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


def place_basis(world: World, space: VectorSpace, lanczos: LanczosSection, exact_bytes: int = 0) -> torch.device:
    """Choose device or host memory for the basis beside ``exact_bytes`` for exact products. Collective: yes.

    Raises
    ------
    ConfigError : it fits nowhere; names the window, the steps and the number of ranks that would.

    """
    rows = basis_rows(lanczos.reorthogonalise, lanczos.steps)
    largest = int(world.max_over_ranks(space.size_local, "largest shard"))
    row_bytes = largest * torch.empty(0, dtype=space.dtype).element_size()
    host = host_bytes_free() // world.launch.local_size
    device = torch.cuda.mem_get_info(space.device)[0] if space.device.type == "cuda" else host
    free = {"device": device - _WORK_VECTORS * row_bytes - exact_bytes, "host": host}
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
        f"{_gb(most)} are free beside the products; {_remedy(lanczos, rows, row_bytes, most, world.shard_size)}"
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


def exact_product_bytes(config: Config, model: ShardedModel) -> int:
    """Bytes a rank needs on its device for exact products and comparisons with them, activations aside.

    The skeleton they stream through has no memory of its own. 0 where the run takes no exact product.
    """
    checked = wants_reference(config)
    if not checked and config.operator.method != "exact":
        return 0
    numel = {id(p): p.numel() for p in model.module.parameters()}
    of_blocks = [[id(p) for p in block.parameters()] for block in find_blocks(model.module) or ()]
    outside = numel.keys() - {p for block in of_blocks for p in block}
    stage = max([sum(numel[p] for p in block) for block in of_blocks] + [numel[p] for p in outside])
    item = torch.empty(0, dtype=model.space.dtype).element_size()
    held = (_STAGES if model.sharded else _STAGES_ALONE) * stage
    return item * (held + (_CHECK_VECTORS * model.space.size_local if checked else 0))

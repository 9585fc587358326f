"""Where the Krylov basis lies, and whether it fits: decided before the first product.

On a CPU "device" and "host" are the same memory. On "disk" a step reads every row three times, and memory holds the
newest row and two panels of a basis (:class:`BasisOnDisk`).
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch

from hpc_hess.config import Config, LanczosSection
from hpc_hess.errors import ConfigError
from hpc_hess.linalg.lanczos import basis_rows
from hpc_hess.model.sharded.blocklist import all_blocks
from hpc_hess.model.sharded.shard import ShardedModel
from hpc_hess.parallel.basis import PANEL_BYTES, Basis, BasisOnDisk
from hpc_hess.parallel.memory import device_bytes_free, host_bytes_free, release_memory
from hpc_hess.parallel.memory import gigabytes as _gb
from hpc_hess.parallel.vector import VectorSpace
from hpc_hess.parallel.world import World
from hpc_hess.session.operators import needs_gradient, spec_of, wants_reference
from hpc_hess.storage.store import Store

_MOST_IN_LOCK_STEP = 4  # where lanczos.lock_step = "auto": each probe holds a basis and the tangents of its product
_WORK_VECTORS = 4  # a product holds two gradients, its result is one of them, and the start vector is a third
_CHECK_VECTORS = 2  # the exact product and its difference from the one it is compared with
# an exact product streams the parameters and the direction of a stage and of the next, as gathered and as unpacked;
# the gradient, its tangent, and the buffer it is sent in. Alone there is nothing to gather.
_STAGES, _STAGES_ALONE = 9, 3


Memory = Literal["device", "host", "disk"]


class Place(NamedTuple):
    """Where the bases of a group lie: for how many probes at a time, in which memory, in which dtype."""

    width: int
    memory: Memory
    dtype: torch.dtype
    row_bytes: int  # of the largest rank

    def note(self, lanczos: LanczosSection) -> str:
        """Return what a user should know of a basis that is not where the vectors are, else ""."""
        if self.memory != "disk":
            return ""
        read = 3 * basis_rows(lanczos.reorthogonalise, lanczos.steps) * self.row_bytes
        return f"the Krylov basis is read from disk, up to {_gb(read)} by each rank in each step of a probe"


def lock_step(lanczos: LanczosSection, shared: bool) -> int:
    """Return how many probes should advance together; ``shared``: their products can share work."""
    wanted = lanczos.lock_step
    if wanted == "auto":
        wanted = _MOST_IN_LOCK_STEP if shared else 1
    return min(wanted, lanczos.probes)


def place_basis(
    world: World, space: VectorSpace, lanczos: LanczosSection, wanted: int = 1, at_least: int = 1, exact_bytes: int = 0
) -> Place:
    """Choose for how many probes at a time there is room for a basis, and in which memory. Collective: yes.

    Parameters
    ----------
    wanted : probes in lock-step; if lanczos.lock_step is "auto" fewer will do, on the device rather than on the host.
    at_least : as many as a group that is going on has.
    exact_bytes : what exact products need beside it: :func:`exact_product_bytes`.

    Raises
    ------
    ConfigError : it fits nowhere; names the window, the steps, the lock-step and the number of ranks that would.

    """
    most_wanted = max(wanted, at_least)
    widths = range(most_wanted, (at_least if lanczos.lock_step == "auto" else most_wanted) - 1, -1)
    rows = basis_rows(lanczos.reorthogonalise, lanczos.steps)
    largest = int(world.max_over_ranks(space.size_local, "largest shard"))
    dtype = basis_dtype(lanczos, space.dtype)
    vector_bytes, row_bytes = largest * space.dtype.itemsize, largest * dtype.itemsize
    budget = _budget(world, space, exact_bytes)
    on_disk: list[Memory] = ["disk"] if world.num_replicas == 1 else []
    if lanczos.basis_memory == "disk" and not on_disk:
        raise ConfigError(
            'lanczos.basis_memory = "disk" needs parallel.replicate = 1: only the first replica has the basis on disk'
        )
    places: list[Memory] = ["device", "host", *on_disk] if lanczos.basis_memory == "auto" else [lanczos.basis_memory]

    def room(place: Memory, width: int) -> int:
        return budget[place] - _work_bytes(width, vector_bytes, space, place)

    for place in places:
        for width in widths:
            if width * _held_bytes(place, rows, row_bytes) <= room(place, width):
                return Place(width, place, dtype, row_bytes)
    width = widths[-1]
    most = max(room(place, width) for place in places)
    what = f"{rows} rows" if width == 1 else f"{width} probes x {rows} rows"
    options = _remedy(lanczos, width, rows, row_bytes, most, world.shard_size)
    if on_disk and width * _held_bytes("disk", rows, row_bytes) <= room("disk", width):
        options.insert(0, 'lanczos.basis_memory = "disk"')
    if width > at_least and (fewer := max(0, most) // (rows * row_bytes)) >= at_least:
        options.insert(0, f"lanczos.lock_step = {fewer}")
    raise ConfigError(
        f"the Krylov basis needs {what} x {_gb(row_bytes)} = {_gb(width * rows * row_bytes)} on each rank, but only "
        f"{_gb(most)} are free beside the products; {' or '.join(options)} would fit"
    )


def room_for_rows(world: World, space: VectorSpace, rows: int, exact_bytes: int, key: str) -> torch.device:
    """Return where ``rows`` vectors fit beside the products: the device, else host memory. Collective: yes.

    Raises
    ------
    ConfigError : nowhere; names the value of the configuration's ``key`` that would fit.

    """
    vector_bytes = int(world.max_over_ranks(space.size_local, "largest shard")) * space.dtype.itemsize
    budget = _budget(world, space, exact_bytes)
    places: list[Memory] = ["device", "host"]
    room = {place: budget[place] - _work_bytes(1, vector_bytes, space, place) for place in places}
    for place in places:
        if rows * vector_bytes <= room[place]:
            return space.device if place == "device" else torch.device("cpu")
    most = max(room.values())
    raise ConfigError(
        f"{rows} vectors x {_gb(vector_bytes)} = {_gb(rows * vector_bytes)} do not fit on each rank, where {_gb(most)} are "
        f"free beside the products; {key} = {max(0, most // vector_bytes - 1)} or more ranks would fit"
    )


def basis_dtype(lanczos: LanczosSection, master: torch.dtype) -> torch.dtype:
    """Return the dtype of the rows, in memory and in the store."""
    return torch.bfloat16 if lanczos.basis_dtype == "bfloat16" else master


def _held_bytes(place: Memory, rows: int, row_bytes: int) -> int:
    """Return the bytes of memory that one probe's basis takes on a rank."""
    whole = rows * row_bytes
    return min(whole, 2 * PANEL_BYTES) + row_bytes if place == "disk" else whole


class Bases:
    """The bases of a group of probes; those in memory are taken over by the next group."""

    def __init__(self, place: Place, space: VectorSpace, lanczos: LanczosSection, store: Store) -> None:
        rows = basis_rows(lanczos.reorthogonalise, lanczos.steps)
        self._place, self._space, self._rows, self._store = place, space, rows, store
        device = space.device if place.memory == "device" else torch.device("cpu")
        self._in_memory = [
            Basis(space, rows, device, place.dtype) for _ in range(place.width if place.memory != "disk" else 0)
        ]

    def free(self) -> None:
        """Give up the memory: no more groups will come."""
        self._in_memory.clear()
        release_memory()

    def of(self, probes: range) -> list[Basis]:
        """Return a basis for each of ``probes``."""
        if self._in_memory:
            return self._in_memory[: len(probes)]
        return [BasisOnDisk(self._space, self._rows, self._store.row_reader(probe), self._place.dtype) for probe in probes]


def _budget(world: World, space: VectorSpace, exact_bytes: int) -> dict[str, int]:
    """Return the bytes free for each rank on the device and on the host, the least over all ranks. Collective: yes."""
    device = device_bytes_free(world) - exact_bytes
    host = device if space.device.type == "cpu" else host_bytes_free() // world.launch.local_size
    free = {"device": device, "host": host, "disk": host}
    return {place: -int(world.max_over_ranks(-value, "free memory")) for place, value in free.items()}


def _work_bytes(width: int, vector_bytes: int, space: VectorSpace, place: Memory) -> int:
    """Return the bytes of vectors beside the basis; they lie on the device, and each further probe has its product."""
    return (_WORK_VECTORS + width - 1) * vector_bytes if place == "device" or space.device.type == "cpu" else 0


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


def exact_product_bytes(config: Config, model: ShardedModel) -> int:
    """Bytes a rank needs on its device for exact products, comparisons with them, and what the operator holds.

    Activations aside. The skeleton that exact products stream through has no memory of its own.
    """
    item = torch.empty(0, dtype=model.space.dtype).element_size()
    checked = wants_reference(config)
    # the product's own vectors are as long as the parameters where the basis' are not
    vectors = _WORK_VECTORS * config.operator.sketched + spec_of(config).vectors * (1 + checked) + needs_gradient(config)
    beside = vectors * model.space.size_local * item
    if not checked and config.operator.method != "exact":
        return beside
    numel = {id(p): p.numel() for p in model.module.parameters()}
    of_blocks = [[id(p) for p in block.parameters()] for block in all_blocks(model.module) or ()]
    outside = numel.keys() - {p for block in of_blocks for p in block}
    stage = max([sum(numel[p] for p in block) for block in of_blocks] + [numel[p] for p in outside])
    held = (_STAGES if model.sharded else _STAGES_ALONE) * stage
    return beside + item * (held + (_CHECK_VECTORS * model.space.size_local if checked else 0))

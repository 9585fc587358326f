"""Whether a run fits a machine, how long it takes, what it keeps: from what one of its ranks was traced to do."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from hpc_hess.config import LanczosSection
from hpc_hess.parallel.basis import PANEL_BYTES
from hpc_hess.planning.machine import Machine, Seconds, seconds
from hpc_hess.planning.tracing import Collective, Operation, Peak, Work
from hpc_hess.profiling.traffic import orthogonalisation_bytes

_ALL_REDUCES = 3
_RESERVED = 1.5e9  # bytes of a device that are not the program's: its context, the libraries' buffers
_FRAGMENTED = 1.05  # what an allocator holds over what is in use

Placement = Literal["device", "host", "disk"]


@dataclass(frozen=True)
class Trace:
    """What rank 0, whose shard is the largest, does and holds.

    Attributes
    ----------
    micro_batches, tokens : of a rank, and tokens of each.
    method : operator.method.
    width : probes of a group, which share an exact product.
    rows, row_bytes : of the Krylov basis of a probe.
    gradient, product : one gradient, and the product of a group, over all micro-batches.
    peak : the most held during a product, or the exact one that checks it, in bytes by category, without the Krylov basis.

    """

    name: str
    num_params: int
    num_params_local: int
    ranks: int
    local_ranks: int
    micro_batches: int
    tokens: int
    method: str
    width: int
    rows: int
    row_bytes: int
    itemsize: int  # of vectors
    gradient: Work
    product: Work
    peak: Peak


@dataclass(frozen=True)
class Plan:
    """What to expect of a run. Bytes are of one rank, seconds of one step of a group of probes."""

    trace: Trace
    machine: Machine
    placement: Placement | None  # of the basis; None: the run does not fit
    device_bytes: int  # at the peak, basis included where it lies on the device
    host_bytes: int
    gradient: Seconds
    product: Seconds
    vectors_s: float
    groups: int
    steps: int

    @property
    def nodes(self) -> int:
        """How many nodes the ranks are on."""
        return -(-self.trace.ranks // self.trace.local_ranks)

    @property
    def fits(self) -> bool:
        """Whether the run fits."""
        return self.placement is not None

    @property
    def step(self) -> Seconds:
        """Seconds of a step: product and Lanczos."""
        vectors = self.vectors_s * self.trace.width
        return Seconds(self.product.compute + vectors, self.product.traffic)

    @property
    def run_s(self) -> tuple[float, float]:
        """Seconds of all steps, from and to."""
        count = self.steps * self.groups
        return count * self.step.least, count * self.step.most

    @property
    def row_bytes(self) -> int:
        """Bytes that a step writes to disk for each probe, on all ranks."""
        return self.trace.num_params * self.trace.row_bytes // max(1, self.trace.num_params_local)

    @property
    def store_bytes(self) -> int:
        """Bytes of the store: the basis of a group."""
        return self.row_bytes * self.trace.rows * self.trace.width


def orthogonalisation(trace: Trace, rows: int) -> Work:
    """Return the work of the last and longest step of a Lanczos process that reorthogonalises against ``rows`` vectors.

    The vector is scaled into its row afterwards.
    """
    vector = trace.num_params_local * trace.itemsize
    moved = orthogonalisation_bytes(rows, trace.row_bytes, vector) + 2 * vector
    work = Work()
    work.operations[Operation("float32", 4 * rows * trace.num_params_local, moved)] = 1
    if trace.ranks > 1:
        work.collectives[Collective("all-reduce", 8 * rows)] = _ALL_REDUCES
    return work


def make_plan(trace: Trace, lanczos: LanczosSection, machine: Machine, host_bytes: int = 0) -> Plan:
    """Place the basis and time a step. ``host_bytes``: memory of a node for all its ranks."""
    basis = trace.width * trace.rows * trace.row_bytes
    on_disk = trace.width * (min(trace.rows * trace.row_bytes, 2 * PANEL_BYTES) + trace.row_bytes)
    used = int(trace.peak.bytes * _FRAGMENTED + _RESERVED)
    host_share = host_bytes // trace.local_ranks
    anywhere: tuple[Placement, ...] = ("device", "host", "disk")
    allowed = anywhere if lanczos.basis_memory == "auto" else (lanczos.basis_memory,)
    held: dict[Placement, tuple[int, int]] = {"device": (used + basis, 0), "host": (used, basis), "disk": (used, on_disk)}
    placement: Placement | None = None
    for place in allowed:
        device, host = held[place]
        if placement is None and device <= machine.memory_bytes and host <= max(host_share, 0):
            placement = place
    device, host = held[placement or allowed[-1]]
    ranks, local = trace.ranks, trace.local_ranks
    rows = (trace.rows + 1) // 2 if lanczos.reorthogonalise == "full" else max(2, trace.rows - 1)  # in the mean
    average = seconds(orthogonalisation(trace, rows), machine, ranks, local)
    gradient = seconds(trace.gradient, machine, ranks, local).at(machine.share("finite_difference"))
    product = seconds(trace.product, machine, ranks, local).at(machine.share(trace.method))
    groups = -(-lanczos.probes // trace.width)
    return Plan(trace, machine, placement, device, host, gradient, product, average.most, groups, lanczos.steps)


_SHARDED = ("parameters", "vectors", "calibration")  # categories of a peak that more ranks share
_PRODUCT_VECTORS = 2  # of the products' part: gradients, or a product and its tangents


def nodes_needed(plan: Plan) -> int | None:
    """Return about how many nodes a run needs, None if no number would do. What ranks share shrinks with their number."""
    trace = plan.trace
    shared = sum(trace.peak.parts[name] for name in _SHARDED)
    shared += _PRODUCT_VECTORS * trace.num_params_local * trace.itemsize
    room = (plan.machine.memory_bytes - _RESERVED) / _FRAGMENTED - (trace.peak.bytes - shared)
    if not plan.fits:  # nor would it with the basis elsewhere, if that is allowed
        shared += int((plan.device_bytes - _RESERVED) / _FRAGMENTED) - trace.peak.bytes
    return math.ceil(shared * trace.ranks / room / trace.local_ranks) if room > 0 else None


def powers_up_to(largest: int) -> list[int]:
    """Return the numbers of nodes of a sweep: 1, 2, 4, ... and ``largest`` itself; to 64 where that is 1."""
    largest = largest if largest > 1 else 64
    return [1 << k for k in range(largest.bit_length()) if 1 << k < largest] + [largest]


def describe(plan: Plan) -> dict[str, Any]:
    """Return the plan as JSON-able numbers: bytes, seconds."""
    trace = plan.trace
    return {
        "model": trace.name,
        "num_params": trace.num_params,
        "num_params_local": trace.num_params_local,
        "nodes": plan.nodes,
        "ranks": trace.ranks,
        "local_ranks": trace.local_ranks,
        "machine": plan.machine.name,
        "fits": plan.fits,
        "basis": plan.placement,
        "device_bytes": plan.device_bytes,
        "host_bytes": plan.host_bytes,
        "device_memory_bytes": plan.machine.memory_bytes,
        "parts_bytes": dict(trace.peak.parts),
        "basis_bytes": trace.width * trace.rows * trace.row_bytes,
        "store_bytes": plan.store_bytes,
        "row_bytes": plan.row_bytes,
        "flops": trace.product.flops,
        "sent_bytes": trace.product.sent(),
        "gradient_s": [plan.gradient.least, plan.gradient.most],
        "product_s": [plan.product.least, plan.product.most],
        "vectors_s": plan.vectors_s,
        "run_s": list(plan.run_s),
        "micro_batches": trace.micro_batches,
        "tokens": trace.tokens,
        "width": trace.width,
    }

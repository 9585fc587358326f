"""What a machine can do: arithmetic, memory, links; and how long a traced program takes on it.

GPUs are described by their makers' data sheets (dense matrix products, no sparsity) and by shares of these that programs
reach; a machine that was measured (``hpc-hess scaling machine``) by what it did.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch

from hpc_hess.errors import ConfigError
from hpc_hess.planning.tracing import Collective, Work
from hpc_hess.profiling.flops import best_s, copy_rate, matmul_rate


@dataclass(frozen=True)
class Machine:
    """One device and what connects it with the others.

    Attributes
    ----------
    flops_per_s : of matrix products, by dtype, as reached; another dtype counts as float32.
    bytes_per_s : of memory, read and written together, as reached.
    memory_bytes : of a device.
    operation_s : the least time of one operation (a launch).
    link_bytes_per_s, network_bytes_per_s : of collectives within a node, and of each device's share of the network.
    latency_s : of a collective, for each step of its ring.
    overlap : whether collectives go on beside arithmetic.
    shares : by operator.method, how fast whole products are, of what these rates say of their operations one by one.

    """

    name: str
    flops_per_s: Mapping[str, float]
    bytes_per_s: float
    memory_bytes: int
    operation_s: float
    link_bytes_per_s: float
    network_bytes_per_s: float
    latency_s: float
    overlap: bool = True
    shares: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def read(cls, name: str) -> Machine:
        """Return a known GPU by name, or what a file holds. Raises ConfigError."""
        if name in KNOWN:
            return KNOWN[name]
        if not name.endswith(".json"):
            raise ConfigError(f"no such GPU: '{name}'; known are {', '.join(sorted(KNOWN))}, or a file measured.json")
        try:
            return cls(**json.loads(Path(name).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise ConfigError(f"{name} does not describe a machine ({error}); hpc-hess scaling machine writes one") from None

    def share(self, method: str) -> float:
        """Return the share for an operator.method: 1 where it was not measured."""
        return self.shares.get(method, 1.0)

    def to_json(self) -> str:
        """Return the text of a file that :meth:`read` takes."""
        return json.dumps(asdict(self), indent=2) + "\n"


def _gpu(name: str, *, bf16: float, fp32: float, memory_gib: int, tb_per_s: float, nvlink: float, nic: float) -> Machine:
    """Describe a GPU from its data sheet: TFLOP/s, GB/s each way; with the shares of them that programs reach."""
    return Machine(
        name,
        {"bfloat16": 0.6e12 * bf16, "float16": 0.6e12 * bf16, "float32": 0.65e12 * fp32, "float64": 0.3e12 * fp32},
        0.8e12 * tb_per_s,
        memory_gib << 30,
        8e-6,
        0.8e9 * nvlink,
        0.8e9 * nic,
        1e-5,
    )


KNOWN = {
    "h100": _gpu("H100 SXM 80 GB", bf16=989, fp32=67, memory_gib=79, tb_per_s=3.35, nvlink=450, nic=50),
    "h200": _gpu("H200 141 GB", bf16=989, fp32=67, memory_gib=139, tb_per_s=4.8, nvlink=450, nic=50),
    "a100": _gpu("A100 SXM 80 GB", bf16=312, fp32=19.5, memory_gib=79, tb_per_s=2.04, nvlink=300, nic=25),
    "a100-40": _gpu("A100 SXM 40 GB", bf16=312, fp32=19.5, memory_gib=39, tb_per_s=1.55, nvlink=300, nic=25),
}


class Seconds(NamedTuple):
    """Arithmetic and traffic of a stretch of a program. ``least``: all traffic hidden; ``most``: none."""

    compute: float
    traffic: float

    def at(self, share: float) -> Seconds:
        """Return the same where arithmetic reaches a ``share`` of its rates."""
        return Seconds(self.compute / share, self.traffic)

    @property
    def least(self) -> float:
        """Seconds where all traffic goes on beside arithmetic."""
        return max(self.compute, self.traffic)

    @property
    def most(self) -> float:
        """Seconds where one waits for the other."""
        return self.compute + self.traffic


def seconds(work: Work, machine: Machine, ranks: int, local_ranks: int) -> Seconds:
    """Return how long a rank takes: each operation is bound by arithmetic, by memory, or by its launch."""
    compute = sum(
        n
        * max(
            operation.flops / machine.flops_per_s.get(operation.dtype, machine.flops_per_s["float32"]),
            operation.bytes / machine.bytes_per_s,
            machine.operation_s,
        )
        for operation, n in work.operations.items()
    )
    traffic = sum(n * _collective_s(c, machine, ranks, local_ranks) for c, n in work.collectives.items())
    return Seconds(compute, traffic)


def _collective_s(collective: Collective, machine: Machine, ranks: int, local_ranks: int) -> float:
    """Seconds of a collective as rings make it: a rank sends (R - 1) / R of the tensor, twice in an all-reduce.

    Between nodes a ring passes every network device of a node: they work together.
    """
    if ranks == 1:
        return 0.0
    bandwidth = machine.link_bytes_per_s
    if ranks > local_ranks:
        bandwidth = min(bandwidth, local_ranks * machine.network_bytes_per_s)
    passes = 2 if collective.kind == "all-reduce" else 1
    small = machine.latency_s * (ranks - 1).bit_length()  # trees and logarithmic algorithms for what is small
    return passes * (collective.bytes * (ranks - 1) / ranks / bandwidth + small)


def measure(device: torch.device, name: str, memory_bytes: int) -> Machine:
    """Time matrix products and copies on this machine, in this process: a rank with its threads."""
    rates = {
        str(dtype).removeprefix("torch."): matmul_rate(device, dtype)
        for dtype in (torch.float32, torch.float64, torch.bfloat16)
    }
    copy = copy_rate(device)
    small = torch.zeros(1, device=device)
    launch = best_s(lambda: [small.add_(1.0) for _ in range(1000)], device, 5) / 1000
    if device.type == "cpu":
        # through shared memory each byte is copied three times, read and written; a barrier ends each piece
        return Machine(name, rates, copy, memory_bytes, launch, copy / 6, copy / 6, 5e-4, overlap=False)
    return Machine(name, rates, copy, memory_bytes, launch, copy / 2, copy / 2, 1e-5)

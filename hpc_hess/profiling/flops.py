"""Floating-point operations of a program on the way, and what this machine could do at most."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

_aten = torch.ops.aten
_COPY_BYTES, _COPY_BYTES_OF_GPU = 1 << 26, 1 << 30
_MATMUL_SIZE, _MATMUL_SIZE_OF_GPU = 1024, 8192
_LONGEST_S = 0.5  # of the calls of one measurement, where three take less


def count_flops(func: Any, args: Any, kwargs: Any, out: Any) -> int:
    """Return the floating-point operations of one ATen call that are part of matrix products; 0 for other operations."""
    packet = func._overloadpacket
    if packet in flop_registry:
        return int(flop_registry[packet](*args, **kwargs, out_val=out))
    if packet is _aten._scaled_dot_product_flash_attention_for_cpu:
        return int(sdpa_flop_count(args[0].shape, args[1].shape, args[2].shape))
    if packet is _aten._scaled_dot_product_flash_attention_for_cpu_backward:
        return int(sdpa_backward_flop_count(args[0].shape, args[1].shape, args[2].shape, args[3].shape))
    if packet in (_aten.mv, _aten.dot):
        return 2 * args[0].numel()
    return 0


class FlopCounter(TorchDispatchMode):
    """Counts the operations of this rank inside ``with``, autograd's too."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else the first operation imports torch._dynamo, a second that nothing here needs

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented  # what it does to its local part comes back here
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        self.flops += count_flops(func, args, kwargs, out)
        return out


class Limits(NamedTuple):
    """What one rank reaches while all ranks of its machine try: a square matrix product, and a copy (read and written)."""

    flops_per_s: float
    bytes_per_s: float


@functools.cache
def measure_limits(device: torch.device, dtype: torch.dtype) -> Limits:
    """Time a matrix product and a copy here, once a process. Takes about half a second and 128 MiB of a CPU."""
    return Limits(matmul_rate(device, dtype), copy_rate(device))


def matmul_rate(device: torch.device, dtype: torch.dtype, repeats: int = 5) -> float:
    """Return the floating-point operations in a second of a square matrix product."""
    size = _MATMUL_SIZE if device.type == "cpu" else _MATMUL_SIZE_OF_GPU
    a = torch.randn(size, size, device=device).to(dtype)
    return 2 * size**3 / best_s(lambda: a @ a, device, repeats)


def copy_rate(device: torch.device, repeats: int = 5) -> float:
    """Return the bytes that a copy reads and writes in a second."""
    size = _COPY_BYTES if device.type == "cpu" else _COPY_BYTES_OF_GPU
    x = torch.ones(size // 4, device=device)
    y = torch.empty_like(x)
    return 2 * size / best_s(lambda: y.copy_(x), device, repeats)


def best_s(function: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Return the seconds of the fastest of some calls, after one that is not timed; of fewer calls, where one is slow."""
    times: list[float] = []
    while len(times) < 3 or (len(times) <= repeats and sum(times) < _LONGEST_S):
        began = time.perf_counter()
        function()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        times.append(time.perf_counter() - began)
    return min(times[1:])

"""The GPUs that ranks compute on: all that is one maker's, names, collectives and switches, over torch.accelerator.

A further kind is a line of _COLLECTIVES, and a word of parallel.device in config.py. torch built for ROCm calls AMD's GPUs
and their collectives by the names of NVIDIA's.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch

from hpc_hess.errors import LaunchError

_COLLECTIVES = {"cuda": "nccl", "xpu": "xccl"}  # torch's type of a device -> the backend of its collectives
KINDS = tuple(_COLLECTIVES)


def is_gpu(device: torch.device) -> bool:
    """Return whether a device is a GPU of a kind that is known here; all others count as the host."""
    return device.type in _COLLECTIVES


def find_kind() -> str:
    """Return the kind of GPU that this process sees, "" where it sees none that is known here."""
    found = torch.accelerator.current_accelerator(check_available=True)
    return found.type if found is not None and is_gpu(found) else ""


def take(wanted: str, local_rank: int) -> torch.device:
    """Return a rank's device, and make it the current one. ``wanted``: "auto", "cpu" or a kind.

    A launcher may show each rank GPUs of its own alone: :func:`identity` tells whether two ranks have the same.

    Raises
    ------
    LaunchError : there is no GPU of the kind that is asked for.

    """
    found = find_kind() if wanted != "cpu" else ""
    if wanted not in ("auto", "cpu", found):
        such = "such " if found else ""
        raise LaunchError(
            f'parallel.device = "{wanted}" but torch sees no {such}GPU; set parallel.device = "{found or "cpu"}"'
        )
    if not found:
        return torch.device("cpu")
    device = torch.device(found, local_rank % torch.accelerator.device_count())
    torch.accelerator.set_device_index(device)
    return device


def backend(device: torch.device) -> str:
    """Return the backends of a world whose ranks compute on such devices: what lies on the host travels by gloo."""
    return f"cpu:gloo,{device.type}:{_COLLECTIVES[device.type]}" if is_gpu(device) else "gloo"


def is_of_collectives(error: str) -> bool:
    """Return whether the text of an error names a library of collectives."""
    return "gloo" in error or any(name.upper() in error for name in _COLLECTIVES.values())


# -- one GPU: its names, its memory, its clock ---------------------------------------------------------------------------


def _properties(device: torch.device) -> Any:
    return torch.get_device_module(device).get_device_properties(device)


def identity(device: torch.device) -> str:
    """Return what tells a GPU from all others of all nodes, "" of a CPU."""
    return str(_properties(device).uuid) if is_gpu(device) else ""


def name(device: torch.device) -> str:
    """Return the name that a GPU's maker gave it."""
    return str(_properties(device).name)


def total_bytes(device: torch.device) -> int:
    """Return the memory of a GPU."""
    return int(_properties(device).total_memory)


def free_bytes(device: torch.device) -> int:
    """Return what this process can still take of a GPU's memory, what torch keeps of freed tensors included."""
    kept = torch.accelerator.memory_reserved(device) - torch.accelerator.memory_allocated(device)
    return torch.accelerator.get_memory_info(device)[0] + kept


def used_bytes(device: torch.device) -> int:
    """Return what the tensors of this process take of a GPU's memory."""
    return torch.accelerator.memory_allocated(device)


def peak_bytes(device: torch.device) -> int:
    """Return the most that the tensors of this process have taken of a GPU's memory."""
    return torch.accelerator.max_memory_allocated(device)


def mark(device: torch.device) -> Any:
    """Put a mark into the current stream of a GPU. ``begin.elapsed_time(end)``: ms between two, after :func:`wait`."""
    event = torch.get_device_module(device).Event(enable_timing=True)
    event.record()
    return event


def wait(device: torch.device) -> None:
    """Wait until a GPU has done all that it was given."""
    torch.accelerator.synchronize(device)


# -- arithmetic ----------------------------------------------------------------------------------------------------------


def make_exact_float32() -> None:
    """Turn off the reduced-precision float32 modes of matrix products: a finite-difference step is below them."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")


@contextlib.contextmanager
def exact_float32() -> Iterator[None]:
    """Compute float32 products in full in the block: a finite-difference step is below what other modes round to."""
    precision, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)
        torch.backends.cudnn.allow_tf32 = convolutions


def require_tf32(device: torch.device) -> None:
    """Raise LaunchError, which names the remedy, unless a device has tensor cores that multiply in TF32."""
    if device.type == "cuda" and torch.version.hip is None:
        if _properties(device).major >= 8:
            return
        found = f"{name(device)} has none"
    else:
        found = f"this rank computes on {'another GPU' if is_gpu(device) else 'a CPU'}"
    raise LaunchError(
        'model.compute_dtype = "tf32" needs an NVIDIA GPU with tensor cores for it (A100 or newer), and '
        f'{found}: set model.compute_dtype = "float32"'
    )


@contextlib.contextmanager
def tf32() -> Iterator[None]:
    """Round the operands of float32 matrix products on GPUs to 10 bits of mantissa in the block; sums stay float32."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)


def make_deterministic() -> None:
    """Let only kernels run that give the same bits each time; one that has no such form then says so, by name.

    CPU kernels do already, for a fixed number of threads. On a GPU sums over tokens would otherwise be made in any order.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # a debugging aid that writes every new tensor

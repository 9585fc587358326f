"""Weights into shards: one protocol for every source, and the loop that copies slices in bounded blocks."""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Shard

from hpc_hess.config import ModelSection
from hpc_hess.errors import ModelError
from hpc_hess.intake.findings import Finding
from hpc_hess.model.sources.source import Source
from hpc_hess.registry.sources import MODELS
from hpc_hess.registry.table import load

_BLOCK = 1 << 24  # entries copied at a time


class WeightReader(Protocol):
    """Serves slices of a model's parameters by the model's own names; ``findings`` say what it found besides.

    One that has ``copy(name, dim, low, place)`` fills places itself, with the entries from ``low`` on along ``dim``.
    """

    findings: list[Finding]

    def read(self, name: str, dim: int, low: int, high: int) -> torch.Tensor:
        """Return entries [low, high) of ``name`` along ``dim``: CPU, any floating dtype. A scalar comes whole."""
        ...

    def read_buffer(self, name: str) -> torch.Tensor | None:
        """Return a persistent buffer, None if the source does not hold it."""
        ...

    def close(self) -> None:
        """Free what reading needed."""
        ...


def open_reader(source: Source, section: ModelSection, skeleton: nn.Module) -> WeightReader:
    """Return the reader of ``source``; the skeleton may be sharded already. Collective: no.

    Raises
    ------
    ModelError : the weights are incomplete, damaged or belong to another configuration.

    """
    reader = MODELS[source.kind].reader
    assert reader is not None, f"sources of kind {source.kind} have no reader"
    opened: WeightReader = load(reader)(source, section, skeleton)
    return opened


def fill(module: nn.Module, reader: WeightReader, shard_index: int = 0, num_shards: int = 1) -> None:
    """Copy this rank's slice of every parameter (selected or not) into place, and the persistent buffers.

    Parameters are plain tensors (the whole) or DTensors sharded on one dimension as ``torch.chunk`` cuts it, on any
    device, already allocated. Values are cast to the parameter's dtype. What is held besides is a block of at most 2**24
    entries (of readers without ``copy``, one row along the sharded dimension, if that is longer). Collective: no.

    Raises
    ------
    ModelError : a tensor cannot be read or has another shape than the parameter's shard.

    """
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            _fill_one(name, parameter.detach(), reader, shard_index, num_shards)
        persistent = module.state_dict().keys()
        for name, buffer in module.named_buffers():
            value = reader.read_buffer(name) if name in persistent else None
            if value is not None:
                buffer.copy_(value)


def copy_buffers(module: nn.Module, other: nn.Module) -> None:
    """Give ``other``, a copy of ``module`` that was made before it was filled, its persistent buffers. Collective: no."""
    buffers, persistent = dict(module.named_buffers()), module.state_dict().keys()
    with torch.no_grad():
        for name, buffer in other.named_buffers():
            if name in persistent:
                buffer.copy_(buffers[name])


def _fill_one(name: str, parameter: torch.Tensor, reader: WeightReader, shard_index: int, num_shards: int) -> None:
    dim, low, high, local = 0, 0, parameter.shape[0] if parameter.ndim else 1, parameter
    if isinstance(parameter, DTensor):
        dims = [p.dim for p in parameter.placements if isinstance(p, Shard)]
        local = parameter.to_local()
        if dims:
            dim = dims[0]
            extent = parameter.shape[dim]
            chunk = -(-extent // num_shards)
            low, high = min(shard_index * chunk, extent), min((shard_index + 1) * chunk, extent)
            if local.shape[dim] != high - low:
                raise ModelError(f"parameter '{name}' is sharded in an unexpected way: {tuple(local.shape)}")
    if local.numel() == 0:
        return
    copy = getattr(reader, "copy", None)
    if copy is not None:
        copy(name, dim, low, local)
        return
    row = math.prod(local.shape) // local.shape[dim] if local.ndim else 1
    step = max(1, _BLOCK // row)
    for start in range(low, high, step):
        stop = min(start + step, high)
        block = reader.read(name, dim, start, stop)
        place = local.narrow(dim, start - low, stop - start) if local.ndim else local
        if block.shape != place.shape:
            raise ModelError(f"tensor '{name}' has shape {tuple(block.shape)} where {tuple(place.shape)} was expected")
        place.copy_(block)

"""Toys cut over real ranks, ragged data for them, and the way back to whole vectors."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from torch import nn

from hpc_hess.model.sharded.loss import CausalLMObjective
from hpc_hess.model.sharded.micro_batch import MicroBatch, shifted_targets
from hpc_hess.model.sharded.shard import ShardedModel, shard_model
from hpc_hess.parallel import shared_memory
from hpc_hess.parallel.vector import Vector, VectorSpace
from hpc_hess.parallel.world import World
from tests.support.toys import toy_model, toy_tokens

Whole = tuple[np.ndarray, np.ndarray, np.ndarray]  # values, starts, lengths of one rank
LENGTHS = (9, 5, 9, 2, 7)  # tokens of each row: padded to 9


def ragged_rows(rows: int = len(LENGTHS), seed: int = 1) -> MicroBatch:
    """Return the whole data set as one batch: rows of different lengths, padded on the right."""
    ids = toy_tokens(rows, max(LENGTHS), seed)
    mask = torch.zeros_like(ids)
    for row in range(rows):
        mask[row, : LENGTHS[row]] = 1
    ids = ids.masked_fill(mask == 0, 0)
    return MicroBatch(list(range(rows)), ids, mask, ids.masked_fill(mask == 0, -100))


def ragged_objective(rank: int = 0, size: int = 1, rows: int = len(LENGTHS), micro_batch: int = 1) -> CausalLMObjective:
    """Return a rank's share of the ragged rows, dealt out round robin, with dummies where rows run out."""
    data = ragged_rows(rows)
    count = -(-rows // (size * micro_batch))
    batches = []
    for k in range(count):
        index = [(k * micro_batch + i) * size + rank for i in range(micro_batch)]
        pick = torch.tensor([min(i, rows - 1) for i in index])
        real = torch.tensor([i < rows for i in index])
        labels = data.labels[pick].masked_fill(~real[:, None], -100)
        sample_ids = [i if i < rows else -1 for i in index]
        batches.append(MicroBatch(sample_ids, data.input_ids[pick], data.attention_mask[pick], labels))
    num_tokens = int((shifted_targets(data.labels) != -100).sum())
    return CausalLMObjective(batches, num_tokens, torch.device("cpu"))


def meta_copy(module: nn.Module) -> nn.Module:
    """Return the module with its parameters on the meta device, its buffers and ties kept."""
    skeleton = copy.deepcopy(module)
    buffers = {name: b.clone() for name, b in skeleton.named_buffers()}
    skeleton.to("meta")
    for name, buffer in buffers.items():
        owner, _, key = name.rpartition(".")
        skeleton.get_submodule(owner)._buffers[key] = buffer
    skeleton.tie_weights()  # type: ignore[operator]
    return skeleton


def shard_toy(world: World, name: str, dtype: torch.dtype = torch.float64, **options: Any) -> ShardedModel:
    """Shard a toy and fill each rank's part from the whole, through the Layout's intervals. Collective: yes."""
    full = toy_model(name, dtype=dtype)
    whole = dict(full.named_parameters())
    model = shard_model(meta_copy(full), world, master_dtype=dtype, compute_dtype=dtype, **options)
    for piece, local in zip(model.shard.pieces, model.local_parameters, strict=True):
        index = torch.from_numpy(piece.interval_starts)[:, None] + torch.arange(piece.interval_length)
        local.copy_(whole[piece.parameter.name].detach().flatten()[index.flatten()].view(piece.local_shape))
    frozen = {n: p for n, p in model.module.named_parameters() if not p.requires_grad}
    for parameter_name, parameter in frozen.items():  # not in the layout: cut the way FSDP did
        _fill_frozen(parameter, whole[parameter_name].detach())
    return model


def _fill_frozen(parameter: torch.Tensor, whole: torch.Tensor) -> None:
    from torch.distributed.tensor import DTensor, distribute_tensor

    with torch.no_grad():
        if isinstance(parameter, DTensor):
            parameter.copy_(distribute_tensor(whole, parameter.device_mesh, parameter.placements))
        else:
            parameter.copy_(whole)


def send(vector: Vector) -> Whole:
    """Return this rank's part of a vector with its place, to be sent to the test."""
    starts, lengths = vector.space.shard.file_intervals
    return vector.data.numpy().copy(), starts, lengths


def assemble(parts: list[Whole]) -> np.ndarray:
    """Return the whole vector from every rank's part; each entry comes exactly once."""
    size = sum(len(values) for values, _, _ in parts)
    whole, seen = np.full(size, np.nan, parts[0][0].dtype), np.zeros(size, int)
    for values, starts, lengths in parts:
        position = 0
        for start, length in zip(starts, lengths, strict=True):
            whole[start : start + length] = values[position : position + length]
            seen[start : start + length] += 1
            position += length
    assert (seen == 1).all()
    return whole


def from_global(space: VectorSpace, whole: torch.Tensor) -> Vector:
    """Return this rank's part of a vector that is known whole, in the file index."""
    parts = [whole[s : s + n] for s, n in zip(*(x.tolist() for x in space.shard.file_intervals), strict=True)]
    data = torch.cat(parts) if parts else whole[:0]
    return space.wrap(data.to(space.dtype).clone())


def without_shared_memory() -> None:
    """Let this process' next mesh exchange through gloo, as ranks of several nodes do."""

    def refuse(*args: object) -> None:
        raise OSError("not in this test")

    shared_memory.Window.__init__ = refuse  # type: ignore[assignment,method-assign]

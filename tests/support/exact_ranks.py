"""Toys cut over ranks for exact products: a model, its skeleton without hooks, and each rank's part of the loss."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch

from hpc_hess.model.sharded.loss import CausalLMObjective
from hpc_hess.model.sharded.micro_batch import MicroBatch
from hpc_hess.model.sharded.shard import ShardedModel, shard_model
from hpc_hess.parallel.world import World
from tests.support.exact_case import NO_SDPA, micro_batches, objective
from tests.support.toys import toy_model


@dataclass(frozen=True)
class Case:
    name: str
    include: list[str] | None = None
    dtype: torch.dtype = torch.float64
    lanczos_steps: int = 0


def sharded_case(world: World, case: Case) -> tuple[ShardedModel, Any, CausalLMObjective]:
    """The toy over the ranks, its skeleton without hooks, and this rank's part of the loss."""
    attention = "eager" if case.name in NO_SDPA else "sdpa"
    source = toy_model(case.name, dtype=case.dtype, attention=attention)
    skeleton = copy.deepcopy(source).to("meta")
    skeleton.tie_weights()  # meta parameters were made one by one
    for buffer, (owner, key) in zip(source.buffers(), _owners(skeleton), strict=True):
        owner._buffers[key] = buffer.clone()
    plain = copy.deepcopy(skeleton)
    model = shard_model(skeleton, world, include=case.include, master_dtype=case.dtype, compute_dtype=case.dtype)
    full = dict(source.named_parameters())
    with torch.no_grad():
        for name, parameter in model.module.named_parameters():
            _fill(parameter, full[name].detach())
    num_tokens = objective([b for r in range(world.size) for b in _rows(r, world.size)]).num_tokens
    return model, plain, objective(_rows(world.rank, world.size), num_tokens)


def _rows(rank: int, size: int) -> list[MicroBatch]:
    """Three micro-batches shared over the ranks, dummies at the end so that every rank has equally many."""
    first, second = micro_batches(3, 8)
    third = micro_batches(2, 5)[1]
    batches = [first, second, third]
    while len(batches) % size:
        dummy = copy.deepcopy(third)
        dummy.labels.fill_(-100)
        batches.append(dummy)
    return batches[rank::size]


def _owners(module: torch.nn.Module) -> list[Any]:
    return [(m, k) for m in module.modules() for k, b in m._buffers.items() if b is not None]


def _fill(parameter: torch.Tensor, value: torch.Tensor) -> None:
    from torch.distributed.tensor import DTensor, distribute_tensor

    if isinstance(parameter, DTensor):
        parameter.copy_(distribute_tensor(value, parameter.device_mesh, parameter.placements))
    else:
        parameter.copy_(value)

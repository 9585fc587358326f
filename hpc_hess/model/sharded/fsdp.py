"""FSDP2: which parameters are gathered together, through which collectives, and when they are dropped again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from hpc_hess.parallel.world import World


def free_gathered(module: nn.Module) -> None:
    """Drop what is gathered of a sharded module: the next forward pass gathers the shards as they are then.

    The last group stays gathered after a forward pass, for the backward pass that usually follows. Whoever writes into the
    shards calls this, and whoever runs a forward pass without a backward pass. Collective: no.
    """
    from torch.distributed.fsdp import FSDPModule

    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def cut_over_ranks(
    module: nn.Module,
    blocks: nn.ModuleList | None,
    world: World,
    dims: dict[str, int],
    master_dtype: torch.dtype,
    compute_dtype: torch.dtype,
) -> None:
    """Shard every parameter, ``dims`` by name, in groups that are gathered together. Collective: yes.

    A group is a block, or the largest parts of one that share no parameter with another block; an embedding or a head of
    some size; and, gathered throughout a forward and backward pass, all the rest.
    """
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
    from torch.distributed.tensor import Shard as ShardPlacement

    by_identity = {id(p): dims[name] for name, p in module.named_parameters()}
    policy = MixedPrecisionPolicy(
        param_dtype=compute_dtype if compute_dtype != master_dtype else None, reduce_dtype=master_dtype
    )
    options: dict[str, Any] = {
        "mesh": world.mesh,
        "mp_policy": policy,
        "shard_placement_fn": lambda p: ShardPlacement(by_identity[id(p)]),
        "ignored_params": {p for p in module.parameters() if not p.numel()},  # nothing to cut
    }
    shared = _shared_parameters(module, blocks)
    for block in blocks or []:
        for part in _parts_without(block, shared):
            fully_shard(part, reshard_after_forward=True, **options)
    # the embedding and the head are as large as several blocks: groups of their own, unless they are tied
    counts: dict[int, int] = {}
    for m in module.modules():
        for p in m._parameters.values():
            counts[id(p)] = counts.get(id(p), 0) + 1
    for m in module.modules():
        if isinstance(m, nn.Embedding | nn.Linear) and not isinstance(m, FSDPModule) and _outside(m, blocks):
            own = [p for p in m._parameters.values() if p is not None]
            if m is not module and all(counts[id(p)] == 1 for p in own) and sum(p.numel() for p in own) > 1 << 20:
                fully_shard(m, reshard_after_forward=True, **options)
    fully_shard(module, reshard_after_forward=False, **options)
    for m in module.modules():
        if isinstance(m, FSDPModule):
            if world.gloo and hasattr(m, "set_custom_reduce_scatter"):
                m.set_custom_reduce_scatter(_ReduceScatter(world))  # type: ignore[arg-type]
            if hasattr(m, "set_custom_all_gather"):
                m.set_custom_all_gather(_AllGather(world))  # type: ignore[arg-type]
            # the loss is already divided by the tokens of the whole set: plain sums over ranks
            m.set_gradient_divide_factor(1.0)
            m.set_force_sum_reduction_for_comms(True)
    root: Any = module
    if hasattr(root, "set_reduce_scatter_unused_params"):  # an expert no token was sent to, on this rank only
        root.set_reduce_scatter_unused_params(True)


class _Through:
    """What FSDP2 asks of collectives that are not its own: here, those of the world."""

    def __init__(self, world: World) -> None:
        self._collectives, self._timers = world.collectives, world.timers

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return torch.empty(*size, dtype=dtype, device=device)


class _ReduceScatter(_Through):
    def __call__(
        self, output_tensor: torch.Tensor, input_tensor: torch.Tensor, group: Any, op: Any, async_op: bool = False
    ) -> None:
        with self._timers.phase("reduce-scatter"):  # op is a sum: see cut_over_ranks
            self._collectives.start_reduce_scatter(output_tensor, input_tensor).wait()


class _AllGather(_Through):
    def __call__(self, output_tensor: torch.Tensor, input_tensor: torch.Tensor, group: Any, async_op: bool = False) -> Any:
        with self._timers.phase("all-gather"):
            work = self._collectives.start_all_gather(output_tensor, input_tensor)
            if not async_op:
                work.wait()
            return work


def _shared_parameters(module: nn.Module, blocks: nn.ModuleList | None) -> set[int]:
    """Return the identities of parameters that several blocks use, or a block and the rest of the model."""
    users: dict[int, set[int]] = {}
    for number, block in enumerate(blocks or []):
        for p in block.parameters():
            users.setdefault(id(p), set()).add(number)
    inside = {id(m) for block in blocks or [] for m in block.modules()}
    for m in module.modules():
        if id(m) not in inside:
            for p in m.parameters(recurse=False):
                users.setdefault(id(p), set()).add(-1)
    return {identity for identity, of in users.items() if len(of) > 1}


def _parts_without(block: nn.Module, shared: set[int]) -> list[nn.Module]:
    """Return the largest parts of a block that hold parameters, none of them shared."""
    held = {id(p) for p in block.parameters()}
    if held and not held & shared:
        return [block]
    return [part for child in block.children() for part in _parts_without(child, shared)] if held else []


def _outside(module: nn.Module, blocks: nn.ModuleList | None) -> bool:
    return blocks is None or all(module is not inner for inner in blocks.modules())

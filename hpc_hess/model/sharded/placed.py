"""How a user's model lies over the ranks of a program that the user launched."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.nn.parallel import DistributedDataParallel

from hpc_hess.errors import ConfigError, ModelError
from hpc_hess.model.sharded import borrowed
from hpc_hess.model.sharded.fsdp import free_gathered
from hpc_hess.parallel.world import World


@dataclass(frozen=True)
class Placed:
    """A model and the ranks that compute it together.

    ``module``: the model inside of DistributedDataParallel and torch.compile. ``sharded``: by FSDP2. ``alone``: a process
    group is there, and the model does not say that it takes part.
    """

    module: nn.Module
    world: World
    sharded: bool = False
    alone: bool = False


def unwrapped(model: nn.Module) -> tuple[nn.Module, Any]:
    """Return the model inside of wrappers that only compile or replicate it, and the group of its replicas."""
    group = None
    while True:
        if isinstance(model, DistributedDataParallel):
            group, model = model.process_group, model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model, group


def placed(model: nn.Module, group: Any = None) -> Placed:
    """Find the ranks that compute ``model`` together. ``group``: of those that hold replicas of a plain module.

    Collective over these ranks, if there are several.

    Raises
    ------
    ModelError : its parameters lie in a way that is not known, or there is no process group.
    ConfigError : ``group`` does not fit the model or the process.

    """
    module, replicas = unwrapped(model)
    free_gathered(module)  # parameters that are gathered look plain
    spread: dict[str, DTensor] = {name: p for name, p in module.named_parameters() if isinstance(p, DTensor)}
    _refuse_others(module, spread)
    if spread:
        if group is not None or replicas is not None:
            what = "group" if group is not None else "DistributedDataParallel"
            raise ConfigError(
                f"the model is sharded by fully_shard, whose mesh says which ranks compute it: leave out {what}"
            )
        name, first = next(iter(spread.items()))
        if not dist.is_initialized():
            raise ModelError(f"parameter '{name}' is sharded, and there is no process group: call init_process_group first")
        mesh = first.device_mesh
        shards, others = mesh.get_group(mesh.ndim - 1), mesh.get_group(0) if mesh.ndim == 2 else None
        device = torch.device(mesh.device_type) if first.is_meta else first.to_local().device
        return Placed(module, World.within(device, shards, others), sharded=True)
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    replicas = replicas if group is None else group
    if replicas is None:
        several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        return Placed(module, World.alone(str(device)), alone=several)
    if not isinstance(replicas, dist.ProcessGroup) or dist.get_rank(replicas) < 0:
        raise ConfigError("group is no process group that this process is in: pass torch.distributed.group.WORLD, for one")
    return Placed(module, World.within(device, None, replicas))


def require_alone(model: Any, what: str) -> None:
    """Refuse a model of several ranks. Collective: no. Raises ModelError."""
    if isinstance(model, nn.Module):
        module, replicas = unwrapped(model)
        free_gathered(module)
        if replicas is not None or any(isinstance(p, DTensor) for p in module.parameters()):
            raise ModelError(f"{what} takes a model of one process, and this one lies over several ranks")


def shard_dims(module: nn.Module, selected: set[str]) -> dict[str, int]:
    """Return the sharded dimension of every parameter that FSDP2 has sharded, by name.

    Raises
    ------
    ModelError : a selected parameter lies otherwise: names it, and says how it lies.

    """
    named = dict(module.named_parameters())
    managed = {
        id(p.sharded_param) for state in borrowed.states(module) for g in borrowed.groups(state) for p in g.fsdp_params
    }
    meshes = [p.device_mesh for p in named.values() if isinstance(p, DTensor)]
    found = {}
    for name, p in named.items():
        if not isinstance(p, DTensor):
            if name in selected:
                raise ModelError(
                    f"parameter '{name}' is not sharded while others are: freeze it, or leave it out with exclude"
                )
            continue
        dims = [placement.dim for placement in p.placements if type(placement) is Shard]
        known = len(dims) == 1 and type(p.placements[-1]) is Shard and all(type(x) is Replicate for x in p.placements[:-1])
        if name in selected and not (known and p.device_mesh == meshes[0] and id(p) in managed):
            names = f" {p.device_mesh.mesh_dim_names}" if p.device_mesh.mesh_dim_names else ""
            raise ModelError(
                f"parameter '{name}' lies as {tuple(p.placements)} over the mesh{names} of {p.device_mesh.size()} ranks: "
                "what fully_shard cuts over one mesh can be handled, tensor and expert parallelism cannot"
            )
        found[name] = dims[0] if dims else 0
    return found


def _refuse_others(module: nn.Module, spread: dict[str, DTensor]) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    for name, part in module.named_modules():
        if isinstance(part, FullyShardedDataParallel):
            what = f"part '{name}'" if name else "the model"
            raise ModelError(f"{what} is sharded by FullyShardedDataParallel, FSDP's first version: use fully_shard")
        if isinstance(part, DistributedDataParallel):
            raise ModelError(
                f"part '{name}' is in DistributedDataParallel on its own: wrap the whole model, or pass its inside"
            )
    for state in borrowed.states(module):
        if any(getattr(g, "_all_reduce_hook", None) is not None for g in borrowed.groups(state)):
            raise ModelError(
                "the model reduces its gradients by a hook of its own (set_all_reduce_hook), which is not known"
            )
    if spread and not borrowed.states(module):
        name, p = next(iter(spread.items()))
        raise ModelError(
            f"parameter '{name}' lies as {tuple(p.placements)} over a mesh, and nothing is sharded by fully_shard: tensor "
            "parallelism cannot be handled"
        )
    shapes = {p.device_mesh.ndim for p in spread.values()}
    if any(ndim > 2 for ndim in shapes):
        raise ModelError("parameters lie over a mesh of more than two dimensions: tensor parallelism cannot be handled")

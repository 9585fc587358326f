"""A training of a few steps with something in its middle, and what differs from the same training without it."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.nn.functional import mse_loss
from torch.nn.parallel import DistributedDataParallel

import hpc_hess
from hpc_hess.parallel.world import World
from tests.support.in_training import fully_sharded, hybrid, whole_parameters


class Trained(nn.Module):
    """Dropout, running statistics, a frozen part, and blocks to shard."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(5, 6), nn.Linear(6, 3)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Dropout(0.2)) for _ in range(2)])
        self.norm = nn.BatchNorm1d(6)
        self.blocks[0].requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.inner(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(self.norm(x))


Middle = Callable[[nn.Module, list[Any]], None]


def loss(model: nn.Module, batch: Any) -> torch.Tensor:
    return mse_loss(model(batch[0]).float(), batch[1])


def spectrum(model: nn.Module, batches: list[Any]) -> None:
    operator = hpc_hess.hessian(model, batches, loss, step=1e-2)
    assert not any(name.startswith("blocks.0") for name in (p.name for p in operator.layout.parameters))
    hpc_hess.slq(operator, steps=2)


def exact(model: nn.Module, batches: list[Any]) -> None:
    hpc_hess.slq(hpc_hess.hessian(model, batches, loss, method="exact"), steps=2)


def nothing(model: nn.Module, batches: list[Any]) -> None:
    """Do nothing."""


def built(how: str, size: int) -> Any:
    """Return the model as a program has it on its ranks; "hsdp 2x1" is a mesh of two replicas of one shard."""
    torch.manual_seed(1)
    model: Any = Trained()
    mesh = init_device_mesh("cpu", (size,))
    if how == "ddp":
        return DistributedDataParallel(model, find_unused_parameters=True)
    if how == "plain":
        return model
    if how.startswith("hsdp"):
        return fully_sharded(model, hybrid(how))
    if how == "mixed":  # running statistics would stay in float32 beside weights in bfloat16
        model.norm = nn.LayerNorm(6)
    if how == "checkpointed":
        model.blocks[1] = checkpoint_wrapper(model.blocks[1])
    if how == "compiled":
        model.blocks[1].compile(backend="eager")
    if how == "hooked":
        fully_sharded(model, mesh)
        model.head.weight.register_post_accumulate_grad_hook(lambda p: p.grad.mul_(0.5))
        return model
    options: dict[str, Any] = {}
    if how == "mixed":
        options["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    if how == "gathered":
        options["reshard_after_forward"] = False
    return fully_sharded(model, mesh, **options)


def _state() -> tuple[Any, ...]:
    return (
        torch.get_rng_state().tolist(),
        np.random.get_state()[1].tolist(),  # noqa: NPY002
        random.getstate(),
        torch.is_grad_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.get_float32_matmul_precision(),
    )


def trained(world: World, how: str, middle: Middle) -> dict[str, torch.Tensor]:
    """Train for four steps, each of two micro-batches, with ``middle`` within the third; return weights and buffers."""
    model = built(how, world.size)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    generator = torch.Generator().manual_seed(10 + world.rank)
    data = [(torch.randn(8, 5, generator=generator), torch.randn(8, 3, generator=generator)) for _ in range(2 + world.rank)]
    torch.manual_seed(100 + world.rank)
    for step in range(4):
        for part in range(2):
            last = part == 1
            if isinstance(model, DistributedDataParallel):
                model.require_backward_grad_sync = last
            elif hasattr(model, "set_requires_gradient_sync"):
                model.set_requires_gradient_sync(last)
            if step == 2 and last:
                before = _state()
                middle(model, data)
                assert _state() == before
                assert model.training
            loss(model, data[(step + part) % 2]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {**whole_parameters(model), **{name: b.clone() for name, b in model.named_buffers()}}


def differing(world: World, jobs: list[tuple[str, Middle]]) -> list[str]:
    """Return what differs between a training with its middle and one without, of several. Collective: yes."""
    names = []
    for how, middle in jobs:
        with_it, without = trained(world, how, middle), trained(world, how, nothing)
        assert with_it.keys() == without.keys()
        names += [f"{how}, {middle}: {name}" for name in without if not torch.equal(with_it[name], without[name])]
    return names


SPREAD = ("fsdp", "mixed", "gathered", "checkpointed", "compiled", "hooked", "ddp")

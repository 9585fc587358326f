"""A spectrum in the middle of a training leaves no trace: the weights after it are those without it, to the last bit."""

from __future__ import annotations

import contextlib
import functools
import os
import random
import signal
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.functional import mse_loss
from torch.nn.parallel import DistributedDataParallel

import hpc_hess
from hpc_hess.errors import HpcHessError
from hpc_hess.parallel.world import World
from tests.support.in_training import fully_sharded, whole_parameters
from tests.support.spawn import run_ranks


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


def _spectrum(model: nn.Module, batches: list[Any]) -> None:
    operator = hpc_hess.hessian(model, batches, loss, step=1e-2)
    assert not any(name.startswith("blocks.0") for name in (p.name for p in operator.layout.parameters))
    hpc_hess.slq(operator, steps=2)


def _exact(model: nn.Module, batches: list[Any]) -> None:
    hpc_hess.slq(hpc_hess.hessian(model, batches, loss, method="exact"), steps=2)


class Stopped:
    """A loss that ends its program's call in the middle of a product, on all ranks alike."""

    def __init__(self, how: str, after: int) -> None:
        self.how, self.left = how, after

    def __call__(self, model: nn.Module, batch: Any) -> torch.Tensor:
        self.left -= 1
        if self.left == 0:
            if self.how == "interrupt":
                raise KeyboardInterrupt
            if self.how == "signal":
                os.kill(os.getpid(), signal.SIGINT)
            elif self.how == "inside":
                model.head.register_forward_hook(self._fail)
        return loss(model, batch)

    @staticmethod
    def _fail(module: nn.Module, args: Any, out: torch.Tensor) -> None:
        module._forward_hooks.clear()
        raise RuntimeError("in the middle of a forward pass")


def _stopped(how: str, after: int, model: nn.Module, batches: list[Any]) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    watched = Stopped(how, after)
    kept = [hook for m in model.modules() for hook in m._forward_hooks]
    # an interrupt after the first step leaves a spectrum, and a warning
    with contextlib.suppress(KeyboardInterrupt, RuntimeError, HpcHessError), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        hpc_hess.slq(hpc_hess.hessian(model, batches, watched, step=1e-2), steps=2)
    assert watched.left <= 0, "it came to the middle"
    assert [hook for m in model.modules() for hook in m._forward_hooks] == kept or how == "inside"


def _nothing(model: nn.Module, batches: list[Any]) -> None:
    """Do nothing."""


def _evaluated(model: nn.Module, batches: list[Any]) -> None:
    """A spectrum after a pass without gradients, which leaves the root's weights gathered."""
    training = model.training
    with torch.no_grad():
        model.eval()(batches[0][0])
    model.train(training)
    _spectrum(model, batches)


def _built(how: str, size: int) -> tuple[Any, dict[str, Any]]:
    torch.manual_seed(1)
    model: Any = Trained()
    mesh = init_device_mesh("cpu", (size,))
    if how == "ddp":
        return DistributedDataParallel(model, find_unused_parameters=True), {}
    if how == "plain":
        return model, {}
    if how == "mixed":  # running statistics would stay in float32 beside weights in bfloat16
        model.norm = nn.LayerNorm(6)
    if how == "checkpointed":
        model.blocks[1] = checkpoint_wrapper(model.blocks[1])
    if how == "compiled":
        model.blocks[1].compile(backend="eager")
    if how == "hooked":
        fully_sharded(model, mesh)
        model.head.weight.register_post_accumulate_grad_hook(lambda p: p.grad.mul_(0.5))
        return model, {}
    options: dict[str, Any] = {}
    if how == "mixed":
        options["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    if how == "gathered":
        options["reshard_after_forward"] = False
    return fully_sharded(model, mesh, **options), {}


def _state() -> tuple[Any, ...]:
    return (
        torch.get_rng_state().tolist(),
        np.random.get_state()[1].tolist(),  # noqa: NPY002
        random.getstate(),
        torch.is_grad_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.get_float32_matmul_precision(),
    )


def _trained(world: World, how: str, middle: Middle) -> dict[str, torch.Tensor]:
    """Train for four steps, each of two micro-batches, with ``middle`` within the third; return weights and buffers."""
    model, _ = _built(how, world.size)
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


def _both(world: World, jobs: list[tuple[str, Middle]]) -> list[str]:
    """Return what differs between a training with its middle and one without, of several in the same processes."""
    differing = []
    for how, middle in jobs:
        with_it, without = _trained(world, how, middle), _trained(world, how, _nothing)
        assert with_it.keys() == without.keys()
        differing += [f"{how}, {middle}: {name}" for name in without if not torch.equal(with_it[name], without[name])]
    return differing


SPREAD = ("fsdp", "mixed", "gathered", "checkpointed", "compiled", "hooked", "ddp")


def test_training_with_a_spectrum_in_the_middle() -> None:
    jobs = [*((how, _spectrum) for how in SPREAD), ("fsdp", _exact), ("ddp", _exact)]
    assert run_ranks(_both, 2, jobs, timeout_s=300) == [[], []]


def test_training_in_one_process() -> None:
    assert run_ranks(_both, 1, [("plain", _spectrum), ("compiled", _spectrum)]) == [[]]


def test_a_pass_without_gradients_just_before() -> None:
    """What it has gathered must not be used after parameters were moved."""
    assert run_ranks(_both, 2, [("fsdp", _evaluated), ("gathered", _evaluated)]) == [[], []]


@pytest.mark.parametrize("how", ["fsdp", "ddp"])
def test_training_after_a_spectrum_that_was_interrupted(how: str) -> None:
    """In the pass that weighs the batches, and within the first product's moved parameters."""
    stops = [(stop, after) for stop in ("interrupt", "signal", "inside") for after in (2, 9, 12)]
    jobs = [(how, functools.partial(_stopped, stop, after)) for stop, after in stops]
    assert run_ranks(_both, 2, jobs, timeout_s=300) == [[], []]


def _gathered_before(world: World) -> list[float]:
    torch.manual_seed(1)
    model: Any = fully_sharded(Trained().double(), init_device_mesh("cpu", (world.size,)), reshard_after_forward=False)
    generator = torch.Generator().manual_seed(10 + world.rank)
    data = [(torch.randn(8, 5, generator=generator).double(), torch.randn(8, 3, generator=generator).double())]
    mean = lambda m, b: mse_loss(m(b[0]), b[1])  # noqa: E731
    operator = hpc_hess.hessian(model, data, mean, step=1e-3)
    v = torch.linspace(-1, 1, operator.shape[0], dtype=torch.float64)
    first = operator @ v
    with torch.no_grad():
        model.eval()(data[0][0])
    model.train()
    return [float((operator @ v - first).abs().max()), float(first.abs().max())]


def test_products_after_a_pass_without_gradients() -> None:
    for difference, size in run_ranks(_gathered_before, 2):
        assert difference <= 1e-9 * size


def _blocks_alone(world: World) -> list[str]:
    """The root is not sharded by itself: each block is."""
    torch.manual_seed(1)
    model = Trained()
    for part in (model.inner, *model.blocks, model.norm, model.head):
        fully_shard(part, mesh=init_device_mesh("cpu", (world.size,)))
    before = whole_parameters(model)
    data = [(torch.randn(8, 5), torch.randn(8, 3))]
    _spectrum(model, data)
    loss(model, data[0]).backward()
    return [name for name, p in whole_parameters(model).items() if not torch.equal(p, before[name])]


def test_a_root_that_is_not_sharded() -> None:
    assert run_ranks(_blocks_alone, 2) == [[], []]

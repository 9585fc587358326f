"""A spectrum in the middle of a training leaves no trace: the weights after it are those without it, to the last bit."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import mse_loss

import hpc_hess
from hpc_hess.errors import HpcHessError
from hpc_hess.parallel.world import World
from tests.support.in_training import fully_sharded, whole_parameters
from tests.support.spawn import run_ranks
from tests.support.training import SPREAD, Trained, differing, exact, loss, spectrum


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


def _evaluated(model: nn.Module, batches: list[Any]) -> None:
    """A spectrum after a pass without gradients, which leaves the root's weights gathered."""
    training = model.training
    with torch.no_grad():
        model.eval()(batches[0][0])
    model.train(training)
    spectrum(model, batches)


def test_training_with_a_spectrum_in_the_middle() -> None:
    jobs = [*((how, spectrum) for how in (*SPREAD, "hsdp 2x1")), ("fsdp", exact), ("ddp", exact)]
    assert run_ranks(differing, 2, jobs, timeout_s=300) == [[], []]


def test_training_in_one_process() -> None:
    assert run_ranks(differing, 1, [("plain", spectrum), ("compiled", spectrum)]) == [[]]


def test_a_pass_without_gradients_just_before() -> None:
    """What it has gathered must not be used after parameters were moved."""
    assert run_ranks(differing, 2, [("fsdp", _evaluated), ("gathered", _evaluated)]) == [[], []]


@pytest.mark.parametrize("how", ["fsdp", "ddp"])
def test_training_after_a_spectrum_that_was_interrupted(how: str) -> None:
    """In the pass that weighs the batches, and within the first product's moved parameters."""
    stops = [(stop, after) for stop in ("interrupt", "signal", "inside") for after in (2, 9, 12)]
    jobs = [(how, functools.partial(_stopped, stop, after)) for stop, after in stops]
    assert run_ranks(differing, 2, jobs, timeout_s=300) == [[], []]


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
    spectrum(model, data)
    loss(model, data[0]).backward()
    return [name for name, p in whole_parameters(model).items() if not torch.equal(p, before[name])]


def test_a_root_that_is_not_sharded() -> None:
    assert run_ranks(_blocks_alone, 2) == [[], []]

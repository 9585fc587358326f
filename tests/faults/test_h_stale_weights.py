"""H1: what was gathered for a forward pass is not used after the parameters were written, by whomever, on two ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from hpc_hess.curvature.decomposition import most_frequent, weights
from hpc_hess.curvature.differences.finite_difference import FiniteDifferenceHessian
from hpc_hess.model.sharded.gradient import Gradient
from hpc_hess.model.sharded.shard import ShardedModel
from hpc_hess.parallel.world import World
from tests.support.sharded import assemble, from_global, ragged_objective, send, shard_toy
from tests.support.spawn import run_ranks

TOY = "llama_untied"


def _forward_measuring(model: ShardedModel, gradient: Gradient) -> None:
    with model.measuring():
        gradient.objective.logits_and_targets(model.module, 0)  # type: ignore[attr-defined]


def _forward_without_a_graph(model: ShardedModel, gradient: Gradient) -> None:
    with torch.no_grad():  # as a program of one's own does it, which frees nothing
        gradient.objective.contribution(model.module, 0)


def _forward_without_backward(model: ShardedModel, gradient: Gradient) -> None:
    gradient.objective.contribution(model.module, 0)


def _class_weights(model: ShardedModel, gradient: Gradient) -> None:
    groups, _ = most_frequent(np.ones(96, np.int64), 2)
    weights(gradient.objective, model.module, groups, lambda sums: sums)  # type: ignore[arg-type]


def _gradient(model: ShardedModel, gradient: Gradient) -> None:
    gradient()


FORWARDS: list[Callable[[ShardedModel, Gradient], None]] = [
    _forward_measuring,
    _forward_without_a_graph,
    _forward_without_backward,
    _class_weights,
    _gradient,
]


def _write(model: ShardedModel, target: torch.Tensor) -> None:
    model.write_parameters(target)


def _move(model: ShardedModel, target: torch.Tensor) -> None:
    start = model.read_parameters()
    model.move_parameters(start, target - start, 1.0)


def _optimise(model: ShardedModel, target: torch.Tensor) -> None:
    """As the trainings do: an optimizer over the local parts."""
    parameters, start = model.local_parameters, model.read_parameters()
    for parameter, step in zip(parameters, model.pieces_of(start - target), strict=True):
        parameter.grad = step.clone()
    torch.optim.SGD(parameters, lr=1.0).step()
    model.written()


WRITERS: list[Callable[[ShardedModel, torch.Tensor], None]] = [_write, _move, _optimise]


def _every_pair(world: World) -> list[tuple[str, str, Any]]:
    """Return, for each forward and writer, the gradient after both."""
    world.make_mesh()
    model = shard_toy(world, TOY)
    gradient = Gradient(model, ragged_objective(world.rank, world.size))
    theta = model.read_parameters()
    generator = torch.Generator().manual_seed(3)
    whole = 0.1 * torch.randn(model.space.size, generator=generator, dtype=torch.float64)
    target = theta + from_global(model.space, whole).data
    found = []
    for forward in FORWARDS:
        for write in WRITERS:
            forward(model, gradient)
            write(model, target)
            found.append((forward.__name__, write.__name__, send(gradient()[1])))
            model.write_parameters(theta)
            gradient()  # so that the next forward pass gathers theta, not what is written next
    return found


def test_every_writer_after_every_forward_pass() -> None:
    right = _every_pair_alone()
    ranks = run_ranks(_every_pair, 2)
    for one, other in zip(*ranks, strict=True):
        found = assemble([one[2], other[2]])
        assert np.abs(found - right).max() < 1e-10, (one[0], one[1])


def _every_pair_alone() -> np.ndarray:
    model = shard_toy(World.alone(), TOY)
    generator = torch.Generator().manual_seed(3)
    whole = 0.1 * torch.randn(model.space.size, generator=generator, dtype=torch.float64)
    model.write_parameters(model.read_parameters() + from_global(model.space, whole).data)
    return Gradient(model, ragged_objective())()[1].data.numpy()


def _difference(world: World) -> Any:
    """Return a product by differences that follows a forward pass which keeps the last group gathered."""
    world.make_mesh()
    model = shard_toy(world, TOY)
    gradient = Gradient(model, ragged_objective(world.rank, world.size))
    operator = FiniteDifferenceHessian(gradient, "central", 1e-3)
    v = from_global(model.space, torch.linspace(-1, 1, model.space.size, dtype=torch.float64))
    _forward_without_a_graph(model, gradient)
    return send(operator.matvec(v))


@pytest.mark.parametrize("ranks", [2])
def test_a_product_after_a_measurement(ranks: int) -> None:
    model = shard_toy(World.alone(), TOY)
    v = model.space.wrap(torch.linspace(-1, 1, model.space.size, dtype=torch.float64))
    right = FiniteDifferenceHessian(Gradient(model, ragged_objective()), "central", 1e-3).matvec(v).data.numpy()
    found = assemble(run_ranks(_difference, ranks))
    assert np.abs(found - right).max() < 1e-7 * np.abs(right).max()

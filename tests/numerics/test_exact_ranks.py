"""Exact products over real ranks, uneven shards, shards of another dimension, replicas: the same numbers as alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from hpc_hess.curvature.exact import ExactHessian
from hpc_hess.curvature.gauss_newton import GaussNewton
from hpc_hess.model.loss import MicroBatch
from hpc_hess.model.shard import shard_model
from hpc_hess.parallel.layout import Layout
from hpc_hess.parallel.world import World
from tests.numerics.exact_case import NO_SDPA, micro_batches, objective
from tests.spawn import run_ranks
from tests.toys import toy_model


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


def products(
    world: World, name: str, replicate: int = 1, include: list[str] | None = None
) -> tuple[list[tuple[int, int]], list[Any]]:
    """This rank's global intervals, and its parts of three Hessian products (two in lock-step) and a Gauss-Newton one."""
    attention = "eager" if name in NO_SDPA else "sdpa"
    source = toy_model(name, dtype=torch.float64, attention=attention)
    if world.connected:
        world.make_mesh(replicate)
    skeleton = copy.deepcopy(source).to("meta")
    skeleton.tie_weights()  # meta parameters were made one by one
    for (_, buffer), owner in zip(source.named_buffers(), _owners(skeleton), strict=True):
        owner[0]._buffers[owner[1]] = buffer.clone()
    plain = copy.deepcopy(skeleton)
    model = shard_model(skeleton, world, include=include, master_dtype=torch.float64, compute_dtype=torch.float64)
    named, full = dict(model.module.named_parameters()), dict(source.named_parameters())
    whole = Layout({n: tuple(p.shape) for n, p in full.items()}, 1)
    with torch.no_grad():
        for n, parameter in named.items():
            _fill(parameter, full[n].detach())
    num_tokens = objective([b for r in range(world.size) for b in _rows(r, world.size)]).num_tokens
    loss = objective(_rows(world.rank, world.size), num_tokens)
    generator = torch.Generator().manual_seed(3)
    everything = torch.randn(2, whole.num_params, generator=generator, dtype=torch.float64)
    vs = [model.space.wrap(_local(row, model.space.shard)) for row in everything]
    hessian = ExactHessian(model, loss, plain=plain)
    out = [*hessian.matmat(vs), hessian.matvec(vs[0]), GaussNewton(model, loss, plain=plain).matvec(vs[0])]
    starts, lengths = model.space.shard.global_intervals
    return list(zip(starts.tolist(), lengths.tolist(), strict=True)), [o.data.numpy() for o in out]


def _owners(module: torch.nn.Module) -> list[Any]:
    return [(m, k) for m in module.modules() for k, b in m._buffers.items() if b is not None]


def _fill(parameter: torch.Tensor, value: torch.Tensor) -> None:
    from torch.distributed.tensor import DTensor, distribute_tensor

    if isinstance(parameter, DTensor):
        parameter.copy_(distribute_tensor(value, parameter.device_mesh, parameter.placements))
    else:
        parameter.copy_(value)


def _local(row: torch.Tensor, shard: Any) -> torch.Tensor:
    starts, lengths = shard.global_intervals
    pieces = [row[s : s + n] for s, n in zip(starts.tolist(), lengths.tolist(), strict=True)]
    return torch.cat(pieces) if pieces else row[:0]


def _assemble(answers: list[Any], size: int) -> list[torch.Tensor]:
    out = [torch.zeros(size, dtype=torch.float64) for _ in answers[0][1]]
    for intervals, values in answers:
        for whole, part in zip(out, values, strict=True):
            offset = 0
            for start, length in intervals:
                whole[start : start + length] = torch.from_numpy(part[offset : offset + length])
                offset += length
    return out


@pytest.mark.parametrize(
    ("name", "ranks", "replicate", "include"),
    [
        ("llama", 2, 1, None), ("gpt2", 3, 1, None), ("mixtral", 3, 1, None), ("llama_untied", 2, 2, None),
        ("llama_untied", 2, 1, ["*layers.1*", "model.norm*"]),
    ],
)  # fmt: skip
def test_ranks_agree_with_one_process(name: str, ranks: int, replicate: int, include: list[str] | None) -> None:
    size = sum(p.numel() for p in toy_model(name).parameters())
    alone = _assemble([products(World.alone(), name, 1, include)], size)
    together = _assemble(run_ranks(products, ranks, name, replicate, include, timeout_s=240), size)
    for found, expected in zip(together, alone, strict=True):
        assert float(expected.norm()) > 0
        assert float((found - expected).norm() / expected.norm()) < 1e-12

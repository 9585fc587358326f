"""Exact products over real ranks, uneven shards, shards of another dimension, replicas: the same numbers as alone."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from hpc_hess.curvature.exact.exact import ExactHessian
from hpc_hess.curvature.exact.gauss_newton import GaussNewton
from hpc_hess.linalg.lanczos import Lanczos
from hpc_hess.model.sharded.loss import CausalLMObjective, MicroBatch
from hpc_hess.model.sharded.shard import ShardedModel, shard_model
from hpc_hess.parallel.basis import Basis
from hpc_hess.parallel.world import World
from tests.numerics.exact_case import NO_SDPA, micro_batches, objective
from tests.sharded import without_shared_memory
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


@dataclass(frozen=True)
class Case:
    name: str
    include: list[str] | None = None
    dtype: torch.dtype = torch.float64
    lanczos_steps: int = 0


def _sharded(world: World, case: Case) -> tuple[ShardedModel, Any, CausalLMObjective]:
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


def products_through_gloo(world: World, replicate: int, cases: list[Case]) -> list[Any]:
    without_shared_memory()
    return products(world, replicate, cases)


def products(world: World, replicate: int, cases: list[Case]) -> list[Any]:
    """For each case this rank's global intervals and local results: two Hessian products in lock-step, the first again
    alone, a Gauss-Newton product; or the coefficients of a Lanczos run."""
    if world.connected:
        world.make_mesh(replicate)
    answers = []
    for case in cases:
        model, plain, loss = _sharded(world, case)
        generator = torch.Generator().manual_seed(3)
        everything = torch.randn(2, model.layout.num_params_full, generator=generator, dtype=torch.float64)
        vs = [model.space.wrap(_local(row, model.space.shard).to(case.dtype)) for row in everything]
        hessian = ExactHessian(model, loss, plain=plain)
        if case.lanczos_steps:
            state = Lanczos(hessian, Basis(model.space, case.lanczos_steps), case.lanczos_steps)
            state.start(vs[0])
            while not state.finished:
                state.step()
            answers.append([*state.alpha, *state.beta[:-1]])
            continue
        out = [*hessian.matmat(vs), hessian.matvec(vs[0]), GaussNewton(model, loss, plain=plain).matvec(vs[0])]
        starts, lengths = model.space.shard.global_intervals
        answers.append((list(zip(starts.tolist(), lengths.tolist(), strict=True)), [o.data.numpy() for o in out]))
    return answers


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
    ("ranks", "replicate", "cases", "how"),
    [
        (2, 1, [Case("llama"), Case("llama_untied", ["*layers.1*", "model.norm*"])], products),
        (3, 1, [Case("gpt2"), Case("mixtral")], products),
        (2, 2, [Case("llama_untied")], products),
        (3, 1, [Case("gpt2")], products_through_gloo),
    ],
    ids=["2 ranks", "3 ranks", "2 replicas", "3 ranks through gloo"],
)
def test_products_are_those_of_one_process(ranks: int, replicate: int, cases: list[Case], how: Any) -> None:
    alone = products(World.alone(), 1, cases)
    together = run_ranks(how, ranks, replicate, cases, timeout_s=300)
    for number, case in enumerate(cases):
        size = sum(p.numel() for p in toy_model(case.name).parameters())
        whole = _assemble([alone[number]], size)
        for found, expected in zip(_assemble([t[number] for t in together], size), whole, strict=True):
            assert float(expected.norm()) > 0
            assert float((found - expected).norm() / expected.norm()) < 1e-12


def test_lanczos_in_fp32_agrees_over_ranks() -> None:
    cases = [Case("llama", dtype=torch.float32, lanczos_steps=10)]
    (alone,) = products(World.alone(), 1, cases)
    for (found,) in run_ranks(products, 4, 1, cases, timeout_s=300):
        assert found == pytest.approx(alone, rel=0, abs=1e-5 * max(map(abs, alone)))

"""Exact products over real ranks, uneven shards, shards of another dimension, replicas: the same numbers as alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hpc_hess.curvature.exact.exact import ExactHessian
from hpc_hess.curvature.exact.gauss_newton import GaussNewton
from hpc_hess.linalg.lanczos import Lanczos
from hpc_hess.parallel.basis import Basis
from hpc_hess.parallel.world import World
from tests.support.exact_ranks import Case, sharded_case
from tests.support.sharded import without_shared_memory
from tests.support.spawn import run_ranks
from tests.support.toys import toy_model

pytestmark = pytest.mark.slow


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
        model, plain, loss = sharded_case(world, case)
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

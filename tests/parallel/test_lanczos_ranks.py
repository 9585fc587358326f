"""Lanczos over ranks: the same alpha and beta, and as many all-reduces a step whatever the number of vectors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from hpc_hess.linalg.lanczos import Lanczos, basis_rows, next_products
from hpc_hess.linalg.operator import FunctionOperator
from hpc_hess.linalg.probes import fill
from hpc_hess.parallel.basis import Basis
from hpc_hess.parallel.layout import Layout
from hpc_hess.parallel.vector import Vector, VectorSpace
from hpc_hess.parallel.world import World
from tests.support.sharded import from_global
from tests.support.spawn import run_ranks

SHAPES: dict[str, tuple[int, ...]] = {"embed": (37, 20), "experts": (3, 12, 16), "norm": (5,), "scalar": (), "w": (41, 11)}
STEPS = 12


def spectrum(size: int) -> torch.Tensor:
    """A bulk around zero and outliers on both sides, in no order."""
    values = torch.linspace(-1, 1, size, dtype=torch.float64) ** 3
    values[::97] = torch.linspace(-60, 90, len(values[::97]), dtype=torch.float64)
    return values[torch.randperm(size, generator=torch.Generator().manual_seed(2))]


def prescribed(space: VectorSpace) -> FunctionOperator:
    """A dense symmetric matrix with that spectrum: a diagonal between two reflections I - 2 u u^T."""
    u = from_global(space, torch.linspace(0.3, 1.7, space.size, dtype=torch.float64))
    u.scale_(1 / u.norm())
    entries = from_global(space, spectrum(space.size))

    def reflect(v: Vector) -> Vector:
        return v.copy().axpy_(-2 * u.dot(v), u)

    def product(v: Vector) -> Vector:
        middle = reflect(v)
        return reflect(space.wrap(entries.data * middle.data))

    return FunctionOperator(space, product)


def lanczos(world: World, dtype: torch.dtype, mode: int | str, distribution: str = "rademacher") -> Lanczos:
    layout = Layout(SHAPES, world.shard_size, {"experts": 1} if world.shard_size > 1 else {})
    space = VectorSpace(world, layout, dtype)
    state = Lanczos(prescribed(space), Basis(space, basis_rows(mode, STEPS)), STEPS, mode)
    start = space.zeros()
    fill(start.data, *space.shard.global_intervals, seed=5, probe=0, distribution=distribution)
    state.start(start)
    return state


def _counted(count: dict[str, int], name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def counting(*args: Any, **kwargs: Any) -> Any:
        count[name] = count.get(name, 0) + 1
        return function(*args, **kwargs)

    return counting


CASES: list[tuple[torch.dtype, int | str, str]] = [
    (torch.float64, "full", "rademacher"),
    (torch.float64, "full", "gaussian"),
    (torch.float64, 4, "rademacher"),
    (torch.float64, "none", "rademacher"),
    (torch.float32, "full", "rademacher"),
]


def _run(world: World, case: tuple[torch.dtype, int | str, str]) -> tuple[list[float], list[float]]:
    state = lanczos(world, *case)
    while not state.finished:
        state.step()
    return state.alpha, state.beta


Answer = tuple[list[tuple[list[float], list[float]]], list[dict[str, int]]]


def _on_ranks(world: World, replicates: list[int]) -> list[Answer]:
    return [_on_mesh(world, replicate) for replicate in replicates]


def _on_mesh(world: World, replicate: int) -> Answer:
    world.make_mesh(replicate)
    results = [_run(world, case) for case in CASES]
    # what each step says to the other ranks, beyond the product
    per_step: list[dict[str, int]] = []
    originals = {name: getattr(dist, name) for name in ("all_reduce", "broadcast", "all_gather", "all_gather_object")}
    for case in CASES[:4]:
        state = lanczos(world, *case)
        while not state.finished:
            w = next_products([state])[0]
            count: dict[str, int] = {}
            for name, function in originals.items():
                setattr(dist, name, _counted(count, name, function))
            state.advance(w)
            for name, function in originals.items():
                setattr(dist, name, function)
            per_step.append(count)
    return results, per_step


@pytest.mark.parametrize(("num_ranks", "replicates"), [(2, [1]), (3, [1]), (4, [1, 2])])
def test_alpha_and_beta_do_not_depend_on_the_ranks(num_ranks: int, replicates: list[int]) -> None:
    """4 ranks also as 2 replicas of 2 shards."""
    everything = run_ranks(_on_ranks, num_ranks, replicates)
    for place, replicate in enumerate(replicates):
        _check([answers[place] for answers in everything], replicate)


def _check(answers: list[Answer], replicate: int) -> None:
    for case, setting in enumerate(CASES):
        alone_alpha, alone_beta = _run(World.alone(), setting)
        largest = max(np.abs(alone_alpha).max(), np.abs(alone_beta).max())
        assert len(alone_alpha) == STEPS
        for results, _ in answers:  # bitwise the same on every rank
            assert results[case] == answers[0][0][case]
        alpha, beta = answers[0][0][case]
        tolerance = 1e-8 if setting[0] == torch.float64 else 1e-3
        np.testing.assert_allclose(alpha[:10], alone_alpha[:10], atol=tolerance * largest, rtol=0)
        np.testing.assert_allclose(beta[:10], alone_beta[:10], atol=tolerance * largest, rtol=0)

    for _, per_step in answers:
        full, window, none = per_step[:STEPS], per_step[2 * STEPS : 3 * STEPS], per_step[3 * STEPS :]
        replicas = {"broadcast": 3} if replicate > 1 else {}
        assert full == [{"all_reduce": 3, **replicas}] * STEPS  # two passes and a norm, however many vectors
        assert window == [{"all_reduce": 3, **replicas}] * STEPS
        replicas = {"broadcast": 2} if replicate > 1 else {}
        assert none == [{"all_reduce": 2, **replicas}] * STEPS


def test_one_process_finds_the_prescribed_spectrum() -> None:
    """The operator the ranks share is the one it is said to be."""
    state = lanczos(World.alone(), torch.float64, "full")
    space = state.operator.space
    matrix = torch.stack([state.operator.matvec(space.wrap(row)).data for row in torch.eye(space.size, dtype=torch.float64)])
    torch.testing.assert_close(matrix, matrix.T, atol=1e-12, rtol=0)
    values = torch.linalg.eigvalsh(matrix)
    torch.testing.assert_close(values, spectrum(space.size).sort().values, atol=1e-11, rtol=0)

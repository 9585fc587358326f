"""Collectives through shared memory against torch's own, and what becomes of them where memory cannot be shared."""

from __future__ import annotations

import pytest
import torch

from hpc_hess.parallel import shared_memory
from hpc_hess.parallel.shard_collectives import TorchCollectives
from hpc_hess.parallel.shared_memory import SharedMemory
from hpc_hess.parallel.world import World
from tests.support.spawn import run_ranks


def _both(world: World, dtype: torch.dtype, sizes: list[int]) -> list[bool]:
    """Return, for each size, whether both ways give the same bits; sizes in turn, so that halves are used again."""
    shared_memory._ALL_HALVES_BYTES, shared_memory._LEAST_BYTES = 1 << 16, 1 << 12
    world.make_mesh()
    ours, theirs = world.collectives, TorchCollectives(world.mesh.get_group("shard"), gloo=True)
    assert isinstance(ours, SharedMemory)
    generator = torch.Generator().manual_seed(world.rank)
    same = []
    for size in sizes:
        mine = torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)
        everyone = torch.randn(world.size * size, generator=generator, dtype=torch.float64).to(dtype)
        found = []
        for way in (ours, theirs):
            gathered, summed = torch.full((world.size * size,), 7.0, dtype=dtype), torch.full((size,), 7.0, dtype=dtype)
            way.start_all_gather(gathered, mine).wait()
            way.start_reduce_scatter(summed, everyone).wait()
            found.append((gathered, summed))
        same.append(all(torch.equal(a, b) for a, b in zip(*found, strict=True)))
        assert float(found[0][0][world.rank * size : (world.rank + 1) * size].double().sum()) == float(mine.double().sum())
    return same


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_same_bits_as_gloo(ranks: int, dtype: torch.dtype) -> None:
    sizes = [1, 5, 0, 40_001, 4096, 3, 99_991, 7]  # one piece and several, none, odd
    assert run_ranks(_both, ranks, dtype, sizes) == [[True] * len(sizes)] * ranks


def _bfloat16(world: World) -> bool:
    world.make_mesh()
    mine = torch.full((5,), 1.0 + world.rank, dtype=torch.bfloat16)
    out = torch.empty(5 * world.size, dtype=torch.bfloat16)
    world.collectives.start_all_gather(out, mine).wait()
    return out.view(world.size, 5)[:, 0].tolist() == [1.0 + rank for rank in range(world.size)]


def test_gathers_any_dtype() -> None:
    assert run_ranks(_bfloat16, 2) == [True, True]


def _in_place(world: World) -> list[float]:
    """FSDP gives its own part of the result as what it sends."""
    world.make_mesh()
    out = torch.zeros(3 * world.size)
    mine = out[3 * world.rank : 3 * world.rank + 3].fill_(1.0 + world.rank)
    world.collectives.start_all_gather(out, mine).wait()
    return out.tolist()


def test_gathers_in_place() -> None:
    assert run_ranks(_in_place, 2) == [[1.0, 1.0, 1.0, 2.0, 2.0, 2.0]] * 2


def _one_cannot(world: World, how: str) -> tuple[bool, list[float]]:
    if world.rank == 1:
        if how == "create":
            shared_memory.Window.__init__ = _refuse  # type: ignore[assignment,method-assign]
        else:
            shared_memory.Window.see = _refuse  # type: ignore[assignment,method-assign]
    world.make_mesh()
    out = torch.empty(2)
    world.collectives.start_all_gather(out, torch.tensor([float(world.rank)])).wait()
    return isinstance(world.collectives, TorchCollectives), out.tolist()


def _refuse(*args: object) -> None:
    raise OSError("no memory for files")


@pytest.mark.parametrize("how", ["create", "see"])
def test_where_one_rank_cannot_share_all_use_gloo(how: str) -> None:
    assert run_ranks(_one_cannot, 2, how) == [(True, [0.0, 1.0])] * 2


def _elsewhere(world: World) -> bool:
    """The number of another process' file, but with other contents: as on another machine."""
    see = shared_memory.Window.see
    shared_memory.Window.see = lambda self, address: see(self, (*address[:2], b"x" * 16))  # type: ignore[method-assign]
    world.make_mesh()
    return isinstance(world.collectives, TorchCollectives)


def test_a_process_of_another_machine_is_not_taken_for_a_rank() -> None:
    assert run_ranks(_elsewhere, 2) == [True, True]


def _replicas(world: World) -> list[float]:
    world.make_mesh(replicate=2)
    assert isinstance(world.collectives, SharedMemory)
    out = torch.empty(2)
    world.collectives.start_all_gather(out, torch.tensor([float(world.rank)])).wait()
    return out.tolist()


def test_replicas_exchange_within_themselves() -> None:
    assert run_ranks(_replicas, 4) == [[0.0, 1.0], [0.0, 1.0], [2.0, 3.0], [2.0, 3.0]]

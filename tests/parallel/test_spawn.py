"""run_ranks itself: values by rank, and a failure that is shown and leaves nothing behind."""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch

from hpc_hess.parallel.world import World
from tests.support.spawn import run_ranks


def _sum(world: World, value: float) -> tuple[int, float]:
    total = world.sum_over_ranks(torch.tensor([value * world.rank], dtype=torch.float64), "sum")
    return world.rank, float(total)


def _rank_1_raises(world: World) -> None:
    if world.rank == 1:
        raise ValueError("the lamp is out")
    world.barrier("wait for the others")


def _rank_0_is_killed(world: World) -> None:
    if world.rank == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    world.barrier("wait for the others")


def _sleep(world: World) -> None:
    time.sleep(60)


def test_values_come_back_by_rank() -> None:
    assert run_ranks(_sum, 3, 2.0) == [(0, 6.0), (1, 6.0), (2, 6.0)]


def test_a_raising_rank_is_shown_first() -> None:
    with pytest.raises(AssertionError, match=r"(?s)^rank 1 of 2 failed.*ValueError: the lamp is out"):
        run_ranks(_rank_1_raises, 2)


def test_a_killed_rank_is_named() -> None:
    with pytest.raises(AssertionError, match="rank 0 of 2 ended with code -9"):
        run_ranks(_rank_0_is_killed, 2)


def test_a_hanging_rank_ends_at_the_timeout() -> None:
    with pytest.raises(AssertionError, match="rank 0 of 1 gave no answer within 3 s"):
        run_ranks(_sleep, 1, timeout_s=3)

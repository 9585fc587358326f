"""Faults injected for real: two jobs on one run directory, a full disk, a read-only one."""

import os
import shutil
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest

from hpc_hess.errors import StoreError
from hpc_hess.parallel.world import World
from hpc_hess.storage.lock import RunLock
from tests.support.spawn import run_ranks, start_ranks
from tests.support.store_toys import advance, check_state, create, fill, local_row, punch_hole, reopen, wait_for

ALONE = World.alone()


# -- the lock ----------------------------------------------------------------------------------------------------


def hold(world: World, run_dir: str, notes: str) -> None:
    store = create(Path(run_dir), world)
    advance(store, (0, 2))
    (Path(notes) / str(world.rank)).touch()
    signal.pause()


def test_one_job_at_a_time_and_a_dead_one_leaves_no_lock(tmp_path):
    run_dir = tmp_path / "run"
    processes, pipes = start_ranks(hold, 2, str(run_dir), str(tmp_path))
    for rank in range(2):
        wait_for(tmp_path / str(rank), processes)
    try:
        with pytest.raises(StoreError, match=rf"another job is using .*/run \(host .*pid {processes[0].pid}, .*2 ranks"):
            RunLock.acquire(run_dir, ALONE, wait_s=0.2)
        os.kill(processes[1].pid, signal.SIGSTOP)  # a rank that outlives the first one and might still write
        os.kill(processes[0].pid, signal.SIGKILL)
        processes[0].join(20)
        with pytest.raises(StoreError, match="another job is using"):
            RunLock.acquire(run_dir, ALONE, wait_s=0.2)
        os.kill(processes[1].pid, signal.SIGKILL)
        store = reopen(run_dir, ALONE)  # on one rank: rebuilt
        assert store.state.step == 2
        check_state(store)
        store.close()
    finally:
        for process, pipe in zip(processes, pipes, strict=True):
            process.kill()
            process.join()
            pipe.close()


def take_lock(world: World, run_dir: str) -> None:
    for _ in range(3):
        RunLock.acquire(Path(run_dir), world).release()
        world.barrier("next")


def test_a_released_lock_can_be_taken_again(tmp_path):
    run_ranks(take_lock, 3, str(tmp_path))
    assert (tmp_path / "run.lock").read_text() == ""


def lock_somewhere_else(world: World, run_dir: str) -> str:
    other = Path(run_dir) / f"disk of node {world.rank}"
    with pytest.raises(StoreError) as caught:
        RunLock.acquire(other, world, wait_s=0.2)
    return str(caught.value)


def test_a_directory_that_nodes_do_not_share_is_noticed(tmp_path):
    answers = run_ranks(lock_somewhere_else, 2, str(tmp_path))
    assert answers[0] == answers[1]
    assert "rank 1 on" in answers[0]
    assert "all nodes share" in answers[0]


# -- the disk ----------------------------------------------------------------------------------------------------


WIDE = {"w": (2, 100_000)}  # a row of 400 kB a rank: written directly
NARROW = {"w": (2, 50)}  # a row of 200 B a rank: buffered by HDF5 until it is flushed


def row_on_a_full_disk(world: World, run_dir: str, shapes: dict) -> tuple[str, list]:
    path = Path(run_dir)
    store = create(path, world, shapes, rows=6)
    advance(store, (0, 3))
    before = store.state
    if world.rank == 1:  # give back what was reserved for this rank's next rows, as if nothing could be reserved
        file = next(path.glob("krylov.ranks/*/rank-00001.h5"))
        basis = store._driver._bases[0]
        start = basis.id.get_offset()
        punch_hole(file, start + 4 * store._shard.size * 4, start + basis.nbytes)
        fill(path.parent)
    world.barrier("the disk is full")
    with pytest.raises(StoreError) as caught:
        advance(store)
    store.abandon()
    world.barrier("gave up")
    if world.rank == 0:
        (path.parent / "filler").unlink()
    world.barrier("there is space again")
    store = reopen(path, world, shapes)
    assert store.state == before
    check_state(store)
    advance(store)
    check_state(store)
    store.close()
    return str(caught.value), before.step


@pytest.mark.skipif(shutil.which("fallocate") is None, reason="no fallocate command")
def test_a_disk_that_fills_during_a_row(small_disk):
    answers = run_ranks(row_on_a_full_disk, 2, str(small_disk / "run"), WIDE)
    assert answers[0] == answers[1]
    assert "is full (write a basis row): free some space" in answers[0][0]


def test_a_full_disk_stops_no_run_whose_space_is_reserved(small_disk):
    for name, shapes in (("wide", WIDE), ("narrow", NARROW)):
        store = create(small_disk / name, ALONE, shapes)
        advance(store, (0, 2))
        filler = fill(small_disk)
        advance(store)
        check_state(store)
        store.close()
        filler.unlink()
        check_state(store := reopen(small_disk / name, ALONE, shapes))
        store.close()


def test_a_disk_that_is_too_small(small_disk):
    with pytest.raises(StoreError, match=r"needs 25\.\d MB .* has 2\d\.\d MB free"):
        create(small_disk / "run", ALONE, {"w": (10, 100_000)})
    assert [p.name for p in (small_disk / "run").iterdir()] == ["run.lock"]
    store = create(small_disk / "run", ALONE, {"w": (6, 100_000)})  # 14.4 MB: fits once, but not twice
    advance(store, (0, 3))
    store.close()
    with pytest.raises(StoreError, match=r"needs 15\.\d MB .* free"):
        reopen(small_disk / "run", ALONE, {"w": (6, 100_000)}, probes=3)
    store = reopen(small_disk / "run", ALONE, {"w": (6, 100_000)})
    check_state(store)
    store.close()


def test_a_read_only_disk(small_disk):
    store = create(small_disk / "run", ALONE)
    advance(store, (0, 1))
    store.close()
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    for attempt in (lambda: reopen(small_disk / "run", ALONE), lambda: create(small_disk / "new", ALONE)):
        with pytest.raises(StoreError, match=r"cannot write in .*Read-only file system.*choose another run.out"):
            attempt()


def test_a_small_row_on_a_full_disk_is_not_lost_silently(small_disk):
    """Below the size that HDF5 buffers, the error comes with the flush."""
    store = create(small_disk / "run", ALONE, {"w": (1, 3000)}, rows=6)
    advance(store, (0, 2))
    file = next((small_disk / "run").glob("krylov.ranks/*/rank-00000.h5"))
    basis = store._driver._bases[0]
    punch_hole(file, basis.id.get_offset() + 3 * 12000, basis.id.get_offset() + basis.nbytes)
    filler = fill(small_disk)
    with pytest.raises(StoreError, match="is full"):
        advance(store)
    store.abandon()
    filler.unlink()
    store = reopen(small_disk / "run", ALONE, {"w": (1, 3000)})
    assert store.state.step == 2
    check_state(store)
    np.testing.assert_array_equal(store.read_row(0, 1), local_row(store._shard, 0, 1))
    store.close()

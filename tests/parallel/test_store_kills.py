"""kill -9 at random instants, creation included: the store opens, loses at most the step in flight, and goes on."""

import os
import random
import shutil
import time
from pathlib import Path

import pytest

from hpc_hess.parallel.world import World
from hpc_hess.storage.store import store_exists
from tests.support.spawn import run_ranks, start_ranks
from tests.support.store_toys import advance, check_state, committed, create, reopen, wait_for

pytestmark = pytest.mark.slow

KILLS = int(os.environ.get("SOAK_KILLS", "10"))  # a soak sets more
SHAPES = {"w": (300, 400), "b": (7,)}
OPTIONS = {"probes": 2, "steps": 8, "rows": 9}


def job(world: World, run_dir: str, notes: str, groups: dict[str, int]) -> None:
    """Create or resume and run to the end, noting each completed step in a file of its own."""
    path, note = Path(run_dir), Path(notes)
    note.touch()
    exists = store_exists(path, world)
    store = reopen(path, world, SHAPES) if exists else create(path, world, SHAPES, **OPTIONS | groups)
    check_state(store)
    while not store.state.complete(store.schema.probes):
        state = store.state
        after = (state.group.stop, 1) if state.finished else (state.probe, state.step + 1)
        advance(store, after if after[1] < OPTIONS["steps"] else (state.group.stop, 0))
        if world.rank == 0:
            note.write_text(f"{store.state.probe} {store.state.step}")
    check_state(store)
    store.close()


@pytest.mark.parametrize("victims", ["all", "one"])
@pytest.mark.parametrize(("groups", "end"), [({}, (1, 8)), ({"probes": 3, "width": 2}, (2, 8))], ids=["alone", "pairs"])
def test_killed_at_random_instants(tmp_path, victims, groups, end):
    rng = random.Random(KILLS)
    run_dir, notes = tmp_path / "run", tmp_path / "notes"
    start = time.monotonic()
    run_ranks(job, 2, str(run_dir), str(notes), groups)
    whole_s = min(time.monotonic() - start, 3.0)
    opened = broken_off = created = 0
    for kill in range(KILLS):
        if kill % 2 == 0 or committed(run_dir) == end:  # every other kill hits a new run, its creation if early
            shutil.rmtree(run_dir)
        existed = (run_dir / "krylov.h5").exists()
        notes.unlink(missing_ok=True)
        processes, pipes = start_ranks(job, 2, str(run_dir), str(notes), groups)
        wait_for(notes, processes)
        time.sleep(rng.uniform(0, 0.03) if kill % 4 == 0 else rng.uniform(0, whole_s))
        doomed = processes if victims == "all" else [processes[rng.randrange(2)]]
        for process in doomed:
            process.kill()  # SIGKILL; nothing where the rank has just ended by itself
        start = time.monotonic()
        for process in processes:
            process.join(20)
        assert not any(p.is_alive() for p in processes), "a surviving rank hangs"
        for pipe in pipes:
            pipe.close()
        done = tuple(int(n) for n in notes.read_text().split()) or (0, 0)
        reached = committed(run_dir)
        assert reached >= done, "a completed step was lost"
        opened += existed
        created += (run_dir / "krylov.h5").exists() and not existed
        broken_off += reached < end
        whole_s *= 1.0 if reached < end else 0.7  # the first run, whose length this was, also paid for a cold start
    assert broken_off >= 4, "the kills came too late to mean anything"
    run_ranks(job, 2, str(run_dir), str(notes), groups)
    assert committed(run_dir) == end
    names = {p.name for p in run_dir.iterdir()}
    assert names == {"krylov.h5", "krylov.ranks", "run.lock"}
    assert len(list(run_dir.glob("krylov.ranks/*"))) == 1


def rebuild_job(world: World, run_dir: str, notes: str) -> None:
    Path(notes).touch()
    reopen(Path(run_dir), world, SHAPES).close()


@pytest.mark.parametrize(("groups", "end"), [({}, (1, 8)), ({"probes": 3, "width": 2}, (2, 8))], ids=["alone", "pairs"])
def test_killed_while_a_new_generation_is_built(tmp_path, groups, end):
    """A resume on other ranks is killed while it copies: the old store is still there, or the new one is."""
    rng = random.Random(7)
    run_dir, notes = tmp_path / "run", tmp_path / "notes"
    run_ranks(first_half, 1, str(run_dir), groups)
    for kill in range(6):
        notes.unlink(missing_ok=True)
        processes, pipes = start_ranks(rebuild_job, 1 + (kill + 1) % 2, str(run_dir), str(notes))
        wait_for(notes, processes)
        time.sleep(rng.uniform(0, 0.15))
        for process in processes:
            process.kill()  # SIGKILL; nothing where the rank has just ended by itself
        for process, pipe in zip(processes, pipes, strict=True):
            process.join(20)
            pipe.close()
        assert committed(run_dir) == (0, 6)
    run_ranks(job, 2, str(run_dir), str(notes), groups)
    assert committed(run_dir) == end
    assert len(list(run_dir.glob("krylov.ranks/*"))) == 1


def first_half(world: World, run_dir: str, groups: dict[str, int]) -> None:
    store = create(Path(run_dir), world, SHAPES, **OPTIONS | groups)
    advance(store, (0, 6))
    store.close()

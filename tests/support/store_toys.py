"""A run of the store without a model: every row, coefficient and resume state is a function of its index."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from hpc_hess.errors import HpcHessError
from hpc_hess.parallel.layout import Layout, Shard
from hpc_hess.parallel.world import World
from hpc_hess.storage.journal import Member
from hpc_hess.storage.reader import read_store
from hpc_hess.storage.schema import Schema
from hpc_hess.storage.seal import raw_data, seal
from hpc_hess.storage.store import Store, store_exists

# uneven rows, a scalar, an inner sharded dimension; rank 2 of 3 owns nothing of the first three
SHAPES: dict[str, tuple[int, ...]] = {"a": (2, 3), "b": (1, 700), "c": (), "e": (2, 7, 5), "w": (41, 13)}
FEW: dict[str, tuple[int, ...]] = {"a": (2, 3), "b": (1, 7)}  # rank 2 of 3 owns nothing at all


def reseal(path: Path) -> None:
    """Seal a file anew, whose contents a test has changed."""
    with h5py.File(path, "r") as file:
        room, data = file.userblock_size, raw_data(file)
    seal(path, room, data)


def unseal(path: Path) -> None:
    """Make a file like those of versions that knew no seal."""
    with path.open("r+b") as file:
        file.write(bytes(16))


def layout_for(num_shards: int, shapes: dict[str, tuple[int, ...]] = SHAPES) -> Layout:
    return Layout(shapes, num_shards, {"e": 1})


def whole_row(num_params: int, probe: int, row: int, dtype: str = "float32") -> NDArray:
    index = np.arange(num_params, dtype=np.int64)
    if dtype == "bfloat16":  # any bits
        return ((index * 40503 + row * 977 + probe * 131) % 65521).astype(np.uint16)
    return ((index * 2654435761 + row * 40503 + probe * 977) % 1000003).astype(dtype) / 997 - 500


def local_row(shard: Shard, probe: int, row: int, dtype: str = "float32") -> NDArray:
    starts, lengths = shard.file_intervals
    whole = whole_row(shard.layout.num_params, probe, row, dtype)
    return np.concatenate([whole[s : s + n] for s, n in zip(starts, lengths, strict=True)] or [whole[:0]])


def coefficients(probe: int, steps: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    k = np.arange(steps)
    return np.sin(k + 10.0 * probe), np.cos(k + 0.1 * probe)


def create(run_dir: Path, world: World, shapes: dict[str, tuple[int, ...]] = SHAPES, **changes: Any) -> Store:
    layout = layout_for(world.shard_size, shapes)
    options: dict[str, Any] = {
        "driver": "files",
        "probes": 2,
        "steps": 6,
        "rows": 6,
        "keep_basis": False,
        "dtype": "float32",
        "attributes": {"config": {"lanczos": {"steps": 6}}},
    }
    return Store.create(run_dir, layout=layout, shard=layout.shard(world.shard_rank), world=world, **(options | changes))


def reopen(run_dir: Path, world: World, shapes: dict[str, tuple[int, ...]] = SHAPES, **changes: Any) -> Store:
    layout = layout_for(world.shard_size, shapes)
    return Store.open(run_dir, layout=layout, shard=layout.shard(world.shard_rank), world=world, **changes)


def last_step(schema: Schema, probe: int) -> int:
    """Steps of a probe in all: where probes go together, probes 1, 4, 7 ... end two steps before the others."""
    return schema.steps - 2 if schema.width > 1 and probe % 3 == 1 else schema.steps


def check_state(store: Store) -> None:
    """Everything the newest commit promises is there, by value."""
    state, shard = store.state, store._shard
    for probe in state.group:
        assert store.verify_rows(probe, state.rows_of(probe)) == []
        for row in state.rows_of(probe):
            expected = local_row(shard, probe, row, store.schema.dtype)
            np.testing.assert_array_equal(store.read_row(probe, row), expected)
    for probe in range(state.group.stop):
        for found, expected in zip(store.recurrence(probe), coefficients(probe, state.lengths[probe]), strict=True):
            np.testing.assert_array_equal(found, expected)
        last = last_step(store.schema, probe)
        if probe in state.group:
            assert (state.lengths[probe], state.over(probe)) == (min(last, state.step), state.step >= last)
    assert not any(state.lengths[state.group.stop :])
    if state.sequence:
        assert json.loads(state.extra) == [state.probe, state.step]


def commit(store: Store, group: range, step: int) -> None:
    """Commit ``step`` steps of a group, fewer of the members that have ended."""
    members = []
    for probe in group:
        n = last_step(store.schema, probe)
        members.append(Member(*coefficients(probe, min(step, n)), ended=step >= n))
    store.commit(group.start, members, json.dumps([group.start, step]).encode())


def advance(store: Store, stop: tuple[int, int] | None = None, width: int | None = None) -> None:
    """Go on from the committed state to the end, or until (first probe of a group, step) is committed.

    Groups that begin are ``width`` wide, or as wide as the store allows.
    """
    schema, shard = store.schema, store._shard
    while not store.state.complete(schema.probes):
        state = store.state
        if state.finished:
            first = state.group.stop
            group = range(first, min(first + (width or schema.width), schema.probes))
            for probe in group:
                store.write_row(probe, 0, local_row(shard, probe, 0, schema.dtype))
            commit(store, group, 0)
            continue
        if (state.probe, state.step) == stop:
            return
        step = state.step + 1
        for probe in state.group:
            if step < min(schema.rows, last_step(schema, probe)):
                store.write_row(probe, step, local_row(shard, probe, step, schema.dtype))
        commit(store, state.group, step)


def run(world: World, run_dir: str, stop: tuple[int, int] | None = None, **changes: Any) -> tuple[int, int, bool]:
    """Create or resume, check what is there, go on; return (probe, step, finished)."""
    path = Path(run_dir)
    # the few options that open() takes too
    shared = {key: value for key, value in changes.items() if key in ("driver", "shapes")}
    store = reopen(path, world, **shared) if store_exists(path, world) else create(path, world, **changes)
    check_state(store)
    advance(store, stop)
    check_state(store)
    state = store.state
    store.close()
    return state.probe, state.step, state.finished


def committed(run_dir: Path) -> tuple[int, int]:
    """What is on disk is consistent, by value; return how far it is."""
    if not (run_dir / "krylov.h5").exists():
        return 0, 0
    with read_store(run_dir) as view:
        state = view.state
        # the shared basis of a finished probe may be half overwritten: no commit needs it then
        assert view.verify() == []
        for k in state.group:
            for row in state.rows_of(k):
                assert (view.probes[k].basis[row] == whole_row(view.schema.num_params, k, row)).all()
        for k in range(state.group.stop):
            n = state.lengths[k]
            assert (view.probes[k].alpha == coefficients(k, n)[0]).all()
            assert (view.probes[k].beta == coefficients(k, n)[1]).all()
        return state.probe, state.step


def wait_for(path: Path, processes: Sequence[BaseProcess], timeout_s: float = 60.0) -> None:
    """Wait for a file that the ranks write."""
    deadline = time.monotonic() + timeout_s
    while not path.exists():
        assert time.monotonic() < deadline
        assert all(p.is_alive() for p in processes)
        time.sleep(0.001)


def main() -> None:
    """mpirun -n P python -m tests.support.store_toys RUN DRIVER PROBE STEP [full] [pairs] [bfloat16]

    As ``run``, over MPI if any. A run that begins has two probes in lock-step, of three, with ``pairs``.
    """
    world = World.join(device="cpu", timeout_s=60)
    run_dir, driver, stop = Path(sys.argv[1]), sys.argv[2], (int(sys.argv[3]), int(sys.argv[4]))
    code = 0
    try:
        if "full" in sys.argv[5:]:
            fill_up(world, run_dir)
        groups: dict[str, Any] = {"probes": 3, "width": 2} if "pairs" in sys.argv[5:] else {}
        if "bfloat16" in sys.argv[5:]:
            groups["dtype"] = "bfloat16"
        state = run(world, str(run_dir), stop, driver=driver, **groups)
        if world.rank == 0:
            print(json.dumps(state))
    except HpcHessError as error:
        code = error.exit_code
        print(f"rank {world.rank}: {error}", flush=True)
    world.leave()
    sys.exit(code)


def fill_up(world: World, run_dir: Path) -> None:
    """Give back what is reserved for row 4 and after of the one file, then fill its small disk."""
    if world.rank == 0:
        path = run_dir / "krylov.h5"
        with h5py.File(path, "r") as file:
            basis = file["probes/0/basis"]
            start, stop = basis.id.get_offset() + 4 * basis.shape[1] * 4, basis.id.get_offset() + basis.nbytes
        punch_hole(path, start, stop)
        fill(run_dir.parent)
    world.barrier("the disk is full")


def punch_hole(path: Path, start: int, stop: int) -> None:
    """Give the whole pages between two offsets of a file back to the disk."""
    start, stop = -(-start // 4096) * 4096, stop // 4096 * 4096
    assert start < stop
    hole = ["fallocate", "--punch-hole", "--offset", str(start), "--length", str(stop - start)]
    subprocess.run([*hole, str(path)], check=True)


def fill(disk: Path) -> Path:
    """Write a file until the disk is full; return its path."""
    filler = disk / "filler"
    with open(filler, "wb", buffering=0) as file:
        for size in (1 << 16, 1 << 12):
            with contextlib.suppress(OSError):
                while True:
                    file.write(b"x" * size)
    return filler


if __name__ == "__main__":
    main()

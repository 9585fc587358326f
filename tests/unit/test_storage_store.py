"""The store in one process: what is kept, what a step touches, what is refused, what damage is noticed."""

import os
import shutil
import subprocess
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from hpc_hess.errors import CollectiveError, StoreError
from hpc_hess.parallel.layout import Layout
from hpc_hess.parallel.world import World
from hpc_hess.storage import build
from hpc_hess.storage.commit import Ledger
from hpc_hess.storage.disk import rename_durably
from hpc_hess.storage.journal import Member
from hpc_hess.storage.reader import read_store
from hpc_hess.storage.schema import Schema, create_master
from hpc_hess.storage.store import Store
from tests.support.store_toys import (
    SHAPES,
    advance,
    check_state,
    coefficients,
    create,
    layout_for,
    local_row,
    reopen,
    reseal,
    whole_row,
)

WORLD = World.alone()
NONE = np.empty(0)


def member(step, rows=None, ended=False, probe=0):
    return Member(*coefficients(probe, step), rows, ended)


def rank_file(run: Path) -> Path:
    return next(run.glob("krylov.ranks/*/rank-00000.h5"))


def flip_bit(path: Path, offset: int) -> None:
    byte = path.read_bytes()[offset] ^ 4
    command = ["dd", f"of={path}", "bs=1", f"seek={offset}", "count=1", "conv=notrunc", "status=none"]
    subprocess.run(command, input=bytes([byte]), check=True)


def offset_of(path: Path, name: str, index: tuple[int, ...]) -> int:
    """Byte offset in the file of one entry of a contiguous data set."""
    with h5py.File(path, "r") as file:
        dataset = file[name]
        flat = int(np.ravel_multi_index(index, dataset.shape))
        return int(dataset.id.get_offset()) + flat * dataset.dtype.itemsize


# -- what is kept ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep_basis", [False, True])
@pytest.mark.parametrize("dtype", ["float32", torch.float64])
def test_a_run_goes_on_where_it_was_stopped(tmp_path, keep_basis, dtype):
    store = create(tmp_path, WORLD, keep_basis=keep_basis, dtype=dtype)
    assert store.state.sequence == 0
    assert len(store.recurrence(0)[0]) == 0
    stops = [(0, 0), (0, 3), (1, 0), (1, 5)]
    for stop in stops:
        advance(store, stop)
        store.close()
        store = reopen(tmp_path, WORLD)
        check_state(store)
    assert len(store.recurrence(1)[0]) == 5
    advance(store)
    assert (store.state.probe, store.state.step, store.state.finished) == (1, 6, True)
    assert store.state.lengths == (6, 6)
    store.close()
    with read_store(tmp_path) as view:
        assert view.verify() == []
        for k, probe in enumerate(view.probes):
            np.testing.assert_array_equal(probe.alpha, coefficients(k, 6)[0])
            for row in probe.rows:
                np.testing.assert_array_equal(probe.basis[row], whole_row(view.schema.num_params, k, row, probe.basis.dtype))
        assert [len(p.rows) for p in view.probes] == ([6, 6] if keep_basis else [0, 6])


def test_the_reader_shows_layout_attributes_and_probes(tmp_path):
    attributes = {"config": {"model": {"source": "x" * 100_000}}, "model": "fp", "tokens": 3, "scale": 0.5, "none": None}
    store = create(tmp_path, WORLD, attributes=attributes)
    advance(store, (0, 2))
    assert store.attributes == attributes
    with read_store(tmp_path / "krylov.h5") as view:  # also while the run has it open
        assert view.attributes == attributes
        assert [(p.name, p.shape, p.offset) for p in view.layout] == [
            (p.name, p.shape, p.file_offset) for p in layout_for(1).parameters
        ]
        assert view.state == store.state
        assert len(view.probes[0].alpha) == 2
        assert len(view.probes[1].alpha) == 0
        seen = []
        assert view.verify(lambda done, total: seen.append((done, total))) == []
        assert seen == [(1, 3), (2, 3), (3, 3)]
    store.close()


def test_a_selection_compacts_the_file(tmp_path):
    layout = Layout(SHAPES, 1, selected={"b", "w"})
    shard = layout.shard(0)
    with Store.create(
        tmp_path, layout=layout, shard=shard, world=WORLD, driver="files", probes=1, steps=2, rows=2, attributes={}
    ) as store:
        store.write_row(0, 0, local_row(shard, 0, 0))
        store.commit(0, [Member(NONE, NONE)])
    with read_store(tmp_path) as view:
        assert [(p.name, p.offset, p.global_offset) for p in view.layout] == [("b", 0, 6), ("w", 700, 777)]
        assert view.probes[0].basis.shape == (2, 700 + 41 * 13)


def test_a_ring_of_rows_keeps_what_the_next_step_needs(tmp_path):
    rows, steps, kept = 4, 9, 3
    store = create(tmp_path, WORLD, probes=1, rows=rows, steps=steps)
    shard = store._shard
    store.write_row(0, 0, local_row(shard, 0, 0))
    store.commit(0, [member(0, [0])])
    for k in range(1, steps + 1):
        store.write_row(0, k % rows, local_row(shard, 0, k))
        needed = sorted({j % rows for j in range(max(0, k - kept + 1), k + 1)})
        if k == 6:  # a kill between the row and the commit: the commit before must hold, whose rows are untouched
            store.close()
            store = reopen(tmp_path, WORLD)
            assert store.state.step == 5
            assert store.verify_rows(0, store.state.rows_of(0)) == []
            for j in (3, 4, 5):
                np.testing.assert_array_equal(store.read_row(0, j % rows), local_row(shard, 0, j))
            store.write_row(0, k % rows, local_row(shard, 0, k))
        store.commit(0, [member(k, needed)])
        assert store.verify_rows(0, needed) == []
        with pytest.raises(ValueError, match="needed by the last commit"):
            store.write_row(0, (k - 1) % rows, local_row(shard, 0, 0))
    store.close()
    with read_store(tmp_path) as view:
        assert view.verify() == []
        assert view.probes[0].rows == tuple(sorted({j % rows for j in (7, 8, 9)}))


def test_extra_state_is_as_old_as_its_commit(tmp_path):
    store = create(tmp_path, WORLD, extra_bytes=5000)
    big = os.urandom(5000)
    store.write_row(0, 0, local_row(store._shard, 0, 0))
    store.commit(0, [Member(NONE, NONE)], extra=big)
    with pytest.raises(ValueError, match="room for 5000"):
        store.commit(0, [Member(NONE, NONE)], extra=big + b"!")
    store.close()
    store = reopen(tmp_path, WORLD)
    assert store.state.extra == big
    store.commit(0, [Member(NONE, NONE)], extra=b"again the same step: the inside of a product")
    store.close()
    store = reopen(tmp_path, WORLD)
    assert store.state.extra.startswith(b"again")
    assert store.state.sequence == 2
    store.close()


def test_a_step_back_lets_later_steps_be_done_again(tmp_path):
    store = create(tmp_path, WORLD, probes=1)
    advance(store, (0, 5))
    alpha, beta = store.recurrence(0)
    store.commit(0, [Member(alpha[:2], beta[:2])], extra=b"[0, 2]")
    alpha[2:], beta[2:] = 77.0, 78.0
    store.write_row(0, 3, local_row(store._shard, 1, 3))
    store.commit(0, [Member(alpha[:3], beta[:3])])
    store.close()
    store = reopen(tmp_path, WORLD)
    np.testing.assert_array_equal(store.recurrence(0)[0], [*coefficients(0, 2)[0], 77.0])
    np.testing.assert_array_equal(store.read_row(0, 3), local_row(store._shard, 1, 3))
    store.close()


# -- what a step touches -----------------------------------------------------------------------------------------


def contents(run: Path) -> dict[Path, np.ndarray]:
    files = [p for p in sorted(run.rglob("*")) if p.is_file() and p.name != "run.lock"]
    return {p: np.frombuffer(p.read_bytes(), np.uint8) for p in files}


@pytest.mark.parametrize("width", [1, 2])
def test_a_step_changes_no_byte_outside_its_rows_its_entries_and_its_slot(tmp_path, width):
    store = create(tmp_path, WORLD, width=width)
    advance(store, (0, 3))
    store.close()
    before = contents(tmp_path)
    store = reopen(tmp_path, WORLD)
    advance(store, (0, 4))
    sequence, size = store.state.sequence, store._shard.size
    slots = store.schema.slots
    store.close()
    after = contents(tmp_path)
    master, ranks = tmp_path / "krylov.h5", rank_file(tmp_path)
    slot = sequence % 2
    allowed = {
        ranks: [(offset_of(ranks, "basis/0", (4, 0)), 4 * size)],
        master: [
            *[(offset_of(master, f"probes/{k}/{name}", (3,)), 8) for k in range(width) for name in ("alpha", "beta")],
            (offset_of(master, "probes/0/checksum", (4,)), 8),
            (offset_of(master, "extra", (slot, 0)), slots.extra_bytes),
            (offset_of(master, "commit", (slot, 0)), slots.record_bytes),
        ],
    }
    assert before.keys() == after.keys() == allowed.keys()
    for path, regions in allowed.items():
        assert before[path].shape == after[path].shape
        changed = before[path] != after[path]
        inside = np.zeros(len(changed), bool)
        for start, length in regions:
            assert changed[start : start + length].any()
            inside[start : start + length] = True
        assert not (changed & ~inside).any()


def test_all_space_is_allocated_at_creation(tmp_path):
    store = create(tmp_path, WORLD, shapes={"w": (3000, 100)}, rows=5)
    path = rank_file(tmp_path)
    assert path.stat().st_blocks * 512 >= 5 * 300_000 * 4
    store.close()


# -- what is refused ---------------------------------------------------------------------------------------------


def test_rows_and_commits_that_break_a_rule_are_refused(tmp_path):
    store = create(tmp_path, WORLD)
    row = local_row(store._shard, 0, 0)
    with pytest.raises(ValueError, match="never written"):
        store.commit(0, [member(0)])
    store.write_row(0, 0, row)
    for bad in (row[:-1], row.astype("float64"), row[None]):
        with pytest.raises(ValueError, match="a row is"):
            store.write_row(0, 0, bad)
    with pytest.raises(ValueError, match="no row 6"):
        store.write_row(0, 6, row)
    store.commit(0, [member(0)])
    with pytest.raises(ValueError, match="needed by the last commit"):
        store.write_row(0, 0, row)
    with pytest.raises(ValueError, match="needed by the last commit"):
        store.write_row(1, 0, row)  # the basis is shared and probe 0 is not finished
    advance(store, (0, 2))
    alpha, beta = coefficients(0, 2)
    with pytest.raises(ValueError, match="cannot change"):
        store.commit(0, [Member(alpha + 1e-16 + np.eye(2)[1], beta)])
    for probe, members in [(0, [member(7)]), (0, []), (0, [member(2), member(2)]), (1, [member(0)]), (2, [member(0)])]:
        with pytest.raises(ValueError, match="cannot commit"):
            store.commit(probe, members)
    check_state(store)
    advance(store, (1, 1))
    with pytest.raises(ValueError, match="probe 0 is finished"):
        store.write_row(0, 5, row)
    check_state(store)
    store.close()


def test_opening_what_is_not_this_run(tmp_path):
    with pytest.raises(StoreError, match="there is no run in"):
        reopen(tmp_path, WORLD)
    (tmp_path / "krylov.h5").write_bytes(b"not HDF5" * 100)
    with pytest.raises(StoreError, match=r"krylov.h5 cannot be used"):
        reopen(tmp_path, WORLD)
    (tmp_path / "krylov.h5").unlink()
    with h5py.File(tmp_path / "krylov.h5", "x") as file:
        file["x"] = 1
    with pytest.raises(StoreError, match="not a store of hpc_hess"):
        read_store(tmp_path)
    (tmp_path / "krylov.h5").unlink()
    store = create(tmp_path, WORLD)
    advance(store, (0, 2))
    with pytest.raises(StoreError, match=r"this process has .* open already"):
        reopen(tmp_path, WORLD)
    store.close()
    store.close()
    with pytest.raises(StoreError, match="holds a run already"):
        create(tmp_path, WORLD)
    other = SHAPES | {"w": (41, 14)}
    with pytest.raises(StoreError, match=r"'w' is \(41, 13\) in the store and \(41, 14\) in the model"):
        reopen(tmp_path, WORLD, shapes=other)
    check_state(store := reopen(tmp_path, WORLD))  # none of it did any harm
    store.close()
    create(tmp_path, WORLD, replace_existing=True).close()
    assert len(list(tmp_path.glob("krylov.ranks/*"))) == 1


def test_a_newer_format_is_refused(tmp_path):
    create(tmp_path, WORLD).close()
    with h5py.File(tmp_path / "krylov.h5", "r+") as file:
        file.attrs["format_version"] = 4
    reseal(tmp_path / "krylov.h5")
    for opener in (lambda: reopen(tmp_path, WORLD), lambda: read_store(tmp_path)):
        with pytest.raises(StoreError, match=r"format version 4 .* reads up to 3: install a newer"):
            opener()


def test_mpio_needs_mpi(tmp_path):
    with pytest.raises(StoreError, match=r'"mpio" cannot work here: .*store.driver = "files"'):
        create(tmp_path, WORLD, driver="mpio")
    assert not (tmp_path / "krylov.h5").exists()


def test_no_space_is_said_before_anything_is_written(tmp_path):
    with pytest.raises(StoreError, match=r"needs 4\.0 TB .* free .* lower lanczos.steps.*keep_basis"):
        create(tmp_path, WORLD, shapes={"w": (10**6, 1000)}, rows=1000)
    assert [p.name for p in tmp_path.iterdir()] == ["run.lock"]


def test_leftovers_of_a_killed_creation_are_swept(tmp_path):
    (tmp_path / "krylov.h5.tmp").write_bytes(b"half")
    (tmp_path / "krylov.ranks" / "dead").mkdir(parents=True)
    (tmp_path / "krylov.ranks" / "dead" / "rank-00000.h5").write_bytes(b"half")
    store = create(tmp_path, WORLD)
    assert not (tmp_path / "krylov.h5.tmp").exists()
    advance(store, (0, 1))
    store.close()
    (tmp_path / "krylov.ranks" / "dead").mkdir()
    store = reopen(tmp_path, WORLD)
    assert len(list(tmp_path.glob("krylov.ranks/*"))) == 1
    check_state(store)
    store.close()


# -- groups ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rebuilt", [False, True], ids=["created", "rebuilt"])
def test_a_store_that_is_in_place_stays_when_a_rank_dies_just_then(tmp_path, monkeypatch, rebuilt):
    """krylov.h5 is renamed, then the agreement fails: sweeping the new rank files would leave it without rows."""
    run_dir = tmp_path / "run"
    if rebuilt:
        with create(run_dir, WORLD) as store:
            advance(store, (0, 3))

    def rename_and_lose_a_rank(source: Path, target: Path) -> None:
        rename_durably(source, target)
        raise CollectiveError("a rank died")

    with monkeypatch.context() as patch:
        patch.setattr(build, "rename_durably", rename_and_lose_a_rank)
        with pytest.raises(CollectiveError):
            reopen(run_dir, WORLD, steps=9, rows=9) if rebuilt else create(run_dir, WORLD)
    with read_store(run_dir) as view:
        assert view.verify() == []
    with reopen(run_dir, WORLD) as store:
        assert store.schema.steps == (9 if rebuilt else 6)
        check_state(store)
        advance(store, (1, 2))


@pytest.mark.parametrize("keep_basis", [False, True])
def test_a_group_goes_on_where_it_was_stopped(tmp_path, keep_basis):
    """Groups (0, 1), (2, 3), (4): of the first, probe 1 ends early and stays while the other goes on."""
    store = create(tmp_path, WORLD, probes=5, width=2, keep_basis=keep_basis)
    assert store.schema.bases == (5 if keep_basis else 2)
    for stop, lengths in [
        ((0, 0), (0,) * 5),
        ((0, 3), (3, 3, 0, 0, 0)),
        ((0, 5), (5, 4, 0, 0, 0)),
        ((2, 0), (6, 4, 0, 0, 0)),
        ((2, 5), (6, 4, 5, 5, 0)),
        ((4, 2), (6, 4, 6, 6, 2)),
    ]:
        advance(store, stop)
        assert store.state.lengths == lengths
        store.close()
        store = reopen(tmp_path, WORLD)
        check_state(store)
        with read_store(tmp_path) as view:
            assert view.verify() == []
            assert [len(p.alpha) for p in view.probes] == list(lengths)
    advance(store)
    check_state(store)
    assert store.state.complete(5)
    store.close()
    with read_store(tmp_path) as view:
        assert view.verify() == []
        assert [len(p.rows) for p in view.probes] == ([6, 4, 6, 6, 4] if keep_basis else [0, 0, 0, 0, 4])
        for k, probe in enumerate(view.probes):
            for row in probe.rows:
                np.testing.assert_array_equal(probe.basis[row], whole_row(view.schema.num_params, k, row))


def test_a_group_is_committed_at_once_or_not_at_all(tmp_path):
    """A kill between the members' rows: the group is where it was, and every row of it holds."""
    store = create(tmp_path, WORLD, width=2)
    advance(store, (0, 3))
    store.write_row(0, 4, local_row(store._shard, 1, 1))  # of the two rows of step 4, one is there, and not the right one
    store.close()
    store = reopen(tmp_path, WORLD)
    assert store.state.lengths == (3, 3)
    check_state(store)
    with pytest.raises(ValueError, match="rows \\[4\\] of probe 0 are to be committed but were never written"):
        store.commit(0, [member(4), member(4, ended=True, probe=1)])
    advance(store)
    check_state(store)
    store.close()


def test_the_members_of_a_group_are_at_one_step_and_stay_together(tmp_path):
    store = create(tmp_path, WORLD, probes=4, width=2)
    advance(store, (0, 3))
    with pytest.raises(ValueError, match="not at the same step"):
        store.commit(0, [member(3), member(2, probe=1)])
    for probe, members in [(0, [member(3)]), (1, [member(3, probe=1)]), (0, [member(3)] * 3), (2, [member(0)] * 2)]:
        with pytest.raises(ValueError, match="cannot commit"):
            store.commit(probe, members)
    for probe in (1, 2, 3):  # probes 2 and 3 reuse the bases of 0 and 1
        with pytest.raises(ValueError, match="row 2 is needed by the last commit"):
            store.write_row(probe, 2, local_row(store._shard, probe, 2))
    check_state(store)
    store.close()


def test_groups_of_other_widths_share_the_bases_of_the_widest(tmp_path):
    store = create(tmp_path, WORLD, probes=7, width=3)
    advance(store, (0, 2))
    store.close()
    store = reopen(tmp_path, WORLD)
    advance(store, (3, 1), width=1)  # the group that is going on keeps its width
    assert (store.state.group, store.state.step) == (range(3, 4), 1)
    check_state(store)
    advance(store, (4, 3), width=2)
    assert store.state.group == range(4, 6)
    check_state(store)
    store.close()
    store = reopen(tmp_path, WORLD)
    advance(store)
    check_state(store)
    assert store.state.lengths == (6, 4, 6, 6, 4, 6, 6)
    store.close()


def test_a_wider_group_rebuilds_the_store_under_the_one_that_goes_on(tmp_path):
    store = create(tmp_path, WORLD, probes=6, width=2)
    advance(store, (2, 3))
    store.close()
    store = reopen(tmp_path, WORLD, width=4)
    assert (store.schema.width, store.schema.bases, store.state.group) == (4, 4, range(2, 4))
    check_state(store)
    advance(store, (4, 2))
    check_state(store)
    store.close()
    store = reopen(tmp_path, WORLD, width=1)  # never fewer than there are
    assert store.schema.width == 4
    check_state(store)
    advance(store)
    check_state(store)
    store.close()
    with read_store(tmp_path) as view:
        assert view.verify() == []


# -- damage ------------------------------------------------------------------------------------------------------


def stopped(run: Path, stop=(0, 4), **changes) -> None:
    store = create(run, WORLD, **changes)
    advance(store, stop)
    store.close()


def test_a_flipped_bit_in_a_row_is_noticed(tmp_path):
    stopped(tmp_path)
    flip_bit(rank_file(tmp_path), offset_of(rank_file(tmp_path), "basis/0", (2, 700)) + 1)
    store = reopen(tmp_path, WORLD)
    assert store.state.step == 4
    assert store.verify_rows(0, store.state.rows_of(0)) == [2]
    store.read_row(0, 1)
    store.read_row(0, 2, verify=False)
    with pytest.raises(StoreError, match=r"basis row 2 of probe 0 .* is damaged"):
        store.read_row(0, 2)
    store.close()
    with read_store(tmp_path) as view:
        assert view.verify() == ["basis row 2 of probe 0 does not match its checksum"]


def test_a_view_of_a_run_at_work_tells_progress_from_damage(tmp_path):
    store = create(tmp_path, WORLD)
    advance(store, (0, 4))
    with read_store(tmp_path) as view:
        advance(store, (1, 2))  # the next probe takes the rows that the view has in mind
        assert view.verify() == []
        store.close()
        flip_bit(rank_file(tmp_path), offset_of(rank_file(tmp_path), "basis/0", (1, 3)))
    with read_store(tmp_path) as view:
        assert view.verify() == ["basis row 1 of probe 1 does not match its checksum"]


def test_a_torn_next_row_is_harmless(tmp_path):
    stopped(tmp_path)
    path = rank_file(tmp_path)
    with open(path, "r+b") as file:
        file.seek(offset_of(path, "basis/0", (5, 0)))
        file.write(b"\xff" * 1000)
    store = reopen(tmp_path, WORLD)
    check_state(store)
    advance(store)
    check_state(store)
    store.close()


def test_a_flipped_bit_in_the_coefficients(tmp_path):
    stopped(tmp_path)
    flip_bit(tmp_path / "krylov.h5", offset_of(tmp_path / "krylov.h5", "probes/0/alpha", (3,)))
    store = reopen(tmp_path, WORLD)
    assert store.state.step == 3  # the commit before does not cover it
    check_state(store)
    store.close()
    flip_bit(tmp_path / "krylov.h5", offset_of(tmp_path / "krylov.h5", "probes/0/beta", (1,)))
    for opener in (lambda: reopen(tmp_path, WORLD), lambda: read_store(tmp_path)):
        with pytest.raises(StoreError, match="neither of its two commit records"):
            opener()


def test_rank_files_that_are_missing_truncated_or_foreign(tmp_path):
    run, other = tmp_path / "run", tmp_path / "other"
    stopped(run)
    stopped(other)
    path = rank_file(run)
    good = path.read_bytes()
    path.unlink()
    with pytest.raises(StoreError, match=r"rank-00000.h5 is missing: restore it"):
        reopen(run, WORLD)
    with read_store(run) as view:
        assert "is missing" in view.verify()[0]
    path.write_bytes(good[:-5000])
    with pytest.raises(StoreError, match=r"rank-00000.h5.*truncated"):
        reopen(run, WORLD)
    with read_store(run) as view:
        assert "truncated" in view.verify()[0]
    shutil.copy(rank_file(other), path)
    with pytest.raises(StoreError, match="belongs to another run"):
        reopen(run, WORLD)
    path.write_bytes(good)
    store = reopen(run, WORLD)
    check_state(store)
    store.close()


def test_a_truncated_master(tmp_path):
    stopped(tmp_path)
    path = tmp_path / "krylov.h5"
    path.write_bytes(path.read_bytes()[:-4096])
    for opener in (lambda: reopen(tmp_path, WORLD), lambda: read_store(tmp_path)):
        with pytest.raises(StoreError, match=r"krylov.h5 cannot be used .*truncated"):
            opener()


# -- growth ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep_basis", [False, True])
def test_more_probes_and_steps_than_at_creation(tmp_path, keep_basis):
    stopped(tmp_path, stop=None, keep_basis=keep_basis)
    store = reopen(tmp_path, WORLD, probes=3)
    assert (store.state.probe, store.state.finished, store.schema.probes) == (1, True, 3)
    check_state(store)
    advance(store, (2, 3))
    check_state(store)
    store.close()
    store = reopen(tmp_path, WORLD, probes=2, steps=8, rows=9)  # never fewer than there are
    assert (store.schema.probes, store.schema.steps, store.schema.rows) == (3, 8, 9)
    check_state(store)
    advance(store)
    assert store.state.step == 8
    assert store.state.lengths == (6, 6, 8)
    store.close()
    with read_store(tmp_path) as view:
        assert view.verify() == []
        assert [len(p.rows) for p in view.probes] == ([6, 6, 8] if keep_basis else [0, 0, 8])
    assert len(list(tmp_path.glob("krylov.ranks/*"))) == 1


@pytest.mark.parametrize("keep_basis", [False, True])
def test_more_probes_after_groups(tmp_path, keep_basis):
    stopped(tmp_path, stop=None, probes=3, width=2, keep_basis=keep_basis)
    store = reopen(tmp_path, WORLD, probes=6, width=3)
    assert (store.state.group, store.state.finished, store.schema.probes) == (range(2, 3), True, 6)
    check_state(store)
    advance(store, (3, 5))
    check_state(store)
    store.close()
    store = reopen(tmp_path, WORLD)
    advance(store)
    assert store.state.lengths == (6, 4, 6, 6, 4, 6)
    store.close()
    with read_store(tmp_path) as view:
        assert view.verify() == []
        assert [len(p.rows) for p in view.probes] == ([6, 4, 6, 6, 4, 6] if keep_basis else [0, 0, 0, 6, 4, 6])


def test_a_damaged_row_stops_a_rebuild_and_leaves_the_store(tmp_path):
    stopped(tmp_path)
    flip_bit(rank_file(tmp_path), offset_of(rank_file(tmp_path), "basis/0", (2, 0)))
    before = contents(tmp_path)
    with pytest.raises(StoreError, match=r"basis row 2 of probe 0 .* is damaged"):
        reopen(tmp_path, WORLD, probes=3)
    after = contents(tmp_path)
    assert before.keys() == after.keys()
    assert all((before[p] == after[p]).all() for p in before)


def test_seventy_billion_entries_fit_in_a_virtual_basis(tmp_path):
    """HDF5 stores no irregular selection beyond 2**32 entries: every mapping must be a regular block."""
    shapes: dict[str, tuple[int, ...]] = {f"layers.{k:02d}.experts": (128, 4096, 1400) for k in range(96)}
    dims = dict.fromkeys(shapes, 1)
    layout = Layout(shapes | {f"layers.{k:02d}.norm": (4095,) for k in range(96)}, 6, dims)
    schema = Schema(
        run_id="r",
        driver="files",
        generation="g",
        num_shards=6,
        num_params=layout.num_params,
        fingerprint="f",
        dtype="float32",
        probes=1,
        width=1,
        steps=3,
        rows=3,
        keep_basis=False,
        extra_bytes=10,
    )
    assert layout.num_params > 70e9
    create_master(tmp_path / "x.h5", schema, layout.parameters, {}, Ledger.empty(schema.slots, 3), layout)
    with h5py.File(tmp_path / "x.h5", "r") as file:
        basis = file["probes/0/basis"]
        sources = basis.virtual_sources()
        assert all(source.vspace.is_regular_hyperslab() for source in sources)
        assert sum(source.vspace.get_select_npoints() for source in sources) == 3 * layout.num_params
        last = sources[-1]
        assert last.file_name == "krylov.ranks/g/rank-00005.h5"
        assert tuple(last.vspace.get_select_bounds()[1]) == (2, layout.num_params - 1)
        assert np.isnan(basis[2, -1])  # no rank file: the fill value

"""Rank files written on N ranks and gone on with on M, with empty shards, replicas and failures of single ranks."""

from pathlib import Path

import numpy as np
import pytest

from hpc_hess.errors import StoreError
from hpc_hess.parallel.world import World
from hpc_hess.storage.reader import read_store
from tests.support.spawn import run_ranks
from tests.support.store_toys import FEW, SHAPES, advance, check_state, create, reopen, run, store_exists, whole_row

# every pair of rank counts in a chain of resumes: consecutive numbers cover all N -> M for N, M in 1..3
CHAIN = [1, 1, 2, 2, 3, 3, 1, 3, 2, 1]


def visit(world: World, run_dir: str, shapes: dict, options: dict, tour: int) -> dict:
    """One member of the chain: open, check, do one more step."""
    path = Path(run_dir)
    store = reopen(path, world, shapes) if store_exists(path, world) else create(path, world, shapes, **options)
    check_state(store)
    group, step = divmod(tour + 1, 6)
    stop = (group * store.schema.width, step)
    advance(store, stop)
    check_state(store)
    answer = {"step": (store.state.probe, store.state.step), "size": store._shard.size, "rank": world.rank}
    store.close()
    return answer


PAIRS = {"probes": 4, "width": 2}


@pytest.mark.parametrize(
    ("shapes", "options"),
    [(SHAPES, {"keep_basis": True}), (FEW, {}), (SHAPES, PAIRS), (FEW, PAIRS | {"keep_basis": True})],
    ids=["kept", "few", "pairs", "few kept pairs"],
)
def test_any_number_of_ranks_goes_on_after_any_other(tmp_path, shapes, options):
    sizes = set()
    for tour, ranks in enumerate(CHAIN):
        answers = run_ranks(visit, ranks, str(tmp_path), shapes, options, tour)
        assert len({a["step"] for a in answers}) == 1
        sizes |= {a["size"] for a in answers}
        assert len(list(tmp_path.glob("krylov.ranks/*"))) == 1
        assert len(list(tmp_path.glob("krylov.ranks/*/*.h5"))) == ranks
        with read_store(tmp_path) as view:
            assert view.verify() == []
            assert view.state.width == options.get("width", 1)
            for k, probe in enumerate(view.probes):  # through the virtual data set
                for row in probe.rows:
                    np.testing.assert_array_equal(probe.basis[row], whole_row(view.schema.num_params, k, row))
    assert (0 in sizes) == (shapes is FEW)


def replicated(world: World, run_dir: str) -> tuple:
    world.make_mesh(2)
    state = run(world, run_dir, stop=(0, 4))
    # a failure in replica 0 only is everybody's, and so is a damaged row
    store = reopen(Path(run_dir), world)
    if world.rank == 1:
        store._driver.close()  # its file is gone, as far as the driver can tell
    with pytest.raises(StoreError):
        store.read_row(0, 1)
    store.abandon()
    touched = len(list(Path(run_dir).glob("krylov.ranks/*/*.h5")))
    return state, touched, world.replica


def test_replicas_share_one_set_of_files(tmp_path):
    answers = run_ranks(replicated, 4, str(tmp_path))
    assert [a[2] for a in answers] == [0, 0, 1, 1]
    assert {a[:2] for a in answers} == {((0, 4, False), 2)}


def one_rank_fails(world: World, run_dir: str) -> tuple[str, int]:
    store = create(Path(run_dir), world)
    advance(store, (0, 3))
    if world.rank == 1:
        store._driver._file.close()
    with pytest.raises(StoreError) as caught:
        advance(store, (0, 4))
    store.abandon()
    world.barrier("both gave up")
    store = reopen(Path(run_dir), world)
    check_state(store)
    step = store.state.step
    advance(store)
    check_state(store)
    store.close()
    return str(caught.value), step


def test_a_row_that_fails_on_one_rank_fails_on_all_and_is_not_committed(tmp_path):
    answers = run_ranks(one_rank_fails, 2, str(tmp_path))
    assert answers[0] == answers[1]
    assert answers[0][1] == 3


def first_opens_then_damage(world: World, run_dir: str, damaged: int) -> str:
    path = Path(run_dir)
    create(path, world).close()
    world.barrier("written")
    if world.rank == 0:
        next(path.glob(f"krylov.ranks/*/rank-{damaged:05d}.h5")).unlink()
    world.barrier("damaged")
    with pytest.raises(StoreError) as caught:
        reopen(path, world)
    return str(caught.value)


def test_a_missing_rank_file_is_named_on_every_rank(tmp_path):
    answers = run_ranks(first_opens_then_damage, 2, str(tmp_path), 1)
    assert answers[0] == answers[1]
    assert "rank-00001.h5 is missing" in answers[0]

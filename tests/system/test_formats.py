"""Stores of every released format, and of another HDF5, open, verify and go on."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import h5py
import pytest

from hpc_hess import cli
from hpc_hess.commands.run.work import run as whole_run
from hpc_hess.parallel.world import World
from hpc_hess.storage.reader import read_store
from hpc_hess.storage.schema import FORMAT_VERSION
from tests.support import run_toys
from tests.support.spawn import clean_environment, run_ranks
from tests.support.store_toys import advance, check_state, reopen, run

ROOT = Path(__file__).resolve().parents[2]
FORMATS = ROOT / "tests" / "formats"
STORES = sorted(p.parent for p in FORMATS.glob("v*/*/krylov.h5"))
FREED = [store for store in STORES if store.parent.name == "v3"]  # finished, without a basis
RUNS = sorted(FORMATS.glob("run-*"))
WHEEL = Path(sys.prefix) / "h5py-wheel"
END = [1, 6, True]


def test_every_version_and_driver_is_here():
    kinds = {(p.parent.name, p.name.rsplit("-hdf5-")[0]) for p in STORES}
    assert kinds == {(f"v{n}", kind) for n in range(1, FORMAT_VERSION + 1) for kind in ("one-file", "rank-files")}


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("store", [s for s in STORES if s not in FREED], ids=lambda p: f"{p.parent.name}-{p.name}")
def test_a_kept_store_opens_and_goes_on(tmp_path, store, ranks):
    here = shutil.copytree(store, tmp_path / "run")
    with read_store(here) as view:
        assert view.verify() == []
        assert (view.state.probe, view.state.step) == (1, 3)
    assert run_ranks(go_on, ranks, str(here)) == [END] * ranks
    with read_store(here) as view:
        assert view.verify() == []


def go_on(world: World, run_dir: str) -> list:
    return list(run(world, run_dir))  # checks every value, before and after


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("store", FREED, ids=lambda p: f"{p.parent.name}-{p.name}")
def test_a_finished_store_without_a_basis_takes_more_probes(tmp_path, store, ranks):
    here = shutil.copytree(store, tmp_path / "run")
    with read_store(here) as view:
        assert view.verify() == []
        assert (view.state.probe, view.state.step, view.schema.rows) == (1, 6, 0)
    assert run_ranks(one_more_probe, ranks, str(here)) == [(2, 6)] * ranks
    with read_store(here) as view:
        assert view.verify() == []
        assert view.probes[2].rows == tuple(range(6))


def one_more_probe(world: World, run_dir: str) -> tuple[int, int]:
    with reopen(Path(run_dir), world, probes=3, rows=6) as store:
        check_state(store)
        advance(store)
        check_state(store)
        return store.state.probe, store.state.step


@pytest.mark.skipif(
    not WHEEL.is_dir() or not h5py.get_config().mpi, reason="needs two builds of h5py: launch/setup.sh --mpi --test"
)
def test_another_hdf5_takes_turns_with_this_one(tmp_path):
    """Written here, gone on with there, ended here."""
    here = tmp_path / "run"
    assert other_hdf5(here, 0, 2)[0] != h5py.version.hdf5_version, "both are the same HDF5: this would show nothing"
    assert run(World.alone(), str(here), (0, 4))[:2] == (0, 4)
    assert other_hdf5(here, 1, 2)[1] == [1, 2, False]
    assert list(run(World.alone(), str(here))) == END
    with read_store(here) as view:
        assert view.verify() == []


def other_hdf5(run_dir: Path, probe: int, step: int) -> tuple[str, list]:
    """Go on with the wheel's h5py; return its HDF5's version and where it is."""
    program = (
        "import h5py, sys; from tests.support import store_toys; print(h5py.version.hdf5_version, flush=True); "
        "store_toys.main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(run_dir), "files", str(probe), str(step)],
        cwd=ROOT,
        text=True,
        env=clean_environment() | {"PYTHONPATH": os.pathsep.join([str(WHEEL), str(ROOT)])},
        capture_output=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    version, state = done.stdout.split("\n")[:2]
    return version, json.loads(state)


# -- whole run directories -------------------------------------------------------------------------------------------


def numbers(run_dir: Path) -> dict[str, Any]:
    result = json.loads((run_dir / "result.json").read_text())
    return {key: result[key] for key in ("probes", "eigenpairs", "studies")}


def close(mine: Any, theirs: Any) -> bool:
    if isinstance(theirs, dict):
        return mine.keys() == theirs.keys() and all(close(mine[key], theirs[key]) for key in theirs)
    if isinstance(theirs, list):
        return len(mine) == len(theirs) and all(map(close, mine, theirs))
    return mine == (pytest.approx(theirs, rel=1e-5, abs=1e-8) if isinstance(theirs, float) else theirs)


def goes_on(world: World, run_dir: str) -> int:
    return whole_run(run_toys.settings(Path(run_dir)), world)


@pytest.mark.slow
@pytest.mark.parametrize("kept", RUNS, ids=lambda p: p.name)
def test_a_finished_run_is_shown_and_not_computed_again(tmp_path, kept):
    here = shutil.copytree(kept / "finished", tmp_path / "run")
    assert cli.main(["inspect", str(here), "--verify"]) == 0
    assert cli.main(["report", str(here)]) == 0
    assert (here / "report.html").stat().st_size > 10_000
    products = (here / "events.jsonl").read_text().count("hvp_s")
    assert run_ranks(goes_on, 1, str(here), timeout_s=200) == [0]
    assert (here / "events.jsonl").read_text().count("hvp_s") == products
    assert numbers(here) == numbers(kept / "finished")


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("kept", RUNS, ids=lambda p: p.name)
def test_a_run_stopped_in_a_study_goes_on(tmp_path, kept, ranks):
    shutil.unpack_archive(kept / "half.tar.xz", tmp_path)
    here = tmp_path / "half"
    assert not (here / "result.json").exists()
    assert run_ranks(goes_on, ranks, str(here), timeout_s=400) == [0] * ranks
    mine, theirs = numbers(here), numbers(kept / "finished")
    assert mine["probes"] == theirs["probes"]  # as they were kept
    assert mine["eigenpairs"] == theirs["eigenpairs"]
    assert mine["studies"]["trace"] == theirs["studies"]["trace"]
    assert close(mine["studies"], theirs["studies"])

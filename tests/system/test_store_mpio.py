"""The store over MPI: one file written by all ranks of a real mpirun, gone on with by either driver."""

import contextlib
import fcntl
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import pytest

from hpc_hess.parallel.world import World
from hpc_hess.storage.reader import read_store
from tests.support.spawn import clean_environment
from tests.support.store_toys import advance, check_state, committed, create, reopen, whole_row

KILLS = int(os.environ.get("SOAK_KILLS", "4"))
ROOT = Path(__file__).resolve().parents[2]
pytestmark = [
    pytest.mark.mpi,
    pytest.mark.slow,
    pytest.mark.skipif(not h5py.get_config().mpi, reason="needs an h5py built with MPI: launch/setup.sh --mpi"),
]


def command(ranks: int, *args: object) -> list[str]:
    words = ["mpirun", "-n", str(ranks), sys.executable, "-m", "tests.support.store_toys", *map(str, args)]
    if Path(os.path.realpath(shutil.which("mpirun"))).name in ("orterun", "prterun"):  # Open MPI
        words[1:1] = ["--oversubscribe", *(["--allow-run-as-root"] if os.geteuid() == 0 else [])]
    return words


def environment() -> dict[str, str]:
    return clean_environment() | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def mpirun(ranks: int, *args: object) -> subprocess.CompletedProcess:
    return subprocess.run(command(ranks, *args), cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120)


def state_of(done: subprocess.CompletedProcess) -> list:
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.strip().splitlines()[-1])


def verified(run_dir: Path, driver: str) -> None:
    with read_store(run_dir) as view:
        assert view.schema.driver == driver
        assert view.verify() == []
        for k, probe in enumerate(view.probes):
            for row in probe.rows:
                assert (probe.basis[row] == whole_row(view.schema.num_params, k, row)).all()


def test_one_file_and_rank_files_take_turns(tmp_path):
    run = tmp_path / "run"
    assert state_of(mpirun(2, run, "mpio", 0, 2)) == [0, 2, False]
    verified(run, "mpio")
    assert not (run / "krylov.ranks").exists()
    store = reopen(run, World.alone())  # one process without MPI writes the same file
    check_state(store)
    advance(store, (0, 4))
    store.close()
    verified(run, "mpio")
    assert state_of(mpirun(2, run, "files", 1, 1)) == [1, 1, False]
    verified(run, "files")
    assert state_of(mpirun(3, run, "mpio", 1, 3)) == [1, 3, False]
    verified(run, "mpio")
    assert not (run / "krylov.ranks").exists()
    assert state_of(mpirun(2, run, "auto", 9, 9)) == [1, 6, True]
    verified(run, "mpio")


def test_a_store_begun_as_rank_files_goes_on_over_mpi(tmp_path):
    run = tmp_path / "run"
    store = create(run, World.alone(), keep_basis=True)
    advance(store, (1, 2))
    store.close()
    assert state_of(mpirun(2, run, "mpio", 9, 9)) == [1, 6, True]
    verified(run, "mpio")
    with read_store(run) as view:
        assert [len(p.rows) for p in view.probes] == [6, 6]


def test_a_group_goes_on_with_either_driver(tmp_path):
    run = tmp_path / "run"
    assert state_of(mpirun(2, run, "mpio", 0, 5, "pairs")) == [0, 5, False]  # probe 1 has ended
    verified(run, "mpio")
    assert state_of(mpirun(3, run, "files", 2, 1)) == [2, 1, False]
    verified(run, "files")
    assert state_of(mpirun(2, run, "mpio", 2, 4)) == [2, 4, False]
    verified(run, "mpio")
    store = reopen(run, World.alone(), probes=5)
    check_state(store)
    advance(store, (3, 3))
    store.close()
    assert state_of(mpirun(2, run, "mpio", 9, 9)) == [3, 6, True]
    verified(run, "mpio")


def holder(run_dir: Path) -> str:
    """What the lock file says: a killed job's text stays until the next one writes its own."""
    path = run_dir / "run.lock"
    return path.read_text() if path.exists() else ""


def wait_until_unlocked(run_dir: Path, timeout_s: float = 30.0) -> None:
    """Wait for the last rank to end: without its mpirun it lives, and writes, about one more second."""
    deadline = time.monotonic() + timeout_s
    with open(run_dir / "run.lock", "r+b") as file:
        while True:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                assert time.monotonic() < deadline, "a rank outlives its job"
                time.sleep(0.02)


def test_killed_at_random_instants(tmp_path):
    """mpio takes no lock of its own and has no descriptor to sync: the protocol alone must hold."""
    rng = random.Random(3)
    run = tmp_path / "run"
    broken_off, window_s = 0, 0.2
    for kill in range(4 * KILLS):
        if kill >= KILLS and broken_off >= KILLS // 4:
            break
        if kill % 3 == 2 or committed(run) == (2, 6):  # ranks that outlive their mpirun may have finished
            shutil.rmtree(run, ignore_errors=True)
        before, last = committed(run), holder(run)
        process = subprocess.Popen(
            command(2, run, "mpio", 9, 9, "pairs"),
            cwd=ROOT,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        deadline = time.monotonic() + 60
        while holder(run) in ("", last):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.002)
        rank_0 = int(holder(run).split("pid ")[1].split(",")[0])
        time.sleep(rng.uniform(0, window_s))
        with contextlib.suppress(ProcessLookupError):  # it may have finished
            os.kill(rank_0 if kill % 2 else process.pid, signal.SIGKILL)
        process.communicate(timeout=60)
        wait_until_unlocked(run)
        reached = committed(run)
        assert reached >= before
        broken_off += reached < (2, 6)
        if kill % 2 and reached == (2, 6):  # a fast machine is done sooner
            window_s /= 2
    assert broken_off >= KILLS // 4, "the kills came too late to mean anything"
    assert state_of(mpirun(2, run, "mpio", 9, 9, "pairs")) == [2, 6, True]
    verified(run, "mpio")


def test_two_jobs_over_mpi(tmp_path):
    run = tmp_path / "run"
    store = create(run, World.alone())
    done = mpirun(2, run, "mpio", 9, 9)
    assert done.returncode == 2
    refused = re.findall(r"rank (\d): another job is using [^)]*pid (\d+)", done.stdout)  # mpirun may join their lines
    assert sorted(refused) == [("0", str(os.getpid())), ("1", str(os.getpid()))]
    store.close()


def test_a_full_disk_over_mpi(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("a tmpfs cannot be mounted here")
    try:
        run = disk / "run"
        assert state_of(mpirun(2, run, "mpio", 0, 3)) == [0, 3, False]
        start = time.monotonic()
        done = mpirun(2, run, "mpio", 9, 9, "full")
        assert done.returncode == 2, done.stdout + done.stderr
        assert time.monotonic() - start < 60
        assert "rank 0: the disk of" in done.stdout
        assert "rank 1: the disk of" in done.stdout
        (disk / "filler").unlink()
        assert state_of(mpirun(2, run, "mpio", 9, 9)) == [1, 6, True]
        verified(run, "mpio")
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)

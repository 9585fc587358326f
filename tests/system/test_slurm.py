"""A Slurm of two nodes on this machine: the committed batch script, srun with PMIx and parallel HDF5, requeues."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import h5py
import psutil
import pytest

from hpc_hess.planning.machine import Machine
from tests.support.launching import (
    LONG,
    ROOT,
    SHORT,
    TOY,
    complete,
    environment,
    find_rank,
    finish,
    result,
    running,
    steps_done,
    wait_until,
)
from tests.support.spawn import free_port

pytestmark = pytest.mark.slurm
TWO_NODES = ["--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1"]
TWO_BY_TWO = ["--nodes=2", "--ntasks-per-node=2", "--cpus-per-task=1"]
ONE_TASK = ["--nodes=1", "--ntasks-per-node=1", "--cpus-per-task=1"]


class Cluster:
    """slurm/local_cluster.sh with a state directory and ports of its own."""

    def __init__(self, directory: Path) -> None:
        # a port range that is free now: the controller's and one a node
        self.variables = {"HPC_HESS_SLURM_DIR": str(directory), "HPC_HESS_SLURM_PORT": str(free_port())}
        self.variables["SLURM_CONF"] = str(directory / "etc" / "slurm.conf")

    def call(self, *command: str | Path, timeout_s: float = 120, **variables: str) -> str:
        done = subprocess.run(
            [*map(str, command)],
            cwd=ROOT,
            env=environment(**self.variables, **variables),
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def submit(self, out: Path, *arguments: str, where: Sequence[str] = TWO_NODES, **variables: str) -> str:
        """Submit the batch script with the toy configuration; returns the job's number."""
        log = f"--output={out.parent / 'job.out'}"
        words = [*where, log, "slurm/slq_70b.sh", TOY, *arguments, "--set", f"run.out={out}"]
        said = self.call("sbatch", *words, **variables)
        return re.fullmatch(r"Submitted batch job (\d+)\n", said)[1]  # type: ignore[index]

    def job(self, number: str) -> dict[str, str]:
        """What scontrol shows of a job, by key."""
        return dict(word.split("=", 1) for word in self.call("scontrol", "show", "job", number).split() if "=" in word)

    def wait(self, number: str, timeout_s: float = 300) -> dict[str, str]:
        wait_until(
            lambda: self.job(number)["JobState"] in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"),
            f"job {number} ends",
            timeout_s,
        )
        return self.job(number)

    def requeued(self, number: str, times: int) -> None:
        """Wait until a job was requeued that many times, and spare it the two minutes that it would then wait."""
        wait_until(lambda: self.job(number)["Restarts"] == str(times), f"requeue {times} of job {number}", 300)
        wait_until(lambda: self.job(number)["JobState"] in ("PENDING", "RUNNING"), "the requeued job is in the queue")
        if self.job(number)["JobState"] == "PENDING":
            self.call("scontrol", "update", f"JobId={number}", "StartTime=now")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    directory = Path(tempfile.mkdtemp(prefix="hpc-hess-slurm-"))  # short: it holds sockets
    found = Cluster(directory)
    try:
        found.call("bash", "slurm/local_cluster.sh", "up", "2")
        yield found
    finally:
        found.call("bash", "slurm/local_cluster.sh", "down")
        shutil.rmtree(directory)


@pytest.fixture(scope="module")
def reference(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """The batch script, unchanged but for its size, on two nodes of two tasks."""
    out = tmp_path_factory.mktemp("reference") / "run"
    job = cluster.wait(cluster.submit(out, *SHORT, where=TWO_BY_TWO))
    log = (out.parent / "job.out").read_text()
    assert (job["JobState"], job["ExitCode"]) == ("COMPLETED", "0:0"), log
    assert "lambda max" in log
    return result(out)


def test_the_batch_script_runs_on_two_nodes_of_two_tasks(reference: dict, tmp_path: Path) -> None:
    assert reference["world_size"] == 4
    code, output = complete("torchrun.sh", "-n", "2", TOY, *SHORT, "--set", f"run.out={tmp_path / 'run'}")
    assert code == 0, output
    expected = result(tmp_path / "run")
    assert reference["probes"][0]["alpha"] == pytest.approx(expected["probes"][0]["alpha"], abs=1e-6)


def test_srun_with_pmix_writes_parallel_hdf5(cluster: Cluster, reference: dict, tmp_path: Path) -> None:
    if not h5py.get_config().mpi:
        pytest.skip("needs an h5py with MPI: launch/setup.sh --mpi")
    out = tmp_path / "run"
    code, output = complete(
        "srun.sh",
        "-n",
        "4",
        "--nodes",
        "2",
        TOY,
        *SHORT,
        "--set",
        "store.driver=mpio",
        "--set",
        f"run.out={out}",
        **cluster.variables,
    )
    assert code == 0, output
    assert result(out)["probes"][0]["alpha"] == reference["probes"][0]["alpha"]
    with h5py.File(out / "krylov.h5") as file:
        assert not file["probes/0/basis"].is_virtual
        assert file["probes/0/alpha"][:4].tolist() == reference["probes"][0]["alpha"]


def test_exit_codes_come_through_srun(cluster: Cluster, tmp_path: Path) -> None:
    for override, expected in (("lanczos.stepz=4", 2), ("operator.step=1e300", 3), ("run.time_limit=00:00:01", 75)):
        code, output = complete(
            "srun.sh",
            "-n",
            "2",
            "--nodes",
            "2",
            TOY,
            *SHORT,
            "--set",
            f'run.out="{tmp_path / override}"',
            "--set",
            override,
            **cluster.variables,
        )
        assert code == expected, output
        assert output.count("hpc-hess: error") == (expected != 75), output


def test_a_killed_rank_ends_the_srun_within_a_minute(cluster: Cluster, tmp_path: Path) -> None:
    out = tmp_path / "run"
    arguments = ["-n", "2", "--nodes", "2", TOY, *LONG, "--set", f"run.out={out}"]
    with running("srun.sh", *arguments, **cluster.variables) as process:
        wait_until(lambda: steps_done(out) >= 1, "one step")
        find_rank(1, out).kill()
        code, output = finish(process, timeout_s=60)
    assert code not in (0, 75), output
    assert "task 1: Killed" in output


def test_a_job_that_is_requeued_twice_ends_with_the_same_bits(cluster: Cluster, tmp_path: Path) -> None:
    settings = ["--set", "lanczos.probes=1", "--set", "lanczos.steps=20"]
    out = tmp_path / "requeued" / "run"
    out.parent.mkdir()
    number = cluster.submit(out, *settings)
    for restarts in (1, 2):
        before = steps_done(out)
        wait_until(lambda before=before: steps_done(out) >= before + 3, "three more steps")
        cluster.call("scancel", "--batch", "--signal=USR1", number)  # what --signal=B:USR1@300 does near the limit
        cluster.requeued(number, restarts)
    job = cluster.wait(number)
    log = (out.parent / "job.out").read_text()
    assert (job["JobState"], job["Restarts"], job["ExitCode"]) == ("COMPLETED", "2", "0:0"), log
    assert log.count("going on with probe 1 after step") == 2  # appended to one log, never begun again

    straight = tmp_path / "straight" / "run"
    straight.parent.mkdir()
    assert cluster.wait(cluster.submit(straight, *settings))["JobState"] == "COMPLETED"
    for key in ("alpha", "beta"):
        assert result(out)["probes"][0][key] == result(straight)["probes"][0][key]


def test_allocations_shorter_than_a_product_get_on(cluster: Cluster, tmp_path: Path) -> None:
    """Products are given up in their middle, requeued, and taken up from their parts."""
    settings = [
        word
        for s in (
            "data.sequences=128",
            "data.sequence_length=16",
            "data.micro_batch=1",
            "lanczos.probes=1",
            "lanczos.steps=3",
            "operator.check=false",
            "operator.step=0.01",
        )
        for word in ("--set", s)
    ]
    straight, out = tmp_path / "straight" / "run", tmp_path / "parts" / "run"
    for folder in (straight.parent, out.parent):
        folder.mkdir()
    assert cluster.wait(cluster.submit(straight, *settings))["JobState"] == "COMPLETED"
    log = out.parent / "job.out"
    number = cluster.submit(out, *settings, "--set", "store.checkpoint_every=4", "--set", "run.grace_s=0")
    for restarts in (1, 2):
        wait_until(lambda n=restarts: log.exists() and log.read_text().count("[probe 1 of 1]") == n, "a product begins")
        time.sleep(0.7 * result(straight)["timing"]["gradient_s"])
        cluster.call("scancel", "--batch", "--signal=USR1", number)
        cluster.requeued(number, restarts)
    job = cluster.wait(number)
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "2"), log.read_text()
    assert "and a part of the next product: a signal asked for it" in log.read_text()
    for key in ("alpha", "beta"):
        assert result(out)["probes"][0][key] == result(straight)["probes"][0][key]


def test_a_run_that_cannot_fit_is_not_started(cluster: Cluster, tmp_path: Path) -> None:
    machine = Machine("a small one", {"float32": 1e12}, 1e11, 1_500_000_000, 1e-6, 1e9, 1e9, 1e-5)
    (tmp_path / "small.json").write_text(machine.to_json())
    job = cluster.wait(cluster.submit(tmp_path / "run", *SHORT, where=TWO_BY_TWO, PLAN=str(tmp_path / "small.json")))
    log = (tmp_path / "job.out").read_text()
    assert (job["JobState"], job["ExitCode"]) == ("FAILED", "2:0"), log
    assert "on 2 nodes x 2 ranks, a small one" in log
    assert "does NOT fit" in log
    assert not (tmp_path / "run").exists()


def test_a_cancelled_job_stays_cancelled(cluster: Cluster, tmp_path: Path) -> None:
    out = tmp_path / "run"
    number = cluster.submit(out, *LONG)
    wait_until(lambda: steps_done(out) >= 1, "one step")
    cluster.call("scancel", number)
    wait_until(lambda: cluster.job(number)["JobState"] == "CANCELLED", "the job ends", 60)
    assert cluster.job(number)["Restarts"] == "0"


def test_a_real_time_limit_requeues_the_job(cluster: Cluster, tmp_path: Path) -> None:
    out = tmp_path / "run"
    settings = ["--set", "lanczos.probes=1", "--set", "lanczos.steps=2000", "--set", "lanczos.reorthogonalise=2"]
    log = out.parent / "job.out"
    number = cluster.submit(out, *settings, where=[*ONE_TASK, "--time=00:02:00", "--signal=B:USR1@10"])
    try:
        cluster.requeued(number, 1)
        cluster.call("scontrol", "update", f"JobId={number}", "TimeLimit=60")  # minutes: one limit is enough
        wait_until(lambda: "going on with probe 1 after step" in log.read_text(), "the second start goes on", 300)
    finally:
        cluster.call("scancel", number)
        time.sleep(1)
    assert "the time limit is near" in log.read_text()


def test_the_local_cluster_is_idempotent_and_stops(tmp_path: Path) -> None:
    directory = Path(tempfile.mkdtemp(prefix="hpc-hess-slurm-"))
    other = Cluster(directory)
    script = ("bash", "slurm/local_cluster.sh")
    try:
        other.call(*script, "up", "1")
        pids = {file.name: file.read_text() for file in (directory / "run").glob("*.pid")}
        assert sorted(pids) == ["munged.pid", "node1.pid", "slurmctld.pid"]
        other.call(*script, "up", "1")
        assert {file.name: file.read_text() for file in (directory / "run").glob("*.pid")} == pids
        assert "node1" in other.call(*script, "status")
        assert other.call("srun", "-n1", "--gpus-per-node=8", "hostname") == "node1\n"
    finally:
        other.call(*script, "down")
        other.call(*script, "down")
        shutil.rmtree(directory)
    for pid in map(int, pids.values()):
        assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE

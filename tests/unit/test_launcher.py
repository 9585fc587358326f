"""Launcher detection from the environments that launchers really set, without any launcher."""

from __future__ import annotations

from datetime import datetime

import pytest

from hpc_hess.errors import LaunchError
from hpc_hess.parallel import launcher
from hpc_hess.parallel.launcher import Launch, detect, first_node_address, job_end_time, master_endpoint, mpi_world
from tests.support.launcher_environments import BATCH_SHELL, HYDRA, OPEN_MPI, SRUN, TORCHRUN


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({}, Launch("alone", 0, 1, 0, 1, 0, 1)),
        (TORCHRUN, Launch("torchrun", 5, 8, 1, 4, 1, 2)),
        (OPEN_MPI, Launch("mpirun", 3, 4, 1, 2, 1, 2)),
        (SRUN, Launch("srun", 3, 4, 1, 2, 1, 2)),
        (HYDRA, Launch("hydra", 2, 3, 0, 1, 2, 3)),
        ({"RANK": "1", "WORLD_SIZE": "2"}, Launch("env", 1, 2, 1, 2, 0, 1)),
        ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}, Launch("env", 3, 4, 1, 2, 1, 2)),
    ],
    ids=["alone", "torchrun", "mpirun", "srun", "hydra", "env", "env, two nodes"],
)
def test_each_launcher(env: dict[str, str], expected: Launch) -> None:
    assert detect(env) == expected
    assert detect({**env, "HOME": "/root", "SLURM_CLUSTER_NAME": "toy"}) == expected


def test_a_batch_shell_is_not_a_step() -> None:
    """The script of sbatch has SLURM_PROCID and SLURM_NTASKS too; python in it runs alone."""
    assert detect(BATCH_SHELL) == Launch("alone", 0, 1, 0, 1, 0, 1)


def test_mpirun_and_torchrun_inside_a_batch_job() -> None:
    assert detect({**BATCH_SHELL, **TORCHRUN}) == detect(TORCHRUN)
    assert detect({**SRUN, **TORCHRUN}) == detect(TORCHRUN)  # srun starts one torchrun a node
    # the batch shell's SLURM_NODEID = 0 is inherited by every rank of mpirun and says nothing about them
    assert detect({**BATCH_SHELL, **OPEN_MPI}) == detect(OPEN_MPI)


@pytest.mark.parametrize(
    ("tasks", "sizes"),
    [
        ("2", [2]),
        ("2(x3)", [2, 2, 2]),
        ("2(x3),1", [2, 2, 2, 1]),
        ("3,2", [3, 2]),
        ("1,4(x2),3", [1, 4, 4, 3]),
        ("16(x64)", [16] * 64),
    ],
)
def test_tasks_per_node(tasks: str, sizes: list[int]) -> None:
    rank = 0
    for node, size in enumerate(sizes):
        for local in range(size):
            env = {
                **SRUN,
                "SLURM_STEP_TASKS_PER_NODE": tasks,
                "SLURM_STEP_NUM_TASKS": str(sum(sizes)),
                "SLURM_STEP_NUM_NODES": str(len(sizes)),
                "SLURM_NODEID": str(node),
                "SLURM_LOCALID": str(local),
                "SLURM_PROCID": str(rank),
            }
            assert detect(env) == Launch("srun", rank, sum(sizes), local, size, node, len(sizes))
            rank += 1


def test_one_task_step() -> None:
    env = {
        **SRUN,
        "SLURM_STEP_NUM_TASKS": "1",
        "SLURM_STEP_NUM_NODES": "1",
        "SLURM_STEP_TASKS_PER_NODE": "1",
        "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0",
        "SLURM_NODEID": "0",
    }
    assert detect(env) == Launch("srun", 0, 1, 0, 1, 0, 1)


@pytest.mark.parametrize(
    ("env", "change", "said"),
    [
        (TORCHRUN, {"RANK": "8"}, "RANK and WORLD_SIZE contradict"),
        (TORCHRUN, {"RANK": "-1"}, "RANK and WORLD_SIZE contradict"),
        (TORCHRUN, {"LOCAL_RANK": "4"}, "LOCAL_RANK contradicts"),
        (TORCHRUN, {"LOCAL_WORLD_SIZE": "9"}, "LOCAL_RANK contradicts"),
        (TORCHRUN, {"WORLD_SIZE": "many"}, "torchrun is not readable: .*'many'"),
        (OPEN_MPI, {"OMPI_COMM_WORLD_RANK": "4"}, "OMPI_COMM_WORLD_RANK and OMPI_COMM_WORLD_SIZE contradict"),
        (SRUN, {"SLURM_STEP_NUM_TASKS": "2"}, "srun says rank 3 of 2 ranks"),
        (SRUN, {"SLURM_STEP_TASKS_PER_NODE": "2(y2)"}, "srun is not readable"),
        (SRUN, {"SLURM_NODEID": "?"}, "srun is not readable"),
        (SRUN, {"SLURM_LOCALID": "3"}, "SLURM_LOCALID contradicts"),
        (HYDRA, {"PMI_RANK": "3"}, "hydra says rank 3 of 3"),
    ],
)
def test_contradictions_are_one_sentence(env: dict[str, str], change: dict[str, str], said: str) -> None:
    with pytest.raises(LaunchError, match=said) as caught:
        detect({**env, **change})
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("env", "key"), [(TORCHRUN, "RANK"), (OPEN_MPI, "OMPI_COMM_WORLD_RANK"), (SRUN, "SLURM_PROCID")])
def test_a_missing_variable_is_no_reason_to_run_alone(env: dict[str, str], key: str) -> None:
    """Ranks that each think they are alone would write the same run."""
    with pytest.raises(LaunchError, match=f"but not {key}"):
        detect({k: v for k, v in env.items() if k != key})


def test_a_lone_world_size_is_no_launcher() -> None:
    assert detect({"WORLD_SIZE": "4"}).launcher == "alone"


def test_mpi_is_not_asked_where_each_process_would_be_a_world_of_its_own() -> None:
    assert mpi_world(detect({})) is None
    assert mpi_world(detect(TORCHRUN)) is None


def test_mpi_that_disagrees_is_refused() -> None:
    """This process is MPI rank 0 of 1, whatever the variables say."""
    pytest.importorskip("mpi4py.MPI")
    with pytest.raises(LaunchError, match="MPI says rank 0 of 1, the environment rank 3 of 4"):
        mpi_world(detect(OPEN_MPI))
    assert mpi_world(detect(SRUN)) is None  # srun without --mpi=pmix


def test_an_exported_endpoint_wins() -> None:
    for env in (TORCHRUN, SRUN, OPEN_MPI):
        both = {**env, "MASTER_ADDR": "10.1.2.3", "MASTER_PORT": "1234"}
        assert master_endpoint(detect(both), both, None) == ("10.1.2.3", 1234)


def test_the_port_of_a_step_is_agreed_without_talking() -> None:
    ports = []
    for change in ({}, {"SLURM_STEP_ID": "1"}, {"SLURM_JOB_ID": "18"}, {"SLURM_RESTART_COUNT": "1"}):
        env = {**SRUN, **change, "MASTER_ADDR": "10.1.2.3"}
        address, port = master_endpoint(detect(env), env, None)
        assert address == "10.1.2.3"
        assert port == master_endpoint(detect({**env, "SLURM_PROCID": "0"}), {**env, "SLURM_PROCID": "0"}, None)[1]
        assert 20000 <= port < 30000  # below the range that Linux hands out to outgoing connections
        ports.append(port)
    assert len(set(ports)) == 4


def test_no_way_to_meet() -> None:
    with pytest.raises(LaunchError, match=r"mpirun started 4 ranks, but neither MASTER_ADDR .* nor is mpi4py"):
        master_endpoint(detect(OPEN_MPI), OPEN_MPI, None)


def _slurm_says(answers: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    def scontrol(*args: str) -> str:
        if " ".join(args) not in answers:
            raise OSError("no scontrol here")
        return answers[" ".join(args)]

    monkeypatch.setattr(launcher, "_scontrol", scontrol)


def test_the_first_node_of_a_list(monkeypatch: pytest.MonkeyPatch) -> None:
    _slurm_says({"show hostnames localhost,node2": "localhost\nnode2\n"}, monkeypatch)
    assert first_node_address("localhost,node2") == "127.0.0.1"


def test_a_node_name_that_is_no_host_name(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "no-such-host.invalid"
    answers = {f"show hostnames {name}": name, f"show node {name}": "NodeName=x NodeAddr=127.0.0.1 NodeHostName=y"}
    _slurm_says(answers, monkeypatch)
    assert first_node_address(name) == "127.0.0.1"
    _slurm_says({f"show hostnames {name}": name}, monkeypatch)
    with pytest.raises(LaunchError, match="has no address that resolves: export MASTER_ADDR"):
        first_node_address(name)
    _slurm_says({}, monkeypatch)
    with pytest.raises(LaunchError, match="cannot expand the Slurm node list 'a,b': export MASTER_ADDR"):
        first_node_address("a,b")


def test_the_end_of_a_job_is_what_slurm_says(monkeypatch: pytest.MonkeyPatch) -> None:
    _slurm_says({"show job 17": "JobId=17 StartTime=2026-01-02T03:04:05 EndTime=2026-01-02T03:05:05"}, monkeypatch)
    assert job_end_time({}) is None
    assert job_end_time({"SLURM_JOB_ID": "17"}) == datetime(2026, 1, 2, 3, 5, 5).timestamp()
    assert job_end_time({"SLURM_JOB_ID": "17", "SLURM_JOB_END_TIME": "1790000000"}) == 1.79e9
    with pytest.raises(LaunchError, match=r"ends job 18 \(scontrol does not tell it, .*: set run.time_limit"):
        job_end_time({"SLURM_JOB_ID": "18"})
    _slurm_says({"show job 17": "JobId=17 StartTime=Unknown EndTime=Unknown"}, monkeypatch)
    assert job_end_time({"SLURM_JOB_ID": "17"}) is None

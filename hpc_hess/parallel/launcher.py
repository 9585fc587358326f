"""Launcher detection: torchrun, Open MPI (mpirun), Hydra (MPICH's mpirun), Slurm (srun), or a single process."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from hpc_hess.errors import LaunchError


@dataclass(frozen=True)
class Launch:
    """What a launcher's environment says about this process."""

    launcher: str
    rank: int
    size: int
    local_rank: int
    local_size: int
    node: int
    num_nodes: int


# launcher, the variables of (rank, size, local rank, local size); the first whose rank and size exist wins.
# SLURM_STEP_ID: a batch script's own shell has SLURM_PROCID too, but is no step.
_VARIABLES = [
    ("torchrun", "TORCHELASTIC_RUN_ID", ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")),
    ("mpirun", "OMPI_COMM_WORLD_SIZE",
     ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE")),
    ("srun", "SLURM_STEP_ID", ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "")),
    ("hydra", "PMI_SIZE", ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS")),
    ("env", "WORLD_SIZE", ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")),
]  # fmt: skip


def detect(env: Mapping[str, str]) -> Launch:
    """Read the launcher's environment. Raises LaunchError when a variable is missing or no number."""
    for launcher, marker, (rank_key, size_key, local_key, local_size_key) in _VARIABLES:
        if marker not in env:
            continue
        missing = [key for key in (rank_key, size_key) if key not in env]
        if missing and launcher == "env":
            continue  # a lone WORLD_SIZE is no launcher
        if missing:
            raise LaunchError(f"{launcher} set {marker} but not {' and '.join(missing)}: unset {marker} to run alone")
        try:
            rank, size = int(env[rank_key]), int(env[size_key])
            tasks = _slurm_local_size(env) if launcher == "srun" else int(env.get(local_size_key, 0))
            local_size = tasks or size
            local_rank = int(env.get(local_key, rank % local_size))
            nodes = int(env.get("SLURM_STEP_NUM_NODES", 0)) if launcher == "srun" else 0
            # a batch script's SLURM_NODEID is inherited by what mpirun starts from it
            node_key = {"torchrun": "GROUP_RANK", "srun": "SLURM_NODEID"}.get(launcher, "")
            node = int(env.get(node_key, rank // local_size))
        except ValueError as error:
            raise LaunchError(f"the environment of {launcher} is not readable: {error}") from None
        if not 0 <= rank < size:
            raise LaunchError(f"{launcher} says rank {rank} of {size} ranks: {rank_key} and {size_key} contradict")
        if not 0 <= local_rank < local_size <= size:
            raise LaunchError(
                f"{launcher} says local rank {local_rank} of {local_size} on this node and {size} ranks in all: "
                f"{local_key} contradicts the counts"
            )
        num_nodes = nodes or -(-size // local_size)
        return Launch(launcher, rank, size, local_rank, local_size, node, num_nodes)
    return Launch("alone", 0, 1, 0, 1, 0, 1)


def _slurm_local_size(env: Mapping[str, str]) -> int:
    """Tasks on this node from SLURM_STEP_TASKS_PER_NODE, such as "2(x3),1"."""
    text = env.get("SLURM_STEP_TASKS_PER_NODE", "")
    counts: list[int] = []
    for part in filter(None, text.split(",")):
        count, _, repeat = part.partition("(x")
        counts += [int(count)] * int(repeat.rstrip(")") or 1)
    node = int(env.get("SLURM_NODEID", 0))
    return counts[node] if node < len(counts) else 0


def mpi_world(launch: Launch) -> Any:
    """Return mpi4py's COMM_WORLD when MPI was started with these ranks, None where no MPI is to be expected.

    Raises
    ------
    LaunchError : MPI and the launcher's environment disagree on rank or size.

    """
    if launch.launcher not in ("mpirun", "srun", "hydra"):
        return None  # under torchrun every process would be an MPI world of its own
    try:
        from mpi4py import MPI
    except ImportError:
        return None
    comm = MPI.COMM_WORLD
    if (comm.Get_rank(), comm.Get_size()) != (launch.rank, launch.size):
        if launch.launcher == "srun" and comm.Get_size() == 1:
            return None  # srun without --mpi=pmix: no MPI world, the file driver still works
        raise LaunchError(
            f"MPI and {launch.launcher} disagree: MPI says rank {comm.Get_rank()} of {comm.Get_size()}, the "
            f"environment rank {launch.rank} of {launch.size}; use the mpirun of the MPI that mpi4py was built with, "
            "or srun --mpi=pmix"
        )
    return comm


def leave_mpi() -> None:
    """Finalise MPI where it was started: mpirun takes a process that ends without it for a crash. Collective: yes.

    The last thing a process does: parallel HDF5 ends with it.
    """
    MPI: Any = sys.modules.get("mpi4py.MPI")
    if MPI is not None and MPI.Is_initialized() and not MPI.Is_finalized():
        MPI.Finalize()


def master_endpoint(launch: Launch, env: Mapping[str, str], mpi: Any) -> tuple[str, int]:
    """Return (address, port) where rank 0 meets the others. Collective over MPI when MPI must be asked.

    MASTER_ADDR and MASTER_PORT win. Else: srun takes the first node of the step and a port made from the job and step
    numbers; mpirun asks rank 0 through MPI. Raises LaunchError when neither is possible.
    """
    if "MASTER_ADDR" in env and "MASTER_PORT" in env:
        return env["MASTER_ADDR"], int(env["MASTER_PORT"])
    if launch.launcher == "srun":
        job, step = int(env.get("SLURM_JOB_ID", 0)), int(env.get("SLURM_STEP_ID", 0))
        restart = int(env.get("SLURM_RESTART_COUNT", 0))
        port = 20000 + (job * 101 + step * 7 + restart * 13) % 10000
        nodes = env.get("SLURM_STEP_NODELIST", env.get("SLURM_JOB_NODELIST", ""))
        return env.get("MASTER_ADDR") or first_node_address(nodes), int(env.get("MASTER_PORT", port))
    if mpi is not None:
        endpoint = None
        if launch.rank == 0:
            single_node = launch.num_nodes == 1
            host = "127.0.0.1" if single_node else socket.gethostbyname(socket.gethostname())
            with socket.socket() as probe:
                probe.bind(("", 0))
                endpoint = (env.get("MASTER_ADDR", host), probe.getsockname()[1])
        return mpi.bcast(endpoint)
    raise LaunchError(
        f"{launch.launcher} started {launch.size} ranks, but neither MASTER_ADDR and MASTER_PORT are set nor is mpi4py "
        "installed: pip install mpi4py, or export both"
    )


def first_node_address(node_list: str) -> str:
    """Return an address of the first node in a Slurm node list such as "node[1-4]". Raises LaunchError."""
    try:
        name = _scontrol("show", "hostnames", node_list).split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        raise LaunchError(f"cannot expand the Slurm node list '{node_list}': export MASTER_ADDR") from None
    try:
        return socket.gethostbyname(name)
    except OSError:
        pass  # a node name need not be a host name: Slurm knows the address
    try:
        words = _scontrol("show", "node", name).split()
        return socket.gethostbyname(next(w.split("=", 1)[1] for w in words if w.startswith("NodeAddr=")))
    except (OSError, subprocess.SubprocessError, StopIteration):
        raise LaunchError(f"the Slurm node '{name}' has no address that resolves: export MASTER_ADDR") from None


def job_end_time(env: Mapping[str, str]) -> float | None:
    """Return when Slurm will end this job, in seconds since the epoch; None outside Slurm or without a limit.

    Not every Slurm sets SLURM_JOB_END_TIME: where it is missing, ``scontrol show job`` is asked. Collective: no.
    """
    if not (job := env.get("SLURM_JOB_ID")):
        return None
    if (told := env.get("SLURM_JOB_END_TIME", "")).isdigit():
        return float(told)
    try:
        words = _scontrol("show", "job", job).split()
        return datetime.fromisoformat(next(w.split("=", 1)[1] for w in words if w.startswith("EndTime="))).timestamp()
    except (OSError, subprocess.SubprocessError, StopIteration, ValueError):
        return None  # no scontrol here, or EndTime=Unknown


def _scontrol(*args: str) -> str:
    return subprocess.run(["scontrol", *args], check=True, capture_output=True, text=True, timeout=30).stdout

"""Launcher detection: torchrun, Open MPI (mpirun), Hydra (MPICH's mpirun), Slurm (srun), PALS, or a single process."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from hpc_hess.errors import LaunchError
from hpc_hess.system import reads_a_terminal


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


# launcher, its marker, the variables of (rank, size, local rank, local size, node); the first whose marker exists wins.
# Launchers that others start their processes by come first: torchrun under srun; hydra, whose proxies are a step of srun
# (srun --mpi=pmi2 sets PMI_RANK and PMI_SIZE too, but no MPI_LOCALNRANKS).
# SLURM_STEP_ID: a batch script's own shell has SLURM_PROCID too, but is no step. Its SLURM_NODEID is inherited by what
# mpirun starts from it.
_TORCH = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK")
_MV2 = "MV2_COMM_WORLD_"
_VARIABLES = [
    ("torchrun", "TORCHELASTIC_RUN_ID", _TORCH),
    (
        "mpirun",
        "OMPI_COMM_WORLD_SIZE",
        ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE", ""),
    ),
    ("hydra", "MPI_LOCALNRANKS", ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS", "")),
    ("srun", "SLURM_STEP_ID", ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "", "SLURM_NODEID")),
    ("pals", "PALS_LOCAL_SIZE", ("PMI_RANK", "PMI_SIZE", "PALS_LOCAL_RANKID", "PALS_LOCAL_SIZE", "PALS_NODEID")),
    (
        "jsrun",
        "JSM_NAMESPACE_SIZE",
        ("JSM_NAMESPACE_RANK", "JSM_NAMESPACE_SIZE", "JSM_NAMESPACE_LOCAL_RANK", "JSM_NAMESPACE_LOCAL_SIZE", ""),
    ),
    ("mpirun_rsh", f"{_MV2}SIZE", (f"{_MV2}RANK", f"{_MV2}SIZE", f"{_MV2}LOCAL_RANK", f"{_MV2}LOCAL_SIZE", "")),
    ("env", "WORLD_SIZE", _TORCH),
]
_MPI = ("mpirun", "hydra", "pals", "jsrun", "mpirun_rsh")  # launchers of MPI programs, which meet through MPI
# what launchers set that are not in the table, or that are but without their other variables
_OTHERS = (
    "PMI_RANK",
    "PMI_SIZE",
    "PMIX_RANK",
    "PALS_RANKID",
    "JSM_NAMESPACE_RANK",
    f"{_MV2}RANK",
    "OMPI_COMM_WORLD_RANK",
    "MPI_LOCALRANKID",
    "FLUX_TASK_RANK",
    "ALPS_APP_PE",
    "HOROVOD_RANK",
)
# addresses of no host (for documentation), which the default route leads to
_ROUTES = ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1"))
_SHELLS = ("interactive", "bash", "sh", "zsh", "tcsh", "csh", "ksh", "fish")
_EXPORT = "export RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT in each process"


def detect(env: Mapping[str, str]) -> Launch:
    """Read the launcher's environment.

    Raises
    ------
    LaunchError : variables are missing, no numbers, contradict each other or are of a launcher that is not known; or this is
        a shell inside a step of several tasks.

    """
    for launcher, marker, keys in _VARIABLES:
        if marker not in env:
            continue
        missing = [key for key in keys[:2] if key not in env]
        if missing and (launcher == "env" or _torch_size(env)):
            continue  # a lone WORLD_SIZE is no launcher; a wrapper says what the launcher did not
        if missing:
            raise LaunchError(f"{launcher} set {marker} but not {' and '.join(missing)}: unset {marker} to run alone")
        found = _read(launcher, keys, env)
        if launcher != "torchrun" and found.size < _torch_size(env):
            return _read("env", _TORCH, env)  # started from a task of that launcher: accelerate, deepspeed
        if launcher == "srun" and found.size > 1 and (sign := _sign_of_a_shell(env)):
            raise LaunchError(
                f"this shell is one of {found.size} tasks of a Slurm step ({sign}), of which the others start nothing: "
                "start the ranks with launch/srun.sh or srun --overlap; srun --overlap -n 1 runs one alone"
            )
        return found
    signs = [key for key in _OTHERS if key in env]
    if env.get("SLURM_PROCID", "0") != "0":
        signs.append("SLURM_PROCID")  # a task of srun whose other variables were lost on the way
    if signs and _count(env, "PMI_SIZE") != 1:
        raise LaunchError(
            f"{', '.join(signs)}: of a launcher that does not say how many ranks there are, or how many on this node: "
            f"{_EXPORT}, or unset these to run alone"
        )
    return Launch("alone", 0, 1, 0, 1, 0, 1)


def _read(launcher: str, keys: tuple[str, ...], env: Mapping[str, str]) -> Launch:
    rank_key, size_key, local_key, local_size_key, node_key = keys
    try:
        rank, size = int(env[rank_key]), int(env[size_key])
        tasks = _slurm_local_size(env) if launcher == "srun" else int(env.get(local_size_key, 0))
        local_size = tasks or size
        local_rank = int(env.get(local_key, rank % local_size))
        nodes = int(env.get("SLURM_STEP_NUM_NODES", 0)) if launcher == "srun" else 0
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
    return Launch(launcher, rank, size, local_rank, local_size, node, nodes or -(-size // local_size))


def _count(env: Mapping[str, str], key: str) -> int:
    return int(env[key]) if env.get(key, "").isdigit() else 0


def _torch_size(env: Mapping[str, str]) -> int:
    """Return the ranks of torch's own variables, 0 where they are not complete."""
    complete = all(key in env for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"))
    return _count(env, "WORLD_SIZE") if complete else 0


def _sign_of_a_shell(env: Mapping[str, str]) -> str:
    """Return what says that a task of a step is a shell that a person types into, as "VARIABLE = VALUE", or "".

    A step that such a shell starts inherits these variables: Slurm gives the process number of its task.
    """
    sign = "SLURM_PTY_PORT" if "SLURM_PTY_PORT" in env else "SLURM_JOB_NAME"
    if sign == "SLURM_JOB_NAME" and env.get(sign) not in _SHELLS:
        return ""
    task = env.get("SLURM_TASK_PID", "")
    if task == str(os.getpid()):
        return ""
    with contextlib.suppress(OSError):  # of another machine's numbers, or another user's
        if not reads_a_terminal(int(task or 0)):
            return ""
    return f"{sign} = {env[sign]}"


def _slurm_local_size(env: Mapping[str, str]) -> int:
    """Tasks on this node from SLURM_STEP_TASKS_PER_NODE, such as "2(x3),1"."""
    text = env.get("SLURM_STEP_TASKS_PER_NODE", "")
    counts: list[int] = []
    for part in filter(None, text.split(",")):
        count, _, repeat = part.partition("(x")
        counts += [int(count)] * int(repeat.rstrip(")") or 1)
    node = int(env.get("SLURM_NODEID", 0))
    return counts[node] if node < len(counts) else 0


def mpi_world(launch: Launch, env: Mapping[str, str] = os.environ, *, wanted: bool = True) -> Any:
    """Return mpi4py's COMM_WORLD when MPI was started with these ranks, None where no MPI is to be expected.

    MPI is not asked where it could end the process or hang: one rank alone, a step of srun without a PMI. Nor will it then
    be started by a library that imports mpi4py (h5py). ``wanted``: by srun's ranks, which can meet without it.

    Raises
    ------
    LaunchError : MPI and the launcher's environment disagree on rank or size.

    """
    pmi = "PMIX_RANK" in env or {"PMI_RANK", "PMI_SIZE"} <= {*env} or "PALS_RANKID" in env
    asked = launch.launcher in _MPI or (launch.launcher == "srun" and wanted and pmi)
    try:
        if launch.size == 1 or not asked:  # under torchrun every process would be an MPI world of its own
            import mpi4py

            mpi4py.rc.initialize = False
            return None
        from mpi4py import MPI
    except ImportError:
        return None
    if not MPI.Is_initialized():
        MPI.Init_thread()
    comm = MPI.COMM_WORLD
    if (comm.Get_rank(), comm.Get_size()) != (launch.rank, launch.size):
        if launch.launcher == "srun" and comm.Get_size() == 1:
            return None  # srun's PMI is not that of this MPI: no MPI world, the file driver still works
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

    MASTER_ADDR and MASTER_PORT win, each for itself. Else: srun takes the first node of the step and a port made from the
    job and step numbers; mpirun asks rank 0 through MPI.

    Raises
    ------
    LaunchError : neither is possible, rank 0 has no address that other nodes reach (on every rank), MASTER_PORT is no port.

    """
    address, told = env.get("MASTER_ADDR", ""), env.get("MASTER_PORT", "")
    if told and not 0 < _count(env, "MASTER_PORT") < 1 << 16:
        raise LaunchError(f"MASTER_PORT = '{told}' is no port: it should be a number from 1 to 65535")
    if address and told:
        return address, int(told)
    if launch.launcher == "srun":
        job, step = int(env.get("SLURM_JOB_ID", 0)), int(env.get("SLURM_STEP_ID", 0))
        restart = int(env.get("SLURM_RESTART_COUNT", 0))
        port = 20000 + (job * 101 + step * 7 + restart * 13) % 10000
        nodes = env.get("SLURM_STEP_NODELIST", env.get("SLURM_JOB_NODELIST", ""))
        return address or first_node_address(nodes), int(told or port)
    if mpi is not None:
        answer: tuple[str, int] | str | None = None
        if launch.rank == 0:
            try:
                answer = (address or ("127.0.0.1" if launch.num_nodes == 1 else own_address()), int(told or _free_port()))
            except LaunchError as error:
                answer = str(error)  # the others wait for an answer
        answer = mpi.bcast(answer)
        if isinstance(answer, tuple):
            return answer
        raise LaunchError(answer, shown_by_other=launch.rank > 0)
    raise LaunchError(
        f"{launch.launcher} started {launch.size} ranks, but neither MASTER_ADDR and MASTER_PORT are set nor is mpi4py "
        "installed: pip install mpi4py, or export both"
    )


def own_address() -> str:
    """Return an address of this node that other nodes can reach: its host name's, else that of the default route.

    Many systems give the host name an address of the loopback interface, which only this node can reach.

    Raises
    ------
    LaunchError : there is none.

    """
    name = socket.gethostname()
    if (address := _address_of(name)) and not is_loopback(address):
        return address
    for family, target in _ROUTES:
        with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((target, 9))  # sends nothing, but chooses the interface
            found = str(probe.getsockname()[0])
            if not is_loopback(found):
                return found
    raise LaunchError(f"the host name '{name}' of rank 0 has no address that other nodes can reach: export MASTER_ADDR")


def is_loopback(address: str) -> bool:
    """Return whether an address or a name is of the loopback interface; other names are not looked up."""
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return address == "localhost"


def _address_of(name: str) -> str:
    """Return the first address of a name, "" where it does not resolve."""
    try:
        return socket.gethostbyname(name)
    except (OSError, UnicodeError):
        return ""


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def first_node_address(node_list: str) -> str:
    """Return an address of the first node in a Slurm node list such as "node[1-4]". Raises LaunchError."""
    try:
        name = _scontrol("show", "hostnames", node_list).split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        raise LaunchError(f"cannot expand the Slurm node list '{node_list}': export MASTER_ADDR") from None
    address = _address_of(name)
    if address and not is_loopback(address):
        return address
    # a node name need not be a host name, and the node itself may call itself 127.0.1.1: Slurm knows the address
    with contextlib.suppress(OSError, subprocess.SubprocessError, StopIteration):
        words = _scontrol("show", "node", name).split()
        told = next(word.split("=", 1)[1] for word in words if word.startswith("NodeAddr="))
        address = _address_of(told) or address
    if not address:
        raise LaunchError(f"the Slurm node '{name}' has no address that resolves: export MASTER_ADDR")
    return address


def job_end_time(env: Mapping[str, str]) -> float | None:
    """Return when Slurm will end this job, in seconds since the epoch; None outside Slurm or without a limit.

    Not every Slurm sets SLURM_JOB_END_TIME: where it is missing, ``scontrol show job`` is asked. Collective: no.

    Raises
    ------
    LaunchError : scontrol is not here (in a container, say), or does not answer.

    """
    if not (job := env.get("SLURM_JOB_ID")):
        return None
    if (told := env.get("SLURM_JOB_END_TIME", "")).isdigit():
        return float(told)
    try:
        words = _scontrol("show", "job", job).split()
    except (OSError, subprocess.SubprocessError) as error:
        why = "is not found" if isinstance(error, FileNotFoundError) else "does not tell it"
        raise LaunchError(
            f"nobody knows when Slurm ends job {job} (scontrol {why}, SLURM_JOB_END_TIME is not set), so the run does not "
            "stop before that by itself: set run.time_limit to a little less than the job's limit"
        ) from None
    try:
        return datetime.fromisoformat(next(w.split("=", 1)[1] for w in words if w.startswith("EndTime="))).timestamp()
    except (StopIteration, ValueError):
        return None  # EndTime=Unknown: no limit


def _scontrol(*args: str) -> str:
    return subprocess.run(["scontrol", *args], check=True, capture_output=True, text=True, timeout=30).stdout

"""Launching (E): environments that launchers really set, ranks without a launcher, caches that ranks would meet in."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from hpc_hess.config import DataSection, ModelSection
from hpc_hess.errors import LaunchError
from hpc_hess.parallel import launcher, world
from hpc_hess.parallel.launcher import Launch, detect, master_endpoint, mpi_world, own_address
from hpc_hess.parallel.orphan import find_launcher, is_gone
from hpc_hess.parallel.world import World
from hpc_hess.session.problem import fills_a_cache, in_turn
from tests.support.base_model import config_b
from tests.support.gpus import PretendedGPUs
from tests.support.launcher_environments import BATCH_SHELL, HYDRA, OPEN_MPI, SRUN, TORCHRUN
from tests.support.launching import LAUNCHERS, LONG, ROOT, TOY, alive, complete, environment, steps_done, wait_until
from tests.support.spawn import run_ranks

# as mpiexec.hydra -n 4 -ppn 2 of MPICH 4.0.2 sets them inside a batch script of Slurm 22.05: its proxies are a step of srun
HYDRA_IN_SLURM = {
    **BATCH_SHELL,
    "PMI_FD": "5",
    "PMI_SIZE": "4",
    "MPI_LOCALNRANKS": "2",
    "SLURM_STEPID": "0",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "node[1-2]",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
    "SLURM_TASKS_PER_NODE": "1(x2)",
}
PALS = {
    "PMI_RANK": "5",
    "PMI_SIZE": "8",
    "PALS_RANKID": "5",
    "PALS_LOCAL_RANKID": "1",
    "PALS_LOCAL_SIZE": "4",
    "PALS_NODEID": "1",
}
# as srun --ntasks-per-node=4 --pty bash sets them, and as a step that is started from there inherits them
PTY = {
    **SRUN,
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NUM_NODES": "1",
    "SLURM_STEP_TASKS_PER_NODE": "4",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
    "SLURM_PTY_PORT": "41271",
    "SLURM_JOB_NAME": "bash",
}
ONE_TASK = {**PTY, "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_TASKS_PER_NODE": "1"}
TORCH = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}


# -- E1, E4: which launcher -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("rank", "local"), [(0, 0), (1, 1), (2, 0), (3, 1)])
def test_hydra_inside_a_batch_script(rank: int, local: int) -> None:
    """Each rank sees the step of its proxy besides its own variables."""
    node = {"SLURM_PROCID": str(rank // 2), "SLURM_NODEID": str(rank // 2), "SLURM_LOCALID": "0"}
    env = {**HYDRA_IN_SLURM, **node, "PMI_RANK": str(rank), "MPI_LOCALRANKID": str(local)}
    assert detect(env) == Launch("hydra", rank, 4, local, 2, rank // 2, 2)


def test_srun_with_a_pmi_of_its_own_stays_srun() -> None:
    assert detect({**SRUN, "PMI_RANK": "3", "PMI_SIZE": "4"}) == Launch("srun", 3, 4, 1, 2, 1, 2)
    # Cray's: srun --mpi=cray_shasta
    assert detect({**SRUN, "PALS_RANKID": "3", "PALS_LOCAL_RANKID": "1", "PALS_NODEID": "1"}).launcher == "srun"


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        (PALS, Launch("pals", 5, 8, 1, 4, 1, 2)),
        ({**PALS, "PMI_RANK": "4", "PALS_LOCAL_RANKID": "0", "PALS_NODEID": "1"}, Launch("pals", 4, 8, 0, 4, 1, 2)),
        (
            {
                "JSM_NAMESPACE_RANK": "7",
                "JSM_NAMESPACE_SIZE": "12",
                "JSM_NAMESPACE_LOCAL_RANK": "1",
                "JSM_NAMESPACE_LOCAL_SIZE": "6",
                "PMIX_RANK": "7",
            },
            Launch("jsrun", 7, 12, 1, 6, 1, 2),
        ),
        (
            {
                "MV2_COMM_WORLD_RANK": "1",
                "MV2_COMM_WORLD_SIZE": "2",
                "MV2_COMM_WORLD_LOCAL_RANK": "1",
                "MV2_COMM_WORLD_LOCAL_SIZE": "2",
            },
            Launch("mpirun_rsh", 1, 2, 1, 2, 0, 1),
        ),
        ({"PMI_RANK": "1", "PMI_SIZE": "2", **TORCH}, Launch("env", 3, 4, 1, 2, 1, 2)),  # exported by a wrapper
    ],
    ids=["PALS", "PALS, first of a node", "jsrun", "mpirun_rsh", "a wrapper's"],
)
def test_other_launchers(env: dict[str, str], expected: Launch) -> None:
    assert detect(env) == expected


@pytest.mark.parametrize(
    ("env", "keys"),
    [
        ({"PMI_RANK": "1", "PMI_SIZE": "2"}, "PMI_RANK, PMI_SIZE"),
        ({"PMIX_RANK": "0", "PMIX_NAMESPACE": "prterun-1"}, "PMIX_RANK"),
        ({"FLUX_TASK_RANK": "1", "FLUX_JOB_SIZE": "4"}, "FLUX_TASK_RANK"),
        ({"ALPS_APP_PE": "3"}, "ALPS_APP_PE"),
        ({"HOROVOD_RANK": "0"}, "HOROVOD_RANK"),
        ({"SLURM_PROCID": "3", "SLURM_JOB_ID": "17"}, "SLURM_PROCID"),  # a container that dropped the others
        ({key: value for key, value in PALS.items() if key != "PALS_LOCAL_SIZE"}, "PMI_RANK, PMI_SIZE, PALS_RANKID"),
        ({key: value for key, value in HYDRA.items() if key != "MPI_LOCALNRANKS"}, "PMI_RANK, PMI_SIZE, MPI_LOCALRANKID"),
        ({key: value for key, value in OPEN_MPI.items() if key.endswith("WORLD_RANK")}, "OMPI_COMM_WORLD_RANK"),
    ],
)
def test_variables_of_an_unknown_launcher_never_mean_alone(env: dict[str, str], keys: str) -> None:
    with pytest.raises(LaunchError, match=f"^{keys}: of a launcher that does not say .*: export RANK"):
        detect(env)
    # the remedies of the sentence
    assert detect({**env, **TORCH}) == Launch("env", 3, 4, 1, 2, 1, 2)
    assert detect({name: value for name, value in env.items() if name not in keys.split(", ")}).launcher == "alone"


def test_processes_started_from_one_task_of_a_step() -> None:
    """accelerate and deepspeed set torch's variables only; srun started one of them on each node, or a shell in a step."""
    assert detect(
        {
            **SRUN,
            "SLURM_STEP_NUM_TASKS": "2",
            "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
            "SLURM_PROCID": "1",
            "SLURM_LOCALID": "0",
            **TORCH,
        }
    ) == Launch("env", 3, 4, 1, 2, 1, 2)
    assert detect({**ONE_TASK, **TORCH}) == Launch("env", 3, 4, 1, 2, 1, 2)
    assert detect({**SRUN, **TORCH}).launcher == "srun"  # as many: exported for torch by the task itself
    assert detect({**SRUN, "WORLD_SIZE": "8", "RANK": "0"}).launcher == "srun"  # not complete


# -- E2: shells in steps, and MPI where it would hang ---------------------------------------------------------


@pytest.mark.parametrize(
    "env", [PTY, {k: v for k, v in PTY.items() if k != "SLURM_PTY_PORT"}, {**PTY, "SLURM_JOB_NAME": "interactive"}]
)
def test_a_shell_in_a_step_of_several_tasks_is_one_sentence_at_once(env: dict[str, str]) -> None:
    with pytest.raises(LaunchError, match="one of 4 tasks of a Slurm step .* start the ranks with launch/srun.sh") as caught:
        detect(env)
    assert "\n" not in str(caught.value)
    # what runs there by a launcher of its own
    assert detect({**env, **TORCHRUN}) == detect(TORCHRUN)
    assert detect({**env, **OPEN_MPI}) == detect(OPEN_MPI)
    # what it starts by srun inherits its variables: the task is this process itself
    assert detect({**env, "SLURM_TASK_PID": str(os.getpid())}).launcher == "srun"


def test_a_wrapper_in_a_step_is_no_shell() -> None:
    """srun bash wrapper.sh: the task is a shell, but nobody types into it."""
    with subprocess.Popen(["sleep", "60"], stdin=subprocess.DEVNULL) as wrapper:
        try:
            assert detect({**PTY, "SLURM_TASK_PID": str(wrapper.pid)}) == Launch("srun", 0, 4, 0, 4, 0, 1)
        finally:
            wrapper.kill()
    inside, outside = os.openpty()
    with subprocess.Popen(["sleep", "60"], stdin=outside) as shell:
        try:
            with pytest.raises(LaunchError, match="one of 4 tasks"):
                detect({**PTY, "SLURM_TASK_PID": str(shell.pid)})
        finally:
            shell.kill()
    os.close(inside)
    os.close(outside)


def test_one_task_runs_alone() -> None:
    assert detect(ONE_TASK) == Launch("srun", 0, 1, 0, 1, 0, 1)
    # salloc with use_interactive_step
    assert detect({**ONE_TASK, "SLURM_STEP_ID": "4294967290", "SLURM_JOB_NAME": "interactive"}).size == 1


@pytest.mark.parametrize(
    ("env", "asked"),
    [
        (ONE_TASK, False),
        ({**ONE_TASK, "PMIX_RANK": "0"}, False),
        ({k: v for k, v in SRUN.items() if k != "PMIX_RANK"}, False),
        ({**HYDRA, "PMI_SIZE": "1", "PMI_RANK": "0"}, False),
        (TORCHRUN, False),
        (SRUN, True),
        (OPEN_MPI, True),
        ({**{k: v for k, v in SRUN.items() if k != "PMIX_RANK"}, "PMI_RANK": "3", "PMI_SIZE": "4"}, True),
    ],
    ids=["one task", "one task, pmix", "no PMI", "hydra, one", "torchrun", "pmix", "mpirun", "pmi2"],
)
def test_mpi_is_asked_only_where_it_was_started(env: dict[str, str], asked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    class AskedError(Exception):
        pass

    class Mpi4py(SimpleNamespace):
        def __getattr__(self, name: str) -> Any:
            raise AskedError

    found = Mpi4py(rc=SimpleNamespace(initialize=True), __spec__=None, __path__=[])
    monkeypatch.setitem(sys.modules, "mpi4py", found)
    monkeypatch.delitem(sys.modules, "mpi4py.MPI", raising=False)
    if asked:
        with pytest.raises(AskedError):
            mpi_world(detect(env), env)
        assert found.rc.initialize is True
    else:
        assert mpi_world(detect(env), env) is None
        assert found.rc.initialize is False  # nor will h5py start it


def test_a_step_without_pmi_reads_and_writes_hdf5_without_mpi(tmp_path: Path) -> None:
    """Open MPI ends a process that asks for it there; an h5py built for MPI imports mpi4py by itself."""
    script = (
        "import os; from hpc_hess.parallel.launcher import detect, mpi_world; print(mpi_world(detect(os.environ)))\n"
        "import h5py; h5py.File('x.h5', 'w')['a'] = 1; print(h5py.File('x.h5')['a'][()])\n"
    )
    env = environment(**ONE_TASK, PYTHONPATH=str(ROOT))
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60)
    assert (done.stdout.split(), done.returncode) == (["None", "1"], 0), done.stderr


# -- E3: where the ranks meet ---------------------------------------------------------------------------------


class Answering:
    """An MPI of which this is rank 0: it remembers what is broadcast."""

    said: Any = None

    def bcast(self, value: Any) -> Any:
        self.said = value
        return value


TWO_NODES = {**OPEN_MPI, "OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_LOCAL_RANK": "0"}


def host_has(monkeypatch: pytest.MonkeyPatch, address: str, route: str) -> None:
    """Let the host name resolve to ``address`` and the default route begin at ``route``; "": there is none."""

    def resolve(name: str) -> str:
        if not address:
            raise socket.gaierror(-2, "Name or service not known")
        return address

    class Probe:
        def __init__(self, family: int, kind: int) -> None:
            self.family = family

        def __enter__(self) -> Probe:
            return self

        def __exit__(self, *error: object) -> None: ...

        def connect(self, target: tuple[str, int]) -> None:
            if not route or (":" in route) != (self.family == socket.AF_INET6):
                raise OSError(101, "Network is unreachable")

        def getsockname(self) -> tuple[str, int]:
            return route, 40000

    monkeypatch.setattr(socket, "gethostbyname", resolve)
    monkeypatch.setattr(launcher, "_free_port", lambda: 4321)
    monkeypatch.setattr(socket, "socket", Probe)


@pytest.mark.parametrize(
    ("address", "route", "expected"),
    [
        ("10.0.0.7", "10.9.9.9", "10.0.0.7"),
        ("127.0.1.1", "10.9.9.9", "10.9.9.9"),
        ("", "10.9.9.9", "10.9.9.9"),
        ("127.0.0.1", "fd00::7", "fd00::7"),
    ],
)
def test_rank_0_tells_an_address_that_others_reach(
    address: str, route: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    host_has(monkeypatch, address, route)
    assert own_address() == expected
    mpi = Answering()
    assert master_endpoint(detect(TWO_NODES), TWO_NODES, mpi) == mpi.said == (expected, 4321)


@pytest.mark.parametrize(("address", "route"), [("127.0.1.1", ""), ("", ""), ("", "127.0.0.1")])
def test_without_such_an_address_every_rank_gets_the_same_sentence(
    address: str, route: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    host_has(monkeypatch, address, route)
    mpi = Answering()
    with pytest.raises(LaunchError, match="no address that other nodes can reach: export MASTER_ADDR") as first:
        master_endpoint(detect(TWO_NODES), TWO_NODES, mpi)
    assert not first.value.shown_by_other
    with pytest.raises(LaunchError, match=f"^{first.value}$") as other:  # which was told what rank 0 said
        master_endpoint(detect(OPEN_MPI), OPEN_MPI, SimpleNamespace(bcast=lambda value: mpi.said))
    assert other.value.shown_by_other


@pytest.mark.parametrize("env", [TWO_NODES, SRUN, PALS], ids=["mpirun", "srun", "PALS"])
def test_with_master_addr_no_name_is_asked(env: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(*args: Any) -> Any:
        raise AssertionError(args)

    monkeypatch.setattr(socket, "gethostbyname", asked)
    monkeypatch.setattr(launcher, "_scontrol", asked)
    told = {**env, "MASTER_ADDR": "10.1.2.3"}
    mpi = SimpleNamespace(bcast=lambda value: value or ("10.1.2.3", 1))
    assert master_endpoint(detect(told), told, mpi)[0] == "10.1.2.3"
    told["MASTER_PORT"] = "many"
    with pytest.raises(LaunchError, match="MASTER_PORT = 'many' is no port"):
        master_endpoint(detect(told), told, None)


def test_the_first_node_of_a_step_that_calls_itself_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {("show", "hostnames", "n[1-2]"): "n1\nn2", ("show", "node", "n1"): "NodeName=n1 NodeAddr=10.0.0.9"}
    monkeypatch.setattr(launcher, "_scontrol", lambda *args: answers[args])
    monkeypatch.setattr(socket, "gethostbyname", {"n1": "127.0.1.1", "10.0.0.9": "10.0.0.9"}.__getitem__)
    assert launcher.first_node_address("n[1-2]") == "10.0.0.9"


NO_NAME = """
import socket, sys
from hpc_hess.parallel import launcher
def unknown(name): raise socket.gaierror(-2, "Name or service not known")
socket.gethostbyname = unknown
detect = launcher.detect
import dataclasses, hpc_hess.parallel.world as world
world.detect = lambda env: dataclasses.replace(detect(env), num_nodes=2)
launcher._ROUTES = ()
from hpc_hess.__main__ import entry
sys.argv[1:] = ["run", sys.argv[1], "--set", "run.out=" + sys.argv[2]]
entry()
"""


@pytest.mark.slow
@pytest.mark.parametrize("script", LAUNCHERS[1:])
def test_a_name_that_does_not_resolve_ends_every_rank(script: str, tmp_path: Path) -> None:
    """MPI is running by then: no rank may wait in its end for one that is gone."""
    (tmp_path / "rank.py").write_text(NO_NAME)
    command = [
        "mpirun",
        "--allow-run-as-root",
        "--oversubscribe",
        "--quiet",
        "-n",
        "2",
        sys.executable,
        tmp_path / "rank.py",
        TOY,
        tmp_path / "run",
    ]
    done = subprocess.run(
        [*map(str, command)],
        cwd=ROOT,
        env=environment(PYTHONPATH=str(ROOT)),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("no address that other nodes can reach: export MASTER_ADDR") == 1, done.stderr


# -- E4: a GPU for each rank ----------------------------------------------------------------------------------


def _with_gpus(world_: World, kind: str, visible: list[list[str]]) -> tuple[str, str]:
    """Join as a rank that sees these GPUs; return its device and the sentence, if any. The GPUs are pretended."""
    mine = visible[world_.rank]
    os.environ["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) + 1)
    world_.barrier("before leaving")
    world_.leave()
    PretendedGPUs(pytest.MonkeyPatch(), kind, mine)
    joined: list[str] = []
    init = world.World.__init__

    def remember(self: World, launch: Launch, device: torch.device, **options: Any) -> None:
        joined.append(str(device))
        init(self, launch, device, **options)

    world.World.__init__ = remember  # type: ignore[method-assign]
    world.dist.init_process_group, start = _by_gloo, world.dist.init_process_group  # type: ignore[assignment]
    _by_gloo.start = start  # type: ignore[attr-defined]
    try:
        World.join(kind, 30, want_mpi=False)
    except LaunchError as error:
        return joined[-1], str(error)
    return joined[-1], ""


def _by_gloo(backend: str, **options: Any) -> None:
    assert backend in ("cpu:gloo,cuda:nccl", "cpu:gloo,xpu:xccl")
    _by_gloo.start("gloo", **options)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("kind", "visible", "devices"),
    [
        ("cuda", [["a"], ["b"]], ["cuda:0", "cuda:0"]),  # each its own alone, whatever launched it
        ("cuda", [["a", "b"], ["a", "b"]], ["cuda:0", "cuda:1"]),
        ("cuda", [["a", "b"], ["c", "d"]], ["cuda:0", "cuda:1"]),
        ("xpu", [["a", "b"], ["a", "b"]], ["xpu:0", "xpu:1"]),
    ],
)
def test_ranks_with_gpus_of_their_own(kind: str, visible: list[list[str]], devices: list[str]) -> None:
    assert run_ranks(_with_gpus, 2, kind, visible) == [(device, "") for device in devices]


@pytest.mark.parametrize("kind", ["cuda", "xpu"])
@pytest.mark.parametrize("visible", [[["a"], ["a"]], [["a"], ["b", "a"]]])
def test_two_ranks_on_one_gpu_are_refused(kind: str, visible: list[list[str]]) -> None:
    for _, text in run_ranks(_with_gpus, 2, kind, visible):
        assert text.startswith("ranks 0 and 1 share the GPU a: start at most one rank per GPU")


# -- E5: the model's own code ---------------------------------------------------------------------------------

CODE = {
    "configuration_own.py": "from transformers import LlamaConfig\nclass OwnConfig(LlamaConfig):\n    model_type = 'own'\n",
    "modeling_own.py": "from transformers import LlamaForCausalLM\nfrom .configuration_own import OwnConfig\n"
    "class OwnForCausalLM(LlamaForCausalLM):\n    config_class = OwnConfig\n",
}


def _load_own(world_: World, directory: str, cache: str) -> str:
    """Load configuration and model where copying a file takes a while, as on a slow file system."""
    from transformers import dynamic_module_utils

    from hpc_hess.model.sharded.skeleton import build_skeleton
    from hpc_hess.model.sources.source import resolve_source

    def copy_slowly(source: Any, target: Any) -> None:
        text = Path(source).read_text()
        with Path(target).open("w") as file:
            for part in (text[: len(text) // 2], text[len(text) // 2 :]):
                file.write(part)
                file.flush()
                time.sleep(0.3)

    # a rank inherits sys.path: another test may have put the ordinary cache there
    sys.path[:] = [path for path in sys.path if path != dynamic_module_utils.HF_MODULES_CACHE]
    dynamic_module_utils.HF_MODULES_CACHE = cache
    dynamic_module_utils.shutil = SimpleNamespace(copy=copy_slowly, copyfile=copy_slowly)  # type: ignore[attr-defined]
    section = ModelSection(source=directory, trust_remote_code=True, attention="eager")

    def load() -> str:
        return type(build_skeleton(resolve_source(section), section)).__name__

    return in_turn(world_, load, "load", shared=fills_a_cache(section, DataSection()))


def test_own_code_is_copied_by_one_rank(tmp_path: Path) -> None:
    directory, cache = tmp_path / "model", tmp_path / "cache"
    config = config_b()
    config.auto_map = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    config.save_pretrained(directory)
    values = (directory / "config.json").read_text().replace('"llama"', '"own"')
    (directory / "config.json").write_text(values)
    for name, text in CODE.items():
        (directory / name).write_text(text)
    assert run_ranks(_load_own, 3, str(directory), str(cache)) == ["OwnForCausalLM"] * 3


def _turns(world_: World, folder: str, locals_: list[int], failing: int) -> tuple[list[str], str]:
    """Return whose turns were over when this rank had its own."""
    world_.launch = Launch("env", world_.rank, world_.size, locals_[world_.rank], 2, 0, 2)
    seen: list[str] = []

    def work(first: bool) -> bool:
        time.sleep(0.1)
        seen.extend(sorted(path.name for path in Path(folder).iterdir()))
        (Path(folder) / str(world_.rank)).touch()
        if world_.rank == failing:
            raise LaunchError("no")
        return first

    try:
        assert world_.one_first(work, "in turn") == (world_.rank in (0, 2))
    except LaunchError as error:
        return seen, str(error)
    return seen, ""


@pytest.mark.parametrize("failing", [-1, 0, 2, 3])
def test_one_rank_of_all_then_one_of_each_node_then_the_others(failing: int, tmp_path: Path) -> None:
    """The cache may be a node's own, or in a home that all nodes share. After an error no rank waits or begins."""
    found = run_ranks(_turns, 4, str(tmp_path), [0, 1, 0, 1], failing)
    assert [text for _, text in found] == ["no" if failing >= 0 else ""] * 4
    assert found[0][0] == []
    assert found[2][0] == ([] if failing == 0 else ["0"])
    for rank in (1, 3):
        assert found[rank][0] == [] if failing in (0, 2) else {"0", "2"} <= set(found[rank][0])


# -- E6: the launcher is gone ---------------------------------------------------------------------------------


def ranks_of(out: Path) -> list[psutil.Process]:
    found = [psutil.Process(number) for number in alive(out)]
    return [process for process in found if "torchrun.py" not in " ".join(process.cmdline())]


def start_alone(out: Path) -> subprocess.Popen[bytes]:
    """launch/torchrun.sh without a pipe that would tell the ranks of its end."""
    command = ["bash", "launch/torchrun.sh", "-n", "2", TOY, *LONG, "--set", f"run.out={out}"]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


@pytest.mark.slow
@pytest.mark.parametrize("wait_s", [0.0, 2.0])
def test_ranks_that_are_starting_end_with_torchrun(wait_s: float, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with start_alone(out) as agent:
        try:
            wait_until(lambda: len(ranks_of(out)) == 2, "two ranks", 60)
            time.sleep(wait_s)
        finally:
            os.killpg(agent.pid, signal.SIGKILL)
    began = time.monotonic()
    wait_until(lambda: not alive(out), "no rank is left", 20)
    assert time.monotonic() - began < 20


@pytest.mark.slow
def test_ranks_that_are_running_commit_and_end_with_torchrun(tmp_path: Path) -> None:
    out = tmp_path / "run"
    with start_alone(out) as agent:
        try:
            wait_until(lambda: steps_done(out) >= 2, "two steps")
        finally:
            os.killpg(agent.pid, signal.SIGKILL)
    wait_until(lambda: not alive(out), "no rank is left", 20)
    done = steps_done(out)
    again = [TOY, *LONG, "--set", f"run.out={out}", "--set", "run.time_limit=00:00:01"]
    code, output = complete("torchrun.sh", "-n", "2", *again)
    assert code == 75, output
    assert f"going on with probe 1 after step {done}" in output  # the last event is committed, and the lock is free


CHILD = "import sys; from hpc_hess.parallel.orphan import find_launcher; import os; print(find_launcher(os.environ))"


def test_who_the_launcher_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def seen_by(*command: str, **variables: str) -> str:
        env = environment(**variables, PYTHONPATH=str(ROOT))
        return subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout

    rank = [sys.executable, "-c", CHILD]
    assert f"number={os.getpid()}," in seen_by(*rank, **TORCHRUN)
    # a shell that wraps the rank has the launcher's variables too, and is not it
    assert f"number={os.getpid()}," in seen_by("sh", "-c", f"{sys.executable} -c '{CHILD}'; true", **TORCHRUN)
    # nobody's rank: what a person starts, in a shell that may end before it (nohup, tmux), or ranks without a launcher
    for variables in ({}, {"RANK": "0", "WORLD_SIZE": "2"}):
        assert seen_by(*rank, **variables).strip() == "None"
    # started by a shell that is gone before the rank looks
    script = f"(sleep 0.5; {sys.executable} -c '{CHILD}') & exit"
    output = seen_by("sh", "-c", f'env OMPI_COMM_WORLD_RANK=0 sh -c "{script}"')
    assert "number=0," in output or f"number={psutil.Process().ppid()}" in output
    assert is_gone(SimpleNamespace(number=0, started=""))  # type: ignore[arg-type]
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    parent = find_launcher(os.environ)
    assert parent is None or not is_gone(parent)
    assert parent is None or is_gone(parent._replace(started="1"))  # its number is another process' now


@pytest.mark.slow
def test_a_run_without_launcher_outlives_its_shell(tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = f"{sys.executable} -m hpc_hess run {TOY} {' '.join(LONG)} --set run.out={out} >/dev/null 2>&1 & exit"
    subprocess.run(["nohup", "sh", "-c", command], cwd=ROOT, env=environment(), stdin=subprocess.DEVNULL, check=True)
    wait_until(lambda: steps_done(out) >= 2, "two steps after the shell has ended")
    (run,) = alive(out)
    os.kill(run, signal.SIGTERM)
    wait_until(lambda: not alive(out), "the run has ended", 60)

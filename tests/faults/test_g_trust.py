"""Trust and what is left behind (G2, G3, G7): the local cluster's directory, messages between ranks, guards."""

from __future__ import annotations

import contextlib
import os
import pickle
import re
import subprocess
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch

from hpc_hess import system
from hpc_hess.commands.intrinsic_dimension.work import _Job
from hpc_hess.curvature.decomposition import Groups, weights
from hpc_hess.curvature.exact.exact import ExactHessian
from hpc_hess.curvature.exact.whole_model import WholeModel
from hpc_hess.errors import CollectiveError, DataError, LaunchError
from hpc_hess.linalg import probes
from hpc_hess.model.blocks.exchange import Exchange
from hpc_hess.parallel import messages, shared_memory
from hpc_hess.parallel.launcher import Launch
from hpc_hess.parallel.shard_collectives import TorchCollectives
from hpc_hess.parallel.world import World
from hpc_hess.storage.replicas import share_with_replicas
from tests.support.launching import ROOT, environment
from tests.support.sharded import meta_copy, ragged_objective, shard_toy
from tests.support.spawn import run_ranks, start_ranks
from tests.support.toys import toy_model

# -- G2: the local cluster's directory ----------------------------------------------------------------------------------

AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


def cluster(command: str, directory: Path) -> tuple[int, str]:
    """Call slurm/local_cluster.sh without any program of Slurm: nothing can start."""
    programs = directory.parent / "bin"
    programs.mkdir(exist_ok=True)
    for name in ("munged", "slurmctld", "slurmd", "sbatch"):
        (programs / name).write_text("#!/bin/sh\necho started >&2\nexit 1\n")
        (programs / name).chmod(0o755)
    env = environment(HPC_HESS_SLURM_DIR=str(directory), PATH=f"{programs}:{os.environ['PATH']}")
    words = ["bash", "slurm/local_cluster.sh", *command.split()]
    done = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


@AS_ROOT
@pytest.mark.parametrize("how", ["other owner", "mode 777", "mode 755", "link", "file"])
@pytest.mark.parametrize("command", ["up 1", "down", "status", "env"])
def test_a_directory_that_others_made_is_not_used(how: str, command: str, tmp_path: Path) -> None:
    directory = tmp_path / "state"
    made = tmp_path / "made" if how == "link" else directory
    made.mkdir(mode=0o700)
    if how == "other owner":
        os.chown(made, 65534, 65534)
    elif how.startswith("mode"):
        made.chmod(int(how.split()[1], 8))
    elif how == "link":
        directory.symlink_to(made)
    else:
        made.rmdir()
        directory.touch()
    code, output = cluster(command, directory)
    assert (code, "started" in output) == (1, False), output
    assert f"{directory} is not a directory of root's own with mode 700" in output
    assert not made.is_dir() or not list(made.iterdir())


@AS_ROOT
def test_a_directory_that_others_can_replace_is_not_used(tmp_path: Path) -> None:
    open_to_all = tmp_path / "open"
    open_to_all.mkdir()
    open_to_all.chmod(0o777)
    code, output = cluster("up 1", open_to_all / "state")
    assert (code, f"because of {open_to_all}:" in output) == (1, True), output
    open_to_all.chmod(0o1777)  # as /tmp
    code, output = cluster("up 1", open_to_all / "state")
    assert "munged did not start" in output
    assert (open_to_all / "state").stat().st_mode & 0o777 == 0o700
    key = open_to_all / "state" / "munge" / "key"
    assert (key.stat().st_mode & 0o777, key.stat().st_size) == (0o600, 1024)


def test_the_default_directory_is_not_in_tmp() -> None:
    assert "HPC_HESS_SLURM_DIR:-/run/" in (ROOT / "slurm/local_cluster.sh").read_text()


# -- G3: messages, and other machines' process numbers --------------------------------------------------------------------


class Pair(NamedTuple):
    """For messages."""

    a: Any
    b: Any


VALUES: list[Any] = [
    None,
    True,
    -3,
    2**80,
    0.1,
    float("inf"),
    "",
    "\u201c\udcff",
    b"",
    b"\x00\xff",
    [],
    [1, [2.5, None]],
    (),
    (1, (2,)),
    {1, 2},
    frozenset({"a"}),
    {},
    {"a": 1, 2: (3,), (4, 5): [6]},
    defaultdict(list, {"x": [1]}),
    Path("/a/b"),
    Pair(1, [Pair(2, b"3")]),
    Launch("env", 1, 2, 1, 2, 0, 1),
    DataError,
    (LaunchError, "text"),
]


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_values_arrive_as_they_were(value: Any) -> None:
    found = messages.unpack(messages.pack(value))
    assert found == value
    assert type(found) is (dict if isinstance(value, defaultdict) else type(value))


@pytest.mark.parametrize("dtype", ["float64", "float32", "int8", "uint16", "bool", "complex128", "S3", "U2"])
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0), (2, 3)])
def test_arrays_arrive_as_they_were(dtype: str, shape: tuple[int, ...]) -> None:
    array = (np.arange(np.prod(shape, dtype=int)) - 1).reshape(shape).astype(dtype)
    found = messages.unpack(messages.pack([array, {"again": array.T}]))
    for a, b in ((found[0], array), (found[1]["again"], array.T)):
        assert (a.dtype, a.shape, a.tolist()) == (b.dtype, b.shape, b.tolist())
    scalar = messages.unpack(messages.pack(np.float64(0.1)))
    assert (type(scalar), scalar) == (np.float64, 0.1)
    for kind in (torch.float32, torch.bfloat16, torch.int64, torch.bool):
        tensor = torch.from_numpy(np.ones(shape)).to(kind)
        assert torch.equal(messages.unpack(messages.pack(tensor)), tensor)


class Evil:
    """Would run a command where it is unpickled."""

    def __reduce__(self) -> Any:
        return os.system, ("touch /tmp/hpc_hess_was_here",)


def _of(kind: str, **fields: Any) -> bytes:
    text = messages.json.dumps({"kind": kind, **fields}).encode()
    return len(text).to_bytes(8, "little") + text


@pytest.mark.parametrize(
    "message",
    [
        pickle.dumps(Evil()),
        b"",
        b"\xff" * 20,
        _of("class", module="os", name="system"),
        _of("class", module="subprocess", name="Popen"),
        _of("fields", module="subprocess", name="Popen", fields={"args": "x"}),
        _of("fields", module="builtins", name="object", fields={}),
        _of("fields", module="not_loaded_yet", name="X", fields={}),
        _of("fields", module="hpc_hess.parallel.launcher", name="Launch", fields={"rank": 1}),
        _of("array", dtype="O", shape=[1], bytes=8),
        _of("array", dtype="f8", shape=[1000], bytes=8),
        _of("array", dtype="f8", shape=[1], bytes=8),
        _of("bytes", bytes=-1),
        _of("tensor", dtype="load", shape=[1], bytes=0),
        _of("code", text="1"),
    ],
)
def test_what_is_no_message_is_refused(message: bytes) -> None:
    with pytest.raises(ValueError):  # any: the point is that nothing is made of it
        messages.unpack(message)
    assert not Path("/tmp/hpc_hess_was_here").exists()


def test_what_cannot_be_said_is_said() -> None:
    for value in (object(), lambda: 0, Evil(), os.system, dict, np.array([object()])):
        with pytest.raises(TypeError, match="cannot tell each other"):
            messages.pack(value)


def _tell(world: World) -> list[Any]:
    mine = {"rank": world.rank, "array": np.full(world.rank * 1000, world.rank)}
    found = world.gather(mine, "gather")
    assert [each["array"].tolist() for each in found] == [[r] * r * 1000 for r in range(world.size)]
    got = [each["rank"] for each in found]
    got.append(world.broadcast(Path("/rank") / str(world.rank), "broadcast"))
    for call in (world.broadcast, world.gather):  # what one rank cannot say leaves none waiting
        with pytest.raises(TypeError, match="cannot tell each other a Evil"):
            call(Evil() if world.rank == 0 else None, "evil")
    messages.MOST_BYTES = 1000
    with pytest.raises(TypeError, match="larger than 1000"):
        world.broadcast("x" * 2000, "much")
    with pytest.raises(ValueError, match="a message of 1001 bytes"):  # from a rank that says so all the same
        messages.buffer(b"", 1001)
    return got


def test_ranks_tell_each_other_messages() -> None:
    assert run_ranks(_tell, 3) == [[0, 1, 2, Path("/rank/0")]] * 3


def test_nothing_is_pickled_by_this_package() -> None:
    for path in (ROOT / "hpc_hess").rglob("*.py"):
        text = path.read_text()
        if (
            path.name == "distcp.py"
        ):  # reads pickles into records, and refuses others: tests/unit/test_distributed_checkpoints
            assert "class _Records(Unpickler)" in text
            assert text.count("Unpickler") == 2
            text = text.replace("from pickle import Unpickler", "")
        for word in (
            "import pickle",
            "from pickle",
            "object_list",
            "_object(",
            "pickle.",
            "allow_pickle=True",
            "torch.load",
        ):
            assert word not in text.replace("allow_pickle=False", ""), f"{path}: {word}"


def _other_machine(world: World, what: str) -> tuple[bool, list[str]]:
    """Form the mesh where rank 1 is on another machine; return whether memory is shared, and what was opened of others."""
    opened: list[str] = []
    if world.rank == 1:
        here = shared_memory.machine()
        name = {"here": here, "boot": "f" * 36 + "pid:[1]", "container": here[:36] + "pid:[1]", "unknown": ""}[what]
        shared_memory.machine = lambda: name  # type: ignore[assignment]

    def watched(path: str, flags: int) -> int:
        opened.append(path)
        return os.open(path, flags)

    system.os = SimpleNamespace(**{**vars(os), "open": watched})  # type: ignore[attr-defined]
    world.make_mesh()
    return isinstance(world.collectives, TorchCollectives), opened


@pytest.mark.parametrize("what", ["boot", "container", "unknown"])
def test_no_file_of_another_machines_process_is_opened(what: str) -> None:
    assert run_ranks(_other_machine, 2, what) == [(True, [])] * 2


def test_files_of_this_machines_processes_are_opened() -> None:
    for alone, opened in run_ranks(_other_machine, 2, "here"):
        assert not alone
        assert len(opened) == 2  # its own, and the other's


# -- G7: guards ---------------------------------------------------------------------------------------------------------


def _dies(world: World, whole: bool, where: str, replicate: int) -> str:
    """Rank 1 ends before a call of the exchange; return what rank 0 then raises."""
    world.make_mesh(replicate)
    plain = meta_copy(toy_model("gpt2", dtype=torch.float64))
    model, objective = shard_toy(world, "gpt2"), ragged_objective(world.rank, world.size)
    if where == "prepare":
        _end_before(world, Exchange, "parameters")
    try:
        kind: Any = WholeModel if whole else ExactHessian
        operator = kind(model, objective, plain=plain)
        if where != "prepare":
            _end_before(world, operator._exchange, where)
        operator.matvec(probes.draw(model.space, seed=0, probe=0, distribution="rademacher"))
    except CollectiveError as error:
        return str(error)
    return ""


def _end_before(world: World, owner: Any, name: str) -> None:
    inner = getattr(owner, name)

    def outer(*args: Any) -> Any:
        if world.rank == 1:
            os._exit(9)
        return inner(*args)

    setattr(owner, name, outer)


@pytest.mark.parametrize(
    ("whole", "where", "replicate", "name"),
    [
        (False, "prepare", 1, "preparing the exact product"),
        (True, "prepare", 1, "preparing the exact product"),
        (False, "settle", 1, r"exact product, micro-batch \d of \d"),
        (False, "finish", 2, "sum the tangents of all ranks"),
        (True, "fetch", 1, "exact product, parameters of the whole model"),
        (True, "add", 1, "exact product, tangents of the whole model"),
        (True, "finish", 2, "sum the tangents of all ranks"),
    ],
)
def test_a_dead_rank_in_an_exact_product_is_one_named_error(whole: bool, where: str, replicate: int, name: str) -> None:
    processes, pipes = start_ranks(_dies, 2, whole, where, replicate)
    try:
        assert pipes[0].poll(60)
        failed, _, answer = pipes[0].recv()
        assert not failed, answer
        assert re.search(f"the collective '{name}' did not complete: another rank died", answer), answer
    finally:
        for process in processes:
            process.kill()
            process.join()


def _replicas_read_a_row(world: World) -> str:
    world.make_mesh(2)
    if world.rank == 1:
        os._exit(9)
    try:
        share_with_replicas(world, np.zeros(4))
    except CollectiveError as error:
        return str(error)
    return ""


def test_a_dead_rank_while_a_row_is_shared() -> None:
    processes, pipes = start_ranks(_replicas_read_a_row, 2)
    assert pipes[0].poll(60)
    assert "the collective 'share a basis row' did not complete: another rank died" in pipes[0].recv()[2]
    for process in processes:
        process.join()


class Guarded:
    """A world that remembers its guards."""

    rank, size = 0, 1

    def __init__(self) -> None:
        self.names: list[str] = []
        self.open = 0

    @contextlib.contextmanager
    def guard(self, name: str) -> Iterator[None]:
        self.names.append(name)
        self.open += 1
        yield
        self.open -= 1

    def sum_over_ranks(self, values: torch.Tensor, name: str) -> torch.Tensor:
        return values

    def broadcast(self, value: Any, name: str) -> Any:
        return value


def forwards(world: Guarded, passes: int) -> Any:
    """Return an objective of so many micro-batches, each of which must be in a guard of its own."""
    objective = MagicMock(num_micro_batches=passes, num_tokens=2 * passes)

    def logits_and_targets(module: Any, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        assert (world.open, len(world.names)) == (1, index + 1)
        return torch.tensor([[2.0, 0.0], [0.0, 2.0]]), torch.tensor([0, 0])

    objective.logits_and_targets = logits_and_targets
    return objective


def test_each_forward_pass_has_the_time_that_a_collective_may_take() -> None:
    """A pass over what is held out may take longer than that, and is healthy."""
    world = Guarded()
    job = MagicMock(_world=world, _search=MagicMock(metric="accuracy"))
    job._problem.model.space.device = torch.device("cpu")
    job._objective.return_value = forwards(world, 3)
    assert _Job._measure(job) == 50.0
    assert len(world.names) == len(set(world.names)) == 3
    world = Guarded()
    groups = Groups(torch.tensor([0, 1]), 2)
    found = weights(forwards(world, 4), torch.nn.Identity(), groups, lambda sums: sums, world.guard)
    assert len(world.names) == len(set(world.names)) == 4
    assert found.sum() == pytest.approx(1.0)

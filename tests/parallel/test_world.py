"""World: agreement, errors that every rank raises, one message for the whole job, and a dead rank's trace."""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from typing import Any

import pytest
import torch

from hpc_hess.errors import CollectiveError, ConfigError, DataError, HpcHessError, LaunchError, NumericsError
from hpc_hess.parallel.world import World, describe
from tests.support.spawn import run_ranks


def _outcome(function: Any) -> tuple[str, str]:
    try:
        function()
    except HpcHessError as error:
        return type(error).__name__, str(error)
    return "", ""


def _agreement(world: World) -> dict[str, Any]:
    """Everything that needs no failure, in one world of three."""
    rank = world.rank
    got: dict[str, Any] = {
        "sum": world.sum_over_ranks(torch.tensor([1.0, rank], dtype=torch.float64), "sum").tolist(),
        "shards": world.sum_over_shards(torch.tensor([float(rank)], dtype=torch.float64), "sum").tolist(),
        "max": world.max_over_ranks(-2.0 * rank, "max"),
        "all": [world.all_true(flag, "all") for flag in (True, rank != 1, False)],
        "any": [world.any_true(flag, "any") for flag in (True, rank == 1, False)],
        "broadcast": world.broadcast({"from": rank}, "broadcast"),
        "gather": world.gather(("rank", rank), "gather"),
        "describe": describe(world)["world_size"],
    }

    def body(errors: dict[int, HpcHessError]) -> None:
        with world.together("try it"):
            if rank in errors:
                raise errors[rank]

    got["none"] = _outcome(lambda: body({}))
    got["one"] = _outcome(lambda: body({1: DataError("rank 1 has no data")}))
    got["two"] = _outcome(lambda: body({1: NumericsError("NaN on 1"), 2: ConfigError("bad key on 2")}))
    got["direct"] = _outcome(lambda: world.raise_together(ConfigError("the last") if rank == 2 else None, "raise_together"))
    got["mesh"] = _outcome(lambda: world.make_mesh(2))
    world.make_mesh(3)
    got["place"] = (world.replica, world.shard_rank, world.shard_size, world.num_replicas)
    # each rank's own sums: replica 0's win, so that replicas cannot drift apart
    got["replicas"] = world.sum_over_shards(torch.tensor([10.0 + rank], dtype=torch.float64), "sum").tolist()
    return got


def test_agreement_and_errors_together() -> None:
    answers = run_ranks(_agreement, 3)
    for rank, got in enumerate(answers):
        assert got["sum"] == [3.0, 3.0]
        assert got["shards"] == [3.0]
        assert got["max"] == 0.0
        assert got["all"] == [True, False, False]
        assert got["any"] == [True, True, False]
        assert got["broadcast"] == {"from": 0}
        assert got["gather"] == [("rank", 0), ("rank", 1), ("rank", 2)]
        assert got["describe"] == 3
        assert got["none"] == ("", "")
        assert got["one"] == ("DataError", "rank 1 has no data")
        assert got["two"] == ("NumericsError", "NaN on 1")  # the lowest failing rank speaks for all
        assert got["direct"] == ("ConfigError", "the last")
        assert got["mesh"] == ("LaunchError", "parallel.replicate = 2 does not divide the 3 ranks")
        assert got["place"] == (rank, 0, 1, 3)
        assert got["replicas"] == [10.0]


def test_a_world_of_one_never_communicates() -> None:
    world = World.alone()
    assert world.sum_over_ranks(torch.ones(2), "sum").tolist() == [1.0, 1.0]
    assert (world.max_over_ranks(-3.5, "max"), world.all_true(False, "all"), world.any_true(True, "any")) == (
        -3.5,
        False,
        True,
    )
    assert (world.broadcast("x", "b"), world.gather("x", "g")) == ("x", ["x"])
    world.barrier("nobody")
    with pytest.raises(DataError, match=r"^alone$"), world.together("t"):
        raise DataError("alone")
    world.leave()


def _stderr_lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if "hpc-hess: error" in line]


def _fail_everywhere(world: World) -> int:
    """All ranks meet the same error together, as a bad configuration."""
    code = world.fail(ConfigError("no such model"))
    world.barrier("all have spoken")
    return code


def _fail_on_one(world: World, failing: int) -> None:
    """One rank fails on its own and ends; the others are in a collective and notice."""
    if world.rank == failing:
        world.fail(NumericsError("the lamp is out"))
        sys.stderr.flush()
        os._exit(3)
    try:
        world.barrier("wait for the others")
    except CollectiveError as error:
        world.fail(error)
    time.sleep(0.5)


def _fail_unexpectedly(world: World) -> int:
    try:
        raise KeyError("a bug")
    except KeyError as error:
        code = world.fail(error)
    world.barrier("all have spoken")
    return code


@pytest.mark.slow
def test_an_error_of_all_is_printed_once(capfd: pytest.CaptureFixture[str]) -> None:
    assert run_ranks(_fail_everywhere, 3, fresh=True) == [2, 2, 2]
    err = capfd.readouterr().err
    assert len(_stderr_lines(err)) == 1
    assert re.search(r"^hpc-hess: error \[rank \d\]: no such model$", err, re.MULTILINE)
    assert "Traceback" not in err


@pytest.mark.slow
def test_an_error_of_one_is_printed_once_and_is_its_own(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(AssertionError, match="rank 1 of 3 ended with code 3"):
        run_ranks(_fail_on_one, 3, 1, fresh=True)
    assert _stderr_lines(capfd.readouterr().err) == ["hpc-hess: error [rank 1]: the lamp is out"]


@pytest.mark.slow
def test_an_error_of_the_rank_that_serves_the_store_is_shown_first(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(AssertionError, match="rank 0 of 3 ended with code 3"):
        run_ranks(_fail_on_one, 3, 0, fresh=True)
    lines = _stderr_lines(capfd.readouterr().err)
    assert lines[0] == "hpc-hess: error [rank 0]: the lamp is out"
    assert len(lines) <= 2  # nobody can ask any more who has spoken: at most one rank adds what it saw
    assert all("'wait for the others' did not complete" in line for line in lines[1:])


@pytest.mark.slow
def test_a_bug_shows_its_traceback_once(capfd: pytest.CaptureFixture[str]) -> None:
    assert run_ranks(_fail_unexpectedly, 2, fresh=True) == [1, 1]
    err = capfd.readouterr().err
    assert err.count("Traceback") == 1
    assert len(_stderr_lines(err)) == 1
    assert "KeyError: 'a bug'" in err


def _one_is_killed(world: World, killed: int, collective: str) -> None:
    world.barrier("begin")
    if world.rank == killed:
        os.kill(os.getpid(), signal.SIGKILL)
    calls = {
        "sum": lambda: world.sum_over_shards(torch.ones(4, dtype=torch.float64), "second projection"),
        "broadcast": lambda: world.broadcast("x", "tell the others"),
        "gather": lambda: world.gather("x", "ask the others"),
        "together": lambda: world.raise_together(None, "read the weights"),
    }
    calls[collective]()


@pytest.mark.parametrize(
    ("killed", "collective", "name"),
    [(1, "sum", "second projection"), (0, "broadcast", "tell the others"), (1, "gather", "ask the others")],
)
def test_a_killed_rank_ends_the_others_within_seconds(killed: int, collective: str, name: str) -> None:
    began = time.monotonic()
    with pytest.raises(AssertionError) as caught:
        run_ranks(_one_is_killed, 2, killed, collective)
    text = str(caught.value)
    assert f"rank {killed} of 2 ended with code -9" in text
    assert f"CollectiveError: rank {1 - killed}: the collective '{name}' did not complete: another rank died" in text
    assert time.monotonic() - began < 60


def test_a_rank_that_never_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(CollectiveError, match=r"rank 1 of 2 could not join the others .*; check MASTER_ADDR"):
        World.join(device="cpu", timeout_s=1, want_mpi=False)


def test_no_gpu_where_one_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(LaunchError, match=r'parallel\.device = "cuda" but torch sees no GPU'):
        World.join(device="cuda")

"""A rank that hangs: the others end within a bounded time, and say which rank it was and what it was doing."""

from __future__ import annotations

import re
import signal
import time
from pathlib import Path

import pytest

from hpc_hess.parallel.world import World
from tests.support.launching import LAUNCHERS, LONG, TOY, complete, find_rank, finish, running, steps_done, wait_until
from tests.support.spawn import run_ranks

pytestmark = pytest.mark.slow

TIMEOUT = ["--set", "parallel.timeout_s=8"]


@pytest.mark.parametrize("script", LAUNCHERS)
def test_a_rank_that_is_stopped_is_named(tmp_path: Path, script: str) -> None:
    out = tmp_path / "run"
    command = [TOY, *LONG, *TIMEOUT, "--set", f"run.out={out}"]
    with running(script, "-n", "3", *command) as process:
        wait_until(lambda: steps_done(out) >= 3, "three steps")
        hung = find_rank(1, out)
        hung.send_signal(signal.SIGSTOP)
        began = time.monotonic()
        wait_until(lambda: not any(is_up(rank, out) for rank in (0, 2)), "the other ranks have ended", 60)
        ended_s = time.monotonic() - began
        hung.kill()  # launchers wait for it
        code, output = finish(process)
    assert code != 0
    assert ended_s < 40
    assert re.search(r"rank 1 has not been heard of for \d+ s, then was in '[^']+' for \d+ s", output), output
    assert "Traceback" not in output
    before = steps_done(out)
    code, output = complete(
        script,
        "-n",
        "3",
        TOY,
        "--set",
        "lanczos.probes=1",
        "--set",
        f"run.out={out}",
        *LONG,
        "--set",
        "run.time_limit=00:00:01",
    )
    assert code == 75, output
    assert f"going on with probe 1 after step {before}" in output or f"after step {before - 1}" in output


def is_up(rank: int, out: Path) -> bool:
    try:
        find_rank(rank, out)
    except AssertionError:
        return False
    return True


def busy(world: World) -> list[str]:
    """Rank 1 does something else for longer than the others wait."""
    if world.rank == 1:
        with world.doing("counting sheep"):
            time.sleep(6)
        return []
    with pytest.raises(Exception, match="did not complete") as caught:
        world.barrier("meet")
    time.sleep(2)  # rank 0 serves the store in which the others look
    return [str(caught.value)]


def test_a_rank_that_is_late_says_what_it_does(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = run_ranks(busy_with_little_patience, 3)
    for (text,) in (answers[0], answers[2]):
        assert re.search(r"collective 'meet' did not complete.*; rank 1 was in 'counting sheep' for [23] s", text), text


def busy_with_little_patience(world: World) -> list[str]:
    return busy(join_again(world, 3.0))


def join_again(world: World, timeout_s: float) -> World:
    """Leave the world and join another one with less patience."""
    import os

    port = int(os.environ["MASTER_PORT"])
    world.barrier("before leaving")
    world.leave()
    os.environ["MASTER_PORT"] = str(port + 1)
    return World.join("cpu", timeout_s, want_mpi=False)


def endless(world: World) -> None:
    with join_again(world, 2.0).doing("reading a row"):
        time.sleep(60)


def test_work_that_no_exception_can_end_is_ended(capfd: pytest.CaptureFixture[str]) -> None:
    """As a collective of MPI, or a file system that does not answer."""
    began = time.monotonic()
    with pytest.raises(AssertionError, match="ended with code 1"):
        run_ranks(endless, 2, fresh=True)
    assert time.monotonic() - began < 40
    assert re.search(r"error \[rank \d\]: 'reading a row' did not end within \d s", capfd.readouterr().err)

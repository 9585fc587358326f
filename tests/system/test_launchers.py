"""One run alone, under torchrun (one node, two nodes) and mpirun: the same numbers, the same exit codes, one error."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.launching import (
    LAUNCHERS,
    LONG,
    ROOT,
    SHORT,
    TOY,
    alive,
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

pytestmark = pytest.mark.slow

ERROR = "hpc-hess: error"


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """The run in one process, without a launcher."""
    out = tmp_path_factory.mktemp("alone") / "run"
    command = [sys.executable, "-m", "hpc_hess", "run", TOY, *SHORT, "--set", f"run.out={out}"]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "lambda max" in done.stdout
    return result(out)


def same_numbers(found: dict, expected: dict, ranks: int) -> None:
    assert found["world_size"] == ranks
    assert found["num_params"] == expected["num_params"] == 26_784
    for probe, reference in zip(found["probes"], expected["probes"], strict=True):
        assert len(probe["alpha"]) == 4
        assert probe["alpha"] == pytest.approx(reference["alpha"], abs=1e-6)
        assert probe["beta"] == pytest.approx(reference["beta"], abs=1e-6)


@pytest.mark.parametrize("script", LAUNCHERS)
def test_two_ranks_give_the_numbers_of_one(script: str, alone: dict, tmp_path: Path) -> None:
    code, output = complete(script, "-n", "2", TOY, *SHORT, "--set", f"run.out={tmp_path / 'run'}")
    assert code == 0, output
    same_numbers(result(tmp_path / "run"), alone, 2)
    assert output.count("lambda max") == 1  # rank 0 speaks for all


def test_two_torchrun_nodes_give_the_numbers_of_one(alone: dict, tmp_path: Path) -> None:
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    arguments = ["-n", "2", "--nodes", "2", TOY, *SHORT, "--set", f"run.out={tmp_path / 'run'}"]
    with (
        running("torchrun.sh", *arguments, NODE_RANK="0", **where) as first,
        running("torchrun.sh", *arguments, NODE_RANK="1", **where) as second,
    ):
        for process in (second, first):
            code, output = finish(process)
            assert code == 0, output
    same_numbers(result(tmp_path / "run"), alone, 2)


@pytest.mark.parametrize("script", LAUNCHERS)
def test_bad_input_and_bad_numbers_have_their_exit_codes_and_one_error(script: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    code, output = complete(script, "-n", "2", TOY, "--set", "lanczos.stepz=4", "--set", f"run.out={out}")
    assert (code, output.count(ERROR)) == (2, 1), output
    assert "did you mean 'lanczos.steps'?" in output
    assert "Traceback" not in output
    code, output = complete(script, "-n", "2", TOY, "--set", "operator.step=1e300", "--set", f"run.out={out}")
    assert (code, output.count(ERROR)) == (3, 1), output
    assert "Traceback" not in output


@pytest.mark.parametrize("script", LAUNCHERS)
def test_a_request_to_stop_ends_with_75_and_the_same_command_goes_on(script: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    arguments = ["-n", "2", TOY, *LONG, "--set", f"run.out={out}"]
    with running(script, *arguments) as process:
        wait_until(lambda: steps_done(out) >= 2, "two steps")
        process.send_signal(signal.SIGUSR1)
        code, output = finish(process, timeout_s=60)
    assert code == 75, output
    assert ERROR not in output
    done = steps_done(out)
    with running(script, *arguments) as process:
        wait_until(lambda: steps_done(out) > done, "one more step")
        process.send_signal(signal.SIGTERM)
        code, output = finish(process, timeout_s=60)
    assert code == 75, output
    assert "after step" in output  # it went on, and did not begin again


@pytest.mark.parametrize("script", LAUNCHERS)
def test_a_killed_rank_ends_the_job_within_a_minute(script: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with running(script, "-n", "2", TOY, *LONG, "--set", f"run.out={out}") as process:
        wait_until(lambda: steps_done(out) >= 1, "one step")
        find_rank(1, out).kill()
        began = time.monotonic()
        code, output = finish(process, timeout_s=60)
    assert code == 137, output
    assert "SIGKILL" in output
    wait_until(lambda: not alive(out), "no process is left", timeout_s=60 - (time.monotonic() - began))


def test_launchers_explain_their_own_arguments() -> None:
    for script in ("torchrun.sh", "mpirun.sh", "srun.sh"):
        assert complete(script)[0] == 2
        code, output = complete(script, "-n", "two", TOY)
        assert (code, "-n takes a positive number, not 'two'" in output) == (2, True), output
        code, output = complete(script, "--help")
        assert code == 0
        assert "-n RANKS" in output
    code, output = complete("torchrun.sh", "-n", "3", "--nodes", "2", TOY)
    assert (code, "3 ranks do not divide over 2 nodes" in output) == (2, True), output
    code, output = complete("torchrun.sh", "-n", "2", "--nodes", "2", TOY)
    assert (code, "needs MASTER_ADDR" in output) == (2, True), output

"""Start real runs of the toy configuration through the launch scripts, watch them, and read what they leave."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support.spawn import clean_environment

LAUNCHERS = ["torchrun.sh", pytest.param("mpirun.sh", marks=pytest.mark.mpi)]
ROOT = Path(__file__).resolve().parents[2]
TOY = "launch/configs/toy.toml"
SHORT = ["--set", "lanczos.probes=1", "--set", "lanczos.steps=4", "--set", "run.report=false"]
LONG = [*SHORT, "--set", "lanczos.steps=500", "--set", "lanczos.reorthogonalise=2"]


def environment(**variables: str) -> dict[str, str]:
    """The tests' environment, one thread a rank, and nothing that a launcher around the tests has set."""
    return {**clean_environment(), "OMP_NUM_THREADS": "1", **variables}


def launch(script: str, *arguments: str | Path, **variables: str) -> subprocess.Popen[str]:
    """Start ``bash launch/SCRIPT ARGUMENTS`` at the repository root, in a process group of its own."""
    command = ["bash", f"launch/{script}", *map(str, arguments)]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment(**variables),
        text=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


@contextmanager
def running(*args: str | Path, **variables: str) -> Iterator[subprocess.Popen[str]]:
    """``launch`` whose processes, ranks included, are ended with the block."""
    process = launch(*args, **variables)  # type: ignore[arg-type]
    try:
        yield process
    finally:
        for each in [*psutil.Process(process.pid).children(recursive=True), process] if process.poll() is None else []:
            each.kill()
        process.communicate()


def finish(process: subprocess.Popen[str], timeout_s: float = 240) -> tuple[int, str]:
    """Return (exit code, everything it printed)."""
    output, _ = process.communicate(timeout=timeout_s)
    return process.returncode, output


def complete(*args: str | Path, timeout_s: float = 240, **variables: str) -> tuple[int, str]:
    """Launch, wait, return (exit code, everything it printed)."""
    with running(*args, **variables) as process:
        return finish(process, timeout_s)


def result(out: Path) -> dict[str, Any]:
    return json.loads((out / "result.json").read_text())


def steps_done(out: Path) -> int:
    """How many steps the run has logged."""
    try:
        lines = (out / "events.jsonl").read_text().splitlines()
    except FileNotFoundError:
        return 0
    return sum('"step"' in line and '"hvp_s"' in line for line in lines)


def wait_until(condition: Callable[[], Any], what: str, timeout_s: float = 180) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what}"
        time.sleep(0.2)


def find_rank(rank: int, out: Path) -> psutil.Process:
    """The process of one rank of the run that writes to ``out``, whatever launched it."""
    keys = ("RANK", "OMPI_COMM_WORLD_RANK", "SLURM_PROCID")
    for process in psutil.process_iter():
        try:
            command = process.cmdline()
            if f"run.out={out}" not in command or "hpc_hess" not in command[2:4]:  # python [-u] -m hpc_hess ...
                continue
            environ = process.environ()
        except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            continue
        if next((environ[key] for key in keys if key in environ), None) == str(rank):
            return process
    raise AssertionError(f"no process of rank {rank} writes to {out}")


def alive(out: Path) -> list[int]:
    """Process ids whose command line names ``out``: launcher and ranks."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.status() != psutil.STATUS_ZOMBIE and f"run.out={out}" in process.cmdline():
                found.append(process.pid)
        except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            continue
    return [pid for pid in found if pid != os.getpid()]

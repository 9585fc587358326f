"""A machine without what is Linux's: one process runs, goes on and finds the same numbers; ranks do without what is lost."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hpc_hess import system
from hpc_hess.parallel.orphan import find_launcher
from hpc_hess.parallel.shard_collectives import TorchCollectives
from hpc_hess.parallel.world import World
from tests.support.elsewhere import ROOT, SETTINGS, TOY, mask
from tests.support.launching import environment
from tests.support.spawn import run_ranks

pytestmark = pytest.mark.slow

NOTE = "not on Linux: disk space is neither reserved ahead nor given back row by row"


def _complete(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *command],
        cwd=ROOT,
        env=environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=500,
    )


def _numbers(out: Path) -> dict[str, Any]:
    result = json.loads((out / "result.json").read_text())
    return {key: result[key] for key in ("num_params", "loss", "probes", "trace", "lambda_min", "lambda_max", "eigenpairs")}


def test_one_process_runs_where_there_is_no_linux(tmp_path: Path) -> None:
    elsewhere = _complete("tests.support.elsewhere", str(tmp_path / "elsewhere"))
    assert elsewhere.returncode == 0, elsewhere.stderr
    assert elsewhere.stdout.count(NOTE) == 2, elsewhere.stdout  # once a start
    assert f"{NOTE}," not in elsewhere.stdout  # nothing of what matters to several ranks alone
    assert "stopped early" in elsewhere.stdout
    assert "report.html" in {path.name for path in (tmp_path / "elsewhere").iterdir()}
    denied = elsewhere.stderr.splitlines()[-1].split()
    assert {"fallocate", "malloc_trim", "mallopt", "/proc/cpuinfo", "/proc/self/cgroup"} <= set(denied)
    settings = [*SETTINGS, "run.report=false", f"run.out={tmp_path / 'here'}"]
    here = _complete("hpc_hess", "run", TOY, *(word for setting in settings for word in ("--set", setting)))
    assert here.returncode == 0, here.stderr
    assert "not on Linux" not in here.stdout
    assert _numbers(tmp_path / "elsewhere") == _numbers(tmp_path / "here")


def _as_rank(world: World) -> tuple[bool, str, bool]:
    mask()
    world.make_mesh()
    launcher = find_launcher({"TORCHELASTIC_RUN_ID": "x"})
    return isinstance(world.collectives, TorchCollectives), system.missing(world.size), launcher is None


def test_ranks_do_without() -> None:
    note = f"{NOTE}, ranks exchange parameters through sockets, ranks do not see that their launcher has ended"
    assert run_ranks(_as_rank, 2) == [(True, note, True)] * 2


def test_nothing_is_missing_here() -> None:
    assert sys.platform != "linux" or system.missing(2) == ""

"""Processes of a benchmark: any command, the program, or a function of a benchmark on ranks of its own."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

from benchmarks.tables import ROOT

Launcher = Literal["torchrun", "mpirun"]
_LAUNCH: dict[str, Callable[[int], list[str]]] = {
    "torchrun": lambda n: [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n}"],
    "mpirun": lambda n: [
        "mpirun",
        "--quiet",
        "--allow-run-as-root",
        "--oversubscribe",
        "--bind-to",
        "none",
        "-n",
        str(n),
        sys.executable,
    ],
}


class FailedError(RuntimeError):
    """A command that ended with an error; ``why`` is the last line that it said."""

    def __init__(self, done: subprocess.CompletedProcess[str]) -> None:
        super().__init__(f"{' '.join(done.args)} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
        self.why = (done.stderr.strip().splitlines() or [f"code {done.returncode}"])[-1]


def run(*words: Any, threads: int | None = None, **variables: str) -> str:
    """Run a command at the root; return what it printed. ``threads``: all cores where None. Raises FailedError."""
    count = str(threads or os.cpu_count() or 1)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": count, **variables}
    done = subprocess.run(list(map(str, words)), cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise FailedError(done)
    return done.stdout


def module(*words: Any, ranks: int = 1, launcher: Launcher | None = None, threads: int | None = None) -> str:
    """Run ``python -m WORDS``, under a launcher where there are several ranks, which share the cores. Raises FailedError."""
    launcher = launcher or ("torchrun" if ranks > 1 else None)
    start = _LAUNCH[launcher](ranks) if launcher else [sys.executable]
    return run(*start, "-m", *words, threads=threads or max(1, (os.cpu_count() or 1) // ranks))


def program(*words: Any, ranks: int = 1, threads: int | None = None) -> str:
    """Run ``hpc_hess WORDS``. Raises FailedError."""
    return module("hpc_hess", *words, ranks=ranks, threads=threads)


def apart(
    function: Callable[..., Any],
    *arguments: Any,
    ranks: int = 1,
    launcher: Launcher | None = None,
    threads: int | None = None,
) -> list[Any]:
    """Call a function of a benchmark on ranks of their own; return what each returns. All is JSON. Raises FailedError."""
    with tempfile.TemporaryDirectory() as folder:
        name = Path(inspect.getfile(function)).stem
        module(
            "benchmarks.processes",
            name,
            function.__name__,
            json.dumps(arguments),
            folder,
            ranks=ranks,
            launcher=launcher,
            threads=threads,
        )
        return [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(ranks)]


def _called(name: str, function: str, arguments: str, folder: str) -> None:
    """Be one of those ranks."""
    value = getattr(importlib.import_module(f"benchmarks.{name}"), function)(*json.loads(arguments))
    rank = next((os.environ[key] for key in ("RANK", "OMPI_COMM_WORLD_RANK") if key in os.environ), "0")
    (Path(folder) / f"{rank}.json").write_text(json.dumps(value))


def run_program(
    config: dict[str, Any], ranks: int = 1, *, threads: int | None = None, keep: Path | None = None
) -> dict[str, Any]:
    """Run ``hpc_hess run`` in a directory of its own; return result.json with the events added. Raises FailedError.

    ``keep``: a directory for a copy of the figures.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        with written({**config, "run": {**config.get("run", {}), "out": str(out)}}) as path:
            program("run", path, ranks=ranks, threads=threads)
        if keep is not None:
            shutil.copytree(out / "figures", keep / "figures")
        return with_events(out / "result.json")


@contextlib.contextmanager
def written(config: dict[str, Any]) -> Iterator[Path]:
    """Give the file of a configuration."""
    import tomli_w

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.toml"
        path.write_text(tomli_w.dumps(config))
        yield path


def with_events(path: Path) -> dict[str, Any]:
    """Return a result.json with the events that lie beside it."""
    events = [json.loads(line) for line in path.with_name("events.jsonl").read_text().splitlines()]
    return {**json.loads(path.read_text()), "events": events}


if __name__ == "__main__":
    _called(*sys.argv[1:])

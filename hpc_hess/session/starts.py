"""Starts that stopped early without getting anywhere: the third in a row gives up, or a queue would repeat it for ever.

Exit code 75 asks a batch script to put the job back. Once or twice a job may be preempted before its first step.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

from hpc_hess.errors import ConfigError, StoreError
from hpc_hess.parallel.world import World
from hpc_hess.storage.agree import attempt
from hpc_hess.storage.commit import newest
from hpc_hess.storage.run_files import write_aside
from hpc_hess.storage.schema import FILE, read_header

NAME = "starts.json"  # in the run directory: how many starts in a row made no progress
_MOST = 3


def clear_starts(world: World, out: Path) -> None:
    """Forget starts without progress: something was computed. Collective: yes."""
    with attempt(world, out / NAME, "count starts"):
        if world.rank == 0:
            (out / NAME).unlink(missing_ok=True)


def note_stop(world: World, out: Path, reason: str, *, progressed: bool) -> None:
    """Count a start that stops early for ``reason``. Collective: yes; rank 0's ``progressed`` counts.

    Raises
    ------
    ConfigError : it is the third in a row that has computed nothing that the next one could go on from.

    """
    if world.broadcast(progressed, "was there progress?"):
        clear_starts(world, out)
        return
    count = 1
    with attempt(world, out / NAME, "count starts"):
        if world.rank == 0:
            with contextlib.suppress(FileNotFoundError, ValueError, KeyError, TypeError):
                count += int(json.loads((out / NAME).read_text(encoding="utf-8"))["without_progress"])
            write_aside(out / NAME, json.dumps({"without_progress": count}) + "\n")
    if world.broadcast(count, "starts without progress") < _MOST:
        return
    clear_starts(world, out)  # whoever starts it again has as many tries
    error = ConfigError(
        f"{_MOST} starts in a row have stopped before anything was kept that the next one could go on from ({reason}): "
        "give the run more time (run.time_limit, the job's own limit), more ranks, or, where it is a single product that "
        "takes too long, set store.checkpoint_every"
    )
    world.raise_together(error if world.rank == 0 else None, "stop")


def progress_mark(out: Path, steps: int) -> list[Any]:
    """Return what changes whenever a run keeps something to go on from; ``steps`` of the quadrature. Local, rank 0."""
    stores = [out / "eigenpairs", out / "product", *sorted(out.glob("studies/*/pieces"))]
    mark: list[Any] = [steps, [str(path) for path in sorted(out.glob("studies/*/found.json"))]]
    for folder in stores:
        with contextlib.suppress(StoreError, OSError):
            header = read_header(folder / FILE)
            mark.append([str(folder), newest(header.schema.slots, header.ledger, folder / FILE).sequence])
    return mark

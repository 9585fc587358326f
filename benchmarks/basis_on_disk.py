"""A basis on disk against one in memory: SmolLM2-135M, fully reorthogonalised steps, under a memory limit.

The run from disk is put into a memory control group that leaves no room to cache the basis: its limit is what runs in
memory took at most without their bases (the calibration of the first step, which a run of two steps shows, takes more
than products), the panels and the newest row, and ``--room``. Needs root and version 1 or 2 of control groups.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

from benchmarks.frame import Table, benchmark
from benchmarks.processes import run_program
from hpc_hess.parallel.basis import PANEL_BYTES

_ROOT = Path("/sys/fs/cgroup")


@contextmanager
def limited(limit_bytes: int) -> Iterator[Path]:
    """Put this process, and what it starts, into a group that may use ``limit_bytes``; yields the group."""
    first = (_ROOT / "memory" / "memory.limit_in_bytes").exists()
    top, name = (_ROOT / "memory", "memory.limit_in_bytes") if first else (_ROOT, "memory.max")
    lines = (line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines())
    own = top / next(p.lstrip("/") for n, c, p in lines if (c == "memory" if first else n == "0"))
    group = top / f"hpc_hess_{os.getpid()}"
    group.mkdir()
    try:
        (group / name).write_text(str(limit_bytes))
        (group / "cgroup.procs").write_text(str(os.getpid()))
        yield group
    finally:
        (own / "cgroup.procs").write_text(str(os.getpid()))
        group.rmdir()


def seconds_of_steps(result: dict[str, Any]) -> list[float]:
    """Return what each step took, product, orthogonalisation and checkpoint."""
    steps = [event for event in result["events"] if event["event"] == "step"]
    return [sum(event[f"{part}_s"] for part in ("hvp", "lanczos", "checkpoint")) for event in steps]


@benchmark(
    "A Krylov basis on disk, SmolLM2-135M", asked={"disk / memory": "<= 2", "basis memory of the run from disk, GB": "< 1.5"}
)
def main(
    table: Table,
    steps: int = 20,
    sequences: int = 16,
    micro_batch: int = 4,
    room: Annotated[float, "GB beside what the run from disk must hold"] = 1.5,
) -> None:
    table.settings |= {"ranks": 1, "tokens of a sequence": 128, "reorthogonalise": "full"}
    config: dict[str, Any] = {
        "data": {"sequences": sequences, "sequence_length": 128, "micro_batch": micro_batch},
        "lanczos": {"steps": steps, "basis_memory": "host"},
        "operator": {"check": False},
    }
    short = run_program({**config, "lanczos": {**config["lanczos"], "steps": 2}})
    memory = run_program(config)
    row_bytes = 4 * memory["num_params"]
    held = min(steps * row_bytes, 2 * PANEL_BYTES) + row_bytes
    least = max(run["memory"]["peak_bytes"] - rows * row_bytes for run, rows in ((short, 2), (memory, steps)))
    limit = int(least + held + room * 1e9)
    config["lanczos"]["basis_memory"] = "disk"
    with limited(limit):
        disk = run_program(config)
    same = [p["alpha"] for p in memory["probes"]] == [p["alpha"] for p in disk["probes"]]
    step_s = {"memory": seconds_of_steps(memory), "disk": seconds_of_steps(disk)}
    table.measured(f"{steps} steps, basis in memory, s", sum(step_s["memory"]))
    table.measured(f"{steps} steps, basis on disk, s", sum(step_s["disk"]))
    table.measured("disk / memory", sum(step_s["disk"]) / sum(step_s["memory"]))
    table.measured("last step, disk / memory", step_s["disk"][-1] / step_s["memory"][-1])
    table.measured("memory limit of the run from disk, GB", limit / 1e9)
    table.measured("basis, GB", steps * row_bytes / 1e9)
    table.measured("basis memory of the run from disk, GB", held / 1e9)
    table.measured("peak RSS, disk - memory, GB", (disk["memory"]["peak_bytes"] - memory["memory"]["peak_bytes"]) / 1e9)
    table.measured("alpha equal to the last bit", str(same))


if __name__ == "__main__":
    main()

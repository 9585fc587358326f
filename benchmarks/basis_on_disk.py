"""A basis on disk against one in memory: SmolLM2-135M, fully reorthogonalised steps, under a memory limit.

The run from disk is put into a memory control group that leaves no room to cache the basis: its limit is what runs in
memory took at most without their bases (the calibration of the first step, which a run of two steps shows, takes more
than products), the panels and the newest row, and ``--room``. Needs root and version 1 or 2 of control groups.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.common import run_program, write
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--micro-batch", type=int, default=4)
    parser.add_argument("--room", type=float, default=1.5, help="GB beside what the run from disk must hold")
    args = parser.parse_args()
    config: dict[str, Any] = {
        "data": {"sequences": args.sequences, "sequence_length": 128, "micro_batch": args.micro_batch},
        "lanczos": {"steps": args.steps, "basis_memory": "host"}, "operator": {"check": False},
    }  # fmt: skip
    short = run_program({**config, "lanczos": {**config["lanczos"], "steps": 2}})
    memory = run_program(config)
    row_bytes = 4 * memory["num_params"]
    held = min(args.steps * row_bytes, 2 * PANEL_BYTES) + row_bytes
    least = max(run["memory"]["peak_bytes"] - rows * row_bytes for run, rows in ((short, 2), (memory, args.steps)))
    limit = int(least + held + args.room * 1e9)
    config["lanczos"]["basis_memory"] = "disk"
    with limited(limit):
        disk = run_program(config)
    same = [p["alpha"] for p in memory["probes"]] == [p["alpha"] for p in disk["probes"]]
    step_s = {"memory": seconds_of_steps(memory), "disk": seconds_of_steps(disk)}
    rows = [
        {"what": f"{args.steps} steps, basis in memory, s", "asked": "", "measured": sum(step_s["memory"])},
        {"what": f"{args.steps} steps, basis on disk, s", "asked": "", "measured": sum(step_s["disk"])},
        {"what": "disk / memory", "asked": "<= 2", "measured": sum(step_s["disk"]) / sum(step_s["memory"])},
        {"what": "last step, disk / memory", "asked": "", "measured": step_s["disk"][-1] / step_s["memory"][-1]},
        {"what": "memory limit of the run from disk, GB", "asked": "", "measured": limit / 1e9},
        {"what": "basis, GB", "asked": "", "measured": args.steps * row_bytes / 1e9},
        {"what": "basis memory of the run from disk, GB", "asked": "< 1.5", "measured": held / 1e9},
        {"what": "peak RSS, disk - memory, GB", "asked": "",
         "measured": (disk["memory"]["peak_bytes"] - memory["memory"]["peak_bytes"]) / 1e9},
        {"what": "alpha equal to the last bit", "asked": "", "measured": str(same)},
    ]  # fmt: skip
    write("basis_on_disk", "A Krylov basis on disk, SmolLM2-135M", rows,
          {"ranks": 1, "steps": args.steps, "sequences": args.sequences, "sequence_length": 128,
           "micro_batch": args.micro_batch, "reorthogonalise": "full"})  # fmt: skip


if __name__ == "__main__":
    main()

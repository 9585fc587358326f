"""Bytes on disk of a run directory: while it runs at most, killed half way, cleaned, gone on with to its end, cleaned.

Allocated bytes, as ``du`` counts them. The run is the demo's, SmolLM2-135M on two ranks with rank files.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Annotated

from benchmarks.frame import Table, benchmark
from benchmarks.processes import program
from benchmarks.soak import started
from hpc_hess.storage.disk import allocated


def steps_done(out: Path) -> int:
    """Return how many steps the run has logged."""
    events = out / "events.jsonl"
    return events.read_text().count('"event": "step"') if events.exists() else 0


@benchmark(
    "Bytes that a run directory takes on the disk",
    note="Asked: under 100 MB after the demo. A killed run keeps the rows that it goes on from.",
)
def main(
    table: Table,
    config: str = "launch/configs/smollm2.toml",
    steps: int = 20,
    ranks: int = 2,
    folder: Annotated[Path | None, "where to write: a disk with room for the basis"] = None,
) -> None:
    with tempfile.TemporaryDirectory(dir=folder) as place:
        out, most = Path(place) / "run", 0
        settings = [config, f"lanczos.steps={steps}"]

        def measured(when: str, count: int | None = None) -> None:
            table.add({"when": when, "steps": steps_done(out), "MB": (allocated(out) if count is None else count) / 1e6})

        with started("torchrun.sh", settings, out, ranks) as process:
            while steps_done(out) < steps // 2:
                if process.poll() is not None:
                    raise SystemExit("the run ended before it could be killed: choose more --steps")
                time.sleep(0.05)
                most = max(most, allocated(out))
        time.sleep(3)  # the ranks of a killed job live a little longer
        measured("at most, while it runs", most)
        measured("killed half way")
        program("clean", out)
        measured("cleaned")
        with started("torchrun.sh", settings, out, ranks) as process:
            output, _ = process.communicate()
            assert process.returncode == 0, output
        measured("gone on with to its end")
        program("clean", out)
        measured("cleaned")


if __name__ == "__main__":
    main()

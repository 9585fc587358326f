"""A Lanczos step against an AdamW step of training: same model, same tokens, same ranks and threads. Time and memory.

The papers claim a modest constant factor over first-order training.
"""

from __future__ import annotations

import json
import resource
import statistics
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.frame import Table, benchmark
from benchmarks.processes import program, run_program

CONFIG = "launch/configs/smollm2.toml"
RUNS: dict[str, dict[str, Any]] = {
    "central, no reorthogonalisation": {"reorthogonalise": "none"},
    "central, full reorthogonalisation": {"reorthogonalise": "full"},
    "exact, full reorthogonalisation": {"reorthogonalise": "full"},
}


def train(data: dict[str, int], steps: int) -> tuple[float, int]:
    """Return the median seconds of an AdamW step and the peak resident bytes; nothing else was started before."""
    with tempfile.TemporaryDirectory() as folder:
        program(
            "finetune",
            CONFIG,
            *(f"--set=data.{key}={value}" for key, value in data.items()),
            "--steps",
            steps,
            "--batch",
            data["sequences"],
            "--optimizer",
            "adamw",
            "--out",
            folder,
        )
        lines = [json.loads(line) for line in (Path(folder) / "training.jsonl").read_text().splitlines()]
    seconds = [line["seconds"] for line in lines if "seconds" in line]
    return statistics.median(seconds[1:]), resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss << 10


@benchmark("A Lanczos step against a training step, SmolLM2-135M")
def main(table: Table, steps: int = 4, sequences: int = 16, length: int = 128, micro_batch: int = 4) -> None:
    table.settings["finite differences"] = "fixed step, calibration apart"
    data = {"sequences": sequences, "sequence_length": length, "micro_batch": micro_batch}
    adamw_s, adamw_bytes = train(data, steps)
    table.add({"step": "AdamW", "s": adamw_s, "of AdamW": 1.0, "peak GB": adamw_bytes / 1e9, "memory of AdamW": 1.0})
    for name, lanczos in RUNS.items():
        method = "exact" if name.startswith("exact") else "finite_difference"
        result = run_program(
            {
                "data": data,
                "lanczos": {"steps": steps, **lanczos},
                "operator": {"check": False, "step": 1e-3, "method": method},
            }
        )
        each = [e["hvp_s"] + e["lanczos_s"] + e["checkpoint_s"] for e in result["events"] if e["event"] == "step"]
        seconds, peak = statistics.median(each[1:]), result["memory"]["peak_bytes"]
        table.add(
            {
                "step": f"Lanczos: {name}",
                "s": seconds,
                "of AdamW": seconds / adamw_s,
                "peak GB": peak / 1e9,
                "memory of AdamW": peak / adamw_bytes,
            }
        )


if __name__ == "__main__":
    main()

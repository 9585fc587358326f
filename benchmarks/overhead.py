"""A Lanczos step against an AdamW step of training: same model, same tokens, same ranks and threads. Time and memory.

The papers claim a modest constant factor over first-order training.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT, run_program, write

CONFIG = "launch/configs/smollm2.toml"
RUNS: dict[str, dict[str, Any]] = {
    "central, no reorthogonalisation": {"reorthogonalise": "none"},
    "central, full reorthogonalisation": {"reorthogonalise": "full"},
    "exact, full reorthogonalisation": {"reorthogonalise": "full"},
}


def train(args: argparse.Namespace) -> tuple[float, int]:
    """Return the median seconds of an AdamW step and the peak resident bytes; nothing else was started before."""
    with tempfile.TemporaryDirectory() as folder:
        data = {"sequences": args.sequences, "sequence_length": args.length, "micro_batch": args.micro_batch}
        subprocess.run(
            [sys.executable, "-m", "hpc_hess", "finetune", CONFIG, *(f"--set=data.{k}={v}" for k, v in data.items()),
             "--steps", str(args.steps), "--batch", str(args.sequences), "--optimizer", "adamw", "--out", folder],
            cwd=ROOT, check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": str(os.cpu_count())},
        )  # fmt: skip
        lines = [json.loads(line) for line in (Path(folder) / "training.jsonl").read_text().splitlines()]
    seconds = [line["seconds"] for line in lines if "seconds" in line]
    return statistics.median(seconds[1:]), resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss << 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--micro-batch", type=int, default=4)
    args = parser.parse_args()
    adamw_s, adamw_bytes = train(args)
    rows: list[dict[str, Any]] = [
        {"step": "AdamW", "s": adamw_s, "of AdamW": 1.0, "peak GB": adamw_bytes / 1e9, "memory of AdamW": 1.0}
    ]
    for name, lanczos in RUNS.items():
        result = run_program({
            "data": {"sequences": args.sequences, "sequence_length": args.length, "micro_batch": args.micro_batch},
            "lanczos": {"steps": args.steps, **lanczos},
            "operator": {"check": False, "step": 1e-3,
                         "method": "exact" if name.startswith("exact") else "finite_difference"},
        })  # fmt: skip
        steps = [e["hvp_s"] + e["lanczos_s"] + e["checkpoint_s"] for e in result["events"] if e["event"] == "step"]
        seconds, peak = statistics.median(steps[1:]), result["memory"]["peak_bytes"]
        rows.append({"step": f"Lanczos: {name}", "s": seconds, "of AdamW": seconds / adamw_s, "peak GB": peak / 1e9,
                     "memory of AdamW": peak / adamw_bytes})  # fmt: skip
    write("overhead", "A Lanczos step against a training step, SmolLM2-135M", rows,
          {"tokens": f"{args.sequences} x {args.length}", "micro-batch": args.micro_batch, "steps": args.steps,
           "finite differences": "fixed step, calibration apart"})  # fmt: skip


if __name__ == "__main__":
    main()

"""Seconds that the intake's checks take in the demo, SmolLM2-135M, and their share of the whole run. Two ranks.

Each rank wraps the functions that check, runs the program, and writes what they took; nested ones count once.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from functools import wraps
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT, write

# what is checked: the module and the name that callers use
CHECKS = {
    "first forward passes": [("session.problem", "try_forward")],
    "parameters spanned and reached": [
        ("session.problem", "spanned_finding"), ("studies.quadrature.loop", "reached_finding"),
    ],
    "fingerprint of the model": [("model.sources.source", "fingerprint")],
    "directory, own code": [("model.sources.source", name) for name in ("find_weight_files", "weight_like", "decide")],
    "tensors": [
        ("model.sources.checkpoint", name) for name in ("_check_types", "unused_findings", "_missing_buffers")
    ],
    "discrete choices": [("curvature.differences.finite_difference", "FiniteDifferenceHessian._look")],
}  # fmt: skip


def timed(config: str, overrides: list[str], report: Path) -> int:
    """Run the program on this rank with the checks timed; write seconds by check and of the whole."""
    from hpc_hess.cli import main as program

    began, seconds, inside = time.perf_counter(), defaultdict[str, float](float), [False]

    def watch(check: str, module: str, name: str) -> None:
        holder: Any = importlib.import_module(f"hpc_hess.{module}")
        *path, last = name.split(".")
        for part in path:
            holder = getattr(holder, part)
        function = getattr(holder, last)

        @wraps(function)
        def measured(*args: Any, **options: Any) -> Any:
            if inside[0]:
                return function(*args, **options)
            inside[0], start = True, time.perf_counter()
            try:
                return function(*args, **options)
            finally:
                seconds[check] += time.perf_counter() - start
                inside[0] = False

        setattr(holder, last, measured)

    for check, places in CHECKS.items():
        for module, name in places:
            watch(check, module, name)
    code = program(["run", config, *(f"--set={text}" for text in overrides)])
    rank = os.environ.get("RANK", "0")
    (report / f"{rank}.json").write_text(json.dumps({**seconds, "whole": time.perf_counter() - began}))
    return code


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="launch/configs/smollm2.toml")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--methods", nargs="+", default=["finite_difference"], help="or exact: thrice as long")
    parser.add_argument("--report", help="of a rank that this program has started")
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    args = parser.parse_args()
    if args.report:
        sys.exit(timed(args.config, args.overrides, Path(args.report)))
    rows = []
    for method in args.methods:
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run(
                [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={args.ranks}",
                 "-m", "benchmarks.intake_time", "--report", folder, "--config", args.config,
                 f"--set=run.out={folder}/run", f"--set=operator.method={method}",
                 *(f"--set={text}" for text in args.overrides)],
                cwd=ROOT, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
            )  # fmt: skip
            ranks = [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(args.ranks)]
        slowest = max(ranks, key=lambda found: sum(s for check, s in found.items() if check != "whole"))
        whole = slowest.pop("whole")
        spent = {**{check: slowest.get(check, 0.0) for check in CHECKS}, "all checks": sum(slowest.values())}
        rows += [{"method": method, "check": check, "s": s, "of the run": f"{100 * s / whole:.2f} %"}
                 for check, s in spent.items()]  # fmt: skip
        rows.append({"method": method, "check": "whole run", "s": whole, "of the run": "100 %"})
    write("intake_time", "What the intake adds to the demo's run", rows,
          {"config": args.config, "ranks": args.ranks, "threads": 1}, "Of the rank whose checks took longest.")  # fmt: skip


if __name__ == "__main__":
    main()

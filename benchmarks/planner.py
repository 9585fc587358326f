"""The planner against runs that happen here: SmolLM2-135M and random Llamas, 1 to 4 ranks, both operators.

Peak resident memory of a rank above what it has after the imports, against what was traced without running; and the seconds
of a product against the planner's, for this machine as ``hpc_hess scaling machine`` measures it with as many processes at a
time as the run has ranks.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.common import LLAMAS, ROOT, random_llama, run_program, write
from hpc_hess.config import make_config
from hpc_hess.planning.machine import Machine, seconds
from hpc_hess.planning.planner import trace

SHAPES = {f"Llama, {name}": LLAMAS[name] for name in ("9 M", "51 M", "347 M")}
SMOLLM2 = "SmolLM2-135M"


@contextlib.contextmanager
def model_of(name: str, length: int, sequences: int) -> Iterator[dict[str, Any]]:
    """Yield the sections [model] and [data] of a model."""
    if name == SMOLLM2:
        yield {"data": {"sequences": sequences, "sequence_length": length}}
    else:
        with random_llama(SHAPES[name], sequences, length) as config:
            yield config


def machine_of(ranks: int) -> Machine:
    """Measure this machine as one of so many ranks that work at a time sees it."""
    threads = str(max(1, (os.cpu_count() or 1) // ranks))
    with tempfile.TemporaryDirectory() as folder:
        files = [str(Path(folder) / f"{rank}.json") for rank in range(ranks)]
        measuring = [
            subprocess.Popen([sys.executable, "-m", "hpc_hess", "scaling", "machine", file], cwd=ROOT,
                             env={**os.environ, "OMP_NUM_THREADS": threads}, stdout=subprocess.DEVNULL)
            for file in files
        ]  # fmt: skip
        assert all(process.wait() == 0 for process in measuring)
        return Machine.read(files[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", metavar="MODEL:RANKS,RANKS", help=f"models: {', '.join([SMOLLM2, *SHAPES])}",
                        default=[f"{name}:1,2,3,4" for name in (SMOLLM2, *SHAPES)])  # fmt: skip
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--step", default="auto", help="of differences; a number saves calibrations, in memory too")
    args = parser.parse_args()
    step = args.step if args.step == "auto" else float(args.step)
    name_of_table = "planner" if step == "auto" else "planner_fixed_step"
    rows: list[dict[str, Any]] = []
    for name, _, counts in (case.partition(":") for case in args.cases):
        for method in ("finite_difference", "exact"):
            for ranks in map(int, counts.split(",")):
                with model_of(name, args.length, ranks) as config:
                    config |= {
                        "operator": {"method": method, "check": False, "step": step}, "lanczos": {"steps": 3},
                        "parallel": {"device": "cpu"}, "run": {"report": False},
                    }  # fmt: skip
                    traced = trace(make_config(config), ranks, ranks, gloo=True)
                    machine = machine_of(ranks)  # each time: its speed is another one an hour later
                    result = run_program(config, ranks)
                predicted = traced.peak.bytes + traced.rows * traced.row_bytes * traced.width
                measured = result["memory"]["peak_bytes"] - result["memory"]["baseline_bytes"]
                time = seconds(traced.product, machine, ranks, ranks).at(machine.share(method))
                product_s = result["timing"]["hvp_s"]
                rows.append({
                    "model": name, "operator": method.replace("_", " "), "ranks": ranks, "predicted, MB": predicted / 1e6,
                    "measured, MB": measured / 1e6, "predicted / measured": predicted / measured,
                    "product predicted, s": time.most, "product measured, s": product_s,
                    "time predicted / measured": time.most / product_s,
                })  # fmt: skip
                title = "Peak memory of a rank and seconds of a product: the planner against runs"
                settings = {"tokens of a rank": f"1 x {args.length}", "step of differences": step}
                command = "planner" if step == "auto" else f"planner --step {step}"
                write(name_of_table, title, rows, settings, command=command)  # after each run: an end by force keeps them


if __name__ == "__main__":
    main()

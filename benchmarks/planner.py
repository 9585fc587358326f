"""The planner against runs that happen here: SmolLM2-135M and random Llamas, 1 to 4 ranks, both operators.

Peak resident memory of a rank above what it has after the imports, against what was traced without running; and the seconds
of a product against the planner's, for this machine as ``hpc_hess scaling machine`` measures it with as many processes at a
time as the run has ranks.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

from benchmarks.frame import Option, Table, benchmark
from benchmarks.llamas import LLAMAS, random_llama
from benchmarks.processes import program, run_program
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
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(ranks) as pool:
        files = [str(Path(folder) / f"{rank}.json") for rank in range(ranks)]
        threads = max(1, (os.cpu_count() or 1) // ranks)
        list(pool.map(lambda file: program("scaling", "machine", file, threads=threads), files))
        return Machine.read(files[0])


@benchmark("Peak memory of a rank and seconds of a product: the planner against runs")
def main(
    table: Table,
    cases: Annotated[tuple[str, ...], Option(f"models: {', '.join([SMOLLM2, *SHAPES])}", metavar="MODEL:RANKS,RANKS")] = (
        *(f"{name}:1,2,3,4" for name in (SMOLLM2, *SHAPES)),
    ),
    length: int = 256,
    step: Annotated[str, "of differences; a number saves calibrations, in memory too"] = "auto",
) -> None:
    table.name = "planner" if step == "auto" else "planner_fixed_step"
    for name, _, counts in (case.partition(":") for case in cases):
        for method in ("finite_difference", "exact"):
            for ranks in map(int, counts.split(",")):
                with model_of(name, length, ranks) as config:
                    config |= {
                        "operator": {"method": method, "check": False, "step": step if step == "auto" else float(step)},
                        "lanczos": {"steps": 3},
                        "parallel": {"device": "cpu"},
                        "run": {"report": False},
                    }
                    traced = trace(make_config(config), ranks, ranks, gloo=True)
                    machine = machine_of(ranks)  # each time: its speed is another one an hour later
                    result = run_program(config, ranks)
                predicted = traced.peak.bytes + traced.rows * traced.row_bytes * traced.width
                measured = result["memory"]["peak_bytes"] - result["memory"]["baseline_bytes"]
                time = seconds(traced.product, machine, ranks, ranks).at(machine.share(method))
                product_s = result["timing"]["hvp_s"]
                table.add(
                    {
                        "model": name,
                        "operator": method.replace("_", " "),
                        "ranks": ranks,
                        "predicted, MB": predicted / 1e6,
                        "measured, MB": measured / 1e6,
                        "predicted / measured": predicted / measured,
                        "product predicted, s": time.most,
                        "product measured, s": product_s,
                        "time predicted / measured": time.most / product_s,
                    }
                )


if __name__ == "__main__":
    main()

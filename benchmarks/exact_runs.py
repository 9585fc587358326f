"""Whole runs on SmolLM2-135M, 2 x 128 tokens: exact products on 1 to 4 ranks, and against finite differences.

Three tables in one: alpha and beta of 10 exact steps on 1, 2, 3, 4 ranks; the extreme Ritz values of 30 steps with
central differences and with exact products; the peak memory of a rank with each, without a Krylov basis to hide it.
"""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np

from benchmarks.frame import Table, benchmark
from benchmarks.processes import run_program

DATA = {"source": "text:launch/data/gpl-3.txt", "sequence_length": 128, "sequences": 2}


def run(method: str, steps: int, ranks: int, **lanczos: Any) -> dict[str, Any]:
    config = {"data": DATA, "lanczos": {"steps": steps, **lanczos}, "operator": {"method": method, "check": False}}
    result = run_program(config, ranks)
    print(f"{method}, {steps} steps, {ranks} ranks: done", flush=True)
    return result


def recurrence(result: dict[str, Any]) -> np.ndarray:
    probe = result["probes"][0]
    return np.array([probe["alpha"], probe["beta"]])


@benchmark(
    "Runs with exact products on SmolLM2-135M, 2 x 128 tokens",
    asked={"exact fp32*": "<= 1e-5", "lambda_*": "<= 1 %", "peak memory*": "<= 1.3"},
)
def main(table: Table, ranks: Annotated[tuple[int, ...], "compared with one rank"] = (2, 3, 4)) -> None:
    table.settings |= {"data": DATA["source"], "compute": "float32", "reorthogonalise": "full"}
    one = recurrence(run("exact", 10, 1))
    for count in ranks:
        difference = float(np.abs(recurrence(run("exact", 10, count)) - one).max() / np.abs(one).max())
        table.measured(f"exact fp32, 10 steps: alpha and beta on {count} ranks against 1, of max|T|", difference)

    long = {method: run(method, 30, 1) for method in ("finite_difference", "exact")}
    for key in ("lambda_max", "lambda_min"):
        found, true = (long[method][key] for method in ("finite_difference", "exact"))
        table.measured(
            f"{key} of 30 steps: central {found:.6g}, exact {true:.6g}, relative difference",
            f"{100 * abs(found / true - 1):.2g} %",
        )

    peaks = {}
    for method in ("finite_difference", "exact"):
        memory = run(method, 3, 2, reorthogonalise="none")["memory"]
        peaks[method] = memory["peak_bytes"] - memory["baseline_bytes"]
    table.measured(
        "peak memory of a rank (2 ranks, 2 rows of basis), exact "
        f"{peaks['exact'] / 1e6:.0f} MB / central {peaks['finite_difference'] / 1e6:.0f} MB",
        peaks["exact"] / peaks["finite_difference"],
    )


if __name__ == "__main__":
    main()

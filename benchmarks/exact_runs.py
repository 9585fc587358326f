"""Whole runs on SmolLM2-135M, 2 x 128 tokens: exact products on 1 to 4 ranks, and against finite differences.

Three tables in one: alpha and beta of 10 exact steps on 1, 2, 3, 4 ranks; the extreme Ritz values of 30 steps with
central differences and with exact products; the peak memory of a rank with each, without a Krylov basis to hide it.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np

from benchmarks.common import run_program, write

DATA = {"source": "text:launch/data/gpl-3.txt", "sequence_length": 128, "sequences": 2}


def run(method: str, steps: int, ranks: int, **lanczos: Any) -> dict[str, Any]:
    config = {"data": DATA, "lanczos": {"steps": steps, **lanczos}, "operator": {"method": method, "check": False}}
    result = run_program(config, ranks)
    print(f"{method}, {steps} steps, {ranks} ranks: done", flush=True)
    return result


def recurrence(result: dict[str, Any]) -> np.ndarray:
    probe = result["probes"][0]
    return np.array([probe["alpha"], probe["beta"]])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 3, 4], help="compared with one rank")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []

    one = recurrence(run("exact", 10, 1))
    for ranks in args.ranks:
        difference = float(np.abs(recurrence(run("exact", 10, ranks)) - one).max() / np.abs(one).max())
        rows.append({"what": f"exact fp32, 10 steps: alpha and beta on {ranks} ranks against 1, of max|T|",
                     "asked": "<= 1e-5", "measured": difference})  # fmt: skip

    long = {method: run(method, 30, 1) for method in ("finite_difference", "exact")}
    for key in ("lambda_max", "lambda_min"):
        found, true = (long[method][key] for method in ("finite_difference", "exact"))
        rows.append({"what": f"{key} of 30 steps: central {found:.6g}, exact {true:.6g}, relative difference",
                     "asked": "<= 1 %", "measured": f"{100 * abs(found / true - 1):.2g} %"})  # fmt: skip

    peaks = {}
    for method in ("finite_difference", "exact"):
        memory = run(method, 3, 2, reorthogonalise="none")["memory"]
        peaks[method] = memory["peak_bytes"] - memory["baseline_bytes"]
    rows.append({"what": "peak memory of a rank (2 ranks, 2 rows of basis), exact "
                         f"{peaks['exact'] / 1e6:.0f} MB / central {peaks['finite_difference'] / 1e6:.0f} MB",
                 "asked": "<= 1.3", "measured": peaks["exact"] / peaks["finite_difference"]})  # fmt: skip
    write("exact_runs", "Runs with exact products on SmolLM2-135M, 2 x 128 tokens", rows,
          {"data": DATA["source"], "compute": "float32", "reorthogonalise": "full"})  # fmt: skip


if __name__ == "__main__":
    main()

"""Seconds that the intake's checks take in the demo, SmolLM2-135M, and their share of the whole run. Two ranks.

Each rank wraps the functions that check, runs the program, and writes what they took; nested ones count once.
"""

from __future__ import annotations

import importlib
import tempfile
import time
from collections import defaultdict
from functools import wraps
from typing import Annotated, Any

from benchmarks.frame import Option, Table, benchmark
from benchmarks.processes import apart

# what is checked: the module and the name that callers use
CHECKS = {
    "first forward passes": [("session.problem", "try_forward")],
    "parameters spanned and reached": [
        ("session.problem", "spanned_finding"),
        ("studies.quadrature.loop", "reached_finding"),
    ],
    "fingerprint of the model": [("model.sources.source", "fingerprint")],
    "directory, own code": [("model.sources.source", name) for name in ("find_weight_files", "weight_like", "decide")],
    "tensors": [("model.sources.checkpoint", name) for name in ("_check_types", "unused_findings", "_missing_buffers")],
    "discrete choices": [("curvature.differences.finite_difference", "FiniteDifferenceHessian._look")],
}


def timed(words: list[str]) -> dict[str, float]:
    """Run the program on this rank with the checks timed; return seconds by check, and of the whole."""
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
    assert program(words) == 0
    return {**seconds, "whole": time.perf_counter() - began}


@benchmark("What the intake adds to the demo's run", note="Of the rank whose checks took longest.")
def main(
    table: Table,
    config: str = "launch/configs/smollm2.toml",
    ranks: int = 2,
    methods: Annotated[tuple[str, ...], "or exact: thrice as long"] = ("finite_difference",),
    overrides: Annotated[tuple[str, ...], Option("of the configuration", flag="--set", metavar="KEY=VALUE")] = (),
) -> None:
    table.settings["threads"] = 1
    for method in methods:
        with tempfile.TemporaryDirectory() as folder:
            settings = [f"run.out={folder}/run", f"operator.method={method}", *overrides]
            found = apart(timed, ["run", config, *(f"--set={text}" for text in settings)], ranks=ranks, threads=1)
        slowest = max(found, key=lambda seconds: sum(s for check, s in seconds.items() if check != "whole"))
        whole = slowest.pop("whole")
        spent = {**{check: slowest.get(check, 0.0) for check in CHECKS}, "all checks": sum(slowest.values())}
        for check, s in spent.items():
            table.add({"method": method, "check": check, "s": s, "of the run": f"{100 * s / whole:.2f} %"})
        table.add({"method": method, "check": "whole run", "s": whole, "of the run": "100 %"})


if __name__ == "__main__":
    main()

"""A whole quadrature of SmolLM2-135M, four probes of 20 steps: exact products in lock-step against central differences.

The time is that of all steps, with calibration of the differences and with compiling.
Each row is a run of the program. Nothing is compiled before the first exact run; the second finds its programs on disk.
No Krylov basis is kept, since four of them in lock-step would not fit in the memory of a small machine.
"""

from __future__ import annotations

import tempfile
from typing import Any

from benchmarks.frame import Table, benchmark
from benchmarks.processes import run_program


def quadrature(method: str, probes: int, steps: int, **operator: Any) -> dict[str, Any]:
    """Return result.json of a run."""
    return run_program(
        {
            "data": {"source": "text:launch/data/gpl-3.txt", "sequence_length": 128, "sequences": 2, "micro_batch": 2},
            "lanczos": {"probes": probes, "steps": steps, "reorthogonalise": "none"},
            "operator": {"method": method, "check": False, **operator},
        }
    )


@benchmark("A quadrature of four probes on SmolLM2-135M, 2 x 128 tokens", asked="exact no slower than central")
def main(table: Table, probes: int = 4, steps: int = 20) -> None:
    table.settings |= {"probes": probes, "steps": steps, "dtype": "float32", "reorthogonalise": "none"}
    with tempfile.TemporaryDirectory() as programs:
        rows = {
            "central differences": ("finite_difference", {}),
            "exact in lock-step, compiled on the way": ("exact", {"programs": programs}),
            "exact in lock-step, programs on disk": ("exact", {"programs": programs, "compile": "on"}),
            "exact in lock-step, not compiled": ("exact", {"compile": "off"}),
        }
        for name, (method, operator) in rows.items():
            result = quadrature(method, probes, steps, **operator)
            times = [event["time"] for event in result["events"] if event["event"] in ("start", "step")]
            table.add(
                {
                    "products": name,
                    "from the first to the last step, s": times[-1] - times[0],
                    "lambda_max": result["lambda_max"],
                }
            )


if __name__ == "__main__":
    main()

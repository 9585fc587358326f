"""The exact Hessian of one row of a query weight of SmolLM2-135M (Ilin 2025 looks at such rows of OPT and Llama)."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from benchmarks.frame import Table, benchmark
from benchmarks.processes import run_program

ENTRIES = "model.layers.{}.self_attn.q_proj.weight[0, :]"


@benchmark("Exact Hessian of a row of a query weight, SmolLM2-135M", note="![Matrix](sub_block.png)")
def main(table: Table, layers: tuple[int, ...] = (0,), tokens: int = 64, columns: int = 8) -> None:
    chosen = [ENTRIES.format(layer) for layer in layers]
    table.settings["rows"] = ", ".join(chosen)
    with tempfile.TemporaryDirectory() as folder:
        result = run_program(
            {
                "data": {"sequences": 1, "sequence_length": tokens},
                "lanczos": {"steps": 1},
                "operator": {"method": "exact"},
                "parameters": {"include": sorted({text.partition("[")[0] for text in chosen})},
                "analysis": {"sub_block": chosen, "columns": columns},
            },
            keep=Path(folder),
        )
        table.folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(Path(folder) / "figures" / "sub_block.png", table.folder / "sub_block.png")
    found = result["studies"]["sub_block"]
    table.measured("entries", found["entries"])
    table.measured("share of the diagonal in the squared Frobenius norm", found["diagonal_share"])
    table.measured("median off-diagonal over median diagonal entry", found["median_ratio"])
    table.measured("largest eigenvalue", found["lambda_max"])
    table.measured("smallest eigenvalue", found["lambda_min"])
    table.measured("asymmetry of the products", found["asymmetry"])
    for count, error in zip(found["samples"], found["diagonal_errors"], strict=True):
        if count in (10, 100, 1000):
            table.measured(f"Hutchinson's diagonal, {count} samples: relative error", error)


if __name__ == "__main__":
    main()

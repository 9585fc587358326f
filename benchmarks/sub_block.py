"""The exact Hessian of one row of a query weight of SmolLM2-135M (Ilin 2025 looks at such rows of OPT and Llama)."""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path

from benchmarks.common import RESULTS, run_program, write

ENTRIES = "model.layers.{}.self_attn.q_proj.weight[0, :]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, nargs="+", default=[0])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--columns", type=int, default=8)
    args = parser.parse_args()
    chosen = [ENTRIES.format(layer) for layer in args.layers]
    with tempfile.TemporaryDirectory() as folder:
        result = run_program(
            {
                "data": {"sequences": 1, "sequence_length": args.tokens}, "lanczos": {"steps": 1},
                "operator": {"method": "exact"},
                "parameters": {"include": sorted({text.partition("[")[0] for text in chosen})},
                "analysis": {"sub_block": chosen, "columns": args.columns},
            },
            keep=Path(folder),
        )  # fmt: skip
        shutil.copy(Path(folder) / "figures" / "sub_block.png", RESULTS / "sub_block.png")
    found = result["studies"]["sub_block"]
    rows = [
        {"what": "entries", "measured": found["entries"]},
        {"what": "share of the diagonal in the squared Frobenius norm", "measured": found["diagonal_share"]},
        {"what": "median off-diagonal over median diagonal entry", "measured": found["median_ratio"]},
        {"what": "largest eigenvalue", "measured": found["lambda_max"]},
        {"what": "smallest eigenvalue", "measured": found["lambda_min"]},
        {"what": "asymmetry of the products", "measured": found["asymmetry"]},
        *({"what": f"Hutchinson's diagonal, {n} samples: relative error", "measured": error}
          for n, error in zip(found["samples"], found["diagonal_errors"], strict=True) if n in (10, 100, 1000)),
    ]  # fmt: skip
    write("sub_block", "Exact Hessian of a row of a query weight, SmolLM2-135M", rows,
          {"rows": ", ".join(chosen), "tokens": args.tokens, "columns at a time": args.columns},
          "![Matrix](sub_block.png)")  # fmt: skip


if __name__ == "__main__":
    main()

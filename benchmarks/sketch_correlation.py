"""Scores from sketched gradients of SmolLM2-135M against scores from whole ones, by kind and dimension, and by layer.

By ``hpc_hess sketch-check``, which goes on where it was stopped (``--out``). Schioppa 2024, tables 1 and 6.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks import tables
from benchmarks.frame import Table, benchmark
from benchmarks.processes import program
from hpc_hess.sketch.comparison import bits_for

PAPER = {"affd": (10, 12, 13), "afjl": (12, 13, 15), "qk": (14, 16, 17), "fjl": (10, 12, 13), "ffd": (10, 12, 14)}
WANTED = (0.95, 0.98, 0.99)


@benchmark("Sketched against whole gradients of SmolLM2-135M")
def main(
    table: Table,
    kinds: tuple[str, ...] = ("affd", "afjl", "qk"),
    bits: tuple[int, ...] = (8, 9, 10, 11, 12, 13, 14, 15, 16, 17),
    queries: int = 16,
    examples: int = 48,
    length: int = 64,
    out: Path = tables.ROOT / "runs" / "sketch_correlation",
) -> None:
    program(
        "sketch-check",
        "launch/configs/smollm2.toml",
        "--queries",
        queries,
        "--kinds",
        *kinds,
        "--bits",
        *bits,
        "--set",
        f"run.out={out}",
        "--set",
        f"data.sequences={queries + examples}",
        "--set",
        f"data.sequence_length={length}",
    )
    found = json.loads((out / "sketch_check.json").read_text())["found"]
    table.settings |= {"pairs": found["pairs"], "seed": 0, "seconds of a gradient": f"{found['gradient_s']:.2g}"}
    layers = [{"layer": name, "r": r} for name, r in found["layers"].items() if r is not None]
    table.note = "Scores from single layers alone (the paper's table 1):\n\n" + tables.table(layers)
    for kind in kinds:
        r = {s["bits"]: s["r"] for s in found["sketches"] if s["kind"] == kind}
        row: dict[str, Any] = {"sketch": kind}
        for wanted, paper in zip(WANTED, PAPER[kind], strict=True):
            least = bits_for(r, wanted)
            row[f"log2 D for r > {wanted}"] = "none" if least is None else least
            row[f"paper, {wanted}"] = paper
        table.add(row | {f"r at {each}": r[each] for each in bits})


if __name__ == "__main__":
    main()

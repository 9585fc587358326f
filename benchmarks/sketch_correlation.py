"""Scores from sketched gradients of SmolLM2-135M against scores from whole ones, by kind and dimension, and by layer.

By ``hpc_hess sketch-check``, which goes on where it was stopped (``--out``). Schioppa 2024, tables 1 and 6.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT, table, write
from hpc_hess.sketch.comparison import bits_for

PAPER = {"affd": (10, 12, 13), "afjl": (12, 13, 15), "qk": (14, 16, 17), "fjl": (10, 12, 13), "ffd": (10, 12, 14)}
WANTED = (0.95, 0.98, 0.99)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", default=["affd", "afjl", "qk"])
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 9, 10, 11, 12, 13, 14, 15, 16, 17])
    parser.add_argument("--queries", type=int, default=16)
    parser.add_argument("--examples", type=int, default=48)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "sketch_correlation")
    args = parser.parse_args()
    command = [
        sys.executable, "-m", "hpc_hess", "sketch-check", "launch/configs/smollm2.toml", "--queries", str(args.queries),
        "--kinds", *args.kinds, "--bits", *map(str, args.bits), "--set", f"run.out={args.out}",
        "--set", f"data.sequences={args.queries + args.examples}", "--set", f"data.sequence_length={args.length}",
    ]  # fmt: skip
    subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True)
    found = json.loads((args.out / "sketch_check.json").read_text())["found"]
    rows: list[dict[str, Any]] = []
    for kind in args.kinds:
        r = {s["bits"]: s["r"] for s in found["sketches"] if s["kind"] == kind}
        row: dict[str, Any] = {"sketch": kind}
        for wanted, paper in zip(WANTED, PAPER[kind], strict=True):
            least = bits_for(r, wanted)
            row[f"log2 D for r > {wanted}"] = "none" if least is None else least
            row[f"paper, {wanted}"] = paper
        rows.append(row | {f"r at {bits}": r[bits] for bits in args.bits})
    layers = [{"layer": name, "r": r} for name, r in found["layers"].items() if r is not None]
    settings = {"pairs": found["pairs"], "tokens": args.length, "queries": args.queries, "seed": 0,
                "seconds of a gradient": f"{found['gradient_s']:.2g}"}  # fmt: skip
    note = "Scores from single layers alone (the paper's table 1):\n\n" + table(layers)
    write("sketch_correlation", "Sketched against whole gradients of SmolLM2-135M", rows, settings, note)


if __name__ == "__main__":
    main()

"""Intrinsic dimension of a small task over seeds and sketches: handwritten digits as sequences of pixels and a label.

scikit-learn's digits, 64 pixels of 17 shades and the label, as tokens; a random Llama of 86,336 parameters is trained from
its initial weights. By ``hpc_hess intrinsic-dimension``. Schioppa 2024, table 10: D* is stable over seeds.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import ROOT, write
from hpc_hess.commands.intrinsic_dimension.rule import spread_in_bits

SHADES = 17
SHAPE = {
    "vocab_size": 32, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 4, "max_position_embeddings": 96, "tie_word_embeddings": False, "bos_token_id": 30,
    "eos_token_id": 31,
}  # fmt: skip


def digits(path: Path, rows: int) -> None:
    """Write ``rows`` images, each 64 pixels (ids 0 to 16, moved by 3) and its label (ids 20 to 29): 65 tokens."""
    from sklearn.datasets import load_digits

    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))[:rows]
    tokens = np.concatenate([data.data[order].astype(np.int64) + 3, data.target[order, None] + 20], axis=1)
    np.save(path, tokens)


def search(
    folder: Path, kind: str, seed: int, args: argparse.Namespace, target: float | None
) -> tuple[dict[str, Any], float]:
    """Search with one sketch, for ``target`` or for the share of ordinary training's gain; return (row, target)."""
    out = folder / f"{kind}-{seed}"
    command = [
        sys.executable, "-m", "hpc_hess", "intrinsic-dimension", f"{folder}/config.toml", "--held-out", str(args.held_out),
        "--every", str(args.every), "--delta", str(args.delta), "--metric", "loss", "--learning-rate", str(args.rate),
        "--smallest", str(args.smallest), "--share", str(args.share), "--baseline-steps", "400", "--baseline-rate", "0.003",
        "--set", f"sketch.kind={kind}", "--set", f"sketch.seed={seed}", "--set", f"run.out={out}",
    ]  # fmt: skip
    if target is not None:
        command += ["--target", str(target)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with (folder / f"{kind}-{seed}.log").open("w") as log:
        subprocess.run(command, cwd=ROOT, env=environment, stdout=log, check=True)
    record = json.loads((out / "intrinsic_dimension.json").read_text())
    found = record["dimension"]
    row = {
        "sketch": kind, "seed": seed, "log2 D*": "none" if found is None else int(np.log2(found)),
        "steps": record["search"][-1][0], "reached": record["search"][-1][2],
        "at half": max((v for _, v in record["half"]), default=""), "half reaches it": record["half_reached"],
    }  # fmt: skip
    print(row, flush=True)
    if target is None:  # the first one's page
        page = out / "figures" / "intrinsic_dimension.png"
        (ROOT / "benchmarks" / "results" / "intrinsic_digits.png").write_bytes(page.read_bytes())
    return row, record["threshold"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", default=["affd", "ffd", "afjl", "qk"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=1792)
    parser.add_argument("--held-out", type=int, default=256)
    parser.add_argument("--every", type=int, default=50)
    parser.add_argument("--rate", type=float, default=1e-2)
    parser.add_argument("--share", type=float, default=0.8, help="of the gain of ordinary training")
    parser.add_argument("--smallest", type=int, default=128)
    parser.add_argument("--delta", type=float, default=0.02)
    args = parser.parse_args()
    from transformers import LlamaConfig

    with tempfile.TemporaryDirectory() as folder:
        LlamaConfig(**SHAPE, architectures=["LlamaForCausalLM"]).save_pretrained(folder)
        digits(Path(folder) / "digits.npy", args.rows)
        (Path(folder) / "config.toml").write_text(
            f'[model]\nsource = "{folder}/config.json"\n[data]\nsource = "tokens:{folder}/digits.npy"\nrows = "pad"\n'
            f"sequence_length = 65\nsequences = {args.rows}\nmicro_batch = 32\n"
        )
        cases = [(kind, seed) for kind in args.kinds for seed in range(args.seeds)]
        first, target = search(Path(folder), *cases[0], args, None)
        rows = [first]
        with ThreadPoolExecutor(os.cpu_count()) as pool:  # one thread each; the target is the same for all
            rows += [row for row, _ in pool.map(lambda case: search(Path(folder), *case, args, target), cases[1:])]
    spreads = []
    for kind in args.kinds:
        known = [1 << r["log2 D*"] for r in rows if r["sketch"] == kind and r["log2 D*"] != "none"]
        if known:
            spreads.append(f"{kind} {spread_in_bits(known):.0f}")
    settings = {"rows": args.rows, "held out": args.held_out, "every": args.every, "delta": args.delta, "rate": args.rate,
                "smallest": args.smallest, "share": args.share, "target (minus the loss)": f"{target:.4g}"}  # fmt: skip
    write("intrinsic_digits", "Intrinsic dimension of digits as token sequences", rows, settings,
          "Spread of log2 D* over seeds: " + ", ".join(spreads) + ". Paper (table 10, SNLI): at most 1.")  # fmt: skip


if __name__ == "__main__":
    main()

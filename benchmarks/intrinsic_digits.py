"""Intrinsic dimension of a small task over seeds and sketches: handwritten digits as sequences of pixels and a label.

scikit-learn's digits, 64 pixels of 17 shades and the label, as tokens; a random Llama of 86,336 parameters is trained from
its initial weights. By ``hpc_hess intrinsic-dimension``. Schioppa 2024, table 10: D* is stable over seeds.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from benchmarks.frame import Table, benchmark
from benchmarks.processes import program, written
from hpc_hess.commands.intrinsic_dimension.rule import spread_in_bits

SHADES = 17
SHAPE = {
    "vocab_size": 32,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 96,
    "tie_word_embeddings": False,
    "bos_token_id": 30,
    "eos_token_id": 31,
}


def digits(path: Path, rows: int) -> None:
    """Write ``rows`` images, each 64 pixels (ids 0 to 16, moved by 3) and its label (ids 20 to 29): 65 tokens."""
    from sklearn.datasets import load_digits

    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))[:rows]
    tokens = np.concatenate([data.data[order].astype(np.int64) + 3, data.target[order, None] + 20], axis=1)
    np.save(path, tokens)


def search(
    folder: Path, config: Path, kind: str, seed: int, args: argparse.Namespace, target: float | None
) -> tuple[dict[str, Any], float]:
    """Search with one sketch, for ``target`` or for the share of ordinary training's gain; return (row, target)."""
    out = folder / f"{kind}-{seed}"
    command = [
        "intrinsic-dimension",
        config,
        "--held-out",
        args.held_out,
        "--every",
        args.every,
        "--delta",
        args.delta,
        "--metric",
        "loss",
        "--learning-rate",
        args.rate,
        "--smallest",
        args.smallest,
        "--share",
        args.share,
        "--baseline-steps",
        "400",
        "--baseline-rate",
        "0.003",
        "--set",
        f"sketch.kind={kind}",
        "--set",
        f"sketch.seed={seed}",
        "--set",
        f"run.out={out}",
    ]
    if target is not None:
        command += ["--target", target]
    program(*command, threads=1)
    record = json.loads((out / "intrinsic_dimension.json").read_text())
    found = record["dimension"]
    row = {
        "sketch": kind,
        "seed": seed,
        "log2 D*": "none" if found is None else int(np.log2(found)),
        "steps": record["search"][-1][0],
        "reached": record["search"][-1][2],
        "at half": max((v for _, v in record["half"]), default=""),
        "half reaches it": record["half_reached"],
    }
    return row, record["threshold"]


@benchmark("Intrinsic dimension of digits as token sequences")
def main(
    table: Table,
    kinds: tuple[str, ...] = ("affd", "ffd", "afjl", "qk"),
    seeds: int = 3,
    rows: int = 1792,
    held_out: int = 256,
    every: int = 50,
    rate: float = 1e-2,
    share: Annotated[float, "of the gain of ordinary training"] = 0.8,
    smallest: int = 128,
    delta: float = 0.02,
) -> None:
    from transformers import LlamaConfig

    with tempfile.TemporaryDirectory() as name:
        folder, cases = Path(name), [(kind, seed) for kind in kinds for seed in range(seeds)]
        LlamaConfig(**SHAPE, architectures=["LlamaForCausalLM"]).save_pretrained(folder)
        digits(folder / "digits.npy", rows)
        data = {
            "source": f"tokens:{folder}/digits.npy",
            "rows": "pad",
            "sequence_length": 65,
            "sequences": rows,
            "micro_batch": 32,
        }
        with written({"model": {"source": f"{folder}/config.json"}, "data": data}) as config:

            def found(case: tuple[str, int], target: float | None) -> tuple[dict[str, Any], float]:
                return search(folder, config, *case, table.given, target)

            first, target = found(cases[0], None)
            table.settings["target (minus the loss)"] = f"{target:.4g}"
            table.add(first)
            kind, seed = cases[0]
            picture = folder / f"{kind}-{seed}" / "figures" / "intrinsic_dimension.png"
            shutil.copy(picture, table.folder / "intrinsic_digits.png")
            with ThreadPoolExecutor(os.cpu_count()) as pool:  # one thread each; the target is the same for all
                for row, _ in pool.map(lambda case: found(case, target), cases[1:]):
                    table.add(row)
    spreads = []
    for kind in kinds:
        known = [1 << r["log2 D*"] for r in table.rows if r["sketch"] == kind and r["log2 D*"] != "none"]
        if known:
            spreads.append(f"{kind} {spread_in_bits(known):.0f}")
    table.note = "Spread of log2 D* over seeds: " + ", ".join(spreads) + ". Paper (table 10, SNLI): at most 1."


if __name__ == "__main__":
    main()

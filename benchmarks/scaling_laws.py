"""Laws fitted to small runs, and the largest model predicted by them: ``hpc_hess scaling run`` and ``scaling fit``.

Random Llamas on 1 and 2 ranks of one thread each, two lengths of sequences, both products. The largest model is left out of
the fit; its seconds and its memory are then predicted.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import tomli_w

from benchmarks.common import LLAMAS, ROOT, random_llama, write

SEQUENCES = 2  # of a rank


def held_out(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a row for each law and each run that it did not see, from scaling.json."""
    runs, rows = {run["name"]: run for run in record["runs"]}, []
    for operator, found in record["operators"].items():
        for law in ("time", "memory"):
            held = found[law]["hold_out"]
            for name in dict.fromkeys(held["runs"]):
                run = runs[name]
                ratios = [1 + error for of, error in zip(held["runs"], held["errors"], strict=True) if of == name]
                rows.append({
                    "product": operator, "law": law, "parameters": f"{run['num_params']:,}", "ranks": run["ranks"],
                    "tokens": run["tokens"], "predicted / measured": sum(ratios) / len(ratios),
                    "least": min(ratios), "most": max(ratios),
                })  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(LLAMAS), default=["9 M", "24 M", "51 M", "93 M"])
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--lengths", nargs="+", type=int, default=[128, 256])
    parser.add_argument("--methods", nargs="+", default=["finite_difference", "exact"])
    parser.add_argument("--steps", type=int, default=4)
    args = parser.parse_args()
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    program = [sys.executable, "-m", "hpc_hess", "scaling"]
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        count, length = SEQUENCES * max(args.ranks), max(args.lengths)
        models = [stack.enter_context(random_llama(LLAMAS[name], count, length)) for name in args.models]
        config = {
            **models[0],
            "parallel": {"device": "cpu"},
            "run": {"report": False},
        }  # its few tokens are known to all
        (folder / "config.toml").write_text(tomli_w.dumps(config))
        study = {
            "config": str(folder / "config.toml"), "out": str(folder / "study"),
            "set": {"lanczos.steps": args.steps, "lanczos.reorthogonalise": "full", "operator.check": False,
                    "operator.step": 0.1, "data.micro_batch": 1},
            "per_rank": {"data.sequences": SEQUENCES},
            "sweep": {"ranks": args.ranks, "model.source": [model["model"]["source"] for model in models],
                      "data.sequence_length": args.lengths, "operator.method": args.methods},
        }  # fmt: skip
        (folder / "study.toml").write_text(tomli_w.dumps(study))
        subprocess.run([*program, "run", str(folder / "study.toml")], cwd=ROOT, env=env, check=True)
        out = ROOT / "runs" / "scaling_laws"  # the page stays there
        runs = sorted(map(str, (folder / "study").iterdir()))
        subprocess.run([*program, "fit", *runs, "--out", str(out)], cwd=ROOT, env=env, check=True)
        record = json.loads((out / "scaling.json").read_text())
    rows = held_out(record)
    settings = {"models": args.models, "ranks": args.ranks, "tokens of a sequence": args.lengths,
                "sequences of a rank": SEQUENCES, "threads of a rank": 1, "steps": args.steps}  # fmt: skip
    write("scaling_laws", "The largest model, predicted by laws fitted to the smaller ones", rows, settings)


if __name__ == "__main__":
    main()

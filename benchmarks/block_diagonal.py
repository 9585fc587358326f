"""Block-diagonal approximations of SmolLM2-135M's Hessian: products by layer, tensor, head and row, and layers' spectra.

Exact products. Writes the table, and the report's two figures as pictures.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from benchmarks.common import RESULTS, run_program, write
from hpc_hess.report.style import STYLE
from hpc_hess.studies.views import parts


def rows_of(study: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the table: a row for each direction and partition."""
    return [
        {"direction": row["direction"], "blocks": row["blocks"], "number": study["counts"][row["blocks"]],
         "relative error": row["relative_error"], "±": row["relative_error_stderr"], "cosine": row["cosine"],
         "± ": row["cosine_stderr"], "products": int(row["num_products"])}
        for row in study["products"]
    ]  # fmt: skip


def read(path: Path) -> dict[str, Any]:
    """Return a result.json with the events that lie beside it."""
    events = [json.loads(line) for line in path.with_name("events.jsonl").read_text().splitlines()]
    return {**json.loads(path.read_text()), "events": events}


def machine_of(result: dict[str, Any]) -> dict[str, Any]:
    """Return what the run knows of its machine."""
    hardware, versions = result["hardware"], result["versions"]
    named = {key: value for key, value in hardware.items() if isinstance(value, int | str)}
    return {**named, **{key: versions[key] for key in ("python", "torch", "transformers")}}


def draw(result: dict[str, Any]) -> None:
    """Save the pictures of the report."""
    with mpl.rc_context(STYLE):  # type: ignore[arg-type]
        for name, view, found in parts(result):
            if name in ("block_diagonal", "layers") and (inches := view.size(found)):
                figure = Figure(figsize=inches, layout="constrained")
                view.draw(figure, found, result)
                figure.savefig(RESULTS / f"{name}.png", dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=2)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--steps", type=int, default=10, help="in each block")
    parser.add_argument("--columns", type=int, default=4)
    parser.add_argument("--result", type=Path, help="result.json of such a run made elsewhere, instead of a run here")
    args = parser.parse_args()
    data = {"sequences": args.sequences, "sequence_length": args.length, "micro_batch": args.sequences}
    result = read(args.result) if args.result else run_program({
        "data": data, "operator": {"method": "exact"}, "lanczos": {"steps": 30},
        "analysis": {
            "eigenpairs": 2, "tolerance": 1e-2, "block_diagonal": ["layer", "tensor", "head", "row"],
            "block_samples": args.samples, "block_spectrum": "layer", "block_steps": args.steps, "columns": args.columns,
        },
    })  # fmt: skip
    study = result["studies"]["block_diagonal"]
    spectrum = study["spectrum"]
    best = min(spectrum["parts"], key=lambda part: part["top_error"])
    seconds = sum(event["hvp_s"] for event in result["events"] if event["event"] == "study")
    count = sum(event["columns"] for event in result["events"] if event["event"] == "study")
    lowest, highest = (pick(pick(part["values"]) for part in spectrum["parts"]) for pick in (min, max))
    note = (
        "Spectra of the matrix and of its blocks by layer: Wasserstein distance "
        f"{100 * spectrum['wasserstein_of_range']:.3g} % of the range, λ max {result['lambda_max']:.4g} against "
        f"{highest:.4g}, "
        f"λ min {result['lambda_min']:.4g} against {lowest:.4g}. One layer for the whole: the "
        f"{best['top_count']} largest eigenvalues, rescaled, are off by {100 * best['top_error']:.3g} % at best "
        f"({best['name']}, factor {best['scale']:.3g}). {count} products in {seconds:.0f} s."
    )
    write(
        "block_diagonal", "Block-diagonal approximations, SmolLM2-135M", rows_of(study),
        {**data, "samples": args.samples, "block_steps": args.steps, "columns": args.columns}, note,
        measured_on=machine_of(result) if args.result else None,
    )  # fmt: skip
    draw(result)


if __name__ == "__main__":
    main()

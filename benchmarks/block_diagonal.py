"""Block-diagonal approximations of SmolLM2-135M's Hessian: products by layer, tensor, head and row, and layers' spectra.

Exact products. Writes the table, and the report's two figures as pictures.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import matplotlib as mpl
from matplotlib.figure import Figure

from benchmarks.frame import Table, benchmark
from benchmarks.processes import run_program, with_events
from hpc_hess.report.style import STYLE
from hpc_hess.studies.views import parts


def rows_of(study: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the table: a row for each direction and partition."""
    return [
        {
            "direction": row["direction"],
            "blocks": row["blocks"],
            "number": study["counts"][row["blocks"]],
            "relative error": row["relative_error"],
            "±": row["relative_error_stderr"],
            "cosine": row["cosine"],
            "± ": row["cosine_stderr"],
            "products": int(row["num_products"]),
        }
        for row in study["products"]
    ]


def machine_of(result: dict[str, Any]) -> dict[str, Any]:
    """Return what the run knows of its machine."""
    hardware, versions = result["hardware"], result["versions"]
    named = {key: value for key, value in hardware.items() if isinstance(value, int | str)}
    return {**named, **{key: versions[key] for key in ("python", "torch", "transformers")}}


def draw(result: dict[str, Any], folder: Path) -> None:
    """Save the pictures of the report."""
    with mpl.rc_context(STYLE):  # type: ignore[arg-type]
        for name, view, found in parts(result):
            if name in ("block_diagonal", "layers") and (inches := view.size(found)):
                figure = Figure(figsize=inches, layout="constrained")
                view.draw(figure, found, result)
                figure.savefig(folder / f"{name}.png", dpi=130)


@benchmark("Block-diagonal approximations, SmolLM2-135M")
def main(
    table: Table,
    sequences: int = 2,
    length: int = 64,
    samples: int = 8,
    steps: Annotated[int, "in each block"] = 10,
    columns: int = 4,
    result: Annotated[Path | None, "result.json of such a run made elsewhere, not a run here"] = None,
) -> None:
    found = (
        with_events(result)
        if result
        else run_program(
            {
                "data": {"sequences": sequences, "sequence_length": length, "micro_batch": sequences},
                "operator": {"method": "exact"},
                "lanczos": {"steps": 30},
                "analysis": {
                    "eigenpairs": 2,
                    "tolerance": 1e-2,
                    "block_diagonal": ["layer", "tensor", "head", "row"],
                    "block_samples": samples,
                    "block_spectrum": "layer",
                    "block_steps": steps,
                    "columns": columns,
                },
            }
        )
    )
    study = found["studies"]["block_diagonal"]
    spectrum = study["spectrum"]
    best = min(spectrum["parts"], key=lambda part: part["top_error"])
    products = [event for event in found["events"] if event["event"] == "study"]
    lowest, highest = (pick(pick(part["values"]) for part in spectrum["parts"]) for pick in (min, max))
    table.note = (
        "Spectra of the matrix and of its blocks by layer: Wasserstein distance "
        f"{100 * spectrum['wasserstein_of_range']:.3g} % of the range, λ max {found['lambda_max']:.4g} against "
        f"{highest:.4g}, "
        f"λ min {found['lambda_min']:.4g} against {lowest:.4g}. One layer for the whole: the "
        f"{best['top_count']} largest eigenvalues, rescaled, are off by {100 * best['top_error']:.3g} % at best "
        f"({best['name']}, factor {best['scale']:.3g}). {sum(event['columns'] for event in products)} products in "
        f"{sum(event['hvp_s'] for event in products):.0f} s."
    )
    table.machine = machine_of(found) if result else {}
    for row in rows_of(study):
        table.add(row)
    draw(found, table.folder)


if __name__ == "__main__":
    main()

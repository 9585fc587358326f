"""SmolLM2-135M, 16 sequences of 128 tokens: what a product and its bookkeeping cost, in gradients of the same run."""

from __future__ import annotations

import statistics
from typing import Literal

from benchmarks.frame import Table, benchmark
from benchmarks.processes import run_program


@benchmark(
    "Cost of a product and of Lanczos on SmolLM2-135M",
    asked={
        "central product / gradient": "<= 2.05",
        "forward product / gradient": "<= 1.05",
        "Lanczos bookkeeping*none / products": "<= 1.5 %",
        "Lanczos bookkeeping*full / products": "<= 5 %",
        "base gradient*": "reported apart",
        "gradients of the calibration": "reported apart",
    },
)
def main(
    table: Table,
    ranks: int = 1,
    steps: int = 20,
    sequences: int = 16,
    micro_batch: int = 4,
    scheme: Literal["central", "forward", "fourth"] = "central",
    reorthogonalise: Literal["full", "none"] = "full",
) -> None:
    table.settings["tokens of a sequence"] = 128
    other = {f"{ranks}_ranks": ranks == 1, scheme: scheme == "central", reorthogonalise: reorthogonalise == "full"}
    table.name = "_".join(["product_cost", *(word for word, usual in other.items() if not usual)])
    result = run_program(
        {
            "data": {"sequences": sequences, "sequence_length": 128, "micro_batch": micro_batch},
            "lanczos": {"steps": steps, "probes": 1, "reorthogonalise": reorthogonalise},
            # the comparison with the exact product is no part of a step
            "operator": {"check": False, "scheme": scheme},
        },
        ranks,
    )
    each = [e for e in result["events"] if e["event"] == "step"]
    gradient_s = result["timing"]["gradient_s"]
    hvp = [e["hvp_s"] for e in each]
    lanczos_s, checkpoint_s = sum(e["lanczos_s"] for e in each), sum(e["checkpoint_s"] for e in each)
    table.measured("one gradient, s (median over the run)", gradient_s)
    table.measured(
        "base gradient, first of the run, s", next(e["seconds"] for e in result["events"] if e["event"] == "gradient")
    )
    table.measured(f"{scheme} product, s (median)", statistics.median(hvp))
    table.measured(f"{scheme} product / gradient", statistics.median(hvp) / gradient_s)
    table.measured(
        f"Lanczos bookkeeping of {len(each)} steps, reorthogonalisation {reorthogonalise} / products",
        f"{100 * lanczos_s / sum(hvp):.1f} %",
    )
    table.measured("gradients of the calibration", sum(e["calibration_gradients"] for e in each))
    table.measured("checkpoints / products", f"{100 * checkpoint_s / sum(hvp):.1f} %")


if __name__ == "__main__":
    main()

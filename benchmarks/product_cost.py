"""SmolLM2-135M, 16 sequences of 128 tokens: what a product and its bookkeeping cost, in gradients of the same run."""

from __future__ import annotations

import argparse
import statistics
from typing import Any

from benchmarks.common import run_program, write

ASKED = {"central": "<= 2.05", "forward": "<= 1.05", "fourth": ""}
ASKED_OF_VECTORS = {"none": "<= 1.5 %", "full": "<= 5 %"}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--micro-batch", type=int, default=4)
    parser.add_argument("--scheme", choices=list(ASKED), default="central")
    parser.add_argument("--reorthogonalise", choices=list(ASKED_OF_VECTORS), default="full")
    args = parser.parse_args()
    config: dict[str, Any] = {
        "data": {"sequences": args.sequences, "sequence_length": 128, "micro_batch": args.micro_batch},
        "lanczos": {"steps": args.steps, "probes": 1, "reorthogonalise": args.reorthogonalise},
        # the comparison with the exact product is no part of a step
        "operator": {"check": False, "scheme": args.scheme},
    }
    result = run_program(config, args.ranks)
    steps = [e for e in result["events"] if e["event"] == "step"]
    gradient_s = next(e["seconds"] for e in result["events"] if e["event"] == "gradient")
    hvp = [e["hvp_s"] for e in steps]
    lanczos_s, checkpoint_s = sum(e["lanczos_s"] for e in steps), sum(e["checkpoint_s"] for e in steps)
    rows = [
        {"what": "one gradient, s (median over the run)", "asked": "", "measured": result["timing"]["gradient_s"]},
        {"what": "base gradient, first of the run, s", "asked": "reported apart", "measured": gradient_s},
        {"what": f"{args.scheme} product, s (median)", "asked": "", "measured": statistics.median(hvp)},
        {"what": f"{args.scheme} product / gradient", "asked": ASKED[args.scheme],
         "measured": statistics.median(hvp) / result["timing"]["gradient_s"]},
        {"what": f"Lanczos bookkeeping of {len(steps)} steps, reorthogonalisation {args.reorthogonalise} / products",
         "asked": ASKED_OF_VECTORS[args.reorthogonalise], "measured": f"{100 * lanczos_s / sum(hvp):.1f} %"},
        {"what": "gradients of the calibration", "asked": "reported apart",
         "measured": sum(e["calibration_gradients"] for e in steps)},
        {"what": "checkpoints / products", "asked": "", "measured": f"{100 * checkpoint_s / sum(hvp):.1f} %"},
    ]  # fmt: skip
    changed = {"ranks": args.ranks, "scheme": args.scheme, "reorthogonalise": args.reorthogonalise}
    changed = {key: value for key, value in changed.items() if value != parser.get_default(key)}
    words = [f"{value}_ranks" if key == "ranks" else str(value) for key, value in changed.items()]
    name = "_".join(["product_cost", *words])
    write(name, "Cost of a product and of Lanczos on SmolLM2-135M", rows,
          {"ranks": args.ranks, "steps": args.steps, "sequences": args.sequences, "sequence_length": 128,
           "micro_batch": args.micro_batch, "reorthogonalise": args.reorthogonalise, "scheme": args.scheme},
          command=" ".join(["product_cost", *(f"--{key} {value}" for key, value in changed.items())]))  # fmt: skip


if __name__ == "__main__":
    main()

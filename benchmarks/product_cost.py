"""SmolLM2-135M, 16 sequences of 128 tokens: what a product and its bookkeeping cost, in gradients of the same run."""

from __future__ import annotations

import argparse
import statistics
from typing import Any

from benchmarks.common import run_program, write


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--micro-batch", type=int, default=4)
    args = parser.parse_args()
    config: dict[str, Any] = {
        "data": {"sequences": args.sequences, "sequence_length": 128, "micro_batch": args.micro_batch},
        "lanczos": {"steps": args.steps, "probes": 1},
        "operator": {"check": False},  # the comparison with the exact product is no part of a step
    }
    result = run_program(config, args.ranks)
    steps = [e for e in result["events"] if e["event"] == "step"]
    gradient_s = next(e["seconds"] for e in result["events"] if e["event"] == "gradient")
    hvp = [e["hvp_s"] for e in steps]
    lanczos_s, checkpoint_s = sum(e["lanczos_s"] for e in steps), sum(e["checkpoint_s"] for e in steps)
    rows = [
        {"what": "one gradient, s (median over the run)", "asked": "", "measured": result["timing"]["gradient_s"]},
        {"what": "base gradient, first of the run, s", "asked": "reported apart", "measured": gradient_s},
        {"what": "central product, s (median)", "asked": "", "measured": statistics.median(hvp)},
        {"what": "central product / gradient", "asked": "<= 2.1",
         "measured": statistics.median(hvp) / result["timing"]["gradient_s"]},
        {"what": f"Lanczos bookkeeping of {len(steps)} steps / products", "asked": "<= 10 %",
         "measured": f"{100 * lanczos_s / sum(hvp):.1f} %"},
        {"what": f"calibration gradients, beside {2 * len(steps)} of products", "asked": "reported apart",
         "measured": sum(e["calibration_gradients"] for e in steps)},
        {"what": "checkpoints / products", "asked": "", "measured": f"{100 * checkpoint_s / sum(hvp):.1f} %"},
    ]  # fmt: skip
    name = "product_cost" if args.ranks == 1 else f"product_cost_{args.ranks}_ranks"
    write(name, "Cost of a central product and of Lanczos on SmolLM2-135M", rows,
          {"ranks": args.ranks, "steps": args.steps, "sequences": args.sequences, "sequence_length": 128,
           "micro_batch": args.micro_batch, "reorthogonalise": "full", "scheme": "central"},
          command=f"product_cost --ranks {args.ranks}")  # fmt: skip


if __name__ == "__main__":
    main()

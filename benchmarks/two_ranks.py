"""Products of SmolLM2-135M, 16 x 128 tokens, on two ranks of one core each against one process that uses both cores."""

from __future__ import annotations

import argparse
from typing import Any

from benchmarks.common import run_program, write


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--micro-batches", nargs="+", type=int, default=[4, 8])
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for micro_batch in args.micro_batches:
        seconds = {}
        for ranks in (1, 2):
            result = run_program({
                "data": {"sequences": 16, "sequence_length": 128, "micro_batch": micro_batch},
                "lanczos": {"steps": args.steps}, "operator": {"check": False, "step": 0.1},
            }, ranks)  # fmt: skip
            timing = result["timing"]
            seconds[ranks] = timing["hvp_s"]
            phases = {name: timing["phases"].get(name, {}).get("mean_s", 0.0) for name in ("all-gather", "reduce-scatter")}
            rows.append({
                "sequences at a time": micro_batch, "ranks": ranks, "central product, s": seconds[ranks],
                "of it all-gather, s": phases["all-gather"], "reduce-scatter, s": phases["reduce-scatter"],
                "speed against one process (asked 0.85)": seconds[1] / seconds[ranks],
            })  # fmt: skip
            print(rows[-1], flush=True)
    write("two_ranks", "Central products of SmolLM2-135M on two ranks against one process", rows, {"steps": args.steps})


if __name__ == "__main__":
    main()

"""The planner's memory against runs that happen here: SmolLM2-135M and random Llamas, 1 to 4 ranks, both operators.

Peak resident memory of a rank above what it has after the imports, against what was traced without running.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator
from typing import Any

from benchmarks.common import random_llama, run_program, write
from hpc_hess.config import make_config
from hpc_hess.planner import trace

SHAPES = {
    "Llama, 10 M": {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 8, "vocab_size": 4096},
    "Llama, 60 M": {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12, "vocab_size": 8192},
    "Llama, 400 M": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 20, "vocab_size": 32000},
}
SMOLLM2 = "SmolLM2-135M"


@contextlib.contextmanager
def model_of(name: str, length: int, sequences: int) -> Iterator[dict[str, Any]]:
    """Yield the sections [model] and [data] of a model."""
    if name == SMOLLM2:
        yield {"data": {"sequences": sequences, "sequence_length": length}}
    else:
        with random_llama(SHAPES[name], sequences, length) as config:
            yield config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=[SMOLLM2, *SHAPES], default=[SMOLLM2, *SHAPES])
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2, 3, 4])
    parser.add_argument("--length", type=int, default=256)
    args = parser.parse_args()
    rows = []
    for name in args.models:
        for method in ("finite_difference", "exact"):
            for ranks in args.ranks:
                with model_of(name, args.length, ranks) as config:
                    config |= {
                        "operator": {"method": method, "check": False}, "lanczos": {"steps": 3},
                        "parallel": {"device": "cpu"},
                    }  # fmt: skip
                    traced = trace(make_config(config), ranks, ranks, gloo=True)
                    result = run_program(config, ranks)
                predicted = traced.peak.bytes + traced.rows * traced.row_bytes * traced.width
                measured = result["memory"]["peak_bytes"] - result["memory"]["baseline_bytes"]
                rows.append({
                    "model": name, "operator": method.replace("_", " "), "ranks": ranks, "predicted, MB": predicted / 1e6,
                    "measured, MB": measured / 1e6, "predicted / measured": predicted / measured,
                })  # fmt: skip
                print(rows[-1], flush=True)
    write("planner", "Peak memory of a rank: the planner against runs", rows, {"tokens of a rank": f"1 x {args.length}"})


if __name__ == "__main__":
    main()

"""Products of SmolLM2-135M, 16 x 128 tokens, on two ranks of one core each against one process that uses both cores."""

from __future__ import annotations

from benchmarks.frame import Table, benchmark
from benchmarks.processes import run_program


@benchmark("Central products of SmolLM2-135M on two ranks against one process")
def main(table: Table, steps: int = 3, micro_batches: tuple[int, ...] = (4, 8)) -> None:
    for micro_batch in micro_batches:
        seconds = {}
        for ranks in (1, 2):
            result = run_program(
                {
                    "data": {"sequences": 16, "sequence_length": 128, "micro_batch": micro_batch},
                    "lanczos": {"steps": steps},
                    "operator": {"check": False, "step": 0.1},
                },
                ranks,
            )
            timing = result["timing"]
            seconds[ranks] = timing["hvp_s"]
            phases = {name: timing["phases"].get(name, {}).get("mean_s", 0.0) for name in ("all-gather", "reduce-scatter")}
            table.add(
                {
                    "sequences at a time": micro_batch,
                    "ranks": ranks,
                    "central product, s": seconds[ranks],
                    "of it all-gather, s": phases["all-gather"],
                    "reduce-scatter, s": phases["reduce-scatter"],
                    "speed against one process (asked 0.85)": seconds[1] / seconds[ranks],
                }
            )


if __name__ == "__main__":
    main()

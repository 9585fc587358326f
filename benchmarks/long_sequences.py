"""An exact product of SmolLM2-135M over one long sequence: CPU time in gradients and peak memory, by length.

"compiled": the second product, when everything is compiled.
Each measurement runs in a process of its own. ``--compare`` adds products with attention from elementary operations,
which hold several matrices of queries x keys, where they fit.
"""

from __future__ import annotations

import resource
import time
from typing import Annotated

from benchmarks.frame import Option, Table, benchmark
from benchmarks.processes import apart


def measure(what: str, length: int, threads: int) -> dict[str, float]:
    """Return CPU seconds and peak memory of "gradient", "exact", "compiled", or "elementary" (without closed forms)."""
    import torch

    from hpc_hess.config import make_config
    from hpc_hess.console.progress import Progress
    from hpc_hess.curvature.exact.exact import ExactHessian
    from hpc_hess.curvature.exact.streaming import Settings
    from hpc_hess.model.blocks import attention
    from hpc_hess.parallel.world import World
    from hpc_hess.session.problem import load_problem
    from hpc_hess.session.reference import start_vector

    torch.set_num_threads(threads)
    if what == "elementary":
        attention.attention = attention.elementary  # type: ignore[assignment]
    config = make_config({"data": {"sequence_length": length, "sequences": 1}})
    problem = load_problem(config, World.alone("cpu"), Progress(0))
    if what == "gradient":
        began = time.process_time()
        problem.gradient()
    else:
        settings = Settings(compile="on" if what == "compiled" else "off")
        operator = ExactHessian(problem.model, problem.objective, plain=problem.plain, settings=settings)
        v = start_vector(problem.model.space, 0, 0, "gaussian")
        if what == "compiled":
            operator.matvec(v)
        began = time.process_time()
        operator.matvec(v)
    seconds = time.process_time() - began
    return {"s": seconds, "gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9}


@benchmark(
    "An exact product of SmolLM2-135M over one long sequence",
    asked="4,096 tokens: 6 GB, 3.5 gradients; 8,192: runs in 24 GB",
)
def main(
    table: Table,
    lengths: tuple[int, ...] = (1024, 2048, 4096, 8192),
    compare: Annotated[tuple[int, ...], Option(metavar="LENGTH")] = (1024, 2048),
    compiled: Annotated[tuple[int, ...], Option(metavar="LENGTH")] = (1024, 2048, 4096),
    threads: int = 1,
) -> None:
    table.settings["dtype"] = "float32"
    for length in lengths:
        found = {}
        also = {"compiled": compiled, "elementary": compare}
        for what in ["gradient", "exact", *(name for name, lengths in also.items() if length in lengths)]:
            (found[what],) = apart(measure, what, length, threads, threads=threads)
            print(length, what, found[what], flush=True)
        row = {"tokens": length, "gradient, CPU s": found["gradient"]["s"], "gradient, GB": found["gradient"]["gb"]}
        for what in [what for what in found if what != "gradient"]:
            ratio = found[what]["s"] / found["gradient"]["s"]
            row |= {f"{what}, gradients": ratio, f"{what}, GB": found[what]["gb"]}
        table.add(row)


if __name__ == "__main__":
    main()

"""An exact product of SmolLM2-135M over one long sequence: CPU time in gradients and peak memory, by length.

Each measurement runs in a process of its own. "compiled" is the second product, when everything is compiled; "elementary"
takes attention from elementary operations, which hold several matrices of queries x keys. ``--gradient``, ``--compiled`` and
``--compare`` say at which lengths gradients and these two are measured.
"""

from __future__ import annotations

import math
import resource
import time
from typing import Annotated, Any

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
    gradient: Annotated[tuple[int, ...], Option(metavar="LENGTH")] = (1024, 2048, 4096),
    compare: Annotated[tuple[int, ...], Option(metavar="LENGTH")] = (1024, 2048),
    compiled: Annotated[tuple[int, ...], Option(metavar="LENGTH")] = (1024, 2048, 4096),
    threads: int = 1,
) -> None:
    table.settings["dtype"] = "float32"
    wanted = {"gradient": gradient, "exact": lengths, "compiled": compiled, "elementary": compare}
    for length in lengths:
        found = {}
        for what in [what for what, where in wanted.items() if length in where]:
            (found[what],) = apart(measure, what, length, threads, threads=threads)
            print(length, what, found[what], flush=True)
        one = found["gradient"]["s"] if "gradient" in found else math.nan
        row: dict[str, Any] = {"tokens": length}
        for what, each in found.items():
            row |= {f"{what}, CPU s": each["s"], f"{what}, gradients": each["s"] / one, f"{what}, GB": each["gb"]}
        table.add({name: value for name, value in row.items() if value == value and name != "gradient, gradients"})


if __name__ == "__main__":
    main()

"""Exact products of SmolLM2-135M with and without compiled blocks: cost in gradients, error, peak memory, compile time.

Each row is a process of its own, whose gradients and products take turns. Errors are against the product in float64, on a
random vector. Programs are compiled afresh unless ``--programs`` names a directory.
"""

from __future__ import annotations

import resource
import statistics
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

from benchmarks.frame import Table, benchmark
from benchmarks.processes import apart

WAYS = {  # what is measured, and its number of directions
    "recomputing": 1,
    "keeping state": 1,
    "in lock-step": 4,
    "Gauss-Newton": 1,
}
ASKED = {  # gradients, by way and tokens in a row
    ("recomputing", 128): 3.2,
    ("keeping state", 128): 2.7,
    ("in lock-step", 128): 2.3,
    ("Gauss-Newton", 128): 2.0,
    ("recomputing", 512): 3.2,
    ("keeping state", 512): 2.7,
    ("in lock-step", 512): 2.5,
}


def _problem(length: int, dtype: str) -> Any:
    from hpc_hess.config import make_config
    from hpc_hess.console.progress import Progress
    from hpc_hess.parallel.world import World
    from hpc_hess.session.problem import load_problem

    data = {"source": "text:launch/data/gpl-3.txt", "sequence_length": length, "sequences": 2, "micro_batch": 2}
    model = {"master_dtype": dtype, "compute_dtype": dtype}
    return load_problem(make_config({"model": model, "data": data}), World.alone("cpu"), Progress(0))


def reference(way: str, length: int, path: str) -> None:
    """Write the product in float64 with the first vector."""
    import torch

    from hpc_hess.curvature.exact.exact import ExactHessian
    from hpc_hess.curvature.exact.gauss_newton import GaussNewton
    from hpc_hess.session.reference import start_vector

    single = _problem(length, "float32")
    v = start_vector(single.model.space, 0, 1, "gaussian").data.double()
    problem = _problem(length, "float64")
    kind = GaussNewton if way == "Gauss-Newton" else ExactHessian
    torch.save(kind(problem.model, problem.objective).matvec(problem.model.space.wrap(v)).data, path)


def measure(way: str, length: int, compiled: bool, programs: str, path: str | None, repeats: int) -> dict[str, Any]:
    """Return the cost of a product in gradients, its error and its peak memory, and what compiling took."""
    import torch

    from hpc_hess.curvature.exact.exact import ExactHessian
    from hpc_hess.curvature.exact.gauss_newton import GaussNewton
    from hpc_hess.curvature.exact.streaming import Settings
    from hpc_hess.session.reference import start_vector

    problem, width = _problem(length, "float32"), WAYS[way]
    space = problem.model.space
    settings = Settings(
        keep_state=way == "keeping state", compile="on" if compiled else "off", programs=Path(programs), products=0
    )
    kind = GaussNewton if way == "Gauss-Newton" else ExactHessian
    operator = kind(problem.model, problem.objective, settings=settings)
    vectors = [start_vector(space, 0, k + 1, "gaussian") for k in range(width)]
    found: dict[str, Any] = {}
    first = operator.matmat(vectors)[0].data
    if path is not None:
        truth = torch.load(path)
        found["error"] = float((first - truth).norm() / truth.norm())
        del truth
    del first
    out = space.zeros()

    def seconds(function: Any) -> float:
        began = time.perf_counter()
        function()
        return time.perf_counter() - began

    seconds(lambda: problem.gradient(out))
    costs, products, gradients = [], [], []
    for _ in range(repeats):
        before = seconds(lambda: problem.gradient(out))
        products.append(seconds(lambda: operator.matmat(vectors)) / width)
        after = seconds(lambda: problem.gradient(out))
        gradients += [before, after]
        costs.append(2 * products[-1] / (before + after))
    made = operator.repaying._programs
    return {
        "gradients": statistics.median(costs),
        "product_s": statistics.median(products),
        "gradient_s": statistics.median(gradients),
        "compile_s": 0.0 if made is None else made.seconds,
        "programs": 0 if made is None else made.compiled + made.loaded,
        "gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
        "notes": [note for note in operator.notes if "compiled" in note],
        **found,
    }


@benchmark("Exact products of SmolLM2-135M with and without compiled blocks", asked="the column of that name")
def main(
    table: Table,
    lengths: tuple[int, ...] = (128, 512),
    ways: Annotated[tuple[str, ...], "of WAYS"] = tuple(WAYS),
    repeats: int = 3,
    programs: Annotated[str, "a directory of compiled programs"] = "",
    threads: int = 2,
) -> None:
    table.settings |= {"sequences": 2, "micro batch": 2, "dtype": "float32"}
    with tempfile.TemporaryDirectory() as folder:
        for length in lengths:
            for way in ways:
                path = None
                if length == lengths[0] and way in ("recomputing", "Gauss-Newton"):
                    path = str(Path(folder) / "reference.pt")
                    apart(reference, way, length, path, threads=threads)
                row: dict[str, Any] = {"tokens": f"2 x {length}", "product": way, "asked": ASKED.get((way, length), "")}
                for compiled in (False, True):
                    name = "compiled" if compiled else "eager"
                    (one,) = apart(measure, way, length, compiled, programs or folder, path, repeats, threads=threads)
                    print(way, length, name, one, flush=True)
                    row |= {f"{name}, gradients": one["gradients"], f"{name}, s": one["product_s"], f"{name}, GB": one["gb"]}
                    if "error" in one:
                        row[f"{name}, error"] = one["error"]
                    if compiled:
                        row |= {"compiling, s": one["compile_s"], "programs": one["programs"]}
                table.add(row)


if __name__ == "__main__":
    main()

"""The same alpha and beta on 1, 2, 3 and 4 ranks: every toy architecture, float64 and float32."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from benchmarks.frame import Option, Table, benchmark
from benchmarks.processes import apart
from hpc_hess.config import make_config
from hpc_hess.console.progress import Progress
from hpc_hess.curvature.differences.finite_difference import FiniteDifferenceHessian
from hpc_hess.linalg import probes
from hpc_hess.linalg.lanczos import Lanczos
from hpc_hess.parallel.basis import Basis
from hpc_hess.parallel.world import World
from hpc_hess.session.problem import load_problem
from tests.support.toys import TOYS, toy_directory

STEPS = 10


def recurrences(folder: str, dtype: str, models: list[str]) -> dict[str, tuple[list[float], list[float]]]:
    """Return alpha and beta of every toy. Collective: yes."""
    world = World.join("cpu", 1200.0)
    world.make_mesh(1)
    found = {}
    for name in models:
        config = make_config(
            {
                "model": {"source": f"{folder}/{name}", "attention": "eager", "master_dtype": dtype, "compute_dtype": dtype},
                "data": {"source": f"tokens:{folder}/tokens.npy", "sequence_length": 13, "sequences": 5},
            }
        )
        problem = load_problem(config, world, Progress(0))
        operator = FiniteDifferenceHessian(problem.gradient)
        space = problem.model.space
        process = Lanczos(operator, Basis(space, STEPS), STEPS)
        start = space.zeros()
        probes.fill(start.data, *space.shard.global_intervals, seed=0, probe=0, distribution="rademacher")
        process.start(start)
        while not process.finished:
            process.step()
        found[name] = (process.alpha, process.beta)
    world.leave()
    return found


@benchmark("alpha, beta against one rank, relative to max|T|, first 10 steps, central differences")
def main(table: Table, models: Annotated[tuple[str, ...], Option(choices=(*TOYS,))] = (*TOYS,)) -> None:
    table.settings |= {"steps": STEPS, "tokens": "5 x 13", "step": "auto"}
    with tempfile.TemporaryDirectory() as folder:
        for name in models:
            toy_directory(name, Path(folder) / name)
        np.save(Path(folder) / "tokens.npy", np.random.default_rng(0).integers(3, 96, 200))
        for dtype, bound in (("float64", 1e-8), ("float32", 1e-3)):
            runs = {n: apart(recurrences, folder, dtype, models, ranks=n, threads=1)[0] for n in (1, 2, 3, 4)}
            for name in models:
                alpha, beta = (np.array(x) for x in runs[1][name])
                scale = max(np.abs(alpha).max(), beta.max())
                row: dict[str, Any] = {"model": name, "dtype": dtype, "asked": bound}
                for n in (2, 3, 4):
                    a, b = (np.array(x) for x in runs[n][name])
                    row[f"{n} ranks"] = float(max(np.abs(a - alpha).max(), np.abs(b - beta).max()) / scale)
                table.add(row)


if __name__ == "__main__":
    main()

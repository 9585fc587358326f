"""The ten largest eigenvalues of SmolLM2-135M's Hessian in sketch space against the unsketched ones, by exact products.

Thick restarts on H and on Phi H Phi^T, each kind at the dimensions of Schioppa 2024, table 7. The sketch adds to every
eigenvalue about trace / D, the mean of the rest of the spectrum seen through N / D: a column takes that off.
"""

from __future__ import annotations

import time
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch

from benchmarks.frame import Option, Table, benchmark
from hpc_hess.config import make_config
from hpc_hess.console.progress import Progress
from hpc_hess.linalg import probes
from hpc_hess.linalg.eigen import ThickRestart, eigenpairs
from hpc_hess.linalg.operator import LinearOperator
from hpc_hess.parallel.basis import Basis
from hpc_hess.parallel.world import World
from hpc_hess.session.operators import exact_operator
from hpc_hess.session.problem import load_problem
from hpc_hess.sketch.comparison import eigenvalue_error
from hpc_hess.sketch.kinds import SketchSettings
from hpc_hess.sketch.sketch import Sketch, SketchedOperator

COUNT = 10
PAPER = {"affd": (9, 10, 10), "afjl": (12, 12, 12), "qk": (13, 13, 13)}


class Largest(NamedTuple):
    """The largest eigenvalues, descending, the largest of their residuals, and what it took."""

    values: np.ndarray
    residual: float
    products: int
    seconds: float  # a product


def largest(operator: LinearOperator, basis_size: int, most_products: int) -> Largest:
    """Search with thick restarts until residuals are below 1e-3 of the largest eigenvalue."""
    space, began = operator.space, time.perf_counter()
    process = ThickRestart(operator, Basis(space, basis_size + 1), basis_size, COUNT, "largest", 1e-3)
    process.start(probes.draw(space, seed=0, probe=0, distribution="rademacher"))
    found = eigenpairs(process, most_products)
    values, n = np.sort(np.asarray(found.values))[::-1], process.num_products
    return Largest(values, float(np.max(found.residuals)), n, (time.perf_counter() - began) / n)


@benchmark(
    "Ten largest eigenvalues of SmolLM2-135M's Hessian in sketch space",
    note="Error: mean relative error of the ten largest eigenvalues. Residual: the largest of the ten.",
)
def main(
    table: Table,
    products: Annotated[int, "at most so many for each"] = 90,
    basis: Annotated[int, "vectors of the unsketched search, of N entries"] = 24,
    sketched_basis: int = 60,
    sequences: int = 2,
    length: int = 64,
    cases: Annotated[tuple[str, ...], Option(metavar="KIND:BITS")] = (
        "affd:10",
        "affd:13",
        "affd:16",
        "afjl:12",
        "afjl:16",
        "qk:13",
        "qk:16",
    ),
) -> None:
    config = make_config(
        {"data": {"sequences": sequences, "sequence_length": length}, "operator": {"method": "exact", "keep_state": True}}
    )
    problem = load_problem(config, World.alone(), Progress(0))
    operator = exact_operator(config, problem)
    v = probes.draw(operator.space, seed=1, probe=0, distribution="rademacher")
    trace = v.dot(operator.matvec(v))  # of one probe
    exact = largest(operator, basis, products)
    table.settings |= {
        "trace": f"{trace:.0f}",
        "threads": torch.get_num_threads(),
        "eigenvalues": ", ".join(f"{value:.4g}" for value in exact.values),
    }

    def add(name: str, dimension: int, found: Largest, **more: Any) -> None:
        print(found.values, flush=True)
        table.add(
            {
                "sketch": name,
                **more,
                "largest": found.values[0],
                "tenth": found.values[-1],
                "residual": found.residual,
                "products": found.products,
                "seconds each": found.seconds,
                "basis vector, MB": dimension * 4 / 1e6,
            }
        )

    add("none", operator.space.size, exact)
    for case in cases:
        kind, bits = case.split(":")
        D = 1 << int(bits)
        sketch = Sketch(operator.space.layout.num_params_full, SketchSettings(kind=kind, dimension=D))  # type: ignore[arg-type]
        found = largest(SketchedOperator(operator, sketch), sketched_basis, products)
        add(
            kind,
            D,
            found,
            **{
                "log2 D": int(bits),
                "error": eigenvalue_error(exact.values, found.values),
                "rescaled": eigenvalue_error(exact.values, found.values, rescale=True),
                "less trace / D": eigenvalue_error(exact.values, found.values - trace / D),
                "paper: log2 D for < .2/.1/.05": "/".join(map(str, PAPER[kind])),
            },
        )


if __name__ == "__main__":
    main()

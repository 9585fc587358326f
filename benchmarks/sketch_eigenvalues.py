"""The ten largest eigenvalues of SmolLM2-135M's Hessian in sketch space against the unsketched ones, by exact products.

Thick restarts on H and on Phi H Phi^T, each kind at the dimensions of Schioppa 2024, table 7. The sketch adds to every
eigenvalue about trace / D, the mean of the rest of the spectrum seen through N / D: a column takes that off.
"""

from __future__ import annotations

import argparse
import time
from typing import Any, NamedTuple

import numpy as np
import torch

from benchmarks.common import write
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--products", type=int, default=90, help="at most so many for each")
    parser.add_argument("--basis", type=int, default=24, help="vectors of the unsketched search, of N entries")
    parser.add_argument("--sketched-basis", type=int, default=60)
    parser.add_argument("--sequences", type=int, default=2)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--cases", nargs="+", metavar="KIND:BITS",
                        default=["affd:10", "affd:13", "affd:16", "afjl:12", "afjl:16", "qk:13", "qk:16"])  # fmt: skip
    args = parser.parse_args()
    world = World.alone()
    config = make_config({
        "data": {"sequences": args.sequences, "sequence_length": args.length},
        "operator": {"method": "exact", "keep_state": True},
    })  # fmt: skip
    problem = load_problem(config, world, Progress(0))
    operator = exact_operator(config, problem)
    v = probes.draw(operator.space, seed=1, probe=0, distribution="rademacher")
    trace = v.dot(operator.matvec(v))  # of one probe
    exact = largest(operator, args.basis, args.products)
    print("unsketched", exact, f"trace about {trace:.0f}", flush=True)
    settings = {"tokens": f"{args.sequences} x {args.length}", "trace": f"{trace:.0f}", "threads": torch.get_num_threads(),
                "basis": f"{args.basis} vectors, sketched {args.sketched_basis}",
                "eigenvalues": ", ".join(f"{v:.4g}" for v in exact.values)}  # fmt: skip
    rows: list[dict[str, Any]] = []

    def add(name: str, dimension: int, found: Largest, **more: Any) -> None:
        rows.append({
            "sketch": name, **more, "largest": found.values[0], "tenth": found.values[-1], "residual": found.residual,
            "products": found.products, "seconds each": found.seconds, "basis vector, MB": dimension * 4 / 1e6,
        })  # fmt: skip
        print(rows[-1], found.values, flush=True)
        write("sketch_eigenvalues", "Ten largest eigenvalues of SmolLM2-135M's Hessian in sketch space", rows, settings,
              "Error: mean relative error of the ten largest eigenvalues. Residual: the largest of the ten.",
              f"sketch_eigenvalues --sequences {args.sequences} --cases {' '.join(args.cases)}")  # fmt: skip

    add("none", operator.space.size, exact)
    for case in args.cases:
        kind, bits = case.split(":")
        D = 1 << int(bits)
        sketch = Sketch(operator.space.layout.num_params_full, SketchSettings(kind=kind, dimension=D))  # type: ignore[arg-type]
        found = largest(SketchedOperator(operator, sketch), args.sketched_basis, args.products)
        add(kind, D, found, **{
            "log2 D": int(bits), "error": eigenvalue_error(exact.values, found.values),
            "rescaled": eigenvalue_error(exact.values, found.values, rescale=True),
            "less trace / D": eigenvalue_error(exact.values, found.values - trace / D),
            "paper: log2 D for < .2/.1/.05": "/".join(map(str, PAPER[kind])),
        })  # fmt: skip


if __name__ == "__main__":
    main()

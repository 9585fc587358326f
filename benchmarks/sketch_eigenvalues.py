"""The ten largest eigenvalues of SmolLM2-135M's Hessian in sketch space against the unsketched ones, by exact products.

Lanczos on Phi H Phi^T, each kind at the dimensions of Schioppa 2024, table 7. The sketch adds to every eigenvalue about
trace / D, the mean of the rest of the spectrum seen through N / D: the last columns take that off.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np
import torch
from scipy.linalg import eigh_tridiagonal

from benchmarks.common import write
from hpc_hess.config import make_config
from hpc_hess.linalg import probes
from hpc_hess.linalg.lanczos import Lanczos
from hpc_hess.linalg.operator import LinearOperator
from hpc_hess.parallel.basis import Basis
from hpc_hess.parallel.world import World
from hpc_hess.problem import load_problem
from hpc_hess.products import exact_operator
from hpc_hess.report.progress import Progress
from hpc_hess.sketch.comparison import eigenvalue_error
from hpc_hess.sketch.kinds import SketchSettings
from hpc_hess.sketch.sketch import Sketch, SketchedOperator

COUNT = 10
PAPER = {"affd": (9, 10, 10), "afjl": (12, 12, 12), "qk": (13, 13, 13)}


def largest(operator: LinearOperator, steps: int) -> tuple[np.ndarray, np.ndarray, float, Lanczos]:
    """Return the largest Ritz values, descending, their residuals, and seconds a step."""
    space, began = operator.space, time.perf_counter()
    process = Lanczos(operator, Basis(space, min(steps, space.size) + 1), min(steps, space.size))
    process.start(probes.draw(space, seed=0, probe=0, distribution="rademacher"))
    while not process.finished:
        process.step()
    seconds = (time.perf_counter() - began) / process.step_count
    values, vectors = eigh_tridiagonal(np.array(process.alpha), np.array(process.beta[:-1]))
    order = np.argsort(-values)[:COUNT]
    return values[order], np.abs(process.beta[-1] * vectors[-1, order]), seconds, process


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30)
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
    exact, residuals, seconds, process = largest(operator, args.steps)
    trace = operator.space.size * process.alpha[0]  # of one probe: <v, H v> N
    print("unsketched", exact, residuals, f"{seconds:.1f} s a step, trace about {trace:.0f}", flush=True)
    rows: list[dict[str, Any]] = [{
        "sketch": "none", "seconds a step": seconds, "largest": exact[0], "tenth": exact[-1],
        "residual of the tenth": residuals[-1], "basis vector, MB": operator.space.size * 4 / 1e6,
    }]  # fmt: skip
    for case in args.cases:
        kind, bits = case.split(":")
        D = 1 << int(bits)
        sketch = Sketch(operator.space.layout.num_params_full, SketchSettings(kind=kind, dimension=D))  # type: ignore[arg-type]
        values, residuals, seconds, _ = largest(SketchedOperator(operator, sketch), args.steps)
        rows.append({
            "sketch": kind, "log2 D": int(bits), "seconds a step": seconds, "largest": values[0], "tenth": values[-1],
            "residual of the tenth": residuals[-1], "error": eigenvalue_error(exact, values),
            "rescaled": eigenvalue_error(exact, values, rescale=True),
            "less trace / D": eigenvalue_error(exact, values - trace / D), "basis vector, MB": D * 4 / 1e6,
            "paper: log2 D for < .2/.1/.05": "/".join(map(str, PAPER[kind])),
        })  # fmt: skip
        print(rows[-1], values, flush=True)
    settings = {"tokens": f"{args.sequences} x {args.length}", "steps": args.steps, "trace": f"{trace:.0f}", "threads":
                torch.get_num_threads(), "eigenvalues": ", ".join(f"{v:.4g}" for v in exact)}  # fmt: skip
    write("sketch_eigenvalues", "Ten largest eigenvalues of SmolLM2-135M's Hessian in sketch space", rows, settings,
          "Error: mean relative error of the ten largest Ritz values.")  # fmt: skip


if __name__ == "__main__":
    main()

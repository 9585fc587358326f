"""Exact products with and without compiled blocks on a GPU: a random Llama of 1.1 B parameters, in three number formats.

``--model toy`` tries it anywhere, but for tf32. The card's arithmetic is the rate of a square matrix product in the same
format, measured in the same run. Medians of ``--repeats`` products.
"""

from __future__ import annotations

import contextlib
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch

from benchmarks.frame import Option, Table, benchmark
from benchmarks.llamas import random_llama
from benchmarks.products import DEVICE, LLAMAS, load, probe, timed
from hpc_hess.curvature.differences.finite_difference import FiniteDifferenceHessian
from hpc_hess.curvature.exact.exact import ExactHessian
from hpc_hess.curvature.exact.gauss_newton import GaussNewton
from hpc_hess.curvature.exact.streaming import Settings
from hpc_hess.parallel import devices
from hpc_hess.parallel.memory import gigabytes, release_memory
from hpc_hess.profiling.flops import FlopCounter, matmul_rate

WAYS = {"exact": (ExactHessian, 1), "exact, 4 in lock-step": (ExactHessian, 4), "Gauss-Newton": (GaussNewton, 1)}


def _median(function: Callable[[], Any], repeats: int) -> float:
    function()
    return statistics.median(timed(function)[1] for _ in range(repeats))


def _peak() -> str:
    return gigabytes(torch.cuda.max_memory_allocated()) if DEVICE == "cuda" else ""


def measure(table: Table, config: dict[str, Any], form: str, repeats: int, programs: Path) -> None:
    """Add a row for each way, in one number format."""
    bfloat16, device = form == "bfloat16", torch.device(DEVICE)
    arithmetic = devices.tf32 if form == "tf32" else contextlib.nullcontext
    problem = load(config, "float32")
    out = problem.model.space.zeros()
    with arithmetic():
        rate = matmul_rate(device, torch.bfloat16 if bfloat16 else torch.float32)
        gradient_s = _median(lambda: problem.gradient(out), repeats)
    vectors = [probe(problem, k + 1) for k in range(4)]
    data = config["data"]
    common = {"format": form, "tokens": f"{data['sequences']} x {data['sequence_length']}"}
    for way, (kind, width) in WAYS.items():
        row: dict[str, Any] = {**common, "product": way}
        for compiled in (False, True):
            operator = kind(
                problem.model,
                problem.objective,
                compute_dtype=torch.bfloat16 if bfloat16 else None,
                settings=Settings(compile="on" if compiled else "off", programs=programs),
            )
            operator.arithmetic = arithmetic
            name = "compiled" if compiled else "eager"
            if DEVICE == "cuda":
                torch.cuda.reset_peak_memory_stats()
            try:
                if not compiled:
                    with FlopCounter() as counter:
                        operator.matmat(vectors[:width])
                seconds = _median(lambda operator=operator, width=width: operator.matmat(vectors[:width]), repeats) / width
            except torch.OutOfMemoryError:
                row[f"{name}, s"] = "does not fit"
                release_memory()
                continue
            row |= {
                f"{name}, s": seconds,
                f"{name}, fp32 gradients": seconds / gradient_s,
                f"{name}, of the arithmetic": f"{100 * counter.flops / width / seconds / rate:.0f} %",
                f"{name}, peak": _peak(),
            }
            if compiled and (made := operator.repaying._programs) is not None:
                row["compiling, s"] = made.seconds
                print(*(note for note in operator.notes if "compiled" in note), sep="\n")
            del operator
        table.add(row)
    if form == "float32":
        differences = FiniteDifferenceHessian(problem.gradient, "forward")
        seconds = _median(lambda: differences.matvec(vectors[0]), repeats)
        table.add(
            {**common, "product": "forward differences", "eager, s": seconds, "eager, fp32 gradients": seconds / gradient_s}
        )


@benchmark("Exact products with and without compiled blocks on a GPU", asked="40 % of the card's arithmetic in bfloat16")
def main(
    table: Table,
    model: Annotated[str, Option(choices=tuple(LLAMAS))] = "llama-1b",
    formats: tuple[str, ...] = ("float32", "tf32", "bfloat16"),
    shapes: Annotated[tuple[str, ...], "sequences x tokens"] = ("4x1024", "1x8192"),
    repeats: int = 2,
    programs: Annotated[str, "a directory of compiled programs"] = "",
) -> None:
    title, shape, *_ = LLAMAS[model]
    table.title = f"Exact products of {title} with and without compiled blocks, {DEVICE}"
    table.name = "compiled_gpu" if model == "llama-1b" else f"compiled_gpu_{model.replace('-', '_')}"
    with tempfile.TemporaryDirectory() as folder:
        for text in shapes:
            rows, length = map(int, text.split("x"))
            with random_llama(shape, rows, length) as config:
                for form in formats:
                    measure(table, config, form, repeats, Path(programs or folder))
                    release_memory()


if __name__ == "__main__":
    main()

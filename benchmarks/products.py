"""Every Hessian product: error against float64, and cost in gradients, on SmolLM2-135M or a random Llama.

``--model smollm2``: 2 x 128 tokens of the GPL-3. ``--model llama-1b`` and ``llama-05b`` (a GPU): 4 x 1024 random tokens;
``toy`` tries that path anywhere. ``--only TEXT``: rows whose name holds it. The reference is the exact product in
float64. "dominant" is the eigenvector of largest |eigenvalue|, from Lanczos steps with the exact product in float32 (its
residual is printed). Costs are medians, and each product is timed next to gradients of the same run: base gradient and
calibration are apart.
"""

from __future__ import annotations

import contextlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch

from benchmarks.frame import Option, Table, benchmark
from benchmarks.llamas import random_llama
from hpc_hess.config import make_config
from hpc_hess.console.progress import make_progress
from hpc_hess.curvature.differences.finite_difference import FiniteDifferenceHessian
from hpc_hess.curvature.exact.exact import ExactHessian
from hpc_hess.curvature.exact.gauss_newton import GaussNewton
from hpc_hess.curvature.exact.streaming import Settings
from hpc_hess.linalg.lanczos import Lanczos
from hpc_hess.parallel.basis import Basis
from hpc_hess.parallel.memory import gigabytes, release_memory, reusing_freed_pages
from hpc_hess.parallel.vector import Vector
from hpc_hess.parallel.world import World
from hpc_hess.session.problem import Problem, load_problem
from hpc_hess.session.reference import extreme_ritz_vector, start_vector

NUM_PROBES = 5
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# every head with keys and values of its own: PyTorch's memory-efficient attention takes no grouped ones
_WIDE = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "vocab_size": 32768,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
}
LLAMAS = {  # title, shape, rows, tokens in a row
    "llama-1b": ("a random Llama of 1.1 B parameters", {**_WIDE, "num_hidden_layers": 16}, 4, 1024),
    "llama-05b": ("a random Llama of 0.47 B parameters", {**_WIDE, "num_hidden_layers": 6}, 4, 1024),
    "toy": (
        "a random toy",
        {
            "hidden_size": 128,
            "intermediate_size": 352,
            "num_hidden_layers": 5,
            "vocab_size": 1024,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
        },
        2,
        64,
    ),
}


@dataclass(frozen=True)
class Asked:
    """What the product should reach: error on random vectors, on the dominant eigenvector, gradients."""

    random: str = ""
    dominant: str = ""
    cost: str = ""


@contextlib.contextmanager
def subject(model: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Give a model's title and its configuration."""
    if model == "smollm2":
        data = {"source": "text:launch/data/gpl-3.txt", "sequence_length": 128, "sequences": 2}
        yield "SmolLM2-135M, 2 x 128 tokens", {"model": {}, "data": data}
        return
    title, shape, rows, length = LLAMAS[model]
    with random_llama(shape, rows, length) as config:
        yield f"{title}, {rows} x {length} tokens, {DEVICE}", config


def load(config: dict[str, Any], dtype: str) -> Problem:
    model = {**config["model"], "master_dtype": dtype, "compute_dtype": dtype}
    return load_problem(make_config({**config, "model": model}), World.alone(DEVICE), make_progress(True, 1))


def probe(problem: Problem, k: int) -> Vector:
    return start_vector(problem.model.space, 0, k, "gaussian")


def dominant(problem: Problem, operator: Any, steps: int) -> tuple[Vector, float, float]:
    """Return the Ritz vector of largest |Ritz value|, the value, and its residual."""
    process = Lanczos(operator, Basis(problem.model.space, steps), steps)
    process.start(probe(problem, 0))
    while not process.finished:
        process.step()
    return extreme_ritz_vector(process)


def settle() -> None:
    """Wait until the device has done all it was given."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def timed(function: Callable[[], Any]) -> tuple[Any, float]:
    settle()
    began = time.perf_counter()
    value = function()
    settle()
    return value, time.perf_counter() - began


class Products:
    """Measures products of one problem against references.

    Vectors and references wait in host memory: those of a large model would not fit a GPU beside what is measured.
    """

    def __init__(
        self, table: Table, problem: Problem, vectors: list[torch.Tensor], references: list[torch.Tensor], only: str
    ) -> None:
        self.table, self.problem, self.vectors, self.references, self._only = table, problem, vectors, references, only
        self.gradient_s: list[float] = []
        self._out = problem.model.space.zeros()

    def gradient(self) -> float:
        """Return the seconds of a gradient now."""
        self.gradient_s.append(timed(lambda: self.problem.gradient(self._out))[1])
        return self.gradient_s[-1]

    def row(
        self, name: str, asked: Asked, product: Callable[[Vector], tuple[Vector, float]], *, errors: bool = True
    ) -> None:
        """Measure one product on every vector."""
        if self._only not in name:
            return
        found, costs, seconds, peak = [], [], [], 0.0
        space = self.problem.model.space
        for waiting, reference in zip(self.vectors, self.references, strict=True):
            v = space.wrap(waiting.to(space.device))
            near = self.gradient()
            if DEVICE == "cuda":
                torch.cuda.reset_peak_memory_stats()
            try:
                result, spent = product(v)
            except torch.OutOfMemoryError as error:
                self.table.add({"method": name, "asked": asked.cost, "seconds": "does not fit"})
                print(f"{name}: {error}", flush=True)
                release_memory()
                return
            if DEVICE == "cuda":
                peak = max(peak, torch.cuda.max_memory_allocated())
            if errors:
                against = reference.to(space.device)
                found.append(float((result.data - against).norm() / against.norm()))
                del against
            del result
            seconds.append(spent)
            costs.append(spent / (0.5 * (near + self.gradient())))
        row: dict[str, Any] = {"method": name}
        if errors:
            row |= {
                "error, random": statistics.median(found[:NUM_PROBES]),
                "asked ": asked.random,
                "error, dominant": found[-1],
                "asked  ": asked.dominant,
            }
        row |= {"cost in gradients": statistics.median(costs), "asked": asked.cost, "seconds": statistics.median(seconds)}
        if peak:
            row["peak memory"] = gigabytes(peak)
        self.table.settings["gradient, s (median)"] = round(statistics.median(self.gradient_s), 3)
        self.table.add(row)


def measure(table: Table, config: dict[str, Any], power_steps: int, only: str, fast_bfloat16: bool, programs: Path) -> None:
    problem = load(config, "float32")
    settings = Settings(compile="on", programs=programs)
    exact = ExactHessian(problem.model, problem.gradient.objective, settings=settings)
    top, value, residual = dominant(problem, exact, power_steps)
    table.settings |= {"dominant eigenvalue": f"{value:.6g}", "its residual": f"{residual:.2g}"}
    vectors = [probe(problem, k + 1).data.cpu() for k in range(NUM_PROBES)] + [top.data.cpu()]
    del top
    with same_weights(problem, config) as stored:
        references = references_in_float64(stored, vectors)

    products = Products(table, problem, vectors, references, only)
    products.gradient()

    def plain(operator: Any) -> Callable[[Vector], tuple[Vector, float]]:
        operator.matvec(probe(problem, 1))  # compiles
        return lambda v: timed(lambda: operator.matvec(v))

    def operator(
        kind: type[ExactHessian] | type[GaussNewton] = ExactHessian,
        *,
        keep_state: bool = False,
        compute_dtype: torch.dtype | None = None,
    ) -> Any:
        chosen = replace(settings, keep_state=keep_state)
        return kind(problem.model, problem.gradient.objective, compute_dtype=compute_dtype, settings=chosen)

    asked = Asked("<= 3e-5", "<= 2e-5", "<= 3.2")
    products.row("exact fp32, one vector, recomputing", asked, plain(exact))
    products.row("exact fp32, one vector, keeping state", replace(asked, cost="<= 2.7"), plain(operator(keep_state=True)))

    exact.matmat([probe(problem, 1)] * 4)

    def lock_step(v: Vector) -> tuple[Vector, float]:
        others = [probe(problem, 10 + k) for k in range(3)]
        results, seconds = timed(lambda: exact.matmat([v, *others]))
        return results[0], seconds / 4

    products.row("exact fp32, 4 in lock-step, per vector", replace(asked, cost="<= 2.3"), lock_step)
    if fast_bfloat16:  # most CPUs have none
        bfloat16 = operator(compute_dtype=torch.bfloat16)
        products.row("exact bf16 (fp32 masters), one vector", Asked(), plain(bfloat16))
    for scheme, limits in (
        ("fourth", Asked("<= 4e-4", "<= 1e-3", "<= 4.2")),
        ("central", Asked("<= 1e-3", "<= 2.5e-3", "<= 2.1")),
        ("forward", Asked("<= 6e-3", "<= 1.5e-2", "<= 1.1")),
    ):
        differences = FiniteDifferenceHessian(problem.gradient, scheme)  # type: ignore[arg-type]

        def product(v: Vector, operator: FiniteDifferenceHessian = differences) -> tuple[Vector, float]:
            result, seconds = timed(lambda: operator.matvec(v))
            record = operator.records[-1]
            print(f"  step {record.step:.3g} realised {record.realised:.6f} predicted {record.predicted_error:.2g}")
            return result, seconds - record.calibration_s

        products.row(f"{scheme} differences, fp32", limits, product)
        del differences, product
    products.row("Gauss-Newton, exact fp32", Asked(cost="<= 2.0"), plain(operator(GaussNewton)), errors=False)


@contextlib.contextmanager
def same_weights(problem: Problem, config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Give a configuration that reads a random model's weights from a file: drawing a billion takes a minute."""
    if problem.source.kind != "random":
        yield config
        return
    with tempfile.TemporaryDirectory() as folder:
        problem.model.module.save_pretrained(folder)  # type: ignore[operator]
        yield {**config, "model": {**config["model"], "source": folder}}


def references_in_float64(config: dict[str, Any], vectors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Return the exact products in float64, rounded to float32, in host memory."""
    problem = load(config, "float64")
    operator = ExactHessian(problem.model, problem.gradient.objective)
    space = problem.model.space
    found = [operator.matvec(space.wrap(v.to(space.device).double())).data.float().cpu() for v in vectors]
    del operator, problem, space
    release_memory()
    return found


@benchmark("Hessian products")
def main(
    table: Table,
    model: Annotated[str, Option(choices=("smollm2", *LLAMAS))] = "smollm2",
    power_steps: int = 12,
    micro_batch: int = 1,
    only: Annotated[str, "rows whose name holds this text"] = "",
) -> None:
    table.name = "products" if model == "smollm2" else f"products_{model.replace('-', '_')}"
    table.settings |= {
        "probes": NUM_PROBES,
        "threads": torch.get_num_threads(),
        "TF32": "off",
        "attention": "sdpa for gradients, closed forms for exact products",
        "exact products": "compiled",
        "freed memory": "kept for what is measured next",
    }
    if only:
        table.name += f"_{only.split()[0]}"
    # the host of a virtual machine takes idle pages back, and a fresh vector would wait seconds for them
    with reusing_freed_pages(), subject(model) as (title, config), tempfile.TemporaryDirectory() as programs:
        table.title = f"Hessian products on {title}"
        config["data"]["micro_batch"] = micro_batch
        measure(table, config, power_steps, only, fast_bfloat16=model != "smollm2", programs=Path(programs))


if __name__ == "__main__":
    main()

"""Every Hessian product on SmolLM2-135M, 2 x 128 tokens of the GPL-3: error against float64, and cost in gradients.

The reference is the exact product in float64. "dominant" is the eigenvector of largest |eigenvalue|, from 30 Lanczos
steps with the exact product in float32 (its residual is printed). Costs are medians, and each product is timed next to
gradients of the same run: base gradient and calibration are apart.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from scipy.linalg import eigh_tridiagonal

from benchmarks.common import write
from hpc_hess.config import make_config
from hpc_hess.curvature.exact import ExactHessian
from hpc_hess.curvature.finite_difference import FiniteDifferenceHessian
from hpc_hess.curvature.gauss_newton import GaussNewton
from hpc_hess.curvature.streaming import Settings
from hpc_hess.linalg import probes
from hpc_hess.linalg.lanczos import Lanczos
from hpc_hess.parallel.vector import Basis, Vector
from hpc_hess.parallel.world import World
from hpc_hess.problem import Problem, load_problem
from hpc_hess.report.progress import make_progress

NUM_PROBES = 5


def load(dtype: str, **model: Any) -> Problem:
    config = make_config({
        "model": {"master_dtype": dtype, "compute_dtype": dtype, **model},
        "data": {"source": "text:launch/data/gpl-3.txt", "sequence_length": 128, "sequences": 2},
    })  # fmt: skip
    return load_problem(config, World.alone(), make_progress(True, 1))


def probe(problem: Problem, k: int) -> Vector:
    space = problem.model.space
    v = space.zeros()
    probes.fill(v.data, *space.shard.global_intervals, seed=0, probe=k, distribution="gaussian")
    return v.scale_(1 / v.norm())


def dominant(problem: Problem, operator: Any, steps: int) -> tuple[Vector, float, float]:
    """Return the Ritz vector of largest |Ritz value|, the value, and its residual."""
    basis = Basis(problem.model.space, steps)
    process = Lanczos(operator, basis, steps)
    process.start(probe(problem, 0))
    while not process.finished:
        process.step()
    values, vectors = eigh_tridiagonal(np.array(process.alpha), np.array(process.beta[:-1]))
    i = int(np.abs(values).argmax())
    y = basis.combine(torch.from_numpy(np.ascontiguousarray(vectors[:, i])))
    return y.scale_(1 / y.norm()), float(values[i]), abs(process.beta[-1] * float(vectors[-1, i]))


def timed(function: Callable[[], Any]) -> tuple[Any, float]:
    began = time.perf_counter()
    value = function()
    return value, time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--power-steps", type=int, default=30)
    args = parser.parse_args()
    problem = load("float32")
    exact = ExactHessian(problem.model, problem.gradient.objective)
    top, value, residual = dominant(problem, exact, args.power_steps)
    print(f"dominant eigenvalue {value:.6g}, residual {residual:.2g}", flush=True)
    vectors = [probe(problem, k + 1) for k in range(NUM_PROBES)] + [top]

    reference_problem = load("float64")
    reference = ExactHessian(reference_problem.model, reference_problem.gradient.objective)
    space = reference_problem.model.space
    references = [reference.matvec(space.wrap(v.data.double())).data.float() for v in vectors]
    del reference, reference_problem

    def error(product: Vector, k: int) -> float:
        return float((product.data - references[k]).norm() / references[k].norm())

    gradient_s: list[float] = []

    def gradient_now() -> float:
        gradient_s.append(timed(problem.gradient)[1])
        return gradient_s[-1]

    gradient_now()
    rows: list[dict[str, Any]] = []

    def measure(name: str, asked: tuple[Any, Any, Any], product: Callable[[Vector], tuple[Vector, float]]) -> None:
        errors, costs = [], []
        for k, v in enumerate(vectors):
            near = gradient_now()
            result, seconds = product(v)
            errors.append(error(result, k))
            costs.append(seconds / (0.5 * (near + gradient_now())))
        rows.append({
            "method": name, "error, random": statistics.median(errors[:NUM_PROBES]), "asked ": asked[0],
            "error, dominant": errors[-1], "asked  ": asked[1],
            "cost in gradients": statistics.median(costs), "asked": asked[2],
        })  # fmt: skip
        save()

    def save() -> None:
        """After every row: a run that is cut off leaves what it measured."""
        write("products", "Hessian products on SmolLM2-135M, 2 x 128 tokens", rows,
              {"probes": NUM_PROBES, "dominant eigenvalue": f"{value:.6g}", "its residual": f"{residual:.2g}",
               "gradient, s (median)": round(statistics.median(gradient_s), 2), "threads": torch.get_num_threads(),
               "attention": "sdpa for gradients, math for exact products"})  # fmt: skip

    def plain(operator: Any) -> Callable[[Vector], tuple[Vector, float]]:
        return lambda v: timed(lambda: operator.matvec(v))

    measure("exact fp32, one vector, recomputing", ("<= 3e-5", "<= 2e-5", "<= 3.7"), plain(exact))
    keeping = ExactHessian(problem.model, problem.gradient.objective, settings=Settings(keep_state=True))
    measure("exact fp32, one vector, keeping state", ("<= 3e-5", "<= 2e-5", "<= 2.9"), plain(keeping))

    def lock_step(v: Vector) -> tuple[Vector, float]:
        others = [probe(problem, 10 + k) for k in range(3)]
        results, seconds = timed(lambda: exact.matmat([v, *others]))
        return results[0], seconds / 4

    measure("exact fp32, 4 in lock-step, per vector", ("<= 3e-5", "<= 2e-5", "<= 2.5"), lock_step)
    for scheme, asked in (("fourth", ("<= 4e-4", "<= 1e-3", "<= 4.2")), ("central", ("<= 1e-3", "<= 2.5e-3", "<= 2.1")),
                          ("forward", ("<= 6e-3", "<= 1.5e-2", "<= 1.05"))):  # fmt: skip
        operator = FiniteDifferenceHessian(problem.gradient, scheme)  # type: ignore[arg-type]

        def product(v: Vector, operator: FiniteDifferenceHessian = operator) -> tuple[Vector, float]:
            result, seconds = timed(lambda: operator.matvec(v))
            record = operator.records[-1]
            print(f"  step {record.step:.3g} realised {record.realised:.6f} predicted {record.predicted_error:.2g}")
            return result, seconds - record.calibration_s

        measure(scheme, asked, product)
    del operator
    gauss_newton = GaussNewton(problem.model, problem.gradient.objective)
    costs = []
    for v in vectors[:NUM_PROBES]:
        near = gradient_now()
        seconds = timed(lambda v=v: gauss_newton.matvec(v))[1]
        costs.append(seconds / (0.5 * (near + gradient_now())))
    rows.append({"method": "Gauss-Newton, exact fp32", "cost in gradients": statistics.median(costs), "asked": "<= 2.1"})
    save()


if __name__ == "__main__":
    main()

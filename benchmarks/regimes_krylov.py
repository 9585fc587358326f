"""What the error of a product does to a Krylov process: copies, lost orthogonality, values outside the spectrum.

Lanczos on a Llama-shaped toy small enough for its dense float64 Hessian and Gauss-Newton matrix, whose eigenvalues
judge every run. Its parameters are such that bfloat16 can hold them, so that every number format computes the same
function. The same start vector everywhere. Measured at every step:

* orthogonality: largest |<v_i, v_j>|, i != j;
* excess: Ritz values beyond a gap of the true spectrum, less the eigenvalues beyond it, largest over gaps of at least
  1 % of the spectrum's range. Cauchy interlacing forbids any for an orthonormal basis and an exact product, so each is
  an artefact: a ghost (a copy of a converged eigenvalue) or spurious;
* overshoot: how far the Ritz values leave the spectrum; below, above: how many lie outside it by over 1 % of its range;
* extreme: error of lambda_max and lambda_min, the larger one;
* wasserstein: between the quadrature and that of the exact float64 product with full reorthogonalisation at the same step;
* for the Gauss-Newton matrix, which is positive semi-definite: the most negative Ritz value, the weight of all below
  zero, and how many lie below -1e-6 lambda_max.
Values are relative to the spectrum's range (Gauss-Newton: lambda_max).
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import wasserstein_distance

from benchmarks.frame import Table, benchmark, machine
from benchmarks.llamas import random_llama
from benchmarks.regimes_curves import KRYLOV_CURVES
from benchmarks.regimes_formats import BFloat16Objective, hold_bfloat16_weights, load
from hpc_hess.curvature.differences.finite_difference import FiniteDifferenceHessian
from hpc_hess.curvature.exact.exact import ExactHessian, StreamedOperator
from hpc_hess.curvature.exact.gauss_newton import GaussNewton
from hpc_hess.errors import NumericsError
from hpc_hess.linalg.lanczos import Lanczos
from hpc_hess.linalg.operator import LinearOperator
from hpc_hess.linalg.quadrature import Ritz, ritz
from hpc_hess.model.sharded.gradient import Gradient
from hpc_hess.parallel.basis import Basis
from hpc_hess.parallel.vector import Vector
from hpc_hess.session.problem import Problem
from hpc_hess.session.reference import start_vector

Float = NDArray[np.float64]
SHAPE = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 48}
ROWS, LENGTH, STEPS = 2, 32, 100
FIXED = (1e-3, 1e-2, 1e-1)


def dense(operator: StreamedOperator) -> torch.Tensor:
    """Return the matrix of an operator, symmetrised."""
    n, width = operator.space.size, 64
    matrix = torch.empty(n, n, dtype=torch.float64)
    for first in range(0, n, width):
        units = []
        for i in range(first, min(first + width, n)):
            units.append(operator.space.zeros())
            units[-1].data[i] = 1.0
        for i, column in enumerate(operator.matmat(units)):
            matrix[first + i] = column.data
    return matrix.add_(matrix.T.clone()).mul_(0.5)


@dataclass(frozen=True)
class Truth:
    """A matrix and its eigenvalues, ascending."""

    matrix: torch.Tensor
    values: Float

    @property
    def scale(self) -> float:
        """The spectrum's range."""
        return float(self.values[-1] - self.values[0])

    def excess(self, nodes: Float) -> int:
        """Return Ritz values beyond a gap less eigenvalues beyond it, the largest such number."""
        gaps = np.flatnonzero(np.diff(self.values) >= 0.01 * self.scale)
        middles = 0.5 * (self.values[gaps] + self.values[gaps + 1])
        above = (nodes[:, None] > middles).sum(0) - (self.values[:, None] > middles).sum(0)
        below = (nodes[:, None] < middles).sum(0) - (self.values[:, None] < middles).sum(0)
        positive, negative = above[middles > 0], below[middles < 0]
        return int(max(positive.max(initial=0), negative.max(initial=0), 0))


@dataclass
class Watched:
    """An operator that notes the error of each product against the dense matrix."""

    inner: LinearOperator
    truth: Truth
    errors: list[float] = field(default_factory=list)

    @property
    def space(self) -> Any:
        return self.inner.space

    def matvec(self, v: Vector) -> Vector:
        product = self.inner.matvec(v)
        true = self.truth.matrix @ v.data.double()
        self.errors.append(float((product.data.double() - true).norm() / true.norm()))
        return product


def lanczos(operator: LinearOperator, truth: Truth, reorthogonalise: str) -> tuple[Lanczos, list[float], str]:
    """Run Lanczos, keeping every vector; return it, the products' errors and why it ended early ("" if it did not)."""
    watched = Watched(operator, truth)
    process = Lanczos(watched, Basis(operator.space, STEPS), STEPS, reorthogonalise)
    process.start(start_vector(operator.space, 0, 0, "rademacher"))
    end = ""
    while not process.finished:
        try:
            process.step()
        except NumericsError as error:
            end = str(error)
            break
    return process, watched.errors, "breakdown" if process.broke_down else end


def measure(process: Lanczos, errors: list[float], truth: Truth, reference: list[Ritz] | None) -> dict[str, Any]:
    """Return every measure as a list over steps."""
    m = process.step_count
    rows = process.basis.rows[:m].double()
    gram = (rows @ rows.T).abs().fill_diagonal_(0).cummax(0).values.cummax(1).values.diagonal().tolist()
    quadratures = [ritz(process.alpha[:k], process.beta[:k]) for k in range(1, m + 1)]
    low, high, scale = truth.values[0], truth.values[-1], truth.scale
    series: dict[str, list[float]] = {"product_error": errors, "orthogonality": gram}
    series["excess"] = [truth.excess(q.values) for q in quadratures]
    series["overshoot"] = [max(q.values[-1] - high, low - q.values[0], 0.0) / scale for q in quadratures]
    for side, sign, edge in (("below", -1, low), ("above", 1, high)):
        series[side] = [int((sign * (q.values - edge) > 0.01 * scale).sum()) for q in quadratures]
    series["extreme"] = [max(abs(q.values[-1] - high), abs(q.values[0] - low)) / scale for q in quadratures]
    series["lowest"] = [q.values[0] / high for q in quadratures]
    series["negative_weight"] = [float(q.weights[q.values < 0].sum()) for q in quadratures]
    series["negative_count"] = [int((q.values < -1e-6 * high).sum()) for q in quadratures]
    if reference:
        series["wasserstein"] = [
            wasserstein_distance(q.values, r.values, q.weights, r.weights) / scale
            for q, r in zip(quadratures, reference, strict=False)
        ]
    short = {k: [float(f"{x:.4g}") for x in v] for k, v in series.items()}
    return {"asymmetry": process.asymmetry / scale, **short, "alpha": process.alpha, "beta": process.beta}


def operators(wide: Problem, narrow: Problem) -> dict[str, Any]:
    """Return for each kind of product a function that builds its operator: a step controller serves one run."""
    half = Gradient(narrow.model, BFloat16Objective(narrow.objective))

    def exact(kind: type[StreamedOperator], problem: Problem, compute: torch.dtype | None = None) -> Any:
        return lambda: kind(problem.model, problem.objective, compute_dtype=compute)

    def difference(gradient: Gradient, step: Any) -> Any:
        return lambda: FiniteDifferenceHessian(gradient, "central", step)

    products = {
        "exact float64": exact(ExactHessian, wide),
        "exact float32": exact(ExactHessian, narrow),
        "exact bfloat16": exact(ExactHessian, narrow, torch.bfloat16),
        "central float32, auto": difference(narrow.gradient, "auto"),
        **{f"central float32, {eps:g}": difference(narrow.gradient, eps) for eps in FIXED},
        "central bfloat16, auto": difference(half, "auto"),
    }
    gauss_newton = {
        "exact float64": exact(GaussNewton, wide),
        "exact float32": exact(GaussNewton, narrow),
        "exact bfloat16": exact(GaussNewton, narrow, torch.bfloat16),
    }
    return {"hessian": products, "gauss_newton": gauss_newton}


@benchmark(
    "Lanczos with products of different quality, 100 steps, against a dense float64 spectrum",
    note=(__doc__ or "").split("\n\n", 1)[1],
)
def main(table: Table) -> None:
    runs: list[dict[str, Any]] = []
    spectra: dict[str, list[float]] = {}
    table.settings |= {"tokens": f"{ROWS} x {LENGTH}", "steps": STEPS, "start": "rademacher, seed 0"}
    with random_llama(SHAPE, ROWS, LENGTH) as config:
        wide, narrow = load(config, "float64"), load(config, "float32")
        for problem in (wide, narrow):
            hold_bfloat16_weights(problem)
        for matrix, products in operators(wide, narrow).items():
            full = dense(products["exact float64"]())
            table.settings["parameters"] = len(full)
            truth = Truth(full, torch.linalg.eigvalsh(full).numpy())
            spectra[matrix] = [*truth.values[:10].tolist(), *truth.values[-10:].tolist()]
            print(f"{matrix}: {len(full)} eigenvalues, {truth.values[0]:.4g} to {truth.values[-1]:.4g}", flush=True)
            reference: list[Ritz] | None = None
            for name, build in products.items():
                for reorthogonalise in ("full", "none"):
                    process, errors, end = lanczos(build(), truth, reorthogonalise)
                    if reference is None:
                        reference = [ritz(process.alpha[:k], process.beta[:k]) for k in range(1, STEPS + 1)]
                    found = measure(process, errors, truth, reference)
                    runs.append(
                        {
                            "matrix": matrix,
                            "product": name,
                            "reorthogonalise": reorthogonalise,
                            "steps": process.step_count,
                            "end": end,
                            **found,
                        }
                    )
                    table.add(summary(runs[-1]))
    (table.folder / KRYLOV_CURVES).write_text(json.dumps({"machine": machine(), "spectra": spectra, "runs": runs}) + "\n")


def summary(run: dict[str, Any]) -> dict[str, Any]:
    """One row of the table: the state after the last step."""
    last = {k: v[-1] for k, v in run.items() if isinstance(v, list)}
    first = next((k + 1 for k, x in enumerate(run["excess"]) if x > 0), None)
    row = {
        "matrix": run["matrix"],
        "product": run["product"],
        "reorthogonalise": run["reorthogonalise"],
        "steps": run["steps"],
        "product error, first": run["product_error"][0],
        "median": float(np.median(run["product_error"])),
        "worst": max(run["product_error"]),
        "orthogonality": last["orthogonality"],
        "excess": int(max(run["excess"])),
        "from step": first or "",
        "overshoot": last["overshoot"],
        "below, above": f"{last['below']:g}, {last['above']:g}",
        "extreme": last["extreme"],
        "wasserstein": last["wasserstein"],
        "asymmetry": run["asymmetry"] if run["reorthogonalise"] == "full" else "",
    }
    if run["matrix"] == "gauss_newton":
        row |= {
            "lowest": last["lowest"],
            "negative weight": last["negative_weight"],
            "negative values": int(last["negative_count"]),
        }
    return row


if __name__ == "__main__":
    main()

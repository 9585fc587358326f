"""The inverse on the gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hpc_hess.linalg import solve
from hpc_hess.linalg.measure import Recurrence
from hpc_hess.linalg.quadrature import ritz
from hpc_hess.parallel.vector import Vector
from hpc_hess.studies.base import Bench, Inputs, Recipe
from hpc_hess.studies.inverse.settings import Settings


def suggested_damping(recurrences: Sequence[Recurrence]) -> float:
    """Return a damping that makes the matrix positive definite, from the quadrature: no eigenvalue is left near zero.

    1.1 times what the lowest Ritz value and its residual reach below zero, and at least a hundredth of the largest.
    """
    quadratures = [ritz(alpha, beta) for alpha, beta in recurrences]
    lowest = min(float(q.values[0] - q.residuals[0]) for q in quadratures)
    largest = max(float(q.values[-1]) for q in quadratures)
    return max(-1.1 * lowest, 0.01 * abs(largest))


def inverse_study(bench: Bench) -> dict[str, Any]:
    """Solve (A + damping I) x = gradient, as influence functions need; keep x as a row. Collective: yes."""
    settings, gradient = Settings.of(bench.config), bench.gradient()
    damping = bench.keep.numbers(
        lambda: [suggested_damping(bench.recurrences) if settings.damping == "auto" else float(settings.damping)]
    )[0]
    method = solve.minres if settings.method == "minres" else solve.conjugate_gradients
    solution = method(
        bench.operator, gradient, damping=damping, tolerance=settings.tolerance, most=settings.products, keep=bench.keep
    )
    bench.save_vectors("x", [solution.x])
    residual = _true_residual(bench, solution.x, gradient, damping)
    return {
        "method": settings.method,
        "damping": damping,
        "suggested": settings.damping == "auto",
        "tolerance": settings.tolerance,
        "residuals": solution.residuals,
        "true_residual": residual,
        "converged": residual <= 2 * settings.tolerance,
        "norm": solution.x.norm(),
        "gradient_norm": gradient.norm(),
        "self_influence": solution.x.dot(gradient),
        "store": "studies/inverse/x",
    }


def _true_residual(bench: Bench, x: Vector, b: Vector, damping: float) -> float:
    """Return |b - (A + damping I) x| / |b| by one more product: the recurrence's own may drift from it."""

    def measure() -> list[float]:
        rest = bench.operator.matvec(x).axpy_(damping, x).axpy_(-1.0, b)
        return [rest.norm() / (b.norm() or 1.0)]

    return bench.keep.numbers(measure)[0]


def _damping(inputs: Inputs) -> dict[str, Any]:
    automatic = Settings.of(inputs.config).damping == "auto"
    return {"damping": suggested_damping(inputs.recurrences)} if automatic else {}


RECIPE = Recipe(inverse_study, lambda config: Settings.of(config).products, "products", came_from=_damping)

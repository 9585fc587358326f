"""Studies that estimate one thing of the matrix: its trace, its diagonal, its inverse on the gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hpc_hess.analysis.localisation import group_of
from hpc_hess.analysis.study import Bench
from hpc_hess.linalg import solve, trace
from hpc_hess.linalg.diagonal import DiagonalEstimate, diagonal_hutchinson, xdiag
from hpc_hess.linalg.measure import Recurrence
from hpc_hess.linalg.quadrature import Estimate, ritz
from hpc_hess.linalg.sampling import StoppingRule
from hpc_hess.parallel.vector import Vector

_FIRST_PROBE = 1 << 16  # the quadrature's own probes come before


def trace_study(bench: Bench) -> dict[str, Any]:
    """Estimate the trace, and with Hutchinson's samples the Frobenius norm. Collective: yes."""
    method, most, operator = bench.settings.trace, bench.settings.samples, bench.operator
    found: dict[str, Any] = {"method": method, "products": most}
    if method == "hutchinson":
        moments = trace.hutchinson(
            operator, StoppingRule(0.0, most=most), seed=bench.seed, first_probe=_FIRST_PROBE, keep=bench.keep
        )
        return found | _estimate("trace", moments.trace_estimate) | _estimate("frobenius", moments.frobenius_estimate)
    if method == "hutch++":
        estimate = trace.hutch_plus_plus(operator, bench.basis(most // 3), most, seed=bench.seed, keep=bench.keep)
    else:
        estimate = trace.xtrace(operator, bench.basis(most // 2), most, seed=bench.seed, keep=bench.keep)
    return found | _estimate("trace", estimate)


def _estimate(name: str, estimate: Estimate) -> dict[str, Any]:
    return {name: estimate.mean, f"{name}_stderr": estimate.stderr}


def diagonal_study(bench: Bench) -> dict[str, Any]:
    """Estimate the diagonal entry by entry; keep it and its standard errors as two rows. Collective: yes."""
    method, products = bench.settings.diagonal, bench.settings.samples
    if method == "xdiag":
        half = products // 2
        estimate = xdiag(
            bench.operator, bench.basis(half), bench.basis(half), products, seed=bench.seed, keep=bench.keep
        )
    else:
        estimate = diagonal_hutchinson(
            bench.operator, most=products, seed=bench.seed, first_probe=_FIRST_PROBE, keep=bench.keep
        )
    bench.save_vectors("diagonal", [estimate.mean, estimate.stderr])
    norm = estimate.mean.norm()
    return {
        "method": method, "products": estimate.num_products, "norm": norm, "relative_error": estimate.relative_error,
        "store": "studies/diagonal/diagonal", "groups": _groups(estimate),
    }  # fmt: skip


def _groups(estimate: DiagonalEstimate) -> dict[str, dict[str, float]]:
    """Sum entries and their variances by block or module: the trace of each, and its standard error. Collective: yes."""
    mean, stderr = estimate.mean, estimate.stderr
    pieces = mean.space.shard.pieces
    sums = mean.data.new_zeros((len(pieces), 2), dtype=mean.data.double().dtype)
    for number, piece in enumerate(pieces):
        sums[number, 0] = mean.data[piece.start : piece.stop].double().sum()
        sums[number, 1] = stderr.data[piece.start : piece.stop].double().square().sum()
    totals = mean.space.sum(sums.flatten(), "diagonal by group").view_as(sums).tolist()
    groups: dict[str, dict[str, float]] = {}
    for piece, (value, variance) in zip(pieces, totals, strict=True):
        group = groups.setdefault(group_of(piece.parameter.name), {"sum": 0.0, "variance": 0.0, "entries": 0})
        group["sum"] += value
        group["variance"] += variance
        group["entries"] += piece.parameter.numel
    return groups


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
    settings, gradient = bench.settings, bench.gradient()
    damping = bench.keep.numbers(
        lambda: [suggested_damping(bench.recurrences) if settings.damping == "auto" else float(settings.damping)]
    )[0]
    method = solve.minres if settings.inverse == "minres" else solve.conjugate_gradients
    solution = method(
        bench.operator, gradient, damping=damping, tolerance=settings.inverse_tolerance, most=settings.inverse_products,
        keep=bench.keep,
    )  # fmt: skip
    bench.save_vectors("x", [solution.x])
    residual = _true_residual(bench, solution.x, gradient, damping)
    return {
        "method": settings.inverse, "damping": damping, "suggested": settings.damping == "auto",
        "tolerance": settings.inverse_tolerance, "residuals": solution.residuals, "true_residual": residual,
        "converged": residual <= 2 * settings.inverse_tolerance, "norm": solution.x.norm(),
        "gradient_norm": gradient.norm(), "self_influence": solution.x.dot(gradient), "store": "studies/inverse/x",
    }  # fmt: skip


def _true_residual(bench: Bench, x: Vector, b: Vector, damping: float) -> float:
    """Return |b - (A + damping I) x| / |b| by one more product: the recurrence's own may drift from it."""

    def measure() -> list[float]:
        rest = bench.operator.matvec(x).axpy_(damping, x).axpy_(-1.0, b)
        return [rest.norm() / (b.norm() or 1.0)]

    return bench.keep.numbers(measure)[0]

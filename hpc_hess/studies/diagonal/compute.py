"""The diagonal, entry by entry."""

from __future__ import annotations

from typing import Any

from hpc_hess.linalg.diagonal import DiagonalEstimate, diagonal_hutchinson, xdiag
from hpc_hess.studies.base import FIRST_PROBE, Bench, Recipe
from hpc_hess.studies.diagonal.settings import Settings
from hpc_hess.studies.localisation import group_of


def diagonal_study(bench: Bench) -> dict[str, Any]:
    """Estimate the diagonal entry by entry; keep it and its standard errors as two rows. Collective: yes."""
    settings = Settings.of(bench.config)
    method, products = settings.method, settings.samples
    if method == "xdiag":
        half = products // 2
        estimate = xdiag(bench.operator, bench.basis(half), bench.basis(half), products, seed=bench.seed, keep=bench.keep)
    else:
        estimate = diagonal_hutchinson(
            bench.operator, most=products, seed=bench.seed, first_probe=FIRST_PROBE, keep=bench.keep
        )
    bench.save_vectors("diagonal", [estimate.mean, estimate.stderr])
    norm = estimate.mean.norm()
    return {
        "method": method,
        "products": estimate.num_products,
        "norm": norm,
        "relative_error": estimate.relative_error,
        "store": "studies/diagonal/diagonal",
        "groups": by_group(estimate),
    }


def by_group(estimate: DiagonalEstimate) -> dict[str, dict[str, float]]:
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


RECIPE = Recipe(diagonal_study, lambda config: Settings.of(config).samples)

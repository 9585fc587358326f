"""How wrong are block-diagonal approximations (Granziol and Juarev 2026)? Products, spectra, and one layer for the whole.

Optimisers and attribution methods keep the diagonal blocks of the Hessian only: by layer, by tensor, by attention head, by
row. Here block(A) v is compared with A v for a random vector, the gradient and eigenvectors, and the eigenvalues of the
blocks with those of A.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import astuple, fields
from functools import partial
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np

from hpc_hess.config import Config
from hpc_hess.linalg import probes
from hpc_hess.linalg.blockwise import Comparison, block_product, block_samples, block_spectra, compare_exact, compare_sampled
from hpc_hess.linalg.measure import Recurrence, wasserstein_a_posteriori
from hpc_hess.linalg.quadrature import Ritz, ritz
from hpc_hess.model.sharded.skeleton import text_config
from hpc_hess.parallel.partition import Partition
from hpc_hess.parallel.vector import Vector
from hpc_hess.session.problem import Problem
from hpc_hess.session.session import Session
from hpc_hess.studies.base import Bench, Recipe
from hpc_hess.studies.block_diagonal.partition import check_heads, partition
from hpc_hess.studies.block_diagonal.settings import Settings

_NAMES = [field.name for field in fields(Comparison)]
_NUMBERS = len(_NAMES)
_TOP = 10  # eigenvalues of one layer against the whole (Schioppa 2024, table 1)
_KNOWN = 0.01  # residual over |lambda| of a Ritz value that counts as known


def block_diagonal(bench: Bench) -> dict[str, Any]:
    """Compare products and, if asked for, spectra. Collective: yes.

    Raises
    ------
    ConfigError : a partition by heads of a model whose heads are not known.

    """
    settings, space = Settings.of(bench.config), bench.operator.space
    kinds = list(settings.blocks)
    blocks: dict[str, Partition] = {kind: partition(space, kind, _head_dim(bench.problem)) for kind in kinds}
    rows = []
    for name, vector in _directions(bench).items() if kinds else ():
        numbers = bench.keep.numbers(partial(_compare_all, bench, blocks, vector))
        for k, kind in enumerate(kinds):
            some = numbers[_NUMBERS * k : _NUMBERS * (k + 1)]
            known = [number if isfinite(number) else None for number in some]  # two samples tell no standard error
            rows.append({"direction": name, "blocks": kind, **dict(zip(_NAMES, known, strict=True))})
    found: dict[str, Any] = {"products": rows, "counts": {kind: blocks[kind].count for kind in kinds}}
    if settings.spectrum:
        chosen = partition(space, settings.spectrum)
        start = probes.draw(space, seed=bench.seed, probe=0, distribution="rademacher")
        parts = block_spectra(
            bench.operator, chosen, bench.basis(settings.steps), start, settings.steps, bench.keep, settings.columns
        )
        found["spectrum"] = {
            "blocks": settings.spectrum,
            "parts": [
                {
                    "name": name,
                    "size": n,
                    "values": q.values.tolist(),
                    "weights": q.weights.tolist(),
                    "residuals": q.residuals.tolist(),
                }
                for name, n, q in zip(chosen.names, chosen.sizes, parts, strict=True)
            ],
        }
    return found


def compared(found: dict[str, Any], recurrences: Sequence[Recurrence], eigenvalues: Sequence[float]) -> dict[str, Any]:
    """Return ``found`` with its spectra beside the whole's: by all probes, and by the eigenvalues of the search."""
    if "spectrum" not in found:
        return found
    return found | {"spectrum": found["spectrum"] | _spectra(found["spectrum"]["parts"], recurrences, eigenvalues)}


def _directions(bench: Bench) -> dict[str, Callable[[], Vector]]:
    """Return what to multiply: made when it is needed, for a run that goes on may not need it."""
    space = bench.operator.space
    directions: dict[str, Callable[[], Vector]] = {
        "random": lambda: probes.draw(space, seed=bench.seed, probe=0, distribution="rademacher"),
        "gradient": bench.gradient,
    }
    pairs = bench.eigenvectors()
    for name, k in (("eigenvector λmin", 0), ("eigenvector λmax", len(pairs) - 1)):
        if pairs and (k == 0) == (pairs[k][0] < 0):
            directions[name] = partial(_second, pairs[k])
    return directions


def _second(pair: tuple[float, Vector]) -> Vector:
    return pair[1]


def _compare_all(bench: Bench, blocks: dict[str, Partition], direction: Callable[[], Vector]) -> list[float]:
    """Compare A v with block(A) v for every partition; return the numbers of all Comparisons. Collective: yes."""
    v, keep = direction(), bench.keep
    image = keep.vector(partial(bench.operator.matvec, v))
    numbers: list[float] = []
    for one in blocks.values():
        numbers += keep.numbers(partial(_compare, bench, one, v, image))
    return numbers


def _compare(bench: Bench, blocks: Partition, v: Vector, image: Vector) -> tuple[float, ...]:
    settings, operator, keep = Settings.of(bench.config), bench.operator, bench.keep
    count = settings.samples
    if blocks.count <= count:
        exact = keep.vector(partial(block_product, operator, blocks, v, settings.columns))
        return astuple(compare_exact(image, exact, blocks.count))
    samples = bench.basis(count)
    for first in range(0, count, settings.columns):
        some = range(first, min(first + settings.columns, count))
        found = keep.vectors(partial(block_samples, operator, blocks, v, bench.seed, some))
        for k, sample in zip(some, found, strict=True):
            samples[k] = sample
    return astuple(compare_sampled(image, samples, count))


# -- spectra -------------------------------------------------------------------------------------------------------------


def _spectra(parts: list[dict[str, Any]], recurrences: Sequence[Recurrence], eigenvalues: Sequence[float]) -> dict[str, Any]:
    """Describe the eigenvalues of every block, of all together, and each block's as a stand-in for the whole's."""
    from scipy.stats import wasserstein_distance  # takes a second to import, in every rank of every run

    whole = [ritz(alpha, beta) for alpha, beta in recurrences]
    values = np.concatenate([q.values for q in whole])
    weights = np.concatenate([q.weights for q in whole]) / len(whole)
    size = sum(part["size"] for part in parts)
    block_values = np.concatenate([part["values"] for part in parts])
    block_weights = np.concatenate([np.array(part["weights"]) * part["size"] / size for part in parts])
    distance = float(wasserstein_distance(values, block_values, weights, block_weights))
    top = _top(eigenvalues, whole)
    return {
        "steps": max(len(part["values"]) for part in parts),
        "wasserstein": distance,
        "wasserstein_of_range": distance / (float(np.ptp(values)) or 1.0),
        "wasserstein_error": _distance_error(recurrences, parts),
        "parts": [part | stand_in(known_top(_ritz(part)), top) for part in parts],
    }


def _ritz(part: dict[str, Any]) -> Ritz:
    """Return a block's quadrature as it was kept."""
    values = np.array(part["values"])
    return Ritz(values, np.array(part["weights"]), np.array(part.get("residuals", [np.nan] * len(values))))


def _distance_error(recurrences: Sequence[Recurrence], parts: Sequence[dict[str, Any]], risk: float = 0.05) -> float:
    """Bound the error of the distance with probability 1 - ``risk``: what either quadrature is off its own spectrum."""
    size, share = sum(part["size"] for part in parts), risk / (len(parts) + 1)
    return wasserstein_a_posteriori(recurrences, size, risk=share) + sum(
        part["size"] / size * wasserstein_a_posteriori([_ritz(part)], part["size"], points=60, risk=share)
        for part in parts
        if len(part["values"])
    )


def known_top(q: Ritz) -> np.ndarray:
    """Return the largest eigenvalues that the quadrature knows, descending: up to the first whose residual is not small."""
    rounding = 1e-10 * np.abs(q.values).max(initial=0.0)
    small = (q.residuals <= np.maximum(_KNOWN * np.abs(q.values), rounding))[::-1]
    return q.values[::-1][: len(small) if small.all() else int(np.argmin(small))]


def _top(eigenvalues: Sequence[float], whole: list[Ritz]) -> np.ndarray:
    """Return the largest eigenvalues that are known, descending: of the search, or Ritz values with small residuals."""
    return max(np.sort(eigenvalues)[::-1], *map(known_top, whole), key=lambda values: int(np.sum(values > 0)))


def stand_in(values: np.ndarray, top: np.ndarray, count: int = _TOP) -> dict[str, Any]:
    """Compare the largest known eigenvalues ``values`` with ``top`` (descending, positive ones count), as many as both have.

    Schioppa 2024, table 1: the mean absolute difference over the mean of ``top``, with the positive factor of least squares.
    ``top_count`` says how many: with none of them or one there is nothing to compare, and the error of one is 0.
    """
    wanted = top[top > 0][: min(count, len(values))]
    have = np.maximum(np.sort(values)[::-1][: len(wanted)], 0.0)
    if not wanted.size or not have.any():
        return {"scale": 0.0, "top_error": 1.0, "top_count": len(wanted)}
    scale = float(have @ wanted / (have @ have))
    error = float(np.abs(scale * have - wanted).sum() / wanted.sum())
    return {"scale": scale, "top_error": error, "top_count": len(wanted)}


def _head_dim(problem: Problem) -> int:
    """Return the width of an attention head, 0 where the model does not tell."""
    config = text_config(problem.source.hf_config)
    if width := getattr(config, "head_dim", None):
        return int(width)
    hidden, heads = getattr(config, "hidden_size", 0), getattr(config, "num_attention_heads", 0)
    return hidden // heads if hidden and heads else 0


def _check(session: Session, problem: Problem, folder: Path) -> None:
    if "head" in Settings.of(session.config).blocks:
        check_heads(problem.model.layout, _head_dim(problem))


def _rows(config: Config) -> int:
    settings = Settings.of(config)
    return max(settings.samples + 1, settings.steps)


RECIPE = Recipe(
    block_diagonal,
    _rows,
    check=_check,
    came_from=lambda inputs: {"eigenvalues": list(inputs.eigenvalues)},
    compared=lambda found, inputs: compared(found, inputs.recurrences, inputs.eigenvalues),
)

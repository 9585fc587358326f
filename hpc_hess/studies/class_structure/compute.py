"""Whether the outliers of a language model's Gauss-Newton matrix are its classes (Papyan 2019): tokens grouped into classes.

The most frequent target tokens are a class each, all others that occur one more. Their class means are projected out, and
the spectrum of what is left is compared with the whole's.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from hpc_hess.curvature.decomposition import Cotangent, class_means, most_frequent
from hpc_hess.linalg import probes
from hpc_hess.linalg.deflation import Deflated, orthonormal
from hpc_hess.linalg.lanczos import Lanczos
from hpc_hess.linalg.measure import Recurrence
from hpc_hess.linalg.operator import FunctionOperator
from hpc_hess.linalg.quadrature import ritz
from hpc_hess.parallel.vector import Vector
from hpc_hess.studies.base import Bench


def class_structure(bench: Bench) -> dict[str, Any]:
    """Knock the class means out of G. Costs a backward pass for each class and class_steps products. Collective: yes."""
    settings, space, keep = bench.settings, bench.operator.space, bench.keep
    groups, tokens = most_frequent(bench.target_counts(), settings.class_groups)
    pairs = np.array(keep.numbers(lambda: bench.group_weights(groups).flatten().tolist())).reshape(groups.of_examples, -1)

    def pull(cotangent: Cotangent) -> Vector:
        return keep.vector(partial(bench.pull, cotangent))

    means = class_means(pull, groups, pairs, bench.basis(groups.of_examples))
    span = bench.basis(groups.of_examples)
    rank = orthonormal(span, [means.a1.basis[k] for k in range(groups.of_examples)])
    without = Deflated(bench.operator, span, rank)
    steps = min(settings.class_steps, space.size - rank)
    kept = FunctionOperator(space, lambda v: keep.vector(lambda: without.matvec(v)))
    process = Lanczos(kept, bench.basis(steps), steps, "full")
    process.start(without.project_(probes.draw(space, seed=bench.seed, probe=0, distribution="rademacher")))
    while not process.finished:
        process.step()
    return {
        "tokens": tokens, "shares": pairs.sum(1).tolist(), "rank": rank, "means": means.both.eigenvalues().tolist(),
        "alpha": list(process.alpha), "beta": list(process.beta), "size": space.size - rank,
    }  # fmt: skip


def compared(found: dict[str, Any], recurrences: Sequence[Recurrence]) -> dict[str, Any]:
    """Return ``found`` with what it says beside the whole's spectrum, by all probes of the quadrature. Collective: no."""
    top = float(ritz(found["alpha"], found["beta"]).values[-1])
    own = [ritz(alpha, beta) for alpha, beta in recurrences]
    return found | {
        "lambda_max": max(float(q.values[-1]) for q in own), "lambda_max_without": top,
        "outliers": max(int((q.values - q.residuals > top).sum()) for q in own),
    }  # fmt: skip

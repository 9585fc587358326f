"""Whether the outliers of the Gauss-Newton matrix are its classes (Papyan 2019): labels, or tokens grouped into classes.

The most frequent labels, or target tokens, are a class each, all others that occur one more. Their class means are
projected out, and the spectrum of what is left is compared with the whole's.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from hpc_hess.config import Config
from hpc_hess.curvature.decomposition import Cotangent, Groups, Pullback, class_means, most_frequent, weights
from hpc_hess.linalg import probes
from hpc_hess.linalg.deflation import Deflated, orthonormal
from hpc_hess.linalg.lanczos import Lanczos
from hpc_hess.linalg.measure import Recurrence
from hpc_hess.linalg.operator import FunctionOperator
from hpc_hess.linalg.quadrature import ritz
from hpc_hess.model.sharded.gradient import Gradient
from hpc_hess.parallel.vector import Vector
from hpc_hess.registry.tasks import TASKS
from hpc_hess.session.problem import Problem
from hpc_hess.studies.base import Bench, Recipe
from hpc_hess.studies.class_structure.settings import Settings


def class_structure(bench: Bench) -> dict[str, Any]:
    """Knock the class means out of G. Costs a backward pass for each class and `steps` products. Collective: yes."""
    settings, space, keep = Settings.of(bench.config), bench.operator.space, bench.keep
    problem = bench.problem
    groups, tokens = most_frequent(_target_counts(problem), settings.groups)
    pairs = np.array(keep.numbers(lambda: _weights(problem, groups).flatten().tolist())).reshape(groups.of_examples, -1)

    def pull(cotangent: Cotangent) -> Vector:
        return keep.vector(lambda: Gradient(problem.model, Pullback(problem.labelled, cotangent))()[1])

    means = class_means(pull, groups, pairs, bench.basis(groups.of_examples))
    span = bench.basis(groups.of_examples)
    rank = orthonormal(span, [means.a1.basis[k] for k in range(groups.of_examples)])
    without = Deflated(bench.operator, span, rank)
    steps = min(settings.steps, space.size - rank)
    kept = FunctionOperator(space, lambda v: keep.vector(lambda: without.matvec(v)))
    process = Lanczos(kept, bench.basis(steps), steps, "full")
    process.start(without.project_(probes.draw(space, seed=bench.seed, probe=0, distribution="rademacher")))
    while not process.finished:
        process.step()
    return {
        "tokens": tokens,
        "unit": TASKS[problem.samples.task].predicts,
        "others": bool(groups.of_examples > len(tokens)),
        "shares": pairs.sum(1).tolist(),
        "rank": rank,
        "means": means.both.eigenvalues().tolist(),
        "alpha": list(process.alpha),
        "beta": list(process.beta),
        "size": space.size - rank,
    }


def compared(found: dict[str, Any], recurrences: Sequence[Recurrence]) -> dict[str, Any]:
    """Return ``found`` with what it says beside the whole's spectrum, by all probes of the quadrature. Collective: no."""
    top = float(ritz(found["alpha"], found["beta"]).values[-1])
    own = [ritz(alpha, beta) for alpha, beta in recurrences]
    return found | {
        "lambda_max": max(float(q.values[-1]) for q in own),
        "lambda_max_without": top,
        "outliers": max(int((q.values - q.residuals > top).sum()) for q in own),
    }


def _weights(problem: Problem, groups: Groups) -> np.ndarray:
    """Return the weight of each pair of groups, (count, count). Collective: yes."""
    world = problem.space.world
    with problem.model.measuring():
        total = partial(world.sum_over_ranks, name="class weights")
        return weights(problem.labelled, problem.model.module, groups, total, world.guard)


def _target_counts(problem: Problem) -> np.ndarray:
    """Count how often each class is a target in all samples, which every rank knows, (V,). Raises ModelError."""
    samples, _ = problem.samples, problem.labelled
    return np.bincount(samples.targets[samples.targets >= 0].numpy().ravel(), minlength=samples.num_classes)


def _rows(config: Config) -> int:
    settings = Settings.of(config)
    return settings.groups + 1 + settings.steps


RECIPE = Recipe(class_structure, _rows, "groups", compared=lambda found, inputs: compared(found, inputs.recurrences))

"""The density with the known outliers taken out: they count exactly, one eigenvalue each, and the rest is estimated."""

from __future__ import annotations

from typing import Any

from hpc_hess.errors import ConfigError
from hpc_hess.linalg import probes
from hpc_hess.linalg.deflation import Deflated, orthonormal
from hpc_hess.linalg.lanczos import Lanczos
from hpc_hess.linalg.operator import FunctionOperator
from hpc_hess.studies.base import Bench, Recipe
from hpc_hess.studies.deflated.settings import Settings

_PROBE = 1 << 17  # a stream of its own


def deflated_density(bench: Bench) -> dict[str, Any]:
    """Run Lanczos on what is left of the matrix without the eigenvectors that were found. Collective: yes.

    A quadrature's weight of an outlier is random: its mean is 1 / N, its standard deviation 1.4 / N. Here it is exact.

    Raises
    ------
    ConfigError : there are no eigenvectors.

    """
    pairs = bench.eigenvectors()
    if not pairs:
        raise ConfigError(
            "studies.deflated.steps takes out eigenpairs that were found, and the search found none: raise "
            "studies.eigenpairs.most_products"
        )
    space = bench.operator.space
    steps = min(Settings.of(bench.config).steps, space.size - len(pairs))
    known = bench.basis(len(pairs))
    count = orthonormal(known, [vector for _, vector in pairs])
    deflated = Deflated(bench.operator, known, count)
    kept = FunctionOperator(space, lambda v: bench.keep.vector(lambda: deflated.matvec(v)))
    process = Lanczos(kept, bench.basis(steps), steps, "full")
    process.start(deflated.project_(probes.draw(space, seed=bench.seed, probe=_PROBE, distribution="rademacher")))
    while not process.finished:
        process.step()
    return {
        "steps": process.step_count,
        "outliers": [value for value, _ in pairs],
        "alpha": list(process.alpha),
        "beta": list(process.beta),
        "size": space.size - count,
    }


RECIPE = Recipe(
    deflated_density,
    lambda config: Settings.of(config).steps,
    "steps",
    came_from=lambda inputs: {"outliers": list(inputs.eigenvalues)},
)

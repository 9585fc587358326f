"""Products that ARPACK, PRIMME and hpc_hess need for the same pairs, basis size and bound of the residuals.

PRIMME builds from source, with BLAS and LAPACK to link to: ``pip install primme``. Its columns are left out without it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator as ScipyOperator
from scipy.sparse.linalg import eigsh

import hpc_hess
from benchmarks.frame import Table, benchmark
from hpc_hess.api import Operator
from hpc_hess.linalg import probes
from hpc_hess.linalg.eigen import ThickRestart, Which, eigenpairs
from hpc_hess.linalg.operator import diagonal
from hpc_hess.linalg.wanted import num_wanted
from hpc_hess.parallel.basis import Basis
from tests.support.known_spectra import expected, hessian_like, make_space

try:
    import primme
except ImportError:
    primme = None


@dataclass(frozen=True)
class Problem:
    """Which pairs of ``operator``, in a basis of ``basis`` vectors, to residuals of ``tolerance`` |lambda|max."""

    operator: Operator
    count: int
    which: Which
    basis: int
    tolerance: float

    def start(self, seed: int) -> np.ndarray:
        return probes.draw(self.operator.space, seed=seed, probe=0, distribution="gaussian").data.numpy()


class Counted(ScipyOperator):
    """The operator as SciPy and PRIMME take it; counts products."""

    def __init__(self, operator: Operator) -> None:
        super().__init__(np.dtype(np.float64), operator.shape)
        self._operator, self.products = operator, 0

    def _matvec(self, x: np.ndarray) -> np.ndarray:
        self.products += 1
        return np.asarray(self._operator @ x.reshape(-1))


Found = tuple[np.ndarray, np.ndarray, int]  # values, vectors (N, pairs), products


@functools.cache
def by_thick_restarts(problem: Problem, seed: int) -> Found:
    space = problem.operator.space
    search = ThickRestart(
        problem.operator, Basis(space, problem.basis + 1), problem.basis, problem.count, problem.which, problem.tolerance
    )
    search.start(space.wrap(torch.from_numpy(problem.start(seed))))
    pairs = eigenpairs(search, 10_000)
    return pairs.values, np.stack([pairs.vector(k).data.numpy() for k in range(len(pairs.values))], 1), search.num_products


def by_arpack(problem: Problem, seed: int) -> Found:
    """Ask for what the smallest wanted pair must have, which lets larger ones stop earlier than here."""
    magnitudes = np.abs(by_thick_restarts(problem, seed)[0])
    operator = Counted(problem.operator)
    values, vectors = eigsh(
        operator,
        num_wanted(problem.count, problem.which),
        which={"largest": "LA", "both": "BE"}[problem.which],
        ncv=problem.basis,
        tol=problem.tolerance * magnitudes.max() / magnitudes.min(),
        v0=problem.start(seed),
    )
    return values, vectors, operator.products


def by_primme(problem: Problem, seed: int, method: str | None) -> Found:
    """One end after the other: PRIMME has no search for both."""
    parts = []
    for end in ("LA", "SA") if problem.which == "both" else ("LA",):
        operator = Counted(problem.operator)
        values, vectors = primme.eigsh(
            operator,
            problem.count,
            which=end,
            ncv=problem.basis,
            tol=problem.tolerance,
            method=method,
            v0=problem.start(seed)[:, None],
            maxBlockSize=1,
        )
        parts.append((values, vectors, operator.products))
    values, vectors, products = zip(*parts, strict=True)
    return np.concatenate(values), np.concatenate(vectors, 1), sum(products)


SOLVERS: dict[str, Callable[[Problem, int], Found]] = {"hpc_hess": by_thick_restarts, "ARPACK": by_arpack}
if primme is not None:
    SOLVERS |= {
        "PRIMME": lambda problem, seed: by_primme(problem, seed, None),
        "PRIMME GD+k": lambda problem, seed: by_primme(problem, seed, "PRIMME_GD_plusK"),
    }


def power_law(size: int) -> torch.Tensor:
    """Both signs, three times as many positive, |lambda| = k^-0.7 of the largest."""
    positive = 100 * torch.arange(1, 3 * size // 4 + 1, dtype=torch.float64) ** -0.7
    negative = -40 * torch.arange(1, size - len(positive) + 1, dtype=torch.float64) ** -0.7
    return torch.cat([positive, negative])


def llama() -> Operator:
    """The Hessian of a small random Llama on random tokens, exact products in float64."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        initializer_range=0.125,
    )
    model = LlamaForCausalLM(config).double()
    return hpc_hess.hessian(model, [{"input_ids": torch.randint(512, (2, 32))}], method="exact")


def matrices() -> dict[str, tuple[Operator, torch.Tensor | None]]:
    """Operators, and their eigenvalues where they are known."""
    known = {"outliers and a bulk": hessian_like(20_000), "power law": power_law(20_000)}
    found: dict[str, tuple[Operator, torch.Tensor | None]] = {}
    for name, values in known.items():
        space = make_space(len(values))
        found[name] = Operator(diagonal(space, space.wrap(values))), values
    return {**found, "a Llama's Hessian": (llama(), None)}


def race(problem: Problem, truth: torch.Tensor | None, seeds: int) -> dict[str, Any]:
    """Return each solver's products; check what it found: residuals, and values where they are known."""
    products, residuals, wrong = {}, [], []
    for name, solver in SOLVERS.items():
        runs = [solver(problem, seed) for seed in range(seeds)]
        products[name] = int(np.median([count for _, _, count in runs]))
        worst = max(residual(problem, values, vectors) for values, vectors, _ in runs)
        residuals.append(f"{worst / problem.tolerance:.2g}")
        if truth is not None:
            right = expected(truth, problem.count, problem.which)
            error = max(float(np.abs(np.sort(values) - right).max()) for values, _, _ in runs)
            if error > 10 * problem.tolerance * float(truth.abs().max()):
                wrong.append(name)
    return {**products, "largest residuals": ", ".join(residuals), "pairs missed by": ", ".join(wrong) or "none"}


def residual(problem: Problem, values: np.ndarray, vectors: np.ndarray) -> float:
    """Return the largest |A u - theta u| over the largest |theta|."""
    scale = float(np.abs(values).max())
    return max(
        math.dist(problem.operator @ np.ascontiguousarray(u), theta * u) / scale
        for theta, u in zip(values, vectors.T, strict=True)
    )


@benchmark(
    "Products that eigensolvers need",
    note="Products: medians over start vectors; residuals: the largest of any pair and start, explicit, in units of what "
    "was asked, in the order of the columns. ARPACK's tolerance is relative to each eigenvalue: it is asked for what the "
    "smallest wanted pair must have, so that its larger pairs may stop early. PRIMME searches one end at a time: with "
    "both, its products are those of two searches, each with that basis.",
)
def main(table: Table, count: Annotated[int, "pairs of each end"] = 5, seeds: Annotated[int, "start vectors"] = 3) -> None:
    table.settings["dtype"] = "float64"
    if primme is None:
        table.note += " PRIMME was not installed."
    for name, (operator, truth) in matrices().items():
        for which in ("largest", "both"):
            for tolerance in (1e-3, 1e-6):
                basis = 2 * num_wanted(count, which) + 8  # the program's default
                problem = Problem(operator, count, which, basis, tolerance)
                table.add(
                    {
                        "matrix": name,
                        "N": operator.shape[0],
                        "pairs": f"{count} {which}",
                        "basis": basis,
                        "tolerance": f"{tolerance:g}",
                        **race(problem, truth, seeds),
                    }
                )


if __name__ == "__main__":
    main()

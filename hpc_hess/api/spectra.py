"""What is asked of an operator: spectral density, eigenpairs, trace, diagonal, solutions."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from hpc_hess.api.operators import Operator, collective
from hpc_hess.errors import ConfigError
from hpc_hess.intake import given
from hpc_hess.linalg import density as densities
from hpc_hess.linalg import diagonal as diagonals
from hpc_hess.linalg import eigen, measure, quadrature
from hpc_hess.linalg import probes as probe_vectors
from hpc_hess.linalg import solve as solvers
from hpc_hess.linalg import trace as traces
from hpc_hess.linalg.density import Density
from hpc_hess.linalg.lanczos import Lanczos, Reorthogonalise, basis_rows
from hpc_hess.linalg.measure import Cumulative, Interval
from hpc_hess.linalg.quadrature import Estimate, Ritz
from hpc_hess.linalg.sampling import StoppingRule
from hpc_hess.linalg.wanted import num_wanted
from hpc_hess.parallel.basis import Basis
from hpc_hess.studies.sub_block import compute as sub_blocks


@dataclass(frozen=True)
class Spectrum:
    """Quadratures of several probes and what follows from them."""

    size: int
    quadratures: list[Ritz]
    alphas: list[np.ndarray] = field(repr=False)
    betas: list[np.ndarray] = field(repr=False)

    @property
    def lambda_max(self) -> float:
        """Largest Ritz value of any probe."""
        return max(float(q.values[-1]) for q in self.quadratures)

    @property
    def lambda_min(self) -> float:
        """Smallest Ritz value of any probe."""
        return min(float(q.values[0]) for q in self.quadratures)

    @property
    def residuals(self) -> tuple[float, float]:
        """Bounds of the distances of ``lambda_min`` and ``lambda_max`` to eigenvalues: 0 where they are exact."""
        low, high = (choose(self.quadratures, key=lambda q: q.values[end]) for choose, end in ((min, 0), (max, -1)))
        return float(low.residuals[0]), float(high.residuals[-1])

    @property
    def trace(self) -> Estimate:
        """Trace with its standard error (None for one probe); ``half_width()`` is that of its interval, for any number."""
        return quadrature.trace(self.quadratures, self.size)

    def density(self, *, axis: Literal["linear", "symlog", "log", "chebyshev"] = "linear", **options: Any) -> Density:
        """Return the smoothed spectral density and its width; ``options`` as in linalg.density.

        "log" is over log10 |lambda|; "chebyshev" is linear, by damped Chebyshev moments instead of Gaussians.
        """
        smooth: dict[str, Callable[..., Density]] = {
            "linear": densities.density,
            "symlog": densities.density_symlog,
            "log": densities.density_log,
            "chebyshev": densities.density_chebyshev,
        }
        for name in options.keys() & {"width", "linear", "epsilon"}:
            if options[name] is not None and given.real(name, options[name]) <= 0:
                raise ConfigError(f"{name} = {options[name]!r} is not greater than 0")
        return smooth[given.one_of("axis", axis, smooth)](self.quadratures, **options)

    def cumulative(self, points: Any, *, risk: float = 0.05) -> Cumulative:
        """Return the share of eigenvalues at or below ``points``, with bounds of the truth."""
        places = given.numbers_of("points", points)
        return measure.cumulative(self._recurrences, places, self.size, risk=given.share("risk", risk))

    def mass(self, *, above: float = -math.inf, below: float = math.inf, risk: float = 0.05) -> Interval:
        """Return the share of eigenvalues in [``above``, ``below``], with bounds."""
        if not above < below:
            raise ConfigError(f"above = {above!r} is not less than below = {below!r}")
        return measure.mass(self._recurrences, self.size, above=above, below=below, risk=given.share("risk", risk))

    def wasserstein_bound(self, *, risk: float = 0.05) -> float:
        """Bound W1 between the spectrum and the mean quadrature, in units of the eigenvalues."""
        return measure.wasserstein_a_posteriori(self._recurrences, self.size, risk=given.share("risk", risk))

    @property
    def frobenius_norm(self) -> Estimate:
        """Frobenius norm with its standard error: a probe's second moment is alpha_1^2 + beta_1^2."""
        return traces.Moments([], quadrature.squared_norms(self.quadratures, self.size)).frobenius_estimate

    @property
    def _recurrences(self) -> list[measure.Recurrence]:
        return list(zip(self.alphas, self.betas, strict=True))


@collective
def slq(
    operator: Operator,
    *,
    steps: int = 20,
    probes: int = 1,
    seed: int = 0,
    distribution: Literal["rademacher", "gaussian"] = "rademacher",
    reorthogonalise: Reorthogonalise = "full",
    out: str | os.PathLike[str] | None = None,
    resume: bool = True,
) -> Spectrum:
    """Stochastic Lanczos quadrature (Ubaru, Chen, Saad 2017): the spectral density of ``operator``.

    Parameters
    ----------
    out : a directory for the run, of an operator of :func:`hessian`: every step is kept there, then result.json and the
        report, as by ``hpc-hess run``. The same call goes on with a run that was killed or stopped.
    resume : False puts a run that ``out`` holds aside, and begins anew.

    Raises
    ------
    ConfigError : an argument is not valid. NumericsError : a product is not finite. StoreError : ``out`` holds the run of
        another model, other batches or settings, or cannot be written. StoppedError : SIGUSR1 or SIGTERM came, or the job
        ends, before the last step; the steps so far are kept in ``out``.

    """
    space = operator.space
    steps, probes, seed = (given.whole(*x) for x in (("steps", steps), ("probes", probes), ("seed", seed, 0)))
    given.one_of("distribution", distribution, ("rademacher", "gaussian"))
    if isinstance(reorthogonalise, str):
        given.one_of("reorthogonalise", reorthogonalise, ("full", "none"))
    else:
        reorthogonalise = given.whole("reorthogonalise", reorthogonalise)
    if out is not None:
        asked = {"steps": steps, "probes": probes, "seed": seed, "distribution": distribution}
        found = _kept(operator, {**asked, "reorthogonalise": reorthogonalise}, Path(out), resume=resume)
        quadratures = [quadrature.ritz(alpha, beta) for alpha, beta in found]
        return Spectrum(space.size, quadratures, [alpha for alpha, _ in found], [beta for _, beta in found])
    basis = Basis(space, basis_rows(reorthogonalise, steps))
    alphas, betas, quadratures = [], [], []
    for probe in range(probes):
        process = Lanczos(operator, basis, steps, reorthogonalise)
        process.start(probe_vectors.draw(space, seed=seed, probe=probe, distribution=distribution))
        while not process.finished:
            process.step()
        alphas.append(np.array(process.alpha))
        betas.append(np.array(process.beta))
        quadratures.append(quadrature.ritz(process.alpha, process.beta))
    return Spectrum(space.size, quadratures, alphas, betas)


def _kept(operator: Operator, lanczos: dict[str, Any], out: Path, *, resume: bool) -> list[tuple[np.ndarray, np.ndarray]]:
    """Make the run ``out`` of an operator, or go on with it; return alpha and beta of every probe. Collective: yes.

    Raises
    ------
    ConfigError, StoreError, StoppedError : as :func:`slq`.

    """
    from hpc_hess.studies.in_program import run_in_program  # h5py and the store: not for calls without a directory

    if operator.parts is None:
        raise ConfigError(
            "slq keeps runs of operators that hessian() returned, and of no others: call it without a directory"
        )
    if operator.parts.half:
        raise ConfigError(
            "slq keeps no runs of models in half precision: convert it to float32, or call slq without a directory"
        )
    operator.require_theta0()
    return run_in_program(operator.parts, lanczos, out, resume=resume)


@dataclass(frozen=True)
class Eigenpairs:
    """Eigenvalues ascending, residuals |A u - lambda u|, eigenvectors as rows (pair, N), in the operator's order.

    Over several ranks rows hold this rank's part; ``operator.whole(row)`` is all of one.

    ``converged``: all residuals are within the tolerance. ``multiplicity_resolved``: a search from a new direction has found
    no eigenvalue that is missing, such as another copy of one; where it is False, copies may be missing.
    """

    values: np.ndarray
    residuals: np.ndarray
    vectors: torch.Tensor = field(repr=False)
    converged: bool
    num_products: int
    multiplicity_resolved: bool = False


@collective
def eigenpairs(
    operator: Operator,
    count: int,
    *,
    which: eigen.Which = "both",
    tolerance: float = 1e-3,
    basis_size: int | None = None,
    most_products: int = 300,
    seed: int = 0,
    copies: bool = True,
) -> Eigenpairs:
    """Return extreme eigenpairs by Lanczos with thick restarts (Wu and Simon 2000), in the memory of ``basis_size`` vectors.

    Parameters
    ----------
    count, which : so many of each end ("both"), or the "largest", "smallest", or largest in "magnitude".
    tolerance : of the residuals, relative to the largest |lambda|.
    basis_size : at least the wanted pairs and three; twice as many and eight unless given.
    copies : go on from new directions until one finds no further copy of an eigenvalue: up to twice the products.

    Raises
    ------
    ConfigError, NumericsError : with the remedy.

    """
    space = operator.space
    count, most_products, seed = (
        given.whole(*x) for x in (("count", count), ("most_products", most_products), ("seed", seed, 0))
    )
    given.one_of("which", which, ("largest", "smallest", "both", "magnitude"))
    wanted = num_wanted(count, which)
    size = min(2 * wanted + 8 if basis_size is None else given.whole("basis_size", basis_size), space.size)
    process = eigen.ThickRestart(
        operator,
        Basis(space, size + 1),
        size,
        count,
        which,
        given.real("tolerance", tolerance, 0.0),
        copies=copies,
        seed=seed,
    )
    process.start(probe_vectors.draw(space, seed=seed, probe=0, distribution="gaussian"))
    found = eigen.eigenpairs(process, most_products)
    vectors = torch.stack([found.vector(k).data for k in range(len(found.values))])
    return Eigenpairs(found.values, found.residuals, vectors, process.converged, process.num_products, process.complete)


@collective
def trace(
    operator: Operator, *, method: Literal["xtrace", "hutch++", "hutchinson"] = "xtrace", products: int = 60, seed: int = 0
) -> Estimate:
    """Estimate the trace from so many products, with a standard error. The first two hold vectors of half or a third."""
    least = {"xtrace": 4, "hutch++": 6, "hutchinson": 2}
    products = given.whole("products", products, least[given.one_of("method", method, least)])
    seed = given.whole("seed", seed, 0)
    if method == "xtrace":
        return traces.xtrace(operator, Basis(operator.space, products // 2), products, seed=seed)
    if method == "hutch++":
        return traces.hutch_plus_plus(operator, Basis(operator.space, products // 3), products, seed=seed)
    return traces.hutchinson(operator, StoppingRule(0.0, most=products), seed=seed).trace_estimate


@collective
def diagonal(
    operator: Operator, *, method: Literal["xdiag", "hutchinson"] = "xdiag", products: int = 60, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Estimate the diagonal from so many products: its entries and their standard errors, each (N,); this rank's part."""
    least = {"xdiag": 4, "hutchinson": 2}
    products = given.whole("products", products, least[given.one_of("method", method, least)])
    seed = given.whole("seed", seed, 0)
    if method == "xdiag":
        basis, images = (Basis(operator.space, products // 2) for _ in range(2))
        found = diagonals.xdiag(operator, basis, images, products, seed=seed)
    else:
        found = diagonals.diagonal_hutchinson(operator, most=products, seed=seed)
    return found.mean.data, found.stderr.data


@collective
def sub_block(operator: Operator, selections: Sequence[str], *, columns: int = 8) -> np.ndarray:
    """Return the matrix of chosen entries, (t, t) in the order of the layout, by one product for each entry.

    Parameters
    ----------
    selections : as ``"layers.0.q_proj.weight[0, :]"``; globs over names, indices as Python writes them.
    columns : products at a time; those of a causal LM share work.

    Raises
    ------
    ConfigError : no such parameter, or indices that do not fit its shape.

    """
    chosen = sub_blocks.select(operator.layout, given.patterns("selections", selections))
    found = sub_blocks.sub_block(operator, chosen, columns=given.whole("columns", columns))
    return 0.5 * (found + found.T)


class _Pair(NamedTuple):
    x: torch.Tensor
    residuals: list[float]


class Solution(_Pair):
    """``x, residuals = solve(...)``: the solution, and the relative residuals before and after every product.

    ``converged``: the last residual is within the tolerance.
    """

    converged: bool

    def __repr__(self) -> str:
        """Show how it ended, not the entries."""
        return f"Solution(residual={self.residuals[-1]:.3g}, products={len(self.residuals) - 1}, converged={self.converged})"


@collective
def solve(
    operator: Operator,
    b: Any,
    *,
    damping: float,
    method: Literal["minres", "cg"] = "minres",
    tolerance: float = 1e-4,
    products: int = 100,
) -> Solution:
    """Solve (A + damping I) x = b: x, the relative residuals before and after every product, and whether it converged.

    Over several ranks ``b`` is this rank's part, or all N entries on every rank; so is x.

    Raises
    ------
    NumericsError : "cg" met negative curvature. ConfigError : an argument is not valid.

    """
    run = {"minres": solvers.minres, "cg": solvers.conjugate_gradients}[given.one_of("method", method, ("minres", "cg"))]
    damping, tolerance = given.real("damping", damping), given.real("tolerance", tolerance, 0.0)
    right, whole, _ = operator.taken(b)
    found = run(operator, right.copy(), damping=damping, tolerance=tolerance, most=given.whole("products", products))
    solution = Solution(operator.whole(found.x) if whole else found.x.data, found.residuals)
    solution.converged = found.residuals[-1] <= tolerance
    return solution

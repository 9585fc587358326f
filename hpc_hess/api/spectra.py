"""What is asked of an operator: spectral density, eigenpairs, trace, diagonal, solutions."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from hpc_hess.api.operators import Operator, collective
from hpc_hess.api.results import Diagonal, Eigenpairs, Float, Solution, Spectrum, Trace
from hpc_hess.api.watching import watched
from hpc_hess.errors import ConfigError
from hpc_hess.intake import given
from hpc_hess.linalg import diagonal as diagonals
from hpc_hess.linalg import eigen
from hpc_hess.linalg import probes as probe_vectors
from hpc_hess.linalg import solve as solvers
from hpc_hess.linalg import trace as traces
from hpc_hess.linalg.lanczos import Lanczos, Reorthogonalise, basis_rows
from hpc_hess.linalg.operator import Enough
from hpc_hess.linalg.sampling import StoppingRule
from hpc_hess.linalg.wanted import Which, num_wanted
from hpc_hess.parallel.basis import Basis
from hpc_hess.studies.diagonal.compute import by_group
from hpc_hess.studies.localisation import localise
from hpc_hess.studies.sub_block import compute as sub_blocks

_FEW = 12  # parameters that a figure names one by one


@collective
def slq(
    operator: Operator,
    *,
    steps: int = 20,
    probes: int = 1,
    seed: int = 0,
    distribution: Literal["rademacher", "gaussian"] = "rademacher",
    reorthogonalise: Reorthogonalise = "full",
    progress: bool = True,
    out: str | os.PathLike[str] | None = None,
    resume: bool = True,
) -> Spectrum:
    """Stochastic Lanczos quadrature (Ubaru, Chen, Saad 2017): the spectral density of ``operator``.

    An interrupt gives the spectrum of the steps so far. The last probe counts where it is the only one, or has made half of
    its steps.

    Parameters
    ----------
    progress : a bar, on terminals and in notebooks, here and in the other functions.
    out : a directory for the run, of an operator of :func:`hessian`: every step is kept there, then result.json and the
        report, as by ``hpc-hess run``. The same call goes on with a run that was killed or stopped.
    resume : False puts a run that ``out`` holds aside, and begins anew.

    Raises
    ------
    ConfigError : an argument is not valid. NumericsError : a product is not finite. KeyboardInterrupt : before a step.
    StoreError : ``out`` holds the run of another model, other batches or settings, or cannot be written. StoppedError :
        SIGUSR1 or SIGTERM came, or the job ends, before the last step; the steps so far are kept in ``out``.

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
        return Spectrum(space.size, [alpha for alpha, _ in found], [beta for _, beta in found], operator.matrix)
    basis, done = Basis(space, basis_rows(reorthogonalise, steps)), list[Lanczos]()
    with watched(operator, "slq", steps * probes, progress) as watch:
        for probe in range(probes):
            process = Lanczos(watch, basis, steps, reorthogonalise)
            process.start(probe_vectors.draw(space, seed=seed, probe=probe, distribution=distribution))
            try:
                while not process.finished:
                    process.step()
            except Enough:
                if not done and not process.step_count:
                    raise
            if process.finished or not done or 2 * process.step_count >= steps:
                done.append(process)
            if watch.stopped:
                break
    return Spectrum(space.size, [np.array(p.alpha) for p in done], [np.array(p.beta) for p in done], operator.matrix)


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


@collective
def eigenpairs(
    operator: Operator,
    count: int,
    *,
    which: Which = "both",
    tolerance: float = 1e-3,
    basis_size: int | None = None,
    most_products: int = 300,
    seed: int = 0,
    copies: bool = True,
    progress: bool = True,
) -> Eigenpairs:
    """Return extreme eigenpairs by Lanczos with thick restarts (Wu and Simon 2000), in the memory of ``basis_size`` vectors.

    An interrupt gives the pairs as they are, with their residuals.

    Parameters
    ----------
    count, which : so many of each end ("both"), or the "largest", "smallest", or largest in "magnitude".
    tolerance : of the residuals, relative to the largest |lambda|.
    basis_size : at least the wanted pairs and three; twice as many and eight unless given.
    copies : go on from new directions until one finds no further copy of an eigenvalue: up to twice the products.

    Raises
    ------
    ConfigError, NumericsError : with the remedy. KeyboardInterrupt : before a product.

    """
    space = operator.space
    count, most_products, seed = (
        given.whole(*x) for x in (("count", count), ("most_products", most_products), ("seed", seed, 0))
    )
    given.one_of("which", which, ("largest", "smallest", "both", "magnitude"))
    wanted = num_wanted(count, which)
    size = min(2 * wanted + 8 if basis_size is None else given.whole("basis_size", basis_size), space.size)
    with watched(operator, "eigenpairs", most_products, progress) as watch:
        process = eigen.ThickRestart(
            watch,
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
    vectors = [found.vector(k) for k in range(len(found.values))]
    places = [localise(vector) for vector in vectors]
    groups = [where.shares if len(where.shares) <= _FEW else where.by_group() for where in places]
    return Eigenpairs(
        found.values,
        found.residuals,
        np.stack([vector.data.cpu().numpy() for vector in vectors]),
        process.converged,
        process.num_products,
        process.complete,
        np.array(list(groups[0])),
        np.array([list(group.values()) for group in groups]),
        operator.matrix,
    )


@collective
def trace(
    operator: Operator,
    *,
    method: Literal["xtrace", "hutch++", "hutchinson"] = "xtrace",
    products: int = 60,
    seed: int = 0,
    progress: bool = True,
) -> Trace:
    """Estimate the trace from so many products, with a standard error. The first two hold vectors of half or a third.

    An interrupt gives the estimate of the products so far; of "hutch++" in its last third only.
    """
    least = {"xtrace": 4, "hutch++": 6, "hutchinson": 2}
    products = given.whole("products", products, least[given.one_of("method", method, least)])
    seed = given.whole("seed", seed, 0)
    with watched(operator, "trace", products, progress) as watch:
        if method == "xtrace":
            found = traces.xtrace(watch, Basis(operator.space, products // 2), products, seed=seed)
        elif method == "hutch++":
            found = traces.hutch_plus_plus(watch, Basis(operator.space, products // 3), products, seed=seed)
        else:
            found = traces.hutchinson(watch, StoppingRule(0.0, most=products), seed=seed).trace_estimate
    return Trace(found.mean, found.stderr, found.count, found.deviation, matrix=operator.matrix)


@collective
def diagonal(
    operator: Operator,
    *,
    method: Literal["xdiag", "hutchinson"] = "xdiag",
    products: int = 60,
    seed: int = 0,
    progress: bool = True,
) -> Diagonal:
    """Estimate the diagonal from so many products.

    ``values, stderr = diagonal(operator)``: its entries and their standard errors, each (N,); over several ranks this
    rank's part. An interrupt gives the estimate of the products so far.
    """
    least = {"xdiag": 4, "hutchinson": 2}
    products = given.whole("products", products, least[given.one_of("method", method, least)])
    seed = given.whole("seed", seed, 0)
    with watched(operator, "diagonal", products, progress) as watch:
        if method == "xdiag":
            basis, images = (Basis(operator.space, products // 2) for _ in range(2))
            found = diagonals.xdiag(watch, basis, images, products, seed=seed)
        else:
            found = diagonals.diagonal_hutchinson(watch, most=products, seed=seed)
    groups = by_group(found)
    return Diagonal(
        found.mean.data.cpu().numpy(),
        found.stderr.data.cpu().numpy(),
        found.num_products,
        np.array(list(groups)),
        np.array([group["sum"] for group in groups.values()]),
        np.sqrt([group["variance"] for group in groups.values()]),
        operator.matrix,
    )


@collective
def sub_block(operator: Operator, selections: Sequence[str], *, columns: int = 8, progress: bool = True) -> Float:
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
    with watched(operator, "sub_block", len(chosen.entries), progress) as watch:
        found = sub_blocks.sub_block(watch, chosen, columns=given.whole("columns", columns))
    return 0.5 * (found + found.T)


@collective
def solve(
    operator: Operator,
    b: Any,
    *,
    damping: float,
    method: Literal["minres", "cg"] = "minres",
    tolerance: float = 1e-4,
    products: int = 100,
    progress: bool = True,
) -> Solution:
    """Solve (A + damping I) x = b: x, the relative residuals before and after every product, and whether it converged.

    Over several ranks ``b`` is this rank's part, or all N entries on every rank; so is x. An interrupt gives the solution so
    far.

    Raises
    ------
    NumericsError : "cg" met negative curvature. ConfigError : an argument is not valid. KeyboardInterrupt : before a
        product.

    """
    run = {"minres": solvers.minres, "cg": solvers.conjugate_gradients}[given.one_of("method", method, ("minres", "cg"))]
    damping, tolerance = given.real("damping", damping), given.real("tolerance", tolerance, 0.0)
    right, whole, _ = operator.taken(b)
    products = given.whole("products", products)
    with watched(operator, "solve", products, progress) as watch:
        found = run(watch, right.copy(), damping=damping, tolerance=tolerance, most=products)
    x = operator.whole(found.x) if whole else found.x.data
    return Solution(x.cpu().numpy(), np.array(found.residuals), tolerance, operator.matrix)

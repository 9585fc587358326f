"""The Python interface, for notebooks: one process, any ``torch.nn.Module``.

>>> operator = hpc_hess.hessian(model, batches, loss)   # doctest: +SKIP
>>> spectrum = hpc_hess.slq(operator, steps=40, probes=4)   # doctest: +SKIP
>>> spectrum.lambda_max, spectrum.trace   # doctest: +SKIP
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator as ScipyOperator
from torch import nn

from hpc_hess.analysis import sub_block as sub_blocks
from hpc_hess.curvature.cross_entropy import Kind
from hpc_hess.curvature.exact import ExactHessian, StreamedOperator
from hpc_hess.curvature.finite_difference import FiniteDifferenceHessian, Scheme
from hpc_hess.curvature.gauss_newton import EmpiricalFisher, GaussNewton, Residual
from hpc_hess.curvature.whole_model import WholeModel, exact_or_whole
from hpc_hess.errors import ConfigError, DataError
from hpc_hess.linalg import density as densities
from hpc_hess.linalg import diagonal as diagonals
from hpc_hess.linalg import eigen, measure, quadrature
from hpc_hess.linalg import probes as probe_vectors
from hpc_hess.linalg import solve as solvers
from hpc_hess.linalg import trace as traces
from hpc_hess.linalg.density import Density
from hpc_hess.linalg.lanczos import Lanczos, Reorthogonalise, basis_rows
from hpc_hess.linalg.measure import Cumulative, Interval
from hpc_hess.linalg.operator import LinearOperator
from hpc_hess.linalg.quadrature import Estimate, Ritz
from hpc_hess.linalg.sampling import StoppingRule
from hpc_hess.model.gradient import Gradient
from hpc_hess.model.loss import CallableObjective, CausalLMObjective, LossFunction, causal_lm_batch, causal_lm_loss
from hpc_hess.model.routing import Routing
from hpc_hess.model.shard import whole_model
from hpc_hess.parallel.basis import Basis
from hpc_hess.parallel.layout import Layout
from hpc_hess.parallel.vector import Vector, VectorSpace


class Operator:
    """A curvature matrix of a model in this process. Vectors are flat, in the order of ``layout``'s parameters.

    ``notes`` say how exact products are taken: kernels that were switched, a model that is not split into blocks.
    """

    def __init__(self, operator: LinearOperator) -> None:
        self._operator = operator
        self.space: VectorSpace = operator.space
        self.layout: Layout = operator.space.layout
        self.shape = (self.space.size, self.space.size)
        self.notes: list[str] = list(getattr(operator, "notes", []))

    def matvec(self, v: Any) -> Any:
        """Return A v for a flat vector of N entries: a numpy array, a torch tensor, or a Vector; in kind."""
        if isinstance(v, Vector):
            return self._operator.matvec(v)
        tensor = torch.as_tensor(v).reshape(-1)
        if tensor.numel() != self.space.size:
            raise ConfigError(f"the operator acts on {self.space.size} entries, the vector has {tensor.numel()}")
        data = tensor.to(self.space.device, self.space.dtype)
        product = self._operator.matvec(self.space.wrap(data)).data.to(tensor.device, tensor.dtype)
        return product.numpy() if isinstance(v, np.ndarray) else product

    def __matmul__(self, v: Any) -> Any:
        """``operator @ v``."""
        return self.matvec(v)

    def to_scipy(self) -> ScipyOperator:
        """Return a scipy.sparse.linalg.LinearOperator, for eigsh and friends."""
        dtype = torch.empty(0, dtype=self.space.dtype).numpy().dtype
        return ScipyOperator(self.shape, matvec=self.matvec, rmatvec=self.matvec, dtype=dtype)


_KINDS: dict[str, type[StreamedOperator]] = {
    "hessian": ExactHessian, "gauss_newton": GaussNewton, "residual": Residual, "fisher": EmpiricalFisher,
}  # fmt: skip


def hessian(
    model: nn.Module,
    batches: Sequence[Any],
    loss: LossFunction | None = None,
    *,
    method: Literal["finite_difference", "exact"] = "finite_difference",
    kind: Kind = "hessian",
    scheme: Scheme = "central",
    step: float | Literal["auto"] = "auto",
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
) -> Operator:
    """Return the Hessian of the mean loss over ``batches`` as an operator. The model is used in place, in eval mode.

    Parameters
    ----------
    model : any module; its parameters share one dtype and device (float64 gives the smallest error).
    batches : a list; each element is passed to ``loss``.
    loss : ``loss(model, batch)`` returns a scalar (batches count equally) or a pair (sum, weight) for a weighted mean.
        The default is the token-weighted cross-entropy of a causal LM on dictionaries with ``input_ids``.
    method, scheme, step : as in the configuration's [operator]. "exact" streams a causal LM with its own loss block by
        block, and takes any other model or loss as a whole: its ``loss`` must be twice differentiable.
    kind : "hessian"; by exact products of a causal LM with its own loss also "gauss_newton", "residual", "fisher".
    include, exclude : globs over parameter names; the Hessian of the selected parameters.

    Raises
    ------
    DataError, LayoutError, ModelError, NumericsError, ConfigError : with the remedy.

    """
    if kind not in _KINDS:
        raise ConfigError(f"kind = '{kind}' is not one of: {', '.join(_KINDS)}")
    if method not in ("finite_difference", "exact"):
        raise ConfigError(f"method = '{method}' is not one of: finite_difference, exact")
    if kind != "hessian" and (method != "exact" or loss is not None):
        raise ConfigError(f'kind = "{kind}" needs method = "exact" and the causal LM\'s own loss: leave loss out')
    model.eval()
    sharded = whole_model(model, list(include), list(exclude))
    if method == "exact" and loss is None:
        micro_batches = [causal_lm_batch(batch) for batch in batches]
        count = sum(batch.num_tokens for batch in micro_batches)
        if not count:
            raise DataError("there are no batches" if not micro_batches else "the batches predict no token")
        own = CausalLMObjective(micro_batches, count, sharded.space.device)
        return Operator(exact_or_whole(_KINDS[kind], sharded, own))
    objective = CallableObjective(batches, loss or causal_lm_loss, model)
    if method == "exact":
        return Operator(WholeModel(sharded, objective))
    return Operator(FiniteDifferenceHessian(Gradient(sharded, objective, Routing(model, "frozen")), scheme, step))


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
    def trace(self) -> Estimate:
        """Trace with its standard error (None for one probe)."""
        return quadrature.trace(self.quadratures, self.size)

    def density(
        self, *, axis: Literal["linear", "symlog", "log", "chebyshev"] = "linear", **options: Any
    ) -> Density:  # fmt: skip
        """Return the smoothed spectral density and its width; ``options`` as in linalg.density.

        "log" is over log10 |lambda|; "chebyshev" is linear, by damped Chebyshev moments instead of Gaussians.
        """
        smooth: dict[str, Callable[..., Density]] = {
            "linear": densities.density, "symlog": densities.density_symlog, "log": densities.density_log,
            "chebyshev": densities.density_chebyshev,
        }  # fmt: skip
        return smooth[axis](self.quadratures, **options)

    def cumulative(self, points: Any, *, risk: float = 0.05) -> Cumulative:
        """Return the share of eigenvalues at or below ``points``, with bounds of the truth."""
        return measure.cumulative(self._recurrences, points, self.size, risk=risk)

    def mass(self, *, above: float = -math.inf, below: float = math.inf, risk: float = 0.05) -> Interval:
        """Return the share of eigenvalues in [``above``, ``below``], with bounds."""
        return measure.mass(self._recurrences, self.size, above=above, below=below, risk=risk)

    def wasserstein_bound(self, *, risk: float = 0.05) -> float:
        """Bound W1 between the spectrum and the mean quadrature, in units of the eigenvalues."""
        return measure.wasserstein_a_posteriori(self._recurrences, self.size, risk=risk)

    @property
    def frobenius_norm(self) -> Estimate:
        """Frobenius norm with its standard error: a probe's second moment is alpha_1^2 + beta_1^2."""
        squares = [self.size * float(q.weights @ q.values**2) for q in self.quadratures]
        return traces.Moments([], squares).frobenius_estimate

    @property
    def _recurrences(self) -> list[measure.Recurrence]:
        return list(zip(self.alphas, self.betas, strict=True))


def slq(
    operator: Operator,
    *,
    steps: int = 20,
    probes: int = 1,
    seed: int = 0,
    distribution: Literal["rademacher", "gaussian"] = "rademacher",
    reorthogonalise: Reorthogonalise = "full",
) -> Spectrum:
    """Stochastic Lanczos quadrature (Ubaru, Chen, Saad 2017): the spectral density of ``operator``."""
    space = operator.space
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


@dataclass(frozen=True)
class Eigenpairs:
    """Eigenvalues ascending, residuals |A u - lambda u|, eigenvectors as rows (pair, N), in the operator's order."""

    values: np.ndarray
    residuals: np.ndarray
    vectors: torch.Tensor = field(repr=False)
    converged: bool
    num_products: int


def eigenpairs(
    operator: Operator, count: int, *, which: eigen.Which = "both", tolerance: float = 1e-3, basis_size: int | None = None,
    most_products: int = 300, seed: int = 0,
) -> Eigenpairs:  # fmt: skip
    """Return extreme eigenpairs by Lanczos with thick restarts (Wu and Simon 2000), in the memory of ``basis_size`` vectors.

    Parameters
    ----------
    count, which : so many of each end ("both"), or the "largest", "smallest", or largest in "magnitude".
    tolerance : of the residuals, relative to the largest |lambda|.
    basis_size : at least the wanted pairs and three; twice as many and eight unless given.

    Raises
    ------
    ConfigError, NumericsError : with the remedy.

    """
    space = operator.space
    size = min(basis_size or 2 * eigen.num_wanted(count, which) + 8, space.size)
    process = eigen.ThickRestart(operator, Basis(space, size + 1), size, count, which, tolerance)
    process.start(probe_vectors.draw(space, seed=seed, probe=0, distribution="gaussian"))
    found = eigen.eigenpairs(process, most_products)
    vectors = torch.stack([found.vector(k).data for k in range(len(found.values))])
    return Eigenpairs(found.values, found.residuals, vectors, process.finished, process.num_products)


def trace(
    operator: Operator, *, method: Literal["xtrace", "hutch++", "hutchinson"] = "xtrace", products: int = 60, seed: int = 0
) -> Estimate:  # fmt: skip
    """Estimate the trace from so many products, with a standard error. The first two hold vectors of half or a third."""
    if method == "xtrace":
        return traces.xtrace(operator, Basis(operator.space, products // 2), products, seed=seed)
    if method == "hutch++":
        return traces.hutch_plus_plus(operator, Basis(operator.space, products // 3), products, seed=seed)
    return traces.hutchinson(operator, StoppingRule(0.0, most=products), seed=seed).trace_estimate


def diagonal(
    operator: Operator, *, method: Literal["xdiag", "hutchinson"] = "xdiag", products: int = 60, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Estimate the diagonal from so many products: its entries and their standard errors, each (N,)."""
    if method == "xdiag":
        basis, images = (Basis(operator.space, products // 2) for _ in range(2))
        found = diagonals.xdiag(operator, basis, images, products, seed=seed)
    else:
        found = diagonals.diagonal_hutchinson(operator, most=products, seed=seed)
    return found.mean.data, found.stderr.data


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
    found = sub_blocks.sub_block(operator._operator, sub_blocks.select(operator.layout, selections), columns=columns)
    return 0.5 * (found + found.T)


def solve(
    operator: Operator, b: torch.Tensor, *, damping: float, method: Literal["minres", "cg"] = "minres",
    tolerance: float = 1e-4, products: int = 100,
) -> tuple[torch.Tensor, list[float]]:  # fmt: skip
    """Solve (A + damping I) x = b: x, and the relative residuals before and after every product.

    Raises
    ------
    NumericsError : "cg" met negative curvature.

    """
    run = solvers.minres if method == "minres" else solvers.conjugate_gradients
    right = operator.space.wrap(b.reshape(-1).to(operator.space.device, operator.space.dtype))
    found = run(operator, right, damping=damping, tolerance=tolerance, most=products)
    return found.x.data, found.residuals

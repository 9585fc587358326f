"""The Python interface, for notebooks: one process, any ``torch.nn.Module``.

>>> operator = hpc_hess.hessian(model, batches, loss)   # doctest: +SKIP
>>> spectrum = hpc_hess.slq(operator, steps=40, probes=4)   # doctest: +SKIP
>>> spectrum.lambda_max, spectrum.trace   # doctest: +SKIP
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator as ScipyOperator
from torch import nn

from hpc_hess.curvature.cross_entropy import Kind
from hpc_hess.curvature.exact import ExactHessian, StreamedOperator
from hpc_hess.curvature.finite_difference import FiniteDifferenceHessian, Scheme
from hpc_hess.curvature.gauss_newton import EmpiricalFisher, GaussNewton, Residual
from hpc_hess.curvature.whole_model import WholeModel, exact_or_whole
from hpc_hess.errors import ConfigError, DataError
from hpc_hess.linalg import probes as probe_vectors
from hpc_hess.linalg import quadrature
from hpc_hess.linalg.lanczos import Lanczos, Reorthogonalise, basis_rows
from hpc_hess.linalg.operator import LinearOperator
from hpc_hess.linalg.quadrature import Density, Estimate, Ritz
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

    def density(self, *, axis: Literal["linear", "symlog"] = "linear", **options: Any) -> Density:
        """Return the smoothed spectral density; ``options`` as in linalg.quadrature."""
        smooth = quadrature.density if axis == "linear" else quadrature.density_symlog
        return smooth(self.quadratures, **options)


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
        start = space.zeros()
        probe_vectors.fill(start.data, *space.shard.global_intervals, seed=seed, probe=probe, distribution=distribution)
        process = Lanczos(operator, basis, steps, reorthogonalise)
        process.start(start)
        while not process.finished:
            process.step()
        alphas.append(np.array(process.alpha))
        betas.append(np.array(process.beta))
        quadratures.append(quadrature.ritz(process.alpha, process.beta))
    return Spectrum(space.size, quadratures, alphas, betas)

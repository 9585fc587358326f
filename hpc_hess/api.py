"""The Python interface, for notebooks: one process, any ``torch.nn.Module``.

>>> operator = hpc_hess.hessian(model, batches, loss)   # doctest: +SKIP
>>> spectrum = hpc_hess.slq(operator, steps=40, probes=4)   # doctest: +SKIP
>>> spectrum.lambda_max, spectrum.trace   # doctest: +SKIP
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

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
from hpc_hess.errors import ConfigError, ModelError
from hpc_hess.intake import given
from hpc_hess.intake.findings import Finding, noted
from hpc_hess.linalg import density as densities
from hpc_hess.linalg import diagonal as diagonals
from hpc_hess.linalg import eigen, measure, quadrature
from hpc_hess.linalg import probes as probe_vectors
from hpc_hess.linalg import solve as solvers
from hpc_hess.linalg import trace as traces
from hpc_hess.linalg.density import Density
from hpc_hess.linalg.lanczos import Lanczos, Reorthogonalise, basis_rows
from hpc_hess.linalg.measure import Cumulative, Interval
from hpc_hess.linalg.operator import LinearOperator, products
from hpc_hess.linalg.quadrature import Estimate, Ritz
from hpc_hess.linalg.sampling import StoppingRule
from hpc_hess.model.gradient import Gradient
from hpc_hess.model.loss import CallableObjective, CausalLMObjective, LossFunction, own_objective
from hpc_hess.model.routing import Routing
from hpc_hess.model.undisturbed import undisturbed
from hpc_hess.model.users import of_user, plain_suffices, tried_once, user_objective
from hpc_hess.parallel.basis import Basis
from hpc_hess.parallel.layout import Layout
from hpc_hess.parallel.vector import Vector, VectorSpace


class Operator:
    """A curvature matrix of a model in this process. Vectors are flat, in the order of ``layout``'s parameters.

    ``notes`` say how products are taken, and what else a user should know: kernels that were switched, a model that is not
    split into blocks, parameters that are left out. ``intake`` holds all findings about what was given.
    """

    def __init__(self, operator: LinearOperator, module: nn.Module | None = None, intake: Sequence[Finding] = ()) -> None:
        self._operator, self._module = operator, module
        self.space: VectorSpace = operator.space
        self.layout: Layout = operator.space.layout
        self.shape = (self.space.size, self.space.size)
        self.intake: list[Finding] = list(intake)
        self.notes: list[str] = [
            *getattr(operator, "notes", []), *(finding.text for finding in intake if finding.verdict != "passed")
        ]  # fmt: skip

    def __repr__(self) -> str:
        """Show the size, and the notes."""
        return "\n".join([f"{type(self).__name__} of {self.space.size:,} parameters", *(f"  note: {n}" for n in self.notes)])

    def matvec(self, v: Any) -> Any:
        """Return A v for a vector of N finite real entries: a numpy array, a torch tensor, a list or a Vector; in kind.

        Products are floating-point numbers: float32 and float64 vectors keep their type, all others get the operator's.

        Raises
        ------
        ConfigError : the vector has another size, or is complex. NumericsError : it, or the product, is not finite.

        """
        if isinstance(v, Vector):
            if v.data.shape != (self.space.size_local,):
                raise ConfigError(f"the operator acts on {self.space.size} entries, the vector has {v.space.size}")
            return self._multiply([v])[0]
        data, dtype = given.vector(v, self.space.size, self.space.dtype, self.space.device)
        product = self._multiply([self.space.wrap(data.clone())])[0].data.to(dtype)
        return product.to(v.device) if isinstance(v, torch.Tensor) else product.cpu().numpy()

    def matmat(self, vectors: Sequence[Vector]) -> list[Vector]:
        """Return the products with several Vectors, which share what work they can."""
        return self._multiply(vectors)

    def _multiply(self, vectors: Sequence[Vector]) -> list[Vector]:
        with undisturbed(self._module):
            return products(self._operator, vectors)

    def __matmul__(self, v: Any) -> Any:
        """``operator @ v``."""
        return self.matvec(v)

    def to_scipy(self) -> ScipyOperator:
        """Return a scipy.sparse.linalg.LinearOperator, for eigsh and friends."""
        dtype = torch.empty(0, dtype=self.space.dtype).numpy().dtype
        return ScipyOperator(self.shape, matvec=self.matvec, rmatvec=self.matvec, dtype=dtype)


class _Differences:
    """Finite differences around theta_0, which write theta_0 back: not over what a user has trained since."""

    def __init__(self, operator: FiniteDifferenceHessian) -> None:
        self.space, self._operator = operator.space, operator

    def matvec(self, v: Vector) -> Vector:
        model, theta0 = self._operator.gradient.model, self._operator.theta0
        if not torch.equal(model.read_parameters(), theta0):
            raise ConfigError("the model's parameters have changed since hessian() was called: call it again")
        with torch.autocast(self.space.device.type, enabled=False):
            return self._operator.matvec(v)


_KINDS: dict[str, type[StreamedOperator]] = {
    "hessian": ExactHessian, "gauss_newton": GaussNewton, "residual": Residual, "fisher": EmpiricalFisher,
}  # fmt: skip


def hessian(
    model: nn.Module,
    batches: Iterable[Any],
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

    Whatever of the model a product changes, it puts back: the training flag, gradients, buffers, parameters.

    Parameters
    ----------
    model : any module. The matrix is that of the selected parameters that require gradients; they share one dtype and
        device (float64 gives the smallest error). Half precision needs method "exact"; vectors are float32 then.
    batches : any iterable, drawn once; each element is passed to ``loss``.
    loss : ``loss(model, batch)`` returns a scalar (batches count equally) or a pair (sum, weight) for a weighted mean.
        The default is the token-weighted cross-entropy of a causal LM on dictionaries with ``input_ids``, or on the ids
        alone; whatever else the model's forward takes (``position_ids``) is handed on to it.
    method, scheme, step : as in the configuration's [operator]. "exact" streams a causal LM with its own loss block by
        block, and takes any other model or loss as a whole: its ``loss`` must be twice differentiable.
    kind : "hessian"; by exact products of a causal LM with its own loss also "gauss_newton", "residual", "fisher".
    include, exclude : globs over parameter names; the Hessian of the selected parameters.

    Raises
    ------
    DataError, LayoutError, ModelError, NumericsError, ConfigError : with the remedy.

    """
    given.one_of("kind", kind, _KINDS)
    given.one_of("method", method, ("finite_difference", "exact"))
    given.one_of("scheme", scheme, ("forward", "central", "fourth"))
    if step != "auto" and given.real("step", step) <= 0:
        raise ConfigError(f'step = {step} is not valid: it should be "auto" or greater than 0')
    if kind != "hessian" and (method != "exact" or loss is not None):
        raise ConfigError(f'kind = "{kind}" needs method = "exact" and the causal LM\'s own loss: leave loss out')
    given.model(model)
    sharded, intake = of_user(model, include, exclude)
    computed = dict(sharded.module.named_parameters())[sharded.layout.parameters[0].name].dtype
    half = computed in (torch.bfloat16, torch.float16)
    if half and method == "finite_difference":
        raise ConfigError(given.ROUNDED)
    with undisturbed(model):
        objective: CausalLMObjective | CallableObjective
        if loss is None:
            objective, notes = own_objective(batches, model, sharded.space.device)
            intake += notes
        else:
            if not callable(loss):
                raise ConfigError(f"loss is a {type(loss).__name__}: it should be a function loss(model, batch)")
            objective = user_objective(batches, loss, model)
        tried, rounded = tried_once(sharded, objective)
        intake += tried
        if method == "finite_difference":
            if rounded:
                raise ConfigError(given.ROUNDED)
            gradient = Gradient(sharded, objective, Routing(model, "frozen"))
            return Operator(_Differences(FiniteDifferenceHessian(gradient, scheme, step)), model, intake)
        if half:
            intake.append(noted("given.precision", f"products are computed in {str(computed).removeprefix('torch.')}, "
                                                   "vectors are float32"))  # fmt: skip
        compute_dtype = computed if half else None
        if isinstance(objective, CausalLMObjective) and not plain_suffices(sharded, objective):
            if kind != "hessian":
                raise ModelError(f'forwards were replaced on parts of the model, so kind = "{kind}" is not known')
            objective = user_objective(objective.micro_batches, CausalLMObjective.of_batch, model)
        if isinstance(objective, CausalLMObjective):
            return Operator(exact_or_whole(_KINDS[kind], sharded, objective, compute_dtype=compute_dtype), model, intake)
        return Operator(WholeModel(sharded, objective, compute_dtype=compute_dtype), model, intake)


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
    """Stochastic Lanczos quadrature (Ubaru, Chen, Saad 2017): the spectral density of ``operator``.

    Raises
    ------
    ConfigError : an argument is not valid. NumericsError : a product is not finite.

    """
    space = operator.space
    steps, probes, seed = (given.whole(*x) for x in (("steps", steps), ("probes", probes), ("seed", seed, 0)))
    given.one_of("distribution", distribution, ("rademacher", "gaussian"))
    if isinstance(reorthogonalise, str):
        given.one_of("reorthogonalise", reorthogonalise, ("full", "none"))
    else:
        reorthogonalise = given.whole("reorthogonalise", reorthogonalise)
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
    """Eigenvalues ascending, residuals |A u - lambda u|, eigenvectors as rows (pair, N), in the operator's order.

    ``converged``: all residuals are within the tolerance. ``multiplicity_resolved``: a search from a new direction has found
    no eigenvalue that is missing, such as another copy of one; where it is False, copies may be missing.
    """

    values: np.ndarray
    residuals: np.ndarray
    vectors: torch.Tensor = field(repr=False)
    converged: bool
    num_products: int
    multiplicity_resolved: bool = False


def eigenpairs(
    operator: Operator, count: int, *, which: eigen.Which = "both", tolerance: float = 1e-3, basis_size: int | None = None,
    most_products: int = 300, seed: int = 0, copies: bool = True,
) -> Eigenpairs:  # fmt: skip
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
    )  # fmt: skip
    given.one_of("which", which, ("largest", "smallest", "both", "magnitude"))
    wanted = eigen.num_wanted(count, which)
    size = min(2 * wanted + 8 if basis_size is None else given.whole("basis_size", basis_size), space.size)
    process = eigen.ThickRestart(
        operator, Basis(space, size + 1), size, count, which, given.real("tolerance", tolerance, 0.0), copies=copies,
        seed=seed,
    )  # fmt: skip
    process.start(probe_vectors.draw(space, seed=seed, probe=0, distribution="gaussian"))
    found = eigen.eigenpairs(process, most_products)
    vectors = torch.stack([found.vector(k).data for k in range(len(found.values))])
    return Eigenpairs(
        found.values, found.residuals, vectors, process.converged, process.num_products, process.complete
    )  # fmt: skip


def trace(
    operator: Operator, *, method: Literal["xtrace", "hutch++", "hutchinson"] = "xtrace", products: int = 60, seed: int = 0
) -> Estimate:  # fmt: skip
    """Estimate the trace from so many products, with a standard error. The first two hold vectors of half or a third."""
    least = {"xtrace": 4, "hutch++": 6, "hutchinson": 2}
    products = given.whole("products", products, least[given.one_of("method", method, least)])
    seed = given.whole("seed", seed, 0)
    if method == "xtrace":
        return traces.xtrace(operator, Basis(operator.space, products // 2), products, seed=seed)
    if method == "hutch++":
        return traces.hutch_plus_plus(operator, Basis(operator.space, products // 3), products, seed=seed)
    return traces.hutchinson(operator, StoppingRule(0.0, most=products), seed=seed).trace_estimate


def diagonal(
    operator: Operator, *, method: Literal["xdiag", "hutchinson"] = "xdiag", products: int = 60, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Estimate the diagonal from so many products: its entries and their standard errors, each (N,)."""
    least = {"xdiag": 4, "hutchinson": 2}
    products = given.whole("products", products, least[given.one_of("method", method, least)])
    seed = given.whole("seed", seed, 0)
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


def solve(
    operator: Operator, b: Any, *, damping: float, method: Literal["minres", "cg"] = "minres",
    tolerance: float = 1e-4, products: int = 100,
) -> Solution:  # fmt: skip
    """Solve (A + damping I) x = b: x, the relative residuals before and after every product, and whether it converged.

    Raises
    ------
    NumericsError : "cg" met negative curvature. ConfigError : an argument is not valid.

    """
    run = {"minres": solvers.minres, "cg": solvers.conjugate_gradients}[given.one_of("method", method, ("minres", "cg"))]
    damping, tolerance = given.real("damping", damping), given.real("tolerance", tolerance, 0.0)
    right, _ = given.vector(b, operator.space.size, operator.space.dtype, operator.space.device)
    found = run(operator, operator.space.wrap(right.clone()), damping=damping, tolerance=tolerance,
                most=given.whole("products", products))  # fmt: skip
    solution = Solution(found.x.data, found.residuals)
    solution.converged = found.residuals[-1] <= tolerance
    return solution

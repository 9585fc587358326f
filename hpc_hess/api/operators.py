"""Operators of any ``torch.nn.Module``, in one process."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal, overload

import numpy as np
import torch
from numpy.typing import ArrayLike
from scipy.sparse.linalg import LinearOperator as ScipyOperator
from torch import nn

from hpc_hess.api.showing import Shown
from hpc_hess.curvature.differences.finite_difference import FiniteDifferenceHessian, Scheme
from hpc_hess.curvature.exact.programs import default_directory
from hpc_hess.curvature.exact.streaming import Settings
from hpc_hess.curvature.exact.whole_model import WholeModel, exact_or_whole
from hpc_hess.curvature.operators import Point, built, exact_product
from hpc_hess.errors import ConfigError, ModelError
from hpc_hess.intake import given
from hpc_hess.intake.batches import drawn, kept
from hpc_hess.intake.findings import Finding, noted
from hpc_hess.linalg.operator import LinearOperator, products
from hpc_hess.model.blocks.users import of_user, plain_suffices, tried_once, user_objective
from hpc_hess.model.sharded.gradient import Gradient
from hpc_hess.model.sharded.loss import CallableObjective, CausalLMObjective, LossFunction, Objective, own_objective
from hpc_hess.model.sharded.routing import Routing
from hpc_hess.model.sharded.shard import ShardedModel
from hpc_hess.model.sharded.undisturbed import undisturbed
from hpc_hess.parallel.layout import Layout
from hpc_hess.parallel.vector import Vector, VectorSpace
from hpc_hess.registry.operators import OPERATORS, OperatorSpec


class Operator(Shown):
    """A curvature matrix of a model in this process. Vectors are flat, in the order of ``layout``'s parameters.

    ``matrix`` names it. ``notes`` say how products are taken, and what else a user should know: kernels that were switched,
    a model that is not split into blocks, parameters that are left out. ``intake`` holds all findings about what was given.
    """

    def __init__(
        self,
        operator: LinearOperator,
        module: nn.Module | None = None,
        intake: Sequence[Finding] = (),
        notes: Sequence[str] = (),
        matrix: str = "matrix",
        by: str = "products",
    ) -> None:
        self._operator, self._module = operator, module
        self.space: VectorSpace = operator.space
        self.layout: Layout = operator.space.layout
        self.shape = (self.space.size, self.space.size)
        self.intake: list[Finding] = list(intake)
        self._notes, self.matrix, self._by = notes, matrix, by

    @property
    def notes(self) -> list[str]:
        """What to know of it, in sentences. Products may add to them."""
        found = [finding.text for finding in self.intake if finding.verdict != "passed"]
        return [*self._notes, *getattr(self._operator, "notes", []), *found]

    def _lines(self) -> list[str]:
        where = f"{str(self.space.dtype).removeprefix('torch.')} on {self.space.device}"
        names = len(self.layout.parameters)
        return [
            f"{type(self).__name__}: {self.matrix} of {self.space.size:,} parameters in {names:,} tensors",
            f"{self._by}, vectors in {where}",
            *(f"note: {note}" for note in self.notes),
        ]

    @overload
    def matvec(self, v: Vector) -> Vector: ...

    @overload
    def matvec(self, v: torch.Tensor) -> torch.Tensor: ...

    @overload
    def matvec(self, v: ArrayLike) -> np.ndarray: ...

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

    @overload
    def __matmul__(self, v: Vector) -> Vector: ...

    @overload
    def __matmul__(self, v: torch.Tensor) -> torch.Tensor: ...

    @overload
    def __matmul__(self, v: ArrayLike) -> np.ndarray: ...

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


def hessian(
    model: nn.Module,
    batches: Iterable[Any],
    loss: LossFunction | None = None,
    *,
    method: Literal["finite_difference", "exact"] = "finite_difference",
    kind: str = "hessian",
    scheme: Scheme = "central",
    step: float | Literal["auto"] = "auto",
    compile: Literal["auto", "on", "off"] = "auto",
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
) -> Operator:
    """Return the Hessian of the mean loss over ``batches`` as an operator. The model is used in place, in eval mode.

    Whatever of the model a product changes, it puts back: the training flag, gradients, buffers, parameters.

    Parameters
    ----------
    model : any module. The matrix is that of the selected parameters that require gradients; they share one dtype and
        device (float64 gives the smallest error). Half precision needs method "exact"; vectors are float32 then.
    batches : any iterable, drawn once and kept; each element is passed to ``loss``.
    loss : ``loss(model, batch)`` returns a scalar (batches count equally) or a pair (sum, weight) for a weighted mean.
        The default is the token-weighted cross-entropy of a causal LM on dictionaries with ``input_ids``, or on the ids
        alone; whatever else the model's forward takes (``position_ids``) is handed on to it.
    method, scheme, step : as in the configuration's [operator]. "exact" streams a causal LM with its default loss block by
        block, and takes any other model or loss as a whole: its ``loss`` must be twice differentiable.
    compile : whether the blocks of exact products are compiled: "auto" once as many products as there were would repay it.
    kind : the matrix, as in the configuration's operator.kind. Those that need exact products need the loss of a causal LM.
    include, exclude : globs over parameter names; the Hessian of the selected parameters.

    Raises
    ------
    DataError, LayoutError, ModelError, NumericsError, ConfigError : with the remedy.

    """
    spec = OPERATORS[given.one_of("kind", kind, OPERATORS)]
    any_loss = "finite_difference" in spec.methods  # it is made of the Hessian
    given.one_of("method", method, ("finite_difference", "exact"))
    given.one_of("scheme", scheme, ("forward", "central", "fourth"))
    given.one_of("compile", compile, ("auto", "on", "off"))
    if step != "auto" and given.real("step", step) <= 0:
        raise ConfigError(f'step = {step} is not valid: it should be "auto" or greater than 0')
    if method not in spec.methods or not (any_loss or loss is None):
        own = "" if any_loss else " and the causal LM's default loss: leave loss out"
        raise ConfigError(f'kind = "{kind}" needs method = {spec.by}{own}')
    given.model(model)
    sharded, intake = of_user(model, include, exclude)
    computed = dict(sharded.module.named_parameters())[sharded.layout.parameters[0].name].dtype
    half = computed in (torch.bfloat16, torch.float16)
    if half and method == "finite_difference":
        raise ConfigError(given.ROUNDED)
    found = drawn(batches)
    intake += kept(batches, found)
    with undisturbed(model):
        objective: CausalLMObjective | CallableObjective
        if loss is None:
            objective, notes = own_objective(found, model, sharded.space.device)
            intake += notes
        else:
            if not callable(loss):
                raise ConfigError(f"loss is a {type(loss).__name__}: it should be a function loss(model, batch)")
            objective = user_objective(found, loss, model)
        tried, rounded = tried_once(sharded, objective)
        intake += tried
        if method == "finite_difference":
            if rounded:
                raise ConfigError(given.ROUNDED)
            gradient = Gradient(sharded, objective, Routing(model, "frozen"))
            return _made(spec, _Differences(FiniteDifferenceHessian(gradient, scheme, step)), sharded, objective, intake)
        if half:
            intake.append(
                noted(
                    "given.precision",
                    f"products are computed in {str(computed).removeprefix('torch.')}, vectors are float32",
                )
            )
        compute_dtype = computed if half else None
        if isinstance(objective, CausalLMObjective) and not plain_suffices(sharded, objective):
            if not any_loss:
                raise ModelError(f'forwards were replaced on parts of the model, so kind = "{kind}" is not known')
            objective = user_objective(objective.micro_batches, CausalLMObjective.of_batch, model)
        product: LinearOperator
        if isinstance(objective, CausalLMObjective):
            settings = Settings(compile=compile, programs=default_directory())
            product = exact_or_whole(exact_product(spec), sharded, objective, compute_dtype=compute_dtype, settings=settings)
        else:
            product = WholeModel(sharded, objective, exact_product(spec).start, compute_dtype=compute_dtype)
        return _made(spec, product, sharded, objective, intake)


def _made(
    spec: OperatorSpec, product: LinearOperator, model: ShardedModel, objective: Objective, intake: Sequence[Finding]
) -> Operator:
    """Return the operator of a product, with loss and gradient at the model's parameters where it is built of them."""
    by = "differences of gradients" if isinstance(product, _Differences) else "exact products"
    if spec.build is None:
        return Operator(product, model.module, intake, (), spec.matrix, by)
    dtype = dict(model.module.named_parameters())[model.layout.parameters[0].name].dtype  # in which backward passes add
    own = ShardedModel(model.module, model.world, VectorSpace(model.world, model.layout, dtype), sharded=False)
    loss, gradient = Gradient(own, objective)()
    point = Point(loss, model.space.wrap(gradient.data.to(model.space.dtype)), model)
    return Operator(built(spec, product, point), model.module, intake, getattr(product, "notes", ()), spec.matrix, by)

"""Operators of any ``torch.nn.Module``, in one process or over the ranks of a program that the user launched."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Sequence
from pathlib import PurePath
from typing import Any, Literal, ParamSpec, TypeVar, overload

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
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
from hpc_hess.model.blocks.users import of_user, plain_suffices, require_causal, require_equal_replicas, tried_once
from hpc_hess.model.sharded.borrowed import without_hooks
from hpc_hess.model.sharded.gradient import Gradient
from hpc_hess.model.sharded.loss import CausalLMObjective
from hpc_hess.model.sharded.own_loss import CallableObjective, LossFunction, own_objective
from hpc_hess.model.sharded.parts import Parts
from hpc_hess.model.sharded.placed import Placed, placed
from hpc_hess.model.sharded.routing import Routing
from hpc_hess.model.sharded.shard import ShardedModel
from hpc_hess.model.sharded.undisturbed import undisturbed
from hpc_hess.parallel.in_step import alike
from hpc_hess.parallel.layout import Layout
from hpc_hess.parallel.vector import Vector, VectorSpace
from hpc_hess.parallel.world import World
from hpc_hess.registry.operators import OPERATORS, OperatorSpec


class Operator(Shown):
    """A curvature matrix of a user's model. Vectors are flat, in the order of ``layout``'s parameters.

    Of a model that lies over several ranks every rank makes the same calls, and has its part of each vector.

    ``matrix`` names it. ``notes`` say how products are taken, and what else a user should know: kernels that were switched,
    a model that is not split into blocks, parameters that are left out. ``intake`` holds all findings about what was given.
    ``parts``: what a run that is kept makes it of again, None where it is made of other operators.
    """

    def __init__(
        self,
        operator: LinearOperator,
        module: nn.Module | None = None,
        intake: Sequence[Finding] = (),
        notes: Sequence[str] = (),
        matrix: str = "matrix",
        by: str = "products",
        parts: Parts | None = None,
    ) -> None:
        self._operator, self._module, self.parts = operator, module, parts
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
    def matvec(self, v: ArrayLike) -> NDArray[np.floating[Any]]: ...

    def matvec(self, v: Any) -> Any:
        """Return A v for a vector of finite real entries: a numpy array, a torch tensor, a list or a Vector; in kind.

        Over several ranks ``v`` is this rank's part, or all N entries, on every rank; so is the product. Products are
        floating-point numbers: float32 and float64 vectors keep their type, all others get the operator's.
        Collective: yes.

        Raises
        ------
        ConfigError : the vector has another size, or is complex. NumericsError : it, or the product, is not finite.

        """
        taken, whole, dtype = self.taken(v)
        product = self._multiply([taken])[0]
        if isinstance(v, Vector):
            return product
        data = (self.whole(product) if whole else product.data).to(dtype)
        return data.to(v.device) if isinstance(v, torch.Tensor) else data.cpu().numpy()

    def taken(self, v: Any) -> tuple[Vector, bool, torch.dtype]:
        """Return ``v`` as a Vector, whether it was all of several ranks' entries, and the type of products with it.

        Collective: yes. Raises ConfigError, NumericsError.
        """
        space, world = self.space, self.space.world
        with world.together("a vector"):
            if isinstance(v, Vector):
                if v.data.shape != (space.size_local,):
                    raise ConfigError(f"the operator acts on {space.size} entries, the vector has {v.space.size}")
                flat, dtype, part = v.data, v.data.dtype, True
            else:
                part = given.entries(v) == space.size_local
                flat, dtype = given.vector(v, space.size_local if part else space.size, space.dtype, space.device)
                flat = flat.clone() if part else self.part(flat)
        of_a_rank = world.any_true(part and space.size_local < space.size, "whose part a vector is")
        return v if isinstance(v, Vector) else space.wrap(flat), not (part or of_a_rank), dtype

    def part(self, whole: Any) -> Any:
        """Return this rank's part of all N entries, a tensor or a numpy array, in kind, (size_local,). Collective: no."""
        starts, lengths = self.space.shard.file_intervals
        if isinstance(whole, np.ndarray):
            return self.part(torch.from_numpy(whole)).numpy()
        return torch.cat([whole[:0], *(whole[s : s + n] for s, n in zip(starts.tolist(), lengths.tolist(), strict=True))])

    def whole(self, part: Any) -> Any:
        """Return all N entries of a vector on every rank, (N,): an array of an array, else a tensor. Collective: yes."""
        if isinstance(part, np.ndarray):
            return self.whole(torch.from_numpy(part).to(self.space.device)).cpu().numpy()
        data = part.data if isinstance(part, Vector) else part
        out, position = torch.zeros(self.space.size, dtype=data.dtype, device=self.space.device), 0
        for start, length in zip(*(x.tolist() for x in self.space.shard.file_intervals), strict=True):
            out[start : start + length] = data[position : position + length]
            position += length
        return self.space.sum(out, "a whole vector")

    def matmat(self, vectors: Sequence[Vector]) -> list[Vector]:
        """Return the products with several Vectors, which share what work they can. Collective: yes."""
        return self._multiply(vectors)

    def _multiply(self, vectors: Sequence[Vector]) -> list[Vector]:
        if self.space.world.size > 1:
            alike(self.space.world, "a product", {"vectors": str(len(vectors))})
        with undisturbed(self._module):
            return products(self._operator, vectors)

    def require_theta0(self) -> None:
        """Refuse a model that has been trained since, as products by finite differences do. Collective: yes.

        Raises
        ------
        ConfigError : its parameters have changed.

        """
        if isinstance(self._operator, _Differences):
            with undisturbed(self._module):
                self._operator.require_theta0()

    @overload
    def __matmul__(self, v: Vector) -> Vector: ...

    @overload
    def __matmul__(self, v: torch.Tensor) -> torch.Tensor: ...

    @overload
    def __matmul__(self, v: ArrayLike) -> NDArray[np.floating[Any]]: ...

    def __matmul__(self, v: Any) -> Any:
        """``operator @ v``."""
        return self.matvec(v)

    def to_scipy(self) -> ScipyOperator:
        """Return a scipy.sparse.linalg.LinearOperator, for eigsh and friends."""
        dtype = torch.empty(0, dtype=self.space.dtype).numpy().dtype
        return ScipyOperator(self.shape, matvec=self.matvec, rmatvec=self.matvec, dtype=dtype)


P = ParamSpec("P")
R = TypeVar("R")
_OF_A_RANK = ("b", "progress")  # arguments that may differ between ranks


def collective(call: Callable[P, R]) -> Callable[P, R]:
    """Have ``call(operator, ...)`` refuse, on every rank, arguments that the ranks do not give alike. Collective: yes."""
    signature = inspect.signature(call)

    @functools.wraps(call)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        operator, *_ = signature.bind(*args, **kwargs).args
        if isinstance(operator, Operator) and operator.space.world.size > 1:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            plain = {name: v for name, v in bound.arguments.items() if name not in _OF_A_RANK}
            words = {
                name: repr(v)
                for name, v in plain.items()
                if isinstance(v, str | int | float | list | tuple | PurePath | None)
            }
            alike(operator.space.world, call.__name__, {**words, "operator": str(operator.shape)})
        return call(*args, **kwargs)

    return checked


class _Differences:
    """Finite differences around theta_0, which write theta_0 back: not over what a user has trained since."""

    def __init__(self, operator: FiniteDifferenceHessian) -> None:
        self.space, self._operator = operator.space, operator

    def matvec(self, v: Vector) -> Vector:
        self.require_theta0()
        return self._operator.matvec(v)

    def require_theta0(self) -> None:
        """Refuse a model that has been trained since. Collective: yes. Raises ConfigError."""
        same = self._operator.gradient.model.holds(self._operator.theta0)
        if not self.space.world.all_true(same, "whether the parameters are the same"):
            raise ConfigError("the model's parameters have changed since hessian() was called: call it again")


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
    group: Any = None,
) -> Operator:
    """Return the Hessian of the mean loss over ``batches`` as an operator. The model is used in place, in eval mode.

    Whatever of the model a product changes, it puts back: the training flag, gradients, buffers, parameters. Collective
    over the ranks of a model that fully_shard or DistributedDataParallel spread; vectors are cut like the parameters.

    Parameters
    ----------
    model : any module. The matrix is that of the selected parameters that require gradients; they share one dtype and
        device (float64 gives the smallest error). Half precision needs method "exact"; vectors are float32 then.
    batches : any iterable, drawn once and kept; each element is passed to ``loss``. Of several ranks each has its own, any
        number.
    group : the torch process group whose ranks hold replicas of a plain module, and batches of their own. Without it a
        plain module is this process's alone.
    loss : ``loss(model, batch)`` returns a scalar (batches count equally) or a pair (sum, weight) for a weighted mean.
        The default is the token-weighted cross-entropy of a causal LM (encoders are refused) on dictionaries with
        ``input_ids``, or on the ids alone; whatever else the model's forward takes (``position_ids``) is handed on to it.
    method, scheme, step : as in the configuration's [operator]. "exact" streams a causal LM with its default loss block by
        block, and takes any other model or loss as a whole: its ``loss`` must be twice differentiable.
    compile : whether the blocks of exact products are compiled: "auto" once as many products as there were would repay it.
    kind : the matrix, as in the configuration's operator.kind. Those that need exact products need the loss of a causal LM.
    include, exclude : globs over parameter names; the Hessian of the selected parameters.

    Raises
    ------
    DataError, LayoutError, ModelError, NumericsError, ConfigError : with the remedy.

    """
    found = placed(model, group) if isinstance(model, nn.Module) else Placed(model, World.alone())
    world, module = found.world, found.module
    asked = {"method": method, "kind": kind, "scheme": scheme, "step": step, "compile": compile}
    with world.together("hessian"):
        given.model(module)
        spec = _checked(asked, loss)
        sharded, intake = of_user(module, include, exclude, found)
    if world.size > 1:
        of = {"model": f"{type(module).__name__} {sharded.layout.fingerprint[:8]} {sharded.space.dtype}"}
        alike(world, "hessian", {**{k: repr(v) for k, v in asked.items()}, **of, "loss": given.function(loss)})
        require_equal_replicas(sharded)
    computed = dict(module.named_parameters())[sharded.layout.parameters[0].name].dtype
    half = computed in (torch.bfloat16, torch.float16)
    if half and method == "finite_difference":
        raise ConfigError(given.ROUNDED)
    chosen = {"include": given.patterns("include", include), "exclude": given.patterns("exclude", exclude)}
    settings: dict[str, dict[str, Any]] = {"operator": asked, "parameters": chosen}
    with world.together("batches"):
        drawn_batches = drawn(batches, least=1 if world.size == 1 else 0)
        intake += kept(batches, drawn_batches)
    with undisturbed(module):
        objective: CausalLMObjective | CallableObjective
        product: LinearOperator
        if loss is None:
            objective, notes = own_objective(drawn_batches, module, sharded.space.device, world)
            intake += notes
        else:
            objective = CallableObjective(drawn_batches, loss, module, world)
        tried, rounded = tried_once(sharded, objective)
        intake += [*tried, *require_causal(sharded, objective)]
        if method == "finite_difference":
            if rounded:
                raise ConfigError(given.ROUNDED)
            gradient = Gradient(sharded, objective, Routing(module, "frozen"))
            product = _Differences(FiniteDifferenceHessian(gradient, scheme, step))
            return _made(spec, product, Parts(sharded, objective, settings, given.function(loss), intake))
        if half:
            intake.append(
                noted(
                    "given.precision",
                    f"products are computed in {str(computed).removeprefix('torch.')}, vectors are float32",
                )
            )
        options: dict[str, Any] = {
            "compute_dtype": computed if half else None,
            "plain": without_hooks(module) if sharded.sharded else None,
        }
        if isinstance(objective, CausalLMObjective) and not plain_suffices(sharded, objective):
            if "finite_difference" not in spec.methods:
                raise ModelError(f'forwards were replaced on parts of the model, so kind = "{kind}" is not known')
            objective = CallableObjective(objective.micro_batches, CausalLMObjective.of_batch, module, world)
        sharded.written()  # products read the shards, not what the last pass has gathered
        if isinstance(objective, CausalLMObjective):
            streamed = Settings(compile=compile, programs=default_directory())
            product = exact_or_whole(exact_product(spec), sharded, objective, settings=streamed, **options)
        else:
            product = WholeModel(sharded, objective, exact_product(spec).start, **options)
        return _made(spec, product, Parts(sharded, objective, settings, given.function(loss), intake))


def _checked(asked: dict[str, Any], loss: Any) -> OperatorSpec:
    """Return the operator that is asked for, once every setting is valid. Raises ConfigError."""
    spec = OPERATORS[given.one_of("kind", asked["kind"], OPERATORS)]
    any_loss = "finite_difference" in spec.methods  # it is made of the Hessian
    given.one_of("method", asked["method"], ("finite_difference", "exact"))
    given.one_of("scheme", asked["scheme"], ("forward", "central", "fourth"))
    given.one_of("compile", asked["compile"], ("auto", "on", "off"))
    step = asked["step"]
    if step != "auto" and given.real("step", step) <= 0:
        raise ConfigError(f'step = {step} is not valid: it should be "auto" or greater than 0')
    if asked["method"] not in spec.methods or not (any_loss or loss is None):
        own = "" if any_loss else " and the causal LM's default loss: leave loss out"
        raise ConfigError(f'kind = "{asked["kind"]}" needs method = {spec.by}{own}')
    if loss is not None and not callable(loss):
        raise ConfigError(f"loss is a {type(loss).__name__}: it should be a function loss(model, batch)")
    return spec


def _made(spec: OperatorSpec, product: LinearOperator, parts: Parts) -> Operator:
    """Return the operator of a product, with loss and gradient at the model's parameters where it is built of them."""
    model = parts.model
    by = "differences of gradients" if isinstance(product, _Differences) else "exact products"
    if spec.build is None:
        return Operator(product, model.module, parts.findings, (), spec.matrix, by, parts)
    model.written()
    dtype = dict(model.module.named_parameters())[model.layout.parameters[0].name].dtype  # in which backward passes add
    own = ShardedModel(model.module, model.world, VectorSpace(model.world, model.layout, dtype), sharded=model.sharded)
    loss, gradient = Gradient(own, parts.objective)()
    point = Point(loss, model.space.wrap(gradient.data.to(model.space.dtype)), model)
    notes = getattr(product, "notes", ())
    return Operator(built(spec, product, point), model.module, parts.findings, notes, spec.matrix, by, parts)

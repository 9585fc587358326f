"""From the configuration to the operator: which matrix, by which product."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from hpc_hess.config import Config
from hpc_hess.curvature.differences.finite_difference import FiniteDifferenceHessian
from hpc_hess.curvature.exact.exact import StreamedOperator
from hpc_hess.curvature.exact.programs import default_directory
from hpc_hess.curvature.exact.streaming import Settings
from hpc_hess.curvature.exact.whole_model import ExactOperator, exact_or_whole
from hpc_hess.curvature.operators import Point, built, exact_product
from hpc_hess.curvature.record import ProductRecord
from hpc_hess.linalg.lanczos import basis_rows
from hpc_hess.linalg.operator import LinearOperator, products
from hpc_hess.model.sharded.precision import survives
from hpc_hess.parallel import devices
from hpc_hess.parallel.vector import Vector, VectorSpace
from hpc_hess.registry.operators import OPERATORS, OperatorSpec
from hpc_hess.session.problem import Problem, dtype_of
from hpc_hess.sketch.sketch import SketchedOperator


class CurvatureOperator(Protocol):
    """A LinearOperator that says what its last product did and what a bitwise resume needs of it."""

    space: VectorSpace
    notes: list[str]

    def matvec(self, v: Vector) -> Vector:
        """Return the product as a new Vector. Collective: yes."""
        ...

    def matmat(self, vectors: Sequence[Vector]) -> list[Vector]:
        """Return the products with several vectors, sharing what work they can. Collective: yes."""
        ...

    def last_record(self) -> ProductRecord:
        """What each of the last products did."""
        ...

    def to_state(self) -> dict[str, Any]:
        """JSON-able state for a bitwise resume."""
        ...

    def from_state(self, state: dict[str, Any]) -> None:
        """Take up what :meth:`to_state` gave."""
        ...


class _Differences:
    """Finite differences, with their step controller as the state."""

    def __init__(self, operator: FiniteDifferenceHessian) -> None:
        self._operator, self.space = operator, operator.space
        self.notes: list[str] = []

    def matvec(self, v: Vector) -> Vector:
        return self._operator.matvec(v)

    def matmat(self, vectors: Sequence[Vector]) -> list[Vector]:
        return products(self._operator, vectors)

    def last_record(self) -> ProductRecord:
        return self._operator.records[-1]

    def to_state(self) -> dict[str, Any]:
        return self._operator.controller.to_state()

    def from_state(self, state: dict[str, Any]) -> None:
        self._operator.controller.from_state(state)


class _Exact:
    """Exact products: between them they remember what is compiled, which rounds differently."""

    def __init__(self, operator: ExactOperator) -> None:
        self._operator, self.space, self.notes = operator, operator.space, operator.notes
        self._repaying = operator.repaying if isinstance(operator, StreamedOperator) else None
        self._compiling_s = 0.0

    def matvec(self, v: Vector) -> Vector:
        return self.matmat([v])[0]

    def matmat(self, vectors: Sequence[Vector]) -> list[Vector]:
        before_s = self._repaying.seconds if self._repaying else 0.0
        products = self._operator.matmat(vectors)
        self._compiling_s = self._repaying.seconds - before_s if self._repaying else 0.0
        return products

    def last_record(self) -> ProductRecord:
        return ProductRecord(calibration_s=self._compiling_s)

    def to_state(self) -> dict[str, Any]:
        return {"compiled": sorted(self._repaying.widths)} if self._repaying and self._repaying.widths else {}

    def from_state(self, state: dict[str, Any]) -> None:
        if self._repaying:
            self._repaying.widths |= set(state.get("compiled", ()))


class _Around:
    """An operator made of another, whose notes, records and state it keeps."""

    def __init__(self, inner: CurvatureOperator, operator: LinearOperator) -> None:
        self._operator, self.space, self.notes = operator, operator.space, inner.notes
        self.last_record, self.to_state, self.from_state = inner.last_record, inner.to_state, inner.from_state

    def matvec(self, v: Vector) -> Vector:
        return self._operator.matvec(v)

    def matmat(self, vectors: Sequence[Vector]) -> list[Vector]:
        return products(self._operator, vectors)


def spec_of(config: Config) -> OperatorSpec:
    """Return what is registered of operator.kind."""
    return OPERATORS[config.operator.kind]


def _made(
    config: Config, problem: Problem, product: CurvatureOperator, loss: float, gradient: Vector | None
) -> CurvatureOperator:
    """Return the operator of [operator], of its product at theta_0. Collective: yes."""
    operator = built(spec_of(config), product, Point(loss, gradient, problem.model))
    made: CurvatureOperator = product if operator is product else _Around(product, operator)
    return made if problem.sketch is None else _Around(made, SketchedOperator(made, problem.sketch))


def exact_operator(config: Config, problem: Problem, *, reference: bool = False) -> ExactOperator:
    """Return the exact product that the operator is made of.

    ``reference``: in the masters' precision, for the few products that others are compared with.

    Streamed block by block, or of the whole model where its blocks cannot be told apart. Collective: yes. Raises
    ModelError, on every rank, where neither is possible.
    """
    space, lanczos = problem.space, config.lanczos
    row_bytes = space.size_local * torch.empty(0, dtype=space.dtype).element_size()
    # the host's memory for the basis counts as free until it is written to
    basis_bytes = basis_rows(lanczos.reorthogonalise, lanczos.steps) * row_bytes
    computes_in = config.model.master_dtype if reference else config.model.compute_dtype
    product = exact_or_whole(
        exact_product(spec_of(config)),
        problem.model,
        problem.objective,
        plain=problem.plain,
        compute_dtype=dtype_of(computes_in),
        settings=streaming_settings(config, compile=not reference),
        reserved=basis_bytes if space.device.type == "cpu" else 0,
    )
    if computes_in == "tf32":
        product.arithmetic = devices.tf32
    return product


def streaming_settings(config: Config, *, compile: bool = True) -> Settings:
    """Return how exact products are streamed."""
    section, lanczos = config.operator, config.lanczos
    return Settings(
        keep_state=section.keep_state,
        boundaries_on_host=section.boundaries == "host",
        compile=section.compile if compile else "off",
        products=lanczos.steps * lanczos.probes,
        programs=Path(section.programs).expanduser() if section.programs else default_directory(),
    )


def wants_reference(config: Config) -> bool:
    """Whether the run's products are to be compared with exact ones in the masters' precision."""
    rounded = config.model.compute_dtype != config.model.master_dtype
    return config.operator.check and (config.operator.method == "finite_difference" or rounded)


def reference_operator(config: Config, problem: Problem, loss: float, gradient: Vector | None) -> CurvatureOperator:
    """Return the same matrix by the exact product in the masters' precision. Collective: yes. Raises ModelError.

    ``gradient`` at theta_0 may be None unless the operator itself needs it.
    """
    product = _Exact(exact_operator(config, problem, reference=True))
    return _made(config, problem, product, loss, gradient)


def what_is_computed(config: Config, problem: Problem) -> str:
    """Say which function's matrix the products are of. Collective: yes.

    In bfloat16 that depends on the weights: those that bfloat16 holds exactly, as in released checkpoints, lose
    nothing in the cast, and only the arithmetic is rounded; others are first moved to another point.
    """
    matrix, model = spec_of(config).matrix, config.model
    if problem.sketch is not None:
        matrix = f"{matrix} ({config.sketch.kind.upper()} to {config.sketch.dimension:,} dimensions)"
    if model.compute_dtype == "tf32":
        return f"{matrix} of the fp32 function, matrix products in tf32"
    if model.compute_dtype != "bfloat16":
        return f"{matrix} of the {model.compute_dtype.replace('float', 'fp')} function"
    exact = problem.model.world.all_true(survives(problem.model.module, torch.bfloat16), "weights in bfloat16")
    return f"{matrix} of the fp32 function estimated in bf16" if exact else f"{matrix} of the bf16-rounded function"


def build_operator(
    config: Config, problem: Problem, loss: float, gradient: Vector | None, exact: ExactOperator | None
) -> CurvatureOperator:
    """Build the operator of [operator] at theta_0, where loss and gradient are known. Collective: yes.

    The gradient may be None unless :func:`needs_gradient`. ``exact`` is the operator's :func:`exact_operator` with method
    "exact", None with finite differences.
    """
    section = config.operator
    product: CurvatureOperator
    if exact is not None:
        product = _Exact(exact)
    else:
        differences = FiniteDifferenceHessian(problem.gradient, section.scheme, section.step, (loss, gradient))
        product = _Differences(differences)
    return _made(config, problem, product, loss, gradient)


def needs_gradient(config: Config) -> bool:
    """Whether products need the gradient at theta_0."""
    section = config.operator
    return spec_of(config).needs_gradient or (section.method == "finite_difference" and section.scheme == "forward")

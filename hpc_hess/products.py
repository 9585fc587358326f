"""From the configuration to the operator: which matrix, by which product."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from hpc_hess.config import Config
from hpc_hess.curvature.exact import ExactHessian, StreamedOperator
from hpc_hess.curvature.finite_difference import FiniteDifferenceHessian
from hpc_hess.curvature.gauss_newton import EmpiricalFisher, GaussNewton, Residual
from hpc_hess.curvature.perplexity import PerplexityHessian
from hpc_hess.curvature.record import ProductRecord
from hpc_hess.curvature.streaming import Settings
from hpc_hess.linalg.operator import products
from hpc_hess.parallel.vector import Vector, VectorSpace
from hpc_hess.problem import Problem, dtype_of


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
    """Streamed products: nothing to remember between them."""

    def __init__(self, operator: StreamedOperator) -> None:
        self._operator, self.space, self.notes = operator, operator.space, operator.notes

    def matvec(self, v: Vector) -> Vector:
        return self._operator.matvec(v)

    def matmat(self, vectors: Sequence[Vector]) -> list[Vector]:
        return self._operator.matmat(vectors)

    def last_record(self) -> ProductRecord:
        return ProductRecord()

    def to_state(self) -> dict[str, Any]:
        return {}

    def from_state(self, state: dict[str, Any]) -> None:
        pass


class _Perplexity:
    """The Hessian of exp(loss) around another product."""

    def __init__(self, inner: CurvatureOperator, loss: float, gradient: Vector) -> None:
        self._inner, self.space, self.notes = inner, inner.space, inner.notes
        self._operator = PerplexityHessian(inner, loss, gradient)
        self.last_record, self.to_state, self.from_state = inner.last_record, inner.to_state, inner.from_state

    def matvec(self, v: Vector) -> Vector:
        return self._operator.matvec(v)

    def matmat(self, vectors: Sequence[Vector]) -> list[Vector]:
        return self._operator.matmat(vectors)


_STREAMED: dict[str, type[StreamedOperator]] = {
    "hessian": ExactHessian, "perplexity": ExactHessian, "gauss_newton": GaussNewton, "residual": Residual,
    "fisher": EmpiricalFisher,
}  # fmt: skip


def exact_operator(config: Config, problem: Problem, kind: str = "hessian") -> StreamedOperator:
    """Return the streamed operator of ``kind``. Collective: yes. Raises ModelError where the model cannot be split."""
    return _STREAMED[kind](
        problem.model, problem.objective, plain=problem.plain, compute_dtype=dtype_of(config.model.compute_dtype),
        settings=Settings(
            keep_state=config.operator.keep_state, boundaries_on_host=config.operator.boundaries == "host"
        ),
    )  # fmt: skip


def build_operator(
    config: Config, problem: Problem, loss: float, gradient: Vector, exact: StreamedOperator | None
) -> CurvatureOperator:
    """Build the operator of [operator] at theta_0, where loss and gradient are known. Collective: yes.

    ``exact`` is its :func:`exact_operator` with method "exact", None with finite differences.
    """
    section = config.operator
    inner: CurvatureOperator
    if exact is not None:
        inner = _Exact(exact)
    else:
        differences = FiniteDifferenceHessian(problem.gradient, section.scheme, section.step, (loss, gradient))
        inner = _Differences(differences)
    return _Perplexity(inner, loss, gradient) if section.kind == "perplexity" else inner

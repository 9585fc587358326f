"""LinearOperator: a symmetric matrix known by its products with vectors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

from hpc_hess.parallel.vector import Vector, VectorSpace


class Enough(Exception):  # noqa: N818  # no error: what was computed is used
    """Raised by an operator in place of a product, on every rank: use what there is, or hand it on where that is nothing."""


@runtime_checkable
class LinearOperator(Protocol):
    """What every algorithm needs: the space and the product. ``matvec`` never changes its argument.

    An operator whose products share work may have ``matmat`` too, which :func:`products` uses: several at once.
    """

    space: VectorSpace

    def matvec(self, v: Vector) -> Vector:
        """Return A v as a new Vector. Collective: yes."""
        ...


def products(operator: LinearOperator, vectors: Sequence[Vector]) -> list[Vector]:
    """Return A v for each of ``vectors``: by one ``matmat`` if the operator has it, else one by one. Collective: yes."""
    matmat = getattr(operator, "matmat", None)
    return list(matmat(vectors)) if matmat is not None else [operator.matvec(v) for v in vectors]


class FunctionOperator:
    """An operator from a function of a Vector; counts its products."""

    def __init__(self, space: VectorSpace, function: Callable[[Vector], Vector]) -> None:
        self.space, self._function = space, function
        self.num_products = 0

    def matvec(self, v: Vector) -> Vector:
        """Return A v as a new Vector. Collective: as the function."""
        self.num_products += 1
        return self._function(v)


def diagonal(space: VectorSpace, entries: Vector) -> FunctionOperator:
    """Return the operator with the given diagonal: a matrix with a prescribed spectrum, for tests."""
    return FunctionOperator(space, lambda v: Vector(space, entries.data * v.data))

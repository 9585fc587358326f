"""LinearOperator: a symmetric matrix known by its products with vectors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, runtime_checkable

from hpc_hess.parallel.vector import Vector, VectorSpace


@runtime_checkable
class LinearOperator(Protocol):
    """What every algorithm needs: the space and the product. ``matvec`` never changes its argument."""

    space: VectorSpace

    def matvec(self, v: Vector) -> Vector:
        """Return A v as a new Vector. Collective: yes."""
        ...


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

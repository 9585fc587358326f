"""The Hessian of perplexity exp(L), from that of the mean loss L (Ilin 2025 names the quantity).

d2 exp(L) = exp(L) (d2 L + dL dL^T): a factor and a rank-one term.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from hpc_hess.curvature.operators import Point
from hpc_hess.linalg.operator import LinearOperator, products
from hpc_hess.parallel.vector import Vector, VectorSpace


class PerplexityHessian:
    """exp(L) (H + g g^T) for an operator H, the loss L and its gradient g at the same parameters."""

    def __init__(self, hessian: LinearOperator, loss: float, gradient: Vector) -> None:
        self.space: VectorSpace = hessian.space
        self._hessian, self._factor, self._gradient = hessian, math.exp(loss), gradient

    def matvec(self, v: Vector) -> Vector:
        """Return the product as a new Vector. Collective: yes."""
        return self.matmat([v])[0]

    def matmat(self, vectors: Sequence[Vector]) -> list[Vector]:
        """Return the products with several vectors, which H multiplies together if it can. Collective: yes."""
        pairs = zip(products(self._hessian, vectors), vectors, strict=True)
        return [hv.axpy_(self._gradient.dot(v), self._gradient).scale_(self._factor) for hv, v in pairs]


def of_perplexity(hessian: LinearOperator, point: Point) -> PerplexityHessian:
    """Return the perplexity's Hessian of the loss's, as an OperatorSpec builds it. Collective: no."""
    assert point.gradient is not None
    return PerplexityHessian(hessian, point.loss, point.gradient)

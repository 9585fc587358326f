"""Low-rank deflation: known eigenvectors are taken out of a matrix, the rest is estimated (Papyan 2018, section 4)."""

from __future__ import annotations

import torch

from hpc_hess.linalg.operator import LinearOperator
from hpc_hess.parallel.basis import Basis
from hpc_hess.parallel.vector import Vector


class Deflated:
    """(I - U U^T) A (I - U U^T) for the first ``count`` rows of ``basis``, which are orthonormal.

    Where they are eigenvectors their eigenvalues become zero and the others stay.
    """

    def __init__(self, operator: LinearOperator, basis: Basis, count: int) -> None:
        self.space, self._operator, self._basis, self._count = operator.space, operator, basis, count

    def project_(self, v: Vector) -> Vector:
        """Make ``v`` orthogonal to the basis in place; return it. Collective: yes."""
        if self._count:
            self._basis.orthogonalise_(v, 0, self._count)
        return v

    def matvec(self, v: Vector) -> Vector:
        """Return the product as a new Vector. Collective: yes."""
        return self.project_(self._operator.matvec(self.project_(v.copy())))


def orthonormal(basis: Basis, vectors: list[Vector]) -> int:
    """Put ``vectors`` into ``basis`` made orthonormal; return how many are independent. Collective: yes."""
    count = 0
    for vector in vectors:
        before, v = vector.norm(), vector.copy()
        norm = basis.orthogonalise_(v, 0, count)[1] if count else before
        if norm > 100 * torch.finfo(v.space.dtype).eps * before:
            basis[count] = v.scale_(1 / norm)
            count += 1
    return count

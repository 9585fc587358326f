"""What a run's products are held against the exact ones with: differences, and extreme Ritz pairs."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from scipy.linalg import eigh_tridiagonal

from hpc_hess.linalg import probes
from hpc_hess.linalg.lanczos import Lanczos
from hpc_hess.linalg.operator import LinearOperator
from hpc_hess.parallel.vector import Vector, VectorSpace


@dataclass(frozen=True)
class RitzCheck:
    """An extreme Ritz pair (theta, y) against the exact product: y^T H y and |H y - theta y|.

    |H y - theta y| bounds the distance of theta to an eigenvalue of H, whatever product found it.
    """

    theta: float
    rayleigh: float
    residual: float
    lanczos_residual: float

    @property
    def product_error(self) -> float:
        """The part of the residual that the product's error explains, relative to theta."""
        return share(self.product_error_absolute, abs(self.theta))

    @property
    def product_error_absolute(self) -> float:
        """|E y| of the unit vector y, E what the products have beside the exact ones."""
        return math.sqrt(max(self.residual**2 - self.lanczos_residual**2, 0.0))


def relative_difference(product: Vector, reference: Vector) -> float:
    """Return |product - reference| / |reference|. Collective: yes."""
    return share(product.copy().axpy_(-1.0, reference).norm(), reference.norm())


def share(error: float, size: float) -> float:
    """Return error / size, of a size of 0 as all of it (1) or, where nothing is wrong either, as nothing."""
    return error / size if size else float(bool(error))


def extreme_ritz_vector(process: Lanczos) -> tuple[Vector, float, float]:
    """Return the Ritz vector of largest |theta|, theta and its Lanczos residual. Needs every basis vector."""
    values, _ = eigh_tridiagonal(np.array(process.alpha), np.array(process.beta[:-1]))
    return ritz_vector(process, int(np.abs(values).argmax()))


def ritz_vector(process: Lanczos, i: int) -> tuple[Vector, float, float]:
    """Return the unit Ritz vector of the i-th smallest theta, theta and its Lanczos residual. Needs every basis vector."""
    values, vectors = eigh_tridiagonal(np.array(process.alpha), np.array(process.beta[:-1]))
    y = process.basis.combine(torch.from_numpy(np.ascontiguousarray(vectors[:, i])))
    return y.scale_(1.0 / y.norm()), float(values[i]), abs(process.beta[-1] * float(vectors[-1, i]))


def check_ritz(exact: LinearOperator, process: Lanczos) -> RitzCheck:
    """Measure the extreme Ritz pair of a finished process with the exact product. Collective: yes."""
    return _checked(exact, *extreme_ritz_vector(process))


def check_ends(exact: LinearOperator, process: Lanczos) -> dict[str, RitzCheck]:
    """Measure the smallest and the largest Ritz pair likewise: "lowest" and "highest". Collective: yes."""
    last = len(process.alpha) - 1
    return {name: _checked(exact, *ritz_vector(process, i)) for name, i in (("lowest", 0), ("highest", last))}


def _checked(exact: LinearOperator, y: Vector, theta: float, residual: float) -> RitzCheck:
    product = exact.matvec(y)
    rayleigh = y.dot(product)
    return RitzCheck(theta, rayleigh, product.axpy_(-theta, y).norm(), residual)


def start_vector(space: VectorSpace, seed: int, probe: int, distribution: str) -> Vector:
    """Return the unit start vector of a probe. Collective: yes."""
    v = probes.draw(space, seed=seed, probe=probe, distribution=distribution)
    return v.scale_(1.0 / v.norm())

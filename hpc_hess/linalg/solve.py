"""Inverse products: (A + damping I) x = b by conjugate gradients or MINRES, with the history of residuals."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from hpc_hess.errors import NumericsError
from hpc_hess.linalg.keeping import Keep, KeepNothing
from hpc_hess.linalg.operator import Enough, LinearOperator
from hpc_hess.parallel.vector import Vector


@dataclass(frozen=True)
class Solution:
    """``x``, and |b - (A + damping I) x| / |b| before the first and after every product."""

    x: Vector
    residuals: list[float]

    @property
    def converged_to(self) -> float:
        """The last relative residual, as the recurrence has it."""
        return self.residuals[-1]


def conjugate_gradients(
    operator: LinearOperator,
    b: Vector,
    *,
    damping: float,
    tolerance: float = 1e-4,
    most: int = 100,
    after_product: Callable[[float], object] | None = None,
    keep: Keep | None = None,
) -> Solution:
    """Solve with a positive definite A + damping I (Hestenes and Stiefel 1952), until Enough at most. Collective: yes.

    Raises
    ------
    NumericsError : a direction of negative curvature was met: the damping is too small, or MINRES is what is needed.

    """
    x, r, keep = b.space.zeros(), b.copy(), keep or KeepNothing()
    norm, p = b.norm(), b.copy()
    residuals, rr = [1.0 if norm else 0.0], norm**2
    while len(residuals) <= most and residuals[-1] > tolerance:
        try:
            q = keep.vector(partial(operator.matvec, p)).axpy_(damping, p)
        except Enough:
            if len(residuals) == 1:
                raise
            break
        curvature = p.dot(q)
        if not curvature > 0:
            raise NumericsError(
                f"conjugate gradients met the curvature {curvature / p.dot(p):.3g} after {len(residuals)} products: "
                "raise the damping above -lambda_min, take the Gauss-Newton matrix, or use MINRES"
            )
        step = rr / curvature
        x.axpy_(step, p)
        r.axpy_(-step, q)
        rr, before = r.dot(r), rr
        p.scale_(rr / before).axpy_(1.0, r)
        residuals.append(math.sqrt(rr) / norm)
        if after_product is not None:
            after_product(residuals[-1])
    return Solution(x, residuals)


def minres(
    operator: LinearOperator,
    b: Vector,
    *,
    damping: float,
    tolerance: float = 1e-4,
    most: int = 100,
    after_product: Callable[[float], object] | None = None,
    keep: Keep | None = None,
) -> Solution:
    """Solve with any symmetric A + damping I by smallest residuals (Paige and Saunders 1975). Collective: yes.

    Six vectors; residuals never grow. Enough ends it.

    Raises
    ------
    NumericsError : a product is not finite.

    """
    space, norm, keep = b.space, b.norm(), keep or KeepNothing()
    x = space.zeros()
    residuals = [1.0 if norm else 0.0]
    v, before = b.copy().scale_(1 / (norm or 1.0)), space.zeros()
    w, w_before = space.zeros(), space.zeros()
    beta, eta, scale = 0.0, norm, 0.0
    c, c_before, s, s_before = 1.0, 1.0, 0.0, 0.0  # the last two rotations
    while len(residuals) <= most and residuals[-1] > tolerance:
        try:
            u = keep.vector(partial(operator.matvec, v))
        except Enough:
            if len(residuals) == 1:
                raise
            break
        u.axpy_(damping, v).axpy_(-beta, before)
        alpha = u.dot(v)
        u.axpy_(-alpha, v)
        beta_next = u.norm()
        if not (math.isfinite(alpha) and math.isfinite(beta_next)):
            raise NumericsError(f"product {len(residuals)} of MINRES is not finite")
        scale = max(scale, abs(alpha) + beta + beta_next)
        rounding = 100 * torch.finfo(space.dtype).eps * scale
        if beta_next <= rounding:  # the Krylov space is invariant
            beta_next = 0.0
        diagonal = c * alpha - c_before * s * beta
        length = math.hypot(diagonal, beta_next)
        if length <= rounding:
            break  # A + damping I is singular on this Krylov space: x is as good as it gets
        upper, upmost = s * alpha + c_before * c * beta, s_before * beta
        c_before, c = c, diagonal / length
        s_before, s = s, beta_next / length
        w_before.scale_(-upmost).axpy_(1.0, v).axpy_(-upper, w).scale_(1 / length)
        w, w_before = w_before, w
        x.axpy_(c * eta, w)
        eta *= -s
        residuals.append(abs(eta) / norm)
        if after_product is not None:
            after_product(residuals[-1])
        if not beta_next:
            break
        before, v, beta = v, u.scale_(1 / beta_next), beta_next
    return Solution(x, residuals)

"""Stochastic traces and the Frobenius norm, each with its standard error.

Hutchinson (1990): tr A = E <w, A w>. Hutch++ (Meyer, Musco, Musco, Woodruff, SOSA 2021) and XTrace (Epperly, Tropp, Webber,
SIAM J. Matrix Anal. Appl. 45, 2024) take the large eigenvalues out first: for the same number of products their error is
far smaller where a few eigenvalues dominate, as in Hessians.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from hpc_hess.linalg import probes
from hpc_hess.linalg.keeping import Keep, KeepNothing
from hpc_hess.linalg.operator import Enough, LinearOperator
from hpc_hess.linalg.quadrature import Estimate, estimate, of_forms
from hpc_hess.linalg.sampling import StoppingRule
from hpc_hess.parallel.basis import Basis
from hpc_hess.parallel.vector import Vector

Float = NDArray[np.float64]
_ROUNDING = 100  # times the unit roundoff: what is left of a vector below it is noise


@dataclass(frozen=True)
class Moments:
    """Hutchinson's samples: of the trace, and of the squared Frobenius norm from the same products."""

    trace: list[float]
    frobenius_squared: list[float]

    @property
    def trace_estimate(self) -> Estimate:
        """Trace with its standard error."""
        return of_forms(self.trace, self.frobenius_squared)

    @property
    def frobenius_estimate(self) -> Estimate:
        """Frobenius norm with its standard error (to first order, that of the square over twice the norm).

        No interval: squares are skewed, and Student's holds in 9 of 10 cases instead of 95 of 100.
        """
        square = estimate(self.frobenius_squared)
        norm = math.sqrt(square.mean)
        return Estimate(norm, None if square.stderr is None else square.stderr / (2 * norm or 1.0))


def hutchinson(
    operator: LinearOperator,
    rule: StoppingRule,
    *,
    seed: int = 0,
    distribution: str = "rademacher",
    first_probe: int = 0,
    keep: Keep | None = None,
) -> Moments:
    """Sample <w, A w> and |A w|^2 until ``rule`` is content with the trace, or on Enough. Collective: yes."""
    moments, keep = Moments([], []), keep or KeepNothing()

    def sample() -> tuple[float, float]:
        w = probes.draw(operator.space, seed=seed, probe=first_probe + len(moments.trace), distribution=distribution)
        product = operator.matvec(w)
        return w.dot(product), product.dot(product)

    while not moments.trace or not rule.enough(moments.trace):
        try:
            first, second = keep.numbers(sample)
        except Enough:
            if not moments.trace:
                raise
            break
        moments.trace.append(first)
        moments.frobenius_squared.append(second)
    return moments


def hutch_plus_plus(
    operator: LinearOperator,
    basis: Basis,
    num_products: int,
    *,
    seed: int = 0,
    distribution: str = "rademacher",
    keep: Keep | None = None,
) -> Estimate:
    """Trace from ``num_products`` products: a third each for the range, for A on it, for what is left. Collective: yes.

    Enough ends it in the last third.

    Parameters
    ----------
    basis : rows for a third of ``num_products``.

    """
    space, third, keep = operator.space, num_products // 3, keep or KeepNothing()

    def probe(k: int) -> Vector:
        return probes.draw(space, seed=seed, probe=k, distribution=distribution)

    def quadratic(w: Vector) -> float:
        return keep.numbers(lambda: [w.dot(operator.matvec(w))])[0]

    rank = 0
    for k in range(third):
        rank += _append(basis, rank, keep.vector(partial(operator.matvec, probe(k))))
    within = sum(quadratic(basis[j]) for j in range(rank))
    samples = []
    for k in range(third, num_products - rank):
        w = probe(k)
        _project_out(basis, rank, w)
        try:
            samples.append(quadratic(w))
        except Enough:
            if not samples:
                raise
            break
    rest = estimate(samples)
    return Estimate(within + rest.mean, rest.stderr, rest.count)


def xtrace(
    operator: LinearOperator, basis: Basis, num_products: int, *, seed: int = 0, keep: Keep | None = None
) -> Estimate:
    """Trace from ``num_products`` products by exchangeable leave-one-out estimates, Gaussian vectors. Collective: yes.

    With Y = A W = Q R and s_i the unit vector orthogonal to all columns of R but the i-th, P_i = Q (I - s_i s_i^T) Q^T
    projects onto the range that the other vectors give. Estimate i is tr(P_i A P_i) + |u|-normalised u^T A u with
    u = (I - P_i) w_i; from w_i^T A w_i = c_w^T r_i and the like, all of it is algebra with small matrices (eq. 2.3).
    Samples that share their vectors are not independent: the standard error is some 20 % small (two of it hold 89 times in
    100, not 95). On Enough, of the vectors for which A Q is known, or Hutchinson's estimate.

    Parameters
    ----------
    basis : rows for half of ``num_products``.

    """
    small = leave_one_out(operator, basis, num_products // 2, seed=seed, distribution="gaussian", keep=keep)
    if small.exhausted:
        return Estimate(float(np.trace(small.h)), 0.0)
    h, r, w, s = small.h, small.r, small.w, small.s
    if not len(h):
        return of_forms((w * r).sum(0), (r * r).sum(0))
    c = w - s * (s * w).sum(0)  # column i: coefficients of P_i w_i
    quadratic = (w * r).sum(0) - 2 * (c * r).sum(0) + (c * (h @ c)).sum(0)
    left_squared = small.squared_norms - (c * c).sum(0)
    scale = (operator.space.size - len(h) + 1) / left_squared  # |u|^2 at its expectation: less variance
    samples = np.trace(h) - (s * (h @ s)).sum(0) + scale * quadratic
    return estimate(samples)


@dataclass(frozen=True)
class LeaveOneOut:
    """Small matrices of k vectors W: A W = Q R, ``h`` = Q^T A Q, ``w`` = Q^T W, and ``s`` (column i: see xtrace).

    ``exhausted``: Q spans all that A gives, so that A = Q Q^T A; then there is nothing to leave out. ``h`` is empty where
    Enough came before two columns of it.
    """

    h: Float
    r: Float
    w: Float
    s: Float
    squared_norms: Float  # of the columns of W
    exhausted: bool = False


def leave_one_out(
    operator: LinearOperator,
    basis: Basis,
    count: int,
    *,
    seed: int,
    distribution: str,
    images: Basis | None = None,
    keep: Keep | None = None,
) -> LeaveOneOut:
    """Fill ``basis`` with Q of A W = Q R for ``count`` vectors W, and ``images``, if given, with A Q. Collective: yes."""
    space, keep = operator.space, keep or KeepNothing()
    r, h, w = np.zeros((count, count)), np.zeros((count, count)), np.zeros((count, count))
    squared, exhausted = np.zeros(count), False

    def vector(k: int) -> Vector:
        return probes.draw(space, seed=seed, probe=k, distribution=distribution)

    def column(k: int) -> list[float]:
        return basis.dots(operator.matvec(basis[k]), count).tolist()

    enough = False
    for k in range(count):
        try:
            y = keep.vector(partial(operator.matvec, vector(k)))
        except Enough:
            if not k:
                raise
            enough, count = True, k
            break
        before = norm = y.norm()
        if k:
            coefficients, norm = basis.orthogonalise_(y, 0, k)
            r[:k, k] = coefficients.numpy()
        if norm <= _ROUNDING * torch.finfo(space.dtype).eps * before:  # with probability 1, of a Gaussian vector
            exhausted, count = True, k
            break
        r[k, k] = norm
        basis[k] = y.scale_(1 / norm)
    r, h, w, squared = r[:count, :count], h[:count, :count], w[:count, :count], squared[:count]
    known = 0 if enough else count  # columns of h
    for k in range(known):
        try:
            if images is None:
                h[:, k] = keep.numbers(partial(column, k))
            else:
                images[k] = image = keep.vector(partial(operator.matvec, basis[k]))
                h[:, k] = basis.dots(image, count).numpy()
        except Enough:
            known, exhausted = k if k > 1 else 0, False
            count = known or count
            break
    r, h, w, squared = r[:count, :count], h[:known, :known], w[:count, :count], squared[:count]
    for k in range(count):
        probe = vector(k)
        w[:, k] = basis.dots(probe, count).numpy()
        squared[k] = probe.dot(probe)
    s = np.linalg.inv(r).T
    return LeaveOneOut(0.5 * (h + h.T), r, w, s / np.linalg.norm(s, axis=0), squared, exhausted)


def _append(basis: Basis, rank: int, y: Vector) -> int:
    """Add what is new in ``y`` to the orthonormal basis; return 1, or 0 if it is rounding."""
    before = y.norm()
    norm = basis.orthogonalise_(y, 0, rank)[1] if rank else before
    if norm <= _ROUNDING * torch.finfo(y.space.dtype).eps * before:
        return 0
    basis[rank] = y.scale_(1 / norm)
    return 1


def _project_out(basis: Basis, rank: int, w: Vector) -> None:
    if rank:
        basis.orthogonalise_(w, 0, rank)

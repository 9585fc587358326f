"""Stochastic diagonals, entry by entry with standard errors.

Hutchinson's (Bekas, Kokiopoulou, Saad, Appl. Numer. Math. 57, 2007) with independent signs: blocks that are balanced, as in
one published code, make E[w_i w_j] = -1/31 and a bias that no number of samples removes. XDiag (Epperly, Tropp, Webber 2024)
takes the large eigenvalues out first.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from hpc_hess.linalg import probes
from hpc_hess.linalg.keeping import Keep, KeepNothing
from hpc_hess.linalg.operator import Enough, LinearOperator
from hpc_hess.linalg.trace import leave_one_out
from hpc_hess.parallel.basis import Basis
from hpc_hess.parallel.vector import Vector, VectorSpace


@dataclass(frozen=True)
class DiagonalEstimate:
    """The diagonal, the standard error of each entry, and how many products they took."""

    mean: Vector
    stderr: Vector
    num_products: int

    @property
    def relative_error(self) -> float:
        """|standard errors| / |diagonal|: what to expect of the relative error in the 2-norm. Collective: yes."""
        return self.stderr.norm() / (self.mean.norm() or math.inf)


class _Running:
    """Mean and spread of vectors that come one by one (Welford)."""

    def __init__(self, like: Vector) -> None:
        self.count, self._mean, self._squares = 0, like.space.zeros(), like.space.zeros()

    def add(self, x: torch.Tensor) -> None:
        self.count += 1
        delta = x - self._mean.data
        self._mean.data.add_(delta, alpha=1 / self.count)
        self._squares.data.addcmul_(delta, x - self._mean.data)

    def estimate(self, num_products: int) -> DiagonalEstimate:
        spread = self._squares.data.div(self.count * max(self.count - 1, 1)).clamp_min_(0).sqrt_()
        return DiagonalEstimate(self._mean, Vector(self._mean.space, spread), num_products)


def diagonal_hutchinson(
    operator: LinearOperator,
    *,
    most: int,
    relative: float = 0.0,
    seed: int = 0,
    first_probe: int = 0,
    keep: Keep | None = None,
) -> DiagonalEstimate:
    """Average w * (A w) over independent signs, until the relative error to expect is ``relative``, or Enough. Collective.

    The rule looks after 8, 16, 32, ... products only. An average that has stopped moving is no sign: after k products it
    moves by 1/k of its error.
    """
    space, keep = operator.space, keep or KeepNothing()
    running = _Running(space.zeros())
    look = 8
    while running.count < most:
        w = probes.draw(space, seed=seed, probe=first_probe + running.count, distribution="rademacher")
        try:
            running.add(w.data * keep.vector(partial(operator.matvec, w)).data)
        except Enough:
            if not running.count:
                raise
            break
        if relative and running.count == look:
            look *= 2
            if running.estimate(running.count).relative_error <= relative:
                break
    return running.estimate(running.count)


def _gaussian(space: VectorSpace, seed: int, number: int) -> Vector:
    return probes.draw(space, seed=seed, probe=number, distribution="gaussian")


def _spans(basis: Basis, count: int, y: Vector) -> bool:
    """Whether ``y``, overwritten, lies in the span of the first ``count`` vectors. Collective: yes."""
    before = norm = y.norm()
    if count:
        _, norm = basis.orthogonalise_(y, 0, count)
    return norm <= 100 * torch.finfo(y.space.dtype).eps * before


def xdiag(
    operator: LinearOperator, basis: Basis, images: Basis, num_products: int, *, seed: int = 0, keep: Keep | None = None
) -> DiagonalEstimate:
    """Diagonal from ``num_products`` products by leave-one-out estimates, independent signs. Collective: yes.

    Estimate i is diag(P_i A) + w_i * ((I - P_i) A w_i), with P_i as in xtrace; (I - P_i) A w_i = Q s_i (s_i^T r_i). On
    Enough, of the vectors for which A Q is known, or Hutchinson's estimate.

    Parameters
    ----------
    basis, images : rows for half of ``num_products`` each.

    """
    space, count = operator.space, num_products // 2
    small = leave_one_out(operator, basis, count, seed=seed, distribution="rademacher", images=images, keep=keep)
    count = len(small.h)
    if not count and not small.exhausted:
        plain = _Running(space.zeros())
        for i in range(len(small.r)):
            product = basis.combine(torch.from_numpy(np.ascontiguousarray(small.r[:, i])))
            plain.add(product.data * probes.draw(space, seed=seed, probe=i, distribution="rademacher").data)
        return plain.estimate(plain.count)
    if small.exhausted and not _spans(basis, count, operator.matvec(_gaussian(space, seed, num_products))):
        return diagonal_hutchinson(operator, most=num_products, seed=seed, keep=keep)  # signs that A happens to lose
    within = space.zeros()
    for j in range(count):
        within.data.addcmul_(basis[j].data, images[j].data)
    if small.exhausted:
        return DiagonalEstimate(within, space.zeros(), 2 * count + 2)
    running = _Running(within)
    for i in range(count):
        s = torch.from_numpy(np.ascontiguousarray(small.s[:, i]))
        direction, image = basis.combine(s).data, images.combine(s).data
        w = probes.draw(space, seed=seed, probe=i, distribution="rademacher").data
        along = float(small.s[:, i] @ small.r[:, i])
        running.add(within.data - direction * image + along * w * direction)
    return running.estimate(2 * count)

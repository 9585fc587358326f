"""Hessian products as differences of gradients: H v ~ (g(theta + d) - g(theta - d)) / 2, d = eps v / |v| as stored.

The gradients are ordinary ones, through FSDP, with any attention kernel and the model's own code. theta_0 is kept and
written back, never added to and subtracted from. Storing theta_0 + eps v rounds it, so the quotient divides by the
step that was realised, <theta_plus - theta_minus, v> / |v|^2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from hpc_hess.curvature.step_size import concentration, scaled_step
from hpc_hess.errors import NumericsError
from hpc_hess.model.gradient import Gradient
from hpc_hess.parallel.vector import Vector, VectorSpace

Scheme = Literal["forward", "central", "fourth"]


@dataclass
class ProductRecord:
    """What one product did: the step asked for, the share of it that was realised, gradients spent, expert flips."""

    step: float
    realised: float
    gradients: int
    flips: int


class FiniteDifferenceHessian:
    """H of the objective at theta_0, the parameters the model holds when this is built.

    Parameters
    ----------
    gradient : the gradient of the objective.
    scheme : "central" (two gradients), "forward" (one, against the cached base gradient), "fourth" (four).
    step : "auto", or a number: eps, the length of the step along v / |v|.

    """

    def __init__(self, gradient: Gradient, scheme: Scheme = "central", step: float | Literal["auto"] = "auto") -> None:
        self.gradient, self.scheme, self.step = gradient, scheme, step
        self.space: VectorSpace = gradient.model.space
        self.theta0 = gradient.model.read_parameters()
        self.records: list[ProductRecord] = []
        norm = self.space.wrap(self.theta0).norm()
        self.theta_rms = norm / math.sqrt(self.space.size)
        self.base: Vector | None = None
        gradient.routing.recording = True
        try:
            self.base_loss, base = gradient()
        finally:
            gradient.routing.recording = False
        self.base_gradient_norm = base.norm()
        if not math.isfinite(self.base_gradient_norm):
            raise NumericsError("the gradient is not finite at the model's parameters")
        if scheme == "forward":
            self.base = base

    def matvec(self, v: Vector) -> Vector:
        """Return H v (same dtype as v). Collective: yes.

        Raises
        ------
        NumericsError : a perturbed loss is not finite, or no parameter changes when the step is stored.

        """
        spread = concentration(v)
        if spread.norm == 0.0:
            return self.space.zeros()
        eps = self.step
        if isinstance(eps, str):
            eps = scaled_step(spread, self.theta_rms, self.scheme, self.space.dtype)
        flips = self.gradient.routing.num_flips
        try:
            if self.scheme == "forward":
                assert self.base is not None
                realised, result = self._shifted(v, eps / spread.norm)
                result.axpy_(-1.0, self.base)
                gradients = 1
            else:
                realised, result = self._difference(v, eps / spread.norm)
                gradients = 2
            self._check_realised(realised, eps)
            result.scale_(1.0 / (realised if self.scheme == "forward" else 2 * realised))
            if self.scheme == "fourth":
                double, wide = self._difference(v, 2 * eps / spread.norm)
                result.scale_(4 / 3).axpy_(-1 / (6 * double), wide)
                gradients = 4
        finally:
            self.gradient.model.write_parameters(self.theta0)
        self.records.append(
            ProductRecord(eps, realised * spread.norm / eps, gradients, self.gradient.routing.num_flips - flips)
        )
        return result

    def _shifted(self, v: Vector, factor: float) -> tuple[float, Vector]:
        """Return the realised factor <theta - theta_0, v> / |v|^2 and the gradient at theta = theta_0 + factor v."""
        model = self.gradient.model
        model.write_parameters(self.theta0, v.data, factor)
        moved = torch.zeros(2, dtype=torch.float64, device=v.data.device)
        for now, before, direction in zip(
            model.local_parameters, model.pieces_of(self.theta0), model.pieces_of(v.data), strict=True
        ):
            d = direction.double()
            moved[0] += torch.sum((now.double() - before.double()) * d)
            moved[1] += torch.sum(d * d)
        along, square = self.space.sum(moved, "realised step").tolist()
        _, gradient = self.gradient()
        return along / square, gradient

    def _difference(self, v: Vector, factor: float) -> tuple[float, Vector]:
        """Return half the realised distance (in units of v) and g(theta_0 + factor v) - g(theta_0 - factor v)."""
        forth, plus = self._shifted(v, factor)
        back, minus = self._shifted(v, -factor)
        return 0.5 * (forth - back), plus.axpy_(-1.0, minus)

    def _check_realised(self, realised: float, eps: float) -> None:
        if not (math.isfinite(realised) and realised > 0):
            raise NumericsError(
                f"a step of {eps:.1e} changes no parameter when it is stored in {self.space.dtype}: raise operator.step"
            )

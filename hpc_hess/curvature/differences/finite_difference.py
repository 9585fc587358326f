"""Hessian products as differences of gradients: H v ~ (g(theta + d) - g(theta - d)) / 2, d = eps v / |v| as stored.

The gradients are ordinary ones, through FSDP, with any attention kernel and the model's own code. theta_0 is kept and
written back, never added to and subtracted from. Storing theta_0 + eps v rounds it, so the quotient divides by the
step that was realised, <theta_plus - theta_minus, v> / |v|^2.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from typing import Literal

import torch

from hpc_hess.curvature.differences.step_size import Concentration, StepController, concentration
from hpc_hess.curvature.record import ProductRecord
from hpc_hess.errors import NumericsError
from hpc_hess.intake.choices import Choices
from hpc_hess.model.sharded.gradient import Gradient
from hpc_hess.model.sharded.undisturbed import uninterrupted
from hpc_hess.parallel.memory import reusing_freed_pages
from hpc_hess.parallel.vector import Vector, VectorSpace

_LOST = 1e-3  # share of a step that storing it to the nearest may lose before it is dithered

Scheme = Literal["forward", "central", "fourth"]


class FiniteDifferenceHessian:
    """H of the objective at theta_0, the parameters the model holds when this is built.

    Parameters
    ----------
    gradient : the gradient of the objective.
    scheme : "central" (two gradients), "forward" (one, against the cached base gradient), "fourth" (four).
    step : "auto" (chosen per vector from measured noise and curvature: step_size.py), or a number: eps, the length of
        the step along v / |v|.
    base : loss and gradient at theta_0 from ``gradient.at_theta0()``, where they are known already (the gradient of a
        resumed run may be None unless the scheme is "forward").

    """

    def __init__(
        self,
        gradient: Gradient,
        scheme: Scheme = "central",
        step: float | Literal["auto"] = "auto",
        base: tuple[float, Vector | None] | None = None,
    ) -> None:
        self.gradient, self.scheme, self.step = gradient, scheme, step
        self.space: VectorSpace = gradient.model.space
        self.theta0 = gradient.model.read_parameters()
        self.records: list[ProductRecord] = []
        theta_rms = self.space.wrap(self.theta0).norm() / math.sqrt(self.space.size)
        self.controller = StepController(scheme, theta_rms, self.space.dtype)
        _, gradient_0 = base or gradient.at_theta0()
        if gradient_0 is not None and not math.isfinite(gradient_0.norm()):
            raise NumericsError("the gradient is not finite at the model's parameters")
        self.base = gradient_0 if scheme == "forward" else None
        self.choices: dict[str, int] | None = None  # discrete choices that changed within the first product's step
        self._minus: Vector | None = None  # kept: fresh memory of this size takes longer than its arithmetic

    def matvec(self, v: Vector) -> Vector:
        """Return H v (same dtype as v). Collective: yes.

        Raises
        ------
        NumericsError : a perturbed loss is not finite, or no parameter changes when the step is stored.

        """
        spread = concentration(v)
        if spread.norm == 0.0:
            return self.space.zeros()
        routing, controller = self.gradient.routing, self.controller
        flips, spent = routing.num_flips, controller.calibration_gradients
        began = time.perf_counter()
        try:
            eps = self._choose_step(v, spread) if isinstance(self.step, str) else self.step
            calibration_s = time.perf_counter() - began
            realised, result, size, gradients = self._quotient(v, eps, spread.norm)
            moved = self._look() if self.choices is None else None  # where the last gradient was taken
        finally:
            with uninterrupted():
                self.gradient.model.write_parameters(self.theta0)
        if moved is not None:
            self.choices = self._changed(moved)
        controller.product_gradients += gradients
        error = None
        if isinstance(self.step, str):
            error = controller.predicted_error(spread, eps, size / spread.norm)
        self.records.append(
            ProductRecord(
                eps,
                realised,
                gradients,
                controller.calibration_gradients - spent,
                calibration_s,
                self._flips_since(flips),
                error,
                self.choices,
            )
        )
        return result

    def _flips_since(self, before: int) -> int:
        """Experts that flipped on any rank since the count ``before``. Collective where routing is free."""
        routing = self.gradient.routing
        if routing.mode == "frozen":
            return 0
        flips = torch.tensor([float(routing.num_flips - before)], dtype=torch.float64)
        return int(self.space.world.sum_over_ranks(flips, "expert flips"))

    def _look(self, before: Choices | None = None) -> Choices | None:
        """Note the discrete choices of the first micro-batch at the parameters of now, but frozen ones. Collective: yes."""
        gradient, watch = self.gradient, Choices(before)
        gradient.routing.begin()
        gradient.routing.micro_batch = 0
        try:
            with gradient.model.measuring(), gradient.model.world.guard("discrete choices"), watch:
                gradient.objective.contribution(gradient.model.module, 0)
        finally:
            gradient.routing.end()
        return watch

    def _changed(self, moved: Choices) -> dict[str, int]:
        """Count the choices at theta_0 that differ from those of ``moved``, by operation, of all ranks. Collective: yes."""
        here, total = self._look(moved), Counter[str]()
        for found in self.space.world.gather(dict(here.changed) if here is not None else {}, "discrete choices"):
            total.update(found)
        return {name: count for name, count in sorted(total.items()) if count}

    def _choose_step(self, v: Vector, spread: Concentration) -> float:
        """Return eps for ``v``, after a calibration where the controller wants one. Collective: yes."""
        if self.controller.wants_calibration(spread):
            self.controller.calibrate(
                spread,
                lambda eps: self._shifted(v, eps / spread.norm, spread.norm),
                self._base,
                lambda: self.gradient.watch.milestone(self.controller.to_state()),
            )
        return self.controller.step(spread)

    def _base(self) -> Vector:
        """Return a copy of the gradient at theta_0, which only "forward" keeps."""
        if self.base is not None:
            return self.base.copy()
        self.gradient.model.write_parameters(self.theta0)
        return self.gradient()[1]

    def _quotient(self, v: Vector, eps: float, norm: float) -> tuple[float, Vector, float, int]:
        """Return the realised share of ``eps``, the product, its norm, and the gradients spent."""
        if self.scheme == "forward":
            assert self.base is not None
            distance, result = self._shifted(v, eps / norm, norm)
            self._check_realised(distance / eps, eps)
            return distance / eps, result, result.difference_(self.base, norm / distance), 1
        distance, result, other = self._both(v, eps / norm, norm)
        realised = distance / (2 * eps)
        self._check_realised(realised, eps)
        if self.scheme == "central":
            return realised, result, result.difference_(other, norm / distance), 2
        # Richardson: the error of order eps^2 cancels
        result.axpy_(-1.0, other)
        double, wide, other = self._both(v, 2 * eps / norm, norm)
        wide.axpy_(-1.0, other)
        result.scale_(4 * norm / (3 * distance)).axpy_(-norm / (3 * double), wide)
        return realised, result, result.norm(), 4

    def _shifted(self, v: Vector, factor: float, norm: float) -> tuple[float, Vector]:
        """Return the realised step <theta - theta_0, v> / |v| and the gradient at theta = theta_0 + factor v."""
        along, _ = self._move(v, factor, norm)
        return along / norm, self.gradient()[1]

    def _move(self, v: Vector, factor: float, norm: float, *, dither: bool = False) -> tuple[float, bool]:
        """Store theta = theta_0 + factor v in the model, dithered if asked to or if rounding would lose too much.

        Returns <theta - theta_0, v> as stored, and whether it was dithered. Collective: yes.
        """
        along = math.nan
        for attempt in [True] if dither else [False, True]:
            local = self.gradient.model.move_parameters(self.theta0, v.data, factor, dither=attempt)
            along = float(self.space.sum(local, "realised step"))
            if abs(along / (factor * norm * norm) - 1) <= _LOST:
                return along, attempt
        return along, True

    def _both(self, v: Vector, factor: float, norm: float) -> tuple[float, Vector, Vector]:
        """Return the realised distance, g(theta_0 + factor v) and g(theta_0 - factor v), which the next call overwrites."""
        plus, self._minus = self.space.empty(), self._minus or self.space.empty()
        with reusing_freed_pages():  # of the first gradient, by the second
            forth, dithered = self._move(v, factor, norm)
            self.gradient(plus)
            back, _ = self._move(v, -factor, norm, dither=dithered)
            self.gradient(self._minus)
        return (forth - back) / norm, plus, self._minus

    def _check_realised(self, realised: float, eps: float) -> None:
        """Refuse a step that storing loses even when it is dithered: ``realised`` is its share that was stored."""
        if not 0.5 <= realised <= 2:
            raise NumericsError(f"a step of {eps:.1e} is lost when it is stored in {self.space.dtype}: raise operator.step")

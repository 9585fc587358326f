"""The finite-difference step of one vector, chosen from measured noise and curvature.

No constant works: on SmolLM2-135M the best central step is 0.6 for a random unit vector and 3e-4 to 1e-3 for the
dominant eigenvector, which lives on 500 of 134 M entries. A calibration evaluates gradients at theta + k h v / |v|,
k = -2..2, and takes from them

* the noise sigma of a gradient, from the fourth difference (ECNoise: Moré and Wild, "Estimating computational noise",
  SIAM J. Sci. Comput. 33, 2011, eq. 2.3: sigma^2 = 4!^2 / 8! |difference|^2). It holds everything that changes from
  point to point: rounding inside the gradient, and the rounding of the parameters when the step is stored;
* the derivative that the scheme truncates (second for "forward", third for the others);

and balances the two. Between calibrations the change of a typical entry, eps / sqrt(participation), is kept; a vector
whose participation is far from every calibrated one is calibrated anew, while that costs less than half a run.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from hpc_hess.parallel import kernels
from hpc_hess.parallel.vector import Vector

# change of a typical entry over the typical parameter where the first calibration starts
_START = {"forward": 1.5e-4, "central": 5e-4, "fourth": 2e-3}
_ORDER = {"forward": 2, "central": 3, "fourth": 5}
_NOISE_STENCIL: dict[int, float] = {-2: 1, -1: -4, 0: 6, 1: -4, 2: 1}
_STENCIL: dict[str, dict[int, float]] = {
    "forward": {-1: 1, 0: -2, 1: 1},  # h^2 g''
    "central": {-2: -0.5, -1: 1, 1: -1, 2: 0.5},  # h^3 g'''
    "fourth": {-2: -0.5, -1: 1, 1: -1, 2: 0.5},
}
_MAX_ROUNDS = 3
# contrast (see Differences) is about 2 at the best central step, 1.5 at the best forward one
_RESOLVED, _DROWNED = 1.5, 6.0
_STRETCH = 10.0
_FAR = 10.0  # times the noise of an earlier vector: not noise, but derivatives beyond what the contrast resolves
CALIBRATION_GRADIENTS = 5


@dataclass(frozen=True)
class Concentration:
    """How a vector is spread: Euclidean norm and participation number (sum v^2)^2 / sum v^4, in entries."""

    norm: float
    participation: float


def concentration(v: Vector) -> Concentration:
    """Measure ``v``. Collective: yes."""
    second, fourth = v.space.sum(kernels.moments(v.data), "concentration of a vector").tolist()
    return Concentration(math.sqrt(second), second * second / fourth if fourth > 0 else 0.0)


@dataclass(frozen=True)
class Calibration:
    """What one calibration found. Norms are Euclidean, steps in units of the unit vector.

    ``derivative``: norm of the truncated derivative of the gradient along the vector; ``excess``: the predicted error
    over its noise part, at the chosen step; ``sigma``: the noise of a gradient.
    """

    participation: float
    step: float
    noise: float
    derivative: float
    product_norm: float
    excess: float
    sigma: float = math.inf

    @property
    def relative_error(self) -> float:
        """Predicted relative error of the product at the chosen step, for the calibrated vector."""
        return self.excess * self.noise / self.product_norm if self.product_norm > 0 else math.inf


@dataclass
class Differences:
    """Norms measured around theta_0 with spacing ``h``: gradient noise, truncated derivative, product, and contrast.

    ``contrast`` is the stencil of the derivative over what noise alone would make of it: below 1 nothing was resolved.
    """

    h: float
    sigma: float
    derivative: float
    product_norm: float
    contrast: float


def measure(shifted: Callable[[float], tuple[float, Vector]], base: Vector, h: float, scheme: str) -> Differences:
    """Evaluate the stencils. ``shifted(a)`` gives the realised step and the gradient at theta_0 + a v / |v|.

    ``base`` is the gradient at theta_0 and is overwritten. Four gradients; three work vectors. Collective: yes.
    """
    stencil = _STENCIL[scheme]
    fourth = base.copy().scale_(_NOISE_STENCIL[0])
    truncated = base.scale_(stencil.get(0, 0.0))
    slope: Vector | None = None
    drift = {"noise": 0.0, "stencil": 0.0}  # realised steps are not exactly k h: a first-derivative residue
    span = 0.0
    for k in (1, -1, 2, -2):
        realised, gradient = shifted(k * h)
        fourth.axpy_(_NOISE_STENCIL[k], gradient)
        drift["noise"] += _NOISE_STENCIL[k] * realised
        if k in stencil:
            truncated.axpy_(stencil[k], gradient)
            drift["stencil"] += stencil[k] * realised
        if abs(k) == 1:
            span += math.copysign(realised, realised * k)
            slope = gradient if slope is None else slope.axpy_(-1.0, gradient)
    assert slope is not None
    slope.scale_(1.0 / span)  # H v / |v|
    fourth.axpy_(-drift["noise"], slope)
    truncated.axpy_(-drift["stencil"], slope)
    sigma = fourth.norm() / math.sqrt(sum(c * c for c in _NOISE_STENCIL.values()))
    found = truncated.norm()
    floor = sigma * math.sqrt(sum(c * c for c in stencil.values()))
    order = 2 if scheme == "forward" else 3
    resolved = math.sqrt(max(found**2 - floor**2, (0.1 * floor) ** 2))
    return Differences(h, sigma, resolved / h**order, slope.norm(), found / floor if floor > 0 else math.inf)


def balance(d: Differences, scheme: str) -> tuple[float, float, float]:
    """Return (step, noise coefficient, excess): where truncation and noise together are least.

    The noise part of the product's error is ``noise coefficient * sigma / step``; times ``excess`` it is the whole.
    """
    sigma, tiny = max(d.sigma, 1e-300), 1e-300
    if scheme == "forward":  # (g2 e / 2)^2 + 2 (sigma / e)^2
        coefficient, slope, power = math.sqrt(2), d.derivative / 2, 1
    elif scheme == "central":  # (g3 e^2 / 6)^2 + (sigma / e)^2 / 2
        coefficient, slope, power = math.sqrt(0.5), d.derivative / 6, 2
    else:  # (g5 e^4 / 30)^2 + (0.95 sigma / e)^2, with g5 from the length scale sqrt(|Hv| / g3)
        coefficient = math.sqrt(130) / 12
        slope, power = d.derivative**2 / max(d.product_norm, tiny) / 30, 4
    step = (coefficient * sigma / (math.sqrt(power) * max(slope, tiny))) ** (1 / (power + 1))
    return step, coefficient, math.sqrt(1 + 1 / power)


@dataclass
class Search:
    """A calibration on its way: the spacing of the next round, and what the rounds before it found."""

    h: float
    rounds: int = 0
    sigma: float = math.inf
    wide: Differences | None = None
    found: Differences | None = None
    over: bool = False

    def note(self, found: Differences, noise: float, spacing: str) -> None:
        """Take in a round: where it shows nothing but noise or all derivative, set a spacing for another."""
        # noise is the same at every spacing: what a wide one finds beyond a narrow one's is the derivative's
        first, self.sigma = self.sigma == math.inf, min(self.sigma, found.sigma)
        self.found, self.rounds = found, self.rounds + 1
        if found.contrast < _RESOLVED and self.wide is None:
            self.h *= _STRETCH
        elif (found.contrast > _DROWNED or found.sigma > noise) and (first or self.wide is not None):
            self.wide, self.h = found, balance(found, spacing)[0] / 3
        else:
            self.over = True
        self.over |= self.rounds == _MAX_ROUNDS

    def result(self) -> Differences:
        """Return the differences that tell noise from derivative best."""
        assert self.found is not None
        best = self.wide if self.wide is not None and self.found.contrast < _RESOLVED else self.found
        return replace(best, sigma=self.sigma)


@dataclass
class StepController:
    """Chooses steps along a run; its state is what a bitwise resume needs.

    ``reach``: a calibration serves vectors whose participation is within this factor of its own.
    """

    scheme: str
    theta_rms: float
    dtype: torch.dtype
    reach: float = 8.0
    calibrations: list[Calibration] = field(default_factory=list)
    calibration_gradients: int = 0
    product_gradients: int = 0
    search: Search | None = None  # a calibration that a checkpoint found on its way

    def nearest(self, v: Concentration) -> Calibration | None:
        """Return the calibration with the closest participation."""
        return min(self.calibrations, key=lambda c: abs(math.log(c.participation / v.participation)), default=None)

    def wants_calibration(self, v: Concentration) -> bool:
        """Whether ``v`` should be calibrated: far from every calibrated vector, and within the budget."""
        near = self.nearest(v)
        if near is None or self.search is not None:
            return True
        ratio = v.participation / near.participation
        affordable = self.calibration_gradients <= 0.5 * self.product_gradients + 3 * CALIBRATION_GRADIENTS
        return affordable and not 1 / self.reach <= ratio <= self.reach

    def step(self, v: Concentration) -> float:
        """Return eps for ``v`` from the nearest calibration, or the rule of thumb before the first."""
        near = self.nearest(v)
        if near is not None:
            return near.step * math.sqrt(v.participation / near.participation)
        return self._rule_of_thumb(v, self.scheme)

    def _rule_of_thumb(self, v: Concentration, scheme: str) -> float:
        # the unit roundoff enters as its square, cube or fifth root
        shrink = (torch.finfo(self.dtype).eps / torch.finfo(torch.float32).eps) ** (1 / _ORDER[scheme])
        return _START[scheme] * shrink * max(self.theta_rms, 1e-6) * math.sqrt(v.participation)

    def predicted_error(self, v: Concentration, step: float, product_norm: float) -> float | None:
        """Return the predicted relative error of a product of norm ``product_norm`` (of the unit vector)."""
        near = self.nearest(v)
        if near is None or product_norm == 0:
            return None
        return near.excess * near.noise * (near.step / step) / product_norm

    def calibrate(
        self,
        v: Concentration,
        shifted: Callable[[float], tuple[float, Vector]],
        base: Callable[[], Vector],
        after_round: Callable[[], None] = lambda: None,
    ) -> Calibration:
        """Measure around theta_0 along the vector of ``v`` until noise and derivative are told apart. Collective: yes.

        Where a spacing shows nothing but noise a far wider one follows; where the derivative drowns the noise, a
        narrower one. The spacing is near the step it gives; for "fourth", whose step is far wider, near the step that
        "central" would take: there the fourth difference is noise, at the step of "fourth" it is all derivative.

        ``after_round`` is called when the state of this controller stands for all gradients so far.
        """
        spacing = "central" if self.scheme == "fourth" else self.scheme
        if self.search is None:
            self.search = Search(self.step(v) if spacing == self.scheme else self._rule_of_thumb(v, spacing))
        search = self.search
        noise = _FAR * min((c.sigma for c in self.calibrations), default=math.inf)
        while not search.over:
            search.note(measure(shifted, base(), search.h, self.scheme), noise, spacing)
            self.calibration_gradients += CALIBRATION_GRADIENTS
            if not search.over:
                after_round()
        found = search.result()
        step, coefficient, excess = balance(found, self.scheme)
        calibration = Calibration(
            v.participation,
            step,
            coefficient * found.sigma / step,
            found.derivative,
            found.product_norm,
            excess,
            found.sigma,
        )
        self.calibrations.append(calibration)
        self.search = None
        after_round()
        return calibration

    def to_state(self) -> dict[str, Any]:
        """Return what a resume needs, JSON-able and exact."""
        return {
            "calibrations": [asdict(c) for c in self.calibrations],
            "calibration_gradients": self.calibration_gradients,
            "product_gradients": self.product_gradients,
            "search": None if self.search is None else asdict(self.search),
        }

    def from_state(self, state: dict[str, Any]) -> None:
        """Take up what :meth:`to_state` gave."""
        self.calibrations = [Calibration(**c) for c in state["calibrations"]]
        self.calibration_gradients = state["calibration_gradients"]
        self.product_gradients = state["product_gradients"]
        search = dict(state.get("search") or {})
        for key in ("wide", "found"):
            if search.get(key):
                search[key] = Differences(**search[key])
        self.search = Search(**search) if search else None

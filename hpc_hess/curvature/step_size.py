"""The finite-difference step of one vector.

Measured on SmolLM2-135M (README, numbers): the best central step is 0.6 for a random unit vector and 3e-4 to 1e-3 for
the dominant eigenvector, which lives on 500 of 134 M entries. What the two share is the change of a typical entry,
eps / sqrt(participation), relative to the typical parameter.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from hpc_hess.parallel.vector import Vector

# change of a typical entry over the typical parameter, per scheme, for float32: between truncation and rounding
_RELATIVE = {"forward": 1.5e-4, "central": 5e-4, "fourth": 2e-3}


@dataclass(frozen=True)
class Concentration:
    """How a vector is spread: Euclidean norm and participation number (sum v^2)^2 / sum v^4, in entries."""

    norm: float
    participation: float


def concentration(v: Vector) -> Concentration:
    """Measure ``v``. Collective: yes."""
    squares = torch.zeros(2, dtype=torch.float64, device=v.data.device)
    for part in v.data.split(1 << 20):
        square = part.double().square()
        squares[0] += square.sum()
        squares[1] += square.square().sum()
    second, fourth = v.space.sum(squares, "concentration of a vector").tolist()
    return Concentration(math.sqrt(second), second * second / fourth if fourth > 0 else 0.0)


def scaled_step(v: Concentration, theta_rms: float, scheme: str, dtype: torch.dtype) -> float:
    """Return eps, in units of the unit vector v / |v|: a typical entry moves by a fixed share of a typical parameter.

    The share is the scheme's for float32, and shrinks with the unit roundoff u as u^(1/2), u^(1/3), u^(1/5).
    """
    order = {"forward": 2, "central": 3, "fourth": 5}[scheme]
    shrink = (torch.finfo(dtype).eps / torch.finfo(torch.float32).eps) ** (1 / order)
    return _RELATIVE[scheme] * shrink * max(theta_rms, 1e-6) * math.sqrt(v.participation)

"""Where a vector lives: its mass in each parameter, and on how many entries."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from hpc_hess.parallel.vector import Vector

_CHUNK = 1 << 20


@dataclass(frozen=True)
class Localisation:
    """``shares``: each parameter's part of |v|^2, summing to 1; ``participation``: (sum v_i^2)^2 / sum v_i^4, in entries."""

    shares: dict[str, float]
    participation: float

    def largest(self, count: int) -> dict[str, float]:
        """Return the ``count`` parameters with the largest shares, largest first."""
        return dict(sorted(self.shares.items(), key=lambda item: -item[1])[:count])

    def by_group(self) -> dict[str, float]:
        """Return the shares summed over :func:`group_of`, in the order of the parameters."""
        groups: dict[str, float] = {}
        for name, share in self.shares.items():
            groups[group_of(name)] = groups.get(group_of(name), 0.0) + share
        return groups


def localise(v: Vector) -> Localisation:
    """Measure where ``v`` lives. One all-reduce. Collective: yes."""
    pieces = v.space.shard.pieces
    sums = torch.zeros(len(pieces) + 1, dtype=torch.float64, device=v.data.device)
    for number, piece in enumerate(pieces):
        for part in v.data[piece.start : piece.stop].split(_CHUNK):
            square = part.double().square()
            sums[number] += square.sum()
            sums[-1] += square.square().sum()
    *masses, fourth = v.space.sum(sums, "where a vector lives").tolist()
    total = sum(masses)
    shares = {p.parameter.name: mass / total if total else 0.0 for p, mass in zip(pieces, masses, strict=True)}
    return Localisation(shares, total**2 / fourth if fourth > 0 else 0.0)


def group_of(name: str) -> str:
    """Return "block 7" for a parameter of block 7, else the module that the parameter belongs to."""
    number = re.search(r"\.(\d+)\.", name)
    if number:
        return f"block {number[1]}"
    return name.removesuffix(".weight").removesuffix(".bias").rsplit(".", 1)[-1]

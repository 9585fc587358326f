"""Seeded random weights: each entry a function of (seed, global index), so any slice of any sharding agrees."""

from __future__ import annotations

import math

import torch
from torch import nn

from hpc_hess.config import ModelSection
from hpc_hess.intake.findings import Finding
from hpc_hess.intake.tensors import towers_note
from hpc_hess.linalg.probes import Purpose, normals
from hpc_hess.model.sources.initial import UNKNOWN, Initial
from hpc_hess.model.sources.source import Source
from hpc_hess.parallel.layout import Layout, Parameter

_SHORT = 1 << 13  # rows up to this length are drawn whole and cut: a call per interval would cost more


class RandomWeights:
    """Draws the slices of a model that has no weights, as its own initialiser would, without ever holding it.

    Norm weights, biases and the like take the constants that the model's initialiser gives them, the rest is normal
    with the initialiser's mean and spread (of uniform variables, the same mean and spread). Drawn in float32 and the
    same for every master dtype. ``guessed`` names the parameters whose start could not be learnt (decay rates of state
    space models, which are computed): matrices are normal there, vectors zero.

    Parameters
    ----------
    seed : any non-negative integer.
    skeleton : from ``build_skeleton``, before or after sharding.

    """

    def __init__(self, seed: int, skeleton: nn.Module) -> None:
        shapes = {name: tuple(p.shape) for name, p in skeleton.named_parameters()}
        self._seed = seed
        left_out = getattr(skeleton, "left_out", {})
        self.findings: list[Finding] = [towers_note(left_out)] if left_out else []
        self._parameters = {p.name: p for p in Layout(shapes).parameters}
        known = getattr(skeleton, "initial", {})
        spread = float(getattr(getattr(skeleton, "config", None), "initializer_range", 0.02))
        self.guessed = [name for name in shapes if known.get(name, UNKNOWN).kind == "unknown"]
        self._initial = {name: _plausible(known.get(name, UNKNOWN), shape, spread) for name, shape in shapes.items()}

    def read(self, name: str, dim: int, low: int, high: int) -> torch.Tensor:
        """Return entries [low, high) of parameter ``name`` along ``dim``, float32. Collective: no."""
        parameter, initial = self._parameters[name], self._initial[name]
        shape = list(parameter.shape)
        if shape:
            shape[dim] = high - low
        if initial.kind == "values":
            assert initial.values is not None
            return initial.values.narrow(dim, low, high - low) if shape else initial.values
        if initial.kind == "constant":
            return torch.full(shape, initial.mean)
        drawn = self._draw(parameter, dim, low, high) if shape else self._normals(parameter.global_offset, 1)
        return drawn.mul_(initial.std).add_(initial.mean).reshape(shape)

    def read_buffer(self, name: str) -> torch.Tensor | None:
        """Return None: buffers are what the constructor made."""
        del name
        return None

    def close(self) -> None:
        """Nothing to free."""

    def _normals(self, start: int, length: int) -> torch.Tensor:
        return normals(self._seed, 0, start, length, dtype=torch.float32, purpose=Purpose.WEIGHTS)

    def _draw(self, parameter: Parameter, dim: int, low: int, high: int) -> torch.Tensor:
        """Return standard normals of the slice, row-major and flat, drawing little beyond it."""
        shape = parameter.shape
        outer, inner = math.prod(shape[:dim]), math.prod(shape[dim + 1 :])
        row, part = shape[dim] * inner, (high - low) * inner
        out = torch.empty(outer, part)
        if part == 0 or outer == 0:
            return out
        if row == part:
            return self._normals(parameter.global_offset, outer * row)
        step = 1 if row > _SHORT else max(1, (1 << 20) // row)
        for first in range(0, outer, step):
            count = min(step, outer - first)
            start = parameter.global_offset + first * row
            if count == 1:
                out[first] = self._normals(start + low * inner, part)
            else:
                out[first : first + count] = self._normals(start, count * row).view(count, row)[
                    :, low * inner : high * inner
                ]
        return out


def _plausible(initial: Initial, shape: tuple[int, ...], spread: float) -> Initial:
    """Fill in what the initialiser left open: matrices are normal, vectors zero."""
    if initial.kind == "values" and (initial.values is None or not bool(torch.isfinite(initial.values).all())):
        initial = UNKNOWN
    if initial.kind == "unknown":
        return Initial("normal", 0.0, spread) if len(shape) > 1 else Initial("constant", 0.0)
    return initial


def reader(source: Source, section: ModelSection, skeleton: nn.Module) -> RandomWeights:
    """Return the reader of a model without weights, as a ModelSpec names it."""
    del source
    return RandomWeights(section.seed, skeleton)

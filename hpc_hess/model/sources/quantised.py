"""Quantised weights as lazy tensors of their values: a box is read and dequantised with the scales that it touches.

The values are those of transformers' own dequantisation, bit for bit.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hpc_hess.errors import ModelError
from hpc_hess.intake.findings import Finding, noted
from hpc_hess.intake.quantisation import Quantisation
from hpc_hess.intake.tensors import FLOATS
from hpc_hess.model.sources.lazy import Box
from hpc_hess.model.sources.stored import Stored

_POWERS = torch.ldexp(torch.ones(256), torch.arange(256) - 127)  # the scale that each byte is the exponent of
_GROUP = 32  # entries under one scale of MXFP4
_BYTES = ("F8_E4M3", "F8_E5M2", "I8")
_CHUNK = 1 << 18  # values that are made at a time: what several passes go over stays in the processor's cache
_TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_EXPONENTS = ("U8", "F8_E8M0")
# of activations and of the keys and values that generation keeps: neither is part of the weights
_ACTIVATIONS = re.compile(r"\.(?:(?:input|output|activation|q|k|v|kv)_scale|input_zero_point|(?:k|v)_zero_point)$")
_MERGED = re.compile(r"\.experts\.\d+\.")


def cover(low: int, high: int, size: int) -> tuple[int, int]:
    """Return which blocks of ``size`` entries meet [low, high)."""
    return low // size, -(-high // size)


@dataclass(frozen=True)
class Mxfp4:
    """Experts [E, K, N] of 4 bits an entry: ``blocks`` [E, N, K/32, 16] uint8 and ``scales`` [E, N, K/32], powers of two."""

    blocks: Stored
    scales: Stored
    dtype = "F32"

    @property
    def file(self) -> str:
        """File of the blocks."""
        return self.blocks.file

    @property
    def shape(self) -> tuple[int, ...]:
        """The experts' shape in the model."""
        experts, columns, groups, _ = self.blocks.shape
        return (experts, groups * _GROUP, columns)

    def read(self, box: Box) -> torch.Tensor:
        """Return the box in float32."""
        experts, (low, high), columns = box
        groups = cover(low, high, _GROUP)
        packed = self.blocks.read((experts, columns, groups, (0, _GROUP // 2)))
        powers = _POWERS[self.scales.read((experts, columns, groups)).view(torch.uint8).int()].transpose(1, 2)
        count, width = powers.shape[1:]
        values = torch.empty(len(packed), count, _GROUP, width)
        step = max(1, _CHUNK // (_GROUP * max(1, width)))
        for expert, start in itertools.product(range(len(packed)), range(0, count, step)):
            part = slice(start, start + step)
            mine = packed[expert, :, part].clone(memory_format=torch.contiguous_format).view(width, -1)
            fours = mine.view(torch.int16).t().contiguous()  # four values each, of rows that follow each other
            made = values[expert, part]
            for place in range(4):
                made.view(-1, 4, width)[:, place] = _e2m1(fours << (12 - 4 * place))
            made.mul_(2.0**14).mul_(powers[expert, part, None])
        start = groups[0] * _GROUP
        return values.flatten(1, 2)[:, low - start : high - start]


@dataclass(frozen=True)
class Scaled:
    """Weights of 8 bits an entry times the scale of their block of ``block`` rows and columns, in ``dtype``."""

    weight: Stored
    scale: Stored
    block: tuple[int, int]
    dtype: str

    @property
    def file(self) -> str:
        """File of the weights."""
        return self.weight.file

    @property
    def shape(self) -> tuple[int, ...]:
        """The weights' shape."""
        return self.weight.shape

    def read(self, box: Box) -> torch.Tensor:
        """Return the box, in ``dtype``."""
        *lead, (top, bottom), (left, right) = box
        values = _values(self.weight.read(box)).to(_TYPES[self.dtype])
        if math.prod(self.scale.shape) == 1:
            return values.mul_(self._factor(tuple((0, 1) for _ in self.scale.shape)).reshape(()))
        height, width = self.block
        rows, columns = cover(top, bottom, height), cover(left, right, width)
        factor = self._factor((*lead, rows, columns)).index_select(-2, torch.arange(top, bottom) // height - rows[0])
        for k in range(columns[0], columns[1]):
            inside = slice(max(k * width, left) - left, min((k + 1) * width, right) - left)
            values[..., inside].mul_(factor[..., k - columns[0], None])
        return values

    def _factor(self, box: Box) -> torch.Tensor:
        scale = self.scale.read(box)
        if scale.dtype == torch.uint8:  # the exponents of powers of two
            scale = (scale.float() - 127.0).exp2()
        return scale.to(_TYPES[self.dtype])


def _e2m1(high: torch.Tensor) -> torch.Tensor:
    """Return values of 4 bits, the highest of int16, times 2^-14 in float16: the same sign, exponent and mantissa."""
    return high.bitwise_right_shift_(3).bitwise_and_(-0x7200).view(torch.float16)


def _values(stored: torch.Tensor) -> torch.Tensor:
    """Return numbers of 8 bits in float32: those of floating point by way of float16, faster than the conversion itself."""
    if stored.dtype == torch.int8:
        return stored.float()
    shift, mask, factor = (8, -1, 1.0) if stored.dtype == torch.float8_e5m2 else (7, ~0x4000, 256.0)
    values = torch.empty(stored.shape)
    flat, signed = values.view(-1), stored.contiguous().view(torch.int8).view(-1)
    for start in range(0, len(flat), _CHUNK):
        part = slice(start, start + _CHUNK)
        halves = signed[part].short().bitwise_left_shift_(shift).bitwise_and_(mask).view(torch.float16)
        flat[part].copy_(halves).mul_(factor)
    wrong = (signed << 1) == -2  # not a number, as E4M3 writes it: all bits but the sign are set
    if shift == 7 and wrong.any():
        flat.masked_fill_(wrong, math.nan)
    return values


def dequantised(
    stored: Mapping[str, Stored], how: Quantisation, directory: Path
) -> tuple[dict[str, Stored | Mxfp4 | Scaled], list[Finding]]:
    """Return a checkpoint with each quantised weight by the name of its values, without its scales. Collective: no.

    Raises
    ------
    ModelError : scales without weights, weights without scales, shapes or types that do not go together.

    """
    found: dict[str, Any] = {key: tensor for key, tensor in stored.items() if not _ACTIVATIONS.search(key)}
    beside = "_blocks" if how.method == "mxfp4" else ""
    for key in [key for key in found if key.endswith(how.suffix)]:
        weight = key.removesuffix(how.suffix) + beside
        if weight not in found:
            raise ModelError(f"{directory / stored[key].file} holds '{key}' without '{weight}': {_incomplete(how)}")
        pair = stored[weight], found.pop(key)
        del found[weight]
        found[key.removesuffix(how.suffix)] = _experts(*pair, directory) if beside else _scaled(*pair, how, directory)
    for key, tensor in found.items():
        alone = key.endswith(beside) if beside else tensor.dtype in _BYTES
        if alone and isinstance(tensor, Stored):
            scale = key.removesuffix(beside) + how.suffix
            raise ModelError(
                f"{directory / tensor.file} holds '{key}' ({tensor.dtype}) without '{scale}': {_incomplete(how)}"
            )
    count = sum(not isinstance(tensor, Stored) for tensor in found.values())
    return found, [note(how.method, count)]


def note(form: str, count: int) -> Finding:
    """Return what is to be said of ``count`` tensors in a quantised form."""
    text = f"what is computed is of the dequantised weights ({form}, {count} tensors); activations are not quantised"
    return noted("weights.files", text)


def _incomplete(how: Quantisation) -> str:
    return f"config.json declares {how.method}: check that every file of the weights is there, and belongs to it"


def _experts(blocks: Stored, scales: Stored, directory: Path) -> Mxfp4:
    fits = len(blocks.shape) == 4 and blocks.shape[3] == _GROUP // 2 and blocks.shape[:3] == scales.shape
    _require(fits and blocks.dtype == "U8" and scales.dtype in _EXPONENTS, blocks, scales, directory)
    return Mxfp4(blocks, scales)


def _scaled(weight: Stored, scale: Stored, how: Quantisation, directory: Path) -> Scaled:
    _require(len(weight.shape) >= 2 and weight.dtype in _BYTES, weight, scale, directory)
    _require(scale.dtype in FLOATS or (how.method == "fp8" and scale.dtype in _EXPONENTS), weight, scale, directory)
    # compressed-tensors multiplies in the type of the scale; transformers, where it merges experts, in float32
    narrow = how.method == "compressed-tensors" and not _MERGED.search(weight.key)
    *lead, rows, columns = weight.shape
    for height, width in how.blocks:
        block = (height or rows, width or columns)
        grid = (*lead, -(-rows // block[0]), -(-columns // block[1]))
        if scale.shape == grid or (math.prod(grid) == 1 and scale.shape in ((), (1,))):
            return Scaled(weight, scale, block, scale.dtype if narrow else "F32")
    _require(False, weight, scale, directory)
    raise AssertionError


def _require(fits: bool, weight: Stored, scale: Stored, directory: Path) -> None:
    if not fits:
        told = " and ".join(f"'{t.key}' ({t.dtype}, {list(t.shape)})" for t in (weight, scale))
        raise ModelError(
            f"{directory / weight.file} holds {told}, which do not go together as the quantization_config of config.json "
            "says: check that the files belong to this configuration"
        )

"""Quantised weights as lazy tensors of their values: a box is read and dequantised with the scales that it touches.

The values are those of transformers' own dequantisation, bit for bit.
"""

from __future__ import annotations

import functools
import itertools
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hpc_hess.errors import ModelError
from hpc_hess.intake.findings import Finding, noted
from hpc_hess.intake.quantisation import Quantisation
from hpc_hess.intake.tensors import FLOATS
from hpc_hess.model.sources.lazy import Box, cuts
from hpc_hess.model.sources.stored import Stored

_POWERS = torch.ldexp(torch.ones(256), torch.arange(256) - 127)  # the scale that each byte is the exponent of
_PLACES = torch.tensor([4096, 256, 16, 1], dtype=torch.int16)[:, None]  # each brings four bits to the top of sixteen
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
        return _made(self, box, torch.float32)

    def write(self, box: Box, place: torch.Tensor) -> None:
        """Write the box into ``place``, of any floating dtype."""
        experts, (low, high), columns = box
        if low % _GROUP or high % _GROUP:
            first, last = cover(low, high, _GROUP)
            start = first * _GROUP
            place.copy_(self.read((experts, (start, last * _GROUP), columns))[:, low - start : high - start])
            return
        groups = (low // _GROUP, high // _GROUP)
        packed = self.blocks.read((experts, columns, groups, (0, _GROUP // 2))).flatten(2)
        fours = packed.view(torch.int16).numpy()  # four values each, of rows that follow each other
        exponents = self.scales.read((experts, columns, groups)).view(torch.uint8).int()
        powers = _POWERS[exponents].transpose(1, 2).contiguous()
        count, width = powers.shape[1:]
        tiles = cuts(((0, count), (0, width)), _CHUNK // _GROUP)
        for expert, (rows, across) in itertools.product(range(len(packed)), tiles):
            part, inside = slice(*rows), slice(*across)
            mine = fours[expert, inside, rows[0] * 8 : rows[1] * 8]
            turned = torch.from_numpy(np.ascontiguousarray(mine.T))  # faster than torch's own transposition
            shifted = turned[:, None] * _PLACES
            # the highest four bits as float16, times 2^-14: the same sign, exponent and mantissa
            halves = shifted.bitwise_right_shift_(3).bitwise_and_(-0x7200).view(torch.float16)
            values = halves.reshape(-1, _GROUP, inside.stop - inside.start).float().mul_(2.0**14)
            made = place[expert, _GROUP * rows[0] : _GROUP * rows[1], inside].unflatten(0, (-1, _GROUP))
            _multiply(values, powers[expert, part, None, inside], made)


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
        return _made(self, box, _TYPES[self.dtype])

    def write(self, box: Box, place: torch.Tensor) -> None:
        """Write the box into ``place``, of any floating dtype."""
        *lead, (top, bottom), (left, right) = box
        stored, (height, width) = self.weight.read(box), self.block
        rows, columns = cover(top, bottom, height), cover(left, right, width)
        if math.prod(self.scale.shape) == 1:
            whole = self._factor(tuple((0, 1) for _ in self.scale.shape))
            factor = whole.reshape([1] * len(box)).expand(*stored.shape[:-2], 1, 1)
        else:
            factor = self._factor((*lead, rows, columns))
        if factor.shape[-1] > 1:
            factor = factor.index_select(-1, torch.arange(left, right) // width - columns[0])
        for part in cuts(tuple((0, n) for n in stored.shape), _CHUNK):
            at = tuple(slice(*extent) for extent in part)
            scales = factor[at[:-2]] if factor.shape[-1] == 1 else factor[(*at[:-2], slice(None), at[-1])]
            first, last = top + part[-2][0], top + part[-2][1]
            if first // height == (last - 1) // height:
                scales = scales.narrow(-2, first // height - rows[0], 1)
            else:
                scales = scales.index_select(-2, torch.arange(first, last) // height - rows[0])
            _multiply(_values(stored[at], _TYPES[self.dtype]), scales, place[at])

    def _factor(self, box: Box) -> torch.Tensor:
        scale = self.scale.read(box)
        if scale.dtype == torch.uint8:  # the exponents of powers of two
            scale = (scale.float() - 127.0).exp2()
        return scale.to(_TYPES[self.dtype])


def _made(tensor: Mxfp4 | Scaled, box: Box, dtype: torch.dtype) -> torch.Tensor:
    values = torch.empty([high - low for low, high in box], dtype=dtype)
    tensor.write(box, values)
    return values


def _multiply(values: torch.Tensor, factor: torch.Tensor, place: torch.Tensor) -> None:
    """Write the product, of the dtype that both have, into ``place``; ``values`` may be changed."""
    if place.device == values.device and place.dtype == values.dtype:
        torch.mul(values, factor, out=place)
    else:
        place.copy_(values.mul_(factor))


def _values(stored: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return numbers of 8 bits in ``dtype``; those of floating point by a table, faster than their conversion."""
    if stored.dtype == torch.int8:
        return stored.to(dtype)
    count = stored.numel()
    twos = torch.zeros(-(-count // 2), dtype=torch.uint16)
    twos.view(torch.uint8)[:count].view(stored.shape).copy_(stored.view(torch.uint8))
    return _pairs(stored.dtype, dtype).index_select(0, twos.int()).view(dtype)[:count].view(stored.shape)


@functools.cache
def _pairs(stored: torch.dtype, dtype: torch.dtype) -> torch.Tensor:
    """Return the two values in each pair of bytes, as one item of twice their size."""
    one = torch.arange(256, dtype=torch.uint8).view(stored).to(dtype)
    both = torch.cartesian_prod(one, one).flip(1).contiguous()  # the first byte is the lower
    return both.view({2: torch.int32, 4: torch.int64, 8: torch.complex128}[dtype.itemsize]).view(-1)


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

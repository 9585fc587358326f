"""How the parameters of a model fall into blocks: by layer, tensor, attention head, or row."""

from __future__ import annotations

import math
import re
from typing import Literal

import torch

from hpc_hess.errors import ConfigError
from hpc_hess.parallel.layout import Layout, Parameter, Piece
from hpc_hess.parallel.partition import Partition
from hpc_hess.parallel.vector import VectorSpace
from hpc_hess.studies.localisation import group_of

Kind = Literal["layer", "tensor", "head", "row"]

# Projections whose rows (0) or columns (1) belong to heads, and how many head widths stand behind each other for one
_HEADS = [
    (r"\b(q|k|v|qkv)_proj\.(weight|bias)$", 0, 1),
    (r"\b(o|out)_proj\.weight$", 1, 1),
    (r"\bquery_key_value\.(weight|bias)$", 0, 3),
    (r"attention\.dense\.weight$", 1, 1),
    (r"\bc_attn\.weight$", 1, 1),
    (r"\bc_attn\.bias$", 0, 1),
    (r"\battn\.c_proj\.weight$", 0, 1),
]


def partition(space: VectorSpace, kind: Kind, head_dim: int = 0) -> Partition:
    """Return the blocks of ``kind``, numbered the same on any number of ranks. Collective: no.

    "layer": a block of the model, or a module outside them. "tensor": a parameter. "row": a row of a matrix (what makes one
    output), and a vector as a whole. "head": the rows or columns of an attention projection that belong to one head, and any
    other tensor as a whole.

    Raises
    ------
    ConfigError : "head" where the projections of heads are not known by their names.

    """
    ids: list[torch.Tensor] = []
    sizes: list[int] = []
    names: list[str] = []
    number_of: dict[str, int] = {}
    if kind == "head":
        check_heads(space.layout, head_dim)
    for piece in space.shard.pieces:
        parameter = piece.parameter
        if kind == "layer":
            name = group_of(parameter.name)
            if name not in number_of:
                number_of[name] = len(sizes)
                sizes.append(0)
                names.append(name)
            sizes[number_of[name]] += parameter.numel
            ids.append(_whole(piece, number_of[name]))
            continue
        dim, width = _split_by(parameter, kind, head_dim)
        first, blocks = len(sizes), 1
        if width:
            blocks = -(-parameter.shape[dim] // width)
            inner = parameter.numel // parameter.shape[dim]
            sizes += [inner * min(width, parameter.shape[dim] - k * width) for k in range(blocks)]
            ids.append(_along(piece, dim, first, width))
        else:
            sizes.append(parameter.numel)
            ids.append(_whole(piece, first))
        names += [parameter.name] if blocks == 1 else [f"{parameter.name} {kind} {k}" for k in range(blocks)]
    return Partition(space, ids, sizes, names)


def check_heads(layout: Layout, head_dim: int) -> None:
    """Raise ConfigError unless the projection of some attention head is known. Collective: no."""
    if not any(_split_by(parameter, "head", head_dim)[1] for parameter in layout.parameters):
        raise ConfigError(
            'studies.block_diagonal.blocks = ["head"] knows no projection of attention heads among the parameters: leave '
            '"head" out, or widen parameters.include'
        )


def _split_by(parameter: Parameter, kind: Kind, head_dim: int) -> tuple[int, int]:
    """Return the dimension along which a tensor is split and the width of a block; width 0: not at all."""
    if kind == "row" and len(parameter.shape) > 1:
        return 0, 1
    if kind == "head" and head_dim:
        for pattern, dim, widths in _HEADS:
            if re.search(pattern, parameter.name) and parameter.shape[dim] % (widths * head_dim) == 0:
                return dim, widths * head_dim
    return 0, 0


def _whole(piece: Piece, block: int) -> torch.Tensor:
    return torch.full((1,) * len(piece.local_shape), block, dtype=torch.int64)


def _along(piece: Piece, dim: int, first: int, width: int) -> torch.Tensor:
    """Return the blocks of a piece's indices along ``dim``, in a shape that broadcasts to the piece's."""
    shape, parameter = piece.local_shape, piece.parameter
    low = 0
    if dim == parameter.shard_dim and len(piece.interval_starts):
        inner = math.prod(parameter.shape[dim + 1 :])
        low = int(piece.interval_starts[0]) // inner
    index = torch.arange(low, low + shape[dim], dtype=torch.int64)
    return (first + index // width).view([-1 if d == dim else 1 for d in range(len(shape))])

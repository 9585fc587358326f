"""A dense matrix over the parameters of a small transformer that are cut over ranks."""

from __future__ import annotations

import numpy as np
import torch

from hpc_hess.linalg.operator import FunctionOperator
from hpc_hess.parallel.layout import Layout
from hpc_hess.parallel.vector import Vector, VectorSpace
from hpc_hess.parallel.world import World

# q_proj: 3 heads of 2 rows; o_proj: 3 heads of 2 columns, sharded on its second dimension
SHAPES: dict[str, tuple[int, ...]] = {
    "embed.weight": (5, 2),
    "layers.0.norm.weight": (3,),
    "layers.0.attn.q_proj.weight": (6, 2),
    "scale": (),
    "layers.1.attn.o_proj.weight": (3, 6),
    "layers.1.mlp.weight": (4, 3),
    "layers.1.norm.weight": (1,),
}
SIZE = sum(int(np.prod(shape)) for shape in SHAPES.values())


def make_space(world: World) -> VectorSpace:
    layout = Layout(SHAPES, world.shard_size, {"layers.1.attn.o_proj.weight": 1})
    return VectorSpace(world, layout, torch.float64)


def local(space: VectorSpace, whole: np.ndarray) -> Vector:
    starts, lengths = space.shard.global_intervals
    parts = [whole[a : a + n] for a, n in zip(starts, lengths, strict=True)]
    return space.wrap(torch.from_numpy(np.concatenate([np.empty(0), *parts])))


def gathered(v: Vector) -> np.ndarray:
    whole = torch.zeros(SIZE, dtype=torch.float64)
    starts, lengths = v.space.shard.global_intervals
    position = 0
    for a, n in zip(starts.tolist(), lengths.tolist(), strict=True):
        whole[a : a + n] = v.data[position : position + n]
        position += n
    return v.space.sum(whole, "gather").numpy()


def operator_of(space: VectorSpace, matrix: np.ndarray) -> FunctionOperator:
    return FunctionOperator(space, lambda v: local(space, matrix @ gathered(v)))

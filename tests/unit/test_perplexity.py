"""The Hessian of exp(loss) against its formula, for one vector and for several at once."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from hpc_hess.curvature.perplexity import PerplexityHessian
from hpc_hess.linalg.operator import FunctionOperator
from hpc_hess.parallel.layout import Layout
from hpc_hess.parallel.vector import Vector, VectorSpace
from hpc_hess.parallel.world import World


class Shared(FunctionOperator):
    calls = 0

    def matmat(self, vectors: Sequence[Vector]) -> list[Vector]:
        self.calls += 1
        return [self.matvec(v) for v in vectors]


def test_several_products_at_once_are_the_formula() -> None:
    space = VectorSpace(World.alone(), Layout({"a": (6,)}), torch.float64)
    generator = torch.Generator().manual_seed(0)
    half, g, *vs = torch.randn(9, 6, dtype=torch.float64, generator=generator).split([6, 1, 1, 1])
    h, g = half + half.T, g[0]
    inner = Shared(space, lambda v: Vector(space, h @ v.data))
    operator = PerplexityHessian(inner, 1.5, space.wrap(g.clone()))
    found = operator.matmat([space.wrap(v[0].clone()) for v in vs])
    assert inner.calls == 1
    for v, product in zip(vs, found, strict=True):
        expected = math.exp(1.5) * (h @ v[0] + g * (g @ v[0]))
        torch.testing.assert_close(product.data, expected, rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(operator.matvec(space.wrap(v[0].clone())).data, expected, rtol=1e-13, atol=1e-13)

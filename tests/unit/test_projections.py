"""Intercepted embeddings against PyTorch's own, for values, tangents and gradients, alone and under vmap."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from hpc_hess.curvature.exact.projections import fused


@pytest.mark.parametrize("options", [{}, {"padding_idx": 2}, {"padding_idx": -1}, {"scale_grad_by_freq": True}])
def test_embedding(options: dict[str, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    table, bar = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((7, 3), (2, 4, 3)))
    along = torch.randn(5, 7, 3, generator=generator, dtype=torch.float64)
    tokens = torch.tensor([[0, 2, 2, 6], [5, 2, 0, 0]])

    def derivatives(v: torch.Tensor) -> tuple[torch.Tensor, ...]:
        def look_up(weight: torch.Tensor) -> torch.Tensor:
            return F.embedding(tokens, weight, **options).sin()

        def tangent(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return torch.func.jvp(look_up, (weight,), (v,))

        (y, y_dot), pull = torch.func.vjp(tangent, table)
        return y, y_dot, *pull((bar, bar + 1))

    for v in along:
        with fused():
            found = derivatives(v)
        for got, expected in zip(found, derivatives(v), strict=True):
            torch.testing.assert_close(got, expected)
    with fused():
        together = torch.vmap(derivatives)(along)
    for k, v in enumerate(along):
        for got, expected in zip(together, derivatives(v), strict=True):
            torch.testing.assert_close(got[k], expected)

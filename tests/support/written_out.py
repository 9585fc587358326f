"""Layers that torch.func cannot differentiate forward over reverse, written out."""

from __future__ import annotations

import torch
from torch import nn


class _SiLU(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.sigmoid(x)


class _LayerNorm(nn.Module):
    def __init__(self, layer: nn.LayerNorm) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = layer.weight, layer.bias, layer.eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + self.eps) * self.weight + self.bias


def write_out(module: nn.Module) -> None:
    """Replace what torch.func cannot differentiate forward over reverse by the same function written out.

    torch 2.13: silu_backward has no forward derivative, and jvp of jacrev through layer_norm, which is what curvlinops
    computes, is silently off by 1 to 30 %.
    """
    for name, child in module.named_children():
        if isinstance(child, nn.LayerNorm):
            setattr(module, name, _LayerNorm(child))
        elif isinstance(child, nn.SiLU) or type(child).__name__ == "SiLUActivation":
            setattr(module, name, _SiLU())
        else:
            write_out(child)

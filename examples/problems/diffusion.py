"""A denoising diffusion model of small images: the Hessian of E |noise - model(x_t, t)|^2 (Ho et al. 2020, equation 14).

    hpc-hess run examples/problems/diffusion.toml

Noise and time steps are drawn once, from a seed: the loss is a function of the parameters alone.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn


class Denoiser(nn.Module):
    """A small convolutional network that is told the noise level."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.time = nn.Sequential(nn.Linear(2, width), nn.SiLU(), nn.Linear(width, width))
        self.first = nn.Conv2d(1, width, 3, padding=1)
        self.middle = nn.Sequential(nn.GroupNorm(4, width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1))
        self.last = nn.Sequential(nn.GroupNorm(4, width), nn.SiLU(), nn.Conv2d(width, 1, 3, padding=1))

    def forward(self, x: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
        """Return the noise in ``x`` [rows, 1, 8, 8]; ``share`` [rows] of the image that is left."""
        told = self.time(torch.stack([share.sqrt(), (1 - share).sqrt()], 1))
        hidden = self.first(x) + told[:, :, None, None]
        return self.last(hidden + self.middle(hidden))


def build(world: Any, settings: dict[str, Any]) -> tuple[Any, list[Any], Any]:
    """Return the model, this rank's noisy images, and the loss."""
    torch.manual_seed(0)
    model = Denoiser(settings.get("width", 16))
    generator = torch.Generator().manual_seed(1)
    batches = []
    for _ in range(settings.get("batches", 6)):
        x, noise = torch.rand(4, 1, 8, 8, generator=generator), torch.randn(4, 1, 8, 8, generator=generator)
        share = torch.cos(0.5 * math.pi * torch.rand(4, generator=generator)) ** 2
        noisy = share.sqrt()[:, None, None, None] * x + (1 - share).sqrt()[:, None, None, None] * noise
        batches.append((noisy, share, noise))

    def loss(model: Any, batch: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, float]:
        noisy, share, noise = (t.to(world.device) for t in batch)
        return (model(noisy, share) - noise).square().sum(), float(noise.numel())

    return model, batches[world.rank :: world.size], loss

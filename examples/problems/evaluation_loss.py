"""A classifier of handwritten digits, trained here for a moment: the Hessian of its loss on held-out data.

    hpc-hess run examples/problems/evaluation_loss.toml

The digits are those of scikit-learn (pip install scikit-learn).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy


def build(world: Any, settings: dict[str, Any]) -> tuple[Any, list[Any], Any]:
    """Return the trained classifier, this rank's held-out digits, and the loss."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images, labels = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
    optimiser = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(settings.get("epochs", 100)):  # the same on every rank: seeded, and on the CPU
        optimiser.zero_grad()
        cross_entropy(model(images[:1200]), labels[:1200]).backward()
        optimiser.step()
    batches = list(zip(images[1200:].split(100), labels[1200:].split(100), strict=True))

    def loss(model: Any, batch: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, float]:
        x, y = (t.to(world.device) for t in batch)
        return cross_entropy(model(x), y, reduction="sum"), float(len(y))

    return model, batches[world.rank :: world.size], loss

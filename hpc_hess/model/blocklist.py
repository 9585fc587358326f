"""The list of repeated blocks of a model."""

from __future__ import annotations

from torch import nn


def find_blocks(module: nn.Module) -> nn.ModuleList | None:
    """Return the list of repeated blocks: the ModuleList with the most parameters. None where there is none."""
    lists = [m for m in module.modules() if isinstance(m, nn.ModuleList) and len(m) > 0]
    return max(lists, key=lambda m: sum(p.numel() for p in m.parameters()), default=None)

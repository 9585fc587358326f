"""The list of repeated blocks of a model."""

from __future__ import annotations

from typing import Any

from torch import nn

from hpc_hess.model.sharded.towers import language_model


def find_blocks(module: nn.Module) -> nn.ModuleList | None:
    """Return the list of repeated blocks: the ModuleList with the most parameters. None where there is none.

    Of a composite model (text and images), those of its language model, also where another part is larger.
    """
    language = language_model(module)
    for part in (language, module) if language is not None else (module,):
        lists = [m for m in part.modules() if isinstance(m, nn.ModuleList) and len(m) > 0]
        if lists:
            return max(lists, key=lambda m: sum(p.numel() for p in m.parameters()))
    return None


def all_blocks(module: nn.Module) -> nn.ModuleList | None:
    """Return the repeated blocks of a model; of one with encoder and decoder those of both. None where there are none."""
    config: Any = getattr(module, "config", None)
    if not getattr(config, "is_encoder_decoder", False):
        return find_blocks(module)
    whole: Any = module
    lists = [find_blocks(part) for part in (whole.get_encoder(), whole.get_decoder())]
    return nn.ModuleList([block for blocks in lists for block in blocks or []]) or None

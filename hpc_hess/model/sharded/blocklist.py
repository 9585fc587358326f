"""The list of repeated blocks of a model."""

from __future__ import annotations

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

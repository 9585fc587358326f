"""The language model of a multimodal one, and what belongs to images and sound alone: its towers."""

from __future__ import annotations

from typing import Any

from torch import nn

# parts for images and sound through which text goes too: embeddings of further tokens
_PASSED = {"Gemma3nModel": ("embed_vision", "embed_audio")}


def language_model(module: nn.Module) -> nn.Module | None:
    """Return the part of a composite Hugging Face model that its text configuration describes, else None."""
    config: Any = getattr(module, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    if text is config:
        return None
    return next((m for m in module.modules() if getattr(m, "config", None) is text), None)


def leave_out_towers(model: nn.Module) -> dict[str, int]:
    """Take every parameter out of a model of text and more that belongs neither to its language model nor to its head.

    Text alone does not reach them. Their places become None, as in models that are built without a tower. Returns how many
    parameters each held, by name; nothing is done to other models.
    """
    language = language_model(model)
    if language is None or "text_config" not in getattr(model.config, "sub_configs", {}):
        return {}
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # type: ignore[operator]
    return _leave_out(model, [part for part in (language, head) if part is not None], "")


def _leave_out(module: nn.Module, kept: list[nn.Module], prefix: str) -> dict[str, int]:
    found: dict[str, int] = {}
    for name, parameter in module.named_parameters(recurse=False):
        module._parameters[name] = None
        found[prefix + name] = parameter.numel()
    for name, child in module.named_children():
        if any(child is part for part in kept) or name in _PASSED.get(type(module).__name__, ()):
            continue
        if any(part in child.modules() for part in kept):
            found |= _leave_out(child, kept, f"{prefix}{name}.")
        elif count := sum(parameter.numel() for parameter in child.parameters()):
            module._modules[name] = None
            found[prefix + name] = count
    return found

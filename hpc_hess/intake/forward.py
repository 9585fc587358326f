"""What a model's forward pass shows: whether it sees later tokens, writes its own weights, or minds padding."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

import torch

from hpc_hess.errors import ModelError
from hpc_hess.intake.choices import Choices
from hpc_hess.intake.findings import Finding, noted, passed, unchecked
from hpc_hess.parallel.world import World

Logits = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # (ids (1, L), mask (1, L)) -> (L, V); collective

_TOKENS = 64  # of a row that the first checks take: a model that sees ahead does so in a short row too
_TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 3e-2}  # of the largest logit
_CAUSAL: dict[str, Any] = {"is_decoder": True, "causal": True, "attn_type": "uni", "use_bidirectional_attention": None}
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def checksums(tensors: Iterable[tuple[str, torch.Tensor]]) -> dict[str, int]:
    """Return the sum of each tensor's words as integers: what is written shows. Collective: no."""
    found = {}
    for name, tensor in tensors:
        flat = tensor.detach().reshape(-1)
        if flat.is_complex():
            flat = torch.view_as_real(flat).reshape(-1)
        found[name] = int(flat.view(_WORDS[flat.element_size()]).sum(dtype=torch.int64)) if flat.numel() else 0
    return found


def beginning(ids: torch.Tensor) -> torch.Tensor:
    """Return the tokens (1, L) of a row (L',) that the checks compute with."""
    return ids[None, :_TOKENS]


def causal_switches(config: Any) -> dict[str, Any]:
    """Return the keys of a configuration that let tokens see later ones, and their values that do not."""

    def differs(value: Any, on: Any) -> bool:
        return bool(value != on) if isinstance(on, str) else bool(value) != bool(on)

    return {key: on for key, on in _CAUSAL.items() if differs(getattr(config, key, on), on)}


def causal_remedy(config: Any, other: str = 'set model.task = "masked-lm"') -> str:
    """Return what to do with a model whose tokens see later ones: its configuration may have a switch for that."""
    other = f"take a causal model, or {other}"
    for key, on in causal_switches(config).items():
        return f'set "{key}": {json.dumps(on)} in config.json, {other}'
    return other


def check_causal(
    logits: Logits, ids: torch.Tensor, first: torch.Tensor, dtype: torch.dtype, world: World, name: str, remedy: str
) -> Finding:
    """Change the end of ``ids`` (1, L) and compare the logits before it with ``first`` (L, V). Collective: yes.

    The end is the last token; and all but two tokens, which shows a beginning whose tokens see each other. Two forward
    passes; five more where the logits moved: a choice of experts that rounding changed is none of the model's seeing ahead,
    so choices are repeated then. ``remedy``: what the sentence of a refusal advises.

    Raises
    ------
    ModelError : the logits depend on a later token. On every rank.

    """
    mask, length = torch.ones_like(ids), ids.shape[1]
    scale = float(first.abs().max())
    allowed, changed = _TOLERANCE[dtype] * scale, 0

    def moved(turn: int, before: torch.Tensor, choices: Choices | None = None) -> float:
        """Return the largest change of a logit before the end; nan counts as a change."""
        nonlocal changed
        found = []
        for place in (length - 1, min(2, length - 1)):
            replay = Choices(choices, replay=True) if choices else nullcontext()
            with replay:
                found.append((logits(_with_end(ids, place, turn), mask)[:place] - before[:place]).abs().max())
            if isinstance(replay, Choices):
                changed += sum(replay.changed[op] for op in ("max", "argmax", "sort", "argsort", "min"))
        return float(torch.stack(found).max())

    size = moved(0, first)
    if not world.any_true(not size <= allowed, "causal"):
        return passed("model.causal", "changing a row's last token leaves the logits before it as they were")
    recorded = Choices()
    with recorded:
        again = logits(ids, mask)
    if world.any_true(not float((again - first).abs().max()) <= allowed, "causal"):
        return unchecked("model.causal", "the logits of the same tokens are not the same twice")
    least = min(size, *(moved(turn, again, recorded) for turn in (1, 2)))
    if world.any_true(least > allowed, "causal"):
        if world.any_true(changed > 0, "causal") and not world.any_true(least > 0.01 * scale, "causal"):
            return unchecked("model.causal", "discrete choices of the model differ from pass to pass")
        size = world.max_over_ranks(size, "causal")
        raise ModelError(
            f"{name} is not a causal language model: changing a row's last tokens moves earlier logits by {size:.2g}, so "
            f"tokens see their targets; {remedy}"
        )
    return passed("model.causal", "with experts held fixed, changing a row's last token leaves the logits before it")


def check_padding(alone: torch.Tensor, padded: torch.Tensor, dtype: torch.dtype, world: World) -> tuple[Finding, bool]:
    """Compare the logits (n, V) of a row by itself, the same on every rank, with those of the padded row. Collective: yes.

    Returns the finding, and whether rows have to be computed alone.
    """
    allowed = _TOLERANCE[dtype] * float(alone.abs().max())
    moved = world.max_over_ranks(float((padded - alone).abs().max()), "padding")
    if world.any_true(not moved <= allowed, "padding"):
        text = f"padding moves logits by {moved:.2g}: rows are computed one at a time, each at its own length"
        return noted("model.padding", text), True
    return passed("model.padding", "a padded row has the logits of the row alone"), False


def _with_end(ids: torch.Tensor, place: int, turn: int) -> torch.Tensor:
    """Return the row with another token from ``place`` on: one that the data hold, so that it is one the model takes."""
    last = int(ids[0, -1])
    others = [token for token in dict.fromkeys(ids[0].tolist()) if token != last] or [last - 1 if last else 1]
    changed = ids.clone()
    changed[0, place:] = others[turn % len(others)]
    return changed

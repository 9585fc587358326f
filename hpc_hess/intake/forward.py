"""What a model's forward pass shows: whether it sees later tokens, writes its own weights, or minds padding."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from hpc_hess.errors import ModelError
from hpc_hess.intake.choices import Choices
from hpc_hess.intake.findings import Finding, noted, passed, unchecked
from hpc_hess.parallel.world import World

Logits = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # (ids (1, L), mask (1, L)) -> (L, V); collective

_TOKENS = 64  # of a row that the first checks take: a model that sees ahead does so in a short row too
_TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-4, torch.bfloat16: 3e-2}  # of the largest logit
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


def check_causal(
    logits: Logits, ids: torch.Tensor, first: torch.Tensor, dtype: torch.dtype, world: World, name: str, vocabulary: int
) -> Finding:
    """Change the last of ``ids`` (1, L) and compare the logits before it with ``first`` (L, V). Collective: yes.

    One forward pass; three more where the logits moved: a choice of experts that rounding changed is none of the
    model's seeing ahead, so choices are repeated then.

    Raises
    ------
    ModelError : the logits depend on a later token. On every rank.

    """
    mask = torch.ones_like(ids)
    moved = _moved(logits(_other(ids, 0, vocabulary), mask), first)
    scale = float(first.abs().max())
    allowed = _TOLERANCE[dtype] * scale
    if not world.any_true(not moved <= allowed, "causal"):
        return passed("model.causal", "changing a row's last token leaves the logits before it as they were")
    before = Choices()
    with before:
        again = logits(ids, mask)
    if world.any_true(not _moved(again, first) <= allowed, "causal"):
        return unchecked("model.causal", "the logits of the same tokens are not the same twice")
    least, changed = moved, 0
    for turn in (1, 2):
        replay = Choices(before, replay=True)
        with replay:
            least = min(least, _moved(logits(_other(ids, turn, vocabulary), mask), again))
        changed += sum(replay.changed[op] for op in ("max", "argmax", "sort", "argsort", "min"))
    if world.any_true(least > allowed, "causal"):
        if world.any_true(changed > 0, "causal") and not world.any_true(least > 0.01 * scale, "causal"):
            return unchecked("model.causal", "discrete choices of the model differ from pass to pass")
        size = world.max_over_ranks(moved, "causal")
        raise ModelError(
            f"{name} is not a causal language model: changing a row's last token moves earlier logits by {size:.2g}, so "
            'tokens see their targets; take a causal model, or set "is_decoder": true in config.json where that is a key'
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


def _moved(new: torch.Tensor, old: torch.Tensor) -> float:
    """Return the largest change of a logit before the last token; nan counts as a change."""
    return float((new[:-1] - old[:-1]).abs().max())


def _other(ids: torch.Tensor, turn: int, vocabulary: int) -> torch.Tensor:
    """Return the row with another last token: one that the data hold, so that it is one the model takes."""
    last = int(ids[0, -1])
    others = [token for token in dict.fromkeys(ids[0].tolist()) if token != last] or [
        (last + 1 + k) % vocabulary for k in range(3)
    ]
    changed = ids.clone()
    changed[0, -1] = others[turn % len(others)]
    return changed

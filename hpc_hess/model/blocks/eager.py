"""Attention of models that run transformers' "eager" functions: the same numbers in memory that grows with the sequence.

transformers asks its registry for the function of an attention module and offers the model's own for "eager": GPT-OSS's
has sinks, Gemma 2's a cap. In their place stands ours, after a trial on a few random tokens has shown it to compute the
same. Models that compute attention inline (Bloom, MPT) never ask.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch._subclasses.fake_tensor import is_fake

from hpc_hess.model.blocks.attention import Mask, attention

# Arguments that say nothing to the function itself: mask and queries have their effect
_WITHOUT_EFFECT = {"position_ids", "position_embeddings", "cache_position", "sliding_window", "use_cache"}
_TOLERANCE = 1e-4
_TOKENS = 5
_trials: dict[Any, bool] = {}


@contextlib.contextmanager
def attention_in_chunks(notes: list[str]) -> Iterator[None]:
    """Let models of transformers that ask for "eager" attention have ours; what keeps its own is added to ``notes``."""
    registry = getattr(sys.modules.get("transformers.modeling_utils"), "AttentionInterface", None)
    ask = getattr(registry, "get_interface", None)
    if registry is None or ask is None:
        yield
        return

    def answer(self: Any, attn_implementation: Any, default: Callable[..., Any]) -> Callable[..., Any]:
        found = ask(self, attn_implementation, default)
        return partial(_attend, default, notes) if attn_implementation == "eager" and found is default else found

    registry.get_interface = answer
    try:
        yield
    finally:
        registry.get_interface = ask


def _attend(
    own: Callable[..., Any],
    notes: list[str],
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **more: Any,
) -> tuple[torch.Tensor, Any]:
    """As the model's ``own`` function: [B, queries, heads, d], and no weights where ours takes its place."""
    if _same(own, module, query, key, value, attention_mask, scaling, dropout, more):
        return _ours(module, query, key, value, attention_mask, scaling, **more), None
    note = f"attention of {type(module).__name__} is its own, whose matrices of queries x keys need memory at long sequences"
    if note not in notes:
        notes.append(note)
    given = {} if scaling is None else {"scaling": scaling}
    return own(module, query, key, value, attention_mask, dropout=dropout, **given, **more)


def _ours(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float | None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_: Any,
) -> torch.Tensor:
    sinks = s_aux if s_aux is not None else getattr(module, "sinks", None)
    scale = scaling if scaling is not None else getattr(module, "scaling", None)
    bias = None if mask is None else mask[..., : key.shape[-2]]
    out = attention(query, key, value, Mask(bias=bias), scale, softcap, sinks)
    return out.transpose(1, 2).contiguous()


def _same(own: Any, module: Any, q: Any, k: Any, v: Any, mask: Any, scaling: Any, dropout: float, more: Any) -> bool:
    """Return whether ours stands for the module's own: found once for each kind of module and arguments."""
    told = {name: value for name, value in more.items() if value is not None and name not in _WITHOUT_EFFECT}
    unknown = [name for name, value in told.items() if name != "s_aux" and isinstance(value, torch.Tensor | tuple | list)]
    if (
        dropout
        or unknown
        or told.get("output_attentions")
        or q.ndim != 4
        or (mask is not None and not (mask.ndim == 4 and mask.is_floating_point()))
    ):
        return False
    if is_fake(q):  # a plan: there are no numbers to compare
        return True
    plain = {name: value for name, value in told.items() if name != "s_aux"}
    shape = (q.shape[1], *q.shape[3:], *k.shape[1::2], *v.shape[1::2], mask is None)
    kind = (own, type(module), scaling, shape, "s_aux" in told, repr(sorted(plain.items())))
    if kind not in _trials:
        _trials[kind] = _agree(own, module, (q, k, v), mask, scaling, more)
    return _trials[kind]


def _agree(own: Any, module: Any, x: tuple[torch.Tensor, ...], mask: Any, scaling: Any, more: Any) -> bool:
    """Compare on a few tokens, of numbers that are neither random nor regular: vmap draws none."""

    def draw(*shape: int) -> torch.Tensor:
        numbers = torch.arange(int(torch.Size(shape).numel()), device=x[0].device, dtype=torch.float32)
        return 2 * torch.sin(1.7 * numbers.square() + shape[-1]).view(shape)

    q, k, v = (draw(1, t.shape[1], _TOKENS, t.shape[3]) for t in x)
    if mask is not None:
        places = torch.arange(_TOKENS, device=q.device)
        mask = draw(1, 1, _TOKENS, _TOKENS).masked_fill(places > places[:, None], torch.finfo(q.dtype).min)
    given = {} if scaling is None else {"scaling": scaling}
    try:
        with torch.no_grad():
            right = own(module, q, k, v, mask, dropout=0.0, **given, **more)[0]
            found = _ours(module, q, k, v, mask, scaling, **more)
            return found.shape == right.shape and bool((found - right).abs().max() < _TOLERANCE * right.abs().max())
    except (RuntimeError, TypeError, ValueError, AttributeError):  # it wants something else: whatever it is
        return False

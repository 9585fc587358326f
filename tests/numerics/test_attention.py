"""Attention in chunks: values, tangents and their pulls against elementary operations in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.func import jvp, vjp, vmap

from hpc_hess.model.blocks import attention as module
from hpc_hess.model.blocks.attention import Mask, _elementary, attention

QUERIES = 23


def _mask(kind: str) -> Mask:
    places = torch.arange(QUERIES)
    behind = places[:, None] - places[None]
    if kind == "full":
        return Mask()
    if kind == "causal":
        return Mask(causal=True)
    if kind == "window":
        return Mask.of((behind >= 0) & (behind < 5), False)
    if kind == "alibi":
        bias = -0.3 * behind.double() * torch.tensor([1.0, 0.5])[:, None, None]
        return Mask.of(bias.masked_fill(behind < 0, -torch.inf)[None], False)
    seen = torch.ones(3, 1, 1, QUERIES, dtype=torch.bool)
    seen[1, ..., :4] = False  # padded on the left: some queries see nothing
    return Mask.of(seen & (behind >= 0), False)


def _products(f: Callable[..., torch.Tensor], count: int) -> list[torch.Tensor]:
    """Everything that exact products ask of attention: value, tangent, and the pull of both, for ``count`` directions."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    shapes = [(3, 2, QUERIES, 4), (3, 2, QUERIES, 4), (3, 2, QUERIES, 6)]  # keys and values of different size
    tensors = tuple(draw(*s) for s in shapes)
    dots = tuple(draw(count, *s) for s in shapes)
    bars = tuple(draw(count, 3, 2, QUERIES, 6) for _ in range(2))

    def product(dots: Any, bars: Any) -> Any:
        (y, y_dot), pull = vjp(lambda x, x_dot: jvp(f, x, x_dot), tensors, dots)
        return y, y_dot, pull(bars)

    found = vmap(product)(dots, bars) if count > 1 else product(tuple(d[0] for d in dots), tuple(b[0] for b in bars))
    return torch.utils._pytree.tree_leaves(found)


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("kind", ["full", "causal", "window", "alibi", "left padding"])
def test_products_are_those_of_elementary_operations(kind: str, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK_ENTRIES", 1)
    monkeypatch.setattr(module, "_LEAST_ROWS", 5)  # the last chunk is shorter
    mask = _mask(kind)
    whole = mask.rows(0, QUERIES, QUERIES) if mask.causal else mask
    found = _products(lambda *t: attention(*t, mask, 0.4), count)
    right = _products(lambda *t: _elementary(*t, whole, 0.4), count)
    for ours, theirs in zip(found, right, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)


def test_large_products_go_through_chunks_and_small_ones_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    monkeypatch.setattr(module._Attention, "apply", lambda q, *_: seen.append(q.shape[-2]) or q)
    monkeypatch.setattr(module, "CHUNK_ENTRIES", 100)
    q = torch.randn(1, 1, 14, 2)
    attention(q, q, q, Mask())
    assert seen == []
    q = torch.randn(1, 1, 15, 2)
    attention(q, q, q, Mask())
    assert seen == [15]


def test_a_mask_that_is_differentiated_keeps_elementary_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK_ENTRIES", 1)
    bias = torch.zeros(1, 1, 6, 6, requires_grad=True)
    q = torch.randn(1, 1, 6, 2)
    attention(q, q, q, Mask.of(bias, False)).sum().backward()
    assert bias.grad is not None

"""Attention that can be differentiated forwards and backwards, in memory that grows with the sequence and not its square.

Small products of queries and keys go through elementary operations. Large ones go through functions whose derivatives
are their own: each takes the queries in chunks and computes a chunk's probabilities again wherever it needs them, so
that nothing as large as queries x keys outlives a chunk. Derivatives of a chunk are those of the elementary operations.

There are two such functions, since exact products differentiate a tangent backwards (curvature.tangents): attention,
whose tangent is the second function, and that tangent, whose own way back is differentiated no further.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.nn.functional import pad

from hpc_hess.errors import ModelError

# Entries of queries x keys, over batch and heads, of a chunk. Below twice as many, elementary operations are as fast.
CHUNK_ENTRIES = 1 << 22
_LEAST_ROWS = 16

Tensors = Sequence[Any]  # of tensors


@dataclass(frozen=True)
class Mask:
    """What each query sees.

    ``allowed`` : bool, or None for everything; ``bias`` : added to the scores where allowed; both broadcast to
    [..., queries, keys]. ``causal`` : the keys up to the query's own place, in place of the other two.
    """

    allowed: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    causal: bool = False

    @classmethod
    def of(cls, mask: torch.Tensor | None, causal: bool) -> Mask:
        """Return the mask that scaled_dot_product_attention's arguments stand for."""
        if mask is None or causal:
            return cls(causal=causal)
        return cls(allowed=mask) if mask.dtype == torch.bool else cls(mask > -torch.inf, mask)

    def rows(self, low: int, high: int, keys: int) -> Mask:
        """Return the part of some queries and the first ``keys`` keys."""
        if self.causal:
            places = torch.arange(low, high)[:, None]
            return Mask(torch.arange(keys)[None] <= places)

        def part(whole: torch.Tensor | None) -> torch.Tensor | None:
            if whole is None:
                return None
            return whole[..., slice(low, high) if whole.shape[-2] > 1 else slice(None), :keys]

        return Mask(part(self.allowed), part(self.bias))


def attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Mask, scale: float | None = None
) -> torch.Tensor:
    """Return softmax(scale query key^T + bias) value: [..., queries, d]. A query that sees nothing gets zeros.

    ``query`` [..., queries, c], ``key`` [..., keys, c], ``value`` [..., keys, d]; the masks broadcast to
    [..., queries, keys]. ``scale`` is 1 / sqrt(c) unless given. Collective: no.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    entries = math.prod(query.shape[:-1]) * key.shape[-2]
    if entries < 2 * CHUNK_ENTRIES or (mask.bias is not None and mask.bias.requires_grad):
        whole = mask.rows(0, query.shape[-2], key.shape[-2]) if mask.causal else mask
        return _elementary(query, key, value, whole, scale)
    masks = (mask.allowed, mask.bias, mask.causal)
    return _Attention.apply(query, key, value, *masks, scale)


def _elementary(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Mask, scale: float) -> torch.Tensor:
    scores = (q * scale) @ k.transpose(-1, -2)
    allowed = None if mask.allowed is None else mask.allowed.to(scores.device)
    if mask.bias is not None and allowed is not None:
        scores = scores + mask.bias.masked_fill(~allowed, 0.0)
    if allowed is not None:
        scores = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min)
    out = torch.softmax(wide(scores), -1).to(v.dtype) @ v
    # as from the fused kernels
    return out if allowed is None else out.masked_fill(~allowed.any(-1, keepdim=True), 0.0)


def wide(x: torch.Tensor) -> torch.Tensor:
    """Return ``x`` in fp32 at least: statistics are taken so, as the fused kernels do."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def _chunks(q: torch.Tensor, k: torch.Tensor, mask: Mask) -> Iterator[tuple[slice, slice, Mask]]:
    """Yield rows of queries, the keys that they may see, and their mask."""
    queries, keys = q.shape[-2], k.shape[-2]
    rows = max(_LEAST_ROWS, CHUNK_ENTRIES // (math.prod(q.shape[:-2]) * keys))
    for low in range(0, queries, rows):
        high = min(low + rows, queries)
        seen = min(high, keys) if mask.causal else keys
        yield slice(low, high), slice(0, seen), mask.rows(low, high, seen)


def _part(tensors: Tensors, rows: slice, keys: slice) -> Tensors:
    """Return a chunk of (q, k, v) or of (q, k, v, q_dot, k_dot, v_dot)."""
    return tuple(t[..., rows if i % 3 == 0 else keys, :] for i, t in enumerate(tensors))


class _Sums:
    """Gradients of (q, k, v, ...): those of queries chunk by chunk, those of keys and values summed over the chunks."""

    def __init__(self, length: int) -> None:
        self._length, self._rows, self._sums = length, dict[int, list[torch.Tensor]](), dict[int, torch.Tensor]()

    def add(self, found: Tensors) -> None:
        for i, part in enumerate(found):
            if i % 3 == 0:
                self._rows.setdefault(i, []).append(part)
            else:
                part = pad(part, (0, 0, 0, self._length - part.shape[-2]))
                self._sums[i] = self._sums[i] + part if i in self._sums else part

    def all(self) -> Tensors:
        return tuple(
            torch.cat(self._rows[i], -2) if i % 3 == 0 else self._sums[i] for i in range(len(self._rows) + len(self._sums))
        )


# The functions take masks one by one: functorch must see every tensor among the arguments.


class _Attention(torch.autograd.Function):
    """Attention of (q, k, v, allowed, bias, causal, scale) in chunks."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs: Any) -> torch.Tensor:
        return _in_chunks(_elementary_of, inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _keep(ctx, inputs)
        ctx.save_for_forward(*inputs[:-2])

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> torch.Tensor:
        tensors, masks = ctx.saved_tensors[:3], ctx.saved_tensors[3:]
        dots = [torch.zeros_like(t) if d is None else d for t, d in zip(tensors, tangents[:3], strict=True)]
        return _Tangent.apply(*tensors, *dots, *masks, ctx.causal, ctx.scale)

    @staticmethod
    def backward(ctx: Any, out_bar: torch.Tensor) -> tuple[Any, ...]:
        return _pulled_back(_elementary_of, ctx, out_bar)


class _Tangent(torch.autograd.Function):
    """The tangent of attention: of (q, k, v, q_dot, k_dot, v_dot, allowed, bias, causal, scale), in chunks."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs: Any) -> torch.Tensor:
        return _in_chunks(_tangent_of, inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _keep(ctx, inputs)

    @staticmethod
    def backward(ctx: Any, out_bar: torch.Tensor) -> tuple[Any, ...]:
        return _pulled_back(_tangent_of, ctx, out_bar)


def _elementary_of(mask: Mask, scale: float, *tensors: Any) -> torch.Tensor:
    q, k, v = tensors
    return _elementary(q, k, v, mask, scale)


def _tangent_of(mask: Mask, scale: float, *tensors: Any) -> torch.Tensor:
    """Return the tangent of one chunk: tensors are (q, k, v, q_dot, k_dot, v_dot)."""
    return torch.func.jvp(partial(_elementary_of, mask, scale), tensors[:3], tensors[3:])[1]


def _in_chunks(f: Callable[..., torch.Tensor], inputs: Tensors) -> torch.Tensor:
    """Return ``f`` of (tensors..., allowed, bias, causal, scale), chunk by chunk."""
    *tensors, allowed, bias, causal, scale = inputs
    chunks = _chunks(tensors[0], tensors[1], Mask(allowed, bias, causal))
    return torch.cat([f(part, scale, *_part(tensors, rows, keys)) for rows, keys, part in chunks], -2)


def _keep(ctx: Any, inputs: Tensors) -> None:
    ctx.causal, ctx.scale = inputs[-2:]
    ctx.save_for_backward(*inputs[:-2])


def _pulled_back(f: Callable[..., torch.Tensor], ctx: Any, out_bar: torch.Tensor) -> tuple[Any, ...]:
    """Return the gradients of <out_bar, f> by all inputs, chunk by chunk: the masks and the scale have none."""
    *tensors, allowed, bias = ctx.saved_tensors
    sums = _Sums(tensors[1].shape[-2])
    for rows, keys, part in _chunks(tensors[0], tensors[1], Mask(allowed, bias, ctx.causal)):
        pull = torch.func.vjp(partial(f, part, ctx.scale), *_part(tensors, rows, keys))[1]
        sums.add(pull(out_bar[..., rows, :]))
    return *sums.all(), None, None, None, None


def scaled_dot_product_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """Stand in for torch's function of that name. Raises ModelError where dropout is on."""
    if dropout_p:
        raise ModelError("attention dropout is on: call model.eval() before taking exact products")
    if enable_gqa:
        groups = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(groups, -3), value.repeat_interleave(groups, -3)
    return attention(query, key, value, Mask.of(attn_mask, is_causal), scale)

"""Attention that can be differentiated forwards and backwards, in memory that grows with the sequence and not its square.

Its functions are those of attention_chunks. What is asked of them, in exact products and gradients:

    value                    the cotangents of q, k, v        and their derivatives, by double backward
    value and tangent        their pull                       (differentiated no further)

Under vmap over directions each function runs once for all of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from hpc_hess.errors import ModelError
from hpc_hess.model.blocks.attention_chunks import Form, Inputs, duals, gradients, pulls, values, wide

WRITTEN_OUT = 1 << 22  # entries of queries x keys up to which a traced graph holds every operation


@dataclass(frozen=True)
class Mask:
    """What each query sees.

    ``allowed`` : bool, or None for everything; ``bias`` : added to the scores; both broadcast to [..., queries, keys].
    ``causal`` : the keys up to the query's own place, in place of the other two. A query that ``allowed`` lets see nothing
    gets zeros.
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


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: Mask,
    scale: float | None = None,
    cap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return softmax(cap tanh(scale query key^T / cap) + bias) value: [..., heads, queries, d].

    ``query`` [..., heads, queries, c], ``key`` [..., K, keys, c], ``value`` [..., K, keys, d]: each of the K heads serves
    heads / K neighbouring ones. ``scale`` is 1 / sqrt(c) unless given; no ``cap`` unless given. ``sinks`` [heads]: scores
    of one more key, whose value is zero. A bias that is differentiated itself takes memory as the matrices of queries x
    keys do. Collective: no.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if mask.bias is not None and (mask.bias.requires_grad or forward_ad.unpack_dual(mask.bias).tangent is not None):
        return elementary(query, key, value, mask, scale, cap, sinks)
    q, k, v = (t[(None,) * max(0, 4 - t.ndim)] for t in (query, key, value))
    batch = torch.broadcast_shapes(*(t.shape[:-3] for t in (q, k, v)))
    q, k, v = (t.expand(*batch, *t.shape[-3:]).flatten(0, -4) for t in (q, k, v))
    heads = k.shape[1]
    if q.shape[1] % heads or v.shape[1] != heads:  # broadcast in another way
        return elementary(query, key, value, mask, scale, cap, sinks)
    q = q.unflatten(1, (heads, q.shape[1] // heads))
    masks = [None if t is None else _spread(t, batch, q, k) for t in (mask.allowed, mask.bias)]
    x = [q, k, v, sinks if sinks is None else sinks.view(q.shape[1:3])]
    options = (mask.causal, scale, cap)
    both = [(None, None) if t is None else forward_ad.unpack_dual(t) for t in x]
    if all(dot is None for _, dot in both):
        (out,) = _Attention.apply(*x, *masks, None, *options)
    else:
        primals = [t for t, _ in both]
        dots = [None if t is None else torch.zeros_like(t)[None] if d is None else d[None] for t, d in both]
        out, out_dot, _ = _Dual.apply(*primals, *masks, None, *dots, *options)
        out = forward_ad.make_dual(out, out_dot[0])
    return out.reshape(*batch, -1, *out.shape[-2:])[(0,) * max(0, 4 - query.ndim)]


def _spread(mask: torch.Tensor, batch: Any, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """Return a mask as [B, K, G, queries, keys], 1 where it is the same for all but for the keys."""
    mask = mask[(None,) * (4 - mask.ndim)] if mask.ndim < 4 else mask
    if len(batch) > 1:
        mask = mask.expand(*batch, *mask.shape[-3:]).flatten(0, -4)
    mask = mask.expand(*mask.shape[:-1], k.shape[-2])
    return mask[:, :, None] if mask.shape[1] == 1 else mask.unflatten(1, q.shape[1:3])


def elementary(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: Mask,
    scale: float | None = None,
    cap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """As :func:`attention`, by operations that each hold a whole matrix of queries x keys."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    groups = q.shape[-3] // k.shape[-3] if q.ndim > 2 else 1
    k, v = (t.repeat_interleave(groups, -3) if groups > 1 else t for t in (k, v))
    scores, allowed = (q * scale) @ k.transpose(-1, -2), mask.allowed
    if cap is not None:
        scores = cap * torch.tanh(scores / cap)
    if mask.causal:
        allowed = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if mask.bias is not None:
        scores = scores + (mask.bias if allowed is None else mask.bias.masked_fill(~allowed, 0.0))
    if allowed is not None:
        scores = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min)
    scores = wide(scores)
    if sinks is not None:
        scores = torch.cat([scores, sinks.view(-1, 1, 1).expand(*scores.shape[:-1], 1)], -1)
    out = torch.softmax(scores, -1)[..., : k.shape[-2]].to(v.dtype) @ v
    # as from the fused kernels
    return out if allowed is None else out.masked_fill(~allowed.any(-1, keepdim=True), 0.0)


# Arguments of the functions below: q, k, v, sinks, allowed, bias, o (the same for all directions), then tensors with the
# directions in front, then causal, scale, cap. functorch must see every tensor among them.
_SHARED, _OPTIONS = 7, 3


def _read(args: Any) -> tuple[Form, Inputs, torch.Tensor, Any]:
    """Return the form, q to sinks, o, and the tensors with directions."""
    *tensors, causal, scale, cap = args
    return Form(tensors[4], tensors[5], causal, scale, cap), Inputs(*tensors[:4]), tensors[6], tensors[_SHARED:]


def _computed(what: str, *args: Any) -> list[torch.Tensor]:
    """Return the results of one of the functions below."""
    form, x, o, rest = _read(args)
    if what == "values":
        return [values(form, x)]
    if what == "duals":
        return list(duals(form, x, Inputs(*rest)))
    if what == "gradients":
        return list(_present(gradients(form, x, o, *rest)))
    *dots, o_dot, r, o1, o2 = rest
    return list(_present(*pulls(form, x, Inputs(*dots), o, o_dot, r, o1, o2)))


@torch.library.custom_op("hpc_hess::attention", mutates_args=())
def _one_node(
    what: str, tensors: list[torch.Tensor | None], causal: bool, scale: float, cap: float | None
) -> list[torch.Tensor]:
    return _computed(what, *tensors, causal, scale, cap)


@_one_node.register_fake
def _(what: str, tensors: Any, causal: bool, scale: float, cap: float | None) -> list[torch.Tensor]:
    return _computed(what, *tensors, causal, scale, cap)


def _results(what: str, args: Any) -> tuple[torch.Tensor, ...]:
    """As :func:`_computed`; large in a traced graph it is one node, which takes its chunks when it runs."""
    if get_proxy_mode() is None or math.prod(args[0].shape[:-1]) * args[1].shape[-2] <= WRITTEN_OUT:
        return tuple(_computed(what, *args))
    *tensors, causal, scale, cap = args
    return tuple(_one_node(what, tensors, causal, scale, cap))


def _present(*inputs: Inputs) -> tuple[torch.Tensor, ...]:
    return tuple(t for found in inputs for t in found if t is not None)


class _Function(torch.autograd.Function):
    """Of the arguments above, to a tuple of results; the first ``shared_results`` have no directions in front."""

    shared_results = 0
    last_may_be_one = False  # for all directions

    @classmethod
    def vmap(cls, info: Any, in_dims: Any, *args: Any) -> Any:
        size, options = info.batch_size, args[-_OPTIONS:]
        tensors = list(zip(args[:-_OPTIONS], in_dims[:-_OPTIONS], strict=True))
        if any(dim is not None for _, dim in tensors[:_SHARED]):
            return cls._over_heads(size, tensors, options)
        given = [t for t, _ in tensors]
        for i, (t, dim) in enumerate(tensors[_SHARED:], start=_SHARED):
            one = cls.last_may_be_one and i == len(tensors) - 1 and dim is None and len(t) == 1
            if t is not None and not one:
                given[i] = _front(t, dim, size).flatten(0, 1)
        count = len(given[_SHARED])
        found = cls.apply(*given, *options)
        several = [i >= cls.shared_results and len(t) == count for i, t in enumerate(found)]
        out = tuple(t.unflatten(0, (size, -1)) if s else t for t, s in zip(found, several, strict=True))
        return out, tuple(0 if s else None for s in several)

    @classmethod
    def _over_heads(cls, size: int, tensors: Any, options: Any) -> Any:
        """Take what differs in q, k or v as more heads."""

        def axis(t: torch.Tensor, directed: bool) -> int:
            return int(directed) + int(t.ndim > 2 + directed)  # sinks have no examples

        given: list[torch.Tensor | None] = []
        (q, dim), *_ = tensors
        heads = _front(q, dim, size).shape[2]
        for i, (t, dim) in enumerate(tensors):
            if t is not None:
                t = _front(t, dim, size)
                at = axis(t[0], i >= _SHARED)
                t = t.movedim(0, at)
                if t.shape[at + 1] != heads:  # a mask for all of them
                    t = t.expand(*t.shape[: at + 1], heads, *t.shape[at + 2 :])
                t = t.flatten(at, at + 1)
            given.append(t)
        found = cls.apply(*given, *options)
        axes = [axis(t, i >= cls.shared_results) for i, t in enumerate(found)]
        return tuple(t.unflatten(a, (size, -1)) for t, a in zip(found, axes, strict=True)), tuple(axes)


def _front(t: torch.Tensor, dim: int | None, size: int) -> torch.Tensor:
    return t.expand(size, *t.shape) if dim is None else t.movedim(dim, 0)


class _Attention(_Function):
    """To o."""

    shared_results = 1

    @staticmethod
    def forward(*args: Any) -> Any:
        return _results("values", args)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.options = inputs[-_OPTIONS:]
        ctx.save_for_backward(*inputs[:6], *output)

    @staticmethod
    def backward(ctx: Any, bar: Any) -> Any:
        found = _Gradient.apply(*ctx.saved_tensors, bar[None], *ctx.options)
        return *_derivatives(t[0] for t in found), *(None,) * (3 + _OPTIONS)


class _Gradient(_Function):
    """With o; of one cotangent of o for each direction, to those of q, k, v, sinks."""

    @staticmethod
    def forward(*args: Any) -> Any:
        return _results("gradients", args)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.options = inputs[-_OPTIONS:]
        ctx.save_for_backward(*inputs[:-_OPTIONS])

    @staticmethod
    def backward(ctx: Any, *along: Any) -> Any:
        """What was found, along tangents of q to sinks, is <bars, o_dot>."""
        *shared, o, bars = ctx.saved_tensors
        dots = _derivatives(along)
        _, o_dot, r = _Dual.apply(*shared, None, *dots, *ctx.options)
        by_x: Any = (None,) * 4
        if any(ctx.needs_input_grad[:4]):
            found = _Pull.apply(*shared, o, *dots, o_dot, r, torch.zeros_like(bars), bars, *ctx.options)
            by_x = _derivatives(t.sum(0) for t in found[: len(along)])
        return *by_x, None, None, None, o_dot, *(None,) * _OPTIONS


class _Dual(_Function):
    """Of tangents of q, k, v, sinks, to o, o_dot and r: see attention_chunks."""

    shared_results = 1

    @staticmethod
    def forward(*args: Any) -> Any:
        return _results("duals", args)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        o, o_dot, r = output
        ctx.options = inputs[-_OPTIONS:]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:6], o, *inputs[_SHARED:-_OPTIONS], o_dot, r)

    @staticmethod
    def backward(ctx: Any, bar: Any, dot_bar: Any, _: Any) -> Any:
        saved = ctx.saved_tensors
        rest, number = (None,) * _OPTIONS, sum(t is not None for t in saved[:4])
        if dot_bar is None:  # J^T alone
            found = _Gradient.apply(*saved[:_SHARED], bar[None], *ctx.options)
            return *_derivatives(t[0] for t in found), None, None, None, *(None,) * 4, *rest
        count = len(dot_bar)
        bars = torch.zeros_like(dot_bar) if bar is None else (bar / count if count > 1 else bar).expand_as(dot_bar)
        found = _Pull.apply(*saved, bars, dot_bar, *ctx.options)
        by_x = _derivatives(t.sum(0) for t in found[:number])
        return *by_x, None, None, None, *_derivatives(found[number:]), *rest


class _Pull(_Function):
    """With o; of the tangents, o_dot, r and the cotangents of o and o_dot, to those of q to sinks and of their tangents."""

    last_may_be_one = True

    @staticmethod
    def forward(*args: Any) -> Any:
        return _results("pulls", args)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """There is no way further."""


def _derivatives(found: Any) -> tuple[Any, ...]:
    """Return those by q, k, v and sinks: the last lacks where there are none."""
    return (*found, None)[:4]


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
    return attention(query, key, value, Mask.of(attn_mask, is_causal), scale)

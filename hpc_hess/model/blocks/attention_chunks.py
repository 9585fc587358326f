"""Attention and its derivatives in closed form, over chunks of queries: nothing as large as queries x keys outlives a chunk.

Per chunk, with scores S = scale q k^T, capped and masked, P = softmax(S), o = P v, a dot for a tangent, and x for the
product entry by entry:

    r = rows of P x S_dot (their sums),  X = S_dot - r,  P_dot = P x X,  o_dot = P_dot v + P v_dot

The pull of <o1, o> + <o2, o_dot> is, by q, k, v and by q_dot, k_dot, v_dot,

    H = P x (o2 v^T - <o2, o>),  G = P x (o1 v^T + o2 v_dot^T - <o1, o> - <o2, o_dot>) + H x X
    scale (G k + H k_dot),  scale (G^T q + H^T q_dot),  P^T o1 + P_dot^T o2      and
    scale H k,              scale H^T q,                P^T o2

The sums over a row's keys come from the outputs. A sink is one more key of score s and value zero: only its probability
takes part. With a cap, S = c tanh(T / c) of T = scale q k^T: derivatives by S become those by T.

Shapes: queries [B, K, G, Q, c] with G query heads for each of K heads of keys [B, K, T, c] and values [B, K, T, d]; sinks
[K, G]. Tangents and cotangents have the directions in front: all of them share P.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch._subclasses.fake_tensor import is_fake
from torch.fx.experimental.proxy_tensor import get_proxy_mode

Tensor = torch.Tensor
Maybe = Tensor | None

# Entries of a chunk, over batch, heads, queries and keys: on a CPU its matrices stay in the cache, on a GPU they fill it.
CHUNK_ENTRIES = {"cpu": 1 << 19}
_LARGE = 1 << 25  # of other devices
_TRACED = 1 << 24  # in a traced graph every chunk is written out; plans trace without numbers
_LEAST_ROWS = 16


class Inputs(NamedTuple):
    """What is differentiated."""

    q: Tensor
    k: Tensor
    v: Tensor
    sinks: Maybe


@dataclass(frozen=True)
class Form:
    """What is not differentiated.

    ``allowed`` (bool) and ``bias`` (added to the scores) broadcast to [B, K, G, Q, T]; ``causal``: the keys up to the
    query's own place, in place of the other two; ``cap``: of the scores, None without.
    """

    allowed: Maybe
    bias: Maybe
    causal: bool
    scale: float
    cap: float | None


def wide(x: Tensor) -> Tensor:
    """Return ``x`` in fp32 at least: statistics are taken so, as the fused kernels do."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def values(form: Form, x: Inputs) -> Tensor:
    """Return o [B, K, G, Q, d]."""
    out = x.q.new_empty((*x.q.shape[:-1], x.v.shape[-1]))
    for part in _parts(form, x):
        part.write(out, part.probabilities().narrow @ part.v)
    return out


def duals(form: Form, x: Inputs, dots: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """Return o, and for each direction o_dot and r [directions, B, K, G, Q, 1]."""
    out = x.q.new_empty((*x.q.shape[:-1], x.v.shape[-1]))
    out_dot = out.new_empty((len(dots.q), *out.shape))
    r = wide(out_dot[..., :1]).clone()
    keys = [torch.cat([x.k, k_dot], -1) for k_dot in dots.k]
    for part in _parts(form, x):
        p = part.probabilities()
        o = p.narrow @ part.v
        part.write(out, o)
        for i in range(len(dots.q)):
            Z = part.scores_dot(p, dots.q[i], keys[i]).mul_(p.P)
            sums = Z.sum(-1, keepdim=True)
            if p.sink is not None and dots.sinks is not None:
                sums = sums + p.sink * part.of_heads(dots.sinks[i])
            part.write(r[i], sums)
            o_dot = torch.baddbmm(Z.to(o.dtype) @ part.v, p.narrow, part.of_keys(dots.v[i]))
            part.write(out_dot[i], o_dot - (sums * o).to(o.dtype))
    return out, out_dot, r


def gradients(form: Form, x: Inputs, o: Tensor, bars: Tensor) -> Inputs:
    """Return the pull of <bars, o> for each direction of ``bars``."""
    sums = _Sums(form, x, len(bars))
    a = _inner(bars, o)
    for part in _parts(form, x):
        p = part.probabilities()
        for i in range(len(bars)):
            bar, H, H_sink = part.pulled(p, bars[i], a[i])
            sums.add(i, part, p.uncapped(H), part.q, part.k, p.narrow, bar)
            sums.add_sinks(i, part, H_sink)
    return sums.all()


def pulls(
    form: Form, x: Inputs, dots: Inputs, o: Tensor, o_dot: Tensor, r: Tensor, o1: Tensor, o2: Tensor
) -> tuple[Inputs, Inputs]:
    """Return the pull of <o1, o> + <o2, o_dot> by ``x`` and by ``dots``, for each direction.

    ``o2`` may be one for all directions: there is one derivative by ``dots`` then.
    """
    by_x, by_dots = _Sums(form, x, len(dots.q)), _Sums(form, x, len(o2))
    a = _inner(o2, o)
    c = _inner(o1, o) + _inner(o2, o_dot)
    keys = [torch.cat([x.k, k_dot], -1) for k_dot in dots.k]
    values = [torch.cat([x.v, v_dot], -1) for v_dot in dots.v]
    for part in _parts(form, x):
        p = part.probabilities()
        for i in range(len(dots.q)):
            if i < len(o2):
                bar, H, H_sink = part.pulled(p, o2[i], a[i])
                H_raw = p.uncapped(H)
                by_dots.add(i, part, H_raw, part.q, part.k, p.narrow, bar)
                by_dots.add_sinks(i, part, H_sink)
            first, r_i, c_i = part.of_queries(o1[i]), part.of_queries(r[i]), part.of_queries(c[i])
            S_dot = part.scores_dot(p, dots.q[i], keys[i])
            bend = p.bend(H, S_dot)
            X = S_dot.sub_(r_i)
            G = wide(torch.cat([first, bar], -1) @ part.of_keys(values[i]).mT).sub_(c_i).mul_(p.P).addcmul_(H, X)
            by_x.add(i, part, p.uncapped(G, bend), part.q, part.k, p.narrow, first)
            by_x.add(i, part, H_raw, part.scaled(dots.q[i]), part.of_keys(dots.k[i]), X.mul_(p.P).to(bar.dtype), bar)
            if p.sink is not None and H_sink is not None and dots.sinks is not None:
                by_x.add_sinks(i, part, H_sink * (part.of_heads(dots.sinks[i]) - r_i) - p.sink * c_i)
    return by_x.all(), by_dots.all()


def _inner(a: Tensor, b: Tensor) -> Tensor:
    return (wide(a) * wide(b)).sum(-1, keepdim=True)


class _Probabilities(NamedTuple):
    """P, again in the values' dtype, and the sink's [n, G Q, 1]; of capped scores S / cap and dS / dT."""

    P: Tensor
    narrow: Tensor
    sink: Maybe
    cap: float | None
    tanh: Maybe
    slope: Maybe

    def bend(self, H: Tensor, S_dot: Tensor) -> Maybe:
        """Return what the cap's second derivative adds to a derivative by T."""
        return None if self.tanh is None or self.cap is None else (H * S_dot).mul_(self.tanh).mul_(-2 / self.cap)

    def uncapped(self, M: Tensor, bend: Maybe = None) -> Tensor:
        """Turn a derivative by S into one by T."""
        M = M if self.slope is None else M * self.slope
        return (M if bend is None else M.add_(bend)).to(self.narrow.dtype)


class _Part:
    """A chunk: some of the batch, heads and queries, and the keys that these see. Flat: [n, G Q, .] and [n, T, .]."""

    def __init__(self, form: Form, x: Inputs, batch: slice, heads: slice, rows: slice, keys: slice) -> None:
        self._form, self._sinks = form, x.sinks
        self._batch, self.heads, self._rows, self._keys = batch, heads, rows, keys
        self._shape = x.q[batch, heads, :, rows].shape[:-1]
        self._number = self._shape[0] * self._shape[1]
        self.q, self.k, self.v = self.scaled(x.q), self.of_keys(x.k), self.of_keys(x.v)

    def of_queries(self, t: Tensor) -> Tensor:
        """Return this chunk of [B, K, G, Q, .]."""
        return t[self._batch, self.heads, :, self._rows].reshape(self._number, -1, t.shape[-1])

    def of_keys(self, t: Tensor) -> Tensor:
        """Return this chunk of [B, K, T, .]: a view of a contiguous tensor."""
        return t[self._batch, self.heads, self._keys].flatten(0, 1)

    def of_heads(self, t: Tensor) -> Tensor:
        """Return this chunk of [K, G], for every query: [n, G Q, 1]."""
        batch, heads, groups, rows = self._shape
        return wide(t[self.heads])[None, :, :, None].expand(batch, heads, groups, rows).reshape(self._number, -1, 1)

    def scaled(self, q: Tensor) -> Tensor:
        return self.of_queries(q) * self._form.scale

    def write(self, out: Tensor, rows: Tensor) -> None:
        out[self._batch, self.heads, :, self._rows] = rows.view(*self._shape, -1)

    def add(self, out: Tensor, rows: Tensor) -> None:
        out[self._batch, self.heads, :, self._rows] += rows.view(*self._shape, -1)

    def sums_of_heads(self, rows: Tensor) -> Tensor:
        return rows.view(self._shape).sum((0, 3))

    def probabilities(self) -> _Probabilities:
        cap = self._form.cap
        S = wide(self.q @ self.k.mT)
        tanh = slope = sink = None
        if cap is not None:
            tanh = S.div_(cap).tanh_()
            S, slope = tanh * cap, 1 - tanh.square()
        unseen = self._mask(S)
        if self._sinks is None:
            P = torch.softmax(S, -1)
        else:
            both = torch.softmax(torch.cat([S, self.of_heads(self._sinks)], -1), -1)
            P, sink = both[..., :-1], both[..., -1:]
        if unseen is not None:
            P.view(*self._shape, -1).masked_fill_(unseen, 0.0)
        return _Probabilities(P, P.to(self.v.dtype), sink, cap, tanh, slope)

    def _mask(self, S: Tensor) -> Maybe:
        """Mask scores in place; return which queries see nothing, where a mask may have such."""
        scores, form = S.view(*self._shape, -1), self._form
        if form.causal:
            low, high = self._rows.start, min(self._rows.stop, self._keys.stop)
            places = [torch.arange(*ends, device=S.device) for ends in ((low, self._rows.stop), (low, high))]
            scores[..., low:].masked_fill_(places[1] > places[0][:, None], -torch.inf)
            return None
        if form.bias is not None:
            scores += self._of_mask(form.bias)
        if form.allowed is None:
            return None
        allowed = self._of_mask(form.allowed)
        scores.masked_fill_(~allowed, torch.finfo(S.dtype).min)
        return ~allowed.any(-1, keepdim=True)

    def _of_mask(self, mask: Tensor) -> Tensor:
        places = (self._batch, self.heads, slice(None), self._rows)
        return mask[(*(p if size > 1 else slice(None) for p, size in zip(places, mask.shape, strict=False)), self._keys)]

    def scores_dot(self, p: _Probabilities, q_dot: Tensor, keys: Tensor) -> Tensor:
        """Return S_dot; ``keys``: k and k_dot beside each other."""
        S_dot = wide(torch.cat([self.scaled(q_dot), self.q], -1) @ self.of_keys(keys).mT)
        return S_dot if p.slope is None else S_dot.mul_(p.slope)

    def pulled(self, p: _Probabilities, bar: Tensor, a: Tensor) -> tuple[Tensor, Tensor, Maybe]:
        """Return a cotangent of o, and <it, o> differentiated by S, and by the sinks: [n, G Q, T] and [n, G Q, 1]."""
        bar, a = self.of_queries(bar), self.of_queries(a)
        return bar, wide(bar @ self.v.mT).sub_(a).mul_(p.P), None if p.sink is None else -p.sink * a


class _Sums:
    """Derivatives by q, k, v and sinks, for some directions, as the chunks add to them."""

    def __init__(self, form: Form, x: Inputs, count: int) -> None:
        self._scale, self._dtype = form.scale, x.q.dtype
        self._sums = Inputs(*(None if t is None else wide(t.new_zeros((count, *t.shape))) for t in x))  # type: ignore[arg-type]

    def add(self, i: int, part: _Part, M: Tensor, q: Tensor, k: Tensor, N: Tensor, bar: Tensor) -> None:
        """Add, for a derivative M by the scores and weights N of the values: M k, M^T q and N^T bar."""
        part.add(self._sums.q[i], M @ k)
        _add_product(part.of_keys(self._sums.k[i]), M, q)
        _add_product(part.of_keys(self._sums.v[i]), N, bar)

    def add_sinks(self, i: int, part: _Part, rows: Maybe) -> None:
        if self._sums.sinks is not None and rows is not None:
            self._sums.sinks[i, part.heads] += part.sums_of_heads(rows)

    def all(self) -> Inputs:
        self._sums.q.mul_(self._scale)
        return Inputs(*(None if t is None else t.to(self._dtype) for t in self._sums))  # type: ignore[arg-type]


def _add_product(out: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left^T right to a view."""
    if out.dtype == left.dtype:
        out.baddbmm_(left.mT, right)
    else:
        out += left.mT @ right


def _parts(form: Form, x: Inputs) -> Iterator[_Part]:
    """Yield the chunks: whole examples, whole heads, or some queries of one head (of keys)."""
    (batch, heads, groups, queries, _), keys = x.q.shape, x.k.shape[-2]
    traced = get_proxy_mode() is not None or is_fake(x.q)
    entries = CHUNK_ENTRIES.get(x.q.device.type, _LARGE)
    entries = max(entries, _TRACED) if traced else entries
    rows = min(queries, max(_LEAST_ROWS, entries // (groups * keys)))
    some_heads = min(heads, max(1, entries // (groups * queries * keys)))
    examples = min(batch, max(1, entries // (heads * groups * queries * keys)))
    starts = range(0, queries, rows)
    spans = _spans(form, starts, queries, keys, look=not traced and len(starts) > 1)
    for b in range(0, batch, examples):
        for h in range(0, heads, some_heads):
            for low, span in zip(starts, spans, strict=True):
                yield _Part(
                    form, x, slice(b, b + examples), slice(h, h + some_heads), slice(low, min(low + rows, queries)), span
                )


def _spans(form: Form, starts: range, queries: int, keys: int, look: bool) -> list[slice]:
    """Return for each chunk of queries from the first to the last key that they see; ``look`` into the masks."""
    ends = [min(low + starts.step, queries) for low in starts]
    if form.causal:
        return [slice(0, min(end, keys)) for end in ends]
    mask = form.allowed if form.allowed is not None else form.bias
    if mask is None or not look or mask.shape[-2] == 1:
        return [slice(0, keys)] * len(ends)
    seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    if form.allowed is None:  # a query that sees nothing looks at all keys alike
        seen = seen | ~seen.any(-1, keepdim=True)
    seen = seen.flatten(0, 2).any(0)
    columns = torch.stack([seen[low:end].any(0) for low, end in zip(starts, ends, strict=True)]).int()
    first, last = columns.argmax(-1).tolist(), (keys - columns.flip(-1).argmax(-1)).tolist()
    return [slice(low, high) for low, high in zip(first, last, strict=True)]

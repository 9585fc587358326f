"""A layer of experts with derivatives of every order, and as a graph whatever the routing: tokens sorted by expert.

    value      y[s] = W[e(s)] x[s]                      for tokens s in the order of their experts e(s)
    pulls      x_bar = W^T y_bar, each by its expert;   W_bar[e] = the sum over e's tokens of y_bar x^T

These are two functions, and each is the other's derivative. They are operations of their own, so that a traced graph holds
one node for each, and looks up where a group ends when it runs.
"""

from __future__ import annotations

from typing import Any

import torch

NAME = "sorted by expert"  # among transformers' implementations

Tensor = torch.Tensor


@torch.library.custom_op("hpc_hess::grouped", mutates_args=())
def _rows(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    out = x.new_zeros((len(x), weight.shape[1]))
    low = 0
    for expert, high in enumerate(ends.tolist()):
        if high > low:
            torch.mm(x[low:high], weight[expert].mT, out=out[low:high])
        low = high
    return out


@_rows.register_fake
def _(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty((len(x), weight.shape[1]))


@torch.library.custom_op("hpc_hess::grouped_outer", mutates_args=())
def _outer(bar: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    out = x.new_zeros((len(ends), bar.shape[1], x.shape[1]))
    low = 0
    for expert, high in enumerate(ends.tolist()):
        if high > low:
            torch.mm(bar[low:high].mT, x[low:high], out=out[expert])
        low = high
    return out


@_outer.register_fake
def _(bar: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty((len(ends), bar.shape[1], x.shape[1]))


class _Function(torch.autograd.Function):
    """Bilinear in its first two arguments."""

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @classmethod
    def jvp(cls, ctx: Any, a_dot: Any, b_dot: Any, _: Any) -> Any:
        a, b, ends = ctx.saved_tensors
        terms = [cls.apply(*pair, ends) for pair in ((a_dot, b), (a, b_dot)) if pair[0] is not None and pair[1] is not None]
        return sum(terms[1:], terms[0])

    @classmethod
    def vmap(cls, info: Any, in_dims: Any, a: Tensor, b: Tensor, ends: Tensor) -> Any:
        assert in_dims[2] is None, "all directions have one routing"
        rows = [[t] * info.batch_size if d is None else t.unbind(d) for t, d in zip((a, b), in_dims, strict=False)]
        return torch.stack([cls.apply(*pair, ends) for pair in zip(*rows, strict=True)]), 0


class _Grouped(_Function):
    """(x [S, in], weight [experts, out, in], ends [experts]) -> y [S, out]."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        return _rows(x, weight, ends)

    @staticmethod
    def backward(ctx: Any, bar: Tensor) -> Any:
        x, weight, ends = ctx.saved_tensors
        needed = ctx.needs_input_grad
        x_bar = _Grouped.apply(bar, weight.mT, ends) if needed[0] else None
        return x_bar, _GroupedOuter.apply(bar, x, ends) if needed[1] else None, None


class _GroupedOuter(_Function):
    """(y_bar [S, out], x [S, in], ends [experts]) -> W_bar [experts, out, in]."""

    @staticmethod
    def forward(bar: Tensor, x: Tensor, ends: Tensor) -> Tensor:
        return _outer(bar, x, ends)

    @staticmethod
    def backward(ctx: Any, weight: Tensor) -> Any:
        bar, x, ends = ctx.saved_tensors
        needed = ctx.needs_input_grad
        bar_bar = _Grouped.apply(x, weight, ends) if needed[0] else None
        return bar_bar, _Grouped.apply(bar, weight.mT, ends) if needed[1] else None, None


def sorted_experts(module: Any, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Return what an experts module of transformers does: [tokens, width] from [tokens, width] and [tokens, k] each.

    ``module`` : decorated by its use_experts_implementation, which says how it holds its weights.
    """
    k, order = index.shape[-1], torch.argsort(index.reshape(-1), stable=True)
    expert = index.reshape(-1)[order]
    ends = (expert[None] <= torch.arange(module.num_experts, device=expert.device)[:, None]).sum(-1)

    def linear(x: Tensor, name: str) -> Tensor:
        weight = getattr(module, name)
        out = _Grouped.apply(x, weight.mT if module.is_transposed else weight, ends)
        return out + getattr(module, f"{name}_bias")[expert] if module.has_bias else out

    x = hidden[order // k]
    x = module._apply_gate(linear(x, "gate_up_proj")) if module.has_gate else module.act_fn(linear(x, "up_proj"))
    x = linear(x, "down_proj")
    if module.has_post_expert_norm:
        x = module.post_expert_norm(x)
    x = x * weights.reshape(-1)[order][:, None]
    return x[torch.argsort(order)].view(len(hidden), k, -1).sum(1).to(hidden.dtype)


def own_experts() -> str:
    """Return the name of :func:`sorted_experts` among transformers' implementations."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(NAME, sorted_experts)
    return NAME

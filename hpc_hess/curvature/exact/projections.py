"""A block's products with weights on duals: one fused operation each, whose result can be kept between the two sweeps.

A linear layer's backward needs its inputs, never its own result; the result only serves what follows. Keeping the
results (with their tangents) of a block's linear layers therefore spares the way back all its forward products, for
far less memory than the whole state. Narrow layers, whose inputs are wider than their results, pay most per byte.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

Kept = tuple[torch.Tensor, torch.Tensor] | None  # a result and its tangent, None where it is not kept


class Projections:
    """The products of one stage's linear layers (``F.linear``, and ``torch.addmm`` as GPT-2 uses it) in order.

    ``wanted(inputs, outputs)`` tells from a layer's widths whether its result is kept. ``values`` : what was kept.
    """

    def __init__(self, wanted: Callable[[int, int], bool], values: Sequence[Kept] = ()) -> None:
        self._wanted = wanted
        self.values: list[Kept] = list(values)

    def recording(self, f: Callable[..., Any], *arguments: Any) -> tuple[Any, list[Kept]]:
        """Return what ``f`` returns and the wanted results of the linear layers that it calls on duals."""
        found: list[Kept] = []

        def record(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            out, kept = _multiply(x, weight, None)
            found.append(kept if self._wanted(weight.shape[1], weight.shape[0]) else None)
            return out

        with _Intercept(record):
            return f(*arguments), found

    @contextmanager
    def replaying(self) -> Iterator[None]:
        """Answer the same calls in the same order from what was kept; derivatives as of the real product."""
        values = iter(self.values)
        with _Intercept(lambda x, weight: _multiply(x, weight, next(values, None))[0]):
            yield
        if next(values, self) is not self:
            raise RuntimeError("a block made fewer matrix products on the way back than on the way there")


@contextmanager
def fused() -> Iterator[None]:
    """Only fuse the products, keep nothing."""
    with _Intercept(lambda x, weight: _multiply(x, weight, None)[0]):
        yield


class _Intercept(TorchFunctionMode):
    """Sends products with a weight [out, in] to ``product``; biases are added outside, as they are cheap."""

    def __init__(self, product: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self._product = product

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _PRODUCTS and not kwargs:
            return _times(*args)
        if func is F.linear:
            return self._linear(*args, **kwargs)
        if func is F.embedding:
            return _embedding(*args, **kwargs)
        if func is torch.addmm and not kwargs and args[1].ndim == args[2].ndim == 2:
            return self._product(args[1], args[2].mT) + args[0]
        return func(*args, **kwargs)

    def _linear(self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        if weight.ndim != 2:
            return F.linear(input, weight, bias)
        out = self._product(input, weight)
        return out if bias is None else out + bias


def _multiply(x: torch.Tensor, weight: torch.Tensor, kept: Kept) -> tuple[torch.Tensor, Kept]:
    """Return x @ weight.T, of duals or not, and value and tangent of the result; known ones are not computed."""
    if kept is not None and kept[0].shape != (*x.shape[:-1], weight.shape[0]):
        raise RuntimeError("a block made other matrix products on the way back than on the way there")
    value, tangent = kept or (None, None)
    x, x_dot = forward_ad.unpack_dual(x)
    weight, weight_dot = forward_ad.unpack_dual(weight)
    if x_dot is None and weight_dot is None:
        return _Product.apply(x, weight, value), None
    value, tangent = _DualProduct.apply(x, x_dot, weight, weight_dot, value, tangent)
    return forward_ad.make_dual(value, tangent), (value, tangent)


_PRODUCTS = {torch.mul, torch.Tensor.mul, torch.Tensor.__mul__, torch.Tensor.__rmul__}


def _times(a: Any, b: Any) -> torch.Tensor:
    """Return a * b. PyTorch's own rule takes a missing tangent for a tensor of zeros, whose shapes Python then works out."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        (x, x_dot), (y, y_dot) = forward_ad.unpack_dual(a), forward_ad.unpack_dual(b)
        if (x_dot is None) != (y_dot is None):
            return forward_ad.make_dual(x * y, x * y_dot if x_dot is None else x_dot * y)
    return torch.mul(a, b)


def _embedding(
    input: torch.Tensor,
    weight: torch.Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> torch.Tensor:
    """As F.embedding, whose own tangent under vmap copies every direction's whole table to look up a few rows."""
    if max_norm is not None or scale_grad_by_freq or sparse:
        return F.embedding(input, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse)
    weight, weight_dot = forward_ad.unpack_dual(weight)
    value = _Lookup.apply(weight, input, padding_idx)
    return value if weight_dot is None else forward_ad.make_dual(value, weight_dot[input])


class _Lookup(torch.autograd.Function):
    """Rows of a table, with PyTorch's backward; no gradient for the row of padding."""

    generate_vmap_rule = True

    @staticmethod
    def forward(weight: torch.Tensor, input: torch.Tensor, padding_idx: int | None) -> torch.Tensor:
        return weight[input]

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        weight, input, padding_idx = inputs
        ctx.save_for_backward(input)
        ctx.size = weight.shape[0]
        ctx.padding = -1 if padding_idx is None else padding_idx % ctx.size

    @staticmethod
    def backward(ctx: Any, bar: torch.Tensor) -> Any:
        (input,) = ctx.saved_tensors
        return torch.ops.aten.embedding_dense_backward(bar, input, ctx.size, ctx.padding, False), None, None


class _Product(torch.autograd.Function):
    """x @ weight.T, not computed where its value is known."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: torch.Tensor, weight: torch.Tensor, value: torch.Tensor | None) -> torch.Tensor:
        return x @ weight.mT if value is None else value.view_as(value)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    def backward(ctx: Any, bar: torch.Tensor) -> Any:
        x, weight = ctx.saved_tensors
        needed = ctx.needs_input_grad
        return bar @ weight if needed[0] else None, _outer(bar, x) if needed[1] else None, None


class _DualProduct(torch.autograd.Function):
    """y = x @ weight.T and its tangent, not computed where they are known; an absent tangent is zero.

    One operation, so that both terms of the weight's cotangent come from a single product.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: torch.Tensor,
        x_dot: torch.Tensor | None,
        weight: torch.Tensor,
        weight_dot: torch.Tensor | None,
        value: torch.Tensor | None,
        tangent: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        value = x @ weight.mT if value is None else value.view_as(value)
        if tangent is not None:
            return value, tangent.view_as(tangent)
        if weight_dot is None:
            assert x_dot is not None
            return value, x_dot @ weight.mT
        tangent = x @ weight_dot.mT
        return value, tangent if x_dot is None else tangent + x_dot @ weight.mT

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs[:4])

    @staticmethod
    def backward(ctx: Any, y_bar: torch.Tensor, y_dot_bar: torch.Tensor) -> Any:
        x, x_dot, weight, weight_dot = ctx.saved_tensors
        needed = ctx.needs_input_grad
        x_bar = x_dot_bar = weight_bar = None
        if needed[0]:
            x_bar = y_bar @ weight if weight_dot is None else y_bar @ weight + y_dot_bar @ weight_dot
        if needed[1]:
            x_dot_bar = y_dot_bar @ weight
        if needed[2]:
            bars, xs = [_rows(y_bar)], [_rows(x)]
            if x_dot is not None:
                bars, xs = [*bars, _rows(y_dot_bar)], [*xs, _rows(x_dot)]
            weight_bar = torch.cat(bars).mT @ torch.cat(xs)
        return x_bar, x_dot_bar, weight_bar, None, None, None


def _outer(bar: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return _rows(bar).mT @ _rows(x)


def _rows(x: torch.Tensor) -> torch.Tensor:
    """Return a matrix of the last dimension's vectors: one row of a single vector."""
    return x.flatten(0, -2) if x.ndim > 1 else x[None]

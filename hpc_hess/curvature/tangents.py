"""Derivatives of one stage of a model: a function f(W, x) of parameters W and boundary tensors x.

Written for one direction; torch.vmap makes it several (streaming). V is a direction for W, a dot marks a tangent.
Two ways to the same numbers:

* "dual": f's forward-mode derivative, differentiated backwards. Fewest matrix products, and the state between the two
  sweeps can be kept; needs forward derivatives that are themselves differentiable (see splice.differentiable_kernels).
* "reverse": autograd backwards twice. Works wherever double backward does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch

Tensors = dict[str, torch.Tensor]
Several = tuple[torch.Tensor, ...]
Stage = Callable[[Tensors, Several], Several]
Pull = Callable[[Several, Several | None], tuple[Tensors, Several, Several | None]]
Way = Literal["dual", "reverse"]


def push(f: Stage, W: Tensors, V: Tensors, x: Several, x_dot: Several, way: Way) -> tuple[Several, Several]:
    """Return y = f(W, x) and its tangent along (V, x_dot)."""
    if way == "dual":
        return torch.func.jvp(f, (W, x), (V, x_dot))
    with torch.enable_grad():
        W, x = _leaves(W), tuple(t.detach().requires_grad_() for t in x)
        y = f(W, x)
        u = tuple(torch.zeros_like(t).requires_grad_() for t in y)
        wrt = [*W.values(), *x]
        bars = torch.autograd.grad(y, wrt, u, create_graph=True, allow_unused=True)
        along = _pair(bars, [*V.values(), *x_dot])
        if along is None or not along.requires_grad:
            y_dot: Several = tuple(torch.zeros_like(t) for t in y)
        else:
            found = torch.autograd.grad(along, u, allow_unused=True)
            y_dot = tuple(torch.zeros_like(t) if d is None else d for t, d in zip(y, found, strict=True))
    return tuple(t.detach() for t in y), y_dot


def push_keeping(
    f: Stage, W: Tensors, V: Tensors, x: Several, x_dot: Several, way: Way, *, gauss_newton: bool
) -> tuple[Several, Several, Pull]:
    """As :func:`push`, keeping what the way back needs.

    The third value, pull(y_bar_dot, y_bar), returns (tangents of W's gradient, x_bar_dot, x_bar): cotangents of x and
    their tangents. With ``gauss_newton`` it returns J^T y_bar_dot, and x_bar is None: the tangents of f's own
    derivatives are left out.
    """
    if way == "reverse":
        return *push(f, W, V, x, x_dot, way), _reverse_pull(f, W, V, x, x_dot, gauss_newton)
    if gauss_newton:

        def primal(W: Tensors, x: Several) -> tuple[Several, Several]:
            return torch.func.jvp(f, (W, x), (V, x_dot))

        y, pull, y_dot = torch.func.vjp(primal, W, x, has_aux=True)

        def pull_gauss_newton(y_bar_dot: Several, _: Several | None) -> tuple[Tensors, Several, None]:
            W_bar_dot, x_bar_dot = pull(y_bar_dot)
            return W_bar_dot, x_bar_dot, None

        return y, y_dot, pull_gauss_newton

    def dual(W: Tensors, x: Several, x_dot: Several) -> tuple[Several, Several]:
        return torch.func.jvp(f, (W, x), (V, x_dot))

    # <y_bar_dot, y> + <y_bar, y_dot> differentiated by W, x and x_dot
    (y, y_dot), pull_dual = torch.func.vjp(dual, W, x, x_dot)

    def pull_hessian(y_bar_dot: Several, y_bar: Several | None) -> tuple[Tensors, Several, Several]:
        assert y_bar is not None
        return pull_dual((y_bar_dot, y_bar))

    return y, y_dot, pull_hessian


def _reverse_pull(f: Stage, W: Tensors, V: Tensors, x: Several, x_dot: Several, gauss_newton: bool) -> Pull:
    def pull(y_bar_dot: Several, y_bar: Several | None) -> tuple[Tensors, Several, Several | None]:
        with torch.enable_grad():
            leaves, inputs = _leaves(W), tuple(t.detach().requires_grad_() for t in x)
            wrt = [*leaves.values(), *inputs]
            y = f(leaves, inputs)
            along = _pair(y, y_bar_dot)
            bars: list[torch.Tensor | None] = []
            if not gauss_newton:
                bars = list(torch.autograd.grad(y, wrt, y_bar, create_graph=True, allow_unused=True))
                second = _pair(bars, [*V.values(), *x_dot])
                if second is not None and second.requires_grad:
                    along = second if along is None else along + second
            found = torch.autograd.grad(along, wrt, allow_unused=True) if along is not None else [None] * len(wrt)
        full = [torch.zeros_like(t) if d is None else d for t, d in zip(wrt, found, strict=True)]
        x_bar = None
        if not gauss_newton:
            x_bar = tuple(
                torch.zeros_like(t) if b is None else b.detach()
                for t, b in zip(inputs, bars[len(leaves) :], strict=True)
            )
        return dict(zip(leaves, full, strict=False)), tuple(full[len(leaves) :]), x_bar

    return pull


def _leaves(tensors: Tensors) -> Tensors:
    return {name: t.detach().requires_grad_() for name, t in tensors.items()}


def _pair(left: object, right: object) -> torch.Tensor | None:
    """Return the sum of inner products, leaving out absent tensors."""
    terms = [(a * b).sum() for a, b in zip(left, right, strict=True) if a is not None and b is not None]  # type: ignore[call-overload]
    return torch.stack(terms).sum() if terms else None

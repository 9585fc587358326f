"""Derivatives of one stage of a model: a function f(W, x) of parameters W and boundary tensors x.

Written for one direction; torch.vmap makes it several (streaming). V is a direction for W, a dot marks a tangent.
Two ways to the same numbers:

* "dual": f's forward-mode derivative, differentiated backwards. Fewest matrix products, and the state between the two
  sweeps can be kept; needs forward derivatives that are themselves differentiable (see splice.differentiable_kernels).
* "reverse": autograd backwards twice. Works wherever double backward does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch

from hpc_hess.curvature.exact.projections import Projections, fused

Tensors = dict[str, torch.Tensor]
Several = tuple[torch.Tensor, ...]
Stage = Callable[[Tensors, Several], Several]
Pull = Callable[[Several, Several | None], tuple[Tensors, Several, Several | None]]
Way = Literal["dual", "reverse"]


def push(
    f: Stage, W: Tensors, V: Tensors, x: Several, x_dot: Several, way: Way, kept: Projections | None = None
) -> tuple[Several, Several]:
    """Return y = f(W, x) and its tangent along (V, x_dot); ``kept`` notes products for :func:`pull_again`."""
    if way == "reverse":
        return _push_reverse(f, W, V, x, x_dot)
    if kept is None:
        with fused():
            y, y_dot = torch.func.jvp(f, (W, x), (V, x_dot))  # type: ignore[misc]
        return y, y_dot
    places: list[bool] = []

    def watched(W: Tensors, x: Several) -> tuple[Several, list[Any]]:
        y, found = kept.recording(f, W, x)
        places.extend(v is not None for v in found)
        return y, [v for v in found if v is not None]

    # what leaves as an auxiliary result is no longer a dual
    y, y_dot, found = torch.func.jvp(watched, (W, x), (V, x_dot), has_aux=True)  # type: ignore[misc]
    values = iter(found)
    kept.values = [next(values) if here else None for here in places]
    return y, y_dot


def _push_reverse(f: Stage, W: Tensors, V: Tensors, x: Several, x_dot: Several) -> tuple[Several, Several]:
    """The gradient's derivative by its own cotangent u is f's tangent: no forward-mode derivative is needed."""
    with torch.enable_grad():
        W, x = _leaves(W), tuple(t.detach().requires_grad_() for t in x)
        y = f(W, x)
        if not any(t.requires_grad for t in y):  # it depends on none of them
            return tuple(t.detach() for t in y), tuple(torch.zeros_like(t) for t in y)
        u = tuple(torch.zeros_like(t).requires_grad_() for t in y)
        bars = torch.autograd.grad(y, [*W.values(), *x], u, create_graph=True, allow_unused=True)
        _require_derivative(bars)
        along = _pair(bars, [*V.values(), *x_dot])
        if along is None or not along.requires_grad:
            return tuple(t.detach() for t in y), tuple(torch.zeros_like(t) for t in y)
        found = torch.autograd.grad(along, u, allow_unused=True)
    y_dot = tuple(torch.zeros_like(t) if d is None else d for t, d in zip(y, found, strict=True))
    return tuple(t.detach() for t in y), y_dot


def push_keeping(
    f: Stage,
    W: Tensors,
    V: Tensors,
    x: Several,
    x_dot: Several,
    way: Way,
    *,
    gauss_newton: bool,
    kept: Projections | None = None,
) -> tuple[Several, Several, Pull]:
    """As :func:`push`, keeping what the way back needs.

    The third value, pull(y_bar_dot, y_bar), returns (tangents of W's gradient, x_bar_dot, x_bar): cotangents of x and
    their tangents. With ``gauss_newton`` it returns J^T y_bar_dot, and x_bar is None: the tangents of f's own
    derivatives are left out. Products that ``kept`` noted are not computed again.
    """
    if way == "reverse":
        return *push(f, W, V, x, x_dot, way), _reverse_pull(f, W, V, x, x_dot, gauss_newton)

    def dual(W: Tensors, x: Several, x_dot: Several) -> tuple[Several, Several]:
        return torch.func.jvp(f, (W, x), (V, x_dot))  # type: ignore[return-value]

    with fused() if kept is None else kept.replaying():
        if gauss_newton:
            y, pull, y_dot = torch.func.vjp(lambda W, x: dual(W, x, x_dot), W, x, has_aux=True)  # type: ignore[misc]
            return y, y_dot, _gauss_newton_pull(pull)
        # <y_bar_dot, y> + <y_bar, y_dot> differentiated by W, x and x_dot
        (y, y_dot), pull_dual = torch.func.vjp(dual, W, x, x_dot)  # type: ignore[misc]
    return y, y_dot, lambda y_bar_dot, y_bar: pull_dual((y_bar_dot, y_bar))


def pull_again(
    f: Stage,
    W: Tensors,
    V: Tensors,
    x: Several,
    x_dot: Several,
    way: Way,
    *,
    gauss_newton: bool,
    kept: Projections | None = None,
) -> Pull:
    """Return the pull of :func:`push_keeping` alone."""
    if way == "reverse":
        return _reverse_pull(f, W, V, x, x_dot, gauss_newton)
    if gauss_newton:  # its way back needs no tangents
        with fused() if kept is None else kept.replaying():
            return _gauss_newton_pull(torch.func.vjp(f, W, x)[1])
    return push_keeping(f, W, V, x, x_dot, way, gauss_newton=False, kept=kept)[2]


def _gauss_newton_pull(pull: Callable[[Several], tuple[Tensors, Several]]) -> Pull:
    return lambda y_bar_dot, _: (*pull(y_bar_dot), None)


def _reverse_pull(f: Stage, W: Tensors, V: Tensors, x: Several, x_dot: Several, gauss_newton: bool) -> Pull:
    def pull(y_bar_dot: Several, y_bar: Several | None) -> tuple[Tensors, Several, Several | None]:
        with torch.enable_grad():
            leaves, inputs = _leaves(W), tuple(t.detach().requires_grad_() for t in x)
            wrt = [*leaves.values(), *inputs]
            y = f(leaves, inputs)
            along = _pair(y, y_bar_dot)
            bars: list[torch.Tensor | None] = []
            if not any(t.requires_grad for t in y):
                along, bars = None, [None] * len(wrt)
            elif not gauss_newton:
                bars = list(torch.autograd.grad(y, wrt, y_bar, create_graph=True, allow_unused=True))
                second = _pair(bars, [*V.values(), *x_dot])
                if second is not None and second.requires_grad:
                    along = second if along is None else along + second
            if along is None or not along.requires_grad:
                found: Sequence[torch.Tensor | None] = [None] * len(wrt)
            else:
                found = torch.autograd.grad(along, wrt, allow_unused=True)
        full = [torch.zeros_like(t) if d is None else d for t, d in zip(wrt, found, strict=True)]
        x_bar = None
        if not gauss_newton:
            x_bar = tuple(
                torch.zeros_like(t) if b is None else b.detach() for t, b in zip(inputs, bars[len(leaves) :], strict=True)
            )
        return dict(zip(leaves, full, strict=False)), tuple(full[len(leaves) :]), x_bar

    return pull


def _require_derivative(bars: Several) -> None:
    """Raise RuntimeError where a gradient holds a part that autograd would drop when differentiated again.

    A custom function marked once_differentiable leaves a node that only complains when it is reached, and a gradient
    for given inputs does not always reach it.
    """
    seen: set[object] = set()
    todo = [b.grad_fn for b in bars if b is not None and b.grad_fn is not None]
    while todo:
        node = todo.pop()
        if node not in seen:
            seen.add(node)
            if node.name() == "torch::autograd::Error":
                raise RuntimeError("a custom function in it is once_differentiable")
            todo.extend(after for after, _ in node.next_functions if after is not None)


def _leaves(tensors: Tensors) -> Tensors:
    return {name: t.detach().requires_grad_() for name, t in tensors.items()}


def _pair(left: object, right: object) -> torch.Tensor | None:
    """Return the sum of inner products, leaving out absent tensors."""
    terms = [(a * b).sum() for a, b in zip(left, right, strict=True) if a is not None and b is not None]  # type: ignore[call-overload]
    return torch.stack(terms).sum() if terms else None

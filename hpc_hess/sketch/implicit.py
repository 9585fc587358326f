"""The implicit form: differentiate w -> L(theta_0 + Phi^T w) at w = 0, instead of sketching L's derivatives.

Schioppa 2024, section 3: the same numbers as the explicit form, Phi grad L and Phi H Phi^T; one pass of autograd through the
sketch's transpose, which takes the memory of a vector more. One process.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from hpc_hess.parallel.layout import Layout
from hpc_hess.sketch.sketch import Sketch

Tensors = dict[str, torch.Tensor]


class _Lift(torch.autograd.Function):
    """Phi^T w. Linear, so that its derivatives are itself and its adjoint, to any order."""

    @staticmethod
    def forward(w: torch.Tensor, sketch: Sketch) -> torch.Tensor:
        out = torch.empty(sketch.size, dtype=w.dtype, device=w.device)
        sketch.lift(w, out, [0], [sketch.size])
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.sketch = inputs[1]

    @staticmethod
    def backward(ctx: Any, bar: torch.Tensor) -> Any:
        return _Apply.apply(bar, ctx.sketch), None


class _Apply(torch.autograd.Function):
    """Phi x."""

    @staticmethod
    def forward(x: torch.Tensor, sketch: Sketch) -> torch.Tensor:
        collection = sketch.begin(x.device)
        sketch.add(collection, x.contiguous(), [0], [sketch.size])
        return sketch.end(collection).to(x.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.sketch = inputs[1]

    @staticmethod
    def backward(ctx: Any, bar: torch.Tensor) -> Any:
        return _Lift.apply(bar, ctx.sketch), None


def lifted(w: torch.Tensor, sketch: Sketch) -> torch.Tensor:
    """Return Phi^T w, flat, in the order of the global index; w can be differentiated through it, twice as well."""
    return _Lift.apply(w, sketch)  # type: ignore[no-any-return]


def moved(theta0: Tensors, w: torch.Tensor, sketch: Sketch, layout: Layout) -> Tensors:
    """Return the parameters theta_0 + Phi^T w by name."""
    parts = lifted(w, sketch).split([p.numel for p in layout.parameters])  # slices' derivatives would have N entries each
    return {p.name: theta0[p.name] + part.view(p.shape) for p, part in zip(layout.parameters, parts, strict=True)}


def implicit_gradient(
    loss: Callable[[Tensors], torch.Tensor], theta0: Tensors, sketch: Sketch, layout: Layout
) -> torch.Tensor:
    """Return d loss(theta_0 + Phi^T w) / dw at w = 0, [D]."""
    w = _origin(theta0, sketch)
    return torch.autograd.grad(loss(moved(theta0, w, sketch, layout)), w)[0]


def implicit_product(
    loss: Callable[[Tensors], torch.Tensor], theta0: Tensors, v: torch.Tensor, sketch: Sketch, layout: Layout
) -> torch.Tensor:
    """Return the Hessian of w -> loss(theta_0 + Phi^T w) at w = 0 times v, [D]: two passes backwards."""
    w = _origin(theta0, sketch)
    (gradient,) = torch.autograd.grad(loss(moved(theta0, w, sketch, layout)), w, create_graph=True)
    return torch.autograd.grad(gradient, w, v)[0]


def _origin(theta0: Tensors, sketch: Sketch) -> torch.Tensor:
    like = next(iter(theta0.values()))
    return torch.zeros(sketch.dimension, dtype=like.dtype, device=like.device, requires_grad=True)

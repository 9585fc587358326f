"""Derivatives of the token-weighted cross-entropy at the logits, in closed form."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.nn.functional import pad

_TERMS = 256

Scale = float | torch.Tensor


class Start(NamedTuple):
    """What the way back of a matrix starts with at the logits.

    ``tangent(g, g_dot, logits_dot, scale)`` : the tangent of the cotangent; the first two as of :func:`loss_cotangents`.
    ``second`` : whether g goes back too, so that the second derivative of the logits counts.
    """

    tangent: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Scale], torch.Tensor]
    second: bool = True


def of_the_loss(g: torch.Tensor, g_dot: torch.Tensor, logits_dot: torch.Tensor, scale: Scale) -> torch.Tensor:
    """Return the Hessian of the loss at the logits times their tangent."""
    del g, logits_dot, scale
    return g_dot


HESSIAN = Start(of_the_loss)


def loss_cotangents(
    logits: torch.Tensor, logits_dot: torch.Tensor, targets: torch.Tensor, scale: Scale
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (g, g_dot): the gradient of ``scale * sum(cross-entropy)`` at the logits and its tangent.

    g_dot is at once the loss's Hessian at the logits times ``logits_dot``: all that Gauss-Newton needs of the loss.

    Parameters
    ----------
    logits, logits_dot : [tokens, vocabulary]; computed in fp32 at least, returned in their own dtype.
    targets : [tokens] int64, every one a valid class.
    scale : usually 1 / number of predicted tokens of the whole data set; a number, or a tensor without dimensions.

    """
    dtype = logits.dtype
    wide = torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
    exponential = (logits.to(wide) - logits.amax(-1, keepdim=True)).exp()
    p = exponential * (scale / _sum(exponential))
    dot = logits_dot.to(wide)
    g_dot = p * (dot - _sum(p * dot) / scale)
    one = torch.full_like(targets, -1.0, dtype=wide)[:, None] * scale
    g = p.scatter_add(-1, targets[:, None], one)
    return g.to(dtype), g_dot.to(dtype)


def _sum(x: torch.Tensor) -> torch.Tensor:
    """Return the sums of rows [tokens, 1], in two levels.

    torch.softmax, and compiled loops, add a large vocabulary's small terms one by one to a large one: Hessian products are
    8e-5 off in fp32, where this leaves 1e-5.
    """
    width = x.shape[-1]
    if width <= _TERMS:
        return x.sum(-1, keepdim=True)
    return pad(x, (0, -width % _TERMS)).unflatten(-1, (-1, _TERMS)).sum(-1).sum(-1, keepdim=True)


def starting_cotangents(
    start: Start, logits: torch.Tensor, logits_dot: torch.Tensor, targets: torch.Tensor, scale: Scale
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return what the way back starts with at the logits: the tangent of the cotangent, and the cotangent.

    The latter is None for matrices that need no second derivative of the logits. Arguments as :func:`loss_cotangents`.
    """
    g, g_dot = loss_cotangents(logits, logits_dot, targets, scale)
    return start.tangent(g, g_dot, logits_dot, scale), g if start.second else None

"""Derivatives of the token-weighted cross-entropy at the logits, in closed form."""

from __future__ import annotations

import torch


def loss_cotangents(
    logits: torch.Tensor, logits_dot: torch.Tensor, targets: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (g, g_dot): the gradient of ``scale * sum(cross-entropy)`` at the logits and its tangent.

    g_dot is at once the loss's Hessian at the logits times ``logits_dot``: all that Gauss-Newton needs of the loss.

    Parameters
    ----------
    logits, logits_dot : [tokens, vocabulary]; computed in fp32 at least, returned in their own dtype.
    targets : [tokens] int64, every one a valid class.
    scale : usually 1 / number of predicted tokens of the whole data set.

    """
    dtype = logits.dtype
    wide = torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
    p = torch.softmax(logits.to(wide), dim=-1) * scale
    dot = logits_dot.to(wide)
    g_dot = p * (dot - (p * dot).sum(-1, keepdim=True) / scale)
    one = torch.full_like(targets, -scale, dtype=wide)[:, None]
    g = p.scatter_add(-1, targets[:, None], one)
    return g.to(dtype), g_dot.to(dtype)

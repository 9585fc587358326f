"""The two parts of the Hessian, Gauss-Newton and the residual, and the empirical Fisher matrix."""

from __future__ import annotations

import torch

from hpc_hess.curvature.exact.cross_entropy import Start, of_the_loss
from hpc_hess.curvature.exact.exact import StreamedOperator


class GaussNewton(StreamedOperator):
    """Generalised Gauss-Newton matrix J^T H_L J, J the logits' Jacobian: positive semi-definite.

    For the cross-entropy of a softmax it equals the Fisher information over the model's own predictions.
    """

    start = Start(of_the_loss, second=False)


class Residual(StreamedOperator):
    """Hessian minus Gauss-Newton: the loss's gradient at the logits times the logits' second derivative."""

    start = Start(lambda g, g_dot, logits_dot, scale: torch.zeros_like(g_dot))


class EmpiricalFisher(StreamedOperator):
    """Mean over predicted tokens of the outer product of their loss gradients: positive semi-definite."""

    # g is scale times a token's own gradient
    start = Start(lambda g, g_dot, logits_dot, scale: g * ((g * logits_dot).sum(-1, keepdim=True) / scale), second=False)

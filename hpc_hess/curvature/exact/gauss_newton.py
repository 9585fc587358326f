"""The two parts of the Hessian, Gauss-Newton and the residual, and the empirical Fisher matrix."""

from __future__ import annotations

from hpc_hess.curvature.exact.exact import StreamedOperator


class GaussNewton(StreamedOperator):
    """Generalised Gauss-Newton matrix J^T H_L J, J the logits' Jacobian: positive semi-definite.

    For the cross-entropy of a softmax it equals the Fisher information over the model's own predictions.
    """

    kind = "gauss_newton"


class Residual(StreamedOperator):
    """Hessian minus Gauss-Newton: the loss's gradient at the logits times the logits' second derivative."""

    kind = "residual"


class EmpiricalFisher(StreamedOperator):
    """Mean over predicted tokens of the outer product of their loss gradients: positive semi-definite."""

    kind = "fisher"

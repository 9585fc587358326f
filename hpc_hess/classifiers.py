"""The class structure of a classifier's curvature, in this process (Papyan 2019): H = G + (H - G), G = A1 + A2 + B1 + B2.

>>> parts = hpc_hess.decompose(model, batches, num_classes=10)   # doctest: +SKIP
>>> hpc_hess.slq(parts.knocked_out, steps=60).lambda_max   # doctest: +SKIP
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.func import functional_call, jvp, vjp
from torch.nn.functional import cross_entropy

from hpc_hess.api import Operator, hessian
from hpc_hess.curvature.decomposition import (
    ClassMeans,
    Cotangent,
    Difference,
    Groups,
    LowRank,
    Pullback,
    class_means,
    cross_class,
    weights,
)
from hpc_hess.errors import DataError
from hpc_hess.linalg.deflation import Deflated, orthonormal
from hpc_hess.model.gradient import Gradient
from hpc_hess.model.precision import whole_rows
from hpc_hess.model.shard import ShardedModel, whole_model
from hpc_hess.parallel.basis import Basis
from hpc_hess.parallel.vector import Vector

Batch = tuple[torch.Tensor, torch.Tensor]  # inputs, class numbers


class _Examples:
    """Batches of a classifier as a source of logits."""

    def __init__(self, batches: Sequence[Batch]) -> None:
        self.batches = batches
        self.num_micro_batches = len(batches)
        self.num_tokens = sum(len(targets) for _, targets in batches)
        if not self.num_tokens:
            raise DataError("there are no examples")

    def logits_and_targets(self, module: nn.Module, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        inputs, targets = self.batches[index]
        with whole_rows(module):
            return module(inputs), targets


class _GaussNewton:
    """G v = 1/n sum_i J_i^T (diag(p_i) - p_i p_i^T) J_i v, batch by batch."""

    def __init__(self, model: ShardedModel, examples: _Examples) -> None:
        self.space, self._module, self._examples = model.space, model.module, examples
        self._pieces = self.space.shard.pieces

    def matvec(self, v: Vector) -> Vector:
        """Return the product as a new Vector."""
        named = dict(self._module.named_parameters())
        names = [piece.parameter.name for piece in self._pieces]
        W = {name: named[name].detach() for name in names}
        V = {
            piece.parameter.name: v.data[piece.start : piece.stop].view(piece.local_shape) for piece in self._pieces
        }  # fmt: skip
        out = self.space.zeros()
        for inputs, _ in self._examples.batches:

            def logits(W: dict[str, torch.Tensor], inputs: torch.Tensor = inputs) -> torch.Tensor:
                with whole_rows(self._module):
                    return functional_call(self._module, W, (inputs,))

            z, z_dot = jvp(logits, (W,), (V,))  # type: ignore[misc]  # a third value with has_aux only
            p = z.softmax(-1)
            u = p * (z_dot - (p * z_dot).sum(-1, keepdim=True)) / self._examples.num_tokens
            (pulled,) = vjp(logits, W)[1](u)
            for piece in self._pieces:
                out.data[piece.start : piece.stop] += pulled[piece.parameter.name].reshape(-1)
        return out


@dataclass(frozen=True)
class Decomposition:
    """Operators on one space: ``hessian`` H, ``gauss_newton`` G, ``residual`` H - G, and G's parts.

    ``means``: A1 and A2 with their eigenvalues; ``cross`` B1; ``without_means`` G - A1 - A2; ``within`` B2, without the
    means of all pairs of classes; ``knocked_out`` (I - P) G (I - P), P onto the class means' span: the outliers live there,
    though A1 and A2 are not all that G has in it.
    """

    hessian: Operator
    gauss_newton: Operator
    residual: Operator
    means: ClassMeans
    cross: LowRank
    without_means: Operator
    within: Operator
    knocked_out: Operator


def decompose(model: nn.Module, batches: Sequence[Batch], num_classes: int) -> Decomposition:
    """Take a classifier's mean cross-entropy apart. The model is used in place, in eval mode.

    Costs C^2 backward passes and the memory of as many vectors; products with H are exact.

    Parameters
    ----------
    batches : pairs of inputs, as ``model(inputs)`` takes them, and class numbers 0..num_classes-1, int64 (n,).

    Raises
    ------
    DataError : no examples, or a class number that does not exist. ModelError : no second derivative.

    """
    examples = _Examples(batches)
    for number, (_, targets) in enumerate(batches):
        if len(targets) and not (int(targets.min()) >= 0 and int(targets.max()) < num_classes):
            raise DataError(f"batch {number} has class numbers outside 0 to {num_classes - 1}: count the classes again")

    def loss(module: nn.Module, batch: Batch) -> tuple[torch.Tensor, float]:
        return cross_entropy(module(batch[0]), batch[1], reduction="sum"), float(len(batch[1]))

    whole = hessian(model, batches, loss, method="exact")
    sharded = whole_model(model, ["*"], [])
    space = whole.space
    groups = Groups(torch.arange(num_classes), num_classes)

    def pull(cotangent: Cotangent) -> Vector:
        return space.wrap(Gradient(sharded, Pullback(examples, cotangent))()[1].data)

    pairs = weights(examples, model, groups, lambda sums: sums)
    rows = Basis(space, num_classes)
    means = class_means(pull, groups, pairs, rows)
    cross = cross_class(pull, groups, means, rows, Basis(space, num_classes * (num_classes - 1)))
    gauss_newton = _GaussNewton(sharded, examples)
    span = Basis(space, num_classes)
    rank = orthonormal(span, [rows[k] for k in range(num_classes)])
    without_means = Difference(gauss_newton, means.both)
    return Decomposition(
        whole, Operator(gauss_newton), Operator(Difference(whole, gauss_newton)), means, cross, Operator(without_means),
        Operator(Difference(without_means, cross)), Operator(Deflated(gauss_newton, span, rank)),
    )  # fmt: skip

"""The class structure of a classifier's curvature, in this process (Papyan 2019): H = G + (H - G), G = A1 + A2 + B1 + B2.

>>> parts = hpc_hess.decompose(model, batches, num_classes=10)   # doctest: +SKIP
>>> hpc_hess.slq(parts.knocked_out, steps=60).lambda_max   # doctest: +SKIP
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn
from torch.func import functional_call, jvp, vjp
from torch.nn.functional import cross_entropy

from hpc_hess.api.operators import Operator, hessian
from hpc_hess.api.showing import Drawn
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
from hpc_hess.intake import given
from hpc_hess.intake.batches import drawn
from hpc_hess.linalg.deflation import Deflated, orthonormal
from hpc_hess.linalg.operator import LinearOperator
from hpc_hess.model.blocks.splice import differentiable_kernels
from hpc_hess.model.sharded.gradient import Gradient
from hpc_hess.model.sharded.placed import require_alone
from hpc_hess.model.sharded.precision import whole_rows
from hpc_hess.model.sharded.shard import ShardedModel, whole_model
from hpc_hess.model.sharded.undisturbed import undisturbed
from hpc_hess.parallel.basis import Basis
from hpc_hess.parallel.vector import Vector, VectorSpace

if TYPE_CHECKING:
    from hpc_hess.studies.figures import Axes

Batch = tuple[torch.Tensor, torch.Tensor]  # inputs, class numbers


def _logits(module: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    """Return a classifier's logits (n, C): what it returns, or the ``logits`` of that."""
    out = module(inputs)
    return out if isinstance(out, torch.Tensor) else out.logits


class _Examples:
    """Batches of a classifier as a source of logits, drawn once and looked at."""

    def __init__(self, batches: Iterable[Batch], num_classes: int) -> None:
        found = drawn(batches, "there are no examples")
        self.batches = [given.classified(batch, number, num_classes) for number, batch in enumerate(found)]
        self.num_micro_batches = len(self.batches)
        self.num_tokens = sum(len(targets) for _, targets in self.batches)
        if not self.num_tokens:
            raise DataError("there are no examples")

    def logits_and_targets(self, module: nn.Module, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        inputs, targets = self.batches[index]
        with whole_rows(module):
            return _logits(module, inputs), targets


class _GaussNewton:
    """G v = 1/n sum_i J_i^T (diag(p_i) - p_i p_i^T) J_i v, batch by batch."""

    def __init__(self, model: ShardedModel, space: VectorSpace, examples: _Examples) -> None:
        self.space, self._module, self._examples = space, model.module, examples
        self._pieces = self.space.shard.pieces

    def matvec(self, v: Vector) -> Vector:
        """Return the product as a new Vector."""
        named = dict(self._module.named_parameters())
        names = [piece.parameter.name for piece in self._pieces]
        W = {name: named[name].detach() for name in names}
        V = {
            piece.parameter.name: v.data[piece.start : piece.stop].view(piece.local_shape).to(W[piece.parameter.name].dtype)
            for piece in self._pieces
        }
        out = self.space.zeros()
        for inputs, _ in self._examples.batches:

            def logits(W: dict[str, torch.Tensor], inputs: torch.Tensor = inputs) -> torch.Tensor:
                buffers = {name: b.clone() for name, b in self._module.named_buffers()}  # which the forward may write
                with whole_rows(self._module):
                    out = functional_call(self._module, {**buffers, **W}, (inputs,))
                return out if isinstance(out, torch.Tensor) else out.logits

            with differentiable_kernels(self._module):
                z, z_dot = jvp(logits, (W,), (V,))  # type: ignore[misc]  # a third value with has_aux only
                p = z.softmax(-1)
                u = p * (z_dot - (p * z_dot).sum(-1, keepdim=True)) / self._examples.num_tokens
                (pulled,) = vjp(logits, W)[1](u)
            for piece in self._pieces:
                out.data[piece.start : piece.stop] += pulled[piece.parameter.name].reshape(-1)
        return out


@dataclass(frozen=True, repr=False, eq=False)
class Decomposition(Drawn):
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

    @cached_property
    def eigenvalues(self) -> dict[str, np.ndarray]:
        """Nonzero eigenvalues of the parts of low rank, A1, A2 and B1, ascending."""
        parts = {"A1": self.means.a1, "A2": self.means.a2, "B1": self.cross}
        return {name: part.eigenvalues() for name, part in parts.items()}

    def _lines(self) -> list[str]:
        count = len(self.means.pairs)
        ends = ", ".join(f"{name} {values.max(initial=0.0):.4g}" for name, values in self.eigenvalues.items())
        return [
            f"Decomposition by {count} classes of the Hessian of {self.hessian.shape[0]:,} parameters",
            f"largest eigenvalues: {ends}",
            "operators: hessian, gauss_newton, residual, without_means, within, knocked_out",
        ]

    @property
    def _inches(self) -> tuple[float, float]:
        return 7.0, 2.2

    def _draw(self, axes: Axes) -> None:
        from hpc_hess.studies import figures

        figures.draw_parts(axes, self.eigenvalues)


def decompose(model: nn.Module, batches: Iterable[Batch], num_classes: int) -> Decomposition:
    """Take a classifier's mean cross-entropy apart. The model is used in place, in eval mode, and left as it was.

    Costs C^2 backward passes and the memory of as many vectors; products with H are exact.

    Parameters
    ----------
    batches : any iterable, drawn once, of pairs of inputs, as ``model(inputs)`` takes them, and class numbers
        0..num_classes-1, whole numbers (n,). The model returns logits (n, num_classes), or something with ``logits``.

    Raises
    ------
    DataError : no examples, targets that are no class numbers, or another number of logits. ModelError : no second
        derivative. ConfigError : ``num_classes`` is not valid.

    """
    require_alone(model, "decompose")
    given.model(model)
    num_classes = given.whole("num_classes", num_classes, 2)
    examples = _Examples(batches, num_classes)

    def loss(module: nn.Module, batch: Batch) -> tuple[torch.Tensor, float]:
        logits = _logits(module, batch[0])
        if logits.shape != (len(batch[1]), num_classes):
            raise DataError(
                f"the model gives logits of shape {list(logits.shape)} for {len(batch[1])} examples and num_classes = "
                f"{num_classes}"
            )
        return cross_entropy(logits, batch[1], reduction="sum"), float(len(batch[1]))

    whole = hessian(model, examples.batches, loss, method="exact")
    sharded = whole_model(model, ["*"], [])
    space = whole.space

    def pull(cotangent: Cotangent) -> Vector:
        return space.wrap(Gradient(sharded, Pullback(examples, cotangent))()[1].data.to(space.dtype))

    with undisturbed(model):
        groups = Groups(torch.arange(num_classes), num_classes)
        pairs = weights(examples, model, groups, lambda sums: sums)
        rows = Basis(space, num_classes)
        means = class_means(pull, groups, pairs, rows)
        cross = cross_class(pull, groups, means, rows, Basis(space, num_classes * (num_classes - 1)))
    gauss_newton = _GaussNewton(sharded, space, examples)
    span = Basis(space, num_classes)
    rank = orthonormal(span, [rows[k] for k in range(num_classes)])
    without_means = Difference(gauss_newton, means.both)

    def operator(part: LinearOperator, matrix: str) -> Operator:
        return Operator(part, model, whole.intake, matrix=matrix, by="exact products")

    return Decomposition(
        whole,
        operator(gauss_newton, "Gauss-Newton matrix G"),
        operator(Difference(whole, gauss_newton), "residual H - G"),
        means,
        cross,
        operator(without_means, "Gauss-Newton matrix without class means"),
        operator(Difference(without_means, cross), "within-class part B2"),
        operator(Deflated(gauss_newton, span, rank), "Gauss-Newton matrix outside the class means' span"),
    )

"""Sketches in notebooks: curvature in sketch space, and gradients of single batches as rows of D numbers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, get_args

import numpy as np
import torch
from torch import nn

from hpc_hess.api.operators import Operator
from hpc_hess.errors import NumericsError
from hpc_hess.intake import given
from hpc_hess.model.blocks.users import of_user, user_objective
from hpc_hess.model.sharded.loss import CallableObjective, CausalLMObjective, LossFunction, own_objective
from hpc_hess.model.sharded.precision import whole_rows
from hpc_hess.model.sharded.undisturbed import undisturbed
from hpc_hess.sketch.kinds import Kind, SketchSettings
from hpc_hess.sketch.sketch import Sketch, SketchedOperator
from hpc_hess.sketch.transforms import Preconditioner


def sketched(
    operator: Operator, dimension: int, *, kind: Kind = "affd", preconditioner: Preconditioner = "hadamard", seed: int = 0
) -> Operator:
    """Return Phi A Phi^T, an operator on ``dimension`` (a power of two) entries, for slq, eigenpairs and the others.

    Its large eigenvalues are near those of A; a long Krylov basis costs D numbers a vector instead of N.
    """
    given.one_of("kind", kind, get_args(Kind))
    given.one_of("preconditioner", preconditioner, get_args(Preconditioner))
    settings = SketchSettings(kind, dimension, preconditioner, seed)
    sketch = SketchedOperator(operator, Sketch(operator.layout.num_params_full, settings))
    return Operator(sketch, None, operator.intake, matrix=f"{operator.matrix}, {kind.upper()}-sketched")


def gradient_sketches(
    model: nn.Module,
    batches: Iterable[Any],
    loss: LossFunction | None = None,
    *,
    dimension: int = 1 << 13,
    kind: Kind = "affd",
    preconditioner: Preconditioner = "hadamard",
    seed: int = 0,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
) -> np.ndarray:
    """Return the sketched gradient of each batch's mean loss, float64 (batches, D): inner products of rows are influences.

    ``batches`` and ``loss`` are as for :func:`hessian`. The model is used in place, in eval mode, and left as it was.

    Raises
    ------
    DataError : no batches, or something in them or in the loss cannot be used.
    ConfigError : the dimension is not a power of two.

    """
    given.model(model)
    given.one_of("kind", kind, get_args(Kind))
    given.one_of("preconditioner", preconditioner, get_args(Preconditioner))
    space = of_user(model, include, exclude)[0].space
    named = dict(model.named_parameters())
    sketch = Sketch(space.layout.num_params_full, SketchSettings(kind, dimension, preconditioner, seed))
    rows = []
    with undisturbed(model):
        objective: CallableObjective | CausalLMObjective = (
            user_objective(batches, loss, model) if loss is not None else own_objective(batches, model, space.device)[0]
        )
        for index in range(objective.num_micro_batches):
            with whole_rows(model):
                mean = objective.mean(model, index)
            found: Sequence[torch.Tensor | None] = (
                torch.autograd.grad(mean, [named[p.name] for p in space.layout.parameters], allow_unused=True)
                if mean.requires_grad
                else [None] * len(space.layout.parameters)
            )
            collection = sketch.begin(space.device)
            for parameter, gradient in zip(space.layout.parameters, found, strict=True):
                if gradient is not None:
                    flat = gradient.to(space.dtype).reshape(-1)
                    sketch.add(collection, flat, [parameter.global_offset], [parameter.numel])
            row = sketch.end(collection).cpu().numpy()
            if not np.isfinite(row).all():
                raise NumericsError(f"the gradient of batch {index} is not finite: check that batch and the weights")
            rows.append(row)
    return np.stack(rows)

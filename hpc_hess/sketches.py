"""Sketches in notebooks: curvature in sketch space, and gradients of single batches as rows of D numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from hpc_hess.api import Operator
from hpc_hess.errors import DataError
from hpc_hess.model.loss import LossFunction, causal_lm_loss
from hpc_hess.model.precision import whole_rows
from hpc_hess.model.shard import whole_model
from hpc_hess.sketch.kinds import Kind, SketchSettings
from hpc_hess.sketch.sketch import Sketch, SketchedOperator
from hpc_hess.sketch.transforms import Preconditioner


def sketched(
    operator: Operator, dimension: int, *, kind: Kind = "affd", preconditioner: Preconditioner = "hadamard", seed: int = 0
) -> Operator:  # fmt: skip
    """Return Phi A Phi^T, an operator on ``dimension`` (a power of two) entries, for slq, eigenpairs and the others.

    Its large eigenvalues are near those of A; a long Krylov basis costs D numbers a vector instead of N.
    """
    settings = SketchSettings(kind, dimension, preconditioner, seed)
    return Operator(SketchedOperator(operator, Sketch(operator.layout.num_params_full, settings)))


def gradient_sketches(
    model: nn.Module, batches: Sequence[Any], loss: LossFunction | None = None, *, dimension: int = 1 << 13,
    kind: Kind = "affd", preconditioner: Preconditioner = "hadamard", seed: int = 0, include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
) -> np.ndarray:  # fmt: skip
    """Return the sketched gradient of each batch's mean loss, float64 (batches, D): inner products of rows are influences.

    ``loss`` is as for :func:`hessian`. The model is used in place, in eval mode.

    Raises
    ------
    DataError : no batches.
    ConfigError : the dimension is not a power of two.

    """
    if len(batches) == 0:
        raise DataError("there are no batches")
    model.eval()
    space = whole_model(model, list(include), list(exclude)).space
    named = dict(model.named_parameters())
    sketch = Sketch(space.layout.num_params_full, SketchSettings(kind, dimension, preconditioner, seed))
    rows = []
    for batch in batches:
        with whole_rows(model):
            value = (loss or causal_lm_loss)(model, batch)
        mean = value[0] / value[1] if isinstance(value, tuple) else value
        wanted = [named[p.name] for p in space.layout.parameters]
        found = torch.autograd.grad(mean, wanted, allow_unused=True) if mean.requires_grad else [None] * len(wanted)
        collection = sketch.begin(space.device)
        for parameter, gradient in zip(space.layout.parameters, found, strict=True):
            if gradient is not None:
                sketch.add(collection, gradient.reshape(-1), [parameter.global_offset], [parameter.numel])
        rows.append(sketch.end(collection).cpu().numpy())
    return np.stack(rows)

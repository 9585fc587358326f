"""Sketches in notebooks: curvature in sketch space, and gradients of single batches as rows of D numbers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, get_args

import numpy as np
import torch
from torch import nn

from hpc_hess.api.operators import Operator, collective
from hpc_hess.errors import NumericsError
from hpc_hess.intake import given
from hpc_hess.model.blocks.users import of_user, require_causal
from hpc_hess.model.sharded.loss import CausalLMObjective
from hpc_hess.model.sharded.own_loss import CallableObjective, LossFunction, own_objective
from hpc_hess.model.sharded.placed import Placed, placed
from hpc_hess.model.sharded.precision import whole_rows
from hpc_hess.model.sharded.shard import ShardedModel
from hpc_hess.model.sharded.undisturbed import undisturbed
from hpc_hess.parallel.world import World
from hpc_hess.sketch.kinds import Kind, SketchSettings
from hpc_hess.sketch.sketch import Sketch, SketchedOperator
from hpc_hess.sketch.transforms import Preconditioner


@collective
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

    ``batches`` and ``loss`` are as for :func:`hessian`. The model is used in place, in eval mode, and left as it was. Over
    several ranks the rows are those of this rank's batches. Collective: yes.

    Raises
    ------
    DataError : no batches, or something in them or in the loss cannot be used.
    ConfigError : the dimension is not a power of two.

    """
    found = placed(model) if isinstance(model, nn.Module) else Placed(model, World.alone())
    module, world = found.module, found.world
    with world.together("gradient_sketches"):
        given.model(module)
        given.one_of("kind", kind, get_args(Kind))
        given.one_of("preconditioner", preconditioner, get_args(Preconditioner))
        of = of_user(module, include, exclude, found)[0]
        sketch = Sketch(of.layout.num_params_full, SketchSettings(kind, dimension, preconditioner, seed))
    rows = []
    with undisturbed(module):
        objective: CallableObjective | CausalLMObjective = (
            CallableObjective(batches, loss, module, world)
            if loss is not None
            else own_objective(batches, module, of.space.device, world)[0]
        )
        require_causal(of, objective)
        for index in range(objective.num_micro_batches):
            for row in _rows(of, objective, index, sketch):
                if index < objective.num_own:
                    rows.append(row)
        with world.together("sketched gradients"):
            for index, row in enumerate(rows):
                if not np.isfinite(row).all():
                    raise NumericsError(f"the gradient of batch {index} is not finite: check that batch and the weights")
    return np.stack(rows) if rows else np.zeros((0, dimension))


def _rows(
    model: ShardedModel, objective: CallableObjective | CausalLMObjective, index: int, sketch: Sketch
) -> Iterator[np.ndarray]:
    """Yield the sketched gradient of this rank's batch ``index``. Collective: if sharded."""

    def mean() -> torch.Tensor:
        with whole_rows(model.module):
            return objective.mean(model.module, index)

    if model.sharded:  # whose backward passes sum over ranks: each rank's batch counts in its turn
        for rank in range(model.world.size):
            gradient = model.space.zeros()
            model.attach_gradients(gradient.data)
            try:
                with model.world.guard("gradient of a batch"):
                    model.backward(mean() * (1.0 if rank == model.world.rank else 0.0))
            finally:
                model.detach_gradients()
            row = sketch.apply(gradient).cpu().numpy()
            if rank == model.world.rank:
                yield row
        return
    named, parameters = dict(model.module.named_parameters()), model.layout.parameters
    total, collection = mean(), sketch.begin(model.space.device)
    if total.requires_grad:
        found = torch.autograd.grad(total, [named[p.name] for p in parameters], allow_unused=True)
        for parameter, part in zip(parameters, found, strict=True):
            if part is not None:
                flat = part.to(model.space.dtype).reshape(-1)
                sketch.add(collection, flat, [parameter.global_offset], [parameter.numel])
    yield sketch.end(collection).cpu().numpy()

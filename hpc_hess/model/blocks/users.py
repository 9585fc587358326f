"""A user's model and loss, as they come in a notebook: seen once before the first product."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from hpc_hess.errors import DataError, HpcHessError, NumericsError
from hpc_hess.intake import given
from hpc_hess.intake.findings import Finding, noted
from hpc_hess.model.blocks.splice import plain_forward, replaced_forwards
from hpc_hess.model.sharded.loss import CallableObjective, LossFunction, Objective
from hpc_hess.model.sharded.shard import ShardedModel, select, whole_model
from hpc_hess.parallel.vector import VectorSpace

_RAW = (
    ArithmeticError,
    RuntimeError,
    TypeError,
    ValueError,
    AttributeError,
    LookupError,
    AssertionError,
    NotImplementedError,
)
_NUDGE = 1e-2  # of each entry and of a typical one: enough to change a loss that depends on them


def of_user(
    module: nn.Module, include: Sequence[str] | str = ("*",), exclude: Sequence[str] | str = ()
) -> tuple[ShardedModel, list[Finding]]:
    """Wrap a model of this process, its parameters used in place. Vectors are float32 or better, whatever its type.

    Raises LayoutError, ModelError.
    """
    patterns = given.patterns("include", include), given.patterns("exclude", exclude)
    model = whole_model(module, *patterns)
    named, findings = dict(module.named_parameters()), list[Finding]()
    frozen = sum(named[name].numel() for name in select(sorted(named), *patterns) if not named[name].requires_grad)
    if frozen:
        text = f"{frozen:,} selected parameters require no gradient and are left out: the matrix spans {model.space.size:,}"
        findings.append(noted("model.frozen", text))
    if model.space.dtype in (torch.bfloat16, torch.float16):
        space = VectorSpace(model.world, model.layout, torch.float32)
        model = ShardedModel(module, model.world, space, sharded=False)
    return model, findings


def user_objective(batches: Any, loss: LossFunction, module: nn.Module) -> CallableObjective:
    """Return the objective of a loss of one's own. Raises DataError, also where the loss raises something else."""
    try:
        return CallableObjective(batches, loss, module)
    except _RAW as error:
        text = next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")
        raise DataError(f"loss(model, batch) fails: {type(error).__name__}, {text}") from error


def tried_once(model: ShardedModel, objective: Objective) -> tuple[list[Finding], bool]:
    """Compute the first batch's loss; return what is to be noted, and whether it goes through half precision.

    Raises
    ------
    NumericsError : it is not finite. DataError : it was cut off from the parameters. ModelError : the model fails.

    """
    module = model.module
    named = dict(module.named_parameters())
    chosen = [named[p.name] for p in model.layout.parameters]

    def loss() -> torch.Tensor:
        try:
            return objective.contribution(module, 0).total
        except HpcHessError:
            raise
        except _RAW as error:
            text = next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")
            raise DataError(f"the loss of batch 0 cannot be computed: {type(error).__name__}, {text}") from error

    total = loss()
    if not bool(torch.isfinite(total)):
        raise NumericsError(f"the loss of batch 0 is {float(total.detach())}: check the weights and the batch")
    leaves, half = given.walked(total)
    if leaves is None:
        return [], half
    missing = [p for p in chosen if id(p) not in leaves]
    if len(missing) < len(chosen):
        count = sum(p.numel() for p in missing)
        text = f"the loss of batch 0 does not depend on {count:,} of the {model.space.size:,} parameters"
        return [noted("model.reached", text)] if missing else [], half
    if _depends(chosen, loss, total):
        raise DataError(
            "the loss was cut off from the parameters (detach, item, no_grad, numpy): return the tensor computed from them"
        )
    return [noted("model.reached", "the loss of batch 0 does not depend on any of the parameters")], half


def plain_suffices(model: ShardedModel, objective: Objective) -> bool:
    """Whether the first batch's loss is the same without what was set as ``forward`` on parts of the model.

    Streamed products take the forwards of the classes.
    """
    patched = [m for m in model.module.modules() if "forward" in m.__dict__]
    if not patched:
        return True
    with torch.no_grad():
        given_loss = objective.contribution(model.module, 0).total
        with replaced_forwards([(m, plain_forward(m)) for m in patched]):
            plain = objective.contribution(model.module, 0).total
    return bool((given_loss - plain).abs() <= 100 * torch.finfo(plain.dtype).eps * given_loss.abs())


def _depends(parameters: list[nn.Parameter], loss: Any, before: torch.Tensor) -> bool:
    """Whether the loss changes with the parameters, which are written back."""
    kept = [p.detach().clone() for p in parameters]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        try:
            for p in parameters:
                signs = torch.randn(p.shape, generator=generator).to(p.device, p.dtype)
                p.add_(_NUDGE * signs * (p.abs() + p.abs().mean() + 1e-3))
            return not bool(loss() == before)
        finally:
            for p, values in zip(parameters, kept, strict=True):
                p.copy_(values)

"""The first forward passes of a model that has just been filled: what they show is found before anything is computed."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from hpc_hess.errors import ModelError
from hpc_hess.intake.findings import Finding, noted, passed
from hpc_hess.intake.forward import beginning, causal_remedy, check_causal, check_padding, checksums
from hpc_hess.model.data.data import Samples, batch_of
from hpc_hess.model.sharded.micro_batch import Batch, MicroBatch
from hpc_hess.model.sharded.shard import ShardedModel, local_part
from hpc_hess.model.sharded.skeleton import text_config
from hpc_hess.parallel.vector import Vector
from hpc_hess.registry.tasks import TASKS

# settings of a configuration that let a forward pass write weights, and their value that does not
_SWITCHES = {"rescale_every": 0}


def try_forward(
    model: ShardedModel,
    plain: nn.Module | None,
    samples: Samples,
    row: int,
    refill: Callable[[], object],
    dtype: torch.dtype,
    explained: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> tuple[list[Finding], bool]:
    """Run a few short forward passes; return what they show, and whether rows must not be padded. Collective: yes.

    Parameters
    ----------
    plain : the skeleton without hooks, which gets the switches of the model.
    row : the sample that this rank takes.
    refill : puts the weights and buffers back, from where they came.
    dtype : that the model computes in.
    explained : turns an error of a forward pass into a sentence about the configuration.

    Raises
    ------
    ModelError : the model cannot be run, sees later tokens, or writes its weights. On every rank.

    """
    name = type(model.module).__name__.removeprefix("FSDP")
    causal = TASKS[samples.task].next_token

    def outputs(batch: Batch) -> torch.Tensor:
        objective = samples.objective([batch], 1, model.space.device)
        with explained(), model.measuring(), model.world.guard("first forward passes"):
            return objective.outputs(model.module, 0)[0].flatten(0, -2)

    def logits(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return outputs(MicroBatch([0], ids, mask, ids))

    def whole_row() -> torch.Tensor:
        return logits(ids, torch.ones_like(ids)) if causal else outputs(batch_of(samples, [row]))

    if causal:
        ids = beginning(samples.input_ids[row][samples.attention_mask[row] == 1])
    before = checksums(_state(model))
    first = whole_row()
    findings = [passed("model.writes", "a forward pass leaves parameters and buffers as they were")]
    if written := _written(model, before):
        switched = _turn_off(model.module, plain)
        if not switched:
            raise ModelError(f"{name} writes '{written}' in its forward pass, so its loss is no function of its weights")
        refill()
        first = whole_row()
        if _written(model, before):
            raise ModelError(f"{name} writes '{written}' in its forward pass, whatever {' and '.join(switched)} are")
        text = f"{name} writes '{written}' in its first forward pass: put back, with {' and '.join(switched)}"
        findings = [noted("model.writes", text)]
    if causal:
        remedy = causal_remedy(text_config(model.module.config))
        findings.append(check_causal(logits, ids, first, dtype, model.world, name, remedy))
    lengths = samples.attention_mask.sum(1) if "attention_mask" in samples.inputs else torch.zeros(0)
    alone = False
    if len(lengths) and int(lengths.min()) < samples.attention_mask.shape[1]:
        shortest = int(lengths.argmin())
        by_itself, padded = (outputs(batch_of(samples, [shortest], cut=cut)) for cut in (True, False))
        finding, alone = check_padding(by_itself, padded[: len(by_itself)], dtype, model.world)
        findings.append(finding)
    return findings, alone


def spanned_finding(model: ShardedModel) -> Finding:
    """Say which parameters the matrix spans. Collective: no."""
    size, whole = model.layout.num_params, model.layout.num_params_full
    if size == whole:
        return passed("model.frozen", f"the matrix spans all {whole:,} parameters")
    chosen = {parameter.name for parameter in model.layout.parameters}
    frozen: list[str] = [name for name in getattr(model.module, "frozen_by_itself", []) if name not in chosen]
    text = f"the matrix spans {size:,} of {whole:,} parameters"
    if not frozen:
        return passed("model.frozen", text)
    more = f" and {len(frozen) - 1} others" if len(frozen) > 1 else ""
    return noted("model.frozen", f"{text}: the model itself freezes '{frozen[0]}'{more}")


def reached_finding(model: ShardedModel, gradient: Vector) -> Finding:
    """Count the parameters of tensors whose gradient is exactly zero: the loss does not depend on them. Collective: yes."""
    pieces = model.shard.pieces
    mine = [bool(part.any()) for part in model.pieces_of(gradient.data)]
    sums = model.world.sum_over_ranks(torch.tensor(mine, dtype=torch.float64), "parameters reached")
    missed = [piece.parameter for piece, some in zip(pieces, sums.tolist(), strict=True) if not some]
    count, size = sum(parameter.numel for parameter in missed), model.layout.num_params
    if not missed:
        return passed("model.reached", "every parameter tensor has a gradient")
    if count == size:
        return noted("model.reached", f"the loss depends on none of the {size:,} parameters: the matrix is zero")
    largest = sorted(missed, key=lambda parameter: -parameter.numel)[:2]
    names = ", ".join(f"'{parameter.name}'" for parameter in largest) + (", ..." if len(missed) > 2 else "")
    text = f"the loss does not depend on {count:,} of {size:,} parameters (their gradient is exactly zero): {names}"
    return noted("model.reached", text)


def _state(model: ShardedModel) -> list[tuple[str, torch.Tensor]]:
    """Return this rank's part of every parameter, and the persistent buffers, by name."""
    persistent = model.module.state_dict().keys()
    return [
        *((name, local_part(parameter)) for name, parameter in model.module.named_parameters()),
        *((name, buffer) for name, buffer in model.module.named_buffers() if name in persistent),
    ]


def _written(model: ShardedModel, before: dict[str, int]) -> str:
    """Return the first name that has changed since ``before`` on some rank, or "". Collective: yes."""
    after = checksums(_state(model))
    mine = next((name for name, value in after.items() if before[name] != value), "")
    return next(filter(None, model.world.gather(mine, "weights written")), "")


def _turn_off(*modules: nn.Module | None) -> list[str]:
    """Turn off what is known to write weights; return what was set."""
    found: dict[str, None] = {}
    for module in filter(None, modules):
        for part in module.modules():
            config = getattr(part, "config", None)
            for key, value in _SWITCHES.items():
                if getattr(config, key, value) != value:
                    setattr(config, key, value)
                    found[f"{key} = {value}"] = None
    return list(found)

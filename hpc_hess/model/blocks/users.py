"""A user's model and loss, as they come in a notebook or a program: seen once before the first product."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from hpc_hess.errors import DataError, ModelError, NumericsError
from hpc_hess.intake import given
from hpc_hess.intake.findings import Finding, noted, unchecked
from hpc_hess.intake.forward import beginning, causal_remedy, check_causal
from hpc_hess.model.blocks.splice import plain_forward, replaced_forwards
from hpc_hess.model.sharded.borrowed import gathered_as, narrow
from hpc_hess.model.sharded.loss import CausalLMObjective, Objective
from hpc_hess.model.sharded.micro_batch import MicroBatch
from hpc_hess.model.sharded.own_loss import in_words
from hpc_hess.model.sharded.placed import Placed
from hpc_hess.model.sharded.shard import ShardedModel, select, whole_model
from hpc_hess.model.sharded.skeleton import text_config
from hpc_hess.model.sharded.undisturbed import uninterrupted
from hpc_hess.parallel.vector import VectorSpace

_NUDGE = 1e-2  # of each entry and of a typical one: enough to change a loss that depends on them


def of_user(
    module: nn.Module, include: Sequence[str] | str = ("*",), exclude: Sequence[str] | str = (), placed: Placed | None = None
) -> tuple[ShardedModel, list[Finding]]:
    """Wrap a user's model, its parameters used in place. Vectors are float32 or better, whatever its type. Collective: no.

    Raises LayoutError, ModelError.
    """
    patterns = given.patterns("include", include), given.patterns("exclude", exclude)
    model = whole_model(module, *patterns, placed)
    named, findings = dict(module.named_parameters()), list[Finding]()
    frozen = sum(named[name].numel() for name in select(sorted(named), *patterns) if not named[name].requires_grad)
    if frozen:
        text = f"{frozen:,} selected parameters require no gradient and are left out: the matrix spans {model.space.size:,}"
        findings.append(noted("model.frozen", text))
    if placed is not None and placed.alone:
        text = "the model is not distributed: the matrix is that of this process's batches alone; group=... sums over ranks"
        findings.append(noted("given.ranks", text))
    if kinds := sorted(narrow(module)):
        text = f"FSDP2's mixed precision ({', '.join(kinds)}) is set aside: products are computed in the parameters' type"
        findings.append(noted("given.precision", text))
    if model.space.dtype in (torch.bfloat16, torch.float16):
        space = VectorSpace(model.world, model.layout, torch.float32)
        model = ShardedModel(module, model.world, space, sharded=model.sharded)
    return model, findings


def require_equal_replicas(model: ShardedModel) -> None:
    """Refuse replicas that hold different parameters. Collective: yes. Raises ModelError."""
    flat = model.read_parameters()
    mine = (model.world.shard_rank, float(flat.double().sum()), float(flat.double().square().sum()))
    everyone = model.world.gather(mine, "compare the replicas")
    for rank, other in enumerate(everyone):
        first = next(k for k, one in enumerate(everyone) if one[0] == other[0])
        if repr(everyone[first]) != repr(other):  # nan is not equal to itself
            raise ModelError(
                f"ranks {first} and {rank} hold different parameters: replicas must start from the same weights"
            )


def tried_once(model: ShardedModel, objective: Objective) -> tuple[list[Finding], bool]:
    """Compute the first batch's loss; return what is to be noted, and whether it goes through half precision.

    Collective: yes.

    Raises
    ------
    NumericsError : it is not finite. DataError : it was cut off from the parameters. ModelError : the model fails.

    """
    module, world = model.module, model.world
    named = dict(module.named_parameters())

    def loss() -> torch.Tensor:
        with world.guard("loss of the first batch"), world.together("loss of the first batch"):
            with in_words("the loss of batch 0 cannot be computed"):
                return objective.contribution(module, 0).total

    total = loss()
    with world.together("loss of the first batch"):
        if not bool(torch.isfinite(total)):
            raise NumericsError(f"the loss of batch 0 is {float(total.detach())}: check the weights and the batch")
    leaves, half = given.walked(total)
    half = world.any_true(half, "half precision")
    if not world.all_true(leaves is not None, "what the loss depends on"):
        return [], half
    gathered = gathered_as(module)
    chosen = [named[p.name] for p in model.layout.parameters]
    reached = [id(gathered.get(id(p), p)) in (leaves or ()) for p in chosen]
    seen = world.sum_over_ranks(torch.tensor(reached, dtype=torch.float64), "what the loss depends on")
    missing = [p for p, ranks in zip(chosen, seen.tolist(), strict=True) if not ranks]
    if len(missing) < len(chosen):
        count = sum(p.numel() for p in missing)
        text = f"the loss of batch 0 does not depend on {count:,} of the {model.space.size:,} parameters"
        return [noted("model.reached", text)] if missing else [], half
    if _depends(model, loss, total):
        raise DataError(
            "the loss was cut off from the parameters (detach, item, no_grad, numpy): return the tensor computed from them"
        )
    return [noted("model.reached", "the loss of batch 0 does not depend on any of the parameters")], half


def require_causal(model: ShardedModel, objective: Objective) -> list[Finding]:
    """Refuse the loss of a causal LM where tokens see their targets, by the beginning of a row. Collective: yes.

    Returns what is to be noted: it cannot be tried where the forward takes more than numbers of each token, or a rank's
    first batch has rows of one token.

    Raises
    ------
    ModelError : the logits depend on a later token. On every rank.

    """
    if not isinstance(objective, CausalLMObjective):
        return []
    module, world, batch = model.module, model.world, objective.micro_batches[0]
    row = int(batch.attention_mask.sum(1).argmax())
    kept = batch.attention_mask[row].nonzero()[:, 0]
    ids = beginning(batch.input_ids[row][kept])
    kept = kept[: ids.shape[1]]
    plain = all(isinstance(v, torch.Tensor) and v.shape == batch.input_ids.shape for v in batch.others.values())
    if not world.all_true(plain and ids.shape[1] > 1, "causal"):
        return [unchecked("model.causal", "whether tokens see later ones was not tried: it takes a row of tokens alone")]
    others = {name: value[row : row + 1, kept] for name, value in batch.others.items()}

    def logits(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        own = CausalLMObjective([MicroBatch([0], ids, mask, ids, others, batch.masked)], 1, model.space.device)
        with model.measuring(), world.guard("causal"):
            return own.outputs(module, 0)[0].flatten(0, -2)

    dtype = next(module.parameters()).dtype
    remedy = causal_remedy(text_config(getattr(module, "config", None)), "give hessian() a loss of your own")
    name = type(module).__name__.removeprefix("FSDP")
    found = check_causal(logits, ids, logits(ids, torch.ones_like(ids)), dtype, world, name, remedy)
    return [] if found.verdict == "passed" else [found]


def plain_suffices(model: ShardedModel, objective: Objective) -> bool:
    """Whether the first batch's loss is the same without what was set as ``forward`` on parts of the model.

    Streamed products take the forwards of the classes. Collective: yes.
    """
    patched, world = [m for m in model.module.modules() if "forward" in m.__dict__], model.world
    if not world.any_true(bool(patched), "replaced forwards"):
        return True
    with torch.no_grad(), world.guard("loss with the forwards of the classes"):
        given_loss = objective.contribution(model.module, 0).total
        with replaced_forwards([(m, plain_forward(m)) for m in patched]):
            plain = objective.contribution(model.module, 0).total
    same = bool((given_loss - plain).abs() <= 100 * torch.finfo(plain.dtype).eps * given_loss.abs())
    return world.all_true(same, "replaced forwards")


def _depends(model: ShardedModel, loss: Any, before: torch.Tensor) -> bool:
    """Whether the loss changes on some rank with the parameters, which are written back. Collective: yes."""
    kept = model.read_parameters()
    nudged, generator = kept.clone(), torch.Generator().manual_seed(0)
    for part in model.pieces_of(nudged):
        signs = torch.randn(part.shape, generator=generator).to(part.device, part.dtype)
        part.add_(_NUDGE * signs * (part.abs() + part.abs().mean().nan_to_num() + 1e-3))
    with torch.no_grad():
        try:
            model.write_parameters(nudged)
            return model.world.any_true(not bool(loss() == before), "whether the loss changes")
        finally:
            with uninterrupted():
                model.write_parameters(kept)

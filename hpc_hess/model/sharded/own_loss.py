"""Losses and batches of people's own, as objectives.

Batches are this rank's; ranks may have unequally many of them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves, tree_map_only

from hpc_hess.errors import DataError, in_a_line
from hpc_hess.intake import given
from hpc_hess.intake.batches import drawn
from hpc_hess.intake.findings import Finding
from hpc_hess.model.sharded.loss import CausalLMObjective, Contribution
from hpc_hess.model.sharded.micro_batch import MicroBatch
from hpc_hess.model.sharded.precision import whole_rows
from hpc_hess.parallel.world import World

LossFunction = Callable[[nn.Module, Any], "torch.Tensor | tuple[torch.Tensor, float]"]
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


@contextmanager
def in_words(what: str) -> Iterator[None]:
    """Turn what a user's model or loss raises into a DataError that begins with ``what``; not what collectives raise."""
    try:
        yield
    except _RAW as error:
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            raise
        raise DataError(f"{what}: {in_a_line(error)}") from error


def evened(found: list[Any], world: World) -> list[Any]:
    """Return as many batches as the rank with the most has: this rank's, then one again that does not count.

    FSDP2 needs every rank in every pass. A rank without a batch is sent another's. Collective: yes.

    Raises
    ------
    DataError : on every rank: there are none at all, or what a batch holds cannot be sent.

    """
    counts = world.gather(len(found), "numbers of batches")
    if not any(counts):
        raise DataError("there are no batches")
    filler = found[:1]
    if not all(counts):
        giver = next(rank for rank, count in enumerate(counts) if count)
        try:
            mine: Any = (found[0], _on_gpu(found[0])) if world.rank == giver else None
            batch, on_gpu = world.gather(mine, "a batch for ranks without any")[giver]
        except TypeError as error:
            without = counts.index(0)
            raise DataError(
                f"rank {without} has no batch, and those of others cannot be sent ({error}): give it one"
            ) from error
        filler = filler or [tree_map_only(torch.Tensor, lambda t: t.to(world.device), batch) if on_gpu else batch]
    return found + filler * (max(counts) - len(found))


def _on_gpu(batch: Any) -> bool:
    return any(isinstance(leaf, torch.Tensor) and leaf.device.type != "cpu" for leaf in tree_leaves(batch))


class CallableObjective:
    """A user's ``loss(module, batch)`` over batches, drawn once.

    A scalar is one batch's mean and batches count equally; a pair (sum, weight) gives the weighted mean over all.

    Raises
    ------
    DataError : no batches, or the loss fails on one or gives something else; says what, and which batch.

    """

    def __init__(self, batches: Any, loss: LossFunction, module: nn.Module, world: World | None = None) -> None:
        world = world or World.alone()
        self.loss = loss
        with world.together("batches"):
            found = drawn(batches, least=1 if world.size == 1 else 0)
        self.batches, self.num_own = evened(found, world), len(found)
        self.num_micro_batches = len(self.batches)
        sharded = any(isinstance(p, DTensor) for p in module.parameters())
        weights = []
        with torch.set_grad_enabled(sharded):
            for index in range(len(self.batches)):
                with world.guard("loss of a batch"), world.together("loss of a batch"), in_words("loss(model, batch) fails"):
                    value, weight = self._evaluate(module, index)
                    if sharded and not value.requires_grad:
                        raise DataError(
                            f"the loss of batch {index} has no gradient, and FSDP2 needs every rank in every backward pass: "
                            "return the tensor computed from the parameters (no detach, item, no_grad, numpy)"
                        )
                    weights.append(weight)
        total = torch.tensor([sum(weights[: self.num_own])], dtype=torch.float64)
        self.total_weight = float(world.sum_over_ranks(total, "weights of the batches"))
        if not self.total_weight > 0:
            raise DataError("the weights that loss() returns add up to nothing")

    def _evaluate(self, module: nn.Module, index: int) -> tuple[torch.Tensor, float]:
        batch = self.batches[index]
        # losses that take keys out of a batch find it whole again
        value = self.loss(module, copy.copy(batch) if isinstance(batch, Mapping | list) else batch)
        return given.loss_value(value, index)

    def contribution(self, module: nn.Module, index: int) -> Contribution:
        """Return the batch's share of the weighted mean."""
        with whole_rows(module):
            value, _ = self._evaluate(module, index)
        total = value * (1.0 if index < self.num_own else 0.0) / self.total_weight
        return Contribution(total, total.detach().reshape(1), [index])

    def mean(self, module: nn.Module, index: int) -> torch.Tensor:
        """Return the batch's own mean loss."""
        value, weight = self._evaluate(module, index)
        return value / (weight or 1.0)


def causal_lm_batch(
    batch: Any, module: nn.Module | None = None, number: int = 0, first: int = 0
) -> tuple[MicroBatch, list[Finding]]:
    """Return token ids, or a dictionary with input_ids, as a MicroBatch; and what is to be noted about it.

    ``labels`` default to the input ids; positions with attention_mask 0 or label -100 are not predicted. What else
    ``module`` takes is handed on to it. ``number`` is that of the batch, ``first`` that of its first row.

    Raises
    ------
    DataError : something in it cannot be used.

    """
    found, notes = given.token_batch(batch, number, module)
    ids, mask, labels = found.pop("input_ids"), found.pop("attention_mask", None), found.pop("labels", None)
    masked = mask is not None or "position_ids" not in found
    mask = torch.ones_like(ids) if mask is None else mask
    labels = (ids if labels is None else labels).masked_fill(mask == 0, -100)
    labels[:, 1:].masked_fill_(mask[:, :-1] == 0, -100)  # left padding predicts nothing either
    return MicroBatch([*range(first, first + len(ids))], ids, mask, labels, found, masked), notes


def causal_lm_loss(module: nn.Module, batch: Any) -> tuple[torch.Tensor, float]:
    """Return the summed token loss and the number of predicted tokens of a batch (see :func:`causal_lm_batch`)."""
    return CausalLMObjective.of_batch(module, causal_lm_batch(batch, module)[0])


def own_objective(
    batches: Any, module: nn.Module, device: torch.device, world: World | None = None
) -> tuple[CausalLMObjective, list[Finding]]:
    """Return a causal LM's own objective over batches of any form, drawn once; and what is to be noted about them.

    Collective: yes, over the ranks of ``world``.

    Raises
    ------
    DataError : there are none, they predict nothing, or something in them cannot be used.

    """
    world = world or World.alone()
    micro_batches, notes, rows = list[MicroBatch](), dict[Finding, None](), 0
    with world.together("batches"):
        for number, batch in enumerate(drawn(batches, least=1 if world.size == 1 else 0)):
            micro_batch, found = causal_lm_batch(batch, module, number, rows)
            rows += len(micro_batch.input_ids)
            micro_batches.append(micro_batch)
            notes.update(dict.fromkeys(found))
    counted = torch.tensor([float(sum(micro_batch.num_tokens for micro_batch in micro_batches))], dtype=torch.float64)
    count = int(world.sum_over_ranks(counted, "numbers of tokens"))
    own, everyone = len(micro_batches), evened(micro_batches, world)
    if not count:
        raise DataError("the batches predict no token")
    fillers = [
        replace(b, sample_ids=[-1] * len(b.sample_ids), labels=torch.full_like(b.labels, -100)) for b in everyone[own:]
    ]
    return CausalLMObjective(everyone[:own] + fillers, count, device), list(notes)

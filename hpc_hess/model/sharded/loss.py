"""The function whose Hessian is taken: the token-weighted mean loss over the whole data set.

An objective is a sum over this rank's micro-batches; every rank has the same number of them, and the sum over ranks
and micro-batches is the loss, whatever the number of ranks, the micro-batch size or the order.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn.functional import cross_entropy, pad

from hpc_hess.errors import DataError
from hpc_hess.intake import given
from hpc_hess.intake.batches import drawn
from hpc_hess.intake.findings import Finding
from hpc_hess.model.sharded.precision import honest_casts, whole_rows


@dataclass
class Contribution:
    """A micro-batch's share of the loss: ``total`` (scalar, to be differentiated), detached per-sample parts, ids."""

    total: torch.Tensor
    per_sample: torch.Tensor
    sample_ids: Sequence[int]


class Objective(Protocol):
    """A loss as a sum over local micro-batches."""

    num_micro_batches: int

    def contribution(self, module: nn.Module, index: int) -> Contribution:
        """Return micro-batch ``index``'s share of the loss. Collective when the module is sharded."""
        ...


@dataclass
class MicroBatch:
    """Rows of token ids; ``labels``: the unshifted ids, -100 where a token is not predicted; dummies have id -1.

    ``others`` are further arguments of the model's forward, by name. ``masked``: whether it is given the mask; without it,
    position_ids that begin anew in a row keep the documents in it apart.
    """

    sample_ids: list[int]
    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor
    others: dict[str, Any] = field(default_factory=dict)
    masked: bool = True

    @property
    def num_tokens(self) -> int:
        """Predicted tokens."""
        return int((shifted_targets(self.labels) != -100).sum())

    def to(self, device: torch.device) -> MicroBatch:
        """Return the micro-batch on ``device``."""
        others = {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in self.others.items()}
        ids, mask, labels = (t.to(device) for t in (self.input_ids, self.attention_mask, self.labels))
        return MicroBatch(self.sample_ids, ids, mask, labels, others, self.masked)

    def arguments(self) -> dict[str, Any]:
        """Return what the model's forward is called with."""
        mask = {"attention_mask": self.attention_mask} if self.masked else {}
        return {"input_ids": self.input_ids, **mask, **self.others, "use_cache": False}


def shifted_targets(labels: torch.Tensor) -> torch.Tensor:
    """Return for each position the label of the next one; the last position predicts nothing (-100)."""
    return pad(labels[:, 1:], (0, 1), value=-100)


class CausalLMObjective:
    """Mean cross-entropy per predicted token of a causal LM.

    ``num_tokens`` counts the predicted tokens of the whole data set over all ranks.
    """

    def __init__(self, micro_batches: Sequence[MicroBatch], num_tokens: int, device: torch.device) -> None:
        self.num_micro_batches = len(micro_batches)
        self.num_tokens = num_tokens
        self.device = device
        self.micro_batches = micro_batches

    def contribution(self, module: nn.Module, index: int) -> Contribution:
        """Return the micro-batch's summed token losses over ``num_tokens``."""
        logits, targets = self._forward(module, index)
        losses = cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="none")
        per_sample = losses.view_as(targets).sum(1) / self.num_tokens
        return Contribution(per_sample.sum(), per_sample.detach(), self.micro_batches[index].sample_ids)

    def mean(self, module: nn.Module, index: int) -> torch.Tensor:
        """Return the micro-batch's own mean loss: 0 where it predicts nothing."""
        count = self.micro_batches[index].num_tokens
        return self.contribution(module, index).total * (self.num_tokens / max(count, 1))

    def logits_and_targets(self, module: nn.Module, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return logits (tokens, V) and targets (tokens,) of a micro-batch, -100 where nothing is predicted."""
        logits, targets = self._forward(module, index)
        return logits.flatten(0, 1), targets.flatten()

    @staticmethod
    def of_batch(module: nn.Module, batch: MicroBatch) -> tuple[torch.Tensor, float]:
        """Return a micro-batch's summed token loss and how many tokens it predicts: a loss as users write them."""
        own = CausalLMObjective([batch], 1, next(module.parameters()).device)
        return own.contribution(module, 0).total, float(batch.num_tokens)

    def _forward(self, module: nn.Module, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        batch = self.micro_batches[index].to(self.device)
        dtype = next(module.parameters()).dtype
        with honest_casts(dtype), whole_rows(module):
            logits = module(**batch.arguments()).logits
        if logits.dtype in (torch.bfloat16, torch.float16):
            logits = logits.float()
        return logits, shifted_targets(batch.labels)


LossFunction = Callable[[nn.Module, Any], "torch.Tensor | tuple[torch.Tensor, float]"]


class CallableObjective:
    """A user's ``loss(module, batch)`` over batches, drawn once.

    A scalar is one batch's mean and batches count equally; a pair (sum, weight) gives the weighted mean over all.

    Raises
    ------
    DataError : no batches, or the loss fails on one or gives something else; says what, and which batch.

    """

    def __init__(self, batches: Any, loss: LossFunction, module: nn.Module) -> None:
        self.batches, self.loss = drawn(batches), loss
        self.num_micro_batches = len(self.batches)
        with torch.no_grad():
            weights = [self._evaluate(module, index)[1] for index in range(len(self.batches))]
        self.total_weight = float(sum(weights))
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
        total = value / self.total_weight
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


def own_objective(batches: Any, module: nn.Module, device: torch.device) -> tuple[CausalLMObjective, list[Finding]]:
    """Return a causal LM's own objective over batches of any form, drawn once; and what is to be noted about them.

    Raises
    ------
    DataError : there are none, they predict nothing, or something in them cannot be used.

    """
    micro_batches, notes, rows = list[MicroBatch](), dict[Finding, None](), 0
    for number, batch in enumerate(drawn(batches)):
        micro_batch, found = causal_lm_batch(batch, module, number, rows)
        rows += len(micro_batch.input_ids)
        micro_batches.append(micro_batch)
        notes.update(dict.fromkeys(found))
    count = sum(micro_batch.num_tokens for micro_batch in micro_batches)
    if not count:
        raise DataError("the batches predict no token")
    return CausalLMObjective(micro_batches, count, device), list(notes)

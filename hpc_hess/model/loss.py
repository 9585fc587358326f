"""The function whose Hessian is taken: the token-weighted mean loss over the whole data set.

An objective is a sum over this rank's micro-batches; every rank has the same number of them, and the sum over ranks
and micro-batches is the loss, whatever the number of ranks, the micro-batch size or the order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn.functional import cross_entropy, pad

from hpc_hess.errors import DataError
from hpc_hess.model.precision import honest_casts, whole_rows


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
    """Rows of token ids; ``labels``: the unshifted ids, -100 where a token is not predicted; dummies have id -1."""

    sample_ids: list[int]
    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor

    @property
    def num_tokens(self) -> int:
        """Predicted tokens."""
        return int((shifted_targets(self.labels) != -100).sum())


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

    def logits_and_targets(self, module: nn.Module, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return logits (tokens, V) and targets (tokens,) of a micro-batch, -100 where nothing is predicted."""
        logits, targets = self._forward(module, index)
        return logits.flatten(0, 1), targets.flatten()

    def _forward(self, module: nn.Module, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        batch = self.micro_batches[index]
        dtype = next(module.parameters()).dtype
        with honest_casts(dtype), whole_rows(module):
            logits = module(
                input_ids=batch.input_ids.to(self.device), attention_mask=batch.attention_mask.to(self.device),
                use_cache=False,
            ).logits  # fmt: skip
        if logits.dtype in (torch.bfloat16, torch.float16):
            logits = logits.float()
        return logits, shifted_targets(batch.labels.to(self.device))


LossFunction = Callable[[nn.Module, Any], "torch.Tensor | tuple[torch.Tensor, float]"]


class CallableObjective:
    """A user's ``loss(module, batch)`` over a list of batches.

    A scalar is one batch's mean and batches count equally; a pair (sum, weight) gives the weighted mean over all.
    """

    def __init__(self, batches: Sequence[Any], loss: LossFunction, module: nn.Module) -> None:
        if len(batches) == 0:
            raise DataError("there are no batches")
        self.batches, self.loss = batches, loss
        self.num_micro_batches = len(batches)
        with torch.no_grad():
            weights = [self._split(loss(module, batch))[1] for batch in batches]
        self.total_weight = float(sum(weights))
        if not self.total_weight > 0:
            raise DataError("the weights that loss() returns add up to nothing")

    @staticmethod
    def _split(value: torch.Tensor | tuple[torch.Tensor, float]) -> tuple[torch.Tensor, float]:
        return (value[0], float(value[1])) if isinstance(value, tuple) else (value, 1.0)

    def contribution(self, module: nn.Module, index: int) -> Contribution:
        """Return the batch's share of the weighted mean."""
        with whole_rows(module):
            value, _ = self._split(self.loss(module, self.batches[index]))
        total = value / self.total_weight
        return Contribution(total, total.detach().reshape(1), [index])


def causal_lm_batch(batch: Mapping[str, torch.Tensor]) -> MicroBatch:
    """Return a dictionary with input_ids, and labels and attention_mask where given, as a MicroBatch.

    ``labels`` default to the input ids; positions with attention_mask 0 or label -100 are not predicted.
    """
    ids = batch["input_ids"]
    mask = batch.get("attention_mask", torch.ones_like(ids))
    labels = batch.get("labels", ids).masked_fill(mask == 0, -100)
    labels[:, 1:].masked_fill_(mask[:, :-1] == 0, -100)  # left padding predicts nothing either
    return MicroBatch(list(range(len(ids))), ids, mask, labels)


def causal_lm_loss(module: nn.Module, batch: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, float]:
    """Return the summed token loss and the number of predicted tokens of a batch (see :func:`causal_lm_batch`)."""
    micro_batch = causal_lm_batch(batch)
    objective = CausalLMObjective([micro_batch], 1, micro_batch.input_ids.device)
    return objective.contribution(module, 0).total, float(micro_batch.num_tokens)

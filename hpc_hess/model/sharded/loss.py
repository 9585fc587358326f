"""The function whose Hessian is taken: the mean loss over the tokens, or the labels, of the whole data set.

An objective is a sum over this rank's micro-batches; every rank has the same number of them, and the sum over ranks
and micro-batches is the loss, whatever the number of ranks, the micro-batch size or the order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, mse_loss

from hpc_hess.errors import ModelError
from hpc_hess.model.sharded.micro_batch import Batch, MicroBatch
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


Loss = Literal["cross_entropy", "mse", "bce"]
_LOSSES: dict[str, Callable[..., torch.Tensor]] = {"mse": mse_loss, "bce": binary_cross_entropy_with_logits}


class LabelObjective:
    """Mean loss per label: cross-entropy per class number; of rows of numbers, squared error or binary cross-entropy.

    ``num_tokens`` counts the labels of the whole data set over all ranks.
    """

    def __init__(
        self, micro_batches: Sequence[Batch], num_tokens: int, device: torch.device, loss: Loss = "cross_entropy"
    ) -> None:
        self.num_micro_batches = len(micro_batches)
        self.num_tokens = num_tokens
        self.device = device
        self.micro_batches = micro_batches
        self.loss = loss
        self.num_own = sum(max(batch.sample_ids, default=0) >= 0 for batch in micro_batches)  # without dummies

    def contribution(self, module: nn.Module, index: int) -> Contribution:
        """Return the micro-batch's summed losses over ``num_tokens``."""
        logits, targets = self.outputs(module, index)
        if self.loss == "cross_entropy":
            losses = cross_entropy(logits.flatten(0, -2), targets.flatten(), ignore_index=-100, reduction="none")
            losses = losses.view(len(targets), -1).sum(1)
        else:
            counted = ~targets.isnan()
            wanted = targets.nan_to_num().to(logits.dtype)
            losses = (_LOSSES[self.loss](logits, wanted, reduction="none") * counted).mean(1)
        per_sample = losses / self.num_tokens
        return Contribution(per_sample.sum(), per_sample.detach(), self.micro_batches[index].sample_ids)

    def mean(self, module: nn.Module, index: int) -> torch.Tensor:
        """Return the micro-batch's own mean loss: 0 where it predicts nothing."""
        count = self.micro_batches[index].num_tokens
        return self.contribution(module, index).total * (self.num_tokens / max(count, 1))

    def logits_and_targets(self, module: nn.Module, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return logits (labels, V) and targets (labels,) of a micro-batch, -100 where nothing is predicted.

        Raises
        ------
        ModelError : the loss is of numbers, not of classes.

        """
        if self.loss != "cross_entropy":
            raise ModelError(
                "the labels are numbers, not classes, so there is no Gauss-Newton matrix of classes: set operator.kind = "
                '"hessian"'
            )
        logits, targets = self.outputs(module, index)
        return logits.flatten(0, -2), targets.flatten()

    def outputs(self, module: nn.Module, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the logits [rows, ..., V] of a micro-batch, float32 at least, and its targets."""
        batch = self.micro_batches[index].to(self.device)
        dtype = next(module.parameters()).dtype
        arguments = {
            name: value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
            for name, value in batch.arguments().items()
        }
        with honest_casts(dtype), whole_rows(module):
            logits = module(**arguments).logits
        if logits.dtype in (torch.bfloat16, torch.float16):
            logits = logits.float()
        return logits, batch.targets()


class TokenObjective(LabelObjective):
    """Mean cross-entropy per predicted token, where each token of a row has logits of its own."""

    micro_batches: Sequence[MicroBatch]


class CausalLMObjective(TokenObjective):
    """Mean cross-entropy per predicted token of a causal LM."""

    @staticmethod
    def of_batch(module: nn.Module, batch: MicroBatch) -> tuple[torch.Tensor, float]:
        """Return a micro-batch's summed token loss and how many tokens it predicts: a loss as users write them."""
        own = CausalLMObjective([batch], 1, next(module.parameters()).device)
        return own.contribution(module, 0).total, float(batch.num_tokens)

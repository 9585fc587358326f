"""The function whose Hessian is taken: the mean loss over the tokens, or the labels, of the whole data set.

An objective is a sum over this rank's micro-batches; every rank has the same number of them, and the sum over ranks
and micro-batches is the loss, whatever the number of ranks, the micro-batch size or the order.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, mse_loss, pad
from torch.utils._pytree import tree_leaves, tree_map_only

from hpc_hess.errors import DataError, ModelError, in_a_line
from hpc_hess.intake import given
from hpc_hess.intake.batches import drawn
from hpc_hess.intake.findings import Finding
from hpc_hess.model.sharded.precision import honest_casts, whole_rows
from hpc_hess.parallel.world import World


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
    position_ids that begin anew in a row keep the documents in it apart. ``next_token``: a token's logits predict the next
    one; else its own label.
    """

    sample_ids: list[int]
    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor
    others: dict[str, Any] = field(default_factory=dict)
    masked: bool = True
    next_token: bool = True

    @property
    def num_tokens(self) -> int:
        """Predicted tokens."""
        return int((self.targets() != -100).sum())

    @property
    def size(self) -> int:
        """Numbers that the model is given."""
        return self.input_ids.numel()

    def targets(self) -> torch.Tensor:
        """Return what the logits of each token predict, -100 for nothing."""
        return shifted_targets(self.labels) if self.next_token else self.labels

    def to(self, device: torch.device) -> MicroBatch:
        """Return the micro-batch on ``device``."""
        others = {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in self.others.items()}
        ids, mask, labels = (t.to(device) for t in (self.input_ids, self.attention_mask, self.labels))
        return MicroBatch(self.sample_ids, ids, mask, labels, others, self.masked, self.next_token)

    def arguments(self) -> dict[str, Any]:
        """Return what the model's forward is called with."""
        mask = {"attention_mask": self.attention_mask} if self.masked else {}
        cache = {"use_cache": False} if self.next_token else {}
        return {"input_ids": self.input_ids, **mask, **self.others, **cache}


@dataclass
class LabelledBatch:
    """Samples with labels of their own: ``inputs`` [rows, ...] by the names of the forward's arguments.

    ``labels``: class numbers [rows], or tokens [rows, length], -100 for nothing; or numbers [rows, outputs], nan for
    nothing, as dummies (id -1) have.
    """

    sample_ids: list[int]
    inputs: dict[str, torch.Tensor]
    labels: torch.Tensor

    @property
    def num_tokens(self) -> int:
        """Labels that count: tokens, or rows of numbers."""
        counted = self.labels.isnan().logical_not().any(-1) if self.labels.is_floating_point() else self.labels != -100
        return int(counted.sum())

    @property
    def size(self) -> int:
        """Numbers that the model is given."""
        return sum(value.numel() for value in self.inputs.values())

    def targets(self) -> torch.Tensor:
        """Return the labels."""
        return self.labels

    def to(self, device: torch.device) -> LabelledBatch:
        """Return the micro-batch on ``device``."""
        inputs = {name: value.to(device) for name, value in self.inputs.items()}
        return LabelledBatch(self.sample_ids, inputs, self.labels.to(device))

    def arguments(self) -> dict[str, Any]:
        """Return what the model's forward is called with."""
        return dict(self.inputs)


Batch = MicroBatch | LabelledBatch


def shifted_targets(labels: torch.Tensor) -> torch.Tensor:
    """Return for each position the label of the next one; the last position predicts nothing (-100)."""
    return pad(labels[:, 1:], (0, 1), value=-100)


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

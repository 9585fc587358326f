"""What one forward pass is given, and what its outputs are compared with."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.functional import pad


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

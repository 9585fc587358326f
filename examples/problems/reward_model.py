"""A reward model: the Hessian of the Bradley-Terry loss, -log sigmoid(r(chosen) - r(rejected)).

hpc-hess run examples/problems/reward_model.toml
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import logsigmoid
from transformers import AutoModelForSequenceClassification, LlamaConfig, LlamaForSequenceClassification


def build(world: Any, settings: dict[str, Any]) -> tuple[Any, list[Any], Any]:
    """Return the model, this rank's pairs, and the loss."""
    torch.manual_seed(0)
    if source := settings.get("source", ""):
        model = AutoModelForSequenceClassification.from_pretrained(source, num_labels=1)
    else:
        small = LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_labels=1,
            pad_token_id=0,
        )
        model = LlamaForSequenceClassification(small)
    generator = torch.Generator().manual_seed(1)
    pairs = [torch.randint(1, model.config.vocab_size, (2, 2, 12), generator=generator) for _ in range(6)]

    def loss(model: Any, batch: torch.Tensor) -> tuple[torch.Tensor, float]:
        rewards = model(input_ids=batch.flatten(0, 1).to(world.device)).logits[:, 0]
        chosen, rejected = rewards.chunk(2)
        return -logsigmoid(chosen - rejected).sum(), float(len(chosen))

    return model, pairs[world.rank :: world.size], loss

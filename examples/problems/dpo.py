"""Direct preference optimisation: the Hessian of its loss at a policy, against a frozen reference model.

    hpc-hess run examples/problems/dpo.toml

The loss of a pair is -log sigmoid(beta * (policy margin - reference margin)), a margin being the log-probability of the
chosen answer minus that of the rejected one (Rafailov et al. 2023, equation 7).
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import cross_entropy, logsigmoid
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM


def build(world: Any, settings: dict[str, Any]) -> tuple[Any, list[Any], Any]:
    """Return the policy, this rank's pairs, and the loss."""
    torch.manual_seed(0)
    policy = _model(settings.get("policy", ""))
    reference = _model(settings.get("reference", "")).to(world.device).eval().requires_grad_(False)
    beta = settings.get("beta", 0.1)

    def log_probabilities(model: Any, ids: torch.Tensor, prompt: int) -> torch.Tensor:
        """Return the log-probability of each row's answer, which begins at token ``prompt``."""
        logits = model(input_ids=ids).logits[:, prompt - 1 : -1]
        return -cross_entropy(logits.transpose(1, 2), ids[:, prompt:], reduction="none").sum(1)

    def loss(model: Any, batch: dict[str, Any]) -> tuple[torch.Tensor, float]:
        ids = torch.cat([batch["chosen"], batch["rejected"]]).to(world.device)
        with torch.no_grad():
            usual = log_probabilities(reference, ids, batch["prompt"])
        chosen, rejected = (log_probabilities(model, ids, batch["prompt"]) - usual).chunk(2)
        return -logsigmoid(beta * (chosen - rejected)).sum(), float(len(chosen))

    return policy, _pairs(settings, policy.config.vocab_size)[world.rank :: world.size], loss


def _model(source: str) -> Any:
    """Return a model of a directory, or a small one of random weights."""
    if source:
        return AutoModelForCausalLM.from_pretrained(source)
    small = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(small)


def _pairs(settings: dict[str, Any], vocabulary: int) -> list[dict[str, Any]]:
    """Return pairs of answers to the same prompts. Read yours here."""
    generator = torch.Generator().manual_seed(1)
    pairs = []
    for _ in range(settings.get("batches", 6)):
        prompt, chosen, rejected = (torch.randint(vocabulary, (2, 8), generator=generator) for _ in range(3))
        pairs.append({"chosen": torch.cat([prompt, chosen], 1), "rejected": torch.cat([prompt, rejected], 1), "prompt": 8})
    return pairs

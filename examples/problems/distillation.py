"""Distillation: the Hessian of KL(teacher || student) per token, at temperature T, in the student's parameters.

hpc-hess run examples/problems/distillation.toml
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import kl_div, log_softmax
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM


def build(world: Any, settings: dict[str, Any]) -> tuple[Any, list[Any], Any]:
    """Return the student, this rank's rows of tokens, and the loss."""
    torch.manual_seed(0)
    student, teacher = (_model(settings.get(name, ""), layers) for name, layers in (("student", 1), ("teacher", 3)))
    teacher = teacher.to(world.device).eval().requires_grad_(False)
    temperature = settings.get("temperature", 2.0)
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(student.config.vocab_size, (2, 12), generator=generator) for _ in range(6)]

    def loss(model: Any, ids: torch.Tensor) -> tuple[torch.Tensor, float]:
        ids = ids.to(world.device)
        with torch.no_grad():
            wanted = log_softmax(teacher(input_ids=ids).logits / temperature, -1)
        found = log_softmax(model(input_ids=ids).logits / temperature, -1)
        return temperature**2 * kl_div(found, wanted, reduction="sum", log_target=True), float(ids.numel())

    return student, rows[world.rank :: world.size], loss


def _model(source: str, layers: int) -> Any:
    """Return a model of a directory, or a small one of random weights."""
    if source:
        return AutoModelForCausalLM.from_pretrained(source)
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=4)
    )

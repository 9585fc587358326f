"""Model directories with code of their own, as trust_remote_code reads them."""

from __future__ import annotations

import json
from pathlib import Path

from torch import nn

from tests.support.base_model import config_b, fill_b

SCALED = """
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer


class ScaledLayer(LlamaDecoderLayer):
    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx)
        self.scale = nn.Parameter(torch.full(SHAPE, 1.3))

    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs) * self.scale


class ScaledForCausalLM(LlamaForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        self.model.layers = nn.ModuleList([ScaledLayer(config, k) for k in range(config.num_hidden_layers)])
        self.nothing = nn.Parameter(torch.zeros(0, 4))
        self.register_buffer("factor", torch.tensor(0.9))
        self.register_buffer("none", torch.zeros(2, 0))
        self.post_init()

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = out.logits * self.factor
        return out
"""


def save_own(
    directory: Path, code: str, name: str = "ScaledForCausalLM", shape: tuple[int, ...] = (), **config: object
) -> nn.Module:
    """Write a Llama of B's sizes with code of its own, filled as B is; return the model."""
    directory.mkdir(parents=True)
    text = code.replace("SHAPE", repr(shape))
    (directory / "modeling_own.py").write_text(text)
    values = config_b(**config).to_dict() | {
        "auto_map": {"AutoModelForCausalLM": f"modeling_own.{name}"},
        "architectures": [name],
    }
    (directory / "config.json").write_text(json.dumps(values))
    space: dict[str, type] = {}
    exec(compile(text, str(directory / "modeling_own.py"), "exec"), space)
    settings = config_b(**config)
    settings._attn_implementation = "eager"
    model = fill_b(space[name](settings))
    model.save_pretrained(directory)
    (directory / "config.json").write_text(json.dumps(values))
    return model

"""Toy configurations of every tested architecture: name -> a function that returns a fresh tiny HF config."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

VOCAB = 96
MAX_POSITIONS = 64


def _build(module: str, name: str, **settings: Any) -> Any:
    import importlib

    config_class = getattr(importlib.import_module(f"transformers.models.{module}"), name)
    common = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "use_cache": False}
    return config_class(**{**common, **settings})


def _llama_like(**settings: Any) -> dict[str, Any]:
    shared = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "max_position_embeddings": MAX_POSITIONS,
        "tie_word_embeddings": False,
    }
    return {**shared, **settings}


_YARN = {
    "rope_type": "yarn",
    "rope_theta": 150000.0,
    "factor": 2.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
}

# Three layers, odd sizes where an architecture allows them: uneven shards are the rule here, not the exception.
TOYS: dict[str, Callable[[], Any]] = {
    "llama": lambda: _build("llama", "LlamaConfig", **_llama_like(tie_word_embeddings=True)),
    "llama_untied": lambda: _build("llama", "LlamaConfig", **_llama_like(num_hidden_layers=3, intermediate_size=25)),
    "gpt2": lambda: _build("gpt2", "GPT2Config", n_embd=16, n_layer=2, n_head=2, n_positions=MAX_POSITIONS, resid_pdrop=0.1),
    "gpt_neox": lambda: _build(
        "gpt_neox",
        "GPTNeoXConfig",
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=False,
    ),
    "opt": lambda: _build(
        "opt",
        "OPTConfig",
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        ffn_dim=24,
        max_position_embeddings=MAX_POSITIONS,
        word_embed_proj_dim=16,
    ),
    "qwen2": lambda: _build("qwen2", "Qwen2Config", **_llama_like()),
    "qwen3": lambda: _build("qwen3", "Qwen3Config", **_llama_like(tie_word_embeddings=True)),
    "gemma": lambda: _build("gemma", "GemmaConfig", **_llama_like(tie_word_embeddings=True)),
    "gemma2": lambda: _build(
        "gemma2", "Gemma2Config", **_llama_like(tie_word_embeddings=True, sliding_window=8, query_pre_attn_scalar=8)
    ),
    "gemma3": lambda: _build(
        "gemma3", "Gemma3TextConfig", **_llama_like(tie_word_embeddings=True, sliding_window=8, query_pre_attn_scalar=8)
    ),
    "mixtral": lambda: _build(
        "mixtral", "MixtralConfig", **_llama_like(num_local_experts=4, num_experts_per_tok=2, sliding_window=None)
    ),
    "qwen2_moe": lambda: _build(
        "qwen2_moe",
        "Qwen2MoeConfig",
        **_llama_like(num_experts=3, num_experts_per_tok=2, moe_intermediate_size=12, shared_expert_intermediate_size=20),
    ),
    "qwen3_moe": lambda: _build(
        "qwen3_moe", "Qwen3MoeConfig", **_llama_like(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=12)
    ),
    "gpt_oss": lambda: _build(
        "gpt_oss",
        "GptOssConfig",
        **_llama_like(num_local_experts=4, num_experts_per_tok=2, sliding_window=8, rope_parameters=_YARN),
    ),
}
MOE = ("mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss")
# Globs of a few of the two-layer Llama's parameters: their Hessian can be taken whole.
ONLY = ["model.layers.0.*layernorm.weight", "model.norm.weight", "model.layers.1.self_attn.k_proj.weight"]


def toy_config(name: str) -> Any:
    """Return a fresh HF config of the toy architecture."""
    return TOYS[name]()


def toy_model(name: str, seed: int = 0, dtype: torch.dtype = torch.float32, attention: str = "eager") -> nn.Module:
    """Return the toy as an ordinary single-process HF causal LM: random weights, eval mode, eager experts.

    Weights have the initialiser's scale times five, so that curvature is not lost in rounding.
    """
    from transformers import AutoModelForCausalLM

    config = toy_config(name)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=attention)
    if name in MOE:
        model.config._experts_implementation = "eager"
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, 0.1)
            else:  # norms and biases: away from their special values, so that a wrong mapping shows
                parameter.add_(0.05 * torch.randn_like(parameter))
    return torch.nn.Module.to(model, dtype).eval()


def toy_directory(name: str, path: Any, seed: int = 0, max_shard_size: str = "20KB") -> nn.Module:
    """Save the toy as a Hugging Face directory (sharded safetensors) and return the model that was saved."""
    model = toy_model(name, seed)
    model.save_pretrained(path, max_shard_size=max_shard_size)
    return model


def toy_tokens(rows: int = 4, length: int = 12, seed: int = 0) -> torch.Tensor:
    """Return random token ids [rows, length] int64, valid for every toy."""
    return torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))

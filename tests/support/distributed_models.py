"""Distributed checkpoints of toys, saved by several ranks in the names of Hugging Face and of torchtitan."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import rms_norm, silu

from hpc_hess.parallel.world import World
from tests.support.base_model import config_b, fill_b
from tests.support.spawn import run_ranks

State = dict[str, torch.Tensor]


def config_of(kind: str) -> Any:
    """Return the tiny configuration of a model that torchtitan has too."""
    from transformers import Qwen3Config, Qwen3MoeConfig

    if kind == "llama":
        return config_b(hidden_size=32, num_attention_heads=4, num_key_value_heads=2)
    sizes = {k: v for k, v in config_b().to_dict().items() if k in _SIZES} | {"num_attention_heads": 4}
    if kind == "qwen3":
        return Qwen3Config(**sizes, tie_word_embeddings=True)
    experts = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 20, "norm_topk_prob": True}
    return Qwen3MoeConfig(**sizes, **experts, tie_word_embeddings=False)


_SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_key_value_heads", "head_dim"),
    *("max_position_embeddings", "pad_token_id", "bos_token_id", "eos_token_id"),
)


def model_of(kind: str) -> Any:
    """Return the tiny model by transformers' code, float32, eager attention."""
    from transformers import AutoModelForCausalLM

    model: Any = fill_b(AutoModelForCausalLM.from_config(config_of(kind), attn_implementation="eager"))
    model.config._experts_implementation = "eager"
    return model


def titan_state(model: Any, older: bool = False) -> State:
    """Return the state dict that torchtitan has of a model; ``older``: by the names of its earlier versions."""
    config, found = model.config, {}
    qkv, head = ("", "output") if older else ("qkv_linear.", "lm_head")
    experts = "moe.experts.w{}" if older else "moe.routed_experts.inner_experts.w{}"
    names = {
        "self_attn.o_proj.weight": "attention.wo.weight",
        "self_attn.q_norm.weight": "attention.q_norm.weight",
        "self_attn.k_norm.weight": "attention.k_norm.weight",
        "mlp.gate_proj.weight": "feed_forward.w1.weight",
        "mlp.down_proj.weight": "feed_forward.w2.weight",
        "mlp.up_proj.weight": "feed_forward.w3.weight",
        "mlp.gate.weight": "moe.router.gate.weight",
        "input_layernorm.weight": "attention_norm.weight",
        "post_attention_layernorm.weight": "ffn_norm.weight",
    } | {f"self_attn.{p}_proj.weight": f"attention.{qkv}w{p}.weight" for p in "qkv"}
    for name, value in model.state_dict().items():
        tensor = value.detach().clone()
        if not name.startswith("model.layers."):
            whole = {"model.embed_tokens.weight": "tok_embeddings.weight", "model.norm.weight": "norm.weight"}
            found[whole.get(name, f"{head}.weight")] = tensor
            continue
        _, _, layer, rest = name.split(".", 3)
        if rest == "mlp.experts.gate_up_proj":
            for part, half in zip((1, 3), tensor.chunk(2, 1), strict=True):
                found[f"layers.{layer}.{experts.format(part)}{'' if older else '_EFD'}"] = half.clone()
        elif rest == "mlp.experts.down_proj":
            found[f"layers.{layer}.{experts.format(2)}{'' if older else '_EDF'}"] = tensor
        else:
            if config.model_type == "llama" and rest.endswith(("q_proj.weight", "k_proj.weight")):
                heads = tensor.shape[0] // config.head_dim  # the pairs that are rotated become neighbours
                tensor = tensor.view(heads, 2, config.head_dim // 2, -1).transpose(1, 2).reshape(tensor.shape).clone()
            found[f"layers.{layer}.{names[rest]}"] = tensor
    return found


def llama_of_titan(state: State, config: Any, ids: torch.Tensor) -> torch.Tensor:
    """Return the logits of a Llama as torchtitan computes it: pairs of neighbours are complex numbers, which are rotated."""
    width, eps = config.head_dim, config.rms_norm_eps
    base = config.rope_parameters["rope_theta"] ** -(torch.arange(0, width, 2, dtype=torch.float64) / width)
    turn = torch.exp(1j * torch.arange(ids.shape[1])[:, None] * base)[:, None, :]

    def rotated(x: torch.Tensor) -> torch.Tensor:
        pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * turn).flatten(-2)

    x = state["tok_embeddings.weight"].double()[ids]
    rows, length = ids.shape
    mask = torch.full((length, length), float("-inf"), dtype=torch.float64).triu(1)
    for k in range(config.num_hidden_layers):
        own = {n.removeprefix(f"layers.{k}."): t.double() for n, t in state.items() if n.startswith(f"layers.{k}.")}
        h = rms_norm(x, x.shape[-1:], own["attention_norm.weight"], eps)
        q, keys, v = (
            (h @ own[f"attention.qkv_linear.w{p}.weight"].T).view(rows, length, -1, width) for p in ("q", "k", "v")
        )
        q, keys = rotated(q), rotated(keys)
        keys, v = (t.repeat_interleave(q.shape[2] // t.shape[2], 2) for t in (keys, v))
        scores = torch.einsum("bihd,bjhd->bhij", q, keys) / width**0.5 + mask
        attended = torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v).flatten(2)
        x = x + attended @ own["attention.wo.weight"].T
        h = rms_norm(x, x.shape[-1:], own["ffn_norm.weight"], eps)
        inner = silu(h @ own["feed_forward.w1.weight"].T) * (h @ own["feed_forward.w3.weight"].T)
        x = x + inner @ own["feed_forward.w2.weight"].T
    x = rms_norm(x, x.shape[-1:], state["norm.weight"].double(), eps)
    return x @ state["lm_head.weight"].double().T


def with_training(state: State) -> dict[str, Any]:
    """Return a model's state with what a trainer saves beside it: moments, steps, settings."""
    moments = {f"optimizer.state.{name}.exp_avg": torch.full_like(value, 9.0) for name, value in state.items()}
    steps = {f"optimizer.state.{name}.step": torch.tensor(3.0) for name in state}
    return {**state, **moments, **steps, "lr_scheduler": {"last_epoch": 3}, "train_state": torch.arange(4)}


def _save(world: World, state: dict[str, Any], path: Path, dim: int) -> None:
    """Cut every tensor over the ranks and save the state. Collective: yes."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.tensor import DeviceMesh, Shard, distribute_tensor

    if world.size > 1:
        mesh = DeviceMesh("cpu", list(range(world.size)))
        state = {
            name: distribute_tensor(value, mesh, [Shard(min(dim, value.ndim - 1))])
            if isinstance(value, torch.Tensor) and value.ndim
            else value
            for name, value in state.items()
        }
    dcp.save(state, checkpoint_id=path)


def save_distributed(state: dict[str, Any], path: Path, ranks: int, dim: int = 0) -> None:
    """Save a state from so many ranks, each tensor cut along ``dim``."""
    if ranks == 1:
        _save(World.alone(), state, path, dim)
    else:
        run_ranks(_save, ranks, state, path, dim)


def save_model(kind: str, path: Path, ranks: int = 1, state: dict[str, Any] | None = None) -> nn.Module:
    """Save a tiny model with its configuration beside it; return it. ``state``: other than its own."""
    model = model_of(kind)
    path.mkdir(parents=True, exist_ok=True)
    save_distributed(dict(model.state_dict()) if state is None else state, path, ranks)
    model.config.save_pretrained(path)
    return model

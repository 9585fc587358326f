"""A tiny model of every causal language model that transformers knows, by one rule: its default configuration, sizes cut."""

from __future__ import annotations

import inspect
from typing import Any

from hpc_hess.intake.forward import causal_switches

VOCABULARY = 96
_HIDDEN, _HEADS, _HEAD = 32, 4, 8

# A part of a key's name -> its value; the first that fits counts. Sizes that must agree with each other do.
_SIZES: list[tuple[tuple[str, ...], int]] = [
    (("vocab_size", "n_words"), VOCABULARY),
    (("num_key_value_heads", "num_kv_heads", "n_head_kv", "num_kv_groups", "multi_query_group_num"), 2),
    (("expert_group", "n_groups", "mamba_n_groups", "n_group", "topk_group", "mamba_ngroups"), 1),
    (("mamba_n_heads", "mamba_num_heads"), 8),
    (("mamba_d_head", "mamba_head_dim"), 8),
    (("linear_num_value_heads", "linear_num_key_heads", "linear_num_heads"), 2),
    (("linear_key_head_dim", "linear_value_head_dim", "linear_head_dim"), 8),
    (("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "head_dim", "kv_channels", "d_kv"), _HEAD),
    (("q_lora_rank", "kv_lora_rank", "time_step_rank", "mamba_dt_rank", "lora_rank"), 8),
    (("experts_per_tok", "moe_topk", "num_experts_per_token", "moe_k", "num_selected_experts", "top_k_experts"), 2),
    (("n_shared_experts", "num_shared_experts"), 1),
    (("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"), 4),
    (("num_attention_heads", "num_heads", "n_head", "n_heads", "attention_heads"), _HEADS),
    (("intermediate", "ffn_dim", "ffn_size", "d_ff", "inner_dim", "d_inner", "ffn_hidden", "feed_forward"), 48),
    (("num_hidden_layers", "n_layer", "num_layers", "decoder_layers", "encoder_layers"), 2),
    (
        (
            "hidden_size",
            "n_embd",
            "d_model",
            "embedding_size",
            "model_dim",
            "word_embed_proj_dim",
            "attention_hidden_size",
            "d_embed",
            "emb_dim",
            "lru_width",
            "adapter_in_dim",
            "adapter_out_dim",
            "adapter_input_size",
        ),
        _HIDDEN,
    ),
    (("state_size", "mamba_d_state", "d_state"), 8),
    (("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx", "context_length"), 128),
    (("sliding_window", "attention_window_size", "attention_chunk_size", "mamba_chunk_size", "chunk_size"), 16),
    (("num_nextn_predict_layers", "num_mtp_layers"), 0),
]
_QWEN4 = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 8,
    "indexer_compress_ratio": 4,
}
_DOTS3 = (
    {"num_key_value_heads": 4, "swa_head_dim": 16, "swa_qk_nope_head_dim": 8, "swa_v_head_dim": 8}
    | {f"swa_{key}": 4 for key in ("num_attention_heads", "num_key_value_heads")}
    | {f"swa_{key}_lora_rank": 8 for key in ("q", "kv")}
)
# what a few types want besides
_SPECIAL: dict[str, dict[str, Any]] = {
    "reformer": {"is_decoder": True, "axial_pos_shape": [8, 16], "axial_pos_embds_dim": [16, 16]},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "zamba": {
        "num_hidden_layers": 6,
        "layers_block_type": None,
        "attn_layer_period": 3,
        "attn_layer_offset": 1,
        "attention_hidden_size": 64,
        "n_mamba_heads": 2,
        "attention_head_dim": 16,
    },
    "jamba": {"attn_layer_offset": 1},
    "mamba2": {"num_heads": 8},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "xmod": {"default_language": "en_XX"},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gemma3n.text_config": {
        "num_kv_shared_layers": 0,
        "intermediate_size": [48, 48],
        "activation_sparsity_pattern": [0.0, 0.0],
    },
    "dots3_note_text": _DOTS3,
    "dots3_note.text_config": _DOTS3,
    "hrm_text": {"L_bp_cycles": [3, 3]},  # else most cycles have no gradient, and it is not that of the loss
    "gemma4_text": {"global_head_dim": 16},
    "gemma4_unified_text": {"global_head_dim": 16},
    "gemma4.text_config": {"global_head_dim": 16},
    "gemma4_unified.text_config": {"global_head_dim": 16},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dbrx.attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8.0},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "zamba2": {"attention_hidden_size": 64, "attention_head_dim": 16, "mamba_headdim": 8},
    "qwen4_exp_text": _QWEN4,
    "qwen4_exp.text_config": _QWEN4,
    "blt": {"encoder_hash_byte_group_vocab": 64},
}
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def names() -> dict[str, str]:
    """Return model type -> class name of all causal language models of transformers."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return {kind: each if isinstance(each, str) else each[0] for kind, each in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items()}


def _size_of(key: str) -> int | None:
    for parts, value in _SIZES:
        if any(key == part or key.endswith(part) or part in key for part in parts):
            return value
    return None


def _cut(config: Any) -> dict[str, Any]:
    """Return the changes that make a configuration tiny."""
    changes: dict[str, Any] = {}
    for key, value in config.to_dict().items():
        size = _size_of(key)
        if isinstance(value, bool) or key.startswith("_") or key == "qk_head_dim":
            continue
        large = isinstance(value, int) and size is not None and (value > size or key == "vocab_size")
        if large or (value is None and key in ("head_dim", "num_key_value_heads")):
            changes[key] = size
        elif isinstance(value, int) and key == "rotary_dim":
            changes[key] = _HEAD
    if "qk_rope_head_dim" in changes:  # latent attention: every head has a part with positions and one without
        changes |= {"qk_head_dim": 2 * _HEAD, "num_key_value_heads": _HEADS}
    changes |= {key: value for key, value in _TOKENS.items() if hasattr(config, key)}
    for key in ("layer_types", "layers_block_type", "mlp_layer_types"):
        listed = getattr(config, key, None)
        own = key not in config.attribute_map and not isinstance(inspect.getattr_static(config, key, None), property)
        if isinstance(listed, list) and listed and own:
            rest = [each for each in listed if each != listed[0]]
            changes[key] = [listed[0], rest[0] if rest else listed[0]]
    return changes


def tiny_config(kind: str, *, causal: bool = False) -> Any:
    """Return the tiny configuration of a model type. Raises whatever transformers raises where the rule does not fit.

    ``causal``: with every switch that keeps tokens from seeing later ones, where a type has one.
    """
    from transformers import AutoConfig

    config = AutoConfig.for_model(kind)
    changes = _cut(config) | _SPECIAL.get(kind, {})
    if causal:
        changes |= causal_switches(config)
    for name in getattr(config, "sub_configs", None) or {}:
        part = getattr(config, name, None)
        if part is not None:
            changes[name] = {**part.to_dict(), **_cut(part), **_SPECIAL.get(f"{kind}.{name}", {})}
            changes[name].pop("per_layer_config", None)  # of layers that are cut
    changes["use_cache"] = False
    made = type(config)(**changes)
    made._attn_implementation = made._experts_implementation = "eager"
    return made


def tiny_model(kind: str, seed: int = 0, *, causal: bool = False) -> Any:
    """Return the tiny model, float32, eval mode, with weights large enough to see in every layer."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(
        tiny_config(kind, causal=causal), dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, 0.1)
            elif parameter.is_floating_point():  # away from their special values, so that a wrong name shows
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()

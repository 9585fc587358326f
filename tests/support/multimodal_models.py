"""Tiny models of text and more, by transformers' own code, one of each family that is tested."""

from __future__ import annotations

from typing import Any

from torch import nn

from tests.support.base_model import fill_b

_TEXT: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
_SECTIONS = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
_QWEN_TOKENS = {"image_token_id": 90, "video_token_id": 91, "vision_start_token_id": 92, "vision_end_token_id": 93}
_QWEN_VISION = {"depth": 1, "num_heads": 2, "intermediate_size": 40, "patch_size": 4, "in_channels": 3}

# what is left out of each, and whether logits and products are those of a part that stands alone in transformers
FAMILIES: dict[str, set[str]] = {
    "gemma3": {"model.vision_tower", "model.multi_modal_projector"},
    "gemma4": {"model.vision_tower", "model.embed_vision", "model.audio_tower", "model.embed_audio"},
    "qwen2_vl": {"model.visual"},
    "qwen2_5_vl": {"model.visual"},
    "qwen3_vl": {"model.visual"},
    "llama4": {"vision_model", "multi_modal_projector"},
    "mistral3": {"model.vision_tower", "model.multi_modal_projector"},
    "llava": {"model.vision_tower", "model.multi_modal_projector"},
}


def multimodal_config(family: str) -> Any:
    """Return a fresh tiny configuration."""
    import transformers as hf

    if family == "gemma3":
        text = {**_TEXT, "query_pre_attn_scalar": 8, "sliding_window": 8}
        places = {"image_token_index": 90, "boi_token_index": 91, "eoi_token_index": 92}
        return hf.Gemma3Config(text_config=text, vision_config=_VISION, mm_tokens_per_image=4, **places)
    if family == "gemma4":
        layers = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8, "num_kv_shared_layers": 0}
        embeddings = {"vocab_size_per_layer_input": 96, "hidden_size_per_layer_input": 4, "global_head_dim": 8}
        vision = {**_VISION, "num_key_value_heads": 2, "head_dim": 16, "position_embedding_size": 16}
        audio = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "output_proj_dims": 16}
        places = {"image_token_id": 90, "audio_token_id": 91, "video_token_id": 92, "boi_token_id": 93, "eoi_token_id": 94}
        return hf.Gemma4Config(
            text_config={**_TEXT, **layers, **embeddings}, vision_config=vision, audio_config=audio, **places
        )
    if family in ("qwen2_vl", "qwen2_5_vl"):
        kind = hf.Qwen2VLConfig if family == "qwen2_vl" else hf.Qwen2_5_VLConfig
        vision = dict(_QWEN_VISION)
        vision |= (
            {"embed_dim": 32, "hidden_size": 32} if family == "qwen2_vl" else {"hidden_size": 32, "out_hidden_size": 32}
        )
        return kind(text_config={**_TEXT, "rope_parameters": _SECTIONS}, vision_config=vision, **_QWEN_TOKENS)
    if family == "qwen3_vl":
        vision = {**_QWEN_VISION, "hidden_size": 32, "out_hidden_size": 32, "deepstack_visual_indexes": [0]}
        vision |= {"num_position_embeddings": 16}
        return hf.Qwen3VLConfig(text_config={**_TEXT, "rope_parameters": _SECTIONS}, vision_config=vision, **_QWEN_TOKENS)
    if family == "llama4":
        text = {**_TEXT, "intermediate_size_mlp": 40, "num_local_experts": 2, "attention_chunk_size": 8}
        text |= {"interleave_moe_layer_step": 2, "no_rope_layers": [1, 0]}
        vision = {**_VISION, "vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32}
        return hf.Llama4Config(text_config=text, vision_config=vision, image_token_index=90, boi_token_index=91)
    vision = {**_VISION, "model_type": "pixtral", "head_dim": 16}
    if family == "mistral3":
        text = {**_TEXT, "model_type": "mistral", "sliding_window": None}
        return hf.Mistral3Config(text_config=text, vision_config=vision, image_token_index=90, spatial_merge_size=2)
    text = {**_TEXT, "model_type": "llama"}
    return hf.LlavaConfig(
        text_config=text, vision_config=vision, image_token_index=90, vision_feature_select_strategy="full"
    )


def multimodal_model(family: str) -> nn.Module:
    """Return the whole model, with its towers, float32, eager attention."""
    from transformers import AutoModelForMultimodalLM

    return fill_b(AutoModelForMultimodalLM.from_config(multimodal_config(family), attn_implementation="eager"))

"""Toy GGUF files as llama.cpp's converter writes them: metadata, names and layouts of its architectures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from tests.support.toys import VOCAB

Shapes = dict[str, tuple[int, ...]]
WIDTH = 256  # the block of the K-quants


def _attention(heads: int, kv: int, width: int, head: int) -> Shapes:
    return {
        "attn_q": (heads * head, width),
        "attn_k": (kv * head, width),
        "attn_v": (kv * head, width),
        "attn_output": (width, heads * head),
        "attn_norm": (width,),
        "ffn_norm": (width,),
    }


def _dense(width: int, inner: int) -> Shapes:
    return {"ffn_gate": (inner, width), "ffn_up": (inner, width), "ffn_down": (width, inner)}


def shapes_of(arch: str, width: int, inner: int, heads: int, kv: int, experts: int, layers: int) -> Shapes:
    """Return the stored tensors of an architecture without ".weight"."""
    head = width // heads
    if arch == "gpt2":
        block: Shapes = {
            "attn_norm": (width,),
            "ffn_norm": (width,),
            "attn_qkv": (3 * width, width),
            "attn_output": (width, width),
            "ffn_up": (inner, width),
            "ffn_down": (width, inner),
        }
    else:
        block = _attention(heads, kv, width, head)
        if experts:
            block |= {
                "ffn_gate_inp": (experts, width),
                "ffn_gate_exps": (experts, inner, width),
                "ffn_up_exps": (experts, inner, width),
                "ffn_down_exps": (experts, width, inner),
                "attn_q_norm": (head,),
                "attn_k_norm": (head,),
            }
        else:
            block |= _dense(width, inner)
        if arch == "gemma2":
            block |= {"post_attention_norm": (width,), "post_ffw_norm": (width,)}
    found: Shapes = {"token_embd": (VOCAB, width), "output_norm": (width,)}
    found |= {"position_embd": (1024, width)} if arch == "gpt2" else {}
    for layer in range(layers):
        found |= {f"blk.{layer}.{name}": shape for name, shape in block.items()}
    return found


def write_gguf(
    path: Path,
    arch: str = "llama",
    kind: str = "Q8_0",
    width: int = WIDTH,
    inner: int = WIDTH,
    heads: int = 4,
    kv: int = 2,
    experts: int = 0,
    layers: int = 1,
    extra: Shapes | None = None,
) -> None:
    """Write random matrices in a format of gguf, vectors in float32; bytes at random where gguf cannot quantise."""
    import gguf

    writer: Any = gguf.GGUFWriter(path, arch)
    writer.add_vocab_size(VOCAB)
    writer.add_context_length(64)
    writer.add_embedding_length(width)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_layer_norm_rms_eps(1e-5)
    if arch == "gpt2":
        writer.add_layer_norm_eps(1e-5)
    else:
        writer.add_head_count_kv(kv)
        writer.add_key_length(width // heads)
        writer.add_value_length(width // heads)
        writer.add_rope_freq_base(10000.0)
    if experts:
        writer.add_expert_count(experts)
        writer.add_expert_used_count(2)
        writer.add_expert_feed_forward_length(inner)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"t{i}" for i in range(VOCAB)])
    writer.add_token_merges(["t 0"])
    generator = np.random.default_rng(0)
    asked = gguf.GGMLQuantizationType[kind]
    size, bytes_ = gguf.GGML_QUANT_SIZES[asked]
    for name, shape in (shapes_of(arch, width, inner, heads, kv, experts, layers) | (extra or {})).items():
        values = generator.normal(size=shape).astype(np.float32)
        if len(shape) == 1:
            writer.add_tensor(f"{name}.weight", values)
            if arch == "gpt2":
                writer.add_tensor(f"{name}.bias", generator.normal(size=shape).astype(np.float32))
            continue
        try:
            stored = gguf.quantize(values, asked)
        except NotImplementedError:
            stored = generator.integers(0, 60, (*shape[:-1], shape[-1] // size * bytes_), dtype=np.uint8)  # scales < 1
        writer.add_tensor(f"{name}.weight", stored, raw_dtype=asked)
        if arch == "gpt2" and name.startswith("blk"):
            writer.add_tensor(f"{name}.bias", generator.normal(size=shape[:1]).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

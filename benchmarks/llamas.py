"""Llamas of random weights on random tokens, as files: what benchmarks of sizes run on."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

LLAMAS = {
    "9 M": {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 8, "vocab_size": 4096},
    "24 M": {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 10, "vocab_size": 6144},
    "51 M": {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12, "vocab_size": 8192},
    "93 M": {"hidden_size": 640, "intermediate_size": 2560, "num_hidden_layers": 14, "vocab_size": 10240},
    "347 M": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 20, "vocab_size": 32000},
}  # shapes for random_llama


@contextmanager
def random_llama(shape: dict[str, int], rows: int, length: int) -> Iterator[dict[str, Any]]:
    """Give the configuration of a Llama with seeded weights on random tokens, as files in a temporary directory."""
    import numpy as np
    from transformers import LlamaConfig

    hidden = shape["hidden_size"]
    heads = 4 if hidden >= 48 else 2
    config = LlamaConfig(
        **{
            "num_attention_heads": heads,
            "num_key_value_heads": heads // 2,
            "max_position_embeddings": max(256, length),
            "tie_word_embeddings": True,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "initializer_range": hidden**-0.5,
            "architectures": ["LlamaForCausalLM"],
            **shape,
        }
    )
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        np.save(Path(folder) / "tokens.npy", np.random.default_rng(0).integers(3, shape["vocab_size"], rows * length))
        yield {
            "model": {"source": f"{folder}/config.json"},
            "data": {"source": f"tokens:{folder}/tokens.npy", "sequence_length": length, "sequences": rows},
        }

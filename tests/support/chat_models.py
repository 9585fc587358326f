"""Directories of models whose tokenizer has a chat template."""

from __future__ import annotations

from pathlib import Path

from tests.support.base_model import config_b

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def directory(path: Path, template: str = "") -> Path:
    """A model's directory, without weights, with a byte-level tokenizer of single bytes and its chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", additional_special_tokens=["<|im_start|>"]
    )
    if template:
        fast.chat_template = template
    fast.save_pretrained(path)
    config_b(vocab_size=300, max_position_embeddings=2048).save_pretrained(path)
    return path

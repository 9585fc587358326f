"""Toys of tasks beside causal language models: tiny models as directories, a tokenizer, data, and transformers' own loss."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from tests.support.base_model import edit_config, fill_b
from tests.support.problems import direction

VOCAB = 60
_TEXT = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_ENCODER = {
    **_TEXT,
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "max_position_embeddings": 40,
}
_BART = {**_TEXT, "d_model": 8, "encoder_layers": 2, "decoder_layers": 1, "max_position_embeddings": 40}
_BART |= {f"{part}_{key}": value for part in ("encoder", "decoder") for key, value in {"ffn_dim": 12}.items()}
_BART |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "decoder_start_token_id": 2}
_GPT2 = {**_TEXT, "n_embd": 8, "n_layer": 2, "n_head": 2, "n_positions": 40}
_VIT = {"image_size": 8, "patch_size": 4, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
_RESNET = {"embedding_size": 4, "hidden_sizes": [4, 7], "depths": [1, 2], "layer_type": "basic"}

# name -> (task, configuration class, settings)
TOYS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "roberta": ("sequence-classification", "RobertaConfig", {**_ENCODER, "type_vocab_size": 1, "num_labels": 3}),
    "bert-pairs": ("sequence-classification", "BertConfig", {**_ENCODER, "num_labels": 3}),
    "gpt2": ("sequence-classification", "GPT2Config", {**_GPT2, "num_labels": 3}),
    "regression": ("sequence-classification", "RobertaConfig", {**_ENCODER, "type_vocab_size": 1, "num_labels": 1}),
    "several": (
        "sequence-classification",
        "BertConfig",
        {**_ENCODER, "num_labels": 3, "problem_type": "multi_label_classification"},
    ),
    "masked": ("masked-lm", "RobertaConfig", {**_ENCODER, "type_vocab_size": 1}),
    "masked-bert": ("masked-lm", "BertConfig", _ENCODER),
    "bart": ("seq2seq-lm", "BartConfig", _BART),
    "t5": (
        "seq2seq-lm",
        "T5Config",
        {**_TEXT, "d_model": 8, "d_kv": 4, "d_ff": 12, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0},
    ),
    "resnet": ("image-classification", "ResNetConfig", {**_RESNET, "num_labels": 3}),
    "vit": ("image-classification", "ViTConfig", {**_VIT, "intermediate_size": 12, "num_labels": 3}),
}
VGG = """
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput


class VGGConfig(PretrainedConfig):
    model_type = "own_vgg"

    def __init__(self, widths=(4, 6), num_channels=3, **settings):
        self.widths, self.num_channels = list(widths), num_channels
        super().__init__(**settings)


class VGGForImageClassification(PreTrainedModel):
    config_class = VGGConfig

    def __init__(self, config):
        super().__init__(config)
        layers, before = [], config.num_channels
        for width in config.widths:
            layers += [nn.Conv2d(before, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2)]
            before = width
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(
            nn.Flatten(), nn.Linear(4 * before, 8), nn.ReLU(), nn.Dropout(), nn.Linear(8, config.num_labels)
        )
        self.post_init()

    def forward(self, pixel_values, labels=None):
        logits = self.classifier(self.features(pixel_values))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return ImageClassifierOutput(loss=loss, logits=logits)
"""
AUTO = {
    "sequence-classification": "AutoModelForSequenceClassification",
    "masked-lm": "AutoModelForMaskedLM",
    "seq2seq-lm": "AutoModelForSeq2SeqLM",
    "image-classification": "AutoModelForImageClassification",
}


def save_tokenizer(directory: Path, mask: bool = True) -> Any:
    """Write a tokenizer of words w5 .. w59, with special tokens around texts and pairs of texts; return it."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", "<mask>", "<unk>", *(f"w{k}" for k in range(5, VOCAB))]
    tokenizer = Tokenizer(WordLevel({word: k for k, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B:1 </s>:1", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special, **({"mask_token": "<mask>"} if mask else {}))
    made.save_pretrained(directory)
    return made


def save_toy(directory: Path, name: str) -> nn.Module:
    """Write a toy with its tokenizer; return the model that was saved. Buffers of normalisations are not their defaults."""
    import transformers

    task, kind, settings = TOYS[name]
    config = getattr(transformers, kind)(**settings)
    model = _filled(getattr(transformers, AUTO[task]).from_config(config, attn_implementation="eager"))
    model.save_pretrained(directory)
    if task != "image-classification":
        save_tokenizer(directory)
    return model


def save_vgg(directory: Path) -> nn.Module:
    """Write a small VGG with Python code of its own; return it."""
    space: dict[str, Any] = {"__name__": "modeling_vgg"}
    exec(VGG, space)
    model = _filled(space["VGGForImageClassification"](space["VGGConfig"](num_labels=3)))
    model.save_pretrained(directory)
    (directory / "modeling_vgg.py").write_text(VGG)
    classes = {"AutoConfig": "VGGConfig", "AutoModelForImageClassification": "VGGForImageClassification"}
    edit_config(directory, auto_map={auto: f"modeling_vgg.{name}" for auto, name in classes.items()})
    return model


def _filled(model: Any) -> Any:
    """Give a model weights, and running means and variances, that are not those it starts with."""
    fill_b(model, spread=0.3)
    for buffer_name, buffer in model.named_buffers():
        if buffer_name.endswith("running_mean"):
            buffer.normal_(0.0, 0.1)
        elif buffer_name.endswith("running_var"):
            buffer.uniform_(0.5, 1.5)
    return model


def _sentence(random: np.random.Generator) -> str:
    return " ".join(f"w{k}" for k in random.integers(5, VOCAB, random.integers(2, 8)))


def records(name: str, count: int = 5) -> list[dict[str, Any]]:
    """Return the toy's data: sentences of several lengths, and a label each."""
    random = np.random.default_rng(1)
    label: Callable[[], Any] = {
        "regression": lambda: round(float(random.normal()), 3),
        "several": lambda: random.integers(0, 2, 3).tolist(),
        "bart": lambda: _sentence(random),
        "t5": lambda: _sentence(random),
    }.get(name, lambda: int(random.integers(0, 3)))
    return [{"a": _sentence(random), "b": _sentence(random), "label": label()} for _ in range(count)]


def images(count: int = 5) -> tuple[np.ndarray, np.ndarray]:
    """Return images [count, 3, 8, 8] and their labels."""
    random = np.random.default_rng(1)
    return random.normal(size=(count, 3, 8, 8)).astype(np.float32), random.integers(0, 3, count)


def save_data(path: Path, name: str) -> str:
    """Write the toy's data; return data.source."""
    if TOYS[name][0] == "image-classification":
        pixels, labels = images()
        np.savez(path / "images.npz", pixel_values=pixels, label=labels)
        return f"arrays:{path / 'images.npz'}"
    (path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in records(name)))
    return f"jsonl:{path / 'rows.jsonl'}"


def settings_of(directory: Path, name: str, **changes: Any) -> dict[str, Any]:
    """Return the configuration of products in float64 of a toy that lies in ``directory``; section__key=value changes it."""
    values: dict[str, Any] = {
        "model": {"source": str(directory), "task": TOYS[name][0], "attention": "eager"},
        "data": {"source": save_data(directory, name), "sequence_length": 20, "sequences": 5, "micro_batch": 2},
        "lanczos": {"steps": 3},
        "run": {"out": str(directory / "run"), "report": False},
    }
    values["model"] |= {"master_dtype": "float64", "compute_dtype": "float64"}
    if name in ("bart", "t5"):
        values["data"] |= {"label_column": "label"}
    if TOYS[name][0] != "image-classification":
        values["data"] |= {"text_columns": ["a", "b"] if name == "bert-pairs" else ["a"], "rows": "pad", "text_field": "a"}
    for key, value in changes.items():
        section, _, own = key.partition("__")
        values.setdefault(section, {})[own] = value
    return values


def own_batch(directory: Path, name: str) -> dict[str, torch.Tensor]:
    """Return all of the data as one batch for the model itself, labels included, made by transformers alone."""
    if TOYS[name][0] == "image-classification":
        pixels, labels = images()
        return {"pixel_values": torch.from_numpy(pixels).double(), "labels": torch.from_numpy(labels)}
    from transformers import AutoTokenizer

    tokenizer, rows = AutoTokenizer.from_pretrained(directory), records(name)
    texts = [[row["a"] for row in rows], *([[row["b"] for row in rows]] if name == "bert-pairs" else [])]
    batch = dict(tokenizer(*texts, padding=True, return_tensors="pt"))
    if name != "bert-pairs":
        batch.pop("token_type_ids", None)
    labels = [row["label"] for row in rows]
    if name in ("bart", "t5"):
        ids = tokenizer(text_target=labels, padding=True, return_tensors="pt")["input_ids"]
        batch["labels"] = ids.masked_fill(ids == 0, -100)
    else:
        dtype = torch.float64 if name in ("regression", "several") else torch.int64
        batch["labels"] = torch.tensor(labels, dtype=dtype)
    return batch


def own_loss_and_product(model: nn.Module, batch: dict[str, torch.Tensor]) -> tuple[float, np.ndarray]:
    """Return (loss, H v) by double backward of the loss that transformers' model gives, in float64, parameters sorted."""
    from hpc_hess.model.sharded.precision import honest_casts

    model = model.double()
    named = dict(model.named_parameters())
    chosen = [named[name] for name in sorted(named)]
    with honest_casts(torch.float64):
        loss = model(**batch).loss
    gradients = torch.autograd.grad(loss, chosen, create_graph=True, materialize_grads=True)
    flat = torch.cat([g.reshape(-1) for g in gradients])
    rows = torch.autograd.grad(flat @ direction(flat.numel()), chosen, materialize_grads=True)
    return float(loss.detach()), torch.cat([row.reshape(-1) for row in rows]).numpy()

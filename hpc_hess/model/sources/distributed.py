"""Models in directories of torch.distributed.checkpoint, by the names of Hugging Face or of torchtitan."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hpc_hess.config import ModelSection
from hpc_hess.errors import ModelError
from hpc_hess.intake.directory import DISTRIBUTED as TABLE
from hpc_hess.intake.findings import noted
from hpc_hess.intake.tensors import names as listed
from hpc_hess.model.sources.checkpoint import SafetensorsReader
from hpc_hess.model.sources.distcp import Distributed, read_table
from hpc_hess.model.sources.fingerprint import fingerprint, told
from hpc_hess.model.sources.lazy import Box, Joined, Lazy, Rows
from hpc_hess.model.sources.paths import find_path
from hpc_hess.model.sources.source import Source, read_configuration, tokenizer_of

_EXPORT = (
    "torchtitan writes a Hugging Face directory by `python scripts/checkpoint_conversion/convert_to_hf.py {0} NEW "
    "--hf_assets_path ASSETS --model_name NAME --model_flavor FLAVOR`"
)
_TRAINING = re.compile(  # what trainers save beside a model
    r"(?:^|\.)(?:optim\w*|lr_scheduler\w*|scheduler\w*|train_state|data_?loader\w*|ema(?:_\w+)?|rng\w*)(?:\.|$)"
    r"|^(?:step|epoch)$"
)
_EMBEDDING = "tok_embeddings.weight"  # by which torchtitan's names are known
_INTERLEAVED = ("llama",)  # torchtitan's model rotates neighbours there, and in the others the two halves of a head
_TITAN = ("llama", "qwen3", "qwen3_moe")
_LAYER = r"layers\.(\d+)\."
_TITAN_NAMES = [
    (re.compile(pattern), target)
    for pattern, target in (
        (r"tok_embeddings\.weight", "model.embed_tokens.weight"),
        (r"norm\.weight", "model.norm.weight"),
        (r"(?:output|lm_head)\.weight", "lm_head.weight"),
        (_LAYER + r"attention_norm\.weight", r"model.layers.\1.input_layernorm.weight"),
        (_LAYER + r"ffn_norm\.weight", r"model.layers.\1.post_attention_layernorm.weight"),
        (_LAYER + r"attention\.(?:qkv_linear\.)?w([qkvo])\.(weight|bias)", r"model.layers.\1.self_attn.\2_proj.\3"),
        (_LAYER + r"attention\.([qk])_norm\.weight", r"model.layers.\1.self_attn.\2_norm.weight"),
        (_LAYER + r"feed_forward\.w1\.weight", r"model.layers.\1.mlp.gate_proj.weight"),
        (_LAYER + r"feed_forward\.w2\.weight", r"model.layers.\1.mlp.down_proj.weight"),
        (_LAYER + r"feed_forward\.w3\.weight", r"model.layers.\1.mlp.up_proj.weight"),
        (_LAYER + r"moe\.router\.gate\.weight", r"model.layers.\1.mlp.gate.weight"),
        (_LAYER + r"moe\.(?:\w+\.)*?\w*experts\.w1(?:_\w+)?", r"model.layers.\1.mlp.experts.gate_up_proj"),
        (_LAYER + r"moe\.(?:\w+\.)*?\w*experts\.w3(?:_\w+)?", r"model.layers.\1.mlp.experts.gate_up_proj"),
        (_LAYER + r"moe\.(?:\w+\.)*?\w*experts\.w2(?:_\w+)?", r"model.layers.\1.mlp.experts.down_proj"),
    )
]
_ROTATED = re.compile(r"self_attn\.([qk])_proj\.")


def of_distributed(text: str, section: ModelSection) -> Source | None:
    """Return the source of a directory with .metadata and .distcp files. Raises ModelError."""
    path = find_path(text)
    if path is None or not path.is_dir():
        return None
    if not (path / TABLE).is_file():
        if (path / "config.json").is_file():
            return None
        if steps := sorted(path.glob(f"*/{TABLE}")):
            raise ModelError(
                f"{path} holds {len(steps)} distributed checkpoints: set model.source to one, such as {steps[-1].parent}"
            )
        if any(path.glob("*.distcp")):
            raise ModelError(
                f"{path} holds .distcp files without {TABLE}, which is written last: the checkpoint is not whole, copy it "
                "again or take an earlier one"
            )
        return None
    where = find_path(section.config) if section.config else path
    where = where / "config.json" if where is not None and where.is_dir() else where
    if where is None or not where.is_file():
        what = f"model.config = {section.config} is no config.json" if section.config else f"{path} has no config.json"
        raise ModelError(
            f"{what}, which says what model a distributed checkpoint is of: set model.config to that of the Hugging Face "
            f"model, or export the weights: {_EXPORT.format(path)}"
        )
    hf_config, own_code, code, found = read_configuration(where, section)
    tensors, _ = read_table(path)
    stored = [
        (f"{key}:{tensor.dtype}:{tensor.shape}:{chunk.start}", chunk.path, chunk.offset, chunk.length)
        for key, tensor in tensors.items()
        if not _TRAINING.search(key)
        for chunk in tensor.chunks
    ]
    stored.sort(key=lambda entry: (entry[1], entry[2]))
    print_of = fingerprint("distributed", [told(hf_config)], stored, code)
    return Source("distributed", path.name, path, hf_config, tokenizer_of(where.parent), print_of, None, own_code, found)


def reader(source: Source, section: ModelSection, skeleton: nn.Module) -> SafetensorsReader:
    """Return the reader of a distributed checkpoint, as a ModelSpec names it."""
    tensors, others = read_table(source.path)
    stored, beside = named(tensors, skeleton, source.path)
    opened = SafetensorsReader(_Files(source.path, stored), skeleton, section.unused == "ignore")
    if beside or others:
        opened.findings.append(noted("weights.files", f"not the model's, not read: {listed([*beside, *others])}"))
    return opened


@dataclass(frozen=True)
class Placed:
    """A tensor made of stored ones: what the checks of a checkpoint ask of each, beside its entries."""

    inner: Lazy
    dtype: str
    file: str

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of what is made."""
        return self.inner.shape

    def read(self, box: Box) -> torch.Tensor:
        """Read the box and what it needs."""
        return self.inner.read(box)


class _Files:
    """The files of a checkpoint, as SafetensorsReader takes them."""

    def __init__(self, directory: Path, stored: Mapping[str, Placed]) -> None:
        self.directory, self._stored = directory, dict(stored)
        self.names = tuple(sorted({tensor.file for tensor in stored.values()}))

    def tensors(self) -> dict[str, Placed]:
        return self._stored

    def close(self) -> None:
        self._stored = {}


def named(tensors: Mapping[str, Distributed], skeleton: nn.Module, path: Path) -> tuple[dict[str, Placed], list[str]]:
    """Return the model's tensors by the names of Hugging Face, and the names of tensors that are not the model's.

    A prefix before all of them, such as ``model.``, is taken away. Raises ModelError where no name is the model's.
    """
    known, shortest_first = list(skeleton.state_dict()), sorted(tensors, key=len)
    found = ((key, name) for name in [_EMBEDDING, *known] for key in shortest_first if _ends(key, name))
    key, name = next(found, ("", ""))
    if not key:
        raise ModelError(
            f"{path} holds no tensor by a name of the model ('{known[0]}') or of torchtitan's ('{_EMBEDDING}'), but "
            f"{listed(sorted(tensors))}: check that config.json belongs to it"
        )
    prefix = key.removesuffix(name)
    own = {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix) and not _TRAINING.search(key)}
    beside = [key for key in tensors if not key.startswith(prefix) or _TRAINING.search(key)]
    if name != _EMBEDDING:
        return {name: Placed(tensor, tensor.dtype, tensor.file) for name, tensor in own.items()}, beside
    return _from_titan(own, skeleton.config, path), beside


def _ends(key: str, name: str) -> bool:
    return (key == name or key.endswith(f".{name}")) and not _TRAINING.search(key)


def _from_titan(own: Mapping[str, Distributed], config: Any, path: Path) -> dict[str, Placed]:
    """Return torchtitan's tensors by the names of Hugging Face, rows of rotated projections in its order."""
    kind = config.model_type
    if kind not in _TITAN:
        raise ModelError(
            f"{path} has torchtitan's names, which are read for {', '.join(_TITAN)}, not for {kind}: {_EXPORT.format(path)}"
        )
    parts: dict[str, list[Distributed]] = {}
    for key in sorted(own):  # w1 comes before w3
        parts.setdefault(_hugging_face(key), []).append(own[key])
    found: dict[str, Placed] = {}
    for name, tensors in parts.items():
        made: Lazy = tensors[0] if len(tensors) == 1 else Joined(tensors, 1)
        rotated = _ROTATED.search(name) if kind in _INTERLEAVED else None
        if rotated is not None:
            heads = config.num_attention_heads if rotated[1] == "q" else config.num_key_value_heads
            order = _halves(heads, config.head_dim)
            made = Rows(made, order) if made.shape[0] == len(order) else made  # else its shape is refused later
        found[name] = Placed(made, tensors[0].dtype, tensors[0].file)
    return found


def _hugging_face(key: str) -> str:
    """Return the name that Hugging Face has for one of torchtitan's; others stay."""
    for pattern, target in _TITAN_NAMES:
        if match := pattern.fullmatch(key):
            return match.expand(target)
    return key


def _halves(heads: int, width: int) -> torch.Tensor:
    """Return where, among rows whose rotated pairs are neighbours, the rows lie of which they are half a head apart."""
    within = torch.cat([torch.arange(0, width, 2), torch.arange(1, width, 2)])
    return (torch.arange(heads)[:, None] * width + within).flatten()

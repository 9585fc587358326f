"""The configuration of a PEFT adapter, as adapter_config.json holds it, and one sentence for what is not read."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpc_hess.errors import ModelError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PROMPTS = ("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CPT", "ADAPTION_PROMPT", "CARTRIDGE")
# settings under which the adapted layer computes something else than x W^T + scale x A^T B^T
_VARIANTS = (
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "megatron_config",
    "monteclora_config",
    "target_parameters",
    "trainable_token_indices",
)
_KNOWN = ("use_dora", "use_rslora")
_OTHER_BASES = ("pissa", "olora", "corda", "loftq", "lora_ga")  # these took a part of the base's weights away
_MERGE = "merge it with peft (merge_and_unload, then save_pretrained), and set model.source to the merged model"


@dataclass(frozen=True)
class LoraSettings:
    """What adapter_config.json says of the function: ``ranks`` and ``alphas`` of modules by patterns of their names.

    ``base`` and its ``revision`` as the adapter's author knew them, perhaps "".
    """

    rank: int
    alpha: float
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]
    rank_stabilised: bool
    dora: bool
    ties: bool
    base: str
    revision: str

    def rank_of(self, module: str) -> int:
        """Return the rank of a module's factors."""
        return int(_of(module, self.ranks, self.rank))

    def scale_of(self, module: str) -> float:
        """Return what a module's product of factors is multiplied with."""
        alpha, rank = _of(module, self.alphas, self.alpha), self.rank_of(module)
        return alpha / (math.sqrt(rank) if self.rank_stabilised else rank)


def is_adapter(path: Path) -> bool:
    """Return whether a directory holds an adapter of peft."""
    return (path / CONFIG).is_file()


def read_settings(directory: Path) -> LoraSettings:
    """Return what the adapter of a directory is.

    Raises
    ------
    ModelError : the file cannot be read; another kind of adapter than LoRA and DoRA, or a variant that is not read.

    """
    file = directory / CONFIG
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise TypeError("it should be a table of settings")
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(f"cannot read {file}: {error}") from None
    kind = str(values.get("peft_type"))
    if kind in _PROMPTS:
        raise ModelError(
            f"{directory} is a PEFT adapter of type {kind}, which adds tokens and changes no weights: only LoRA is read"
        )
    if kind != "LORA":
        raise ModelError(f"{directory} is a PEFT adapter of type {kind}, and only LoRA is read: {_MERGE}")
    variants = [key for key in values if key in _VARIANTS or (key.startswith("use_") and key not in _KNOWN)]
    if found := next((key for key in variants if values[key]), None):
        raise ModelError(f"{file} sets {found}, a variant of LoRA that is not read: {_MERGE}")
    start = str(values.get("init_lora_weights"))
    if start.startswith(_OTHER_BASES):
        raise ModelError(
            f"{file} has init_lora_weights = '{start}', so its base is not the released one: save it as plain LoRA "
            "(path_initial_model_for_weight_conversion of save_pretrained), or merge it with peft"
        )
    return _settings(values, file)


def require_weights(directory: Path) -> None:
    """Raise ModelError where the adapter's safetensors file is missing."""
    if (directory / WEIGHTS).is_file():
        return
    if (pickle := directory / "adapter_model.bin").is_file():
        raise ModelError(
            f"{pickle} holds a pickled adapter, which can run code when opened: load it with peft where you trust it, and "
            f"save it again (save_pretrained writes {WEIGHTS})"
        )
    raise ModelError(f"{directory} has {CONFIG} but no {WEIGHTS}: the download, or the training, did not finish")


def _settings(values: Mapping[str, Any], file: Path) -> LoraSettings:
    def table(key: str) -> dict[str, Any]:
        found = values.get(key) or {}
        if not isinstance(found, dict) or not all(_is_number(value) for value in found.values()):
            raise ModelError(f"{file} has {key} = {found!r}, which should give a number for each pattern: correct it")
        for pattern in found:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ModelError(f"{file} has the pattern '{pattern}' in {key} ({error}): correct it") from None
        return found

    rank, alpha = values.get("r", 8), values.get("lora_alpha", 8)
    for key, value in (("r", rank), ("lora_alpha", alpha)):
        if not _is_number(value) or (key == "r" and value < 1):
            raise ModelError(f"{file} has {key} = {value!r}, which should be a positive number: correct it")
    return LoraSettings(
        rank,
        alpha,
        table("rank_pattern"),
        table("alpha_pattern"),
        bool(values.get("use_rslora")),
        bool(values.get("use_dora")),
        bool(values.get("ensure_weight_tying")),
        str(values.get("base_model_name_or_path") or ""),
        str(values.get("revision") or ""),
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _of(module: str, patterns: Mapping[str, float], default: float) -> float:
    """Return the value of the first pattern that fits the module's name, or its end after a dot, as peft does."""
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), default)

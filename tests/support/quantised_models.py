"""Quantised checkpoints of toys, made by transformers' own code where it has some, and what it loads of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.support.toys import toy_config

Tensors = dict[str, torch.Tensor]


def save(name: str, path: Path, declared: dict[str, Any] | None, change: Callable[[Tensors], Tensors], **sizes: int) -> None:
    """Save a toy, its tensors changed, and what its configuration declares of them."""
    from transformers import AutoModelForCausalLM

    config = toy_config(name)
    for key, value in sizes.items():
        setattr(config, key, value)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    rewrite(path, change)
    declare(path, declared)


def rewrite(path: Path, change: Callable[[Tensors], Tensors]) -> None:
    """Replace the tensors of model.safetensors."""
    file = path / "model.safetensors"
    save_file({k: v.contiguous() for k, v in change(load_file(file)).items()}, file, metadata={"format": "pt"})


def declare(path: Path, declared: dict[str, Any] | None) -> None:
    """Write quantization_config into config.json; None takes it away."""
    values = json.loads((path / "config.json").read_text())
    values.pop("quantization_config", None)
    (path / "config.json").write_text(json.dumps(values | ({"quantization_config": declared} if declared else {})))


def save_mxfp4(path: Path) -> None:
    """Save the GPT-OSS toy with random blocks and scales: every value of 4 bits, powers of two from 2^-27 to 2^12."""

    def change(old: Tensors) -> Tensors:
        generator = torch.Generator().manual_seed(1)
        for key in [key for key in old if key.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
            experts, rows, columns = old.pop(key).shape
            shape = (experts, columns, rows // 32)
            old[f"{key}_blocks"] = torch.randint(0, 256, (*shape, 16), generator=generator, dtype=torch.uint8)
            old[f"{key}_scales"] = torch.randint(100, 140, shape, generator=generator, dtype=torch.uint8)
        return old

    save("gpt_oss", path, {"quant_method": "mxfp4"}, change, hidden_size=64, intermediate_size=96)


def fp8_config(block: tuple[int, int] | None) -> dict[str, Any]:
    return {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": list(block) if block else None}


def to_fp8(block: tuple[int, int] | None, scale_fmt: str = "float") -> Callable[[Tensors], Tensors]:
    """Return the change that quantises every projection, by transformers where its blocks fill the shape."""
    from transformers import FineGrainedFP8Config
    from transformers.integrations.finegrained_fp8 import Fp8Quantize

    size = block or (128, 128)
    settings = SimpleNamespace(quantization_config=FineGrainedFP8Config(weight_block_size=size, scale_fmt=scale_fmt))

    def one(key: str, tensor: torch.Tensor) -> Tensors:
        made: Tensors = {}
        if block is not None:
            made = Fp8Quantize(settings)._quantize_one(key, tensor)
        if len(made) == 2:
            return made
        rows, columns = tensor.shape
        height, width = block or (rows, columns)
        grid = torch.zeros(-(-rows // height), -(-columns // width))
        quantised = torch.empty(tensor.shape, dtype=torch.float8_e4m3fn)
        for i in range(grid.shape[0]):
            for j in range(grid.shape[1]):
                place = slice(i * height, (i + 1) * height), slice(j * width, (j + 1) * width)
                grid[i, j] = tensor[place].abs().max() / 448.0
                quantised[place] = (tensor[place] / grid[i, j]).to(torch.float8_e4m3fn)
        return {key: quantised, f"{key}_scale_inv": grid if block else grid.reshape(())}

    def change(old: Tensors) -> Tensors:
        found: Tensors = {}
        for key, tensor in old.items():
            found |= one(key, tensor.float()) if key.endswith("proj.weight") else {key: tensor}
        return found

    return change


def compressed_config(kind: str, strategy: str, **weights: Any) -> dict[str, Any]:
    """Return what compressed-tensors writes for 8 bits: ``kind`` float or int."""
    scheme = {"num_bits": 8, "type": kind, "strategy": strategy, "symmetric": True, "dynamic": False, **weights}
    group = {"targets": ["Linear"], "weights": scheme, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": f"{kind}-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
    }


def to_compressed(kind: str, strategy: str, dtype: torch.dtype, group: int = 8) -> Callable[[Tensors], Tensors]:
    """Return the change that quantises every projection with scales in ``dtype``."""
    stored, most = (torch.float8_e4m3fn, 448.0) if kind == "float" else (torch.int8, 127.0)

    def change(old: Tensors) -> Tensors:
        found: Tensors = {}
        for key, tensor in old.items():
            found[key] = tensor
            if not key.endswith("proj.weight"):
                continue
            if strategy == "tensor":
                scale = tensor.abs().max().reshape(1) / most
                full = scale
            else:
                width = tensor.shape[1] if strategy == "channel" else group
                scale = tensor.unflatten(1, (-1, width)).abs().amax(2) / most
                full = scale.repeat_interleave(width, 1)
            ratio = tensor / full
            found[key] = (ratio if kind == "float" else ratio.round()).clamp(-most, most).to(stored)
            found[f"{key}_scale"] = scale.to(dtype)
        return found

    return change


def loaded(path: Path, how: Any) -> Tensors:
    """Return the parameters that from_pretrained makes when it dequantises as ``how`` says."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        path, quantization_config=how, dtype=torch.float32, attn_implementation="eager"
    )
    return {name: parameter.detach() for name, parameter in model.named_parameters()}

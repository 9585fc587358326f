"""Toys with PEFT adapters: the cases, and what peft itself makes of them, kept in tests/formats/peft.

    python -m tests.support.adapters tests/formats/peft

writes the cases again; it needs peft (0.21.2 wrote those that are there).
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

Tensors = dict[str, torch.Tensor]

KEPT = Path(__file__).parents[1] / "formats" / "peft"
_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
_LLAMA = {
    "model_type": "llama",
    "vocab_size": 32,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "max_position_embeddings": 32,
    "pad_token_id": None,
    "use_cache": False,
}
_GPT2 = {"model_type": "gpt2", "vocab_size": 32, "n_embd": 8, "n_layer": 2, "n_head": 2, "n_positions": 32}
_TOKENS = {"bos_token_id": 1, "eos_token_id": 2}
# case -> configuration of the base, settings of peft.LoraConfig
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "patterns": (
        _LLAMA | {"tie_word_embeddings": False},
        {
            "r": 4,
            "lora_alpha": 6,
            "use_rslora": True,
            "target_modules": _LINEAR,
            "rank_pattern": {"o_proj": 2, r"layers\.1\.mlp\..*": 3},
            "alpha_pattern": {"q_proj": 5},
            "layers_to_transform": [1],
            "modules_to_save": ["lm_head"],
        },
    ),
    "tied": (
        _GPT2,
        {"r": 2, "lora_alpha": 3, "target_modules": ["c_attn", "c_proj", "c_fc", "wte"], "fan_in_fan_out": True},
    ),
    "dora": (_LLAMA | {"tie_word_embeddings": True}, {"r": 3, "lora_alpha": 4, "target_modules": _LINEAR, "use_dora": True}),
    "dora-gpt2": (
        _GPT2,
        {"r": 2, "lora_alpha": 3, "target_modules": ["c_attn", "c_fc"], "use_dora": True, "fan_in_fan_out": True},
    ),
    "biases": (
        _LLAMA | {"tie_word_embeddings": False, "attention_bias": True},
        {"r": 2, "lora_alpha": 3, "target_modules": ["q_proj", "o_proj"], "lora_bias": True, "bias": "lora_only"},
    ),
}
PRODUCTS = ("patterns", "tied", "biases")  # peft leaves derivatives of DoRA's lengths out


def base_model(path: Path, dtype: torch.dtype = torch.float32) -> Any:
    """Return the base of a case as transformers loads it."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="eager").eval()


def ids() -> torch.Tensor:
    """Return the data of every case, int64 (3, 10)."""
    return torch.randint(3, 32, (3, 10), generator=torch.Generator().manual_seed(7))


def loss_of(model: Any) -> torch.Tensor:
    """Return the mean token loss of the data; in float64 all the way for a model of that type."""
    from hpc_hess.model.sharded.precision import honest_casts

    with honest_casts(next(model.parameters()).dtype):
        logits = model(input_ids=ids(), use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids()[:, 1:].flatten())


def product_of(loss: torch.Tensor, leaves: list[torch.Tensor]) -> torch.Tensor:
    """Return H v by double backward for a fixed v, flat in the order of ``leaves``."""
    gradients = torch.autograd.grad(loss, leaves, create_graph=True)
    flat = torch.cat([g.reshape(-1) for g in gradients])
    rows = torch.autograd.grad(flat @ direction(flat.numel()), leaves)
    return torch.cat([row.reshape(-1) for row in rows])


def direction(size: int) -> torch.Tensor:
    """Return the vector of all products, float64 (size,)."""
    return torch.randn(size, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def fill(parameters: Any, seed: int, spread: float = 0.3) -> None:
    """Give parameters random values, vectors a little beside their start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(spread * noise if parameter.ndim > 1 else parameter + 0.1 * noise)


def save_base(path: Path, values: dict[str, Any]) -> Any:
    """Save a base with random weights; return it."""
    from transformers import AutoConfig, AutoModelForCausalLM

    kind = AutoConfig.for_model(model_type=values["model_type"])
    model = AutoModelForCausalLM.from_config(type(kind)(**{**_TOKENS, **values}), attn_implementation="eager").eval()
    fill(model.parameters(), 1)
    model.save_pretrained(path)
    return model


def peft_model(base: Any, adapter: Path) -> Any:
    """Return the base with the adapter by peft itself, its adapter trainable."""
    from peft import PeftModel

    return PeftModel.from_pretrained(base, adapter, is_trainable=True).eval()


def plain_name(name: str) -> str:
    """Return our name of one of peft's parameters."""
    return name.removeprefix("base_model.model.").replace(".modules_to_save.default", "")


def merged_by_peft(base: Path, adapter: Path, dtype: torch.dtype) -> Tensors:
    """Return the parameters that merge_and_unload changes; those that are tied in the base only where they were meant."""
    model = base_model(base, dtype)
    before = {name: p.detach().clone() for name, p in model.named_parameters(remove_duplicate=False)}
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):  # merging would write into both
        owner, _, key = name.rpartition(".")
        setattr(model.get_submodule(owner), key, nn.Parameter(parameter.detach().clone()))
    merged = peft_model(model, adapter).merge_and_unload()
    after = {name: p.detach() for name, p in merged.named_parameters(remove_duplicate=False)}
    assert after.keys() == before.keys()
    return {name: p for name, p in after.items() if not torch.equal(p, before[name])}


def product_by_peft(base: Path, adapter: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the loss and H v over what the adapter trained, by double backward through peft's layers in float64."""
    model = peft_model(base_model(base, torch.float64), adapter).double()
    leaves = {plain_name(name): p for name, p in model.named_parameters() if p.requires_grad}
    loss = loss_of(model)
    return loss.detach(), product_of(loss, [leaves[name] for name in sorted(leaves)])


def write(folder: Path, name: str) -> None:
    """Write a case: base, adapter, and what peft makes of them."""
    from peft import LoraConfig, get_peft_model

    values, settings = CASES[name]
    base, adapter = folder / "base", folder / "adapter"
    save_base(base, values)
    model = get_peft_model(base_model(base), LoraConfig(task_type="CAUSAL_LM", **settings))
    fill((p for _, p in sorted(model.named_parameters()) if p.requires_grad), 2)
    model.save_pretrained(adapter)
    edit_settings(adapter, base_model_name_or_path=None)
    (adapter / "README.md").unlink(missing_ok=True)
    (base / "generation_config.json").unlink(missing_ok=True)
    expected = {f"float32.{k}": v for k, v in merged_by_peft(base, adapter, torch.float32).items()}
    expected |= {f"float64.{k}": v for k, v in merged_by_peft(base, adapter, torch.float64).items()}
    expected["loss"] = loss_of(peft_model(base_model(base, torch.float64), adapter).double()).detach()
    if name in PRODUCTS:
        expected["product"] = product_by_peft(base, adapter)[1]
    save_file({k: v.contiguous() for k, v in expected.items()}, folder / "expected.safetensors")


def edit_settings(adapter: Path, **changes: Any) -> None:
    """Change keys of adapter_config.json."""
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes, indent=1, sort_keys=True) + "\n")


def edit_tensors(adapter: Path, change: Any) -> None:
    """Replace the tensors of adapter_model.safetensors by ``change`` of them."""
    file = adapter / "adapter_model.safetensors"
    save_file({k: v.contiguous() for k, v in change(load_file(file)).items()}, file, metadata={"format": "pt"})


def copy_case(name: str, to: Path) -> tuple[Path, Path]:
    """Copy a kept case; return its base and its adapter."""
    shutil.copytree(KEPT / name, to)
    return to / "base", to / "adapter"


def expected(name: str) -> Tensors:
    """Return what peft made of a kept case."""
    return load_file(KEPT / name / "expected.safetensors")


if __name__ == "__main__":
    for each in CASES:
        shutil.rmtree(Path(sys.argv[1]) / each, ignore_errors=True)
        write(Path(sys.argv[1]) / each, each)

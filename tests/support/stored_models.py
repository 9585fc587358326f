"""What the tests of weights and sources share: models on disk, loaded as the program does and as transformers does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor

from hpc_hess.commands.run.work import run
from hpc_hess.config import ModelSection, make_config
from hpc_hess.model.sharded.skeleton import build_skeleton
from hpc_hess.model.sources.source import Source, resolve_source
from hpc_hess.model.sources.weights import WeightReader, fill, open_reader
from hpc_hess.parallel.world import World
from tests.support.base_model import config_b, edit_config, ids_b, model_b, result_of, save_b, settings_b, tokens_b


def go(model: Path, folder: Path, world: World, **changes: Any) -> dict[str, Any]:
    """Run the program on a model directory; return its result."""
    out = folder / "run"
    assert run(make_config(settings_b(model, tokens_b(folder / "tokens.npy"), out, **changes)), world) == 0
    return result_of(out)


def load(path: Path, **settings: Any) -> tuple[torch.nn.Module, WeightReader, Source]:
    """Load a model as the program does, into one process."""
    section = ModelSection(source=str(path), attention="eager", **settings)
    source = resolve_source(section)
    skeleton = build_skeleton(source, section)
    reader = open_reader(source, section, skeleton)
    for module in skeleton.modules():
        for parameter in module._parameters.values():
            if parameter is not None and parameter.is_meta:
                torch.utils.swap_tensors(parameter, torch.nn.Parameter(torch.empty(parameter.shape)))
    fill(skeleton, reader)
    return skeleton, reader, source


def whole_parameters(module: torch.nn.Module) -> dict[str, np.ndarray]:
    """Return every parameter of a sharded model, gathered. Collective: yes."""
    found = {n: p.full_tensor() if isinstance(p, DTensor) else p for n, p in module.named_parameters()}
    return {name: tensor.detach().numpy() for name, tensor in found.items()}


def loss_of(path: Path, **settings: Any) -> float:
    """Return the loss of B's data."""
    module, _, _ = load(path, **settings)
    with torch.no_grad():
        logits = module(input_ids=ids_b(), use_cache=False).logits
    return float(torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids_b()[:, 1:].flatten()))


def rewrite(path: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    """Replace the tensors of model.safetensors."""
    file = path / "model.safetensors"
    save_file({k: v.contiguous() for k, v in change(load_file(file)).items()}, file, metadata={"format": "pt"})


def findings(result: dict[str, Any], check: str) -> list[str]:
    return [found["text"] for found in result["intake"] if found["check"] == check]


def reference(path: Path) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")


def scaled(weights: dict[str, torch.Tensor], dtype: torch.dtype, suffix: str) -> dict[str, torch.Tensor]:
    """Quantise every projection as FP8 checkpoints do: W / s beside s."""
    found = {}
    for name, tensor in weights.items():
        found[name] = tensor
        if name.endswith("proj.weight"):
            most = 448.0 if dtype.is_floating_point else 127.0
            scale = tensor.abs().max() / most
            found[name], found[name + suffix] = (tensor / scale).to(dtype), scale.reshape(1)
    return found


def save_biased(path: Path) -> Any:
    """Save B with biases everywhere; return it."""
    model = model_b(attention_bias=True, mlp_bias=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0.0, 0.3)
    model.save_pretrained(path)
    return model


def dense_loss(model: Any) -> torch.Tensor:
    with torch.no_grad():
        logits = model(input_ids=ids_b(), use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids_b()[:, 1:].flatten())


def own_model(path: Path, model_type: str = "mine") -> None:
    """Write a directory whose model is its own code: B by another name."""
    save_b(path)
    (path / "configuration_mine.py").write_text(
        f"from transformers import LlamaConfig\nclass MineConfig(LlamaConfig):\n    model_type = '{model_type}'\n"
    )
    (path / "modeling_mine.py").write_text(
        "from transformers import LlamaForCausalLM\nfrom .configuration_mine import MineConfig\nfrom .part import SCALE\n"
        "class MineForCausalLM(LlamaForCausalLM):\n    config_class = MineConfig\n"
    )
    (path / "part.py").write_text("SCALE = 1\n")
    edit_config(
        path,
        model_type=model_type,
        auto_map={"AutoConfig": "configuration_mine.MineConfig", "AutoModelForCausalLM": "modeling_mine.MineForCausalLM"},
    )


def save_wide(path: Path) -> None:
    """Save the 6 MB model: a change in its middle is in neither end of the file."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(
        config_b(hidden_size=48, intermediate_size=1792, num_hidden_layers=6, pad_token_id=None)
    ).save_pretrained(path)


def double(path: Path, name: str = "model.layers.2.mlp.down_proj.weight") -> None:
    """Double one tensor in place."""
    rewrite(path, lambda old: old | {name: 2 * old[name]})

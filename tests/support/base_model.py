"""Base model B of the faults, its data, the ends of its spectrum, and the program run on it as a command."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import nn
from torch.nn.functional import cross_entropy

from tests.support.launching import ROOT, environment

LOSS_B, LOWEST_B, HIGHEST_B = 4.5985064, -14.8665, 36.4585  # of model_b() on tokens_b(), by double backward in float64


def config_b(**changes: Any) -> Any:
    """Return the configuration of B."""
    from transformers import LlamaConfig

    settings: dict[str, Any] = {
        "vocab_size": 96,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "use_cache": False,
    }
    return LlamaConfig(**{**settings, **changes})


def fill_b(model: nn.Module, seed: int = 0, spread: float = 0.1) -> nn.Module:
    """Give a model B's weights: matrices normal, vectors a little beside their start."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, spread)
            else:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def model_b(seed: int = 0, **changes: Any) -> Any:
    """Return B itself, float32, eager attention."""
    from transformers import AutoModelForCausalLM

    return fill_b(AutoModelForCausalLM.from_config(config_b(**changes), attn_implementation="eager"), seed)


def save_b(path: Path, seed: int = 0, **options: Any) -> Any:
    """Save B as a Hugging Face directory; return it."""
    model = model_b(seed)
    model.save_pretrained(path, **options)
    return model


def ids_b() -> torch.Tensor:
    """Return B's data: 3 rows of 10 ids."""
    return torch.from_numpy(np.random.default_rng(0).integers(3, 96, 30)).view(3, 10)


def tokens_b(path: Path) -> Path:
    """Write B's data as one stream of tokens."""
    np.save(path, ids_b().reshape(-1).numpy())
    return path


def edit_config(directory: Path, **changes: Any) -> None:
    """Change keys of a config.json; None removes one."""
    path = directory / "config.json"
    values = json.loads(path.read_text())
    for key, value in changes.items():
        values[key] = value
        if value is None:
            del values[key]
    path.write_text(json.dumps(values))


def settings_b(model: Path, tokens: Path, out: Path, **changes: Any) -> dict[str, Any]:
    """Return the configuration of a small run of B; ``changes`` are section__key=value."""
    values: dict[str, Any] = {
        "model": {"source": str(model)},
        "data": {"source": f"tokens:{tokens}", "sequence_length": 10, "sequences": 3},
        "lanczos": {"steps": 20, "probes": 1},
        "run": {"out": str(out), "report": False},
    }
    for name, value in changes.items():
        section, key = name.split("__")
        values.setdefault(section, {})[key] = value
    return values


def result_of(out: Path) -> dict[str, Any]:
    return dict(json.loads((out / "result.json").read_text()))


def command(*arguments: str | Path, timeout_s: float = 240, **variables: str) -> tuple[int, str]:
    """Run ``python -m hpc_hess ARGUMENTS`` as one process; return (exit code, everything it printed)."""
    done = subprocess.run(
        [sys.executable, "-m", "hpc_hess", *map(str, arguments)],
        cwd=ROOT,
        env=environment(**variables),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=timeout_s,
        check=False,
    )
    return done.returncode, done.stdout.decode("utf-8", "replace")


def write_config(path: Path, values: dict[str, Any]) -> Path:
    """Write a configuration file."""
    import tomli_w

    path.write_text(tomli_w.dumps(values))
    return path


def extremes(model: nn.Module, ids: torch.Tensor | None = None) -> tuple[float, np.ndarray]:
    """Return (loss, lowest and highest eigenvalue) of the mean token loss in float64, by ARPACK on double backward."""
    model = model.double()
    ids = ids_b() if ids is None else ids
    parameters = list(model.parameters())
    logits = model(input_ids=ids, use_cache=False).logits
    loss = cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    gradients = torch.autograd.grad(loss, parameters, create_graph=True, materialize_grads=True)
    flat = torch.cat([g.reshape(-1) for g in gradients])

    def product(v: np.ndarray) -> np.ndarray:
        along = flat @ torch.from_numpy(v.reshape(-1))
        rows = torch.autograd.grad(along, parameters, retain_graph=True, materialize_grads=True)
        return torch.cat([row.reshape(-1) for row in rows]).numpy()

    size = flat.numel()
    operator = LinearOperator((size, size), matvec=product, dtype=np.float64)
    start = np.random.default_rng(0).standard_normal(size)
    return float(loss.detach()), np.sort(eigsh(operator, 2, which="BE", tol=1e-6, v0=start, return_eigenvectors=False))


def encoder(**changes: Any) -> Any:
    """Return a tiny BERT with a head of a language model, float64, whose tokens see their targets; in training mode."""
    from transformers import BertConfig, BertLMHeadModel

    sizes = {"vocab_size": 96, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    config = BertConfig(**sizes, num_attention_heads=2, max_position_embeddings=64, **changes)
    config._attn_implementation = "eager"
    return fill_b(BertLMHeadModel(config), spread=0.1).double().train()

"""Hessians of models with PEFT adapters: over the adapter's factors, and over the merged weights; alone and on two ranks."""

from __future__ import annotations

import html
import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.func import functional_call

from hpc_hess.commands.arguments import Training
from hpc_hess.commands.finetune.work import finetune
from hpc_hess.commands.run.work import run
from hpc_hess.config import make_config
from hpc_hess.errors import ConfigError, StoreError
from hpc_hess.parallel.world import World
from tests.support.adapters import CASES, KEPT, PRODUCTS, base_model, expected, ids, loss_of, product_by_peft, product_of
from tests.support.base_model import result_of
from tests.support.problems import assert_right, dense_product, products, settings_of
from tests.support.spawn import run_ranks

pytestmark = pytest.mark.slow


def settings(name: str, folder: Path, **changes: Any) -> dict[str, Any]:
    """Return the configuration of products of a kept case in float64."""
    tokens = folder / "tokens.npy"
    np.save(tokens, ids().reshape(-1).numpy())
    changes["model__base"] = str(KEPT / name / "base")
    return settings_of(KEPT / name / "adapter", tokens, **changes)


def answers(values: dict[str, Any], ranks: int) -> list[dict[str, Any]]:
    return [products(World.alone(), values)] if ranks == 1 else run_ranks(products, ranks, values)


def by_formula(name: str) -> tuple[float, np.ndarray]:
    """Return (loss, H v) over a case's factors: double backward through the base at weights made of them, in float64."""
    stored = load_file(KEPT / name / "adapter" / "adapter_model.safetensors")
    values = {k.removeprefix("base_model.model."): v.double().requires_grad_() for k, v in stored.items()}
    model = base_model(KEPT / name / "base", torch.float64)
    transposed = CASES[name][1].get("fan_in_fan_out", False)
    scale = CASES[name][1]["lora_alpha"] / CASES[name][1]["r"]
    weights, leaves = {}, {}
    for key in values:
        module, _, rest = key.partition(".lora_")
        leaves[f"{module}.lora_{rest.split('.')[0]}.default.weight"] = values[key]
        if rest == "A.weight":
            weight = model.get_parameter(f"{module}.weight").detach()
            weight = (weight.T if transposed else weight) + scale * values[f"{module}.lora_B.weight"] @ values[key]
            weight = weight * (values[f"{module}.lora_magnitude_vector"] / weight.norm(dim=1))[:, None]
            weights[f"{module}.weight"] = weight.T if transposed else weight

    class Merged:
        parameters = model.parameters

        def __call__(self, **inputs: Any) -> Any:
            return functional_call(model, weights, kwargs=inputs)

    loss = loss_of(Merged())
    return float(loss.detach()), product_of(loss, [leaves[key] for key in sorted(leaves)]).numpy()


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("name", PRODUCTS)
def test_the_hessian_over_the_factors_is_that_through_peft(name: str, ranks: int, tmp_path: Path) -> None:
    found = answers(settings(name, tmp_path, model__adapter="factors"), ranks)
    assert_right(found, float(expected(name)["loss"]), expected(name)["product"].numpy())
    stored = load_file(KEPT / name / "adapter" / "adapter_model.safetensors")
    assert found[0]["size"] == sum(v.numel() for k, v in stored.items() if "base_layer.weight" not in k)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("name", ["dora", "dora-gpt2"])
def test_lengths_of_dora_have_their_derivatives(name: str, ranks: int, tmp_path: Path) -> None:
    loss, product = by_formula(name)
    assert abs(loss - float(expected(name)["loss"])) < 1e-9
    found = answers(settings(name, tmp_path, model__adapter="factors"), ranks)
    assert_right(found, loss, product)
    assert any("which training by peft leaves out" in finding["text"] for finding in found[0]["intake"])


@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is not installed")
@pytest.mark.parametrize("name", PRODUCTS)
def test_the_peft_that_is_installed_gives_the_kept_products(name: str) -> None:
    loss, product = product_by_peft(KEPT / name / "base", KEPT / name / "adapter")
    assert torch.allclose(loss, expected(name)["loss"], rtol=1e-12)
    assert torch.allclose(product, expected(name)["product"], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("name", ["patterns", "tied", "dora"])
def test_the_hessian_of_the_merged_model(name: str, ranks: int, tmp_path: Path) -> None:
    model = base_model(KEPT / name / "base", torch.float64)
    with torch.no_grad():
        for key, value in expected(name).items():
            if key.startswith("float64."):
                owner, _, last = key.removeprefix("float64.").rpartition(".")
                setattr(model.get_submodule(owner), last, torch.nn.Parameter(value.clone()))
    loss, product = dense_product(model, ids())
    assert abs(loss - float(expected(name)["loss"])) < 1e-9
    assert_right(answers(settings(name, tmp_path), ranks), loss, product)


def test_a_part_of_the_factors(tmp_path: Path) -> None:
    """Patterns choose among what the adapter trained; the whole parameter beside the factors costs no vector then."""
    values = settings("patterns", tmp_path, model__adapter="factors", parameters__include=["*lora*"])
    found = products(World.alone(), values)
    stored = load_file(KEPT / "patterns" / "adapter" / "adapter_model.safetensors")
    assert found["size"] == sum(v.numel() for k, v in stored.items() if "lora_" in k)


@pytest.mark.parametrize("what", ["merge", "factors"])
def test_a_run_says_what_the_model_is(what: str, tmp_path: Path, world: World) -> None:
    own = {"model__adapter": what, "lanczos__steps": 3, "run__out": str(tmp_path / "run"), "run__report": True}
    values = settings("patterns", tmp_path, operator__method="exact", **own)
    assert run(make_config(values), world) == 0
    found = result_of(tmp_path / "run")
    assert (found["model"]["kind"], found["model"]["name"], found["model"]["base"]) == ("adapter", "adapter", "base")
    assert found["model"]["adapter"] == what
    (said,) = [entry["text"] for entry in found["intake"] if entry["check"] == "model.adapter"]
    assert said.startswith("adapter (LoRA, 7 modules, ranks 2 to 4) with 1 whole parameter")
    assert ("is merged into its base" in said) == (what == "merge")
    assert said in html.unescape((tmp_path / "run" / "report.html").read_text())
    if what == "factors":
        assert found["num_params"] < found["num_params_model"] / 2
    assert run(make_config(values), world) == 0  # the directory is gone on with
    other = json.loads(json.dumps(values))
    other["model"]["adapter"] = {"merge": "factors", "factors": "merge"}[what]
    with pytest.raises(StoreError, match=f"holds a run with model.adapter = '{what}'"):
        run(make_config(other), world)
    assert result_of(tmp_path / "run") == found


def test_training_of_factors_is_refused(tmp_path: Path, world: World) -> None:
    config = make_config(settings("patterns", tmp_path, model__adapter="factors"))
    with pytest.raises(ConfigError, match="training writes whole models: set model.adapter = 'merge'"):
        finetune(config, world, Training(tmp_path / "trained", steps=1))

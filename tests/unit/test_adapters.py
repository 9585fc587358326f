"""PEFT adapters on their bases: merged weights against peft's own, what tells them apart, what is refused."""

from __future__ import annotations

import importlib.util
import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from hpc_hess.config import ModelSection
from hpc_hess.errors import ModelError
from hpc_hess.model.sharded.skeleton import build_skeleton
from hpc_hess.model.sources import adapted
from hpc_hess.model.sources.source import resolve_source
from hpc_hess.model.sources.weights import WeightReader, open_reader
from tests.support.adapters import (
    CASES,
    KEPT,
    base_model,
    copy_case,
    edit_settings,
    edit_tensors,
    expected,
    merged_by_peft,
    write,
)
from tests.support.base_model import edit_config
from tests.support.stored_models import rewrite

WEIGHTS = "adapter_model.safetensors"
Q0 = "base_model.model.model.layers.1.self_attn.q_proj"


def section(base: Path, lora: Path, **settings: Any) -> ModelSection:
    return ModelSection(source=str(lora), base=str(base), attention="eager", **settings)


def opened(base: Path, lora: Path, **settings: Any) -> tuple[torch.nn.Module, WeightReader]:
    chosen = section(base, lora, **settings)
    source = resolve_source(chosen)
    skeleton = build_skeleton(source, chosen)
    return skeleton, open_reader(source, chosen, skeleton)


def assert_merged(base: Path, adapter: Path, wanted: dict[str, torch.Tensor], dtype: str) -> None:
    """Compare the whole and uneven slices of every parameter, along every dimension."""
    skeleton, reader = opened(base, adapter, master_dtype=dtype)
    plain = dict(base_model(base, getattr(torch, dtype)).named_parameters(remove_duplicate=False))
    named = dict(skeleton.named_parameters())
    assert wanted
    assert set(wanted) <= named.keys()
    for name, parameter in named.items():
        whole = wanted.get(name, plain[name].detach())
        tolerance = 1e-14 if dtype == "float64" else 3e-7
        for dim, extent in enumerate(parameter.shape):
            for low, high in [(0, extent), *itertools.pairwise(sorted({0, 1, extent // 3, extent // 2 + 1, extent}))]:
                found = reader.read(name, dim, low, high).to(whole.dtype)
                right = whole.narrow(dim, low, high - low)
                assert found.shape == right.shape
                assert (found - right).abs().max() <= tolerance * whole.abs().max(), (name, dim, low, high)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", CASES)
def test_merged_weights_are_those_of_peft(name: str, dtype: str) -> None:
    wanted = {k.removeprefix(f"{dtype}."): v for k, v in expected(name).items() if k.startswith(dtype)}
    assert_merged(KEPT / name / "base", KEPT / name / "adapter", wanted, dtype)


@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is not installed")
@pytest.mark.parametrize("name", CASES)
def test_the_peft_that_is_installed_merges_as_the_kept_one(name: str, tmp_path: Path) -> None:
    write(tmp_path, name)
    for dtype in ("float32", "float64"):
        wanted = merged_by_peft(tmp_path / "base", tmp_path / "adapter", getattr(torch, dtype))
        assert_merged(tmp_path / "base", tmp_path / "adapter", wanted, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_formula(dtype: torch.dtype) -> None:
    """W + alpha / sqrt(r) B A, to the bit, by the patterns of names; layer 0 is left alone."""
    place = KEPT / "patterns"
    _, reader = opened(place / "base", place / "adapter", master_dtype=str(dtype).removeprefix("torch."))
    base, factors = (load_file(place / f) for f in ("base/model.safetensors", f"adapter/{WEIGHTS}"))
    for module, alpha, rank in (("self_attn.q_proj", 5, 4), ("self_attn.o_proj", 6, 2), ("mlp.up_proj", 6, 3)):
        for layer in (0, 1):
            name = f"model.layers.{layer}.{module}"
            right = base[f"{name}.weight"].to(dtype)
            if layer == 1:
                a, b = (factors[f"base_model.model.{name}.lora_{k}.weight"].to(dtype) for k in "AB")
                assert len(a) == rank
                right = right + (b @ a) * (alpha / rank**0.5)
            assert torch.equal(reader.read(f"{name}.weight", 0, 0, len(right)), right)


def test_a_dimension_that_is_cut_is_read_in_bounded_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lengths of DoRA's rows need whole rows: these are read a few at a time, where columns are asked for."""
    monkeypatch.setattr(adapted, "_BLOCK", 24)
    _, reader = opened(KEPT / "dora" / "base", KEPT / "dora" / "adapter", master_dtype="float64")
    largest, plain = 0, reader._base.read  # type: ignore[attr-defined]

    def read(*where: Any) -> torch.Tensor:
        nonlocal largest
        found: torch.Tensor = plain(*where)
        largest = max(largest, found.numel())
        return found

    monkeypatch.setattr(reader._base, "read", read)  # type: ignore[attr-defined]
    name = "model.layers.0.mlp.up_proj.weight"
    found = reader.read(name, 1, 2, 4)
    assert largest == 24
    assert torch.allclose(found, expected("dora")[f"float64.{name}"][:, 2:4], rtol=1e-13)


def test_factors_are_parameters_beside_a_frozen_base() -> None:
    skeleton, reader = opened(KEPT / "patterns" / "base", KEPT / "patterns" / "adapter", adapter="factors")
    trained = {name: p for name, p in skeleton.named_parameters() if p.requires_grad}
    stored = load_file(KEPT / "patterns" / "adapter" / WEIGHTS)
    assert sum(p.numel() for p in trained.values()) == sum(tensor.numel() for tensor in stored.values())
    for name, parameter in trained.items():
        key = "base_model.model." + name.replace(".default", "")
        assert torch.equal(reader.read(name, 0, 0, len(parameter)), stored[key])
    frozen = load_file(KEPT / "patterns" / "base" / "model.safetensors")
    name = "model.layers.1.self_attn.q_proj.base_layer.weight"
    assert torch.equal(reader.read(name, 0, 0, 8), frozen[name.replace(".base_layer", "")])
    assert skeleton.state_dict().keys() >= {name, "model.layers.0.self_attn.q_proj.weight"}


def test_a_base_without_weights(tmp_path: Path) -> None:
    """Random weights are those of the base alone, although a tie of it is cut."""
    base, adapter = copy_case("tied", tmp_path / "case")
    alone = ModelSection(source=str(base / "config.json"), attention="eager")
    source = resolve_source(alone)
    skeleton = build_skeleton(source, alone)
    plain = open_reader(source, alone, skeleton)
    for what in ("merge", "factors"):
        model, reader = opened(base / "config.json", adapter, adapter=what)
        inside = ".base_layer" if what == "factors" else ""
        name = "transformer.h.0.ln_1.weight"
        assert torch.equal(reader.read(name, 0, 0, 8), plain.read(name, 0, 0, 8))
        right = plain.read("transformer.wte.weight", 0, 0, 32)
        assert torch.equal(reader.read("lm_head.weight", 0, 0, 32), right)
        found = reader.read(f"transformer.wte{inside}.weight", 0, 0, 32)
        assert torch.equal(found, right) == (what == "factors")
        assert not model.config.tie_word_embeddings


def test_adapter_and_base_are_the_fingerprint(tmp_path: Path) -> None:
    base, adapter = copy_case("patterns", tmp_path / "case")

    def print_of() -> str:
        return str(resolve_source(section(base, adapter)).fingerprint)

    seen = [print_of()]
    moved = copy_case("patterns", tmp_path / "moved")
    assert str(resolve_source(section(*moved)).fingerprint) == seen[0]
    edit_settings(adapter, lora_alpha=7)
    seen.append(print_of())
    edit_tensors(adapter, lambda old: old | {f"{Q0}.lora_A.weight": 2 * old[f"{Q0}.lora_A.weight"]})
    seen.append(print_of())
    rewrite(base, lambda old: old | {"model.norm.weight": 2 * old["model.norm.weight"]})
    seen.append(print_of())
    assert len(set(seen)) == 4


def test_the_base_that_the_adapter_names_is_taken(tmp_path: Path) -> None:
    base, adapter = copy_case("patterns", tmp_path / "case")
    edit_settings(adapter, base_model_name_or_path=str(base))
    source = resolve_source(ModelSection(source=str(adapter)))
    assert source.base is not None
    assert (source.kind, source.name, source.base.path) == ("adapter", "adapter", base)
    for named, words in (
        ("/not/here", "names the base /not/here, which is not here: set model.base to where it is"),
        (None, r"adapter_config\.json names no base: set model\.base to its directory"),
    ):
        edit_settings(adapter, base_model_name_or_path=named)
        with pytest.raises(ModelError, match=words):
            resolve_source(ModelSection(source=str(adapter)))
    with pytest.raises(ModelError, match="holds a PEFT adapter itself: set model.base to a whole model"):
        resolve_source(section(adapter, adapter))
    for key, value in (("base", str(base)), ("adapter", "factors")):
        with pytest.raises(ModelError, match=f"model.{key} is for a PEFT adapter, and .* is none"):
            resolve_source(ModelSection(source=str(base)).model_copy(update={key: value}))
    edit_config(base, quantization_config={"quant_method": "gptq"})
    edit_settings(adapter, base_model_name_or_path=str(base))
    with pytest.raises(
        ModelError, match=r"is quantised \(gptq\).*\(it is the base that .* names: model.base names another\)"
    ):
        resolve_source(ModelSection(source=str(adapter)))


def test_a_model_beside_an_adapter_is_taken_where_one_asks(tmp_path: Path) -> None:
    base, adapter = copy_case("patterns", tmp_path / "case")
    for file in base.iterdir():
        file.rename(adapter / file.name)
    assert resolve_source(ModelSection(source=f"safetensors:{adapter}")).kind == "safetensors"


Break = Callable[[Path, Path], Any]


def _settings(**changes: Any) -> Break:
    return lambda base, adapter: edit_settings(adapter, **changes)


def _tensors(change: Any) -> Break:
    return lambda base, adapter: edit_tensors(adapter, change)


def _other_width(base: Path, adapter: Path) -> None:
    edit_tensors(adapter, lambda old: {k: v[:, :6] if "lora_A" in k else v for k, v in old.items()})


def _pickled(base: Path, adapter: Path) -> None:
    (adapter / WEIGHTS).rename(adapter / "adapter_model.bin")


REFUSED: dict[str, tuple[Break, str]] = {
    "prompts": (_settings(peft_type="PROMPT_TUNING"), "of type PROMPT_TUNING, which adds tokens and changes no weights"),
    "another type": (_settings(peft_type="IA3"), "of type IA3, and only LoRA is read: merge it with peft"),
    "no type": (_settings(peft_type=None), "of type None, and only LoRA is read"),
    "a variant": (_settings(use_qalora=True), "sets use_qalora, a variant of LoRA that is not read: merge it"),
    "experts": (_settings(target_parameters=["experts.up"]), "sets target_parameters, a variant"),
    "another start": (_settings(init_lora_weights="pissa_niter_4"), "init_lora_weights = 'pissa_niter_4', so its base is"),
    "no rank": (_settings(r=0), "has r = 0, which should be a positive number"),
    "a bad pattern": (_settings(rank_pattern={"(": 2}), r"has the pattern '\(' in rank_pattern"),
    "another rank": (_settings(r=5), r"and adapter_config\.json the rank 5: the two files belong to different adapters"),
    "no table": (
        lambda base, adapter: (adapter / "adapter_config.json").write_text("[]"),
        "cannot read .*a table of settings",
    ),
    "no weights": (lambda base, adapter: (adapter / WEIGHTS).unlink(), "but no adapter_model.safetensors"),
    "a pickle": (_pickled, "holds a pickled adapter, which can run code when opened"),
    "cut": (lambda base, adapter: (adapter / WEIGHTS).write_bytes(b"12345678"), "is not a valid safetensors file"),
    "empty": (_tensors(lambda old: {}), "holds no tensor lora_A"),
    "half": (_tensors(lambda old: {k: v for k, v in old.items() if "lora_B" not in k}), "has no lora_B of 'model.layers.1"),
    "no lengths": (_settings(use_dora=True), "has no lora_magnitude_vector of"),
    "other names": (
        _tensors(lambda old: {re.sub("q_proj", "query", k): v for k, v in old.items()}),
        r"is an adapter of another model than this LlamaForCausalLM: it changes 'model\.layers\.1\.self_attn\.query', which",
    ),
    "other widths": (
        _other_width,
        r"factors of '.*' make \[\d+, 6\], not \[\d+, (8|12)\]; set model\.base to the model that it was trained on",
    ),
    "a larger vocabulary": (
        _tensors(lambda old: {k: torch.zeros(40, 8) if "lm_head" in k else v for k, v in old.items()}),
        r"'lm_head\.weight' is \[40, 8\], not \[32, 8\]",
    ),
    "more": (
        _tensors(lambda old: old | {"v_head.weight": torch.ones(2)}),
        "it holds 'v_head.weight', which the model has not",
    ),
    "a layer that is none": (
        _tensors(lambda old: {k.replace("self_attn.q_proj", "input_layernorm"): v for k, v in old.items()}),
        "changes 'model.layers.1.input_layernorm', which is a LlamaRMSNorm: merge it with peft",
    ),
    "a bias too many": (
        _tensors(lambda old: old | {f"{Q0}.lora_B.bias": torch.ones(8)}),
        "adds a bias to 'model.layers.1.self_attn.q_proj', which has none",
    ),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_what_is_refused(fault: str, tmp_path: Path) -> None:
    base, adapter = copy_case("patterns", tmp_path / "case")
    change, words = REFUSED[fault]
    change(base, adapter)
    with pytest.raises(ModelError, match=words) as caught:
        opened(base, adapter)
    assert "\n" not in str(caught.value)


def test_ties_that_peft_keeps_are_refused(tmp_path: Path) -> None:
    base, adapter = copy_case("tied", tmp_path / "case")
    edit_settings(adapter, ensure_weight_tying=True)
    with pytest.raises(ModelError, match="has ensure_weight_tying, which is not read for 'transformer.wte.weight'"):
        opened(base, adapter)


def test_modules_that_transformers_renamed_are_found(tmp_path: Path) -> None:
    """Old names of a model's parameters are its conversion table's matter."""
    base, adapter = copy_case("tied", tmp_path / "case")
    edit_tensors(adapter, lambda old: {k.replace("transformer.h.", "h."): v for k, v in old.items()})
    _, reader = opened(base, adapter)
    name = "transformer.h.0.attn.c_attn.weight"
    torch.testing.assert_close(reader.read(name, 0, 0, 8), expected("tied")[f"float32.{name}"])


def test_the_kept_cases_are_whole() -> None:
    assert {path.name for path in KEPT.iterdir()} == set(CASES)
    for name, (_, settings) in CASES.items():
        found = json.loads((KEPT / name / "adapter" / "adapter_config.json").read_text())
        assert found["peft_type"] == "LORA"
        assert found["r"] == settings["r"]

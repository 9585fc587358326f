"""Readers against transformers' own loading, bit for bit, for every toy architecture."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hpc_hess.config import ModelSection
from hpc_hess.errors import ModelError
from hpc_hess.model.sharded.skeleton import build_skeleton
from hpc_hess.model.sources.random_weights import RandomWeights
from hpc_hess.model.sources.source import resolve_source
from hpc_hess.model.sources.weights import fill, open_reader
from hpc_hess.parallel.layout import Layout
from tests.support.toys import MOE, TOYS, toy_config, toy_directory


def section(path: Path, **settings: object) -> ModelSection:
    return ModelSection(source=str(path), attention="eager", **settings)  # type: ignore[arg-type]


def skeleton_and_reader(path: Path, **settings: object):
    chosen = section(path, **settings)
    source = resolve_source(chosen)
    skeleton = build_skeleton(source, chosen)
    return skeleton, open_reader(source, chosen, skeleton)


def slices(shape: tuple[int, ...], dim: int, shards: int):
    extent = shape[dim]
    chunk = -(-extent // shards)
    return [(min(i * chunk, extent), min((i + 1) * chunk, extent)) for i in range(shards)]


@pytest.mark.parametrize("name", list(TOYS))
def test_every_slice_equals_the_saved_model(name: str, tmp_path: Path) -> None:
    saved = dict(toy_directory(name, tmp_path).named_parameters())
    assert len(list(tmp_path.glob("*.safetensors"))) > 1, "the toy should test sharded files"
    skeleton, reader = skeleton_and_reader(tmp_path)
    assert [n for n, _ in skeleton.named_parameters()] == list(saved)
    for parameter, expected in saved.items():
        for dim in range(expected.ndim):
            for shards in (1, 2, 3):
                for low, high in slices(tuple(expected.shape), dim, shards):
                    block = reader.read(parameter, dim, low, high)
                    assert torch.equal(block, expected.narrow(dim, low, high - low)), (parameter, dim, low, high)


@pytest.mark.parametrize("name", list(TOYS))
def test_skeleton_is_the_model_without_its_weights(name: str, tmp_path: Path) -> None:
    model = toy_directory(name, tmp_path)
    skeleton, reader = skeleton_and_reader(tmp_path)
    assert all(p.is_meta and p.requires_grad and p.dtype == torch.float32 for p in skeleton.parameters())
    buffers = dict(skeleton.named_buffers())
    assert buffers.keys() == dict(model.named_buffers()).keys()
    for key, buffer in model.named_buffers():
        assert torch.equal(buffers[key], buffer), key
    assert not skeleton.training
    assert not skeleton.config.use_cache
    if name in MOE:
        assert skeleton.config._experts_implementation == "eager"
    ties = {id(p) for _, p in skeleton.named_parameters(remove_duplicate=False)}
    assert len(ties) == len(list(model.named_parameters()))
    # allocated and filled, it computes what the saved model computes
    _allocate(skeleton)
    fill(skeleton, reader)
    tokens = torch.arange(3, 15).reshape(1, 12)
    with torch.no_grad():
        assert torch.equal(skeleton(input_ids=tokens).logits, model(input_ids=tokens).logits)


def _allocate(skeleton: torch.nn.Module) -> None:
    for module in skeleton.modules():
        for parameter in module._parameters.values():
            if parameter is not None and parameter.is_meta:
                torch.utils.swap_tensors(parameter, torch.nn.Parameter(torch.full(parameter.shape, math.nan)))


def test_double_masters(tmp_path: Path) -> None:
    toy_directory("gemma", tmp_path)
    skeleton, _ = skeleton_and_reader(tmp_path, master_dtype="float64")
    assert {p.dtype for p in skeleton.parameters()} == {torch.float64}
    assert all(b.dtype == torch.float64 for b in skeleton.buffers() if b.is_floating_point())


def rewrite(path: Path, change) -> None:
    """Replace the checkpoint by one file with renamed or changed tensors."""
    tensors: dict[str, torch.Tensor] = {}
    for file in path.glob("*.safetensors"):
        tensors |= load_file(file)
        file.unlink()
    (path / "model.safetensors.index.json").unlink(missing_ok=True)
    save_file({k: v.contiguous() for k, v in change(tensors).items()}, path / "model.safetensors")


def test_expert_checkpoints_are_per_expert_and_merged_ones_work_too(tmp_path: Path) -> None:
    saved = dict(toy_directory("mixtral", tmp_path).named_parameters())
    keys = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    assert any(".block_sparse_moe.experts.0.w1.weight" in key for key in keys), "transformers no longer reverts names"
    rewrite(tmp_path, lambda old: {k: v.detach() for k, v in saved.items()})
    _, reader = skeleton_and_reader(tmp_path)
    for parameter, expected in saved.items():
        assert torch.equal(reader.read(parameter, 0, 0, expected.shape[0]), expected)


def test_more_than_ten_experts_keep_their_order(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    config = toy_config("qwen3_moe")
    config.num_experts = 12
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path)
    _, reader = skeleton_and_reader(tmp_path)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    expected = model.get_parameter(name)
    assert torch.equal(reader.read(name, 0, 8, 12), expected[8:12])
    assert torch.equal(reader.read(name, 1, 10, 20), expected[:, 10:20])


def test_prefix_missing_and_legacy_names(tmp_path: Path) -> None:
    saved = dict(toy_directory("gpt2", tmp_path).named_parameters())
    rewrite(tmp_path, lambda t: {k.removeprefix("transformer."): v for k, v in t.items()})
    _, reader = skeleton_and_reader(tmp_path)
    name = "transformer.h.1.attn.c_attn.weight"
    assert torch.equal(reader.read(name, 1, 5, 9), saved[name][:, 5:9])


def test_table_is_found_for_a_sharded_model(tmp_path: Path) -> None:
    """fully_shard renames the class; GPT-NeoX's renaming of the head is listed by class."""
    saved = dict(toy_directory("gpt_neox", tmp_path).named_parameters())
    chosen = section(tmp_path)
    skeleton = build_skeleton(resolve_source(chosen), chosen)
    plain = type(skeleton)
    skeleton.__class__ = type(f"FSDP{plain.__name__}", (plain,), {})
    reader = open_reader(resolve_source(chosen), chosen, skeleton)
    assert torch.equal(reader.read("lm_head.weight", 0, 3, 9), saved["lm_head.weight"][3:9])
    assert type(skeleton).__name__ == f"FSDP{plain.__name__}"


def test_tied_weight_under_its_other_name(tmp_path: Path) -> None:
    saved = dict(toy_directory("llama", tmp_path).named_parameters())
    embedding = "model.embed_tokens.weight"
    rewrite(tmp_path, lambda t: {("lm_head.weight" if k == embedding else k): v for k, v in t.items()})
    _, reader = skeleton_and_reader(tmp_path)
    assert torch.equal(reader.read(embedding, 0, 3, 7), saved[embedding][3:7])


def test_tied_weights_that_differ_are_refused(tmp_path: Path) -> None:
    toy_directory("llama", tmp_path)
    rewrite(tmp_path, lambda t: t | {"lm_head.weight": t["model.embed_tokens.weight"].clone()})
    skeleton_and_reader(tmp_path)  # equal: fine
    rewrite(tmp_path, lambda t: t | {"lm_head.weight": t["lm_head.weight"] + 1})
    with pytest.raises(ModelError, match="tie_word_embeddings"):
        skeleton_and_reader(tmp_path)


def test_missing_and_mismatched_tensors_are_named(tmp_path: Path) -> None:
    toy_directory("qwen2", tmp_path)
    rewrite(tmp_path, lambda t: {k: (v[:-1] if k == "model.norm.weight" else v) for k, v in t.items()})
    with pytest.raises(ModelError, match=r"model\.norm\.weight.*\(16,\).*\(15,\)"):
        skeleton_and_reader(tmp_path)
    rewrite(tmp_path, lambda t: {k: v for k, v in t.items() if k != "model.norm.weight"})
    with pytest.raises(ModelError, match=r"no tensor for parameter 'model\.norm\.weight': check"):
        skeleton_and_reader(tmp_path)


def test_missing_expert_is_a_mismatch(tmp_path: Path) -> None:
    toy_directory("mixtral", tmp_path)
    rewrite(tmp_path, lambda t: {k: v for k, v in t.items() if "layers.1.block_sparse_moe.experts.3.w2" not in k})
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.experts\.down_proj.*\(4, 16, 24\).*\(3, 16, 24\)"):
        skeleton_and_reader(tmp_path)


def test_missing_and_truncated_files(tmp_path: Path) -> None:
    toy_directory("qwen2", tmp_path)
    files = sorted(tmp_path.glob("*.safetensors"))
    content = files[0].read_bytes()
    files[0].write_bytes(content[: len(content) // 2])
    with pytest.raises(ModelError, match="download it again"):
        skeleton_and_reader(tmp_path)
    files[0].unlink()
    with pytest.raises(ModelError, match=rf"{files[0].name} is missing"):
        skeleton_and_reader(tmp_path)


def test_conversion_that_cannot_be_sliced_is_computed_whole(tmp_path: Path) -> None:
    """Operations without a lazy form go through transformers' own code; chunks and transposes are lazy."""
    from transformers.conversion_mapping import register_checkpoint_conversion_mapping
    from transformers.core_model_loading import Chunk, Interleave, Transpose, WeightConverter

    saved = dict(toy_directory("llama_untied", tmp_path).named_parameters())
    register_checkpoint_conversion_mapping(
        "LlamaForCausalLM",
        [
            WeightConverter("mlp.fused.weight", ["mlp.gate_proj.weight", "mlp.up_proj.weight"], [Chunk(dim=0)]),
            WeightConverter("mlp.turned.weight", "mlp.down_proj.weight", [Transpose(0, 1)]),
            WeightConverter("self_attn.woven.weight", "self_attn.q_proj.weight", [Interleave(dim=0)]),
        ],
        overwrite=True,
    )
    try:

        def fuse(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            out = {}
            for key, value in tensors.items():
                if "gate_proj" in key:
                    out[key.replace("gate_proj", "fused")] = torch.cat([value, tensors[key.replace("gate", "up")]])
                elif "down_proj" in key:
                    out[key.replace("down_proj", "turned")] = value.T
                elif "q_proj" in key:
                    woven = value.reshape(2, value.shape[0] // 2, -1).transpose(0, 1).reshape(value.shape)
                    out[key.replace("q_proj", "woven")] = woven
                elif "up_proj" not in key:
                    out[key] = value
            return out

        rewrite(tmp_path, fuse)
        _, reader = skeleton_and_reader(tmp_path)
        for parameter, expected in saved.items():
            for dim in range(expected.ndim):
                for low, high in slices(tuple(expected.shape), dim, 3):
                    block = reader.read(parameter, dim, low, high)
                    assert torch.equal(block, expected.narrow(dim, low, high - low)), parameter
    finally:
        from transformers import conversion_mapping

        conversion_mapping._checkpoint_conversion_mapping_cache.pop("LlamaForCausalLM")
        conversion_mapping.USER_REGISTERED_MAPPINGS.discard("LlamaForCausalLM")


@pytest.fixture
def random_toy(tmp_path: Path):
    def build(name: str, seed: int = 0, **changes: object):
        config = toy_config(name)
        for key, value in changes.items():
            setattr(config, key, value)
        config.save_pretrained(tmp_path / name)
        return skeleton_and_reader(tmp_path / name, seed=seed)

    return build


@pytest.mark.parametrize("name", list(TOYS))
def test_random_weights_do_not_depend_on_the_cut(name: str, random_toy) -> None:
    skeleton, reader = random_toy(name)
    assert isinstance(reader, RandomWeights)
    for parameter, meta in skeleton.named_parameters():
        whole = reader.read(parameter, 0, 0, meta.shape[0])
        assert torch.isfinite(whole).all()
        for dim in range(meta.ndim):
            for shards in (2, 3, 4):
                parts = [reader.read(parameter, dim, *cut) for cut in slices(tuple(meta.shape), dim, shards)]
                assert torch.equal(torch.cat(parts, dim), whole), (parameter, dim, shards)


def test_random_weights_follow_the_initialiser(random_toy) -> None:
    skeleton, reader = random_toy("gpt2", n_embd=64, n_head=4, vocab_size=500)
    read = {n: reader.read(n, 0, 0, p.shape[0]) for n, p in skeleton.named_parameters()}
    assert reader.guessed == []
    assert torch.equal(read["transformer.h.0.ln_1.weight"], torch.ones(64))
    assert torch.equal(read["transformer.h.0.attn.c_attn.bias"], torch.zeros(192))
    embedding = read["transformer.wte.weight"]
    assert abs(float(embedding.std()) / 0.02 - 1) < 0.02
    assert abs(float(embedding.mean())) < 5 * 0.02 / embedding.numel() ** 0.5
    assert abs(float(read["transformer.h.0.mlp.c_proj.weight"].std()) / (0.02 / 2) - 1) < 0.05  # 1 / sqrt(2 layers)
    flat = torch.cat(
        [
            read[p.name].flatten()
            for p in Layout({n: tuple(t.shape) for n, t in read.items()}).parameters
            if read[p.name].ndim > 1
        ]
    )
    assert flat.unique().numel() > 0.99 * flat.numel(), "entries repeat: the index is not global"
    zero_centred, gemma = random_toy("gemma")
    norm = "model.layers.0.input_layernorm.weight"
    assert torch.equal(gemma.read(norm, 0, 0, 16), torch.zeros(16))
    assert norm in dict(zero_centred.named_parameters())


def test_random_weights_depend_on_the_seed(random_toy) -> None:
    name = "model.embed_tokens.weight"
    first, again, other = (random_toy("llama", seed=seed)[1].read(name, 0, 0, 96) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_random_slices_of_short_rows_and_long_rows_agree(random_toy) -> None:
    """The last dimension of an expert tensor has short rows, which are drawn together and cut."""
    skeleton, reader = random_toy("mixtral")
    name = "model.layers.1.mlp.experts.gate_up_proj"
    shape = tuple(skeleton.get_parameter(name).shape)
    whole = reader.read(name, 0, 0, shape[0])
    assert torch.equal(reader.read(name, 2, 5, 11), whole[:, :, 5:11])
    assert torch.equal(reader.read(name, 1, 7, 30), whole[:, 7:30])
    import hpc_hess.model.sources.random_weights as module

    short = module._SHORT
    module._SHORT = 1
    try:
        assert torch.equal(reader.read(name, 2, 5, 11), whole[:, :, 5:11])
    finally:
        module._SHORT = short


def test_a_70b_skeleton_is_quick_and_needs_no_memory(tmp_path: Path) -> None:
    from transformers import LlamaConfig

    LlamaConfig(
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        vocab_size=128256,
        max_position_embeddings=8192,
    ).save_pretrained(tmp_path)
    skeleton, reader = skeleton_and_reader(tmp_path)
    count = sum(p.numel() for p in skeleton.parameters())
    assert count == 70_553_706_496
    last = "model.layers.79.self_attn.q_proj.weight"
    assert reader.read(last, 0, 8190, 8192).shape == (2, 8192)

"""Released quantised formats, slice by slice, against the values that transformers makes of them, bit for bit."""

from __future__ import annotations

import importlib.util
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from hpc_hess.config import ModelSection
from hpc_hess.errors import ModelError
from hpc_hess.model.sharded.shard import shard_model
from hpc_hess.model.sharded.skeleton import build_skeleton
from hpc_hess.model.sources import lazy
from hpc_hess.model.sources.source import resolve_source
from hpc_hess.model.sources.weights import fill, open_reader
from hpc_hess.parallel.world import World
from tests.support.quantised_models import (
    Tensors,
    compressed_config,
    declare,
    fp8_config,
    loaded,
    rewrite,
    save,
    save_mxfp4,
    to_compressed,
    to_fp8,
)
from tests.support.spawn import run_ranks
from tests.support.stored_models import findings, go, whole_parameters


def opened(path: Path, **settings: Any) -> tuple[torch.nn.Module, Any]:
    chosen = ModelSection(source=str(path), attention="eager", **settings)
    source = resolve_source(chosen)
    skeleton = build_skeleton(source, chosen)
    return skeleton, open_reader(source, chosen, skeleton)


def assert_equal(path: Path, expected: Tensors) -> None:
    """Compare the whole and uneven slices of every parameter, along every dimension."""
    skeleton, reader = opened(path)
    assert {name for name, _ in skeleton.named_parameters()} == set(expected)
    for name, whole in expected.items():
        for dim, extent in enumerate(whole.shape):
            cuts = sorted({0, 1, extent // 3, extent // 2 + 1, extent})
            for low, high in [(0, extent), *itertools.pairwise(cuts)]:
                if low < high <= extent:
                    found = reader.read(name, dim, low, high).float()
                    assert torch.equal(found, whole.narrow(dim, low, high - low)), (name, dim, low, high)
    (text,) = [f.text for f in reader.findings if f.verdict == "noted"]
    assert "of the dequantised weights" in text


def test_mxfp4(tmp_path: Path) -> None:
    from transformers import Mxfp4Config

    save_mxfp4(tmp_path)
    expected = loaded(tmp_path, Mxfp4Config(dequantize=True))
    assert expected["model.layers.0.mlp.experts.down_proj"].abs().max() > 1000
    assert_equal(tmp_path, expected)


@pytest.mark.parametrize("toy", ["llama_untied", "qwen3_moe"])
@pytest.mark.parametrize("scale_fmt", ["float", "ue8m0"])
def test_fp8_in_blocks(toy: str, scale_fmt: str, tmp_path: Path) -> None:
    from transformers import FineGrainedFP8Config

    save(toy, tmp_path, fp8_config((4, 8)), to_fp8((4, 8), scale_fmt), intermediate_size=24, moe_intermediate_size=8)
    assert len([k for k in load_file(tmp_path / "model.safetensors") if k.endswith("weight_scale_inv")]) >= 14
    assert_equal(tmp_path, loaded(tmp_path, FineGrainedFP8Config(weight_block_size=(4, 8), dequantize=True)))


def dequantised(tensors: Tensors, block: tuple[int, int] | None) -> Tensors:
    """Return the values, by the function that transformers takes for any shape."""
    from transformers.integrations.finegrained_fp8 import _dequantize_fp8_weight

    found = {}
    for key, tensor in tensors.items():
        if not key.endswith("_scale_inv"):
            scale = tensors.get(f"{key}_scale_inv")
            found[key] = tensor
            if scale is not None:
                found[key] = _dequantize_fp8_weight(tensor, scale, list(block) if block else None, torch.float32)
    return found


@pytest.mark.parametrize("block", [(128, 128), (5, 7), (3, 16), None])
def test_fp8_of_shapes_that_blocks_do_not_fill(block: tuple[int, int] | None, tmp_path: Path) -> None:
    sizes = {"hidden_size": 136, "intermediate_size": 131} if block == (128, 128) else {}
    save("llama_untied", tmp_path, fp8_config(block), to_fp8(block), **sizes)
    tensors = load_file(tmp_path / "model.safetensors")
    if block == (128, 128):
        assert tensors["model.layers.0.mlp.down_proj.weight_scale_inv"].shape == (2, 2)
    assert_equal(tmp_path, dequantised(tensors, block))


@pytest.mark.parametrize("kind", ["float", "int"])
@pytest.mark.parametrize("strategy", ["tensor", "channel", "group"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compressed_tensors(kind: str, strategy: str, dtype: torch.dtype, tmp_path: Path) -> None:
    declared = compressed_config(kind, strategy, group_size=8 if strategy == "group" else None)
    save("llama_untied", tmp_path, declared, to_compressed(kind, strategy, dtype), intermediate_size=24)
    tensors = load_file(tmp_path / "model.safetensors")
    expected = {}
    for key, tensor in tensors.items():
        scale = tensors.get(f"{key}_scale")
        if scale is not None:  # naive_quantized of compressed-tensors: (x_q.to(scale.dtype) * scale) of each group
            width = tensor.shape[1] // scale.shape[-1]
            full = scale.repeat_interleave(width, 1) if strategy != "tensor" else scale
            expected[key] = (tensor.to(dtype) * full).float()
        elif not key.endswith("_scale"):
            expected[key] = tensor.float()
    assert_equal(tmp_path, expected)
    if importlib.util.find_spec("compressed_tensors"):
        from transformers import CompressedTensorsConfig

        made = loaded(tmp_path, CompressedTensorsConfig(dequantize=True))
        assert all(torch.equal(made[name], value) for name, value in expected.items())


def test_compressed_experts_are_multiplied_in_single_precision(tmp_path: Path) -> None:
    save("qwen3_moe", tmp_path, compressed_config("float", "channel"), to_compressed("float", "channel", torch.bfloat16))
    tensors = load_file(tmp_path / "model.safetensors")
    _, reader = opened(tmp_path)
    stem = "model.layers.1.mlp.experts.2"
    pair = [
        tensors[f"{stem}.{p}_proj.weight"].float() * tensors[f"{stem}.{p}_proj.weight_scale"].float() for p in ("gate", "up")
    ]
    assert torch.equal(reader.read("model.layers.1.mlp.experts.gate_up_proj", 0, 2, 3)[0], torch.cat(pair))


def test_scales_of_activations_change_nothing(tmp_path: Path) -> None:
    save("llama_untied", tmp_path, compressed_config("float", "tensor"), to_compressed("float", "tensor", torch.float32))
    _, reader = opened(tmp_path)
    before = reader.read("model.layers.0.self_attn.k_proj.weight", 0, 0, 8)
    more = {f"model.layers.0.self_attn.{n}": torch.ones(1) for n in ("k_proj.input_scale", "k_scale", "v_scale")}
    rewrite(tmp_path, lambda old: old | more)
    _, reader = opened(tmp_path)
    assert torch.equal(reader.read("model.layers.0.self_attn.k_proj.weight", 0, 0, 8), before)


def parameters_of_ranks(world: World, path: str) -> dict[str, np.ndarray]:
    skeleton, reader = opened(Path(path))
    model = shard_model(skeleton, world, master_dtype=torch.float32, compute_dtype=torch.float32)
    fill(model.module, reader, world.shard_rank, world.shard_size)
    return whole_parameters(model.module)


@pytest.mark.parametrize("form", ["mxfp4", "fp8"])
def test_two_ranks_hold_what_one_holds(form: str, tmp_path: Path) -> None:
    if form == "mxfp4":
        save_mxfp4(tmp_path)
    else:
        save("qwen3_moe", tmp_path, fp8_config((5, 7)), to_fp8((5, 7)))
    _, reader = opened(tmp_path)
    for rank in run_ranks(parameters_of_ranks, 2, str(tmp_path)):
        for name, whole in rank.items():
            assert np.array_equal(whole, reader.read(name, 0, 0, whole.shape[0]).numpy()), name


def test_the_result_and_the_report_say_so(tmp_path: Path, world: World) -> None:
    save("llama_untied", tmp_path / "model", fp8_config((4, 8)), to_fp8((4, 8)), intermediate_size=24)
    result = go(tmp_path / "model", tmp_path, world, run__report=True)
    assert "of the dequantised weights (fp8, 21 tensors)" in findings(result, "weights.files")[-1]
    assert "of the dequantised weights" in (tmp_path / "run" / "report.html").read_text()


class Largest(TorchDispatchMode):
    """Notes the most bytes of a tensor that an operation makes: not of parameters, mapped files and views of either."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.most = 0
        self._own = {p.untyped_storage().data_ptr() for p in module.parameters()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            place = out.untyped_storage().data_ptr()
            if func.overloadpacket.__name__ == "set_":  # how safetensors shows what it mapped
                self._own.add(place)
            if place in self._own:
                return out
            self.most = max(self.most, out.numel() * out.element_size())
        return out


@pytest.mark.parametrize("form", ["mxfp4", "fp8"])
def test_no_rank_makes_more_than_a_block(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if form == "mxfp4":
        save_mxfp4(tmp_path)
    else:
        save("llama_untied", tmp_path, fp8_config((5, 7)), to_fp8((5, 7)), hidden_size=64, intermediate_size=512)
    skeleton, reader = opened(tmp_path)
    for module in skeleton.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                torch.utils.swap_tensors(parameter, torch.nn.Parameter(torch.empty(parameter.shape)))
    block = max(p[0].numel() for p in skeleton.parameters())
    assert max(p.numel() for p in skeleton.parameters()) > 3 * block
    fill(skeleton, reader)  # makes the tables of values, which stay
    for size in ("_COPIED", "_WRITTEN"):
        monkeypatch.setattr(lazy, size, block)
    with Largest(skeleton) as seen:
        fill(skeleton, reader)
    assert 0 < seen.most <= 8 * block  # in bytes: a block of values, or the indices of a row


# -- refused -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("declared", "message"),
    [
        ({"quant_method": "gptq", "bits": 4}, r"quantised \(gptq\): read are MXFP4, FP8"),
        ({"quant_method": "awq", "bits": 4}, r"quantised \(awq\)"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, r"quantised \(bitsandbytes\)"),
        ({"quant_method": "new"}, r"quantised \(new\): read are"),
        ({"bits": 4}, r"quantised \(None\): read are"),
        (compressed_config("int", "channel", num_bits=4), r"compressed-tensors, int-quantized, 4 bits\)"),
        (compressed_config("int", "channel", symmetric=False), "8 bits with zero points"),
        (compressed_config("int", "token"), "one scale by token"),
        (compressed_config("int", "channel") | {"format": "pack-quantized"}, "pack-quantized, 8 bits"),
        (compressed_config("int", "channel") | {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config"),
        ({"quant_method": "compressed-tensors"}, "without config_groups"),
        ({"quant_method": "fp8", "weight_block_size": [128]}, r"weight_block_size = \[128\].*two positive numbers"),
        ({"quant_method": "fp8", "weight_block_size": [0, 128]}, "two positive numbers"),
    ],
)
def test_other_quantisations_are_refused_by_name(declared: dict[str, Any], message: str, tmp_path: Path) -> None:
    save("llama_untied", tmp_path, declared, lambda old: old)
    with pytest.raises(ModelError, match=message):
        resolve_source(ModelSection(source=str(tmp_path)))


def without(ending: str) -> Any:
    return lambda old: {k: v for k, v in old.items() if not (k.startswith("model.layers.0.") and k.endswith(ending))}


def other(ending: str, change: Any) -> Any:
    return lambda old: {
        k: change(v) if k.startswith("model.layers.0.") and k.endswith(ending) else v for k, v in old.items()
    }


BAD: dict[str, tuple[str, Any, str]] = {
    "no scales": (
        "fp8",
        without("k_proj.weight_scale_inv"),
        r"k_proj\.weight' \(F8_E4M3\) without '.*k_proj\.weight_scale_inv'",
    ),
    "no weight": ("fp8", without("k_proj.weight"), r"k_proj\.weight_scale_inv' without '.*k_proj\.weight'"),
    "scales of another block": (
        "fp8",
        other("up_proj.weight_scale_inv", lambda s: s[1:]),
        r"up_proj\.weight.*do not go together",
    ),
    "scales of integers": ("fp8", other("up_proj.weight_scale_inv", lambda s: s.long()), r"I64.*do not go together"),
    "weights that are not quantised": ("fp8", other("up_proj.weight", lambda w: w.float()), r"\(F32, .*do not go together"),
    "weights of another type": (
        "fp8",
        other("norm.weight", lambda w: w.to(torch.uint8)),
        "config.json declares fp8: dequantise",
    ),
    "no blocks": ("mxfp4", without("down_proj_blocks"), r"down_proj_scales' without '.*down_proj_blocks'.*declares mxfp4"),
    "no scales of blocks": ("mxfp4", without("down_proj_scales"), r"down_proj_blocks' \(U8\) without '.*down_proj_scales'"),
    "blocks cut": ("mxfp4", other("up_proj_blocks", lambda b: b[..., :8]), r"gate_up_proj_blocks.*do not go together"),
    "blocks of another shape": (
        "mxfp4",
        other("up_proj_scales", lambda s: s[..., :1]),
        r"gate_up_proj_blocks.*do not go together",
    ),
    "blocks of another type": (
        "mxfp4",
        other("up_proj_blocks", lambda b: b.view(torch.int8)),
        r"\(I8, .*do not go together",
    ),
}


@pytest.mark.parametrize("case", list(BAD))
def test_files_that_do_not_fit_are_refused(case: str, tmp_path: Path) -> None:
    form, change, message = BAD[case]
    if form == "mxfp4":
        save_mxfp4(tmp_path)
    else:
        save("llama_untied", tmp_path, fp8_config((4, 8)), to_fp8((4, 8)), intermediate_size=24)
    opened(tmp_path)
    rewrite(tmp_path, change)
    with pytest.raises(ModelError, match=message):
        opened(tmp_path, unused="ignore")


def test_mixed_formats_are_refused(tmp_path: Path) -> None:
    save_mxfp4(tmp_path / "a")
    declare(tmp_path / "a", fp8_config((128, 128)))
    with pytest.raises(ModelError, match=r"experts.*config\.json declares fp8: dequantise"):
        opened(tmp_path / "a")
    save("llama_untied", tmp_path / "b", {"quant_method": "mxfp4"}, to_fp8((4, 8)), intermediate_size=24)
    with pytest.raises(ModelError, match=r"float8_e4m3fn, and config\.json declares mxfp4: dequantise"):
        opened(tmp_path / "b")
    save("llama_untied", tmp_path / "c", compressed_config("float", "tensor"), to_fp8(None))
    with pytest.raises(
        ModelError, match=r"proj\.weight' \(F8_E4M3\) without '.*weight_scale': config.json declares compressed"
    ):
        opened(tmp_path / "c")


def test_a_channel_is_not_taken_for_a_block(tmp_path: Path) -> None:
    save("llama_untied", tmp_path, compressed_config("int", "channel"), to_compressed("int", "channel", torch.float32))
    rewrite(tmp_path, other("up_proj.weight_scale", lambda s: s[:5]))
    with pytest.raises(ModelError, match="do not go together"):
        opened(tmp_path)

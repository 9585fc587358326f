"""GGUF files, slice by slice, against what transformers loads of them, bit for bit."""

from __future__ import annotations

import itertools
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hpc_hess.config import ModelSection
from hpc_hess.errors import ModelError
from hpc_hess.model.sharded.shard import shard_model
from hpc_hess.model.sharded.skeleton import build_skeleton
from hpc_hess.model.sources.source import resolve_source
from hpc_hess.model.sources.weights import fill, open_reader
from hpc_hess.parallel.world import World
from tests.support.gguf_models import write_gguf
from tests.support.spawn import run_ranks
from tests.support.stored_models import whole_parameters

pytest.importorskip("gguf")


def opened(path: Path, **settings: Any) -> tuple[torch.nn.Module, Any]:
    section = ModelSection(source=str(path), attention="eager", **settings)
    source = resolve_source(section)
    assert source.kind == "gguf"
    skeleton = build_skeleton(source, section)
    return skeleton, open_reader(source, section, skeleton)


def assert_equal(path: Path) -> None:
    """Compare the whole and uneven slices of every parameter with transformers' model, along every dimension."""
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(str(path.parent), gguf_file=path.name, dtype=torch.float32)
    expected = dict(reference.named_parameters())
    skeleton, reader = opened(path)
    assert {name for name, _ in skeleton.named_parameters()} == set(expected)
    for name, whole in expected.items():
        for dim, extent in enumerate(whole.shape):
            cuts = sorted({0, 1, extent // 3, extent // 2 + 1, extent})
            for low, high in [(0, extent), *itertools.pairwise(cuts)]:
                found = reader.read(name, dim, low, high)
                assert torch.equal(found, whole.narrow(dim, low, high - low)), (name, dim, low, high)


KINDS = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q3_K", "Q4_K", "Q6_K", "IQ4_NL")


@pytest.mark.parametrize("kind", KINDS)
def test_every_format(kind: str, tmp_path: Path) -> None:
    write_gguf(tmp_path / "toy.gguf", kind=kind)
    assert_equal(tmp_path / "toy.gguf")
    _, reader = opened(tmp_path)
    noted = [finding.text for finding in reader.findings if finding.verdict == "noted"]
    told = "what is computed is of the dequantised weights (GGUF, 8 tensors); activations are not quantised"
    assert noted == ([] if "F" in kind else [told])


@pytest.mark.parametrize(
    ("arch", "sizes"),
    [
        ("llama", {"heads": 8, "kv": 1, "layers": 2}),
        ("llama", {"width": 96, "inner": 160, "heads": 3, "kv": 3}),
        ("qwen3moe", {"width": 64, "inner": 768, "experts": 3}),
        ("gpt2", {"width": 64, "inner": 256}),
        ("gemma2", {"width": 64, "inner": 96}),
    ],
)
def test_every_rearrangement(arch: str, sizes: dict[str, int], tmp_path: Path) -> None:
    write_gguf(tmp_path / "toy.gguf", arch, **sizes)
    assert_equal(tmp_path / "toy.gguf")


def parameters_of_ranks(world: World, path: str) -> dict[str, np.ndarray]:
    skeleton, reader = opened(Path(path))
    model = shard_model(skeleton, world, master_dtype=torch.float32, compute_dtype=torch.float32)
    fill(model.module, reader, world.shard_rank, world.shard_size)
    return whole_parameters(model.module)


def test_two_ranks_hold_what_one_holds(tmp_path: Path) -> None:
    write_gguf(tmp_path / "toy.gguf", "qwen3moe", width=64, inner=768, experts=3)
    _, reader = opened(tmp_path)
    for rank in run_ranks(parameters_of_ranks, 2, str(tmp_path)):
        for name, whole in rank.items():
            assert np.array_equal(whole, reader.read(name, 0, 0, whole.shape[0]).numpy()), name


@pytest.mark.parametrize(("dim", "name"), [(0, "mlp.down_proj"), (1, "mlp.down_proj"), (0, "self_attn.q_proj")])
def test_a_slice_costs_no_more_than_itself(dim: int, name: str, tmp_path: Path) -> None:
    write_gguf(tmp_path / "toy.gguf", kind="Q4_0", width=1024, inner=2048, heads=16)
    _, reader = opened(tmp_path)
    full = f"model.layers.0.{name}.weight"
    reader.read(full, dim, 0, 1)
    tracemalloc.start()
    found = reader.read(full, dim, 3, 67)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    whole = 4 * 1024 * 1024
    assert found.numel() * 4 <= most <= 6 * found.numel() * 4 < whole


def test_unused_tensors_are_read_for_what_they_are(tmp_path: Path) -> None:
    write_gguf(tmp_path / "toy.gguf", extra={"blk.0.attn_other": (3, 256)})
    with pytest.raises(ModelError, match=r"does not take \(1: blk\.0\.attn_other\.weight\)"):
        opened(tmp_path)
    opened(tmp_path, unused="ignore")


def test_damaged_files_and_other_models(tmp_path: Path) -> None:
    file = tmp_path / "toy.gguf"
    write_gguf(file)
    section = ModelSection(source=str(file))
    source = resolve_source(section)
    skeleton = build_skeleton(source, section)
    reader = open_reader(source, section, skeleton)
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelError, match="cannot read"):
        open_reader(source, section, skeleton)
    with pytest.raises(ModelError, match=r"cannot read tensor 'model\.layers\.0\.mlp\.down_proj\.weight'"):
        reader.read("model.layers.0.mlp.down_proj.weight", 0, 0, 256)
    write_gguf(file, width=512)
    with pytest.raises(ModelError, match=r"should have shape \(96, 256\).*holds one of shape \(96, 512\)"):
        open_reader(source, section, skeleton)

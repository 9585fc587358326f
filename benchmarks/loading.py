"""Loading a checkpoint of a gigabyte in a released format: peak memory of a rank over its shard, and how fast it is filled.

The file repeats one layer. So do the shards: the layers of a rank share the memory of the first one, which each layer is
loaded into. Files are read once before, so that they lie in the page cache. The rate counts the float32 values that a rank
makes. Beside it stands what safetensors alone takes for as many values, from a file that holds them in float32: each tensor
mapped and copied to its place, on the same rank, before and after.
"""

from __future__ import annotations

import json
import math
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor

from benchmarks.frame import Table, benchmark
from benchmarks.processes import apart
from hpc_hess.config import ModelSection
from hpc_hess.model.sharded.shard import shard_model
from hpc_hess.model.sharded.skeleton import build_skeleton
from hpc_hess.model.sources.source import resolve_source
from hpc_hess.model.sources.weights import fill, open_reader
from hpc_hess.parallel.memory import release_memory
from hpc_hess.parallel.world import World

_FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
Tensors = dict[str, torch.Tensor]


def _config(kind: str, layers: int) -> Any:
    from transformers import GptOssConfig, LlamaConfig

    if kind == "MXFP4":  # layers of GPT-OSS with a quarter of the experts of the 20B model
        sizes = {"hidden_size": 2880, "intermediate_size": 2880, "num_local_experts": 8, "vocab_size": 4096}
        return GptOssConfig(num_hidden_layers=layers, quantization_config={"quant_method": "mxfp4"}, **sizes)
    sizes = {"hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32, "num_key_value_heads": 8}
    declared = {"quantization_config": _FP8} if kind == "FP8" else {}
    return LlamaConfig(num_hidden_layers=layers, vocab_size=4096, tie_word_embeddings=True, **sizes, **declared)


def _layer(kind: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors of a model of one layer as a file holds them, at random."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(_plain(_config(kind, 1)))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        shape, matrix = tuple(parameter.shape), name.endswith("proj.weight")
        if kind == "MXFP4" and name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            experts, rows, columns = shape
            packed = (experts, columns, rows // 32)
            yield f"{name}_blocks", torch.randint(0, 256, (*packed, 16), generator=generator, dtype=torch.uint8)
            yield f"{name}_scales", torch.randint(110, 125, packed, generator=generator, dtype=torch.uint8)
            continue
        values = torch.randn(shape, generator=generator)
        if kind == "FP8" and matrix:
            yield name, values.mul_(50).to(torch.float8_e4m3fn)
            yield f"{name}_scale_inv", torch.rand([-(-n // 128) for n in shape], generator=generator).mul_(1e-3)
        else:
            yield name, values.mul_(0.02).to(torch.float32 if kind == "float32" else torch.bfloat16)


def _plain(config: Any) -> Any:
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def _save(kind: str, folder: Path, size: float) -> Path:
    """Write a checkpoint of at least ``size`` bytes; return what model.source is."""
    if kind.startswith("GGUF"):
        return _save_gguf(kind.removeprefix("GGUF "), folder, size)
    tensors = dict(_layer(kind))
    of_layer = {name: tensor for name, tensor in tensors.items() if ".layers.0." in name}
    layers = math.ceil(size / _bytes(of_layer))
    _config(kind, layers).save_pretrained(folder)
    weight_map = {}
    parts = [{name: tensor for name, tensor in tensors.items() if name not in of_layer}]
    for number in range(layers):
        parts.append({name.replace(".layers.0.", f".layers.{number}."): tensor for name, tensor in of_layer.items()})
    for number, part in enumerate(parts):
        file = f"model-{number:05d}.safetensors"
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def _bytes(tensors: Tensors) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _save_gguf(kind: str, folder: Path, size: float) -> Path:
    import gguf

    config = _config("GGUF", 1)
    asked, width, inner = gguf.GGMLQuantizationType[kind], config.hidden_size, config.intermediate_size
    key = config.num_key_value_heads * width // config.num_attention_heads
    generator, made = np.random.default_rng(0), dict[tuple[int, int], np.ndarray]()

    def matrix(rows: int, columns: int) -> np.ndarray:
        if (rows, columns) not in made:
            made[rows, columns] = gguf.quantize(generator.normal(size=(rows, columns)).astype(np.float32), asked)
        return made[rows, columns]

    shapes = {"attn_q": (width, width), "attn_k": (key, width), "attn_v": (key, width), "attn_output": (width, width)}
    shapes |= {"ffn_gate": (inner, width), "ffn_up": (inner, width), "ffn_down": (width, inner)}
    layers = math.ceil(size / sum(matrix(*shape).nbytes for shape in shapes.values()))
    path = folder / "model.gguf"
    writer: Any = gguf.GGUFWriter(path, "llama")
    for add, value in [
        (writer.add_vocab_size, config.vocab_size),
        (writer.add_context_length, 64),
        (writer.add_embedding_length, width),
        (writer.add_block_count, layers),
        (writer.add_feed_forward_length, inner),
        (writer.add_head_count, config.num_attention_heads),
        (writer.add_head_count_kv, config.num_key_value_heads),
        (writer.add_layer_norm_rms_eps, 1e-5),
        (writer.add_rope_freq_base, 10000.0),
        (writer.add_tokenizer_model, "gpt2"),
        (writer.add_token_list, [f"t{i}" for i in range(config.vocab_size)]),
        (writer.add_token_merges, ["t 0"]),
    ]:
        add(value)
    named = {"token_embd": (config.vocab_size, width), "output_norm": (width,)}
    for layer in range(layers):
        named |= {f"blk.{layer}.{name}": shape for name, shape in shapes.items()}
        named |= {f"blk.{layer}.{name}": (width,) for name in ("attn_norm", "ffn_norm")}
    for name, shape in named.items():
        if len(shape) == 1:
            writer.add_tensor(f"{name}.weight", np.ones(shape, np.float32))
        else:
            writer.add_tensor(f"{name}.weight", matrix(*shape), raw_dtype=asked)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


# -- on each rank ------------------------------------------------------------------------------------------------------


def load(path: str, plain: str, rounds: int) -> dict[str, float]:
    """Load a checkpoint as a run does; return bytes and seconds of this rank."""
    world = World.join("cpu", 600.0)
    world.make_mesh(1)
    section = ModelSection(source=path, attention="eager")
    source = resolve_source(section)
    model = shard_model(build_skeleton(source, section), world)
    values = _share(model.module)

    def filled() -> float:
        reader = open_reader(source, section, model.module)
        began = time.process_time()
        fill(model.module, reader, world.shard_rank, world.shard_size)
        seconds = time.process_time() - began
        reader.close()
        release_memory()
        return seconds

    with torch.no_grad():
        for parameter in model.module.parameters():
            _local(parameter).zero_()
    peak = _peak_above(filled)
    seconds, alone = [], []
    for _ in range(rounds):
        world.barrier("a round")
        alone.append(_safetensors_alone(plain))
        world.barrier("alone")
        seconds.append(filled())
    world.barrier("end")
    world.leave()
    return {"values": values, "peak": peak, "seconds": min(seconds), "alone": max(alone)}


def _local(parameter: torch.Tensor) -> torch.Tensor:
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def _share(module: torch.nn.Module) -> int:
    """Let all layers have the memory of the first; return how many values this rank has with each in its own place."""
    first, count = Tensors(), 0
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            local = _local(parameter)
            count += local.numel()
            local.set_(first.setdefault(re.sub(r"\.layers\.\d+\.", ".layers.0.", name), local))
    return count


def _peak_above(work: Callable[[], Any]) -> int:
    """Return by how many bytes this process grows at most while it works."""
    release_memory()
    Path("/proc/self/clear_refs").write_text("5")  # forget the earlier peak
    before = _status("VmRSS")
    work()
    return _status("VmHWM") - before


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(key)).split()[1])


def _safetensors_alone(folder: str) -> float:
    """Copy every tensor of a directory to a place that is there already; return bytes a second."""
    places, total, seconds = dict[tuple[int, ...], torch.Tensor](), 0, 0.0
    for file in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(file, framework="pt") as handle:
            for key in sorted(handle.keys()):
                shape = tuple(handle.get_slice(key).get_shape())
                if shape not in places:
                    places[shape] = torch.zeros(shape)
                began = time.process_time()
                places[shape].copy_(handle.get_tensor(key))
                seconds += time.process_time() - began
                total += places[shape].nbytes
    return total / seconds


def theirs(kind: str, path: str, rounds: int) -> dict[str, float]:
    """Dequantise the matrices of one layer by transformers' own code; return bytes of float32 values a second."""
    if kind.startswith("GGUF"):
        from gguf import GGUFReader, dequantize

        held = [tensor for tensor in GGUFReader(path).tensors if tensor.name.startswith("blk.0.ffn_")]
        made = [
            lambda tensor=tensor: dequantize(tensor.data, tensor.tensor_type) for tensor in held if len(tensor.shape) > 1
        ]
    else:
        from transformers.integrations import finegrained_fp8, mxfp4

        tensors = load_file(Path(path) / "model-00001.safetensors")
        single = torch.float32
        made = [
            lambda key=key: mxfp4.convert_moe_packed_tensors(
                tensors[key], tensors[key.replace("_blocks", "_scales")], dtype=single
            )
            for key in tensors
            if key.endswith("down_proj_blocks")
        ]
        fp8 = finegrained_fp8.Fp8Dequantize(None)
        made += [
            lambda key=key: fp8._dequantize_one(tensors[key], tensors[f"{key}_scale_inv"], single)
            for key in tensors
            if f"{key}_scale_inv" in tensors
        ]
    best = math.inf
    for _ in range(rounds):
        began, total = time.process_time(), 0
        for make in made:
            total += make().nbytes
        best = min(best, time.process_time() - began)
    return {"rate": total / best}


@benchmark(
    "Loading released formats",
    asked={"memory over the shard, MB: *": "<= 300", "rate against safetensors: *": ">= 0.5"},
    note="float32: the program's own reading of a plain checkpoint. Values are float32, 10^9 bytes a GB. "
    "Seconds are those of the processor, one thread a rank.",
)
def main(
    table: Table,
    gigabytes: Annotated[float, "of each file, at least"] = 1.0,
    ranks: tuple[int, ...] = (1, 2),
    kinds: tuple[str, ...] = ("MXFP4", "FP8", "GGUF Q8_0", "float32"),
    rounds: Annotated[int, "of which the best counts"] = 3,
    place: Annotated[str, "a directory for the files, one at a time"] = "",
) -> None:
    with tempfile.TemporaryDirectory(dir=place or None) as plain_folder:
        plain = _save("float32", Path(plain_folder), gigabytes * 1e9)
        for kind in kinds:
            with tempfile.TemporaryDirectory(dir=place or None) as folder:
                path = plain if kind == "float32" else _save(kind, Path(folder), gigabytes * 1e9)
                files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
                size = sum(file.stat().st_size for file in files)
                if kind != "float32":
                    rate = apart(theirs, kind, str(path), rounds, ranks=1, threads=1)[0]["rate"]
                    table.measured(f"GB of values a second, transformers' own code: {kind}, 1 rank", rate / 1e9)
                for count in ranks:
                    found = apart(load, str(path), str(plain), rounds, ranks=count, threads=1)
                    case = f"{kind}, {count} rank{'s' * (count > 1)}"
                    table.measured(f"memory over the shard, MB: {case}", max(each["peak"] for each in found) / 1e6)
                    rates = [4 * each["values"] / each["seconds"] for each in found]
                    ratio = min(rate / each["alone"] for rate, each in zip(rates, found, strict=True))
                    table.measured(f"rate against safetensors: {case}", ratio)
                    table.measured(f"GB of values a second and rank: {case}", min(rates) / 1e9)
                    table.measured(f"GB of values a second and rank, safetensors alone: {case}", found[0]["alone"] / 1e9)
                    table.measured(
                        f"GB of the file a second, all ranks: {case}", size / max(e["seconds"] for e in found) / 1e9
                    )


if __name__ == "__main__":
    main()

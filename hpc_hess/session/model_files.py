"""A sharded model on disk as a Hugging Face directory, written in bounded blocks and renamed into place whole."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch.distributed.tensor import DTensor, Shard

from hpc_hess.errors import HpcHessError, StoreError
from hpc_hess.intake.own_code import code_files
from hpc_hess.model.data.tokenizer import open_tokenizer
from hpc_hess.model.sharded.shard import ShardedModel
from hpc_hess.model.sources.source import Source
from hpc_hess.parallel.layout import Int64, Layout
from hpc_hess.parallel.world import World
from hpc_hess.storage.agree import attempt, explained
from hpc_hess.storage.disk import sync_directory, sync_file

_BLOCK = 1 << 24  # bytes that every rank holds at a time
_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)


@dataclass(frozen=True)
class Cut:
    """A tensor as it lies over the ranks: ``local`` (flat) holds the entries of the intervals, on this rank."""

    name: str
    shape: tuple[int, ...]
    local: torch.Tensor
    starts: Int64
    length: int


def cut_parameters(model: ShardedModel) -> list[Cut]:
    """Return every parameter of the model, selected or not, by name. Views: nothing is copied. Collective: no."""
    named = dict(model.module.named_parameters())
    dims = {
        name: next((p.dim for p in parameter.placements if isinstance(p, Shard)), 0)
        for name, parameter in named.items()
        if isinstance(parameter, DTensor)
    }
    world = model.world
    count, index = (world.shard_size, world.shard_rank) if model.sharded else (1, 0)
    shard = Layout({name: tuple(p.shape) for name, p in named.items()}, count, dims).shard(index)
    scalars = getattr(model.module, "scalars", ())
    cuts = []
    for piece in shard.pieces:
        name = piece.parameter.name
        whole = named[name].detach()
        local = whole.to_local() if isinstance(whole, DTensor) else whole
        shape = () if name in scalars else piece.parameter.shape
        cuts.append(Cut(name, shape, local.reshape(-1), piece.interval_starts, piece.interval_length))
    return cuts


def cut_like_selected(model: ShardedModel, prefix: str, flats: Iterable[torch.Tensor]) -> list[Cut]:
    """Return tensors that lie like the selected parameters, as PREFIX.NAME; one of ``flats`` per parameter."""
    return [
        Cut(
            f"{prefix}.{piece.parameter.name}",
            piece.parameter.shape,
            flat.reshape(-1),
            piece.interval_starts,
            piece.interval_length,
        )
        for piece, flat in zip(model.shard.pieces, flats, strict=True)
    ]


def _cut_buffers(model: ShardedModel) -> list[Cut]:
    """Return the persistent buffers. Every rank holds them whole: rank 0 gives them."""
    persistent, mine = model.module.state_dict().keys(), model.world.rank == 0
    return [
        Cut(name, tuple(buffer.shape), buffer.detach().reshape(-1), np.zeros(int(mine), np.int64), buffer.numel())
        for name, buffer in model.module.named_buffers()
        if name in persistent
    ]


def write_tensors(path: Path, cuts: list[Cut], world: World) -> None:
    """Write one safetensors file, on rank 0, from what the ranks of replica 0 hold, to the last bit. Collective: yes.

    A block of 16 MiB is summed over the ranks as bytes: all but the one that holds an entry add zero.

    Raises
    ------
    StoreError : it cannot be written.

    """
    error: HpcHessError | None = None
    file: IO[bytes] | None = None
    try:
        if world.rank == 0:
            file = path.open("wb")
            file.write(_header(cuts))
    except OSError as caught:
        error = explained(caught, path, "write tensors")
    for cut in cuts:
        for block in _blocks(cut, world):
            try:
                if file is not None and error is None:
                    file.write(block.cpu().numpy().tobytes())
            except OSError as caught:  # the others are in the next block's sum: go on with them, then say so
                error = explained(caught, path, "write tensors")
    with attempt(world, path, "write tensors"):
        if file is not None:
            with file:
                file.flush()
                os.fsync(file.fileno())
        if error is not None:
            raise error


def _header(cuts: list[Cut]) -> bytes:
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for cut in cuts:
        begin, end = end, end + torch.Size(cut.shape).numel() * cut.local.element_size()
        table[cut.name] = {"dtype": _NAMES[cut.local.dtype], "shape": list(cut.shape), "data_offsets": [begin, end]}
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _blocks(cut: Cut, world: World) -> Iterable[torch.Tensor]:
    """Yield the whole tensor's bytes, block by block, in order. Collective: yes."""
    width = cut.local.element_size()
    mine = cut.local.view(torch.uint8)
    begins, length = (cut.starts * width).tolist(), cut.length * width
    total = torch.Size(cut.shape).numel() * width
    first = 0  # the first interval that does not end before the block
    for low in range(0, total, _BLOCK):
        high = min(low + _BLOCK, total)
        block = torch.zeros(high - low, dtype=torch.uint8, device=mine.device)
        while first < len(begins) and begins[first] + length <= low:
            first += 1
        k = first
        while world.replica == 0 and k < len(begins) and begins[k] < high:
            a, b = max(begins[k], low), min(begins[k] + length, high)
            place = k * length - begins[k]
            block[a - low : b - low] = mine[place + a : place + b]
            k += 1
        yield world.sum_over_ranks(block, "gather a tensor")


def read_tensors(path: Path, cuts: list[Cut]) -> None:
    """Read this rank's entries of tensors that :func:`write_tensors` wrote, on any number of ranks. Collective: no.

    Raises
    ------
    StoreError : the file does not hold them.

    """
    with path.open("rb") as file:
        size = struct.unpack("<Q", file.read(8))[0]
        table = json.loads(file.read(size))
        for cut in cuts:
            found = table.get(cut.name, {})
            if (found.get("dtype"), found.get("shape")) != (_NAMES[cut.local.dtype], list(cut.shape)):
                raise StoreError(f"{path} does not hold {cut.name} as it is wanted: remove its directory to start before it")
            width, mine = cut.local.element_size(), cut.local.view(torch.uint8)
            for k, start in enumerate(cut.starts.tolist()):
                file.seek(8 + size + found["data_offsets"][0] + start * width)
                for part in mine[k * cut.length * width : (k + 1) * cut.length * width].split(_BLOCK):
                    part.copy_(torch.frombuffer(bytearray(file.read(part.numel())), dtype=torch.uint8))


@contextlib.contextmanager
def _aside(path: Path, world: World) -> Iterator[Path]:
    """Give a directory to write into that takes the name ``path`` when the block ends well. Collective: yes."""
    partial = path.with_name(path.name + ".part")
    with attempt(world, path, "write the checkpoint"):
        if world.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
    yield partial
    with attempt(world, path, "write the checkpoint"):
        if world.rank == 0:
            for file in partial.iterdir():
                if file.is_file():
                    sync_file(file)
            sync_directory(partial)
            partial.replace(path)
            sync_directory(path.parent)


def save_model(
    path: Path,
    model: ShardedModel,
    source: Source,
    world: World,
    *,
    texts: dict[str, str] | None = None,
    tensors: dict[str, list[Cut]] | None = None,
) -> None:
    """Write a directory that ``model.source`` reads back bit by bit: config.json, tokenizer, model.safetensors.

    It appears whole or not at all. Collective: yes.

    Parameters
    ----------
    source : where the model came from: its configuration and tokenizer are written again.
    texts, tensors : more files by name; of tensors, in the same format (a name in .safetensors would be the model's).

    Raises
    ------
    StoreError : the disk is full, or cannot be written.

    """
    with _aside(path, world) as partial:
        with attempt(world, path, "write the checkpoint"):
            if world.rank == 0:
                _write_config(partial, model, source)
                for name, text in (texts or {}).items():
                    (partial / name).write_text(text, encoding="utf-8")
        write_tensors(partial / "model.safetensors", cut_parameters(model) + _cut_buffers(model), world)
        for name, cuts in (tensors or {}).items():
            write_tensors(partial / name, cuts, world)


def _write_config(folder: Path, model: ShardedModel, source: Source) -> None:
    """Write config.json and what the tokenizer needs; rank 0."""
    hf_config = source.hf_config
    hf_config.dtype = model.space.dtype
    hf_config.architectures = [type(model.module).__name__.removeprefix("FSDP")]
    if getattr(hf_config, "quantization_config", None):
        del hf_config.quantization_config  # of a .gguf file: the weights are written as they are computed with
    if not source.own_code and hasattr(hf_config, "auto_map"):
        del hf_config.auto_map  # transformers' own class was taken: the weights are written by its names
    hf_config.save_pretrained(folder)
    if source.tokenizer_path is not None and source.tokenizer_path.is_file():  # there are no files to copy
        open_tokenizer(source.tokenizer_path).save_pretrained(folder)
        return
    origin = source.path if source.path.is_dir() else source.path.parent
    tokenizer = source.tokenizer_path or origin
    for name in _TOKENIZER_FILES:
        if (tokenizer / name).is_file():
            shutil.copy(tokenizer / name, folder / name)
    for name, code in _code_of(source, origin).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(code, folder / name)


def _code_of(source: Source, origin: Path) -> dict[str, Path]:
    """Return the Python files that the model (where its own code is run) and its tokenizer consist of."""
    config = source.path if source.path.is_file() else origin / "config.json"
    tables = []
    for file in [config] * source.own_code + [origin / "tokenizer_config.json"]:
        with contextlib.suppress(OSError, ValueError, AttributeError):
            tables.append(json.loads(file.read_text(encoding="utf-8")).get("auto_map"))
    return code_files(origin, tables)

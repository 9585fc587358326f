"""Directories of torch.distributed.checkpoint as lazy tensors: the table in .metadata, and chunks in .distcp files.

Both the table and the head of each chunk are pickles. They are read by an unpickler that makes plain records of a few named
classes, imports nothing and calls nothing else. The values themselves are raw bytes, mapped only while they are read.
"""

from __future__ import annotations

import io
import math
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from pickle import Unpickler
from typing import Any, BinaryIO

import numpy as np
import torch

from hpc_hess.errors import ModelError
from hpc_hess.intake.directory import DISTRIBUTED as TABLE
from hpc_hess.intake.directory import inside
from hpc_hess.model.sources.lazy import Box

_REMEDY = "copy the whole directory again, or save it anew"
_SPELLED = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.complex64: "C64",
}
_LOCAL_HEADER = 30  # bytes of a file's header in a zip archive, before its name


class Record:
    """What a pickle says of an object: the arguments it was made with and its state. Nothing of its class is run."""

    arguments: tuple[Any, ...] = ()
    state: Any = None

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __getitem__(self, name: str) -> Any:
        return self.state[name]


_RECORDS = {
    "torch.distributed.checkpoint.metadata": {
        "Metadata",
        "TensorStorageMetadata",
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "TensorProperties",
        "MetadataIndex",
        "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch._utils": {"_rebuild_tensor_v2"},
    "pathlib": {"PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath"},
    "pathlib._local": {"PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath"},
}
_VALUES: dict[tuple[str, str], Any] = {
    ("torch", "Size"): tuple,
    ("collections", "OrderedDict"): dict,
    ("torch", "DoubleStorage"): torch.float64,  # the class of a storage stands for its type: none is made
    ("torch", "FloatStorage"): torch.float32,
    ("torch", "HalfStorage"): torch.float16,
    ("torch", "BFloat16Storage"): torch.bfloat16,
    ("torch", "BoolStorage"): torch.bool,
    ("torch", "ByteStorage"): torch.uint8,
    ("torch", "CharStorage"): torch.int8,
    ("torch", "ShortStorage"): torch.int16,
    ("torch", "IntStorage"): torch.int32,
    ("torch", "LongStorage"): torch.int64,
}


class _Records(Unpickler):
    """Reads a pickle into records; refuses every name that the tables above do not hold."""

    def find_class(self, module: str, name: str) -> Any:
        if name in _RECORDS.get(module, ()):
            return Record
        if (module, name) in _VALUES:
            return _VALUES[module, name]
        if module == "torch" and isinstance(value := getattr(torch, name, None), torch.dtype):
            return value
        raise ValueError(f"it asks for {module}.{name}, which no checkpoint of tensors needs")

    def persistent_load(self, pid: Any) -> Any:
        return pid  # ("storage", type, key, device, entries) of torch.save


@dataclass(frozen=True)
class Chunk:
    """A part of a tensor: ``start`` and ``shape`` within it, and the bytes of a file in which torch.save wrote it."""

    path: Path
    offset: int
    length: int
    start: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    _place: list[tuple[int, int, tuple[int, ...]]] = field(default_factory=list, compare=False)  # once it is known

    def read(self, box: Box) -> torch.Tensor:
        """Return a box of the chunk, as a copy; nothing else of its entries is read."""
        if not self._place:
            self._place.append(self._find())
        first, entries, strides = self._place[0]
        if not entries:
            return torch.empty([high - low for low, high in box], dtype=self.dtype)
        mapped = np.memmap(self.path, np.uint8, "c", first, (entries * self.dtype.itemsize,))  # private: never written
        flat = torch.frombuffer(mapped, dtype=self.dtype)
        return flat.as_strided(self.shape, strides)[tuple(slice(*extent) for extent in box)].clone()

    def _find(self) -> tuple[int, int, tuple[int, ...]]:
        """Return the first byte of the entries in the file, their number, and the strides."""
        with self.path.open("rb") as file, zipfile.ZipFile(_Window(file, self.offset, self.length)) as archive:
            names = {name.partition("/")[2]: name for name in archive.namelist()}
            made = _Records(io.BytesIO(archive.read(names["data.pkl"]))).load()
            if not isinstance(made, Record) or len(made.arguments) < 4:
                raise ValueError("it holds no tensor")
            (_, dtype, key, _, _), start, size, strides = made.arguments[:4]
            entry = archive.getinfo(names[f"data/{key}"])
            file.seek(self.offset + entry.header_offset)
            name, extra = struct.unpack("<HH", file.read(_LOCAL_HEADER)[26:])
        if (tuple(size), dtype) != (self.shape, self.dtype) or entry.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"it holds {dtype} of shape {tuple(size)}, not what {TABLE} says")
        count = 1 + sum((n - 1) * stride for n, stride in zip(size, strides, strict=True)) if math.prod(size) else 0
        if start < 0 or min(strides, default=0) < 0 or (start + count) * dtype.itemsize > entry.file_size:
            raise ValueError("it is shorter than it says")
        begin = self.offset + entry.header_offset + _LOCAL_HEADER + name + extra
        return begin + start * dtype.itemsize, count, tuple(strides)


class _Window(io.RawIOBase):
    """A part of a file as a file of its own."""

    def __init__(self, file: BinaryIO, offset: int, length: int) -> None:
        self._file, self._offset, self._length, self._at = file, offset, length, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = max(0, offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence])
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        wanted = max(0, min(len(buffer), self._length - self._at))
        self._file.seek(self._offset + self._at)
        found = self._file.read(wanted)
        buffer[: len(found)] = found
        self._at += len(found)
        return len(found)


@dataclass(frozen=True)
class Distributed:
    """One tensor of a checkpoint, in the chunks that its ranks saved; ``dtype`` as safetensors writes it ("F32", ...)."""

    key: str
    shape: tuple[int, ...]
    torch_dtype: torch.dtype
    chunks: tuple[Chunk, ...]

    @property
    def dtype(self) -> str:
        """The type, as safetensors writes it."""
        return _SPELLED.get(self.torch_dtype, str(self.torch_dtype).removeprefix("torch."))

    @property
    def file(self) -> str:
        """The name of the file that its first chunk lies in."""
        return self.chunks[0].path.name if self.chunks else TABLE

    def read(self, box: Box) -> torch.Tensor:
        """Return the entries in the box from the chunks that meet it."""
        found = torch.empty([high - low for low, high in box], dtype=self.torch_dtype)
        for chunk in self.chunks:
            common = [
                (max(low, start), min(high, start + size))
                for (low, high), start, size in zip(box, chunk.start, chunk.shape, strict=True)
            ]
            if all(low < high for low, high in common):
                part = chunk.read(tuple((low - s, high - s) for (low, high), s in zip(common, chunk.start, strict=True)))
                found[tuple(slice(low - b, high - b) for (low, high), (b, _) in zip(common, box, strict=True))] = part
        return found


def read_table(directory: Path) -> tuple[dict[str, Distributed], list[str]]:
    """Return the tensors of a directory by their names, and the names of its other entries. Reads .metadata alone.

    Raises
    ------
    ModelError : .metadata is damaged, or names other classes than a checkpoint's; a file that it names is missing or too
        short; a tensor whose chunks are not the whole, or that was written in another way than torch.save's.

    """
    path = directory / TABLE
    try:
        with path.open("rb") as file:
            table = _Records(file).load()
        places = {
            (index["fqn"], tuple(index.state.get("offset") or ())): info for index, info in table["storage_data"].items()
        }
        return _tensors(directory, table["state_dict_metadata"], places)
    except ModelError:
        raise
    except Exception as error:  # of a damaged pickle: any kind
        raise ModelError(f"cannot read {path} ({type(error).__name__}: {error}): {_REMEDY}") from None


def _tensors(
    directory: Path, entries: Mapping[str, Record], places: Mapping[tuple[str, tuple[int, ...]], Record]
) -> tuple[dict[str, Distributed], list[str]]:
    found: dict[str, Distributed] = {}
    others, sizes = [], {}
    for key, entry in entries.items():
        if not entry.state:  # pickled objects: steps, settings
            others.append(key)
            continue
        shape, dtype, chunks = tuple(entry["size"]), entry["properties"].state[0], []
        for part in entry["chunks"]:
            start = tuple(part["offsets"])
            info = places[key, start].state
            assert info is not None
            name, offset, length = info["relative_path"], info["offset"], info["length"]
            if info.get("transform_descriptors"):
                raise ModelError(f"{directory / name} is compressed ({info['transform_descriptors']}): save it without that")
            if name not in sizes:
                sizes[name] = _size(directory, name)
            if offset + length > sizes[name]:
                raise ModelError(f"{directory / name} is shorter than {TABLE} says, at tensor '{key}': {_REMEDY}")
            chunks.append(Chunk(directory / name, offset, length, start, tuple(part["sizes"]), dtype))
        if sum(math.prod(chunk.shape) for chunk in chunks) != math.prod(shape):
            raise ModelError(f"{directory / TABLE} has no place for some entries of tensor '{key}': {_REMEDY}")
        found[key] = Distributed(key, shape, dtype, tuple(chunks))
    return found, others


def _size(directory: Path, name: str) -> int:
    """Return the bytes of a file that the table names, which must lie in the directory."""
    if not inside(directory, name):
        raise ModelError(f"'{name}', which {TABLE} names, is not a file of {directory}: only files inside it are read")
    if not (directory / name).is_file():
        raise ModelError(f"{directory / name} is missing, although {TABLE} names it: {_REMEDY}")
    return (directory / name).stat().st_size

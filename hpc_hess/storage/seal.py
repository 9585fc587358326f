"""A checksum of what HDF5 keeps about a file, looked at before HDF5 is: one wrong bit there can crash the library.

Files of this program are created whole, and what is written later is raw data alone. All other bytes stay what they
were: their digest, with the places of the raw data, stands in the user block that HDF5 leaves free at the beginning of
a file. Raw data have checksums of their own. Files of earlier versions have no seal.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import h5py

from hpc_hess.errors import StoreError
from hpc_hess.storage.disk import remedy

_MAGIC = b"hpc_hess seal "
_CHUNK = 1 << 20


def user_block_bytes(num_datasets: int) -> int:
    """Return the bytes that the seal of a file with so many data sets may take: a power of two."""
    return 1 << (max(4096, 512 + 48 * num_datasets) - 1).bit_length()


def raw_data(file: h5py.File) -> list[list[int]]:
    """Return (first byte, bytes) of every data set of an open file that lies in one piece, in that order."""
    found: list[list[int]] = []

    def note(name: str, each: Any) -> None:
        if isinstance(each, h5py.Dataset) and each.id.get_offset() is not None:
            found.append([each.id.get_offset(), each.id.get_storage_size()])

    file.visititems(note)
    return sorted(found)


def seal(path: Path, room: int, data: list[list[int]]) -> None:
    """Write the seal of a closed file that was created with a user block of ``room`` bytes. Not synced."""
    with path.open("r+b") as raw:
        raw.seek(room + 8)
        # the superblock notes who has the file open: in four bytes, or (version 2 on) under a checksum of its own
        noted = [room + 20, 4] if raw.read(1)[0] < 2 else [room, 48]
        said = {"room": room, "data": [noted, *data], "size": raw.seek(0, 2)}
        said["digest"] = _digest(raw, said)
        raw.seek(0)
        raw.write(_MAGIC + json.dumps(said).encode() + b"\n")


def check_seal(path: Path) -> None:
    """Raise StoreError where the bytes that HDF5 would go by are not those that were written."""
    problem = "what HDF5 keeps about its data is not what was written"
    with path.open("rb") as raw, contextlib.suppress(ValueError, TypeError, KeyError, AttributeError):
        if raw.read(len(_MAGIC)) != _MAGIC:
            return
        said = json.loads(raw.readline(_CHUNK << 4))
        size = raw.seek(0, 2)
        if size < said["size"]:
            problem = f"truncated: {size} of {said['size']} bytes"
        elif said.pop("digest") == _digest(raw, said):
            return
    raise StoreError(f"{path} cannot be used ({problem}): {remedy(path)}")


def _digest(raw: BinaryIO, said: dict[str, Any]) -> str:
    """Return the digest of what the seal says, and of all bytes after ``room`` that lie in none of its ``data``."""
    digest = hashlib.blake2b(json.dumps(said, sort_keys=True).encode(), digest_size=16)
    for start, stop in _between(said["room"], said["data"], said["size"]):
        raw.seek(start)
        for at in range(start, stop, _CHUNK):
            digest.update(raw.read(min(_CHUNK, stop - at)))
    return digest.hexdigest()


def _between(start: int, data: list[list[int]], size: int) -> Iterator[tuple[int, int]]:
    for first, length in [*data, [size, 0]]:
        if min(first, size) > start:
            yield start, min(first, size)
        start = max(start, first + length)

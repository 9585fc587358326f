"""What tells one model from another: configuration, every stored tensor (sampled within), and the model's own code."""

from __future__ import annotations

import hashlib
import itertools
import json
import mmap
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from hpc_hess.errors import ModelError
from hpc_hess.model.sources.paths import hash_file

_KIND = "tensors:"  # what a fingerprint of this kind begins with
_COMMIT = "commit:"
_READ = 1 << 26  # bytes of all weights that are read; less than that is read whole
_BLOCK = 1 << 12
_ENDS = 1 << 20  # of each file: what fingerprints of the earlier kind saw
_VOLATILE = ("transformers_version", "_name_or_path", "torch_dtype", "dtype", "use_cache")

Stored = tuple[str, Path, int, int]  # what it is (name, type, shape), its file, first byte, number of bytes


class Fingerprint(str):
    """A fingerprint that also knows what it was under the earlier kind, which older run directories hold."""

    _earlier: Callable[[], str]
    _tensors: Fingerprint | None = None

    @classmethod
    def of(cls, text: str, earlier: Callable[[], str]) -> Fingerprint:
        """Return the fingerprint ``text``; ``earlier`` computes the one of the earlier kind, where it is asked for."""
        self = cls(_KIND + text)
        self._earlier = earlier
        return self

    @classmethod
    def of_commit(cls, commit: str, tensors: Fingerprint) -> Fingerprint:
        """Return the fingerprint of a commit of the Hub; ``tensors`` is the one that its directory alone would have."""
        self = cls(_COMMIT + commit)
        self._tensors = tensors
        return self

    @property
    def tensors(self) -> Fingerprint:
        """The fingerprint that does not depend on whether the model came by a name or by a path."""
        return self._tensors or self

    def accepts(self, found: object) -> bool:
        """Return whether a stored fingerprint, of any kind, is of this model. Reads files for the earlier kind."""
        if self._tensors is not None:
            return found == str(self) or self._tensors.accepts(found)
        if not isinstance(found, str) or found.startswith(_KIND):
            return found == str(self)
        return found == self._earlier()

    def __reduce__(self) -> tuple[type[str], tuple[str]]:
        return str, (str(self),)


def told(hf_config: Any) -> bytes:
    """Return what a Hugging Face configuration says, without what is not the model's."""
    kept = {k: v for k, v in hf_config.to_dict().items() if k not in _VOLATILE}
    return json.dumps(kept, sort_keys=True, default=str).encode()


def fingerprint(
    kind: str,
    said: Sequence[bytes],
    stored: Sequence[Stored],
    code: Iterable[Path] = (),
    files: Sequence[tuple[str, Path]] = (),
) -> Fingerprint:
    """Return what tells a model source from others. Collective: no; reads at most about 64 MiB of weights.

    Parameters
    ----------
    kind : of the source.
    said : what else defines the model: its configuration, by :func:`told`, the seed of random weights.
    stored : the tensors of its weight files. ``code``: the model's own, read whole.
    files : the weight files, with the names that fingerprints of the earlier kind know them by.

    Raises
    ------
    ModelError : a weight file is damaged.

    """
    digest = hashlib.sha256(kind.encode())
    for part in said:
        digest.update(part)
    everything = sum(size for *_, size in stored) <= _READ
    most = max(1, _READ // _BLOCK // max(len(stored), 1))
    seen: dict[str, bytes] = {}  # by name: the same tensors in other files are the same model
    for file, entries in itertools.groupby(stored, lambda entry: entry[1]):
        with file.open("rb") as handle:
            for what, _, start, size in entries:
                tensor = hashlib.sha256(str(size).encode())
                for low, high in _blocks(size, None if everything else most):
                    handle.seek(start + low)
                    tensor.update(handle.read(high - low))
                seen[what] = tensor.digest()
    for what in sorted(seen):
        digest.update(what.encode() + b"\0" + seen[what])
    for file in code:
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return Fingerprint.of(digest.hexdigest(), lambda: _earlier(kind, said, files))


def _blocks(size: int, most: int | None) -> Iterator[tuple[int, int]]:
    """Yield [low, high) of at most ``most`` blocks, evenly over ``size`` bytes and at both ends; None: everything."""
    if most is None or size <= most * _BLOCK:
        for low in range(0, size, 1 << 20):
            yield low, min(low + (1 << 20), size)
        return
    for k in range(most):
        low = k * (size - _BLOCK) // max(most - 1, 1) if most > 1 else (size - _BLOCK) // 2
        yield low, low + _BLOCK


def safetensors_table(file: Path) -> list[Stored]:
    """Return what the header of a safetensors file says of its tensors. Raises ModelError."""
    try:
        with file.open("rb") as handle:
            length = struct.unpack("<Q", handle.read(8))[0]
            whole = file.stat().st_size
            if length > whole - 8:
                raise ValueError("the header is longer than the file")
            header = json.loads(handle.read(length))
            found = []
            for name, entry in header.items():
                if name != "__metadata__":
                    low, high = entry["data_offsets"]
                    found.append((f"{name}:{entry['dtype']}:{entry['shape']}", file, 8 + length + low, high - low))
            if any(start + size > whole for *_, start, size in found):
                raise ValueError("it is shorter than its header says")
            return found
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise ModelError(f"{file} is not a valid safetensors file ({_what(file, error)}): download it again") from None


def _what(file: Path, error: Exception) -> str:
    """Return the reason; a pointer of Git LFS, which lies where the file should, is named."""
    try:
        with file.open("rb") as handle:
            if handle.read(24).startswith(b"version https://git-lfs"):
                return "it is a pointer of Git LFS: git lfs pull fetches the file"
    except OSError:
        pass
    return str(error) or type(error).__name__


_FIXED = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # bytes of the metadata types of GGUF
_STRING, _ARRAY = 8, 9


def gguf_table(file: Path) -> list[Stored]:
    """Return what the header of a GGUF file says of its tensors, and the metadata as one entry more. Raises ModelError."""
    try:
        with file.open("rb") as handle, mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as data:
            if data[:4] != b"GGUF":
                raise ValueError("it does not begin with GGUF")
            version, tensors, pairs = struct.unpack_from("<IQQ", data, 4)
            if version not in (2, 3):  # written in other ways
                return [("file", file, 0, len(data))]
            at, alignment = 24, 32
            for _ in range(pairs):
                key, at = _gguf_string(data, at)
                if key == b"general.alignment":
                    alignment = struct.unpack_from("<I", data, at + 4)[0]
                at = _gguf_skip(data, struct.unpack_from("<I", data, at)[0], at + 4)
            entries = []
            for _ in range(tensors):
                name, at = _gguf_string(data, at)
                dims = struct.unpack_from("<I", data, at)[0]
                *shape, kind, offset = struct.unpack_from(f"<{dims}QIQ", data, at + 4)
                at += 4 + 8 * dims + 12
                entries.append((offset, name.decode("utf-8", "replace"), shape, kind))
            first = -(-at // alignment) * alignment
            ends = sorted([offset for offset, *_ in entries] + [len(data) - first])
            if any(first + offset > len(data) for offset in ends):
                raise ValueError("it is shorter than its header says")
            after = dict(itertools.pairwise(ends))
            return [
                ("metadata", file, 0, at),
                *(
                    (f"{name}:{kind}:{shape}", file, first + offset, after[offset] - offset)
                    for offset, name, shape, kind in entries
                ),
            ]
    except (OSError, ValueError, IndexError, KeyError, struct.error) as error:
        raise ModelError(f"cannot read {file}: {_what(file, error)}") from None


def _gguf_string(data: mmap.mmap, at: int) -> tuple[bytes, int]:
    length = struct.unpack_from("<Q", data, at)[0]
    if at + 8 + length > len(data):
        raise ValueError("a string is longer than the file")
    return data[at + 8 : at + 8 + length], at + 8 + length


def _gguf_skip(data: mmap.mmap, kind: int, at: int) -> int:
    if kind == _STRING:
        return at + 8 + int(struct.unpack_from("<Q", data, at)[0])
    if kind != _ARRAY:
        return at + _FIXED[kind]
    inner, count = struct.unpack_from("<IQ", data, at)
    at += 12
    if inner in _FIXED:
        return int(at + count * _FIXED[inner])
    for _ in range(count):
        at = _gguf_skip(data, inner, at)
    return at


def _earlier(kind: str, said: Sequence[bytes], files: Sequence[tuple[str, Path]]) -> str:
    """Return the fingerprint of the earlier kind: the ends of each weight file in place of its tensors."""
    digest = hashlib.sha256(kind.encode())
    for part in said:
        digest.update(part)
    for name, file in files:
        digest.update(name.encode())
        hash_file(file, digest, _ENDS)
    return digest.hexdigest()

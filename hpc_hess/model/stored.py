"""Safetensors files of a directory as lazy tensors, mapped only while little of them is resident."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hpc_hess.errors import ModelError
from hpc_hess.model.lazy import Box, Lazy

_MAPPED = 1 << 26  # bytes read through one mapping before it is dropped: mapped pages count as this process's memory


class SafetensorsFiles:
    """The files that a checkpoint directory consists of.

    Raises
    ------
    ModelError : the index is unreadable, or a file it names is missing, damaged or lacks a tensor.

    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._handles: dict[str, Any] = {}
        self._mapped = 0

    def tensors(self) -> dict[str, Lazy]:
        """Return every tensor by its name in the checkpoint; reads file headers only."""
        found: dict[str, Lazy] = {}
        for file, keys in self._table().items():
            handle = self._open(file)
            present = set(handle.keys())
            for key in present if keys is None else keys:
                if key not in present:
                    raise ModelError(f"{self._directory / file} has no tensor '{key}', which the index says it holds")
                found[key] = _Stored(self, file, key, tuple(handle.get_slice(key).get_shape()))
            self.close()
        return found

    def read(self, file: str, key: str, shape: tuple[int, ...], box: Box) -> torch.Tensor:
        """Return a box of a tensor, possibly as a view of the mapped file."""
        whole = not math.prod(shape) or not box  # nothing to cut: a scalar, an empty tensor
        stored = self._open(file).get_tensor(key) if whole else self._open(file).get_slice(key)
        tensor: torch.Tensor = stored if whole else stored[tuple(slice(low, high) for low, high in box)]
        rows = box[0][1] - box[0][0] if box else 1
        self._mapped += rows * math.prod(shape[1:]) * tensor.element_size()
        if self._mapped > _MAPPED:
            self.close()  # the view keeps its own file mapped until it is copied
        return tensor.reshape([high - low for low, high in box])

    def close(self) -> None:
        """Unmap; a later read maps again."""
        self._handles.clear()
        self._mapped = 0

    def _table(self) -> dict[str, list[str] | None]:
        """Return file name -> its tensors by the index, or None for all of them."""
        index = self._directory / "model.safetensors.index.json"
        if index.is_file():
            try:
                table: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            except (ValueError, KeyError, TypeError) as error:
                raise ModelError(f"cannot read {index}: {error}") from None
            files: dict[str, list[str] | None] = {}
            for key, file in table.items():
                tensors = files.setdefault(file, [])
                assert tensors is not None
                tensors.append(key)
            return files
        if (self._directory / "model.safetensors").is_file():
            return {"model.safetensors": None}
        return {file.name: None for file in sorted(self._directory.glob("*.safetensors"))}

    def _open(self, file: str) -> Any:
        from safetensors import safe_open

        if file not in self._handles:
            path = self._directory / file
            if not path.is_file():
                raise ModelError(f"{path} is missing, although the index of the checkpoint names it")
            try:
                self._handles[file] = safe_open(str(path), framework="pt", device="cpu")
            except Exception as error:
                raise ModelError(f"{path} is not a valid safetensors file ({error}): download it again") from None
        return self._handles[file]


@dataclass(frozen=True)
class _Stored:
    """One tensor of a file."""

    files: SafetensorsFiles
    file: str
    key: str
    shape: tuple[int, ...]

    def read(self, box: Box) -> torch.Tensor:
        """Read the box and nothing else."""
        return self.files.read(self.file, self.key, self.shape, box)

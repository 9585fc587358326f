"""Safetensors files of a directory as lazy tensors, mapped only while little of them is resident."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from hpc_hess.errors import ModelError
from hpc_hess.intake.directory import WeightFiles
from hpc_hess.model.sources.lazy import Box

_MAPPED = 1 << 26  # bytes read through one mapping before it is dropped: mapped pages count as this process's memory


class SafetensorsFiles:
    """The files that a checkpoint directory consists of.

    Raises
    ------
    ModelError : a file is damaged, lacks a tensor that the index promises, or holds one that another holds too.

    """

    def __init__(self, files: WeightFiles) -> None:
        self._files = files
        self._directory = files.directory
        self._handles: dict[str, Any] = {}
        self._mapped = 0

    def tensors(self) -> dict[str, Stored]:
        """Return every tensor by its name in the checkpoint, as from_pretrained reads them; reads file headers only."""
        found: dict[str, Stored] = {}
        for file in self._files.names:
            handle = self._open(file)
            for key in sorted(handle.keys()):
                if key in found:
                    raise ModelError(
                        f"{self._directory / file} and {found[key].file} both hold the tensor '{key}': remove the file that "
                        "does not belong to the model"
                    )
                part = handle.get_slice(key)
                found[key] = Stored(self, file, key, tuple(part.get_shape()), part.get_dtype())
            self.close()
        for key, file in self._files.indexed.items():
            if key not in found:
                raise ModelError(f"{self._directory / file} has no tensor '{key}', which the index says it holds")
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

    def _open(self, file: str) -> Any:
        from safetensors import safe_open

        if file not in self._handles:
            path = self._directory / file
            try:
                self._handles[file] = safe_open(str(path), framework="pt", device="cpu")
            except Exception as error:
                raise ModelError(f"{path} is not a valid safetensors file ({error}): download it again") from None
        return self._handles[file]


@dataclass(frozen=True)
class Stored:
    """One tensor of a file; ``dtype`` as safetensors writes it ("F32", "F8_E4M3", ...)."""

    files: SafetensorsFiles
    file: str
    key: str
    shape: tuple[int, ...]
    dtype: str

    def read(self, box: Box) -> torch.Tensor:
        """Read the box and nothing else."""
        return self.files.read(self.file, self.key, self.shape, box)

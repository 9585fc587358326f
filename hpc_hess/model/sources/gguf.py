"""Weights from a GGUF file, for demonstrations: the whole model is dequantised on each rank, then served in slices."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn

from hpc_hess.config import ModelSection
from hpc_hess.errors import ModelError
from hpc_hess.intake.findings import passed
from hpc_hess.model.sources.checkpoint import unused_findings
from hpc_hess.model.sources.conversion import model_tensors
from hpc_hess.model.sources.lazy import Lazy, Resident
from hpc_hess.model.sources.source import Source


class _Places(dict[str, str]):
    """GGUF name -> the model's name, by transformers; remembers the stored tensors that have none."""

    def __init__(self, places: dict[str, str]) -> None:
        super().__init__(places)
        self.without: list[str] = []

    def __contains__(self, name: object) -> bool:
        found = super().__contains__(name)
        if not found and isinstance(name, str):
            self.without.append(name)
        return found


class GgufReader:
    """Holds the dequantised float32 tensors until ``close``.

    Raises
    ------
    ModelError : a package is missing, the file is damaged, or its tensors do not match the model.

    """

    def __init__(self, path: Path, skeleton: nn.Module, ignore_unused: bool = False) -> None:
        from transformers import modeling_gguf_pytorch_utils as loading

        places: list[_Places] = []

        def watched(*args: Any, **options: Any) -> _Places:
            places.append(_Places(mapping(*args, **options)))
            return places[-1]

        mapping = loading.get_gguf_hf_weights_map
        try:
            with (
                contextlib.redirect_stderr(io.StringIO()),  # a progress bar that no setting turns off
                mock.patch.object(loading, "get_gguf_hf_weights_map", watched),
            ):
                loaded = loading.load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=skeleton)
        except ImportError as error:
            raise ModelError(f"reading a GGUF file needs the demo extra: pip install 'hpc-hess[demo]' ({error})") from None
        except Exception as error:
            raise ModelError(f"cannot read {path}: {error}") from None
        stored: dict[str, Lazy] = {name: Resident(t.float()) for name, t in loaded["tensors"].items()}
        mapped = model_tensors(stored, skeleton)
        self._tensors = mapped.tensors
        for name, parameter in skeleton.named_parameters():
            found = self._tensors.get(name)
            if found is None or found.shape != tuple(parameter.shape):
                holds = "no such tensor" if found is None else f"one of shape {found.shape}"
                raise ModelError(f"parameter '{name}' should have shape {tuple(parameter.shape)}; {path} holds {holds}")
        for name in places[-1].without if places else []:  # their values are gone
            mapped.unused[name], stored[name] = name, Resident(torch.ones(()))
        self.findings = [
            passed("weights.files", f"{len(stored)} tensors of {path.name}, dequantised"),
            *unused_findings(path, stored, mapped, skeleton, ignore_unused),
        ]

    def read(self, name: str, dim: int, low: int, high: int) -> torch.Tensor:
        """Return entries [low, high) of parameter ``name`` along ``dim``. Collective: no."""
        tensor = self._tensors[name]
        box = [(0, n) for n in tensor.shape]
        if box:
            box[dim] = (low, high)
        return tensor.read(tuple(box))

    def read_buffer(self, name: str) -> torch.Tensor | None:
        """Return a buffer that the file holds, else None."""
        tensor = self._tensors.get(name)
        return None if tensor is None else tensor.read(tuple((0, n) for n in tensor.shape))

    def close(self) -> None:
        """Free the dequantised tensors."""
        self._tensors.clear()


def reader(source: Source, section: ModelSection, skeleton: nn.Module) -> GgufReader:
    """Return the reader of a GGUF file, as a ModelSpec names it."""
    return GgufReader(source.path, skeleton, section.unused == "ignore")

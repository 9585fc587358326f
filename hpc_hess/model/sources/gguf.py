"""Weights from a GGUF file, slice by slice: names and rearrangements are transformers', the formats those of gguf."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from hpc_hess.config import ModelSection
from hpc_hess.errors import ModelError
from hpc_hess.intake.findings import passed
from hpc_hess.model.sources.checkpoint import unused_findings
from hpc_hess.model.sources.conversion import model_tensors
from hpc_hess.model.sources.lazy import Box, Computed, Joined, Lazy, Rows, copy, cuts, slab
from hpc_hess.model.sources.quantised import cover, note
from hpc_hess.model.sources.source import Source

_CHUNK = 1 << 18  # values that are made at a time: several passes go over them, in the processor's cache
_PLAIN = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class GgufTensor:
    """One tensor of a file: ``kind`` is gguf's type of it, ``held`` the shape of what is stored, in items of ``dtype``."""

    path: Path
    offset: int
    kind: Any
    dtype: Any
    held: tuple[int, ...]
    shape: tuple[int, ...]

    def read(self, box: Box) -> torch.Tensor:
        """Return the box in float32; reads the blocks of entries that it touches."""
        values = torch.empty([stop - start for start, stop in box])
        self.write(box, values)
        return values

    def write(self, box: Box, place: torch.Tensor) -> None:
        """Write the box into ``place``, of any floating dtype."""
        from gguf import GGML_QUANT_SIZES

        *lead, (low, high) = box
        size, width = GGML_QUANT_SIZES[self.kind]
        items = width if self.held != self.shape else 1  # of what is stored, in a block of ``size`` entries
        first, last = cover(low, high, size)
        mapped = np.memmap(self.path, self.dtype, "r", self.offset, self.held)  # only while it is read
        cut = mapped[(*(slice(*extent) for extent in lead), slice(first * items, last * items))]
        rows = max(1, _CHUNK // max(1, (last - first) * size))
        for part in cuts(tuple((0, n) for n in cut.shape[:-1]), rows):
            at = tuple(slice(*extent) for extent in part)
            place[at].copy_(_values(np.array(cut[at]), self.kind)[..., low - first * size : high - first * size])


def _values(stored: np.ndarray, kind: Any) -> torch.Tensor:
    """Return the float32 values of whole blocks, (..., entries)."""
    from gguf import GGMLQuantizationType, dequantize

    if kind != GGMLQuantizationType.Q8_0:
        return torch.from_numpy(dequantize(stored, kind))
    blocks = torch.from_numpy(stored).unflatten(-1, (-1, 34))  # a scale in float16, 32 integers of 8 bits: faster here
    scales = blocks[..., :2].contiguous().view(torch.float16).float()
    return blocks[..., 2:].view(torch.int8).float().mul_(scales).flatten(-2)


class GgufReader:
    """Serves slices; nothing of the file is held.

    Raises
    ------
    ModelError : a package is missing, the file is damaged, or its tensors do not match the model.

    """

    def __init__(self, path: Path, skeleton: nn.Module, ignore_unused: bool = False) -> None:
        try:
            held, stored, without = _tensors(path, skeleton)
        except ImportError as error:
            raise ModelError(f"reading a GGUF file needs the demo extra: pip install 'hpc-hess[demo]' ({error})") from None
        except Exception as error:
            raise ModelError(f"cannot read {path}: {error}") from None
        mapped = model_tensors(stored, skeleton)
        self._path, self._tensors = path, mapped.tensors
        for name, parameter in skeleton.named_parameters():
            found = self._tensors.get(name)
            if found is None or found.shape != tuple(parameter.shape):
                holds = "no such tensor" if found is None else f"one of shape {found.shape}"
                raise ModelError(f"parameter '{name}' should have shape {tuple(parameter.shape)}; {path} holds {holds}")
        for name in without:
            mapped.unused[name], stored[name] = name, held[name]
        kinds = [tensor.kind.name for tensor in held.values()]
        count = sum(kind not in _PLAIN for kind in kinds)
        self.findings = [
            passed("weights.files", f"{len(held)} tensors ({', '.join(sorted(set(kinds)))}) of {path.name}"),
            *([note("GGUF", count)] if count else []),
            *unused_findings(path, stored, mapped, skeleton, ignore_unused),
        ]

    def read(self, name: str, dim: int, low: int, high: int) -> torch.Tensor:
        """Return entries [low, high) of parameter ``name`` along ``dim``. Collective: no.

        Raises
        ------
        ModelError : the file cannot be read there.

        """
        tensor = self._tensors[name]
        with self._reading(name):
            return tensor.read(slab(tensor.shape, dim, low, high))

    def copy(self, name: str, dim: int, low: int, place: torch.Tensor) -> None:
        """Copy the entries from ``low`` on along ``dim`` that ``place`` has room for. Raises ModelError. Collective: no."""
        tensor = self._tensors[name]
        with self._reading(name):
            copy(tensor, slab(tensor.shape, dim, low, low + place.shape[dim]), place)

    @contextlib.contextmanager
    def _reading(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            raise ModelError(f"cannot read tensor '{name}' of {self._path}: {error}") from None

    def read_buffer(self, name: str) -> torch.Tensor | None:
        """Return a buffer that the file holds, else None."""
        tensor = self._tensors.get(name)
        return None if tensor is None else tensor.read(tuple((0, n) for n in tensor.shape))

    def close(self) -> None:
        """Forget the tensors."""
        self._tensors.clear()


def _tensors(path: Path, skeleton: Any) -> tuple[dict[str, GgufTensor], dict[str, Lazy], list[str]]:
    """Return the tensors as the file has them, those that the model takes by its names, and the names of the others."""
    from gguf import GGUFReader
    from transformers import modeling_gguf_pytorch_utils as loading

    file = GGUFReader(path)
    held = {
        t.name: GgufTensor(path, t.data_offset, t.tensor_type, t.data.dtype, t.data.shape, tuple(t.shape.tolist()[::-1]))
        for t in file.tensors
    }
    for tensor in {tensor.kind: tensor for tensor in held.values()}.values():
        tensor.read(tuple((0, 1) for _ in tensor.shape))  # raises for a type that gguf cannot dequantise
    architecture = loading.read_field(file, "general.architecture")[0]
    processor = loading.TENSOR_PROCESSORS.get(architecture, loading.TensorProcessor)(config=skeleton.config.to_dict())
    places = loading.get_gguf_hf_weights_map(skeleton, processor)
    experts = getattr(processor, "GGUF_MOE_WEIGHTS_PATTERN", None)
    stored: dict[str, Lazy] = {}
    without: list[str] = []
    merged: dict[str, dict[str, Lazy]] = {}
    for name, tensor in held.items():
        match = experts.fullmatch(name) if experts is not None and "w" in experts.groupindex else None
        if match and match["name"] in places:
            merged.setdefault(places[match["name"]], {})[match["w"]] = tensor
        elif name in places:
            stored[places[name]] = _processed(tensor, name, processor)
        else:
            without.append(name)
    for name, parts in merged.items():
        whole = [parts[w] for w in ("gate", "up", "down") if w in parts]
        stored[name] = whole[0] if len(whole) == 1 else Joined(whole, 1)
    return held, stored, without


def _processed(tensor: GgufTensor, name: str, processor: Any) -> Lazy:
    """Return what transformers makes of a tensor: mostly nothing, or rows in another order; else it is made whole."""
    if name == "output.weight":
        return tensor
    process: Callable[[Any], Any] = lambda weights: processor.process(weights=weights, name=name).weights  # noqa: E731
    with np.errstate(all="ignore"):
        probe = np.broadcast_to(np.float32(0.0), tensor.shape)  # no memory behind it
        made = process(probe)
    if made is probe:
        return tensor
    if hasattr(processor, "_reverse_permute_weights"):
        order = process(np.arange(tensor.shape[0]).reshape(-1, *(1 for _ in tensor.shape[1:]))).reshape(-1)
        return Rows(tensor, torch.from_numpy(np.ascontiguousarray(order)))

    def compute() -> torch.Tensor:
        return torch.from_numpy(np.copy(process(tensor.read(tuple((0, n) for n in tensor.shape)).numpy())))

    return Computed(made.shape, compute)


def reader(source: Source, section: ModelSection, skeleton: nn.Module) -> GgufReader:
    """Return the reader of a GGUF file, as a ModelSpec names it."""
    return GgufReader(source.path, skeleton, section.unused == "ignore")

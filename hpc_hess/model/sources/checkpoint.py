"""Weights from a directory of safetensors files, read slice by slice; quantised ones are dequantised as they are read."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hpc_hess.config import ModelSection
from hpc_hess.errors import ModelError
from hpc_hess.intake.directory import WeightFiles
from hpc_hess.intake.findings import Finding, noted, passed
from hpc_hess.intake.quantisation import Quantisation, declared
from hpc_hess.intake.tensors import (
    ROTARY,
    TOWERS,
    Architecture,
    companion,
    names,
    sort_unused,
    tower,
    towers_note,
    wrong_type,
)
from hpc_hess.model.sources.conversion import Mapped, model_tensors
from hpc_hess.model.sources.lazy import Computed, Lazy, copy, slab
from hpc_hess.model.sources.quantised import Mxfp4, Scaled, dequantised
from hpc_hess.model.sources.source import Source
from hpc_hess.model.sources.stored import SafetensorsFiles, Stored

_COMPARED_ROWS = 16
_READ_WHOLE = 1 << 20  # entries of a vector that is read to see whether it is zero


class SafetensorsReader:
    """Reads slices of the model's tensors from safetensors files; the files are mapped, never read whole.

    Parameters
    ----------
    files : which files hold the weights; or what has a directory, names of files, their ``tensors()`` and ``close()``.
    skeleton : the model, before or after sharding; gives names, shapes and the architecture's conversion table.
    ignore_unused : take the model although the files hold tensors that it does not take.
    quantisation : the one that config.json declares.

    Raises
    ------
    ModelError : a file is damaged; a tensor is quantised as config.json does not say, or has no place in the model; a
        parameter has no tensor, or one of another shape; two tensors that the configuration ties differ.

    """

    def __init__(
        self, files: Any, skeleton: nn.Module, ignore_unused: bool = False, quantisation: Quantisation | None = None
    ) -> None:
        self._directory = files.directory
        self._files = SafetensorsFiles(files) if isinstance(files, WeightFiles) else files
        held = self._files.tensors()
        stored: Mapping[str, Stored | Mxfp4 | Scaled] = held
        notes: list[Finding] = []
        if quantisation is not None:
            stored, notes = dequantised(held, quantisation, self._directory)
        mapped = model_tensors(stored, skeleton)
        self._tensors = mapped.tensors
        says = f"config.json declares {quantisation.method}" if quantisation else "config.json has no quantization_config"
        _check_types(self._directory, stored, mapped, skeleton, says)
        self._tie(skeleton)
        self._check(skeleton, stored)
        types = ", ".join(sorted({tensor.dtype for tensor in held.values()}))
        where = files.names[0] if len(files.names) == 1 else f"{len(files.names)} files"
        self.findings = [
            passed("weights.files", f"{len(held)} tensors ({types}) of {where}"),
            *notes,
            *unused_findings(self._directory, stored, mapped, skeleton, ignore_unused),
            *_missing_buffers(mapped, skeleton),
        ]

    def read(self, name: str, dim: int, low: int, high: int) -> torch.Tensor:
        """Return entries [low, high) of parameter ``name`` along ``dim``, in the file's dtype. Collective: no.

        Raises
        ------
        ModelError : the file cannot be read there.

        """
        tensor = self._tensors[name]
        with self._reading(name):
            found = tensor.read(slab(tensor.shape, dim, low, high))
            return found if found.ndim else found.reshape(1)  # a scalar, held as a vector: see model.sources.scalars

    def copy(self, name: str, dim: int, low: int, place: torch.Tensor) -> None:
        """Copy the entries from ``low`` on along ``dim`` that ``place`` has room for. Raises ModelError. Collective: no."""
        tensor = self._tensors[name]
        with self._reading(name):
            where = place if tensor.shape else place.reshape(())
            copy(tensor, slab(tensor.shape, dim, low, low + place.shape[dim]), where)

    @contextlib.contextmanager
    def _reading(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            raise ModelError(f"cannot read tensor '{name}' of {self._directory}: {error}") from None

    def read_buffer(self, name: str) -> torch.Tensor | None:
        """Return a buffer the checkpoint holds, else None."""
        tensor = self._tensors.get(name)
        return None if tensor is None else tensor.read(tuple((0, n) for n in tensor.shape))

    def close(self) -> None:
        """Unmap the files."""
        self._files.close()
        self._tensors.clear()

    def _tie(self, skeleton: nn.Module) -> None:
        """Find each tied parameter under whichever of its names the checkpoint has; refuse names that disagree."""
        names: dict[int, list[str]] = {}
        for name, parameter in skeleton.named_parameters(remove_duplicate=False):
            names.setdefault(id(parameter), []).append(name)
        for tied in names.values():
            present = [name for name in tied if name in self._tensors]
            for other in present[1:]:
                if not _same(self._tensors[present[0]], self._tensors[other]):
                    raise ModelError(
                        f"the configuration ties '{present[0]}' and '{other}', but {self._directory} holds different "
                        'values for them: set "tie_word_embeddings": false in its config.json'
                    )
            for name in tied:
                if present:
                    self._tensors.setdefault(name, self._tensors[present[0]])

    def _check(self, skeleton: nn.Module, held: Iterable[str]) -> None:
        missing = [name for name, _ in skeleton.named_parameters() if name not in self._tensors]
        if missing:
            more = f" and {len(missing) - 1} others" if len(missing) > 1 else ""
            longer = next((name for name in held if name.endswith(f".{missing[0]}")), None)
            remedy = "check that config.json belongs to these weights, and that every file of them is there"
            base = getattr(skeleton, "base_model_prefix", "") or "no prefix"
            if longer is None and not any(name.startswith(f"{base}.") for name in missing):
                remedy = "this is the head of model.task: train it first, or set model.task to what the weights are for"
            if longer is not None:
                remedy = f"it holds '{longer}': save the model itself, not its wrapper (DataParallel, torch.compile)"
            raise ModelError(f"{self._directory} has no tensor for parameter '{missing[0]}'{more}: {remedy}")
        persistent = skeleton.state_dict().keys()
        buffers = [(n, b) for n, b in skeleton.named_buffers() if n in persistent and n in self._tensors]
        for name, place in [*skeleton.named_parameters(), *buffers]:
            tensor = self._tensors[name]
            is_parameter = isinstance(place, nn.Parameter)
            stored = (tensor.shape or (1,)) if is_parameter else tensor.shape  # scalar parameters have the shape (1,)
            if not isinstance(tensor, Computed) and stored != tuple(place.shape):
                what = "parameter" if is_parameter else "buffer"
                raise ModelError(
                    f"{what} '{name}' has shape {tuple(place.shape)} by config.json but {tensor.shape} in "
                    f"{self._directory}: the configuration belongs to another checkpoint"
                )


def _check_types(
    directory: Path, stored: Mapping[str, Stored | Mxfp4 | Scaled], mapped: Mapped, skeleton: nn.Module, says: str
) -> None:
    """Refuse tensors that are stored in a type, or beside scales, that what config.json ``says`` does not explain."""
    remedy = f"{says}: dequantise the checkpoint to bfloat16 or float32 safetensors first"
    for name, place in [*skeleton.named_parameters(), *skeleton.named_buffers()]:
        for key in mapped.sources.get(name, ()):
            if kind := wrong_type(stored[key].dtype, place.is_floating_point()):
                raise ModelError(f"'{key}' of {directory / stored[key].file} is stored as {kind}, and {remedy}")
    if beside := companion(mapped.unused, stored):
        file = directory / stored[beside].file
        raise ModelError(f"{file} holds '{beside}', which belongs to quantised weights, and {remedy}")


def unused_findings(
    place: Path, stored: Mapping[str, Lazy], mapped: Mapped, skeleton: nn.Module, ignore: bool
) -> list[Finding]:
    """Return what is to be said of stored tensors that the model does not take. Collective: no.

    Raises
    ------
    ModelError : some of them are no known leftovers, and they are not to be ignored.

    """
    if not mapped.unused:
        return [passed("weights.unused", "none")]

    def is_zero(key: str) -> bool:
        shape = stored[key].shape
        return math.prod(shape) <= _READ_WHOLE and not bool(stored[key].read(tuple((0, n) for n in shape)).any())

    architecture = _architecture(skeleton)
    found = sort_unused(mapped.unused, {k: stored[k].shape for k in mapped.unused}, architecture, is_zero)
    if found.others and not ignore:
        raise ModelError(
            f"{place} holds tensors that the model of its config.json does not take ({len(found.others)}: "
            f"{names(found.others)}): correct config.json (a switch or size that these need), or set "
            'model.unused = "ignore" to compute without them'
        )
    parts: dict[str, int] = {}
    for key in found.known.pop(TOWERS, []):
        part = tower(key, mapped.unused[key], architecture) or key
        parts[part] = parts.get(part, 0) + math.prod(stored[key].shape)
    parts |= {part: count for part, count in architecture.left_out.items() if part in parts}  # without buffers
    findings = [towers_note(parts)] if parts else []
    findings += [noted("weights.unused", f"{kind}, not taken: {names(keys)}") for kind, keys in found.known.items()]
    if differ := _other_frequencies(found.known.get(ROTARY, []), stored, skeleton):
        findings.append(noted("weights.unused", f"rotary frequencies are those of config.json; {differ} holds other ones"))
    if found.others:
        findings.append(noted("weights.unused", f'ignored, as model.unused = "ignore" asks: {names(found.others, 8)}'))
    return findings


def _other_frequencies(keys: list[str], stored: Mapping[str, Lazy], skeleton: nn.Module) -> str | None:
    """Return a stored vector of rotary frequencies that is more than two per cent off every one of the model's."""
    own = [b.float().cpu() for name, b in skeleton.named_buffers() if name.endswith("inv_freq") and not b.is_meta]
    for key in keys:
        shape = stored[key].shape
        if own and key.endswith("inv_freq") and len(shape) == 1:
            value = stored[key].read(((0, shape[0]),)).float()
            if not any(value.shape == b.shape and torch.allclose(value, b, rtol=0.02, atol=1e-9) for b in own):
                return key
    return None


def _architecture(skeleton: nn.Module) -> Architecture:
    """Return what the model's class and configuration say of leftovers in its checkpoints."""
    config = getattr(skeleton, "config", None)
    text = config.get_text_config() if config is not None else None
    ignored = getattr(skeleton, "_keys_to_ignore_on_load_unexpected", None) or ()
    layers = getattr(text, "num_hidden_layers", None)
    extra = getattr(text, "num_nextn_predict_layers", None)
    encoder = any(".encoder." in f".{name}" for name, _ in skeleton.named_parameters())
    return Architecture(
        tuple(ignored),
        layers if isinstance(layers, int) else None,
        extra if isinstance(extra, int) else 0,
        text_of_more="text" in type(config).__name__.lower(),
        left_out=getattr(skeleton, "left_out", {}),
        decoder_of_more=bool(getattr(text, "encoder_layers", None)) and not encoder,
    )


def _missing_buffers(mapped: Mapped, skeleton: nn.Module) -> list[Finding]:
    persistent = skeleton.state_dict().keys()
    missing = [name for name, _ in skeleton.named_buffers() if name in persistent and name not in mapped.tensors]
    if not missing:
        return []
    return [noted("weights.buffers", f"not in the files, left as the model's code makes them: {names(missing)}")]


def _same(a: Lazy, b: Lazy) -> bool:
    """Compare a sample of rows; a copy made when the model was saved is equal everywhere."""
    if a.shape != b.shape or not a.shape:
        return a.shape == b.shape
    rows = sorted({i * (a.shape[0] - 1) // _COMPARED_ROWS for i in range(_COMPARED_ROWS + 1)})
    rest = tuple((0, n) for n in a.shape[1:])
    return all(torch.equal(a.read(((i, i + 1), *rest)), b.read(((i, i + 1), *rest))) for i in rows)


def reader(source: Source, section: ModelSection, skeleton: nn.Module) -> SafetensorsReader:
    """Return the reader of a directory, as a ModelSpec names it."""
    assert source.files is not None
    how = declared(source.hf_config, source.path)
    return SafetensorsReader(source.files, skeleton, section.unused == "ignore", how)

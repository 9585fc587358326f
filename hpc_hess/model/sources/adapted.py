"""A base with a PEFT adapter as one source: found, and its weights made slice by slice of both."""

from __future__ import annotations

import contextlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hpc_hess.config import ModelSection
from hpc_hess.errors import ModelError, UnreachableError
from hpc_hess.intake.adapter import CONFIG, WEIGHTS, LoraSettings, is_adapter, read_settings
from hpc_hess.intake.findings import Finding, noted
from hpc_hess.model.sources.adapter import Adapter, Change, place
from hpc_hess.model.sources.fingerprint import fingerprint, safetensors_table
from hpc_hess.model.sources.hub import named
from hpc_hess.model.sources.lora import names_of, undressed
from hpc_hess.model.sources.paths import find_path
from hpc_hess.model.sources.source import Source, resolve_source, tokenizer_of
from hpc_hess.model.sources.stored import Stored
from hpc_hess.model.sources.weights import WeightReader, open_reader

_BLOCK = 1 << 24  # entries whose lengths are computed at a time
_DTYPES = {"float32": torch.float32, "float64": torch.float64}


def of_adapter(text: str, section: ModelSection) -> Source | None:
    """Return the source of a directory with adapter_config.json, on its base. Raises ModelError."""
    path = find_path(text)
    if path is None or not is_adapter(path):
        return None
    settings = read_settings(path)
    adapter = Adapter.open(path, settings)
    base = _base(path, settings, section)
    said = json.dumps({k: v for k, v in asdict(settings).items() if k not in ("base", "revision")}, sort_keys=True)
    print_of = fingerprint("adapter", [base.fingerprint.tensors.encode(), said.encode()], safetensors_table(path / WEIGHTS))
    return Source(
        "adapter",
        path.name,
        base.path,
        base.hf_config,
        tokenizer_of(path) or base.tokenizer_path,
        print_of,
        base.files,
        base.own_code,
        base.findings,
        base=base,
        adapter=adapter,
    )


def asks_hub(section: ModelSection) -> bool:
    """Return whether the model, or the base of an adapter, is a name of the Hub. Collective: no."""
    texts = [section.source, section.base]
    path = find_path(section.source)
    if path is not None and not section.base and is_adapter(path):
        with contextlib.suppress(ModelError):  # said where it is read
            texts.append(read_settings(path).base)
    return any(named(text, "", "model") is not None for text in texts)


def _base(path: Path, settings: LoraSettings, section: ModelSection) -> Source:
    text = section.base or settings.base
    if not text:
        raise ModelError(f"{path / CONFIG} names no base: set model.base to its directory, or to its name on the Hub")
    here = find_path(text)
    if here is not None and is_adapter(here):
        raise ModelError(f"{here}, the base of {path}, holds a PEFT adapter itself: set model.base to a whole model")
    if here is None and not section.base and named(text, "", "model") is None:
        raise ModelError(f"{path / CONFIG} names the base {text}, which is not here: set model.base to where it is")
    revision = "" if section.base else settings.revision
    plain = section.model_copy(update={"source": text, "revision": revision, "base": "", "adapter": "merge"})
    try:
        base = resolve_source(plain)
    except UnreachableError:
        raise
    except ModelError as error:
        if section.base:
            raise
        raise ModelError(f"{error} (it is the base that {path / CONFIG} names: model.base names another)") from None
    if base.adapter is not None:
        raise ModelError(f"{text}, the base of {path}, is a PEFT adapter itself: set model.base to a whole model")
    return base


class AdaptedReader:
    """Serves a model's parameters: those of the base, changed by the adapter, or beside its factors.

    Parameters
    ----------
    base : reads the base, by the names of its parameters.
    adapter, model : as ``lora.attach`` was given them; the model may be sharded already.
    merge : whether the adapter is merged into the base's parameters.
    dtype : that the merge is computed in.

    """

    def __init__(self, base: WeightReader, adapter: Adapter, model: nn.Module, dtype: torch.dtype, *, merge: bool) -> None:
        self._base, self._adapter, self._dtype = base, adapter, dtype
        with undressed(model):
            found = place(adapter, model)
            first = {id(parameter): name for name, parameter in model.named_parameters()}
            tied = model.named_parameters(remove_duplicate=False)
            self._first = {name: first[id(parameter)] for name, parameter in tied}  # the name that the base reads by
        self._whole, self._untied = found.whole, getattr(model, "untied", {})
        self._factors: dict[str, Stored] = {}
        self._plain: dict[str, str] = {}  # names of the base's parameters within changed modules
        self._weights: dict[str, Change] = {}
        self._biases: dict[str, Change] = {}
        for change in found.changes:
            if merge:
                self._weights[change.weight] = change
                self._biases |= {f"{change.module}.bias": change} if change.bias is not None else {}
            else:
                self._factors |= names_of(change)
                self._plain |= {f"{change.module}.base_layer.{k}": f"{change.module}.{k}" for k in ("weight", "bias")}
        self._lengths: tuple[Any, torch.Tensor] | None = None  # of the rows that were asked for last
        self.findings = [self._said(found.changes, found.trained, merge), *base.findings]

    def read(self, name: str, dim: int, low: int, high: int) -> torch.Tensor:
        """Return entries [low, high) of parameter ``name`` along ``dim``. Collective: no.

        Raises
        ------
        ModelError : a file cannot be read there.

        """
        if name in self._factors:
            return self._cut(self._factors[name], dim, low, high)
        name = self._plain.get(name, name)
        value = self._unchanged(name, dim, low, high)
        if (biased := self._biases.get(name)) is not None and biased.bias is not None:
            return value.to(self._dtype) + self._cut(biased.bias, 0, low, high).to(self._dtype) * biased.scale
        change = self._weights.get(name)
        if change is None:
            return value
        outer = int(change.transposed)
        extents = [(0, change.b.shape[0]), (0, change.a.shape[1])]  # of outputs, of inputs
        extents[dim ^ outer] = (low, high)
        merged = self._product(change, *extents).add_(value)
        if change.magnitude is not None:
            factor = self._factor(change, *extents[0])
            merged *= factor if change.transposed else factor[:, None]
        return merged

    def read_buffer(self, name: str) -> torch.Tensor | None:
        """Return a buffer that the adapter or the base holds, else None."""
        whole = self._whole.get(name)
        return self._base.read_buffer(name) if whole is None else whole.read(tuple((0, n) for n in whole.shape))

    def close(self) -> None:
        """Unmap the files."""
        self._base.close()
        for tensor in self._adapter.tensors.values():
            tensor.files.close()

    def _unchanged(self, name: str, dim: int, low: int, high: int) -> torch.Tensor:
        whole = self._whole.get(name)
        return self._base.read(self._first[name], dim, low, high) if whole is None else self._cut(whole, dim, low, high)

    def _cut(self, tensor: Stored, dim: int, low: int, high: int) -> torch.Tensor:
        box = [(0, n) for n in tensor.shape]
        if box:
            box[dim] = (low, high)
        try:
            found = tensor.read(tuple(box))
            return found if box else found.reshape(1)  # a scalar, held as a vector
        except Exception as error:
            raise ModelError(f"cannot read tensor '{tensor.key}' of {self._adapter.path / WEIGHTS}: {error}") from None

    def _product(self, change: Change, outputs: tuple[int, int], inputs: tuple[int, int]) -> torch.Tensor:
        """Return the entries of scale B A, as the module's weight lies."""
        b, a = self._cut(change.b, 0, *outputs).to(self._dtype), self._cut(change.a, 1, *inputs).to(self._dtype)
        product = b @ a
        return (product.mT if change.transposed else product).mul_(change.scale)

    def _factor(self, change: Change, low: int, high: int) -> torch.Tensor:
        """Return what the rows [low, high) of W + scale B A are multiplied with, (high - low,)."""
        key = (change.module, low, high)
        if self._lengths is None or self._lengths[0] != key:
            assert change.magnitude is not None
            outer, width = int(change.transposed), change.a.shape[1]
            step, lengths = max(1, _BLOCK // width), []
            for start in range(low, high, step):
                rows = (start, min(start + step, high))
                weight = self._product(change, rows, (0, width)).add_(self._unchanged(change.weight, outer, *rows))
                lengths.append(torch.linalg.vector_norm(weight, dim=1 - outer))
            wanted = self._cut(change.magnitude, 0, low, high).to(self._dtype)
            self._lengths = key, wanted / torch.cat(lengths)
        return self._lengths[1]

    def _said(self, changes: list[Change], trained: list[str], merge: bool) -> Finding:
        dora = any(change.magnitude is not None for change in changes)
        ranks = sorted({change.a.shape[0] for change in changes})
        rank = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
        modules = f"{len(changes)} module{'s' * (len(changes) > 1)}"
        text = f"{self._adapter.path.name} ({'DoRA' if dora else 'LoRA'}, {modules}, {rank})"
        text += f" with {len(trained)} whole parameter{'s' * (len(trained) > 1)}" if trained else ""
        text += " is merged into its base" if merge else ": its parameters are the model's, and its base is frozen"
        if dora and not merge:
            text += "; lengths of rows have their derivatives, which training by peft leaves out"
        cut = "".join(f"; '{name}' is a parameter of its own, not that of '{other}'" for name, other in self._untied.items())
        return noted("model.adapter", text + cut)


def reader(source: Source, section: ModelSection, skeleton: nn.Module) -> AdaptedReader:
    """Return the reader of a base with an adapter, as a ModelSpec names it."""
    assert source.base is not None
    assert source.adapter is not None
    with undressed(skeleton):
        base = open_reader(source.base, section, skeleton)
    dtype = _DTYPES[section.master_dtype]
    return AdaptedReader(base, source.adapter, skeleton, dtype, merge=section.adapter == "merge")

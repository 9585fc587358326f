"""A LoRA adapter: its tensors, and the places that they have in a model."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import nn

from hpc_hess.errors import ModelError
from hpc_hess.intake.adapter import CONFIG, WEIGHTS, LoraSettings, require_weights
from hpc_hess.intake.directory import WeightFiles
from hpc_hess.model.sources.conversion import renamed
from hpc_hess.model.sources.stored import SafetensorsFiles, Stored

_PART = re.compile(
    r"(?P<module>.+)\.lora_(?P<role>A|B|embedding_A|embedding_B|magnitude_vector)(?:\.default)?(?:\.(?P<kind>weight|bias))?"
)
_WRAPPERS = re.compile(r"\.(?:base_layer|modules_to_save(?:\.default)?)(?=\.)")  # of peft's names of whole parameters


@dataclass(frozen=True)
class Adapter:
    """An adapter on disk; ``tensors`` by their names without "base_model.model."."""

    path: Path
    settings: LoraSettings
    tensors: Mapping[str, Stored]

    @classmethod
    def open(cls, path: Path, settings: LoraSettings) -> Adapter:
        """Read the headers of the adapter of a directory. Raises ModelError."""
        require_weights(path)
        stored = SafetensorsFiles(WeightFiles(path, (WEIGHTS,))).tensors()
        return cls(path, settings, {key.removeprefix("base_model.model."): tensor for key, tensor in stored.items()})


@dataclass(frozen=True)
class Change:
    """What an adapter does to one module: W + scale B A; with a ``magnitude``, rows of that scaled to these lengths.

    ``module`` by its name in the model; ``a`` [rank, inputs], ``b`` [outputs, rank], ``magnitude`` [outputs]; ``bias``
    [outputs] comes with B. ``transposed``: the module's weight is [inputs, outputs], as those of Conv1D and embeddings.
    """

    module: str
    scale: float
    transposed: bool
    embedding: bool
    a: Stored
    b: Stored
    magnitude: Stored | None = None
    bias: Stored | None = None

    @property
    def weight(self) -> str:
        """Name of the module's weight."""
        return f"{self.module}.weight"

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the module's weight, as the factors have it."""
        shape = (self.b.shape[0], self.a.shape[1])
        return shape[::-1] if self.transposed else shape


@dataclass
class Placed:
    """An adapter in a model: modules that it changes, and parameters that it holds whole, by the model's names."""

    changes: list[Change] = field(default_factory=list)
    whole: dict[str, Stored] = field(default_factory=dict)

    @property
    def trained(self) -> list[str]:
        """Names of the whole parameters that belong to what was trained; an embedding beside its factors does not."""
        changed = {change.weight for change in self.changes}
        return [name for name in self.whole if name not in changed]


def place(adapter: Adapter, model: nn.Module) -> Placed:
    """Return where the adapter's tensors belong in its base. Reads no tensor. Collective: no.

    Raises
    ------
    ModelError : the model has no such modules, or others; factors are missing, or of another rank.

    """
    modules, known = dict(model.named_modules()), model.state_dict()
    parts: dict[str, dict[str, Stored]] = {}
    found = Placed()
    for key, tensor in adapter.tensors.items():
        if match := _PART.fullmatch(key):
            role = "bias" if match["kind"] == "bias" else match["role"].removeprefix("embedding_")
            parts.setdefault(match["module"], {})[role] = tensor
            continue
        name = _WRAPPERS.sub("", key)
        name = name if name in known else renamed(name, model) or name
        if name not in known:
            raise _other_base(adapter, model, f"it holds '{key}', which the model has not")
        if (tensor.shape or (1,)) != (tuple(known[name].shape) or (1,)):
            raise _other_base(adapter, model, f"'{key}' is {list(tensor.shape)}, not {list(known[name].shape)}")
        found.whole[name] = tensor
    if not parts:
        raise ModelError(f"{adapter.path / WEIGHTS} holds no tensor lora_A: it is not a LoRA adapter, or was saved empty")
    for stored, tensors in parts.items():
        name = stored if stored in modules else (renamed(f"{stored}.weight", model) or "").removesuffix(".weight")
        if not name or name not in modules:
            raise _other_base(adapter, model, f"it changes '{stored}', which the model has not as a module")
        found.changes.append(_change(adapter, model, stored, name, modules[name], tensors))
    return found


def _change(
    adapter: Adapter, model: nn.Module, stored: str, name: str, module: nn.Module, tensors: dict[str, Stored]
) -> Change:
    from transformers.pytorch_utils import Conv1D

    a, b, magnitude = tensors.get("A"), tensors.get("B"), tensors.get("magnitude_vector")
    wanted = "A" if a is None else "B" if b is None else "magnitude_vector"
    if a is None or b is None or (magnitude is None and adapter.settings.dora):
        raise ModelError(f"{adapter.path / WEIGHTS} has no lora_{wanted} of '{stored}': save the adapter again")
    if not isinstance(module, nn.Linear | Conv1D | nn.Embedding) or (magnitude and isinstance(module, nn.Embedding)):
        raise ModelError(
            f"{adapter.path} changes '{stored}', which is a {type(module).__name__}: merge it with peft (merge_and_unload, "
            "then save_pretrained), and set model.source to the merged model"
        )
    rank = adapter.settings.rank_of(stored)
    if len(a.shape) != 2 or len(b.shape) != 2 or not a.shape[0] == b.shape[1] == rank:
        raise ModelError(
            f"{adapter.path / WEIGHTS} has lora_A {list(a.shape)} and lora_B {list(b.shape)} of '{stored}', and {CONFIG} "
            f"the rank {rank}: the two files belong to different adapters"
        )
    scale = adapter.settings.scale_of(stored)
    transposed, embedding = not isinstance(module, nn.Linear), isinstance(module, nn.Embedding)
    change = Change(name, scale, transposed, embedding, a, b, magnitude, tensors.get("bias"))
    weight = tuple(module.weight.shape)
    if change.shape != weight:
        raise _other_base(adapter, model, f"its factors of '{stored}' make {list(change.shape)}, not {list(weight)}")
    for vector in filter(None, (magnitude, change.bias)):
        if vector.shape != b.shape[:1]:
            raise ModelError(
                f"{adapter.path / WEIGHTS} has '{vector.key}' {list(vector.shape)} beside lora_B {list(b.shape)}"
            )
    if change.bias is not None and getattr(module, "bias", None) is None:
        raise ModelError(f"{adapter.path} adds a bias to '{stored}', which has none: save the adapter without lora_bias")
    return change


def _other_base(adapter: Adapter, model: nn.Module, what: str) -> ModelError:
    named = f" ({CONFIG} names {adapter.settings.base})" if adapter.settings.base else ""
    return ModelError(
        f"{adapter.path} is an adapter of another model than this {type(model).__name__.removeprefix('FSDP')}: {what}; set "
        f"model.base to the model that it was trained on{named}"
    )

"""Layers with low-rank factors in a model without weights, under the names that peft gives them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

from hpc_hess.errors import ModelError
from hpc_hess.model.sources.adapter import Adapter, Change, Placed, place

_NAME = "default"  # of the adapter, within the names of its parameters


class _Layer(nn.Module):
    """A layer of the base beside factors of its own."""

    def __init__(self, base: nn.Module, change: Change) -> None:
        super().__init__()
        self.base_layer, self.scaling, self.transposed = base, change.scale, change.transposed

    @property
    def weight(self) -> torch.Tensor:
        """The base's weight: some models look at its type."""
        return self.base_layer.weight  # type: ignore[return-value]

    @property
    def bias(self) -> torch.Tensor | None:
        """The base's bias."""
        return getattr(self.base_layer, "bias", None)


class LoraLinear(_Layer):
    """y = base(x) + scale B A x."""

    def __init__(self, base: nn.Module, change: Change, dtype: torch.dtype) -> None:
        super().__init__(base, change)
        (rank, inputs), outputs = change.a.shape, change.b.shape[0]
        meta: dict[str, Any] = {"device": "meta", "dtype": dtype}
        self.lora_A = nn.ModuleDict({_NAME: nn.Linear(inputs, rank, bias=False, **meta)})
        self.lora_B = nn.ModuleDict({_NAME: nn.Linear(rank, outputs, bias=change.bias is not None, **meta)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the outputs [..., outputs]."""
        return self.base_layer(x) + self.lora_B[_NAME](self.lora_A[_NAME](x)) * self.scaling


class DoraLinear(LoraLinear):
    """y = W' x with the rows of W + scale B A, each scaled to its own length."""

    def __init__(self, base: nn.Module, change: Change, dtype: torch.dtype) -> None:
        super().__init__(base, change, dtype)
        lengths = nn.Module()
        lengths.weight = nn.Parameter(torch.empty(change.b.shape[0], device="meta", dtype=dtype))
        self.lora_magnitude_vector = nn.ModuleDict({_NAME: lengths})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the outputs [..., outputs]."""
        weight: Any = self.weight.mT if self.transposed else self.weight
        parts: tuple[Any, ...] = (self.lora_A, self.lora_B, self.lora_magnitude_vector)
        a, b, length = (part[_NAME].weight for part in parts)
        weight = weight + (b @ a) * self.scaling
        return F.linear(x, (length * weight.square().sum(1).rsqrt())[:, None] * weight, self.bias)


class LoraEmbedding(_Layer):
    """y = base(ids) + scale B A[:, ids]."""

    def __init__(self, base: nn.Module, change: Change, dtype: torch.dtype) -> None:
        super().__init__(base, change)

        def factor(tensor: Any) -> nn.ParameterDict:
            return nn.ParameterDict({_NAME: nn.Parameter(torch.empty(tensor.shape, device="meta", dtype=dtype))})

        self.lora_embedding_A, self.lora_embedding_B = factor(change.a), factor(change.b)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the embeddings [..., width]."""
        columns = F.embedding(ids, self.lora_embedding_A[_NAME].mT)
        scale = self.scaling * getattr(self.base_layer, "embed_scale", 1.0)  # Gemma multiplies in its embedding
        return self.base_layer(ids) + columns @ self.lora_embedding_B[_NAME].mT * scale


def attach(model: nn.Module, adapter: Adapter, what: Literal["merge", "factors"], dtype: torch.dtype) -> None:
    """Make room for an adapter in its base, whose parameters are on the meta device. Collective: no.

    A parameter that the adapter changes, and that the base ties to another one, is a parameter of its own afterwards.
    ``what`` = "factors": changed modules hold their base and the adapter's factors, and only what the adapter trained
    requires a gradient.

    Raises
    ------
    ModelError : the adapter is one of another model, or needs what is only merged here.

    """
    found = place(adapter, model)
    _untie(model, adapter, found)
    if what == "merge":
        return
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in found.trained)
    blocks = [id(m) for part in model.modules() if isinstance(part, nn.ModuleList) for m in part.modules()]
    layers: dict[int, nn.Module] = {}
    for change in found.changes:
        base = model.get_submodule(change.module)
        if change.magnitude is not None and id(base) not in blocks:  # its weight is a group of its own, if it is large
            raise ModelError(
                f"{adapter.path} is DoRA of '{change.module}', outside of the blocks: set model.adapter = 'merge'"
            )
        kind = LoraEmbedding if change.embedding else DoraLinear if change.magnitude else LoraLinear
        layers[id(base)] = kind(base, change, dtype).eval()
    for owner in list(model.modules()):
        for key, child in owner._modules.items():
            if id(child) in layers:
                owner._modules[key] = layers[id(child)]


def names_of(change: Change) -> dict[str, Any]:
    """Return the tensors of the factors by the names of their parameters."""
    if change.embedding:
        return {f"{change.module}.lora_embedding_{k}.{_NAME}": tensor for k, tensor in (("A", change.a), ("B", change.b))}
    parts = {
        f"lora_A.{_NAME}.weight": change.a,
        f"lora_B.{_NAME}.weight": change.b,
        f"lora_B.{_NAME}.bias": change.bias,
        f"lora_magnitude_vector.{_NAME}.weight": change.magnitude,
    }
    return {f"{change.module}.{name}": tensor for name, tensor in parts.items() if tensor is not None}


@contextmanager
def undressed(model: nn.Module) -> Iterator[None]:
    """Let a model be its base for a moment: without factors, with the base's ties. It may be sharded."""
    layers = [(m, key, c) for m in model.modules() for key, c in m._modules.items() if isinstance(c, _Layer)]
    for owner, key, layer in layers:
        owner._modules[key] = layer.base_layer
    cut: dict[str, str] = getattr(model, "untied", {})
    own = {name: model.get_parameter(name) for name in cut}
    try:
        for name, other in cut.items():
            _put(model, name, model.get_parameter(other))
        yield
    finally:
        for name, parameter in own.items():
            _put(model, name, parameter)
        for owner, key, layer in layers:
            owner._modules[key] = layer


def _untie(model: nn.Module, adapter: Adapter, found: Placed) -> None:
    """Give each changed parameter that is tied a parameter of its own; ``model.untied`` says to which it was tied."""
    changed = {change.weight for change in found.changes} | found.whole.keys()
    places: dict[int, dict[tuple[int, str], str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owner, _, key = name.rpartition(".")
        places.setdefault(id(parameter), {}).setdefault((id(model.get_submodule(owner)), key), name)
    untied: dict[str, str] = {}
    for names in (list(tied.values()) for tied in places.values() if len(tied) > 1):
        first = next((name for name in names if name not in changed), names[0])
        for name in names:
            if name in changed and name != first:
                untied[name] = first
                _put(model, name, nn.Parameter(model.get_parameter(name).detach().clone()))
    if untied and adapter.settings.ties:
        raise ModelError(
            f"{adapter.path} has ensure_weight_tying, which is not read for '{next(iter(untied))}': merge it with peft "
            "(merge_and_unload, then save_pretrained), and set model.source to the merged model"
        )
    model.untied = untied  # type: ignore[assignment]
    config: Any = getattr(model, "config", None)
    for part in (config, config.get_text_config()) if untied and config is not None else ():
        part.tie_word_embeddings = False


def _put(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    owner, _, key = name.rpartition(".")
    model.get_submodule(owner)._parameters[key] = parameter

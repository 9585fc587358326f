"""Running a model's own forward with some of its parts replaced for a moment: parameters, blocks, kernels.

Nothing here fires a hook of a block or of the model: ``forward`` is taken from the class, so neither FSDP's hooks nor
wrappers set on an instance (frozen routing, checkpointing) take part.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from hpc_hess.model.blocks.attention import scaled_dot_product_attention
from hpc_hess.model.blocks.attention_chunks import wide
from hpc_hess.model.blocks.eager import attention_in_chunks
from hpc_hess.model.blocks.experts import own_experts

Places = list[tuple[nn.Module, str]]
Forward = Callable[..., Any]


def plain_forward(module: nn.Module) -> Forward:
    """Return the forward of the module's class, bound: without hooks and instance wrappers."""
    forward = type(module).forward
    return lambda *args, **kwargs: forward(module, *args, **kwargs)


def parameter_places(module: nn.Module) -> dict[str, Places]:
    """Return for each parameter (tied ones once, under their first name) every module and key that holds it."""
    names = {id(p): name for name, p in module.named_parameters()}
    places: dict[str, Places] = {name: [] for name in names.values()}
    for owner in module.modules():
        for key, parameter in owner._parameters.items():
            if parameter is not None:
                places[names[id(parameter)]].append((owner, key))
    return places


@contextlib.contextmanager
def substituted(places: Mapping[str, Places], tensors: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Let the modules see ``tensors`` in the place of their parameters of these names, at every tied place."""
    saved = [(owner, key, owner._parameters[key]) for name in tensors for owner, key in places[name]]
    try:
        for name, tensor in tensors.items():
            for owner, key in places[name]:
                owner._parameters[key] = tensor  # type: ignore[assignment]
        yield
    finally:
        for owner, key, parameter in saved:
            owner._parameters[key] = parameter


@contextlib.contextmanager
def replaced_forwards(replacements: list[tuple[nn.Module, Forward]]) -> Iterator[None]:
    """Set ``forward`` on module instances, and take it back (or restore what was set there)."""
    saved = [(module, module.__dict__.get("forward")) for module, _ in replacements]
    try:
        for module, forward in replacements:
            module.__dict__["forward"] = forward
        yield
    finally:
        for module, forward_before in saved:
            if forward_before is None:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = forward_before


class BufferWatch:
    """Which buffers of a module a forward pass writes (rotary frequencies that follow the length, for one)."""

    def __init__(self, module: nn.Module) -> None:
        self._before = {
            (owner, key): (buffer, buffer._version)
            for owner in module.modules()
            for key, buffer in owner._buffers.items()
            if buffer is not None
        }

    def written(self) -> Places:
        """Return the places that have changed since."""
        return [
            (owner, key)
            for (owner, key), (buffer, version) in self._before.items()
            if owner._buffers.get(key) is not buffer or buffer._version != version
        ]


def buffer_places(module: nn.Module) -> Places:
    """Return where the module and its parts hold buffers."""
    return [(owner, key) for owner in module.modules() for key, buffer in owner._buffers.items() if buffer is not None]


def buffers_at(places: Places) -> list[torch.Tensor]:
    """Return the buffers there."""
    return [owner._buffers[key] for owner, key in places]  # type: ignore[misc]


def own_buffers(places: Places) -> contextlib.AbstractContextManager[None]:
    """Give the modules copies of these buffers for a moment: a function that is transformed must write into its own."""
    copies = [None if buffer is None else buffer.clone() for buffer in buffers_at(places)]
    return given_buffers(places, copies)


@contextlib.contextmanager
def given_buffers(places: Places, buffers: Sequence[torch.Tensor | None]) -> Iterator[None]:
    """Let the modules see other tensors in the place of these buffers."""
    saved = [(owner, key, owner._buffers[key]) for owner, key in places]
    try:
        for (owner, key), buffer in zip(places, buffers, strict=True):
            owner._buffers[key] = buffer
        yield
    finally:
        for owner, key, buffer in saved:
            owner._buffers[key] = buffer


@contextlib.contextmanager
def differentiable_kernels(module: nn.Module) -> Iterator[list[str]]:
    """Use kernels that can be differentiated twice and forwards; yield one sentence for each switch.

    Fused attention and grouped experts have neither forward derivatives nor double backward. The function computed is
    the same up to rounding. The list grows while the module runs, by attention that keeps matrices of queries x keys.
    """
    configs = {id(c): c for c in (getattr(m, "config", None) for m in module.modules()) if c is not None}
    switched: dict[str, None] = {}
    saved: list[tuple[Any, str, Any]] = []
    try:
        for config in configs.values():
            attention = getattr(config, "_attn_implementation", None)
            if attention == "sdpa":  # intercepted below
                switched["attention computed without fused kernels for exact products: they lack derivatives"] = None
            elif isinstance(attention, str) and attention != "eager":
                saved.append((config, "_attn_implementation", attention))
                switched[f'attention computed by "eager" for exact products: "{attention}" lacks derivatives'] = None
            experts = getattr(config, "_experts_implementation", None)
            if isinstance(experts, str) and experts != "batched_mm":
                saved.append((config, "_experts_implementation", experts))
                if experts != "eager":
                    switched[f'tokens are sorted by expert for exact products: "{experts}" lacks derivatives'] = None
        for config, key, _ in saved:
            setattr(config, key, "eager" if key == "_attn_implementation" else own_experts())
        notes = list(switched)
        # F.multi_head_attention_forward calls the fused kernel where no mode sees it
        with _Decomposed(notes), attention_in_chunks(notes), sdpa_kernel(SDPBackend.MATH):
            yield notes
    finally:
        for config, key, used in saved:
            setattr(config, key, used)


class _Decomposed(TorchFunctionMode):
    """Normalisations and attention from elementary operations.

    A fused normalisation's forward derivative treats the saved mean and deviation as constants when it is itself
    differentiated backwards: the second derivative is then wrong without any error. Fused attention has none, and
    SDPA's own decomposition gives NaN for tokens that see nothing (left padding).
    """

    def __init__(self, notes: list[str]) -> None:
        super().__init__()
        self._notes = notes

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _SOFTMAX and args and args[0].ndim >= 4 and math.prod(args[0].shape[-2:]) >= _LARGE:
            note = "attention is written out in the model's code: its matrices of queries x keys take memory at this length"
            if note not in self._notes:
                self._notes.append(note)
        return _DECOMPOSITIONS.get(func, func)(*args, **(kwargs or {}))


def _layer_norm(
    input: torch.Tensor, normalized_shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5, *_: Any
) -> torch.Tensor:
    dims, x = tuple(range(-len(tuple(normalized_shape)), 0)), wide(input)
    centred = x - x.mean(dims, keepdim=True)
    out = centred * torch.rsqrt(centred.square().mean(dims, keepdim=True) + eps)
    return _affine(out.to(input.dtype), weight, bias)


def _rms_norm(input: torch.Tensor, normalized_shape: Any, weight: Any = None, eps: float | None = None) -> torch.Tensor:
    dims, x = tuple(range(-len(tuple(normalized_shape)), 0)), wide(input)
    eps = torch.finfo(input.dtype).eps if eps is None else eps
    return _affine((x * torch.rsqrt(x.square().mean(dims, keepdim=True) + eps)).to(input.dtype), weight, None)


def _group_norm(
    input: torch.Tensor, num_groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5, *_: Any
) -> torch.Tensor:
    grouped = input.reshape(input.shape[0], num_groups, -1)
    out = _layer_norm(grouped, grouped.shape[-1:], None, None, eps).reshape(input.shape)
    shape = (1, -1, *[1] * (input.ndim - 2))
    return _affine(out, weight if weight is None else weight.view(shape), bias if bias is None else bias.view(shape))


def _affine(x: torch.Tensor, weight: Any, bias: Any) -> torch.Tensor:
    x = x if weight is None else x * weight
    return x if bias is None else x + bias


_SOFTMAX = {F.softmax, torch.softmax, torch.Tensor.softmax}
_LARGE = 1 << 20  # queries x keys of a head

_DECOMPOSITIONS: dict[Any, Any] = {
    F.layer_norm: _layer_norm,
    torch.layer_norm: _layer_norm,
    F.rms_norm: _rms_norm,
    torch.rms_norm: _rms_norm,
    F.group_norm: _group_norm,
    torch.group_norm: _group_norm,
    F.scaled_dot_product_attention: scaled_dot_product_attention,
}

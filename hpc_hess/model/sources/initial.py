"""What a model's own initialiser does to each parameter, learnt by watching it work on meta tensors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

_MAX_VALUES = 1 << 22  # entries of a literal initial tensor that are kept; only small ones occur (decay rates of Mamba)


@dataclass(frozen=True)
class Initial:
    """How a parameter starts: a constant ``mean``, normal (``mean``, ``std``), literal ``values``, or unknown."""

    kind: Literal["constant", "normal", "values", "unknown"]
    mean: float = 0.0
    std: float = 0.0
    values: torch.Tensor | None = None

    def scaled(self, factor: float) -> Initial:
        """Return the initial value times ``factor``."""
        values = None if self.values is None else self.values * factor
        return replace(self, mean=self.mean * factor, std=self.std * abs(factor), values=values)

    def shifted(self, offset: float) -> Initial:
        """Return the initial value plus ``offset``."""
        return replace(self, mean=self.mean + offset, values=None if self.values is None else self.values + offset)


UNKNOWN = Initial("unknown")


class InitialWatch(TorchDispatchMode):
    """While active, every parameter that a module registers becomes a meta tensor, and its in-place fills are noted.

    Buffers stay real. A constructor's allocation lives for one parameter only and is not written to, so no memory is
    committed however large the model. ``initial(parameter)`` tells what constructors and initialisers did last.
    """

    def __init__(self) -> None:
        super().__init__()
        self._notes: dict[int, Initial] = {}
        self._held: dict[int, torch.Tensor] = {}  # keeps storages alive, so that their addresses stay unique

    def initial(self, parameter: nn.Parameter) -> Initial:
        """Return how ``parameter`` starts; unknown if nothing filled it."""
        return self._notes.get(_key(parameter), UNKNOWN)

    @contextmanager
    def watching(self) -> Iterator[InitialWatch]:
        """Context in which models are constructed."""
        register = nn.Module.register_parameter

        def register_meta(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
            if param is not None and param.device.type != "meta":
                param = self._adopt(param)
            register(module, name, param)

        nn.Module.register_parameter = register_meta  # type: ignore[method-assign,assignment]
        try:
            with self:
                yield self
        finally:
            nn.Module.register_parameter = register  # type: ignore[method-assign]

    def _adopt(self, param: nn.Parameter) -> nn.Parameter:
        meta = nn.Parameter(torch.empty_like(param, device="meta"), requires_grad=param.requires_grad)
        meta.__dict__.update(param.__dict__)
        self._held[_key(meta)] = meta.detach()
        # A vector may hold its value from the start, as nn.Parameter(torch.ones(n)) does; a larger tensor will not.
        if param.ndim <= 1:
            self._notes[_key(meta)] = Initial("values", values=param.detach().clone())
        return meta

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name.endswith("_") and args and isinstance(args[0], torch.Tensor) and args[0].is_meta:
            key = _key(args[0])
            held = self._held.get(key)
            if held is not None and held.numel() == args[0].numel():
                self._notes[key] = _after(self._notes.get(key, UNKNOWN), name, args[1:], kwargs or {})
        return out


def _key(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _after(before: Initial, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Initial:
    """Return the note after one in-place operation on the whole tensor."""

    def argument(index: int, key: str, default: float) -> float:
        return float(args[index] if len(args) > index else kwargs.get(key, default))

    if name == "zero_":
        return Initial("constant", 0.0)
    if name == "fill_":
        return Initial("constant", argument(0, "value", 0.0))
    if name == "normal_":
        return Initial("normal", argument(0, "mean", 0.0), argument(1, "std", 1.0))
    if name == "uniform_":  # replaced by a normal of the same mean and spread
        low, high = argument(0, "from", 0.0), argument(1, "to", 1.0)
        return Initial("normal", (low + high) / 2, (high - low) / 12**0.5)
    if name == "erfinv_":  # inside trunc_normal_: a uniform variable becomes normal with this spread
        return Initial("normal", 0.0, 0.5**0.5)
    if name == "mul_" and not isinstance(args[0], torch.Tensor):
        return before.scaled(float(args[0]))
    if name == "add_" and not isinstance(args[0], torch.Tensor):
        return before.shifted(float(args[0]))
    if name == "copy_" and not args[0].is_meta and args[0].numel() <= _MAX_VALUES:
        return Initial("values", values=args[0].detach().clone())
    if name in ("clamp_", "clamp_min_", "clamp_max_", "requires_grad_", "detach_"):
        return before
    return UNKNOWN

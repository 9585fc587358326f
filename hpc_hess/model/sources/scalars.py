"""Parameters without dimensions, held as one-element vectors: they can be cut over ranks like any other.

The module that owns one still reads a scalar: a property of its class gives a view of what it holds.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from hpc_hess.model.sources.initial import Initial


def vectors_for_scalars(module: nn.Module) -> None:
    """Give every parameter of shape () the shape (1,), ties kept; ``module.scalars`` names them afterwards."""
    module.scalars = [name for name, p in module.named_parameters() if p.ndim == 0]  # type: ignore[assignment]
    if not module.scalars:
        return
    vectors: dict[int, nn.Parameter] = {}
    for owner in module.modules():
        for key, parameter in list(owner._parameters.items()):
            if parameter is None or parameter.ndim:
                continue
            made = vectors.setdefault(
                id(parameter), nn.Parameter(parameter.data.reshape(1), requires_grad=parameter.requires_grad)
            )
            owner._parameters[key] = made
            kind = type(owner)
            owner.__class__ = type(kind.__name__, (kind,), {key: _scalar(key), "__module__": kind.__module__})
    initial: dict[str, Initial] = getattr(module, "initial", {})
    for name in module.scalars:  # type: ignore[union-attr]
        start = initial.get(name)
        if start is not None and start.values is not None:
            initial[name] = replace(start, values=start.values.reshape(1))


def _scalar(key: str) -> property:
    def read(owner: Any) -> torch.Tensor:
        held: torch.Tensor = owner._parameters[key]
        return held if isinstance(held, DTensor) else held.reshape(())  # a shard is nobody's to compute with

    return property(read)

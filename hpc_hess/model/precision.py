"""Precisions: float64 throughout although libraries cast to float32, and what a cast to fewer bits loses."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.overrides import TorchFunctionMode


class _Float64Casts(TorchFunctionMode):
    """Turns every explicit cast to float32 (inside norms, softmax, rotary embeddings) into one to float64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        args = tuple(torch.float64 if a is torch.float32 else a for a in args)
        kwargs = {k: torch.float64 if v is torch.float32 else v for k, v in (kwargs or {}).items()}
        return func(*args, **kwargs)


@contextmanager
def honest_casts(dtype: torch.dtype) -> Iterator[None]:
    """Compute in float64 all the way when ``dtype`` is float64; change nothing for other dtypes."""
    with _Float64Casts() if dtype == torch.float64 else nullcontext():
        yield


def survives(module: nn.Module, dtype: torch.dtype) -> bool:
    """Return whether this rank's part of every parameter comes back unchanged from a cast to ``dtype``. Local."""
    parameters = (p.to_local() if isinstance(p, DTensor) else p for p in module.parameters())
    return all(torch.equal(p.detach(), p.detach().to(dtype).to(p.dtype)) for p in parameters)

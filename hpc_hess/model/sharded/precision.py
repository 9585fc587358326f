"""The function that a forward pass stands for: float64 throughout, whole embeddings; what a cast to fewer bits loses."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
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


class _WholeRows(TorchFunctionMode):
    """Derivatives of embeddings as of any other function: of the padding row too, and not divided by frequencies.

    ``padding_idx`` only makes autograd leave out a row: the loss depends on it like on any other.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.embedding:
            names = ("input", "weight", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse")
            given = {**dict(zip(names, args, strict=False)), **kwargs}
            return func(**{**given, "padding_idx": None, "scale_grad_by_freq": False, "sparse": False})
        return func(*args, **kwargs)


def whole_rows(module: nn.Module) -> AbstractContextManager[object]:
    """Return a context for forward passes of ``module`` in which its embeddings have all their derivatives."""
    embeddings = (m for m in module.modules() if isinstance(m, nn.Embedding))
    cut = any(m.padding_idx is not None or m.scale_grad_by_freq or m.sparse for m in embeddings)
    return _WholeRows() if cut else nullcontext()


@contextmanager
def honest_casts(dtype: torch.dtype) -> Iterator[None]:
    """Compute in float64 all the way when ``dtype`` is float64; change nothing for other dtypes."""
    with _Float64Casts() if dtype == torch.float64 else nullcontext():
        yield


def survives(module: nn.Module, dtype: torch.dtype) -> bool:
    """Return whether this rank's part of every parameter comes back unchanged from a cast to ``dtype``. Local."""
    parameters = (p.to_local() if isinstance(p, DTensor) else p for p in module.parameters())
    return all(torch.equal(p.detach(), p.detach().to(dtype).to(p.dtype)) for p in parameters)

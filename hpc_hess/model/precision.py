"""Float64 throughout: libraries cast to float32 inside norms, softmax and rotary embeddings, which undoes float64."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class _Float64Casts(TorchFunctionMode):
    """Turns every explicit cast to float32 into one to float64."""

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

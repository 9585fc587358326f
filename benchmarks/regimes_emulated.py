"""Matrix products of float32 numbers as tensor cores compute them, emulated on CPUs.

The operands of every matrix product are rounded, or split into bfloat16 terms, and their products summed in float32.
All else, and all that is stored, is float32, as it is with a GPU's tf32.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

_LOW_BITS = 13  # of a float32 mantissa that tf32 has no place for
_PRODUCTS = {torch.ops.aten.mm.default, torch.ops.aten.bmm.default}
_WITH_SUM = {torch.ops.aten.addmm.default, torch.ops.aten.baddbmm.default}
_KEPT_WHOLE = ("attention", "linear", "convolution")  # of an operation's name: products that would escape the rounding

Split = Callable[[torch.Tensor], list[torch.Tensor]]


def round_to_tf32(x: torch.Tensor) -> torch.Tensor:
    """Return float32 ``x`` with 10 bits of mantissa, rounded to the nearest, ties to even."""
    bits = x.contiguous().view(torch.int32)
    odd = (bits >> _LOW_BITS) & 1
    return ((bits + ((1 << _LOW_BITS - 1) - 1) + odd) & (-1 << _LOW_BITS)).view(torch.float32)


def truncate_to_tf32(x: torch.Tensor) -> torch.Tensor:
    """Return float32 ``x`` with 10 bits of mantissa, the others dropped."""
    return (x.contiguous().view(torch.int32) & (-1 << _LOW_BITS)).view(torch.float32)


def split_bfloat16(x: torch.Tensor, terms: int) -> list[torch.Tensor]:
    """Return float32 tensors of bfloat16 numbers, largest first, whose sum is ``x`` to about 8 bits for each of them."""
    found, rest = [], x
    for _ in range(terms):
        found.append(rest.bfloat16().float())
        rest = rest - found[-1]
    return found


EMULATED: dict[str, Split] = {
    "tf32 (emulated)": lambda x: [round_to_tf32(x)],
    "tf32, truncated (emulated)": lambda x: [truncate_to_tf32(x)],
    "bf16x3 (emulated)": lambda x: split_bfloat16(x, 2),
    "bf16x6 (emulated)": lambda x: split_bfloat16(x, 3),
}


class _Rounded(TorchDispatchMode):
    """Sums the products of the operands' terms, but those as small as what the splits leave out; smallest first."""

    def __init__(self, split: Split) -> None:
        super().__init__()
        self._split = split

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _PRODUCTS and args[0].dtype == torch.float32:
            return self._product(func, *args)
        if func in _WITH_SUM and args[0].dtype == torch.float32:
            product = torch.ops.aten.mm.default if args[1].ndim == 2 else torch.ops.aten.bmm.default
            total = self._product(product, *args[1:]).mul_(kwargs.get("alpha", 1))
            return total.add_(args[0], alpha=kwargs.get("beta", 1))
        if any(part in func.__name__ for part in _KEPT_WHOLE):
            raise NotImplementedError(f"the products of {func} are not rounded")
        return func(*args, **kwargs)

    def _product(self, product: Any, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        lefts, rights = self._split(a), self._split(b)
        pairs = [(i, j) for i in range(len(lefts)) for j in range(len(rights)) if i + j < len(lefts)]
        parts = [product(lefts[i], rights[j]) for i, j in sorted(pairs, key=sum, reverse=True)]
        for part in parts[1:]:
            parts[0].add_(part)
        return parts[0]


@contextlib.contextmanager
def rounding(name: str) -> Iterator[None]:
    """Round the matrix products in the block as the format ``name`` does; nothing where it is not an emulated one."""
    with contextlib.ExitStack() as stack:
        if name in EMULATED:
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            stack.enter_context(_Rounded(EMULATED[name]))
        yield

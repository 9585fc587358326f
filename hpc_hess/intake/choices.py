"""Discrete choices within a forward pass: indices that topk, argmax, sort and their kind return, and comparisons.

Where a choice changes between two passes, so may the function, by a jump that no derivative knows of.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_MOST = 1 << 20  # entries of a result that are kept
_INDICES = (
    "topk",
    "max",
    "min",
    "argmax",
    "argmin",
    "sort",
    "argsort",
    "kthvalue",
    "median",
    "mode",
    "searchsorted",
    "bucketize",
)
_VALUES = ("gt", "lt", "ge", "le", "eq", "ne", "sign", "round", "floor", "ceil", "multinomial")
_ALIASES = {
    "__gt__": "gt",
    "__lt__": "lt",
    "__ge__": "ge",
    "__le__": "le",
    "__eq__": "eq",
    "__ne__": "ne",
    "greater": "gt",
    "less": "lt",
    "greater_equal": "ge",
    "less_equal": "le",
    "not_equal": "ne",
    "sgn": "sign",
}


class Choices(TorchFunctionMode):
    """Notes the choices of one forward pass, or compares those of another pass with them.

    Attributes
    ----------
    noted : (name of the operation, its choices) in order.
    changed : after a pass that compares: how many choices differ, by operation.

    Parameters
    ----------
    before : the pass to compare with.
    replay : let topk repeat the choices of ``before`` instead.

    """

    def __init__(self, before: Choices | None = None, *, replay: bool = False) -> None:
        super().__init__()
        self.noted: list[tuple[str, torch.Tensor]] = []
        self.changed: Counter[str] = Counter()
        self._before, self._replay = before, replay

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        name = _ALIASES.get(name, name)
        if name not in _INDICES and name not in _VALUES:
            return func(*args, **kwargs)
        noted = self._known(name)
        if self._replay and name == "topk" and noted is not None:
            dim = kwargs.get("dim", args[2] if len(args) > 2 else -1)
            if noted.shape[:dim] == args[0].shape[:dim] and noted.ndim == args[0].ndim:
                self.noted.append((name, noted))
                return torch.return_types.topk((args[0].gather(dim, noted), noted))
        out = func(*args, **kwargs)
        choice = getattr(out, "indices", None) if isinstance(out, tuple) else out
        if isinstance(choice, torch.Tensor) and (name in _VALUES or not choice.is_floating_point()):
            choice = choice.detach()
            if name != "topk":  # which is replayed
                choice = choice.reshape(-1)[:_MOST]
            noted = self._known(name)
            if noted is not None:
                self.changed[name] += _differing(choice, noted, name)
            self.noted.append((name, choice.clone()))
        return out

    def _known(self, name: str) -> torch.Tensor | None:
        place = len(self.noted)
        if self._before is None or place >= len(self._before.noted) or self._before.noted[place][0] != name:
            return None
        return self._before.noted[place][1]


def _differing(found: torch.Tensor, noted: torch.Tensor, name: str) -> int:
    if found.shape != noted.shape:
        return max(found.numel(), noted.numel())
    if name == "topk" and found.ndim:  # which ones, in whatever order
        return int((found.sort(-1).values != noted.sort(-1).values).any(-1).sum())
    return int((found != noted).sum())

"""Mixture-of-experts routing held fixed while parameters are perturbed.

A router picks experts by ``topk``. Between theta + eps v and theta - eps v a token may change experts, which adds a
jump / eps to a finite difference. "frozen" replays the choices made at theta_0; "free" lets them change and counts.
Works for any router that uses ``torch.topk``; block by block, so it also holds when activations are recomputed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from hpc_hess.model.sharded.blocklist import find_blocks


class Routing:
    """Records every block's ``topk`` choices at theta_0, then replays or compares them.

    Attributes
    ----------
    micro_batch : which micro-batch is being computed (set by Gradient).
    active : whether a gradient is being computed; at other times the model routes as it likes (it is the user's).
    num_flips : this rank's choices that differed from those at theta_0, counted in mode "free".
    has_router : whether any block called ``topk`` at all.

    """

    def __init__(self, module: nn.Module, mode: Literal["frozen", "free"]) -> None:
        self.mode = mode
        self.micro_batch = 0
        self.num_flips = 0
        self.recording = False
        self.active = False
        self._choices: dict[tuple[int, int, int], torch.Tensor] = {}
        self._counted: set[tuple[int, int, int]] = set()
        # within what recomputes activations, so that a recomputed router repeats its choice
        self._blocks = [getattr(block, "_checkpoint_wrapped_module", block) for block in find_blocks(module) or []]
        self._before: list[tuple[nn.Module, Any]] | None = None  # while attached: what was set on each block
        self._for_good = False

    @property
    def has_router(self) -> bool:
        """Whether any routing decision was recorded."""
        return bool(self._choices)

    def attach(self) -> None:
        """Watch the blocks until :meth:`detach`, so that what wraps their forwards later wraps this, too."""
        self._for_good = True
        self._attach()

    def _attach(self) -> None:
        self._before = [(block, block.__dict__.get("forward")) for block in self._blocks]
        for number, block in enumerate(self._blocks):
            block.forward = self._wrap(block.forward, number)  # type: ignore[method-assign]

    def detach(self) -> None:
        """Leave the blocks as they were."""
        for block, forward in self._before or []:
            if forward is None:
                block.__dict__.pop("forward", None)
            else:
                block.__dict__["forward"] = forward
        self._before = None

    def begin(self) -> None:
        """Say that a new evaluation of the gradient begins; a choice recomputed within one is counted once."""
        self._counted.clear()
        self.active = True
        if self._before is None and (self.recording or self._choices):
            self._attach()

    def end(self) -> None:
        """Say that the evaluation is over."""
        self.active = False
        if not self._for_good:
            self.detach()

    def _wrap(self, forward: Callable[..., Any], block: int) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if not self.active or not (self.recording or self._choices):
                return forward(*args, **kwargs)
            with _TopkMode(self, block):
                return forward(*args, **kwargs)

        return wrapped

    def choose(self, block: int, call: int, topk: Callable[..., Any], args: tuple[Any, ...], kwargs: Any) -> Any:
        """Answer one ``topk`` call of ``block``."""
        key = (self.micro_batch, block, call)
        if self.recording or key not in self._choices:
            result = topk(*args, **kwargs)
            if self.recording:
                self._choices[key] = result.indices.detach().clone()
            return result
        chosen = self._choices[key]
        if self.mode == "frozen":
            scores = args[0]
            dim = kwargs.get("dim", args[2] if len(args) > 2 else -1)
            return torch.return_types.topk((scores.gather(dim, chosen), chosen))
        result = topk(*args, **kwargs)
        if key not in self._counted:
            self._counted.add(key)
            differs = result.indices.sort(-1).values != chosen.sort(-1).values
            self.num_flips += int(differs.any(-1).sum())
        return result


class _TopkMode(TorchFunctionMode):
    """Sends ``topk`` calls made inside one block to its Routing."""

    def __init__(self, routing: Routing, block: int) -> None:
        super().__init__()
        self._routing, self._block, self._call = routing, block, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.topk, torch.Tensor.topk):
            self._call += 1
            return self._routing.choose(self._block, self._call, func, args, kwargs)
        return func(*args, **kwargs)

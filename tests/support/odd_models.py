"""Causal LMs that are no chain of blocks, and blocks that forward mode cannot differentiate."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from tests.support.exact_case import ToyBlock, ToyLM


class Between(ToyLM):
    def backbone(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = 1.1 * block(x)
        return x


class FromEarlier(ToyLM):
    def backbone(self, x: torch.Tensor) -> torch.Tensor:
        first = self.blocks[0](x)
        return self.blocks[2](self.blocks[1](first), torch.sin(first))


class ToTheHead(ToyLM):
    def backbone(self, x: torch.Tensor) -> torch.Tensor:
        outs = [x]
        for block in self.blocks:
            outs.append(block(outs[-1]))
        return torch.stack(outs).mean(0)


class Detached(ToyLM):
    """The block's argument depends on an earlier block, hidden from autograd."""

    def backbone(self, x: torch.Tensor) -> torch.Tensor:
        first = self.blocks[0](x)
        return self.blocks[2](self.blocks[1](first), first.detach())


class Random(ToyLM):
    def backbone(self, x: torch.Tensor) -> torch.Tensor:
        return self.blocks[1](self.blocks[0](x), torch.rand_like(x))


class TwoHeads(ToyLM):
    def forward(self, input_ids: torch.Tensor, attention_mask: Any = None, use_cache: bool = False) -> Any:
        x = self.backbone(self.embed(input_ids))
        return SimpleNamespace(logits=self.head(x) + self.head(torch.tanh(x)))


class Varying(ToyLM):
    """Calls fewer blocks on short rows: what was recorded does not hold for every micro-batch."""

    def backbone(self, x: torch.Tensor) -> torch.Tensor:
        for block in list(self.blocks)[: 3 if x.shape[1] > 4 else 2]:
            x = block(x)
        return x


class _Gelu(torch.autograd.Function):
    """As Bloom's: no forward derivative."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x * torch.sigmoid(1.7 * x)

    @staticmethod
    def backward(ctx: Any, bar: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        s = torch.sigmoid(1.7 * x)
        return bar * (s + 1.7 * x * s * (1 - s))


class NoForwardDerivative(ToyBlock):
    def forward(self, x: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        return x + _Gelu.apply(self.inner(self.norm(x)))


class WrongWhenMixed(ToyBlock):
    """The fused kernel called where no substitute can be put: its forward derivative is wrong when differentiated."""

    def forward(self, x: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        y = torch.ops.aten.native_layer_norm(x, [8], self.norm.weight, self.norm.bias, 1e-5)[0]
        return x + torch.tanh(self.inner(y))


class _NoSecondDerivative(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, bar: torch.Tensor) -> torch.Tensor:
        return 2 * bar


class OnceDifferentiable(ToyBlock):
    def forward(self, x: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        return x + _NoSecondDerivative.apply(torch.tanh(self.inner(x)))

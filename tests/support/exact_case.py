"""Toy models for the exact products, and their double-backward reference in fp64 by the models' own code."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from hpc_hess.model.sharded.loss import CausalLMObjective
from hpc_hess.model.sharded.micro_batch import MicroBatch, shifted_targets
from hpc_hess.model.sharded.shard import ShardedModel, whole_model
from hpc_hess.parallel.vector import Vector
from tests.support.toys import toy_model, toy_tokens

NO_SDPA = ("gemma2", "gpt_oss")


class _Wide(TorchFunctionMode):
    """fp32 written into a model's code (normalisation, softmax) becomes fp64, else agreement stops at 1e-7."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.float:
            return args[0].double()
        args = tuple(torch.float64 if a is torch.float32 else a for a in args)
        return func(*args, **{k: torch.float64 if a is torch.float32 else a for k, a in kwargs.items()})


@contextmanager
def widened() -> Iterator[None]:
    with _Wide():
        yield


def micro_batches(rows: int = 3, length: int = 10) -> list[MicroBatch]:
    """Two micro-batches: left padding in the first row, an unpredicted token in the second."""
    ids = toy_tokens(rows, length)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[0, 3] = -100  # padding would predict it, and kernels differ on tokens that see nothing
    labels[1, 4] = -100
    cut = rows - 1
    return [
        MicroBatch(list(range(cut)), ids[:cut], mask[:cut], labels[:cut]),
        MicroBatch([cut], ids[cut:], mask[cut:], labels[cut:]),
    ]


def objective(batches: list[MicroBatch], num_tokens: int | None = None) -> CausalLMObjective:
    count = sum(int((shifted_targets(b.labels) != -100).sum()) for b in batches)
    return CausalLMObjective(batches, num_tokens or count, torch.device("cpu"))


def case(name: str, dtype: torch.dtype = torch.float64, **selection: Any) -> tuple[ShardedModel, CausalLMObjective]:
    attention = "eager" if name in NO_SDPA else "sdpa"
    return whole_model(toy_model(name, dtype=dtype, attention=attention), **selection), objective(micro_batches())


def vectors(model: ShardedModel, count: int, seed: int = 0) -> list[Vector]:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(count, model.space.size, generator=generator, dtype=torch.float64).to(model.space.dtype)
    return [model.space.wrap(row) for row in rows]


def reference(module: nn.Module, model: ShardedModel, loss: CausalLMObjective, v: Vector) -> torch.Tensor:
    """H v by double backward through ``module``'s own, unchanged code; parameters and order from ``model``."""
    named = dict(module.named_parameters())
    parameters = [named[p.name] for p in model.layout.parameters]
    total = torch.stack([loss.contribution(module, i).total for i in range(loss.num_micro_batches)]).sum()
    gradient = torch.autograd.grad(total, parameters, create_graph=True, materialize_grads=True)
    along = sum((g * d).sum() for g, d in zip(gradient, model.pieces_of(v.data), strict=True))
    product = torch.autograd.grad(along, parameters, materialize_grads=True)
    return torch.cat([p.flatten() for p in product])


def error(found: Vector, expected: torch.Tensor) -> float:
    return float((found.data - expected).norm() / expected.norm())


class ToyLM(nn.Module):
    """A causal LM with the interface of Hugging Face's and blocks of the test's making."""

    def __init__(self, blocks: list[nn.Module], width: int = 8, vocabulary: int = 96) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.eval()

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def backbone(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x

    def forward(self, input_ids: torch.Tensor, attention_mask: Any = None, use_cache: bool = False) -> Any:
        return SimpleNamespace(logits=self.head(self.backbone(self.embed(input_ids))))


class ToyBlock(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.norm, self.inner = nn.LayerNorm(width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        for other in others:
            y = y * (1 + other)
        return x + torch.tanh(self.inner(y)).cumsum(1)

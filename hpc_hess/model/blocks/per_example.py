"""The gradient of one example at a time. Ranks take different examples: no gradient is summed over them.

A model in one process is differentiated as a whole. A sharded one is streamed: each stage's parameters are gathered, every
rank differentiates its own example through the stage, and what it finds leaves at once, so that no rank ever holds a whole
gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from hpc_hess.errors import ModelError, SplitError
from hpc_hess.model.blocks.blocks import SplitModel
from hpc_hess.model.blocks.eager import attention_in_chunks
from hpc_hess.model.blocks.exchange import Exchange, Tensors
from hpc_hess.model.blocks.recording import record
from hpc_hess.model.sharded.loss import CausalLMObjective
from hpc_hess.model.sharded.micro_batch import MicroBatch, shifted_targets
from hpc_hess.model.sharded.precision import honest_casts
from hpc_hess.model.sharded.shard import ShardedModel
from hpc_hess.parallel.in_step import in_step

Sink = Callable[[torch.Tensor, Sequence[int], Sequence[int]], None]
Several = tuple[torch.Tensor, ...]


class ExampleGradients:
    """Gradients of the mean token loss of single examples.

    Parameters
    ----------
    model : holds the shards; ``plain`` is its skeleton without hooks, needed where it is sharded.
    first : an example of this rank, to learn from how the model's blocks are connected.

    Construction is collective. Raises ModelError, on every rank, if the model is sharded and cannot be streamed.

    """

    def __init__(self, model: ShardedModel, first: MicroBatch, plain: nn.Module | None) -> None:
        self._model = model
        self._places = {p.name: (p.global_offset, p.numel) for p in model.layout.parameters}
        self._streamed: _Streamed | None = None
        if model.sharded:
            if plain is None:
                raise ModelError("gradients of single examples of a sharded model need its skeleton without hooks")
            self._streamed = _Streamed(model, plain, first)

    def __call__(self, batch: MicroBatch, sink: Sink) -> float:
        """Give the gradient of one example to ``sink``, in parts, and return its mean token loss. Collective: yes.

        ``sink(data, starts, lengths)`` takes flat entries on ascending intervals of the global index; parts may overlap
        (tied parameters), and add up. ``batch`` has one row; one that predicts nothing has no gradient (a dummy, for ranks
        without an example: its loss is 0).
        """
        if self._streamed is not None:
            return self._streamed.run(batch, lambda tensors: self._give(tensors, sink))
        return self._whole(batch, sink)

    def _whole(self, batch: MicroBatch, sink: Sink) -> float:
        if not batch.num_tokens:
            return 0.0
        model = self._model
        objective = CausalLMObjective([batch], batch.num_tokens, model.space.device)
        named = {n: p for n, p in model.module.named_parameters() if n in self._places}
        with torch.enable_grad(), attention_in_chunks([]):
            loss = objective.contribution(model.module, 0).total
            wanted = list(named.values())
            found = torch.autograd.grad(loss, wanted, allow_unused=True) if loss.requires_grad else [None] * len(wanted)
        self._give({n: g for n, g in zip(named, found, strict=True) if g is not None}, sink)
        return float(loss.detach())

    def _give(self, tensors: Tensors, sink: Sink) -> None:
        """Hand over parameters' gradients in the order of the global index, neighbours together."""
        run: list[str] = []
        for name in sorted((n for n in tensors if n in self._places), key=lambda n: self._places[n]):
            if run and self._places[name][0] != sum(self._places[run[-1]]):
                self._hand(tensors, run, sink)
                run = []
            run.append(name)
        if run:
            self._hand(tensors, run, sink)

    def _hand(self, tensors: Tensors, names: list[str], sink: Sink) -> None:
        dtype = self._model.space.dtype
        parts = [tensors[n].detach().reshape(-1).to(dtype) for n in names]
        starts, lengths = zip(*(self._places[n] for n in names), strict=True)
        data = parts[0] if len(parts) == 1 else torch.cat(parts)
        sink(data, starts[:1], [sum(lengths)])


class _Streamed:
    """One example of each rank through the stages of a split model, forward and back."""

    def __init__(self, model: ShardedModel, plain: nn.Module, first: MicroBatch) -> None:
        self._world, self._device = model.world, model.space.device
        self._exchange = Exchange(model)
        self._selected = {p.name for p in model.layout.parameters}
        self._split = SplitModel(plain)
        apart = SplitError(f"cannot split {type(plain).__name__}: the ranks' data take different ways through its blocks")
        with in_step(model.world, "preparing gradients of examples", apart) as agree_on, honest_casts(model.space.dtype):

            def fetch(names: list[str]) -> Tensors:
                agree_on(names)
                with model.world.guard("preparing gradients of examples"):
                    return self._exchange.parameters(names)

            record(self._split, first.to(self._device), fetch)

    def run(self, batch: MicroBatch, give: Callable[[Tensors], None]) -> float:
        split, batch = self._split, batch.to(self._device)
        guard = self._world.guard("gradient of an example")
        with guard, honest_casts(self._exchange.dtype), torch.no_grad(), attention_in_chunks([]):
            full = self._fetch(0)
            arguments, tensors = split.arguments(full, batch)
            boundary, extras, kept = tensors[0], tensors[1:], list[Several]()
            for call in range(split.num_calls):
                full = self._fetch(call + 1)
                kept.append((boundary, *(extras[e] for e in split.extras_of(call))))
                boundary = split.block(call, full, arguments[call], *kept[-1])
            loss, bar = self._head(batch, boundary, give)
            extra_bars = [torch.zeros_like(e) for e in extras]
            for call in range(split.num_calls - 1, -1, -1):
                bar, *more = self._back(call, arguments[call], kept.pop(), bar, give)
                for extra, part in zip(split.extras_of(call), more, strict=True):
                    extra_bars[extra] += part
            self._prologue(batch, (bar, *extra_bars), give)
        return loss

    def _head(
        self, batch: MicroBatch, boundary: torch.Tensor, give: Callable[[Tensors], None]
    ) -> tuple[float, torch.Tensor]:
        full = self._fetch(self._split.num_calls + 1)
        targets = shifted_targets(batch.labels).flatten()
        predicted = (targets >= 0).nonzero().flatten()
        if not len(predicted):
            return 0.0, torch.zeros_like(boundary)
        with torch.enable_grad():
            W, x = self._leaves(full), boundary.detach().requires_grad_()
            hidden = self._split.final({**full, **W}, batch, x)
            logits = self._split.logits({**full, **W}, hidden.flatten(0, -2)[predicted])
            loss = cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets[predicted])
        (bar,) = self._differentiate((loss,), (torch.ones_like(loss),), W, (x,), give)
        return float(loss.detach()), bar

    def _back(
        self, call: int, arguments: list[object], inputs: Several, bar: torch.Tensor, give: Callable[[Tensors], None]
    ) -> list[torch.Tensor]:
        full = self._fetch(call + 1)
        with torch.enable_grad():
            W, x = self._leaves(full), tuple(t.detach().requires_grad_() for t in inputs)
            y = self._split.block(call, {**full, **W}, arguments, *x)
        return self._differentiate((y,), (bar,), W, x, give)

    def _prologue(self, batch: MicroBatch, bars: Several, give: Callable[[Tensors], None]) -> None:
        full = self._fetch(0)
        with torch.enable_grad():
            W = self._leaves(full)
            outputs = self._split.prologue({**full, **W}, batch)
        kept = [(y, bar) for y, bar in zip(outputs, bars, strict=True) if y.requires_grad]
        if kept:
            self._differentiate(tuple(y for y, _ in kept), tuple(bar for _, bar in kept), W, (), give)

    def _differentiate(
        self, outputs: Several, bars: Several, W: Tensors, x: Several, give: Callable[[Tensors], None]
    ) -> list[torch.Tensor]:
        if not any(y.requires_grad for y in outputs):
            return [torch.zeros_like(t) for t in x]
        found = torch.autograd.grad(outputs, [*W.values(), *x], bars, allow_unused=True)
        give({n: g for n, g in zip(W, found, strict=False) if g is not None})
        return [torch.zeros_like(t) if g is None else g for t, g in zip(x, found[len(W) :], strict=True)]

    def _fetch(self, stage: int) -> Tensors:
        return self._exchange.parameters(self._split.names_of(stage))

    def _leaves(self, full: Tensors) -> Tensors:
        return {n: t.detach().requires_grad_() for n, t in full.items() if n in self._selected}

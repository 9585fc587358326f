"""Curvature products streamed through a causal LM block by block: two sweeps, one block's parameters at a time.

Forward: every stage's output and its tangent; the boundary tensors and their tangents are kept. At the logits the
loss's derivatives are known in closed form. Backward: every stage is computed again and turns the cotangent at its
output and that cotangent's tangent into those at its input; the tangents of its weight gradient leave at once.

With L the loss, z the logits, J = dz/dtheta, g = dL/dz and H_L = d2L/dz2, the cotangent's tangent starts as H_L z_dot:

    Hessian       (g, H_L z_dot)   all of d2L/dtheta2 v
    Gauss-Newton  (-, H_L z_dot)   J^T H_L J v
    residual      (g, 0)           Hessian - Gauss-Newton
    Fisher        (-, F z_dot)     mean over tokens of the outer product of their loss gradients
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch

from hpc_hess.curvature.exact.cross_entropy import HESSIAN, Start, starting_cotangents
from hpc_hess.curvature.exact.ports import Mapped, Single
from hpc_hess.curvature.exact.projections import Projections
from hpc_hess.curvature.exact.tangents import Pull, Several, Stage, Tensors, Way, pull_again, push, push_keeping
from hpc_hess.model.blocks.blocks import SplitModel
from hpc_hess.model.blocks.exchange import Exchange
from hpc_hess.model.sharded.accumulation import Watch
from hpc_hess.model.sharded.loss import MicroBatch, shifted_targets


@dataclass(frozen=True)
class Settings:
    """How sweeps run.

    ``start``: see cross_entropy. ``way``: see tangents. ``lock_step``: several directions in one pass under vmap, else one
    after the other.
    ``keep_state``: keep every block's state between the sweeps, its gathered parameters too, instead of computing it
    again (the last block's is always kept). ``projections``: without it, results of linear layers that are kept: all,
    those narrower than their inputs, or none. ``boundaries_on_host``: what is kept waits in host memory.
    ``logit_budget``: entries of one chunk's logits with all their tangents.
    """

    start: Start = HESSIAN
    way: Way = "dual"
    lock_step: bool = True
    keep_state: bool = False
    projections: Literal["all", "narrow", "none"] = "narrow"
    boundaries_on_host: bool = False
    logit_budget: int = 1 << 25


_WANTED = {
    "all": lambda inputs, outputs: True,
    "narrow": lambda inputs, outputs: outputs < inputs,
    "none": lambda inputs, outputs: False,
}


class Health:
    """Notes stages whose numbers are not finite, without waiting for the device."""

    def __init__(self) -> None:
        self.checks: list[tuple[str, torch.Tensor]] = []

    def note(self, where: str, sums: list[torch.Tensor]) -> None:
        """Remember whether all ``sums`` are finite."""
        self.checks.append((where, torch.stack([torch.isfinite(s).all() for s in sums]).all()))


class Sweeps:
    """Products for the directions an Exchange holds, summed over micro-batches into its results."""

    def __init__(self, split: SplitModel, exchange: Exchange, settings: Settings) -> None:
        self.split, self.exchange, self.settings = split, exchange, settings
        self.health = Health()

    def run(self, micro_batches: Sequence[MicroBatch], scale: float, watch: Watch, *, more: bool = False) -> None:
        """Add ``scale`` times the product of the summed token losses, for every direction. Collective: yes.

        ``watch`` sees the results grow; ``more``: other directions of the same product follow.
        """
        count, results = self.exchange.num_directions, self.exchange.results
        for index in range(watch.begin(results, len(micro_batches)), len(micro_batches)):
            batch = micro_batches[index]
            name = f"exact product, micro-batch {index + 1} of {len(micro_batches)}"
            with self.exchange.world.guard(name), torch.no_grad():
                if count == 1:
                    _Sweep(self, batch, scale, Single()).run()
                else:
                    directions = torch.arange(count, device=batch.input_ids.device)
                    torch.vmap(partial(self._mapped, batch, scale))(directions)
                self.exchange.settle()
            watch.added(index, results, more=more)

    def _mapped(self, batch: MicroBatch, scale: float, index: torch.Tensor) -> torch.Tensor:
        _Sweep(self, batch, scale, Mapped(index)).run()
        return index


class _Sweep:
    """One micro-batch, written for one direction."""

    def __init__(self, sweeps: Sweeps, batch: MicroBatch, scale: float, port: Single | Mapped) -> None:
        self.split, self.exchange, self.settings = sweeps.split, sweeps.exchange, sweeps.settings
        self.health, self.batch, self.scale, self.port = sweeps.health, batch, scale, port
        self.gauss_newton = not self.settings.start.second
        self.kept: dict[int, tuple[Several, Several, Projections]] = {}
        self.pulls: dict[int, Pull] = {}

    def run(self) -> None:
        phase = self.exchange.world.timers.phase
        with phase("forward"):
            x, x_dot = self._there()
        with phase("backward"):
            self._back(x, x_dot)

    def _there(self) -> tuple[Several, Several]:
        x, x_dot = self._embed()
        for stage in range(1, self.split.num_calls + 1):
            (y,), (y_dot,) = self._push(stage, self._inputs(stage, x), self._inputs(stage, x_dot))
            x, x_dot = (y, *x[1:]), (y_dot, *x_dot[1:])
        return x, x_dot

    def _back(self, x: Several, x_dot: Several) -> None:
        bar_dot, bar = self._head(x[:1], x_dot[:1])
        # cotangents of (boundary, *extras); every block adds to those of the extra tensors it takes
        bars_dot = [bar_dot[0], *(torch.zeros_like(e) for e in x[1:])]
        bars = None if bar is None else [bar[0], *(torch.zeros_like(e) for e in x[1:])]
        for stage in range(self.split.num_calls, 0, -1):
            d_bar_dot, d_bar = self._pull(stage, (bars_dot[0],), None if bars is None else (bars[0],))
            bars_dot = self._accumulate(stage, bars_dot, d_bar_dot)
            bars = None if bars is None or d_bar is None else self._accumulate(stage, bars, d_bar)
        self._embed_back(tuple(bars_dot), None if bars is None else tuple(bars))

    # -- stages ----------------------------------------------------------------------------------------------------

    def _embed(self) -> tuple[Several, Several]:
        full, W, V = self._fetch(0, ahead=1)
        self.arguments, tensors = self.split.arguments(full, self.batch)
        x = tuple(tensors)
        if not W:
            return x, tuple(torch.zeros_like(t) for t in x)
        x, x_dot = push(self._function(0, full), W, V, (), (), self.settings.way)
        self._note(0, (*x, *x_dot))
        return x, x_dot

    def _embed_back(self, bars_dot: Several, bars: Several | None) -> None:
        full, W, V = self._fetch(0, ahead=None)
        if W:
            pull = self._again(self._function(0, full), W, V, (), (), None)
            tangents, _, _ = pull(bars_dot, bars)
            self._add(tangents)

    def _push(self, stage: int, x: Several, x_dot: Several) -> tuple[Several, Several]:
        full, W, V = self._fetch(stage, ahead=stage + 1)
        f = self._function(stage, full)
        if self.settings.keep_state or stage == self.split.num_calls:
            y, y_dot, self.pulls[stage] = self._keeping(f, W, V, x, x_dot)
        else:
            kept = Projections(_WANTED[self.settings.projections])
            y, y_dot = push(f, W, V, x, x_dot, self.settings.way, kept)
            if self.settings.boundaries_on_host:
                x, x_dot = (tuple(t.to("cpu") for t in ts) for ts in (x, x_dot))
                kept.apply(lambda t: t.to("cpu"))
            self.kept[stage] = x, x_dot, kept
        self._note(stage, (*y, *y_dot))
        return y, y_dot

    def _pull(self, stage: int, bar_dot: Several, bar: Several | None) -> tuple[Several, Several | None]:
        if stage in self.pulls:
            self._prefetch(stage - 1)
            pull = self.pulls.pop(stage)
        else:
            full, W, V = self._fetch(stage, ahead=stage - 1)
            x, x_dot, kept = self.kept.pop(stage)
            if self.settings.boundaries_on_host:
                device = self.exchange.space.device
                x, x_dot = (tuple(t.to(device) for t in ts) for ts in (x, x_dot))
                kept.apply(lambda t: t.to(device))
            pull = self._again(self._function(stage, full), W, V, x, x_dot, kept)
        tangents, x_bar_dot, x_bar = pull(bar_dot, bar)
        self._note(stage, x_bar_dot, "the way back through ")
        self._add(tangents)
        return x_bar_dot, x_bar

    def _head(self, x: Several, x_dot: Several) -> tuple[Several, Several | None]:
        """From the boundary after the last block to the loss and back, the vocabulary in chunks of tokens."""
        stage = self.split.num_calls + 1
        full, W, V = self._fetch(stage, ahead=None)
        split, batch = self.split, self.batch

        def final(W: Tensors, x: Several) -> Several:
            return (split.final({**full, **W}, batch, x[0]),)

        def logits(W: Tensors, h: Several) -> Several:
            return (split.logits({**full, **W}, h[0]),)

        W1, V1 = ({n: d[n] for n in split.known.final if n in d} for d in (W, V))
        W2, V2 = ({n: d[n] for n in split.known.logits if n in d} for d in (W, V))
        (hidden,), (hidden_dot,), pull = self._keeping(final, W1, V1, x, x_dot)
        targets = shifted_targets(batch.labels).flatten()
        predicted = (targets >= 0).nonzero().flatten()
        rows, rows_dot = hidden.flatten(0, -2)[predicted], hidden_dot.flatten(0, -2)[predicted]
        total: Tensors = {}
        parts: list[tuple[Several, Several | None]] = []
        for chunk in predicted.new_tensor(range(len(predicted))).split(self._chunk()):
            (z,), (z_dot,), back = self._keeping(logits, W2, V2, (rows[chunk],), (rows_dot[chunk],))
            g_dot, g = starting_cotangents(self.settings.start, z, z_dot, targets[predicted[chunk]], self.scale)
            tangents, h_bar_dot, h_bar = back((g_dot,), None if g is None else (g,))
            total = {n: total[n].add_(t) if n in total else t for n, t in tangents.items()}
            parts.append((h_bar_dot, h_bar))
        bar_dot = self._spread([p[0] for p in parts], predicted, hidden)
        bar = None if self.gauss_newton else self._spread([p[1] for p in parts if p[1] is not None], predicted, hidden)
        tangents, x_bar_dot, x_bar = pull((bar_dot,), None if bar is None else (bar,))
        shared = tangents.keys() & total.keys()
        if not total:  # this micro-batch predicts nothing; the ranks' collectives must match all the same
            total = {n: torch.zeros_like(v) for n, v in V2.items() if n not in tangents}
        self._note(stage, x_bar_dot, "the way back through ")
        self._add({**tangents, **total, **{n: tangents[n] + total[n] for n in sorted(shared)}})
        return x_bar_dot, x_bar

    def _chunk(self) -> int:
        """Tokens whose logits and tangents fit the budget."""
        return max(1, self.settings.logit_budget // (self.split.known.vocabulary * (1 + self.exchange.num_directions)))

    @staticmethod
    def _spread(parts: Sequence[Several], places: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """Put the chunks' rows back among the tokens that predict nothing."""
        flat = torch.zeros_like(like).flatten(0, -2)
        return (flat.index_copy(0, places, torch.cat([p[0] for p in parts])) if parts else flat).view(like.shape)

    # -- small things ------------------------------------------------------------------------------------------------

    def _function(self, stage: int, full: Tensors) -> Stage:
        split, batch = self.split, self.batch
        if stage == 0:
            return lambda W, _: split.prologue({**full, **W}, batch)
        arguments = self.arguments[stage - 1]
        return lambda W, x: (split.block(stage - 1, {**full, **W}, arguments, *x),)

    def _keeping(self, f: Stage, W: Tensors, V: Tensors, x: Several, x_dot: Several) -> tuple[Several, Several, Pull]:
        return push_keeping(f, W, V, x, x_dot, self.settings.way, gauss_newton=self.gauss_newton)

    def _again(self, f: Stage, W: Tensors, V: Tensors, x: Several, x_dot: Several, kept: Projections | None) -> Pull:
        return pull_again(f, W, V, x, x_dot, self.settings.way, gauss_newton=self.gauss_newton, kept=kept)

    def _inputs(self, stage: int, tensors: Several) -> Several:
        return (tensors[0], *(tensors[1 + e] for e in self.split.extras_of(stage - 1)))

    def _accumulate(self, stage: int, bars: list[torch.Tensor], new: Several) -> list[torch.Tensor]:
        out = [new[0], *bars[1:]]
        for extra, bar in zip(self.split.extras_of(stage - 1), new[1:], strict=True):
            out[1 + extra] = out[1 + extra] + bar
        return out

    def _fetch(self, stage: int, ahead: int | None) -> tuple[Tensors, Tensors, Tensors]:
        """Return all of a stage's parameters, those with a direction, and the directions."""
        full, stacked = self.exchange.fetch(self.split.names_of(stage))
        self._prefetch(ahead)
        rows = self.port.rows(list(stacked.values()))
        return full, {n: full[n] for n in stacked}, dict(zip(stacked, rows, strict=True))

    def _prefetch(self, stage: int | None) -> None:
        if stage is not None and stage not in self.pulls:
            self.exchange.prefetch(self.split.names_of(stage))

    def _add(self, tangents: Tensors) -> None:
        names = list(tangents)
        self.port.collect(lambda ts: self.exchange.add(dict(zip(names, ts, strict=True))), list(tangents.values()))

    def _note(self, stage: int, tensors: Several, way: str = "") -> None:
        if tensors:
            where = way + self.split.describe(stage)
            self.port.collect(lambda sums: self.health.note(where, sums), [t.sum() for t in tensors])

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

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch.utils._pytree import tree_map_only

from hpc_hess.curvature.exact.cross_entropy import HESSIAN, Start
from hpc_hess.curvature.exact.ports import Mapped, Single
from hpc_hess.curvature.exact.stages import Stage, Tree, Wanted, Work, block_stage, final_stage, logits_stage, prologue_stage
from hpc_hess.curvature.exact.tangents import Pull, Several, Tensors, Way
from hpc_hess.model.blocks.blocks import SplitModel
from hpc_hess.model.blocks.exchange import Exchange
from hpc_hess.model.sharded.accumulation import Watch
from hpc_hess.model.sharded.micro_batch import MicroBatch

Run = Callable[[Single | Mapped, Work, Tree, Tree], tuple[Tree, Tree]]  # as programs.Programs


@dataclass(frozen=True)
class Settings:
    """How sweeps run.

    ``start``: see cross_entropy. ``way``: see tangents. ``lock_step``: several directions in one pass under vmap, else one
    after the other.
    ``keep_state``: keep every block's state between the sweeps, its gathered parameters too, instead of computing it
    again (the last block's is always kept). ``projections``: without it, results of linear layers that are kept: all,
    those narrower than their inputs, or none. ``boundaries_on_host``: what is kept waits in host memory.
    ``logit_budget``: entries of one chunk's logits with all their tangents. ``compile``: the stages' functions, where the
    ``products`` that are expected (0: unknown) repay it, always, or never (see repaying); programs are kept in ``programs``.
    """

    start: Start = HESSIAN
    way: Way = "dual"
    lock_step: bool = True
    keep_state: bool = False
    projections: Wanted = "narrow"
    boundaries_on_host: bool = False
    logit_budget: int = 1 << 25
    compile: Literal["auto", "on", "off"] = "off"
    products: int = 0
    programs: Path | None = None


class Health:
    """Notes stages whose numbers are not finite, without waiting for the device."""

    def __init__(self) -> None:
        self.checks: list[tuple[str, torch.Tensor]] = []

    def note(self, where: str, sums: list[torch.Tensor]) -> None:
        """Remember whether all ``sums`` are finite."""
        self.checks.append((where, torch.stack([torch.isfinite(s).all() for s in sums]).all()))


class Sweeps:
    """Products for the directions an Exchange holds, summed over micro-batches into its results.

    ``programs`` runs the functions of the blocks and of the loss; None: they are computed as they are written.
    """

    def __init__(self, split: SplitModel, exchange: Exchange, settings: Settings, programs: Run | None = None) -> None:
        self.split, self.exchange, self.settings, self.programs = split, exchange, settings, programs
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


@dataclass
class _Point:
    """A stage at its parameters W with directions V, beside the parameters without one."""

    stage: Stage
    full: Tensors
    V: Tensors

    def shared(self, *more: Tree) -> Tree:
        return (*self.stage.inputs(self.full), *more)

    def each(self, *more: Tree) -> Tree:
        return ([self.V[n] for n in self.stage.selected], *more)


@dataclass
class _Kept:
    """What a block left for the way back: inputs, values of its products, their tangents; perhaps its parameters."""

    shared: Tree
    each: Tree
    wanted: Wanted
    point: _Point | None

    def move(self, device: torch.device | str) -> None:
        self.shared, self.each = tree_map_only(torch.Tensor, lambda t: t.to(device), (self.shared, self.each))


class _Sweep:
    """One micro-batch, written for one direction."""

    def __init__(self, sweeps: Sweeps, batch: MicroBatch, scale: float, port: Single | Mapped) -> None:
        self.split, self.exchange, self.settings = sweeps.split, sweeps.exchange, sweeps.settings
        self.health, self.batch, self.scale, self.port = sweeps.health, batch, scale, port
        self.programs = sweeps.programs
        self.gauss_newton = not self.settings.start.second
        self.kept: dict[int, _Kept] = {}
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
        point = self._fetch(0, ahead=1)
        self.arguments, tensors = self.split.arguments(point.full, self.batch)
        x = tuple(tensors)
        if not point.V:
            return x, tuple(torch.zeros_like(t) for t in x)
        (x, _), (x_dot, _) = point.stage.push("none").function(point.shared(()), point.each(()))
        self._note(0, (*x, *x_dot))
        return x, x_dot

    def _embed_back(self, bars_dot: Several, bars: Several | None) -> None:
        point = self._fetch(0, ahead=None)
        if point.V:
            pull = point.stage.pull("none", gauss_newton=self.gauss_newton)
            _, (tangents, _) = pull.function(point.shared((), [], bars), point.each((), [], bars_dot))
            self._add(point.stage.selected, tangents)

    def _push(self, number: int, x: Several, x_dot: Several) -> tuple[Several, Several]:
        point = self._fetch(number, ahead=number + 1)
        keep = self.settings.keep_state or number == self.split.num_calls
        if keep and self.programs is None:
            y, y_dot, self.pulls[number] = point.stage.keeping(point.full, point.V, x, x_dot, gauss_newton=self.gauss_newton)
        else:
            wanted: Wanted = "all" if self.settings.keep_state else self.settings.projections
            push = point.stage.push(wanted)
            (y, values), (y_dot, tangents) = self._run(push, point.shared(x), point.each(x_dot))
            self.kept[number] = _Kept((x, values), (x_dot, tangents), wanted, point if keep else None)
            if self.settings.boundaries_on_host and not keep:
                self.kept[number].move("cpu")
        self._note(number, (*y, *y_dot))
        return y, y_dot

    def _pull(self, number: int, bar_dot: Several, bar: Several | None) -> tuple[Several, Several | None]:
        if number in self.pulls:
            self._prefetch(number - 1)
            tangents, x_bar_dot, x_bar = self.pulls.pop(number)(bar_dot, bar)
            found, selected = list(tangents.values()), tuple(tangents)
        else:
            kept = self.kept.pop(number)
            if kept.point is None:
                point = self._fetch(number, ahead=number - 1)
                if self.settings.boundaries_on_host:
                    kept.move(self.exchange.space.device)
            else:
                self._prefetch(number - 1)
                point = kept.point
            pull = point.stage.pull(kept.wanted, gauss_newton=self.gauss_newton)
            shared, each = point.shared(*kept.shared, bar), point.each(*kept.each, bar_dot)
            x_bar, (found, x_bar_dot) = self._run(pull, shared, each)
            selected = point.stage.selected
        self._note(number, x_bar_dot, "the way back through ")
        self._add(selected, found)
        return x_bar_dot, x_bar

    def _head(self, x: Several, x_dot: Several) -> tuple[Several, Several | None]:
        """From the boundary after the last block to the loss and back, the vocabulary in chunks of tokens."""
        number = self.split.num_calls + 1
        full, V = self._fetched(number, ahead=None)
        way, selected = self.settings.way, tuple(V)
        final = _Point(final_stage(self.split, self.batch, selected, way), full, V)
        head = _Point(logits_stage(self.split, selected, way), full, V)
        push, pull = final.stage.push("none"), final.stage.pull("none", gauss_newton=self.gauss_newton)
        ((hidden,), _), ((hidden_dot,), _) = push.function(final.shared(x), final.each(x_dot))
        targets = self.batch.targets().flatten()
        predicted = (targets >= 0).nonzero().flatten()
        rows, rows_dot = hidden.flatten(0, -2)[predicted], hidden_dot.flatten(0, -2)[predicted]
        scale = torch.tensor(self.scale, dtype=torch.float64, device=targets.device)
        work, total = head.stage.loss(self.settings.start), list[torch.Tensor]()
        parts: list[tuple[Several, Several | None]] = []
        tokens = predicted.new_tensor(range(len(predicted)))
        for chunk in tokens.split(self._chunk(len(tokens))) if len(tokens) else ():
            places, counted = (chunk, None) if self.programs is None else _filled_up(chunk)
            inputs = (rows[places],), targets[predicted[places]], scale, counted
            h_bar, (tangents, h_bar_dot) = self._run(work, head.shared(*inputs), head.each((rows_dot[places],)))
            total = [t.add_(new) for t, new in zip(total, tangents, strict=True)] if total else list(tangents)
            count = len(chunk)
            parts.append(((h_bar_dot[0][:count],), None if h_bar is None else (h_bar[0][:count],)))
        bar_dot = self._spread([p[0] for p in parts], predicted, hidden)
        bar = None if self.gauss_newton else self._spread([p[1] for p in parts if p[1] is not None], predicted, hidden)
        shared = final.shared(x, [], None if bar is None else (bar,))
        x_bar, (tangents, x_bar_dot) = pull.function(shared, final.each(x_dot, [], (bar_dot,)))
        # this micro-batch may predict nothing; the ranks' collectives must match all the same
        total = total or [torch.zeros_like(v) for v in (V[n] for n in head.stage.selected)]
        sums = dict(zip(final.stage.selected, tangents, strict=True))
        for name, t in zip(head.stage.selected, total, strict=True):
            sums[name] = sums[name] + t if name in sums else t
        self._note(number, x_bar_dot, "the way back through ")
        self._add(tuple(sums), list(sums.values()))
        return x_bar_dot, x_bar

    def _chunk(self, tokens: int) -> int:
        """Return how many of the tokens go together: their logits and tangents fit the budget, and all chunks are alike."""
        most = self.settings.logit_budget // (self.split.known.vocabulary * (1 + self.exchange.num_directions))
        return -(-tokens // -(-tokens // max(1, most)))

    @staticmethod
    def _spread(parts: Sequence[Several], places: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """Put the chunks' rows back among the tokens that predict nothing."""
        flat = torch.zeros_like(like).flatten(0, -2)
        return (flat.index_copy(0, places, torch.cat([p[0] for p in parts])) if parts else flat).view(like.shape)

    # -- small things ------------------------------------------------------------------------------------------------

    def _run(self, work: Work, shared: Tree, each: Tree) -> tuple[Tree, Tree]:
        return work.function(shared, each) if self.programs is None else self.programs(self.port, work, shared, each)

    def _inputs(self, stage: int, tensors: Several) -> Several:
        return (tensors[0], *(tensors[1 + e] for e in self.split.extras_of(stage - 1)))

    def _accumulate(self, stage: int, bars: list[torch.Tensor], new: Several) -> list[torch.Tensor]:
        out = [new[0], *bars[1:]]
        for extra, bar in zip(self.split.extras_of(stage - 1), new[1:], strict=True):
            out[1 + extra] = out[1 + extra] + bar
        return out

    def _fetch(self, number: int, ahead: int | None) -> _Point:
        """Return a stage before the head at its parameters and directions."""
        full, V = self._fetched(number, ahead)
        if number == 0:
            return _Point(prologue_stage(self.split, self.batch, tuple(V), self.settings.way), full, V)
        stage = block_stage(self.split, number - 1, self.arguments[number - 1], tuple(V), self.settings.way)
        return _Point(stage, full, V)

    def _fetched(self, number: int, ahead: int | None) -> tuple[Tensors, Tensors]:
        """Return all of a stage's parameters, and the directions of those that have one."""
        full, stacked = self.exchange.fetch(self.split.names_of(number))
        self._prefetch(ahead)
        return full, dict(zip(stacked, self.port.rows(list(stacked.values())), strict=True))

    def _prefetch(self, stage: int | None) -> None:
        if stage is not None and stage not in self.pulls and not (stage in self.kept and self.kept[stage].point):
            self.exchange.prefetch(self.split.names_of(stage))

    def _add(self, names: Sequence[str], tangents: list[torch.Tensor]) -> None:
        self.port.collect(lambda ts: self.exchange.add(dict(zip(names, ts, strict=True))), tangents)

    def _note(self, stage: int, tensors: Several, way: str = "") -> None:
        if tensors:
            where = way + self.split.describe(stage)
            self.port.collect(lambda sums: self.health.note(where, sums), [t.sum() for t in tensors])


def _filled_up(chunk: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Repeat places up to one of few lengths, at most a quarter more; return which count [length, 1]."""
    step = 1 << max(0, (len(chunk) - 1).bit_length() - 3)
    length = -(-len(chunk) // step) * step
    places = torch.cat([chunk, chunk[:1].expand(length - len(chunk))])
    return places, (torch.arange(length, device=chunk.device) < len(chunk)).to(torch.float32)[:, None]

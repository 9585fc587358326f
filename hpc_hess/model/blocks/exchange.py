"""Parameters and directions of one stage gathered from all ranks; tangents reduced and scattered back to them.

One flat collective each way per stage: the local pieces of all its parameters (and of all directions) are packed into
one buffer, each padded to the largest rank's piece. The next stage's gather and the last stage's reduction run while
this one computes. No hook of FSDP is fired: the shards are read, never the module.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Shard as ShardPlacement

from hpc_hess.model.sharded.shard import ShardedModel

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class _Piece:
    """One parameter over the ranks: its shape, the sharded dimension, where it lies in flat local vectors."""

    shape: tuple[int, ...]
    dim: int
    local: torch.Tensor
    place: tuple[int, int] | None  # None: not selected, so it has no direction

    def rows(self, rank: int, num_ranks: int) -> tuple[int, int]:
        """[low, high) of the sharded dimension on ``rank``, as torch.chunk cuts it."""
        extent = self.shape[self.dim]
        chunk = -(-extent // num_ranks)
        return min(rank * chunk, extent), min((rank + 1) * chunk, extent)

    def local_shape(self, rank: int, num_ranks: int) -> tuple[int, ...]:
        low, high = self.rows(rank, num_ranks)
        return (*self.shape[: self.dim], high - low, *self.shape[self.dim + 1 :])


class Exchange:
    """What the streamed sweeps need from the other ranks, for a set of directions.

    Parameters
    ----------
    model : holds the shards; one process alone needs no collective.
    compute_dtype : of gathered parameters and directions; tangents are reduced in the vectors' dtype.

    """

    def __init__(self, model: ShardedModel, compute_dtype: torch.dtype | None = None) -> None:
        self.space, self.world = model.space, model.world
        self.dtype = compute_dtype or model.space.dtype
        self.sharded = model.sharded and model.world.shard_size > 1
        self._ranks, self._rank = (model.world.shard_size, model.world.shard_rank) if self.sharded else (1, 0)
        self._replicas = model.world.replica_group
        places = {piece.parameter.name: (piece.start, piece.stop) for piece in model.shard.pieces}
        self._pieces = {n: _piece(p, places.get(n)) for n, p in model.module.named_parameters()}
        self._directions: list[torch.Tensor] = []
        self._results: list[torch.Tensor] = []
        self._gathers: dict[tuple[str, ...], tuple[Any, torch.Tensor]] = {}
        self._reductions: list[tuple[Any, torch.Tensor, torch.Tensor, list[str]]] = []

    def begin(self, directions: list[torch.Tensor], results: list[torch.Tensor]) -> None:
        """Set the flat local directions, and the flat local vectors that tangents are added to."""
        self._directions, self._results = directions, results

    @property
    def results(self) -> list[torch.Tensor]:
        """The flat local vectors that tangents are added to; whole only after :meth:`settle`."""
        return self._results

    @property
    def num_directions(self) -> int:
        """Number of directions K."""
        return len(self._directions)

    # -- in ------------------------------------------------------------------------------------------------------

    def prefetch(self, names: list[str]) -> None:
        """Start gathering a stage that will be fetched soon. Collective: yes."""
        if self.sharded and tuple(names) not in self._gathers:
            self._gathers[tuple(names)] = self._start_gather(names)

    def fetch(self, names: list[str]) -> tuple[Tensors, Tensors]:
        """Return full parameters, and directions [K, *shape] of those that are selected. Collective: yes."""
        if not self.sharded:
            full = {name: self._computed_with(self._pieces[name].local) for name in names}
            return full, {name: self._stack(name) for name in self._with_direction(names)}
        self.prefetch(names)
        work, buffer = self._gathers.pop(tuple(names))
        with self.world.timers.phase("all-gather"):
            work.wait()
        return self._unpack(names, buffer.view(self._ranks, -1))

    def parameters(self, names: list[str]) -> Tensors:
        """Return full parameters without directions. Collective: yes."""
        directions, self._directions = self._directions, []
        try:
            return self.fetch(names)[0]
        finally:
            self._directions = directions

    def _with_direction(self, names: list[str]) -> list[str]:
        return [n for n in names if self._directions and self._pieces[n].place is not None]

    def _computed_with(self, local: torch.Tensor) -> torch.Tensor:
        return local.to(self.dtype) if local.is_floating_point() else local  # quantised weights stay what they are

    def _stack(self, name: str) -> torch.Tensor:
        piece = self._pieces[name]
        assert piece.place is not None
        parts = [d[slice(*piece.place)].view(piece.local.shape) for d in self._directions]
        return (_standing_alone(parts[0])[None] if len(parts) == 1 else torch.stack(parts)).to(self.dtype)

    def _span(self, name: str) -> int:
        return math.prod(self._pieces[name].local_shape(0, self._ranks))  # rank 0's piece is the largest

    def _start_gather(self, names: list[str]) -> tuple[Any, torch.Tensor]:
        chosen = self._with_direction(names)
        sizes = [self._span(n) for n in names] + [self._span(n) * self.num_directions for n in chosen]
        mine = torch.zeros(sum(sizes), dtype=self.dtype, device=self.space.device)
        values = [self._pieces[n].local for n in names] + [self._stack(n) for n in chosen]
        for slot, value in zip(mine.split(sizes), values, strict=True):
            slot[: value.numel()].copy_(value.reshape(-1))
        everyone = torch.empty(self._ranks * mine.numel(), dtype=self.dtype, device=mine.device)
        return self.world.collectives.start_all_gather(everyone, mine), everyone

    def _unpack(self, names: list[str], buffer: torch.Tensor) -> tuple[Tensors, Tensors]:
        offset, full, directions = 0, Tensors(), Tensors()
        for out, wanted, lead in ((full, names, ()), (directions, self._with_direction(names), (self.num_directions,))):
            for name in wanted:
                piece, parts = self._pieces[name], []
                for rank in range(self._ranks):
                    shape = (*lead, *piece.local_shape(rank, self._ranks))
                    parts.append(buffer[rank, offset : offset + math.prod(shape)].view(shape))
                out[name] = torch.cat(parts, dim=len(lead) + piece.dim)
                offset += self._span(name) * math.prod(lead)
        return full, directions

    # -- out -----------------------------------------------------------------------------------------------------

    def add(self, tangents: Tensors) -> None:
        """Add full tangents [K, *shape] of selected parameters, summed over the ranks. Collective: yes."""
        names = list(tangents)
        if not self.sharded:
            for name in names:
                self._add(name, tangents[name])
            return
        self.settle()
        sizes = [self._span(n) * self.num_directions for n in names]
        everyone = torch.zeros((self._ranks, sum(sizes)), dtype=self.space.dtype, device=self.space.device)
        offset = 0
        for name, size in zip(names, sizes, strict=True):
            piece = self._pieces[name]
            for rank in range(self._ranks):
                low, high = piece.rows(rank, self._ranks)
                part = tangents[name].narrow(1 + piece.dim, low, high - low)
                everyone[rank, offset : offset + part.numel()].view(part.shape).copy_(part)
            offset += size
        mine = torch.empty(sum(sizes), dtype=everyone.dtype, device=everyone.device)
        work = self.world.collectives.start_reduce_scatter(mine, everyone.view(-1))
        self._reductions.append((work, mine, everyone, names))

    def finish(self) -> None:
        """Wait until every tangent has been added, of other replicas too. Collective: yes."""
        with self.world.guard("sum the tangents of all ranks"):
            self.settle()
            if self._replicas is not None:
                for result in self._results:
                    dist.all_reduce(result, group=self._replicas)
        self._directions, self._results = [], []

    def settle(self) -> None:
        """Wait until every tangent of this replica has been added. Collective: yes."""
        for work, mine, _, names in self._reductions:
            with self.world.timers.phase("reduce-scatter"):
                work.wait()
            offset = 0
            for name in names:
                shape = (self.num_directions, *self._pieces[name].local_shape(self._rank, self._ranks))
                self._add(name, mine[offset : offset + math.prod(shape)].view(shape))
                offset += self._span(name) * self.num_directions
        self._reductions.clear()

    def _add(self, name: str, tangents: torch.Tensor) -> None:
        place = self._pieces[name].place
        assert place is not None
        for result, tangent in zip(self._results, tangents, strict=True):
            result[slice(*place)].view(tangent.shape).add_(tangent)  # a reshape of the tangent would copy it


def _standing_alone(view: torch.Tensor) -> torch.Tensor:
    """Return the same memory as a tensor whose storage is no larger than itself.

    Forward-mode differentiation copies any tangent that lies in a larger storage than its primal. A fake tensor (planning)
    has no memory to share.
    """
    return torch.from_dlpack(view) if view.numel() and type(view) is torch.Tensor else view


def _piece(parameter: torch.Tensor, place: tuple[int, int] | None) -> _Piece:
    """Read where a parameter lies. A parameter without FSDP is whole."""
    dim, local = 0, parameter.detach()
    if isinstance(parameter, DTensor):
        local = parameter.to_local().detach()
        dim = next(p.dim for p in parameter.placements if isinstance(p, ShardPlacement))
    return _Piece(tuple(parameter.shape), dim, local, place)

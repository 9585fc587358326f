"""Layout: which entries of the global parameter vector belong to which rank. Pure int64 arithmetic.

Two numberings share one order (parameters by sorted name, each row-major, tied parameters once):

* the *global index* numbers every parameter of the full model; random probes and reports use it;
* the *file index* numbers the selected parameters only; files use it. Without a selection the two are equal.

A rank owns, per parameter, its shard of one dimension as ``torch.chunk`` cuts it: ceil(n / P) rows, the last ranks
fewer or none. Sharding dimension 0 gives one interval per parameter; another dimension gives one per outer index.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from hpc_hess.errors import LayoutError

Int64 = NDArray[np.int64]


@dataclass(frozen=True)
class Parameter:
    """One named parameter: its full shape, the dimension it is sharded on, its place in both numberings."""

    name: str
    shape: tuple[int, ...]
    shard_dim: int
    global_offset: int
    file_offset: int

    @property
    def numel(self) -> int:
        """Number of entries of the full parameter."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Piece:
    """A rank's part of one parameter: ``local_shape`` row-major, lying at [start, stop) of the rank's flat vector."""

    parameter: Parameter
    local_shape: tuple[int, ...]
    start: int
    stop: int
    interval_starts: Int64 = field(repr=False)  # relative to the parameter's own first entry
    interval_length: int


class Layout:
    """The table of parameters and the arithmetic of their shards over ``num_shards`` ranks.

    Parameters
    ----------
    shapes : full model's parameter shapes by name (tied parameters once).
    num_shards : number of ranks that share one copy of the parameters.
    shard_dims : sharded dimension by name; 0 where absent.
    selected : names that take part in the operator; all when None.

    Raises
    ------
    LayoutError : nothing selected, or a selected name that does not exist.

    """

    def __init__(
        self,
        shapes: dict[str, tuple[int, ...]],
        num_shards: int = 1,
        shard_dims: dict[str, int] | None = None,
        selected: set[str] | None = None,
    ) -> None:
        unknown = (selected or set()) - shapes.keys()
        if unknown:
            raise LayoutError(f"selected parameters do not exist in the model: {sorted(unknown)[:3]}")
        self.num_shards = num_shards
        self.parameters: list[Parameter] = []
        table = []
        global_offset = file_offset = 0
        for name in sorted(shapes):
            shape = tuple(int(n) for n in shapes[name])
            parameter = Parameter(name, shape, (shard_dims or {}).get(name, 0), global_offset, file_offset)
            table.append((name, shape))
            global_offset += parameter.numel
            if selected is None or name in selected:
                self.parameters.append(parameter)
                file_offset += parameter.numel
        if not self.parameters:
            raise LayoutError("no parameter is selected: widen parameters.include or narrow parameters.exclude")
        self.num_params_full = global_offset
        self.num_params = file_offset
        self.fingerprint = _fingerprint(table, [p.name for p in self.parameters])

    def shard(self, index: int) -> Shard:
        """Return the part of shard ``index`` in 0..num_shards-1. Local, no communication."""
        return Shard(self, index)


class Shard:
    """One rank's part of a Layout: pieces in parameter order, concatenated into a flat local vector of ``size``."""

    def __init__(self, layout: Layout, index: int) -> None:
        self.layout = layout
        self.index = index
        self.pieces: list[Piece] = []
        start = 0
        for parameter in layout.parameters:
            shape, dim = parameter.shape, parameter.shard_dim
            if not shape:  # a scalar belongs to shard 0, as a one-element vector would
                low, high, extent, inner, outer = 0, int(index == 0), 1, 1, 1
                local_shape: tuple[int, ...] = () if index == 0 else (0,)
            else:
                extent = shape[dim]
                chunk = -(-extent // layout.num_shards)
                low, high = min(index * chunk, extent), min((index + 1) * chunk, extent)
                outer, inner = math.prod(shape[:dim]), math.prod(shape[dim + 1 :])
                local_shape = (*shape[:dim], high - low, *shape[dim + 1 :])
            length = (high - low) * inner
            stop = start + outer * length
            starts = (np.arange(outer, dtype=np.int64) * extent + low) * inner if length else np.empty(0, np.int64)
            self.pieces.append(Piece(parameter, local_shape, start, stop, starts, length))
            start = stop
        self.size = start

    def _intervals(self, offset: str) -> tuple[Int64, Int64]:
        starts = [p.interval_starts + getattr(p.parameter, offset) for p in self.pieces]
        lengths = [np.full(len(p.interval_starts), p.interval_length, np.int64) for p in self.pieces]
        return _merge(np.concatenate(starts), np.concatenate(lengths))

    @cached_property
    def file_intervals(self) -> tuple[Int64, Int64]:
        """(starts, lengths) in the file index, ascending, adjacent ones merged, in local-vector order."""
        return self._intervals("file_offset")

    @cached_property
    def global_intervals(self) -> tuple[Int64, Int64]:
        """(starts, lengths) in the global index, ascending, adjacent ones merged, in local-vector order."""
        return self._intervals("global_offset")


def _merge(starts: Int64, lengths: Int64) -> tuple[Int64, Int64]:
    """Join intervals that touch, so that storage and hashing see as few as possible."""
    keep = lengths > 0
    starts, lengths = starts[keep], lengths[keep]
    if len(starts) == 0:
        return starts, lengths
    first = np.concatenate(([True], starts[1:] != starts[:-1] + lengths[:-1]))
    heads = np.flatnonzero(first)
    return starts[heads], np.add.reduceat(lengths, heads)


def _fingerprint(table: list[tuple[str, tuple[int, ...]]], selected: list[str]) -> str:
    """Hash of the name and shape table and of the selection: two layouts with equal hashes number entries alike."""
    text = "\n".join(f"{name} {shape}" for name, shape in table) + "\n--\n" + "\n".join(selected)
    return hashlib.sha256(text.encode()).hexdigest()

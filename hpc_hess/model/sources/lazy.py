"""Tensors that are read box by box: files, and the rearrangements that checkpoints need, without reading the whole."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

Box = tuple[tuple[int, int], ...]  # one [low, high) per dimension
_COPIED = 1 << 22  # entries read at a time
_WRITTEN = 1 << 24  # entries written at a time by a tensor that makes them where they belong


class Lazy(Protocol):
    """A tensor of known ``shape`` of which any box can be read."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Full shape."""
        ...

    def read(self, box: Box) -> torch.Tensor:
        """Return the entries in ``box``, on the CPU, in the stored dtype."""
        ...


def copy(tensor: Lazy, box: Box, place: torch.Tensor) -> None:
    """Copy a box into ``place``, of any floating dtype and device, in blocks: little is held besides. Collective: no."""
    write = getattr(tensor, "write", None)
    for part in cuts(box, _COPIED if write is None else _WRITTEN):
        where = place[tuple(slice(a - low, b - low) for (a, b), (low, _) in zip(part, box, strict=True))]
        if write is None:
            where.copy_(tensor.read(part))
        else:
            write(part, where)


def slab(shape: tuple[int, ...], dim: int, low: int, high: int) -> Box:
    """Return the box of entries [low, high) along ``dim``; of a scalar, all of it."""
    return tuple((low, high) if k == dim else (0, n) for k, n in enumerate(shape))


def cuts(box: Box, size: int) -> Iterator[Box]:
    """Yield boxes of at most ``size`` entries, in order, that make up ``box``."""
    inner = math.prod(high - low for low, high in box[1:])
    if not box or (box[0][1] - box[0][0]) * inner <= size:
        yield box
        return
    step = 1 << max(size // inner, 1).bit_length() - 1  # a power of two: blocks under one scale stay together
    for start in range(box[0][0] // step * step, box[0][1], step):
        rows = (max(start, box[0][0]), min(start + step, box[0][1]))
        for rest in [box[1:]] if inner <= size else cuts(box[1:], size):
            yield (rows, *rest)


@dataclass(frozen=True)
class Stacked:
    """Equal tensors along a new dimension: experts kept one by one in the file."""

    parts: Sequence[Lazy]
    dim: int

    @property
    def shape(self) -> tuple[int, ...]:
        """The parts' shape with their number inserted."""
        inner = self.parts[0].shape
        return (*inner[: self.dim], len(self.parts), *inner[self.dim :])

    def read(self, box: Box) -> torch.Tensor:
        """Read only the parts the box touches, each only where it does."""
        low, high = box[self.dim]
        inner = box[: self.dim] + box[self.dim + 1 :]
        if low == high:
            return _empty(inner).unsqueeze(self.dim).narrow(self.dim, 0, 0)
        return torch.stack([part.read(inner) for part in self.parts[low:high]], self.dim)


@dataclass(frozen=True)
class Joined:
    """Tensors one after the other along an existing dimension."""

    parts: Sequence[Lazy]
    dim: int

    @property
    def shape(self) -> tuple[int, ...]:
        """The parts' shape with their extents added."""
        first = self.parts[0].shape
        return (*first[: self.dim], sum(p.shape[self.dim] for p in self.parts), *first[self.dim + 1 :])

    def read(self, box: Box) -> torch.Tensor:
        """Read the parts that meet the box."""
        low, high = box[self.dim]
        start, found = 0, []
        for part in self.parts:
            stop = start + part.shape[self.dim]
            inside = (max(low, start) - start, min(high, stop) - start)
            if inside[0] < inside[1]:
                found.append(part.read((*box[: self.dim], inside, *box[self.dim + 1 :])))
            start = stop
        if not found:
            return _empty(box)
        return found[0] if len(found) == 1 else torch.cat(found, self.dim)


@dataclass(frozen=True)
class Part:
    """Entries [start, start + length) of a tensor along a dimension."""

    whole: Lazy
    dim: int
    start: int
    length: int

    @property
    def shape(self) -> tuple[int, ...]:
        """The whole's shape with ``length`` along ``dim``."""
        shape = self.whole.shape
        return (*shape[: self.dim], self.length, *shape[self.dim + 1 :])

    def read(self, box: Box) -> torch.Tensor:
        """Read the shifted box."""
        low, high = box[self.dim]
        shifted = (low + self.start, high + self.start)
        return self.whole.read((*box[: self.dim], shifted, *box[self.dim + 1 :]))


@dataclass(frozen=True)
class Rows:
    """A tensor whose row ``order[k]`` comes as row k; rows that follow each other lie near each other."""

    inner: Lazy
    order: torch.Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """The inner shape."""
        return self.inner.shape

    def read(self, box: Box) -> torch.Tensor:
        """Read the rows between the first and the last that are needed, return them in their order."""
        order = self.order[box[0][0] : box[0][1]]
        if not len(order):
            return _empty(box)
        low = int(order.min())
        return self.inner.read(((low, int(order.max()) + 1), *box[1:])).index_select(0, order - low)


@dataclass(frozen=True)
class Transposed:
    """A tensor with two dimensions exchanged."""

    inner: Lazy
    dim0: int
    dim1: int

    def _swap(self, items: Sequence[Any]) -> tuple[Any, ...]:
        swapped = list(items)
        swapped[self.dim0], swapped[self.dim1] = swapped[self.dim1], swapped[self.dim0]
        return tuple(swapped)

    @property
    def shape(self) -> tuple[int, ...]:
        """The inner shape with the two extents exchanged."""
        return self._swap(self.inner.shape)

    def read(self, box: Box) -> torch.Tensor:
        """Read the exchanged box and transpose it."""
        return self.inner.read(self._swap(box)).transpose(self.dim0, self.dim1)


@dataclass(frozen=True)
class Computed:
    """A tensor that only comes out whole: ``compute`` is run for each box, nothing is kept."""

    shape: tuple[int, ...]
    compute: Callable[[], torch.Tensor]

    def read(self, box: Box) -> torch.Tensor:
        """Compute the whole tensor, return a copy of the box."""
        return self.compute()[tuple(slice(low, high) for low, high in box)].clone()

    def write(self, box: Box, place: torch.Tensor) -> None:
        """Compute the whole tensor once, however small the blocks of others are."""
        place.copy_(self.read(box))


def _empty(box: Box) -> torch.Tensor:
    """Return an empty or unread tensor of the box's shape (used only where some extent is zero)."""
    return torch.empty([high - low for low, high in box])

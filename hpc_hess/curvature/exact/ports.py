"""What a sweep written for one direction sees of K: rows of stacked tensors in, rows of stacked tensors out.

A sweep runs once under ``torch.vmap`` for all K directions, so that whatever does not depend on the direction is
computed once. :class:`Single` is the same for a single direction without vmap.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Collect = Callable[[list[torch.Tensor]], None]
Together = Callable[[list[torch.Tensor], list[torch.Tensor]], tuple[list[torch.Tensor], list[torch.Tensor]]]


class Single:
    """A single direction: drop the leading dimension, put it back."""

    def rows(self, stacked: list[torch.Tensor]) -> list[torch.Tensor]:
        """Return this direction's rows of tensors [1, ...]."""
        return [t[0] for t in stacked]

    def collect(self, take: Collect, rows: list[torch.Tensor]) -> None:
        """Give ``take`` the tensors with the leading dimension restored."""
        take([t[None] for t in rows])

    def call(
        self, f: Together, shared: list[torch.Tensor], each: list[torch.Tensor]
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Return ``f(shared, each)``, which sees ``each`` with the leading dimension."""
        common, own = f(shared, [t[None] for t in each])
        return common, [t[0] for t in own]


class Mapped:
    """All directions at once; ``index`` is vmap's counter, a batched scalar. Use only inside that vmap."""

    def __init__(self, index: torch.Tensor) -> None:
        self._index = index

    def rows(self, stacked: list[torch.Tensor]) -> list[torch.Tensor]:
        """Return tensors [K, ...] as vmap sees one of K."""
        return list(_Rows.apply(self._index, *stacked)) if stacked else []

    def collect(self, take: Collect, rows: list[torch.Tensor]) -> None:
        """Give ``take`` the plain tensors [K, ...]."""
        if rows:
            _Collected.apply(take, self._index, *rows)

    def call(
        self, f: Together, shared: list[torch.Tensor], each: list[torch.Tensor]
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Return what ``f`` makes of plain tensors, those of ``each`` [K, ...]; its second list is mapped again."""
        count = 0

        def counting(shared: list[torch.Tensor], each: list[torch.Tensor]) -> Any:
            nonlocal count
            out = f(shared, each)
            count = len(out[0])
            return out

        out = _Called.apply(counting, len(shared), self._index, *shared, *each)
        return list(out[:count]), list(out[count:])


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(index: torch.Tensor, *stacked: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(t[int(index)] for t in stacked)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def vmap(info: Any, in_dims: Any, index: torch.Tensor, *stacked: torch.Tensor) -> Any:
        # views: an input returned as it is would come back unmapped
        return tuple(t.view_as(t) for t in stacked), (0,) * len(stacked)


class _Collected(torch.autograd.Function):
    @staticmethod
    def forward(take: Collect, index: torch.Tensor, *rows: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("collect() outside vmap")

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def vmap(info: Any, in_dims: Any, take: Collect, index: torch.Tensor, *rows: torch.Tensor) -> Any:
        take(_stacked(rows, in_dims[2:], info.batch_size))
        return index, 0


class _Called(torch.autograd.Function):
    @staticmethod
    def forward(f: Together, num_shared: int, index: torch.Tensor, *tensors: torch.Tensor) -> Any:
        raise RuntimeError("call() outside vmap")

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def vmap(info: Any, in_dims: Any, f: Together, num_shared: int, index: torch.Tensor, *tensors: torch.Tensor) -> Any:
        dims = in_dims[3:]
        # what is the same for all directions may have been computed once for each
        shared = [t if d is None else t.select(d, 0) for t, d in zip(tensors[:num_shared], dims, strict=False)]
        common, own = f(shared, _stacked(tensors[num_shared:], dims[num_shared:], info.batch_size))
        return (*common, *own), (*[None] * len(common), *[0] * len(own))


def _stacked(rows: Any, dims: Any, count: int) -> list[torch.Tensor]:
    return [r.expand(count, *r.shape) if d is None else r.movedim(d, 0) for r, d in zip(rows, dims, strict=True)]

"""What a sweep written for one direction sees of K: rows of stacked tensors in, rows of stacked tensors out.

A sweep runs once under ``torch.vmap`` for all K directions, so that whatever does not depend on the direction is
computed once. :class:`Single` is the same for a single direction without vmap.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Collect = Callable[[list[torch.Tensor]], None]


class Single:
    """A single direction: drop the leading dimension, put it back."""

    def rows(self, stacked: list[torch.Tensor]) -> list[torch.Tensor]:
        """Return this direction's rows of tensors [1, ...]."""
        return [t[0] for t in stacked]

    def collect(self, take: Collect, rows: list[torch.Tensor]) -> None:
        """Give ``take`` the tensors with the leading dimension restored."""
        take([t[None] for t in rows])


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
        stacked = [
            r.expand(info.batch_size, *r.shape) if dim is None else r.movedim(dim, 0)
            for r, dim in zip(rows, in_dims[2:], strict=True)
        ]
        take(stacked)
        return index, 0

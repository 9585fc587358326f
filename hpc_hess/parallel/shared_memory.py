"""All-gather and reduce-scatter of CPU ranks on one node, through memory that they share.

Between processes of one machine gloo copies through sockets: an all-gather of 28 MB took 28 to 39 ms on two ranks, and takes
11. Each rank has a window that the others read. What travels goes through it in pieces, through its two halves in turn: when
all have come to the next piece, all have read the one before it, so that one barrier a piece suffices.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import secrets
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from hpc_hess.parallel.shard_collectives import Done, Work
from hpc_hess.system import machine, open_of, shared_file

_ALL_HALVES_BYTES = 16 << 20  # of all ranks together: small beside anything a rank holds
_LEAST_BYTES = 1 << 20
_NONCE_BYTES = 16

Address = tuple[int, int, bytes]  # process, file descriptor, what its window begins with
Place = tuple[str, Address]  # machine(), and where there


def half_bytes(ranks: int) -> int:
    """Return the bytes of half a window where so many ranks have one."""
    return max(_ALL_HALVES_BYTES // ranks, _LEAST_BYTES) // mmap.PAGESIZE * mmap.PAGESIZE


class Window:
    """What a rank shares, which lives as long as a process holds it: nothing is left after a kill.

    Raises OSError or AttributeError where the system does not give it.
    """

    def __init__(self, ranks: int) -> None:
        self._bytes = 2 * half_bytes(ranks)
        self._file = shared_file(self._bytes)
        nonce = secrets.token_bytes(_NONCE_BYTES)
        try:
            os.pwrite(self._file, nonce, 0)
        except OSError:
            self.close()
            raise
        self.address: Address = (os.getpid(), self._file, nonce)

    def see(self, address: Address) -> torch.Tensor:
        """Return the halves [2, bytes] of a rank's window. Raises OSError if it is not on this machine."""
        process, file, nonce = address
        opened = open_of(process, file)
        try:
            if os.pread(opened, _NONCE_BYTES, 0) != nonce:
                raise OSError("a process of another machine has this number there")
            shared = mmap.mmap(opened, self._bytes)
        finally:
            os.close(opened)
        return torch.frombuffer(shared, dtype=torch.uint8).view(2, -1)

    def close(self) -> None:
        """Close the file; memory that was seen stays."""
        os.close(self._file)


def open_windows(
    ranks: int, gather: Callable[[Place | None], list[Place | None]], all_true: Callable[[bool], bool]
) -> list[torch.Tensor] | None:
    """Return the windows of ``ranks`` ranks, this one's among them; None where a rank does not see all of its own.

    ``gather``: from this rank's value to those of its ``ranks``; ``all_true``: whether it holds on every rank of all.
    Collective: yes.
    """
    window, seen = None, None
    with contextlib.suppress(OSError, AttributeError):
        window = Window(ranks)
    places = gather((machine(), window.address) if window else None)
    if window is not None and machine() and all(place is not None and place[0] == machine() for place in places):
        with contextlib.suppress(OSError, ValueError):
            seen = [window.see(address) for _, address in filter(None, places)]
    seen = seen if seen and len(seen) == ranks else None
    agreed = all_true(seen is not None)
    if window is not None:
        window.close()
    return seen if agreed else None


class SharedMemory:
    """Both collectives through ``windows``, one for each rank of ``group``, of which this is number ``rank``."""

    def __init__(self, windows: list[torch.Tensor], rank: int, group: Any) -> None:
        self._windows, self._rank, self._group = windows, rank, group
        self._half, self._turn = windows[0].shape[1], 0
        self._token = torch.zeros(1, dtype=torch.int32)

    def start_all_gather(self, out: torch.Tensor, mine: torch.Tensor) -> Work:
        """See ShardCollectives; it ends before this returns."""
        ranks, size = len(self._windows), mine.numel() * mine.element_size()
        parts, mine = out.view(torch.uint8).view(ranks, size), mine.view(torch.uint8)
        parts[self._rank].copy_(mine)  # nothing where it lies there already
        for start in range(0, size, self._half):
            width = min(self._half, size - start)
            halves = self._next()
            halves[self._rank][:width].copy_(mine[start : start + width])
            self._wait()
            for rank in self._others():
                parts[rank, start : start + width].copy_(halves[rank][:width])
        return Done()

    def start_reduce_scatter(self, out: torch.Tensor, everyone: torch.Tensor) -> Work:
        """See ShardCollectives; it ends before this returns. Sums are made in rank order."""
        ranks, parts = len(self._windows), everyone.view(len(self._windows), -1)
        each = self._half // ranks // out.element_size()
        for start in range(0, out.numel(), each):
            piece = slice(start, min(start + each, out.numel()))
            width = piece.stop - start
            halves = [half[: ranks * each * out.element_size()].view(out.dtype).view(ranks, each) for half in self._next()]
            for rank in self._others():
                halves[self._rank][rank, :width].copy_(parts[rank, piece])
            self._wait()
            total = out[piece].zero_()
            for rank in range(ranks):
                total += parts[rank, piece] if rank == self._rank else halves[rank][self._rank, :width]
        return Done()

    def _others(self) -> list[int]:
        return [rank for rank in range(len(self._windows)) if rank != self._rank]

    def _next(self) -> list[torch.Tensor]:
        """Return the half of every window that is free now."""
        self._turn = 1 - self._turn
        return [window[self._turn] for window in self._windows]

    def _wait(self) -> None:
        """Wait until every rank has written its half."""
        dist.all_reduce(self._token, group=self._group)

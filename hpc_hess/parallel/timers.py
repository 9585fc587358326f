"""Where the time of a step goes on this rank: seconds of named phases."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class Timers:
    """Phases on one device, summed from :meth:`begin` to :meth:`take`; at other times nothing is counted.

    On a CPU a phase does not count what phases inside it take. On a GPU it is what lies between two events of its stream,
    where traffic goes on beside arithmetic: phases overlap, and nothing waits for the device before :meth:`take`.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._events: list[tuple[str, Any, Any]] = []
        self._open: list[str] = []
        self._since = 0.0
        self._counting = False

    def begin(self) -> None:
        """Begin to count."""
        self._counting = True
        self._seconds.clear()
        self._events.clear()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the block as ``name``."""
        if not self._counting:
            yield
            return
        if self._cuda:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            try:
                yield
            finally:
                end.record()
                self._events.append((name, begin, end))
            return
        self._switch()
        self._open.append(name)
        try:
            yield
        finally:
            self._switch()
            self._open.pop()

    def take(self) -> dict[str, float]:
        """Return the seconds of each phase, and count no longer. Waits for the device."""
        self._counting = False
        if self._events:
            torch.cuda.synchronize()
            for name, begin, end in self._events:
                self._seconds[name] += begin.elapsed_time(end) / 1e3
        found = dict(self._seconds)
        self._seconds.clear()
        self._events.clear()
        return found

    def _switch(self) -> None:
        """Give the innermost phase the time since the last switch."""
        now = time.perf_counter()
        if self._open:
            self._seconds[self._open[-1]] += now - self._since
        self._since = now

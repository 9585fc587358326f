"""Where the time of a step goes on this rank: seconds of named phases."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from hpc_hess.parallel import devices


class Timers:
    """Phases on one device, summed from :meth:`begin` to :meth:`take`; at other times nothing is counted.

    On a CPU a phase does not count what phases inside it take. On a GPU it is what lies between two marks in its stream,
    where traffic goes on beside arithmetic: phases overlap, and nothing waits for the device before :meth:`take`.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._on_gpu = device, devices.is_gpu(device)
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._marks: list[tuple[str, Any, Any]] = []
        self._open: list[str] = []
        self._since = 0.0
        self._counting = False

    def begin(self) -> None:
        """Begin to count."""
        self._counting = True
        self._seconds.clear()
        self._marks.clear()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the block as ``name``."""
        if not self._counting:
            yield
            return
        if self._on_gpu:
            begin = devices.mark(self._device)
            try:
                yield
            finally:
                self._marks.append((name, begin, devices.mark(self._device)))
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
        if self._marks:
            devices.wait(self._device)
            for name, begin, end in self._marks:
                self._seconds[name] += begin.elapsed_time(end) / 1e3
        found = dict(self._seconds)
        self._seconds.clear()
        self._marks.clear()
        return found

    def _switch(self) -> None:
        """Give the innermost phase the time since the last switch."""
        now = time.perf_counter()
        if self._open:
            self._seconds[self._open[-1]] += now - self._since
        self._since = now

"""When to stop early: a signal or a time limit on any rank, agreed by all at a step boundary."""

from __future__ import annotations

import contextlib
import signal
import time
from types import FrameType
from typing import Any

from hpc_hess.config import parse_time_limit
from hpc_hess.parallel.world import World

EXIT_STOPPED = 75  # sysexits' EX_TEMPFAIL: run the same command again to go on


class Stopper:
    """Collects reasons to stop; use as a context manager so that signal handlers are restored."""

    def __init__(self, world: World, time_limit: str = "") -> None:
        self._world = world
        self._deadline = time.monotonic() + parse_time_limit(time_limit) if time_limit else None
        self._signal: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Stopper:
        for number in (signal.SIGUSR1, signal.SIGTERM):
            with contextlib.suppress(ValueError):  # only the main thread may set handlers (notebooks, tests)
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._signal = number

    def agreed(self, next_step_s: float) -> str:
        """Return why all ranks should stop now, or "". ``next_step_s`` is how long one more step takes.

        Collective: yes.
        """
        late = self._deadline is not None and time.monotonic() + next_step_s > self._deadline
        if self._world.any_true(self._signal is not None, "stop signal?"):
            return "a signal asked for it"
        if self._world.any_true(late, "time limit?"):
            return "the time limit is near"
        return ""

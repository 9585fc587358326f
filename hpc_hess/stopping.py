"""When to stop early: a signal, or a time limit (the run's own, the Slurm job's), agreed by all at a step boundary."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from types import FrameType
from typing import Any

from hpc_hess.config import parse_time_limit
from hpc_hess.parallel.launcher import job_end_time
from hpc_hess.parallel.world import World

EXIT_STOPPED = 75  # sysexits' EX_TEMPFAIL: run the same command again to go on
_TO_LEAVE_S = 20.0  # before Slurm ends the job: for closing the files and for the batch script to requeue it


class Stopper:
    """Collects reasons to stop; use as a context manager so that signal handlers are restored.

    ``time_limit``: of the run, from now. The end of a Slurm job counts as well; rank 0 looks it up.
    """

    def __init__(self, world: World, time_limit: str = "") -> None:
        self._world = world
        limits = [parse_time_limit(time_limit)] if time_limit else []
        job_end = job_end_time(os.environ) if world.rank == 0 else None
        if job_end is not None and job_end > time.time():  # else the variables are of a job that is gone
            limits.append(job_end - _TO_LEAVE_S - time.time())
        self._deadline = time.monotonic() + min(limits) if limits else None
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

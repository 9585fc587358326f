"""When to stop early: a signal, or a time limit (the run's own, the Slurm job's), agreed by all ranks.

Between steps, and between the micro-batches of a product that does not fit into the time that is left.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import time
from types import FrameType
from typing import Any

from hpc_hess.config import parse_time_limit
from hpc_hess.errors import EXIT_STOPPED as EXIT_STOPPED
from hpc_hess.errors import LaunchError
from hpc_hess.parallel.launcher import job_end_time
from hpc_hess.parallel.world import World

_TO_LEAVE_S = 20.0  # before Slurm ends the job: for closing the files and for the batch script to requeue it
_REASONS = ["", "the time limit is near", "a signal asked for it"]


class InterruptedProductError(Exception):
    """A product was given up, on every rank, because the run must stop; the text says why."""


class Stopper:
    """Collects reasons to stop; use as a context manager so that signal handlers are restored. Collective: yes.

    Parameters
    ----------
    time_limit : of the run, from now. The end of a Slurm job counts as well; rank 0 looks it up.
    grace_s : from a signal to the end of the job, where Slurm does not tell that end.

    Attributes
    ----------
    note : what rank 0 should say of a job whose end is not known, where no time limit is set; else "".
    received : the signals that came, on this rank.

    """

    def __init__(self, world: World, time_limit: str = "", grace_s: float = 30.0) -> None:
        self._world, self._grace_s = world, grace_s
        limits = [parse_time_limit(time_limit)] if time_limit else []
        job_end, self.note = None, ""
        try:
            job_end = job_end_time(os.environ) if world.rank == 0 else None
        except LaunchError as error:
            self.note = "" if limits else str(error)
        job_end = world.broadcast(job_end, "end of the job")
        self._job_end_known = job_end is not None and job_end > time.time()  # else of a job that is gone
        if job_end is not None and self._job_end_known:
            limits.append(job_end - _TO_LEAVE_S - time.time())
        self._deadline = time.monotonic() + min(limits) if limits else math.inf
        self.received: list[int] = []
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Stopper:
        for number in (signal.SIGUSR1, signal.SIGTERM):
            with contextlib.suppress(ValueError):  # only the main thread may set handlers (notebooks, tests)
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._previous.items():
            if handler is not None:  # of C code: Python cannot set it again
                signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self.received and not self._job_end_known:
            self._deadline = min(self._deadline, time.monotonic() + self._grace_s)
        self.received.append(number)

    def agreed(self, next_step_s: float) -> str:
        """Return why all ranks should stop now, or "". ``next_step_s`` is how long one more step takes.

        Collective: yes.
        """
        late = time.monotonic() + next_step_s > self._deadline
        return self._agree(2 if self.received else int(late))

    def agreed_within(self, remaining_s: float | None, save_s: float) -> str:
        """Return why all ranks should stop in the middle of a product, or "". Collective: yes.

        Parameters
        ----------
        remaining_s : until the product's step is committed; None if nobody knows.
        save_s : what must be left when it is given up.

        """
        left_s = self._deadline - time.monotonic()
        if remaining_s is not None and remaining_s <= left_s:
            return self._agree(0)
        return self._agree(2 if self.received else int(left_s < save_s))

    def _agree(self, reason: int) -> str:
        return _REASONS[int(self._world.max_over_ranks(reason, "time to stop?"))]
